"""The truth: capsule routing in plain PyTorch, on any device, in any supported dtype.

Every kernel is judged against this file, so it is never changed to match one.
Letters, used in the whole package: B batch, I input capsules, D their features, J output
capsules, O their features, R routing iterations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Options(NamedTuple):
    """The options of the operator that are not tensors."""

    iterations: int = 3
    coupling: str = "out"
    leaky: bool = False
    detach_coupling: bool = False
    eps: float = 1e-9


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums, softmax and squash are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def squash(s: Tensor, dim: int = -1, eps: float = 1e-9, power: float = 1) -> Tensor:
    """v = (n2 / (1 + n2))^power * s / sqrt(n2 + eps), n2 = |s|^2 over `dim` (Sabour et al. 2017, eq. 1: power 1)."""
    n2 = (s * s).sum(dim, keepdim=True)
    length = n2 / (1 + n2)
    if power != 1:  # its gradient at 0 may be infinite, that of v is not
        length = length.clamp_min(torch.finfo(s.dtype).tiny) ** power
    return length * s / (n2 + eps).sqrt()


def out_capsules(u: Tensor, weight: Tensor | None, bias: Tensor | None, logits: Tensor | None) -> int:
    """J. A weight [O, D] does not know it: then it comes from the logits, else from the bias."""
    if weight is None:
        return u.shape[2]
    if weight.dim() > 2:
        return weight.shape[-3]
    return bias.shape[0] if logits is None else logits.shape[-1]


def make_votes(u: Tensor, weight: Tensor, out_capsules: int) -> Tensor:
    """The votes h_ij = W_ij u_i, [B, I, J, O], for each of the three weight forms."""
    if weight.dim() == 4:
        return torch.einsum("bid,ijod->bijo", u, weight)
    if weight.dim() == 3:
        return torch.einsum("bid,jod->bijo", u, weight)
    votes = torch.einsum("bid,od->bio", u, weight)
    return votes.unsqueeze(2).expand(-1, -1, out_capsules, -1)


def softmax(b: Tensor, forbidden: Tensor | None, coupling: str, leaky: bool) -> Tensor:
    """c [B, I, J] from b [B, I, J]; a forbidden pair, and a row of nothing else, couples with 0."""
    if leaky:
        return torch.softmax(F.pad(b, (0, 1)), -1)[..., :-1]
    dim = -1 if coupling == "out" else -2
    if forbidden is None:
        return torch.softmax(b, dim)
    all_forbidden = forbidden.all(dim, keepdim=True)  # softmax would be NaN there, and its gradient
    return torch.softmax(b.masked_fill(all_forbidden, 0), dim).masked_fill(forbidden, 0)


def forbidden_pairs(logits: Tensor | None, mask: Tensor | None, coupling: str) -> Tensor | None:
    """Where the softmax must give 0: at -inf logits and, where it runs over i, at masked i."""
    forbidden = None if logits is None else logits == -torch.inf
    if mask is not None and coupling == "in":
        masked = ~mask.unsqueeze(-1)
        forbidden = masked if forbidden is None else forbidden | masked
    return forbidden


def routing(
    u: Tensor,  # [B, I, D], or the votes [B, I, J, O] where weight is None
    weight: Tensor | None,  # [I, J, O, D], [J, O, D], [O, D]
    bias: Tensor | None,  # [J, O]
    logits: Tensor | None,  # [B or 1, I or 1, J]
    mask: Tensor | None,  # [B or 1, I or 1], True where the input capsule takes part
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Routing by agreement (Sabour, Frosst, Hinton 2017, Procedure 1).

    Returns v [B, J, O] and the coupling of the last pass [B, I, J], which carries no gradient.
    """
    iterations, coupling, leaky, detach_coupling, eps = options
    dtype, compute = u.dtype, accumulation_dtype(u.dtype)
    u = u.to(compute)
    bias = None if bias is None else bias.to(compute)
    logits = None if logits is None else logits.to(compute)
    if mask is not None:  # select, do not multiply: a masked NaN must not reach anything
        u = u.masked_fill(~mask.reshape(*mask.shape, *(1,) * (u.dim() - 2)), 0)
        logits = None if logits is None else logits.masked_fill(~mask.unsqueeze(-1), 0)
    if weight is None:
        votes = u
    else:
        votes = make_votes(u, weight.to(compute), out_capsules(u, weight, bias, logits))
    forbidden = forbidden_pairs(logits, mask, coupling)
    if forbidden is not None:
        forbidden = forbidden.expand(votes.shape[:-1])
        votes = votes.masked_fill(forbidden.unsqueeze(-1), 0)

    b = votes.new_zeros(votes.shape[:-1]) if logits is None else logits.expand(votes.shape[:-1])
    for k in range(1, iterations + 1):
        last = k == iterations
        if forbidden is not None:
            b = b.masked_fill(forbidden, -torch.inf)
        c = softmax(b, forbidden, coupling, leaky)  # [B, I, J]
        if mask is not None:
            c = c.masked_fill(~mask.unsqueeze(-1), 0)
        h, beta = votes, bias
        if detach_coupling:  # the coupling is a constant: only the last weighted sum is differentiated
            c, h = c.detach(), h if last else h.detach()
            beta = beta if last or beta is None else beta.detach()
        s = torch.einsum("bij,bijo->bjo", c, h)  # [B, J, O]
        s = s if beta is None else s + beta
        v = squash(s, -1, eps)
        if not last:
            b = b + torch.einsum("bijo,bjo->bij", h, v)
    return v.to(dtype), c.detach().to(dtype)
