"""CapsuleLinear and its lazy form."""

import copy
import math

import numpy as np
import pytest
import torch

import capsroute
from capsroute.nn import CapsuleLinear, LazyCapsuleLinear, to_layout


def test_capsule_linear_is_the_operator_with_its_own_weight(backend):
    layer = CapsuleLinear(7, 3, 4, 5, 2, bias=True, leaky=True, eps=1e-6, backend=backend)
    torch.nn.init.normal_(layer.bias)
    u, logits, mask = torch.randn(2, 6, 7, 3), torch.randn(7, 4), torch.rand(7) < 0.7
    v, c = layer(u, logits=logits, mask=mask, return_coupling=True)
    weight = layer.weight.permute(0, 2, 3, 1)
    options = {"bias": layer.bias, "logits": logits, "mask": mask, "leaky": True, "eps": 1e-6}
    expected = capsroute.capsule_linear(u, weight, 2, **options, return_coupling=True, backend=backend)
    torch.testing.assert_close((v, c), expected, rtol=0, atol=0)
    assert v.shape == (2, 6, 4, 5)
    assert c.shape == (2, 6, 7, 4)


@pytest.mark.parametrize("option", [{"coupling": "in"}, {"detach_coupling": True}, {"iterations": 1}, {"leaky": True}])
def test_capsule_linear_passes_each_option_on(option):
    torch.manual_seed(1)
    layer = CapsuleLinear(9, 4, 3, 5, **option)
    torch.manual_seed(1)
    plain = CapsuleLinear(9, 4, 3, 5)
    plain.weight.data.copy_(layer.weight)
    u = torch.randn(2, 9, 4)
    v, expected = layer(u), capsroute.capsule_linear(u, layer.weight.permute(0, 2, 3, 1), **option)
    grads = [torch.autograd.grad(x.sum(), layer.weight)[0] for x in (v, expected)]
    torch.testing.assert_close(v, expected, rtol=0, atol=0)
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    other = torch.autograd.grad(plain(u).sum(), plain.weight)[0]
    assert not torch.allclose(grads[0], other)  # the option matters here


def test_capsule_linear_keeps_its_weight_contiguous_in_the_kernels_order():
    layer = CapsuleLinear(7, 3, 4, 5)
    assert layer.weight.shape == (7, 3, 4, 5)
    layer(torch.randn(2, 7, 3)).sum().backward()
    assert layer.weight.is_contiguous()
    assert layer.weight.grad.stride() == layer.weight.stride()


@pytest.mark.parametrize("sizes", [(1152, 8, 10, 16), (256, 8, 10, 16), (20, 8, 10, 4), (50, 64, 100, 64)])
@pytest.mark.parametrize("coupling", ["out", "in"])
def test_capsule_linear_starts_where_squash_is_neither_flat_nor_full(sizes, coupling):
    inputs, features, outputs, _ = sizes
    layer = CapsuleLinear(*sizes, coupling=coupling)
    u = torch.nn.functional.normalize(torch.randn(32, inputs, features), dim=-1)
    votes = torch.einsum("bid,idjo->bijo", u, layer.weight)
    s = votes.sum(1) / (outputs if coupling == "out" else inputs)  # what the first pass sees
    assert votes.norm(dim=-1).mean() < 1.1  # no longer than u
    if math.sqrt(inputs) >= outputs and coupling == "out":
        assert 0.8 < s.norm(dim=-1).mean() < 1.2


def test_capsule_linear_shows_its_sizes_and_options():
    shown = repr(CapsuleLinear(7, 3, 4, 5, 2, bias=True, leaky=True))
    assert shown == (
        "CapsuleLinear(in_capsules=7, in_features=3, out_capsules=4, out_features=5, iterations=2, bias=True, "
        "shared=None, coupling='out', leaky=True, detach_coupling=False, eps=1e-09, backend='auto')"
    )


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 3, 4, 5), {}, ValueError, "in_capsules must be at least 1, got 0"),
        ((0, 3, 4, 5), {"shared": "pairs"}, ValueError, "in_capsules must be at least 1, got 0"),
        ((7, 3, 4, 2.0), {}, TypeError, "out_features must be an int, got float"),
        ((7, 3, True, 5), {}, TypeError, "out_capsules must be an int, got bool"),
        ((7, 3, np.int64(4), 5), {}, TypeError, r"an int, got numpy.int64: int\(out_capsules\) is one"),
        ((7, 3, 4, 5), {"eps": np.float32(1)}, TypeError, r"a float, got numpy.float32: float\(eps\) is one"),
        ((7, 3, 4, 5, 0), {}, ValueError, "iterations must be at least 1, got 0"),
        ((7, 3, 4, 5), {"coupling": "both"}, ValueError, 'coupling must be "out"'),
        ((7, 3, 4, 5), {"coupling": "in", "leaky": True}, ValueError, "leaky must be False"),
        ((7, 3, 4, 5), {"eps": 0.0}, ValueError, "eps must be a positive finite number"),
        ((None, 3, 4, 5), {}, TypeError, "in_capsules must be an int, got NoneType"),
        ((7, 3, 4, 5), {"bias": "no"}, TypeError, "bias must be True or False, got 'no'"),
        ((7, 3, 4, 5), {"shared": "all"}, ValueError, 'shared must be None, "inputs" or "pairs", got \'all\''),
        ((7, 3, 4, 5), {"shared": ["pairs"]}, ValueError, 'shared must be None, "inputs" or "pairs", got '),
    ],
)
def test_capsule_linear_refuses_wrong_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        CapsuleLinear(*arguments, **options)


