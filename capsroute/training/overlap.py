"""Two digits on top of each other: the paper's MultiMNIST, made on the fly from any set of single digits.

Sabour, Frosst and Hinton 2017, section 6: each digit is shifted by up to 4 of its 28 pixels on a canvas of 36,
two of different classes are laid over each other, and the network is to name both and to draw each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reach(side: int) -> int:
    """How many pixels a digit moves at most along a side: the paper's 4 of 28."""
    return max(1, round(side * 4 / 28))


def canvas(image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(channels, height, width) of two digits of `image_shape` over each other."""
    channels, height, width = image_shape
    return channels, height + 2 * reach(height), width + 2 * reach(width)


def check(labels: Tensor) -> None:
    """Check that every image finds a partner, and that there is something to tell apart.

    Raises:
        ValueError: if there are fewer than three classes: of two, both are in every image, and nothing is to be learnt.
    """
    if int(labels.bincount().count_nonzero()) < 3:
        raise ValueError("overlapping images must be of at least three classes: of two, every pair has both")


def draw_partners(labels: Tensor, of: Tensor, generator: torch.Generator) -> Tensor:
    """For each of the images `of` ``[B]`` another one, of another class: int64 ``[B]``, indices into `labels`.

    Raises:
        ValueError: as :func:`check`.
    """
    check(labels)
    partners = of.clone()
    while len(same := (labels[partners] == labels[of]).nonzero().flatten()):
        partners[same] = torch.randint(len(labels), (len(same),), generator=generator, device=labels.device)
    return partners


def draw_moves(count: int, image_shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Whole pixels that digits move down and right on the canvas, int64 ``[count, 2]``, from 0 to 2 reach."""
    limits = torch.tensor([2 * reach(side) + 1 for side in image_shape[1:]], device=generator.device)
    return (torch.rand(count, 2, generator=generator, device=generator.device) * limits).long()


def place(images: Tensor, moves: Tensor) -> Tensor:
    """Images ``[B, C, H, W]``, moved down and right by `moves` ``[B, 2]``, on the canvas ``[B, C, H', W']``."""
    _, height, width = canvas(tuple(images.shape[1:]))
    padded = F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
    every, y, x = (torch.arange(n, device=moves.device) for n in (len(images), height, width))
    rows = (y - moves[:, :1]) % height  # [B, H']: what is pushed out is padding, and comes in above
    columns = (x - moves[:, 1:]) % width
    chosen = padded.permute(0, 2, 3, 1)[every[:, None, None], rows[:, :, None], columns[:, None]]
    return chosen.permute(0, 3, 1, 2)


def lay_over(parts: Tensor) -> Tensor:
    """One image ``[B, C, H, W]`` of parts ``[B, K, C, H, W]``: their sum, at most 1."""
    return parts.sum(1).clamp_(max=1)
