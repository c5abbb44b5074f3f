"""Which layout and options reproduce each well-known implementation (docs/migrating.md): value and gradients.

Each is written out anew from its equations, in its own layout, in float64; its code was read, none of it copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import capsroute
from capsroute.nn import CapsuleLinear, from_layout, to_layout

B, I, D, J, O = 3, 7, 4, 5, 6
R = 3


def squash_in_root(s: Tensor, eps: float) -> Tensor:
    n2 = (s * s).sum(-1, keepdim=True)
    return n2 / (1 + n2) / (n2 + eps).sqrt() * s


def squash_beside_root(s: Tensor, eps: float) -> Tensor:
    n = (s * s).sum(-1, keepdim=True).sqrt()
    return n**2 / (1 + n**2) / (n + eps) * s


def authors(u, w, bias):
    """Sarasra/models (TensorFlow): w [I, D, J*O]; gradients through all passes; no epsilon."""
    h = (u.unsqueeze(-1) * w).sum(2).view(B, I, J, O)
    b = torch.zeros(B, I, J, dtype=u.dtype)
    for _ in range(R):
        v = squash_in_root((b.softmax(2).unsqueeze(-1) * h).sum(1) + bias, 0)
        b = b + (h * v.unsqueeze(1)).sum(-1)  # after the last pass too, where it is not used
    return v


def authors_leaky(u, w, bias):
    """The same with leaky=True: a logit 0 in front, whose share is dropped."""
    h = (u.unsqueeze(-1) * w).sum(2).view(B, I, J, O)
    b = torch.zeros(B, I, J, dtype=u.dtype)
    for _ in range(R):
        c = torch.cat([torch.zeros(B, I, 1, dtype=u.dtype), b], 2).softmax(2)[..., 1:]
        v = squash_in_root((c.unsqueeze(-1) * h).sum(1) + bias, 0)
        b = b + (h * v.unsqueeze(1)).sum(-1)
    return v


def naturomics(u, w, bias):
    """naturomics/CapsNet-Tensorflow: w [1, I, J*O, D, 1]; votes are constants in all passes but the last."""
    h = (w * u[:, :, None, :, None]).sum(3).view(B, I, J, O)
    b = torch.zeros(B, I, J, dtype=u.dtype)
    for k in range(R):
        votes = h if k == R - 1 else h.detach()
        v = squash_in_root((b.softmax(2).unsqueeze(-1) * votes).sum(1) + bias, 1e-9)
        b = b + (h.detach() * v.unsqueeze(1)).sum(-1)
    return v


def guo_keras(u, w):
    """XifengGuo/CapsNet-Keras: w [J, I, O, D]; gradients through all passes; epsilon 1e-7."""
    h = torch.einsum("jiod,bid->bjio", w, u)
    b = torch.zeros(B, J, I, dtype=u.dtype)
    for _ in range(R):
        v = squash_in_root((b.softmax(1).unsqueeze(-1) * h).sum(2), 1e-7)
        b = b + (h * v.unsqueeze(2)).sum(-1)
    return v


def guo_pytorch(u, w):
    """XifengGuo/CapsNet-Pytorch: w [J, I, O, D]; constants in all passes but the last; epsilon beside the root."""
    h = (w @ u[:, None, :, :, None]).squeeze(-1)
    fixed, b = h.detach(), torch.zeros(B, J, I, dtype=u.dtype)
    for _ in range(R - 1):
        v = squash_beside_root((b.softmax(1).unsqueeze(-1) * fixed).sum(2), 1e-8)
        b = b + (fixed * v.unsqueeze(2)).sum(-1)
    return squash_beside_root((b.softmax(1).unsqueeze(-1) * h).sum(2), 1e-8)


def havir(u, w):
    """danielhavir/capsule-network: as guo_pytorch, w [1, J, I, O, D]."""
    return guo_pytorch(u, w[0])


def bielski(u, w, prior):
    """adambielski/CapsNet-pytorch: w [I, D, J*O], n_iterations + 1 passes, learned prior logits [I, J]."""
    n_iterations = R - 1
    h = (u.unsqueeze(2) @ w).view(B, I, J, O)
    b = prior.expand(B, I, J)
    v = squash_in_root((prior.softmax(-1).unsqueeze(-1) * h).sum(1), 0)
    for _ in range(n_iterations):
        b = b + (h * v.unsqueeze(1)).sum(-1)
        v = squash_in_root((b.softmax(-1).unsqueeze(-1) * h).sum(1), 0)
    return v


def gram(u, w):
    """gram-ai/capsule-networks: w [J, I, D, O]; the softmax over i; gradients through all passes."""
    h = (u[None, :, :, None, :] @ w[:, None]).squeeze(3)  # [J, B, I, O]
    b = torch.zeros(J, B, I, 1, dtype=u.dtype)
    for _ in range(R):
        v = squash_in_root((b.softmax(2) * h).sum(2), 0)
        b = b + (h * v.unsqueeze(2)).sum(-1, keepdim=True)
    return v.transpose(0, 1)


def higgsfield(u, w):
    """higgsfield/Capsule-Network-Tutorial: w [1, I, J, O, D]; the softmax over i; logits averaged over the batch.

    squash runs over a trailing axis of size 1: over each number by itself.
    """
    h = w @ u[:, :, None, :, None]  # [B, I, J, O, 1]
    b = torch.zeros(1, I, J, 1, 1, dtype=u.dtype)
    for _ in range(R):
        v = squash_in_root((b.softmax(1) * h).sum(1), 0)
        b = b + (h.transpose(3, 4) @ v.unsqueeze(1)).mean(0, keepdim=True)
    return v.squeeze(-1)


def comirec(u, w, mask):
    """THUDM/ComiRec, DR (TensorFlow): w [1, I, J*O, D]; constants in all passes but the last; padding gets c = 0."""
    h = (w * u.unsqueeze(2)).sum(3).view(B, I, J, O).transpose(1, 2)  # [B, J, I, O]
    b = torch.zeros(B, J, I, dtype=u.dtype)
    for k in range(R):
        c = torch.where(mask.unsqueeze(1), b.softmax(1), 0).unsqueeze(2)
        v = squash_in_root(c @ (h if k == R - 1 else h.detach()), 1e-9)
        b = b + (h.detach() @ v.transpose(2, 3)).squeeze(-1).detach()
    return v.squeeze(2)


class Implementation(NamedTuple):
    function: Callable[..., Tensor]
    layout: str
    options: dict
    extra: str | None = None  # another argument, and under which name capsule_linear takes it


KNOWN = {
    "authors": Implementation(authors, "[I, D, J*O]", {}, "bias"),
    "authors, leaky": Implementation(authors_leaky, "[I, D, J*O]", {"leaky": True}, "bias"),
    "naturomics": Implementation(naturomics, "[1, I, J*O, D, 1]", {"detach_coupling": True}, "bias"),
    "Guo, Keras": Implementation(guo_keras, "[J, I, O, D]", {"eps": 1e-7}),
    "Guo, PyTorch": Implementation(guo_pytorch, "[J, I, O, D]", {"detach_coupling": True}),
    "Havir": Implementation(havir, "[1, J, I, O, D]", {"detach_coupling": True}),
    "Bielski": Implementation(bielski, "[I, D, J*O]", {}, "logits"),
    "gram-ai": Implementation(gram, "[J, I, D, O]", {"coupling": "in"}),
    "ComiRec": Implementation(comirec, "[1, I, J*O, D]", {"detach_coupling": True}, "mask"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_options_reproduce(name):
    function, layout, options, extra = KNOWN[name]
    u = torch.randn(B, I, D, dtype=torch.float64, requires_grad=True)
    w = to_layout(torch.randn(I, J, O, D, dtype=torch.float64) / 2, layout).contiguous().requires_grad_()
    given = {
        "bias": torch.randn(J, O, dtype=torch.float64, requires_grad=True),
        "logits": torch.randn(I, J, dtype=torch.float64, requires_grad=True),
        "mask": torch.rand(B, I) < 0.6,
    }
    more = {} if extra is None else {extra: given[extra]}
    expected = function(u, w, *more.values())
    v = capsroute.capsule_linear(u, from_layout(w, layout, J=J), R, **more, **options)
    # epsilon beside the root, or none at all, is not ours: it shows below 1e-8 of a length
    assert_close(v, expected, rtol=1e-6, atol=1e-9)
    wanted = [u, w, *(x for x in more.values() if x.is_floating_point())]
    if name == "naturomics":
        wanted = [u, w]  # its bias also has a gradient through the coupling, see the docs
    cotangent = torch.randn_like(v)
    for x, y in zip(*(torch.autograd.grad(out, wanted, cotangent) for out in (v, expected)), strict=True):
        assert_close(x, y, rtol=1e-6, atol=1e-8)


def test_higgsfield_follows_from_passes_for_a_batch_of_one():
    u = torch.randn(1, I, D, dtype=torch.float64, requires_grad=True)
    w = torch.randn(1, I, J, O, D, dtype=torch.float64, requires_grad=True)
    query = torch.zeros(1, J, O, dtype=torch.float64)
    for _ in range(R):
        s = capsroute.routing_pass(u, from_layout(w, "[1, I, J, O, D]"), query, coupling="in")
        v = s * s.abs() / (1 + s * s)
        query = query + v
    expected, cotangent = higgsfield(u, w), torch.randn_like(v)
    assert_close(v, expected)
    for x, y in zip(*(torch.autograd.grad(out, (u, w), cotangent) for out in (v, expected)), strict=True):
        assert_close(x, y)


def test_options_matter():
    """The comparison above can fail: no implementation is reproduced by the options of one of another kind."""
    u, w = torch.randn(B, I, D).double(), torch.randn(I, J, O, D).double() / 2
    w.requires_grad_()

    def gradient(**options):
        return torch.autograd.grad(capsroute.capsule_linear(u, w, R, **options).square().sum(), w)[0]

    kinds = [{}, {"leaky": True}, {"detach_coupling": True}, {"coupling": "in"}]
    found = [gradient(**options) for options in kinds]
    for k, x in enumerate(found):
        assert not any(torch.allclose(x, y, rtol=1e-3) for y in found[:k])


# Layouts


@pytest.mark.parametrize("layout", sorted({"[1, I, J, O, D]", *(known.layout for known in KNOWN.values())}))
def test_layouts_go_there_and_back(layout):
    weight = torch.arange(I * J * O * D).view(I, J, O, D)
    foreign = to_layout(weight, layout)
    assert torch.equal(from_layout(foreign, layout, J=J), weight)
    at = {"I": 1, "J": 2, "O": 3, "D": 1}
    index = []
    for axis in layout.strip("[]").split(", "):
        index.append({"1": 0, "J*O": at["J"] * O + at["O"]}.get(axis, at.get(axis)))
    assert foreign[tuple(index)] == weight[1, 2, 3, 1]


@pytest.mark.parametrize(("layout", "shape"), [("[J*O, D]", (J, O, D)), ("[D, O]", (O, D)), ("[D,J,O]", (J, O, D))])
def test_layouts_of_shared_weights(layout, shape):
    weight = torch.randn(shape)
    assert torch.equal(from_layout(to_layout(weight, layout), layout, J=J) if "J" in layout else weight, weight)
    assert from_layout(to_layout(weight, layout), layout, **({"J": J} if "*" in layout else {})).shape == shape


def test_layouts_are_views_where_they_can_be():
    foreign = torch.randn(1, J, I, O, D)
    assert from_layout(foreign, "[1, J, I, O, D]").data_ptr() == foreign.data_ptr()


@pytest.mark.parametrize(
    ("shape", "layout", "sizes", "message"),
    [
        ((7, 3, 20), "[I, K, O]", {}, r"layout must have the letters of \[I, J, O, D\], \[J, O, D\], \[O, D\]"),
        ((7, 3, 20), "[I, I, J*O]", {}, "layout must have the letters"),
        ((2, 2, 3, 4, 5), "[I, I, J, O, D]", {}, "layout must have the letters"),
        ((7, 3, 20), "[I, D, O]", {}, "layout must have the letters"),
        ((7, 3, 20), "[I, D, J*O]", {}, r"the size of J or O must be given: J\*O is 20 in weight"),
        ((7, 3, 20), "[I, D, J*O]", {"J": 3}, r"weight must be \[I, D, J\*O\] with J = 3, got \[7, 3, 20\]"),
        ((7, 3), "[I, D, J*O]", {"J": 4}, r"weight must be \[I, D, J\*O\], got \[7, 3\]"),
        ((2, 7, 3, 4, 5), "[1, I, D, J, O]", {}, r"weight must be \[1, I, D, J, O\]"),
        ((7, 3, 20), "[I, D, J*O]", {"J": 0}, "J must be at least 1, got 0"),
        ((7, 3, 20), None, {}, r'layout must be a str such as "\[J, I, D, O\]", got NoneType'),
    ],
)
def test_wrong_layouts_are_named(shape, layout, sizes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        from_layout(torch.zeros(shape), layout, **sizes)


def test_to_layout_names_what_it_expects():
    with pytest.raises(
        ValueError, match=r"weight must be \[I, J, O, D\] for the layout \[J, I, D, O\], got \[4, 5, 3\]"
    ):
        to_layout(torch.zeros(4, 5, 3), "[J, I, D, O]")


def test_a_layer_takes_the_weight_of_another_implementation():
    layer = CapsuleLinear(I, D, J, O, dtype=torch.float64, coupling="in")
    w = torch.randn(J, I, D, O, dtype=torch.float64)
    layer.set_weight(w, "[J, I, D, O]")
    u = torch.randn(B, I, D, dtype=torch.float64)
    assert_close(layer(u), gram(u, w))
    layer.set_weight(to_layout(layer.logical_weight(), "[I, D, J*O]"), "[I, D, J*O]")  # its sizes are known
    assert_close(layer(u), gram(u, w))
    with pytest.raises(ValueError, match=r"weight must be \[7, 5, 6, 4\], got \[6, 5, 6, 4\]"):
        layer.set_weight(torch.zeros(I - 1, J, O, D))
