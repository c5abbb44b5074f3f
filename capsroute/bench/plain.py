"""The fastest routing in plain PyTorch that we know: batched matrix products in place of einsum.

Output capsules come first, [J, B, ...], so that the softmax runs over the leading dimension, in vectors.
As in the kernels, the logits of a pass are the votes times V, the sum of all v so far, and a shared weight
needs no votes. The batch is routed in parts whose tensors stay near the cache: eager PyTorch spends most
of its time on fresh memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import accumulation_dtype, out_capsules, squash

PART_BYTES = 12 << 20  # of the largest tensor of a part; but a matrix product wants rows:
MIN_PART = 16


class _Form(NamedTuple):
    """What the routing has to know about the inputs."""

    agreement: Callable[[Tensor], Tensor]  # V [J, B, O] -> h . V [J, B, I]
    weighted_sum: Callable[[Tensor], Tensor]  # c [J, B, I], [J, 1, I] or [1, 1, 1] -> s [J, B, O]


def matmul(
    u: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    iterations: int,
    coupling: str = "out",
    detach_coupling: bool = False,
) -> Tensor:
    """v [B, J, O] from u [B, I, D], or from the votes [B, I, J, O] without a weight; logits [I, J].

    Computes in the reference's accumulation type, as the reference does.
    """
    dtype, compute = u.dtype, accumulation_dtype(u.dtype)
    u, weight, logits = (x if x is None else x.to(compute) for x in (u, weight, logits))
    outputs = out_capsules(u, weight, None, logits)
    if weight is not None and weight.dim() == 2:
        weight = weight.expand(outputs, -1, -1)
    uniform = u.new_full((1, 1, 1), 1 / (outputs if coupling == "out" else u.shape[1]))
    logits = None if logits is None else logits.t().unsqueeze(1)  # [J, 1, I]
    form, weight, numbers = _choose(u, weight)
    part = max(MIN_PART, PART_BYTES // (numbers * u.element_size()))
    rule = logits, uniform, iterations, 0 if coupling == "out" else 2, detach_coupling
    v = [_route(form(x, weight), *rule) for x in u.split(part)]
    return torch.cat(v, 1).transpose(0, 1).to(dtype)


def _choose(u: Tensor, weight: Tensor | None) -> tuple[Callable[..., _Form], Tensor | None, int]:
    """The fastest form, the weight as it wants it, the numbers a sample has in its largest tensor."""
    if weight is None:
        return _kept_votes, None, math.prod(u.shape[1:])
    inputs, (outputs, out_features, in_features) = u.shape[1], weight.shape[-3:]
    if weight.dim() == 3:
        return _shared_weight, weight, inputs * max(outputs, in_features)
    if len(u) < MIN_PART or in_features >= out_features:
        return _made_votes, weight.permute(0, 3, 1, 2), inputs * outputs * out_features
    return _no_votes, weight.permute(1, 3, 0, 2).flatten(1, 2), inputs * outputs * in_features


def _route(
    form: _Form, logits: Tensor | None, uniform: Tensor, iterations: int, dim: int, detach_coupling: bool
) -> Tensor:
    """v [J, B, O]; logits [J, 1, I]; without logits the coupling of the first pass is `uniform` [1, 1, 1]."""
    c = uniform if logits is None else torch.softmax(logits, dim)
    total = 0
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_coupling):
        for _ in range(iterations - 1):
            total = total + squash(form.weighted_sum(c))
            b = form.agreement(total)  # [J, B, I]
            c = torch.softmax(b if logits is None else b + logits, dim)
    return squash(form.weighted_sum(c))


def _kept_votes(votes: Tensor, weight: None = None) -> _Form:
    """Votes [B, I, J, O], copied once to [J, B, I, O]: each pass two products with a vector per (j, b)."""
    h = votes.permute(2, 0, 1, 3).contiguous()  # [J, B, I, O]
    return _Form(
        lambda V: torch.matmul(h, V.unsqueeze(3)).squeeze(3),
        lambda c: torch.matmul(c.expand(h.shape[:3]).unsqueeze(2), h).squeeze(2),
    )


def _made_votes(u: Tensor, weight: Tensor) -> _Form:
    """weight [I, D, J, O]: one product per input capsule makes the votes."""
    votes = torch.bmm(u.transpose(0, 1), weight.flatten(2))  # [I, B, J * O]
    return _kept_votes(votes.unflatten(2, weight.shape[2:]).transpose(0, 1))


def _no_votes(u: Tensor, weight: Tensor) -> _Form:
    """weight [J, D * I, O]: h . V = sum over d of u (W^T V), s = W (c u).

    Per pair W^T V and c u have D numbers where a vote has O, and the products have I * D terms, not D.
    """
    x = u.transpose(1, 2).contiguous()  # [B, D, I]
    return _Form(
        lambda V: (torch.bmm(V, weight.transpose(1, 2)).unflatten(2, x.shape[1:]) * x).sum(2),
        lambda c: torch.matmul((c.unsqueeze(2) * x).flatten(2), weight),
    )


def _shared_weight(u: Tensor, weight: Tensor) -> _Form:
    """weight [J, O, D]: h . V = u . (W^T V), s = W (sum over i of c u). An attention of J queries to I keys."""
    shape = weight.shape[0], *u.shape[:2]
    return _Form(
        lambda V: torch.matmul(torch.bmm(V, weight).transpose(0, 1), u.transpose(1, 2)).transpose(0, 1),
        lambda c: torch.bmm(torch.matmul(c.expand(shape).transpose(0, 1), u).transpose(0, 1), weight.transpose(1, 2)),
    )
