"""What autocast means for routing: its inputs are cast as a matrix product's, its inside is not."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

_has_autocast = functools.cache(torch.amp.is_autocast_available)  # asked on every call
_nothing = contextlib.nullcontext()


def _is_on(device: str) -> bool:
    return _has_autocast(device) and torch.is_autocast_enabled(device)


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, tensors of one device in its dtype; float64 is left alone."""
    device = tensors[0].device.type
    if not _is_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def off(x: Tensor) -> contextlib.AbstractContextManager:
    """A context without autocast on the device of x; entering torch's own costs microseconds even when off."""
    return torch.autocast(x.device.type, enabled=False) if _is_on(x.device.type) else _nothing
