"""What autocast means for routing: its inputs are cast as a matrix product's, its inside is not."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

_has_autocast = functools.cache(torch.amp.is_autocast_available)  # asked on every call
_nothing = contextlib.nullcontext()


def _device_if_on(x: Tensor) -> str | None:
    """The device type of x if autocast is on there."""
    device = "cpu" if x.is_cpu else x.device.type  # a device's type is a string made anew
    return device if _has_autocast(device) and torch.is_autocast_enabled(device) else None


def is_on(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    return _device_if_on(x) is not None


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, tensors of one device in its dtype; float64 is left alone."""
    device = _device_if_on(tensors[0])
    if device is None:
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def off(x: Tensor) -> contextlib.AbstractContextManager:
    """A context without autocast on the device of x; entering torch's own costs microseconds even when off."""
    device = _device_if_on(x)
    return _nothing if device is None else torch.autocast(device, enabled=False)
