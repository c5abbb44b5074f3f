"""squash: value and gradient at every length, alone and inside the operator, against exact float64 formulas."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import capsroute

# From vectors whose squared length vanishes in float32 to those whose squared length nearly overflows it.
LENGTHS = [0.0, 1e-30, 1e-25, 1e-20, 1e-15, 1e-10, 1e-5, 3e-5, 1e-3, 0.1, 1.0, 3.0, 1e2, 1e4]
LONG = [1e6, 1e9, 1e12, 1e15, 1e18]

FEATURES = [1, 3, 16]
EPS = [1e-9, 1e-3]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def vectors(lengths: list[float], features: int, dtype: torch.dtype) -> Tensor:
    """[N, O]: four directions of each length; the first along one axis."""
    directions = torch.randn(4, features, dtype=torch.float64)
    directions[0] = torch.eye(features, dtype=torch.float64)[0]
    directions /= directions.norm(dim=-1, keepdim=True)
    return (torch.tensor(lengths, dtype=torch.float64)[:, None, None] * directions).flatten(0, 1).to(dtype)


def exact(s: Tensor, g: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """v, J_squash(s)^T g, and the length of what is summed to it, in float64, where no length overflows."""
    s, g = s.double(), g.double()
    n2 = (s * s).sum(-1, keepdim=True)
    r = (n2 + eps).sqrt()
    f = n2 / (1 + n2) / r
    grad = f * g + (2 * r / (1 + n2) ** 2 - f) * (s / r * g).sum(-1, keepdim=True) * s / r
    return f * s, grad, f * g.norm(dim=-1, keepdim=True) + grad.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient_agree_with_float64_at_every_length(dtype, eps, features):
    assert_agrees_with_float64(lambda s: capsroute.squash(s, eps=eps), dtype, eps, features)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("iterations", [1, 3])
def test_the_squash_inside_the_operator_does_so_too(backend, iterations, dtype, eps, features):
    def routing_to_one_capsule(s):  # of one: c = 1 and s = h in every pass
        return capsroute.dynamic_routing(s[:, None, None], iterations, eps=eps, backend=backend)[:, 0]

    assert_agrees_with_float64(routing_to_one_capsule, dtype, eps, features)


def assert_agrees_with_float64(squash: Callable[[Tensor], Tensor], dtype: torch.dtype, eps: float, features: int):
    s = vectors(LENGTHS if dtype == torch.float16 else LENGTHS + LONG, features, dtype).requires_grad_()
    v = squash(s)
    g = torch.randn_like(v)
    (grad,) = torch.autograd.grad(v, s, g)
    exact_v, exact_grad, scale = exact(s.detach(), g, eps)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    relative = torch.finfo(dtype).eps + 16 * torch.finfo(compute).eps
    # Where |s|^2 is subnormal in the type of computation it has few digits, and v and the gradient are about
    # |s|^2 / sqrt(eps); then there are the results that are subnormal in their own type.
    vanishing = torch.finfo(compute).tiny / math.sqrt(eps) + torch.finfo(dtype).eps * torch.finfo(dtype).tiny
    vanishing *= features**0.5 * (1 + g.double().norm(dim=-1))
    assert ((v.double() - exact_v).norm(dim=-1) <= relative * exact_v.norm(dim=-1) + vanishing).all()
    assert ((grad.double() - exact_grad).norm(dim=-1) <= relative * scale.squeeze(-1) + vanishing).all()


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_dim_holds_the_features(dim):
    s = torch.randn(3, 4, 5)
    assert_close(capsroute.squash(s, dim), capsroute.squash(s.movedim(dim, -1)).movedim(-1, dim))


def test_finite_differences():
    s = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(capsroute.squash, s)
    assert torch.autograd.gradgradcheck(capsroute.squash, s)


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_power(power):
    s = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    length = s.norm(dim=-1, keepdim=True)
    expected = (length**2 / (1 + length**2)) ** power * s / (length**2 + 1e-9).sqrt()
    assert_close(capsroute.squash(s, power=power), expected)
    assert torch.autograd.gradcheck(lambda s: capsroute.squash(s, power=power), s)


@pytest.mark.parametrize("power", [0.1, 0.5, 3.0])
def test_power_has_a_gradient_at_every_length(power):
    s = vectors(LENGTHS + LONG, 3, torch.float32).requires_grad_()
    v = capsroute.squash(s, power=power)
    (grad,) = torch.autograd.grad(v.sum(), s)
    assert v.isfinite().all()
    assert grad.isfinite().all()
    assert (v.norm(dim=-1) <= 1 + 1e-6).all()


@pytest.mark.parametrize("power", [0.0, -1.0, math.inf, math.nan])
def test_power_is_positive(power):
    with pytest.raises(ValueError, match="power must be a positive finite number"):
        capsroute.squash(torch.randn(3), power=power)


def test_no_vectors():
    assert capsroute.squash(torch.ones(0, 4)).shape == (0, 4)
    assert capsroute.squash(torch.ones(4, 0)).shape == (4, 0)
