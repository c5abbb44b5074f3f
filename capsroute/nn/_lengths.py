"""The length of a capsule: the probability that what it stands for is there."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import accumulation_dtype


def capsule_lengths(capsules: Tensor) -> Tensor:
    """|v| ``[*, J]`` of ``[*, J, O]``, in float32 for low precision; its gradient is 0 at v = 0."""
    return torch.linalg.vector_norm(capsules, dim=-1, dtype=accumulation_dtype(capsules.dtype))
