"""Attention of the item that was clicked next to the interests that might explain it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import _checks
from ..reference import accumulation_dtype


class LabelAwareAttention(nn.Module):
    """One vector for a user, by the item in question: softmax over j of (v_j . label)^p, times v_j.

    Li et al. 2019, section 3.4. Only for training: it shows each item to the interest nearest to it. A
    negative a = v_j . label counts as -|a|^p, so that a greater p always favours the nearest interest; the
    paper's a^p is not defined there or, for an even p, favours the farthest.

    Args:
        power: p, at least 1. ``math.inf`` takes the nearest interest alone, as ComiRec and most libraries do.

    Raises:
        TypeError, ValueError: if the power is not a number of at least 1.
    """

    def __init__(self, power: float = 1.0):
        super().__init__()
        self.power = _checks.check_number("power", power)
        if not self.power >= 1:
            raise ValueError(f"power must be at least 1, got {power}")

    def forward(self, interests: Tensor, label: Tensor, mask: Tensor | None = None) -> Tensor:
        """The users' vectors.

        Args:
            interests: v, ``[*, J, O]``.
            label: the items' vectors, ``[*, O]``.
            mask: bool, broadcast to ``[*, J]``; False takes an interest out, such as one that
                :func:`active_interests` does not give to a user.

        Returns:
            ``[*, O]``, 0 where a user has no interest.

        Raises:
            TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
        """
        _checks.check_tensor("interests", interests, "[*, J, O]")
        _checks.check_tensor("label", label, "[*, O]")
        if interests.dim() < 2 or label.shape != (*interests.shape[:-2], interests.shape[-1]):
            raise ValueError(
                f"label must be [*, O] where interests are [*, J, O], got {list(label.shape)} "
                f"where interests are {list(interests.shape)}"
            )
        _checks.check_device("label", label, interests)
        if mask is not None:
            _checks.check_mask(mask, interests.shape[:-1], interests, "[*, J]")
            interests = interests.masked_fill(~mask.unsqueeze(-1), 0)
        dtype = accumulation_dtype(interests.dtype)
        agreement = (interests.to(dtype) * label.to(dtype).unsqueeze(-2)).sum(-1)  # [*, J]
        if mask is not None:
            agreement = agreement.masked_fill(~mask, torch.finfo(dtype).min)
        share = _share(agreement, self.power)  # [*, J]
        return (share.unsqueeze(-1) * interests.to(dtype)).sum(-2).to(interests.dtype)

    def extra_repr(self) -> str:
        return f"power={self.power:g}"


def _share(agreement: Tensor, power: float) -> Tensor:
    """softmax of sign(a) |a|^p over the last dimension."""
    if agreement.shape[-1] == 0:  # of nothing
        return agreement
    if power == math.inf:
        return torch.zeros_like(agreement).scatter(-1, agreement.argmax(-1, keepdim=True), 1)
    if power == 1:
        return torch.softmax(agreement, -1)
    # a^p = m^p (a / m)^p for every m. With m = |a| of the nearest, or 1, neither factor grows beyond what a softmax can
    # tell apart: where they are cut off, the nearest has all and the others nothing, as without a cut.
    m = agreement.detach().amax(-1, keepdim=True).abs().clamp_min(1)
    ratio = (agreement / m).clamp_min(-(1e8 ** (1 / power)))
    away_from_0 = ratio.abs().clamp_min(torch.finfo(ratio.dtype).tiny)  # so that |r|^(p-1) has a derivative
    return torch.softmax((m**power).clamp_max(1e30) * ratio * away_from_0 ** (power - 1), -1)