@pytest.mark.parametrize(("shared", "shape"), [("inputs", (4, 5, 3)), ("pairs", (5, 3))])
def test_capsule_linear_shares_its_weight(backend, shared, shape):
    layer = CapsuleLinear(None, 3, 4, 5, shared=shared, backend=backend)
    assert layer.weight.shape == shape
    for inputs in (7, 2):  # any number
        u, logits = torch.randn(6, inputs, 3), torch.randn(6, inputs, 4)
        expected = capsroute.capsule_linear(u, layer.weight, logits=logits, backend=backend)
        torch.testing.assert_close(layer(u, logits=logits), expected, rtol=0, atol=0)
    assert layer(u, logits=torch.zeros(1, 1)).shape == (6, 4, 5)  # J is the layer's, also where logits broadcast


def test_lazy_capsule_linear_becomes_what_its_input_needs():
    layer = LazyCapsuleLinear(4, 5, 2, bias=True, coupling="in", dtype=torch.float64)
    lazy = copy.deepcopy(layer)
    parameter = layer.weight
    v = layer(torch.randn(2, 7, 3, dtype=torch.float64))
    assert type(layer) is CapsuleLinear
    assert layer.weight is parameter
    assert v.shape == (2, 4, 5)
    assert (layer.in_capsules, layer.in_features, layer.weight.shape) == (7, 3, (7, 3, 4, 5))
    assert 0.5 < layer.weight.std() * math.sqrt(5) < 1.5
    lazy.load_state_dict(layer.state_dict())
    u = torch.randn(2, 7, 3, dtype=torch.float64)
    assert torch.equal(lazy(u), layer(u))
    assert repr(lazy) == repr(layer)


def test_a_lazy_layer_that_was_loaded_knows_its_sizes():
    lazy = LazyCapsuleLinear(4, 5)
    lazy.load_state_dict(CapsuleLinear(7, 3, 4, 5).state_dict())
    with pytest.raises(ValueError, match=r"u must be \[\*, I, D\] with I = 7 and D = 3, got \[2, 8, 9\]"):
        lazy(torch.randn(2, 8, 9))
    assert (lazy.in_capsules, lazy.in_features) == (7, 3)


def test_a_lazy_layer_that_was_loaded_in_part():
    lazy = LazyCapsuleLinear(4, 5, bias=True)
    with torch.no_grad():
        lazy.bias.fill_(777)  # as memory that nobody set
    lazy = LazyCapsuleLinear(4, 5, bias=True)
    lazy.load_state_dict(CapsuleLinear(7, 3, 4, 5).state_dict(), strict=False)
    lazy.reset_parameters()  # before it knows how many inputs there are
    lazy(torch.randn(2, 7, 3))
    assert not lazy.bias.any()


def test_a_lazy_layer_of_no_inputs():
    assert not LazyCapsuleLinear(4, 5)(torch.randn(2, 0, 3)).any()


@pytest.mark.parametrize("outputs", [1, 2, 10])
def test_a_leaky_layer_starts_as_long_as_one_without(outputs):
    u = torch.randn(64, 1152, 8)

    def length(**options):
        weight = CapsuleLinear(1152, 8, outputs, 16, 1, **options).logical_weight()
        return capsroute.routing_pass(u, weight, None, **options).norm(dim=-1).mean().item()

    assert length(leaky=True) == pytest.approx(length(), rel=0.15)


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        ([0.0], TypeError, r"logits must be a tensor \[\*, I, J\], got list"),
        (torch.zeros(7, 3), ValueError, r"logits must broadcast to \[\*, I, J\] with J = 4, got \[7, 3\]"),
    ],
)
def test_prior_logits_of_a_shared_matrix_are_checked(logits, error, message):
    with pytest.raises(error, match=message):
        CapsuleLinear(7, 3, 4, 5, shared="pairs")(torch.randn(2, 7, 3), logits=logits)


def test_a_weight_for_pairs_is_not_set_to_a_shared_one():
    with pytest.raises(ValueError, match=r"weight must be \[5, 3\], got \[7, 4, 5, 3\]"):
        CapsuleLinear(None, 3, 4, 5, shared="pairs").set_weight(torch.zeros(7, 4, 5, 3), "[I, J, O, D]")


def test_a_layout_is_of_a_tensor():
    with pytest.raises(TypeError, match=r"weight must be a tensor \[I, J, O, D\], got ndarray"):
        to_layout(torch.zeros(7, 4, 5, 3).numpy(), "[J, I, D, O]")
