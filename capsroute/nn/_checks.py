"""Checks of the arguments of modules."""

from __future__ import annotations

import torch
from torch import Tensor


def check_sizes(**sizes: int) -> None:
    """Every argument, given by its name, is an int of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def pair(name: str, value: int | tuple[int, int], least: int = 1) -> tuple[int, int]:
    """(height, width) from one int or two."""
    both = (value, value) if isinstance(value, int) else value
    ints = isinstance(both, (tuple, list)) and all(isinstance(n, int) and not isinstance(n, bool) for n in both)
    if not ints or len(both) != 2:
        raise TypeError(f"{name} must be an int or (height, width), got {value!r}")
    if min(both) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return tuple(both)


def check_image_shape(image_shape: tuple[int, int, int]) -> None:
    """Three sizes: channels, height and width."""
    if not isinstance(image_shape, (tuple, list)) or len(image_shape) != 3:
        raise ValueError(f"image_shape must be (channels, height, width), got {image_shape!r}")
    check_sizes(**dict(zip(("image_shape[0]", "image_shape[1]", "image_shape[2]"), image_shape, strict=True)))


def check_labels(labels: Tensor, batch: int) -> None:
    """One or K class indices for each image; that they are below J is left to what reads the values."""
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.dim() not in (1, 2) or labels.shape[0] != batch:
        raise ValueError(f"labels must be [B] or [B, K] with B = {batch}, got {list(labels.shape)}")


def is_labelled(labels: Tensor, batch: int, classes: int) -> Tensor:
    """Checked labels [B] or [B, K] as bool [B, J]. torch refuses those outside 0..J-1; F.one_hot would refuse vmap."""
    check_labels(labels, batch)
    nowhere = labels.new_zeros(batch, classes, dtype=torch.bool)
    return nowhere.scatter(1, labels.reshape(batch, -1), True)
