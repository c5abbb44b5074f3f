"""What every reader gives: images and labels in two splits."""

from __future__ import annotations

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
    """Two splits of the same kind of images, and what the classes are called."""

    name: str
    train: Split
    test: Split
    class_names: Sequence[str]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return tuple(self.train.images.shape[1:])

    @property
    def classes(self) -> int:
        """J, the number of classes."""
        return len(self.class_names)

    def checksum(self) -> int:
        """Of every image and label, so that a training is not resumed on other data."""
        value = 0
        for x in (self.train.images, self.train.labels, self.test.images, self.test.labels):
            value = zlib.crc32(x.contiguous().numpy(), value)
        return value


def make_dataset(name: str, train: Split, test: Split, class_names: Sequence[str] | None = None) -> Dataset:
    """A dataset, checked; without names the classes are called by their numbers, up to the largest label.

    Raises:
        DataError: if a split is empty, or the splits do not fit each other.
    """
    for title, split in (("training", train), ("test", test)):
        if not len(split):
            raise DataError(f"{name} has no {title} images")
    shapes = [list(split.images.shape[1:]) for split in (train, test)]
    if shapes[0] != shapes[1]:
        raise DataError(f"images of {name} are {shapes[0]} for training, {shapes[1]} for testing")
    if class_names is None:
        class_names = [str(j) for j in range(1 + int(max(train.labels.max(), test.labels.max())))]
    return Dataset(name, train, test, tuple(class_names))


def hold_out(split: Split, fraction: float) -> tuple[Split, Split]:
    """The split without a share of its images, and that share: stratified, and the same one always.

    Raises:
        DataError: if there are too few images to take the same share of every class.
    """
    try:
        every = torch.arange(len(split), device=split.labels.device)
        kept, held = optional("sklearn.model_selection").train_test_split(
            every, test_size=fraction, stratify=split.labels, random_state=0
        )
    except ValueError as error:
        raise DataError(f"{fraction:g} of {len(split)} images cannot be held out, stratified: {error}") from error
    return split[kept], split[held]
