"""What a step of training and a test see: batches of images, made from a split, a seed and the number of the epoch.

Nothing else is random, so a training that goes on in a new process goes on the same way. Random numbers are
drawn for the whole batch, and then each of several processes makes its own share of the images: together they
see what one process would see.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import overlap
from .augment import Augmentation, warp
from .data import Split

TEST_SEED = 0  # of the pairs of overlapping digits that are tested, whatever the seed of the training


class Batch(NamedTuple):
    """Images with K things to be seen in each: 1, or 2 where digits overlap."""

    images: Tensor  # [B, C, H, W], float32 in [0, 1]
    labels: Tensor  # [B, K], int64
    parts: Tensor  # [B, K, C, H, W]: each thing alone, which is to be reconstructed
    whole: int  # how many images the batch has in all processes together

    def to(self, device: torch.device) -> Batch:
        return Batch(*(x.to(device, non_blocking=True) for x in self[:3]), self.whole)


class Share(NamedTuple):
    """Which images of each batch are this process's own: every `count`-th from `rank`."""

    rank: int = 0
    count: int = 1

    def of(self, x: Tensor) -> Tensor:
        return x[self.rank :: self.count]


WHOLE = Share()


class _Scene(NamedTuple):
    """Every random choice of a batch: which images [B, K], how they are warped and moved."""

    chosen: Tensor
    maps: Tensor | None  # [B, K, 2, 3]
    moves: Tensor | None  # [B, K, 2], where digits overlap

    def make(self, split: Split, share: Share) -> Batch:
        chosen = share.of(self.chosen)  # [b, K]
        picked = split[chosen.flatten()]
        images = picked.as_float()
        if self.maps is not None:
            images = warp(images, share.of(self.maps).flatten(0, 1))
        if self.moves is not None:
            images = overlap.place(images, share.of(self.moves).flatten(0, 1))
        parts = images.unflatten(0, chosen.shape)
        return Batch(overlap.lay_over(parts), picked.labels.view(chosen.shape), parts, len(self.chosen))


def steps_per_epoch(images: int, batch_size: int, processes: int = 1) -> int:
    """Batches of an epoch. A last batch of fewer images than processes is left out.

    Raises:
        ValueError: if a batch, or the epoch, has fewer images than there are processes.
    """
    if batch_size < processes:
        raise ValueError(f"batch_size must be at least 1 for each of {processes} processes, got {batch_size}")
    if images < processes:
        raise ValueError(f"there must be a training image for each of {processes} processes, got {images}")
    full, rest = divmod(images, batch_size)
    return full + (rest >= processes)


def training_batches(
    split: Split,
    batch_size: int,
    augmentation: Augmentation,
    *,
    seed: int,
    epoch: int,
    overlapping: bool = False,
    share: Share = WHOLE,
) -> Iterator[Batch]:
    """The batches of one epoch, in random order, augmented; with `overlapping` each image with a random partner."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(split), generator=generator, device=generator.device)
    for first in order.split(batch_size)[: steps_per_epoch(len(split), batch_size, share.count)]:
        scene = _draw(split, first, generator, overlapping)
        maps = augmentation.draw(scene.chosen.numel(), generator).unflatten(0, scene.chosen.shape)
        yield scene._replace(maps=maps).make(split, share)


def evaluation_batches(
    split: Split, *, overlapping: bool = False, share: Share = WHOLE, batch_size: int = 256
) -> Iterator[Batch]:
    """The split in its own order; with `overlapping` each image with one partner, always the same."""
    every = torch.arange(len(split), device=split.images.device)
    whole = _draw(split, every, torch.Generator().manual_seed(TEST_SEED), overlapping)
    for of in every.split(batch_size):
        moves = None if whole.moves is None else whole.moves[of]
        yield _Scene(whole.chosen[of], None, moves).make(split, share)


def _draw(split: Split, first: Tensor, generator: torch.Generator, overlapping: bool) -> _Scene:
    if not overlapping:
        return _Scene(first.unsqueeze(1), None, None)
    chosen = torch.stack([first, overlap.draw_partners(split.labels, first, generator)], 1)  # [B, 2]
    moves = overlap.draw_moves(chosen.numel(), tuple(split.images.shape[1:]), generator)
    return _Scene(chosen, None, moves.unflatten(0, chosen.shape))
