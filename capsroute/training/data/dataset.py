"""What every reader gives: images and labels in two splits."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..._optional import optional


class DataError(ValueError):
    """A data file or directory is missing, cut off or not what it should be."""


@dataclass(frozen=True)
class Split:
    """Images ``[N, C, H, W]``, uint8 or float32 in [0, 1], and their labels ``[N]``, int64."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, index: Tensor | slice) -> Split:
        return Split(self.images[index], self.labels[index])

    def __len__(self) -> int:
        return self.labels.shape[0]

    def as_float(self) -> Tensor:
        """The images as float32 in [0, 1]; bytes are a quarter of that, and are kept as long as possible."""
        return self.images.float().div(255) if self.images.dtype == torch.uint8 else self.images


class Dataset(NamedTuple):
    """Splits of the same kind of images, and what the classes are called.

    `validation` is what `--validation` chooses the best epoch by, instead of a share of `train`; None: there is none.
    """

    name: str
    train: Split
    test: Split
    class_names: Sequence[str]
    validation: Split | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return tuple(self.train.images.shape[1:])

    @property
    def classes(self) -> int:
        """J, the number of classes."""
        return len(self.class_names)

    def checksum(self) -> int:
        """A checksum of every image and label, so that a training is not resumed on other data."""
        optional("numpy")
        value = 0
        for split in filter(None, (self.train, self.test, self.validation)):
            for x in (split.images, split.labels):
                value = zlib.crc32(x.contiguous().numpy(), value)
        return value


def make_dataset(
    name: str,
    train: Split,
    test: Split,
    class_names: Sequence[str] | None = None,
    validation: Split | None = None,
) -> Dataset:
    """A dataset, checked; without names the classes are called by their numbers, up to the largest label.

    Raises:
        DataError: if a split is empty or not what :class:`Split` says, a label has no class, there is one class
            alone, or the splits do not fit each other.
    """
    splits = {"training": train, "testing": test} | ({} if validation is None else {"validation": validation})
    for title, split in splits.items():
        _check_split(f"{title} images of {name}", split)
        if split.images.shape[1:] != train.images.shape[1:]:
            shapes = [list(x.images.shape[1:]) for x in (train, split)]
            raise DataError(f"images of {name} are {shapes[0]} for training, {shapes[1]} for {title}")
    most = max(int(split.labels.max()) for split in splits.values())
    if class_names is None:
        class_names = [str(j) for j in range(1 + most)]
    if len(class_names) < 2:
        raise DataError(f"{name} must have images of two classes or more, got {', '.join(class_names) or 'none'}")
    if most >= len(class_names):
        raise DataError(f"labels of {name} must be below {len(class_names)}, one for each class name, got {most}")
    return Dataset(name, train, test, tuple(class_names), validation)


def _check_split(what: str, split: Split) -> None:
    """That a split is what :class:`Split` says."""
    images, labels = split.images, split.labels
    if images.dim() != 4 or images.dtype not in (torch.uint8, torch.float32):
        raise DataError(f"{what} must be uint8 or float32 [N, C, H, W], got {images.dtype} {list(images.shape)}")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise DataError(f"labels of {what} must be int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}")
    if not images.numel():
        raise DataError(f"there are no {what}")
    least, most = (float(x) for x in images.aminmax())
    if images.dtype == torch.float32 and not (least >= 0 and most <= 1):  # NaN fails this too
        raise DataError(f"{what} must be from 0 to 1 in float32, got {least:g} to {most:g}")
    if labels.min() < 0:
        raise DataError(f"labels of {what} must be at least 0, got {int(labels.min())}")


def hold_out(split: Split, fraction: float) -> tuple[Split, Split]:
    """The split without a share of its images, and that share: stratified, and the same one always.

    Raises:
        DataError: if there are too few images to take the same share of every class.
    """
    every = torch.arange(len(split), device=split.labels.device)
    try:
        kept, held = optional("sklearn.model_selection").train_test_split(
            every, test_size=fraction, stratify=split.labels, random_state=0
        )
    except ValueError as error:
        counts, held = split.labels.unique(return_counts=True)[1], math.ceil(fraction * len(split))
        raise DataError(
            f"{fraction:g} of {len(split)} images cannot be held out: each of {len(counts)} classes must have one on "
            f"either side, but the smallest has {counts.min()}, {held} would be held out and {len(split) - held} kept"
        ) from error
    return split[kept], split[held]
