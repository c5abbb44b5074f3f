"""LabelAwareAttention: the paper's where that is defined, and the limits of its power."""

import math

import pytest
import torch
from torch.testing import assert_close

from capsroute.nn import LabelAwareAttention

BATCH, INTERESTS, OUT = 5, 3, 6


@pytest.mark.parametrize("power", [1, 2.5, 3, 10])
def test_label_aware_attention_is_the_papers_where_that_is_defined(power):
    interests = torch.rand(BATCH, INTERESTS, OUT, dtype=torch.float64, requires_grad=True)
    label = torch.rand(BATCH, OUT, dtype=torch.float64, requires_grad=True)
    agreement = torch.einsum("bjo,bo->bj", interests, label)
    expected = torch.einsum("bj,bjo->bo", torch.softmax(agreement**power, 1), interests)
    v = LabelAwareAttention(power)(interests, label)
    assert_close(v, expected)
    g = torch.randn_like(v)
    leaves = [interests, label]
    assert_close(torch.autograd.grad(v, leaves, g), torch.autograd.grad(expected, leaves, g))


def test_a_great_power_takes_the_nearest_interest():
    interests, label = (
        torch.randn(50, INTERESTS, OUT) * 3,
        torch.randn(50, OUT) * 3,
    )  # far beyond what a^p can be raised to
    nearest = (interests * label.unsqueeze(1)).sum(-1).argmax(-1)
    expected = interests[torch.arange(50), nearest]
    assert torch.equal(LabelAwareAttention(math.inf)(interests, label), expected)
    clear = (interests * label.unsqueeze(1)).sum(-1).topk(2).values.diff().abs().squeeze(-1) > 1
    assert_close(LabelAwareAttention(60)(interests, label)[clear], expected[clear])


@pytest.mark.parametrize("power", [1, 1.5, 40, math.inf])
def test_no_gradient_of_attention_is_nan(power):
    interests = torch.randn(4, INTERESTS, OUT) * torch.tensor([0.0, 1e-20, 1.0, 1e3])[:, None, None]
    leaves = interests.requires_grad_(), torch.ones(4, OUT, requires_grad=True)
    v = LabelAwareAttention(power)(*leaves)
    grads = torch.autograd.grad(v.sum(), leaves, materialize_grads=True)
    assert all(x.isfinite().all() for x in (v, *grads))


def test_the_gradient_of_an_interest_far_away_is_finite():
    interests = torch.tensor([[[0.1], [-1e3]]], requires_grad=True)
    v = LabelAwareAttention(40)(interests, torch.ones(1, 1))
    assert_close(v, torch.tensor([[0.1]]))
    assert torch.autograd.grad(v.sum(), interests)[0].isfinite().all()


@pytest.mark.parametrize("power", [1, 2, math.inf])
def test_attention_leaves_out_what_is_masked(power):
    interests, label = torch.randn(3, INTERESTS, OUT), torch.randn(3, OUT)
    mask = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    dirty = interests.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    v = LabelAwareAttention(power)(dirty, label, mask)
    assert_close(v[:1], LabelAwareAttention(power)(interests[:1, [0, 2]], label[:1]))
    assert_close(v[1], interests[1, 1])
    assert torch.equal(v[2], torch.zeros(OUT))
    v.sum().backward()
    assert dirty.grad.isfinite().all()


@pytest.mark.parametrize("power", [1, 2])
def test_a_masked_interest_is_farther_than_any(power):
    interests, label = torch.tensor([[[1e3], [5.0]]]), torch.tensor([[-1e3]])
    v = LabelAwareAttention(power)(interests, label, torch.tensor([[True, False]]))
    assert torch.equal(v, torch.tensor([[1e3]]))


@pytest.mark.parametrize("power", [1, 2, math.inf])
def test_agreements_beyond_float16(power):
    interests, label = 100 * torch.randn(4, INTERESTS, OUT).half(), 100 * torch.randn(4, OUT).half()
    attention = LabelAwareAttention(power)
    v = attention(interests, label)
    assert v.dtype == torch.float16
    assert torch.equal(v, attention(interests.float(), label.float()).half())


@pytest.mark.parametrize("power", [1, 2, math.inf])
def test_attention_over_no_interests_is_zero(power):
    assert torch.equal(LabelAwareAttention(power)(torch.rand(2, 0, 3), torch.rand(2, 3)), torch.zeros(2, 3))


def test_attention_refuses_wrong_arguments():
    attention = LabelAwareAttention()
    with pytest.raises(ValueError, match=r"label must be \[\*, O\] where interests are \[\*, J, O\], got \[3, 6\]"):
        attention(torch.randn(2, INTERESTS, OUT), torch.randn(3, OUT))
    with pytest.raises(ValueError, match="label must be"):
        attention(torch.randn(OUT), torch.randn(OUT))
    with pytest.raises(ValueError, match=r"mask must broadcast to \[\*, J\]"):
        attention(torch.randn(2, INTERESTS, OUT), torch.randn(2, OUT), torch.ones(2, 2, dtype=torch.bool))
    assert LabelAwareAttention(10**400).power == math.inf
    with pytest.raises(ValueError, match=r"power must be at least 1, got 0.5"):
        LabelAwareAttention(0.5)
    with pytest.raises(ValueError, match=r"power must be at least 1, got -1000"):
        LabelAwareAttention(-(10**400))
    with pytest.raises(TypeError, match="power must be a float, got str"):
        LabelAwareAttention("inf")
    with pytest.raises(ValueError, match=r"label must be on the device of the input capsules, .*, got meta"):
        attention(torch.randn(2, INTERESTS, OUT), torch.randn(2, OUT, device="meta"))
