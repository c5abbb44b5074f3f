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


def out_capsules(u: Tensor, weight: Tensor | None, outputs: Tensor | None, logits: Tensor | None) -> int:
    """J. A weight [O, D] does not know it: then it comes from the logits, else from a bias or query [*, J, O]."""
    if weight is None:
        return u.shape[2]
    if weight.dim() > 2:
        return weight.shape[-3]
    return outputs.shape[-2] if logits is None else logits.shape[-1]


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
    if forbidden is not None:
        b = b.masked_fill(forbidden, -torch.inf)
    if leaky:
        c = torch.softmax(F.pad(b, (0, 1)), -1)[..., :-1]
        return c if forbidden is None else c.masked_fill(forbidden, 0)  # also zeroes the gradient, which is NaN there
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


class Stream:
    """What every pass runs over: the votes h [B, I, J, O], and logits and mask on the way to the coupling."""

    def __init__(self, u, weight, logits, mask, out_capsules: int, coupling: str, leaky: bool):
        compute = accumulation_dtype(u.dtype)
        u = u.to(compute)
        logits = None if logits is None else logits.to(compute)
        if mask is not None:  # select, do not multiply: a masked NaN must not reach anything
            u = u.masked_fill(~mask.reshape(*mask.shape, *(1,) * (u.dim() - 2)), 0)
            logits = None if logits is None else logits.masked_fill(~mask.unsqueeze(-1), 0)
        votes = u if weight is None else make_votes(u, weight.to(compute), out_capsules)
        forbidden = forbidden_pairs(logits, mask, coupling)
        if forbidden is not None:
            forbidden = forbidden.expand(votes.shape[:-1])
            votes = votes.masked_fill(forbidden.unsqueeze(-1), 0)
        self.votes, self.mask, self.forbidden = votes, mask, forbidden
        self.coupling, self.leaky = coupling, leaky
        self.logits = votes.new_zeros(votes.shape[:-1]) if logits is None else logits.expand(votes.shape[:-1])

    def couple(self, b: Tensor) -> Tensor:
        """c [B, I, J] from the logits b [B, I, J]: normalised, and 0 where masked or forbidden."""
        c = softmax(b, self.forbidden, self.coupling, self.leaky)
        return c if self.mask is None else c.masked_fill(~self.mask.unsqueeze(-1), 0)


def agreement(votes: Tensor, query: Tensor) -> Tensor:
    """h_ij . q_j, [B, I, J]."""
    return torch.einsum("bijo,bjo->bij", votes, query)


def weighted_sum(c: Tensor, votes: Tensor) -> Tensor:
    """s_j = sum over i of c_ij h_ij, [B, J, O]."""
    return torch.einsum("bij,bijo->bjo", c, votes)


def routing_pass(
    u: Tensor,  # [B, I, D], or the votes [B, I, J, O] where weight is None
    weight: Tensor | None,  # [I, J, O, D], [J, O, D], [O, D]
    query: Tensor | None,  # [B, J, O]
    logits: Tensor | None,  # [B or 1, I or 1, J]
    mask: Tensor | None,  # [B or 1, I or 1], True where the input capsule takes part
    options: Options,
) -> tuple[Tensor, Tensor]:
    """One pass: c = softmax(h . query + logits), s = sum over i of c h.

    Returns s [B, J, O] in the accumulation dtype and the coupling [B, I, J], which carries no gradient.
    """
    outputs = out_capsules(u, weight, query, logits)
    stream = Stream(u, weight, logits, mask, outputs, options.coupling, options.leaky)
    b = stream.logits if query is None else stream.logits + agreement(stream.votes, query)
    c = stream.couple(b)
    return weighted_sum(c, stream.votes), c.detach().to(u.dtype)


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
    stream = Stream(u, weight, logits, mask, out_capsules(u, weight, bias, logits), coupling, leaky)
    bias = None if bias is None else bias.to(stream.votes.dtype)
    b = stream.logits
    for k in range(1, iterations + 1):
        last = k == iterations
        c = stream.couple(b)  # [B, I, J]
        h, beta = stream.votes, bias
        if detach_coupling:  # the coupling is a constant: only the last weighted sum is differentiated
            c, h = c.detach(), h if last else h.detach()
            beta = beta if last or beta is None else beta.detach()
        s = weighted_sum(c, h)  # [B, J, O]
        s = s if beta is None else s + beta
        v = squash(s, -1, eps)
        if not last:
            b = b + agreement(h, v)
    return v.to(u.dtype), c.detach().to(u.dtype)
