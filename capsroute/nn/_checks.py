"""Checks of the arguments of modules."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_int, check_tensor


def check_sizes(**sizes: int) -> None:
    """Every argument, given by its name, is an int of at least 1."""
    for name, size in sizes.items():
        check_int(name, size, least=1)


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


def check_widths(name: str, widths: tuple[int, ...]) -> None:
    """A tuple or list of sizes; it may be empty."""
    if not isinstance(widths, (tuple, list)):
        raise TypeError(f"{name} must be a tuple of ints, got {type(widths).__name__}")
    check_sizes(**{f"{name}[{k}]": width for k, width in enumerate(widths)})


def check_images(images: Tensor, image_shape: tuple[int, int, int]) -> None:
    """A batch of images of a known size."""
    check_tensor("images", images, "[B, C, H, W]")
    if images.dim() != 4 or tuple(images.shape[1:]) != image_shape:
        channels, height, width = image_shape
        raise ValueError(
            f"images must be [B, C, H, W] with C = {channels}, H = {height} and W = {width}, got {list(images.shape)}"
        )


def for_outputs(logits: Tensor, outputs: int) -> Tensor:
    """Prior logits [*, I, J] from what broadcasts to that: a weight [O, D] takes J from them."""
    check_tensor("logits", logits, "[*, I, J]")
    if logits.dim() and logits.shape[-1] not in (1, outputs):
        raise ValueError(f"logits must broadcast to [*, I, J] with J = {outputs}, got {list(logits.shape)}")
    return logits.expand(*logits.shape[:-1], outputs)


def check_labels(labels: Tensor, batch: int, several: bool = True) -> None:
    """One or, where that may be, K class indices for each image; that they are below J is left to what reads them."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be an int64 tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    letters = "[B] or [B, K]" if several else "[B]"
    if not 1 <= labels.dim() <= 1 + several or labels.shape[0] != batch:
        raise ValueError(f"labels must be {letters} with B = {batch}, got {list(labels.shape)}")


def is_labelled(labels: Tensor, batch: int, classes: int, several: bool = True) -> Tensor:
    """Checked labels [B] or [B, K] as bool [B, J]. torch refuses those outside 0..J-1; F.one_hot would refuse vmap."""
    check_labels(labels, batch, several)
    if labels.dim() == 2 and labels.shape[1] >= max(classes, 2):  # taken for indices, 0 and 1 would pass as classes
        raise ValueError(
            f"labels must be [B] or [B, K] with K < J = {classes}, got {list(labels.shape)}; "
            "of one-hot labels pass .argmax(1)"
        )
    nowhere = labels.new_zeros(batch, classes, dtype=torch.bool)
    return nowhere.scatter(1, labels if labels.dim() == 2 else labels.unsqueeze(1), 1)  # torch.jit.trace takes no True
