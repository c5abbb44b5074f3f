"""What autocast means for routing: its inputs are cast as a matrix product's, its inside is not."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def _is_on(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def cast(x: Tensor) -> Tensor:
    """Under autocast, x in its dtype; float64 is left alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not _is_on(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def off(x: Tensor) -> contextlib.AbstractContextManager:
    """A context without autocast on the device of x; entering torch's own costs microseconds even when off."""
    return torch.autocast(x.device.type, enabled=False) if _is_on(x.device.type) else contextlib.nullcontext()
