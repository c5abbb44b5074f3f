"""Images to train on: the handwritten digits that come with scikit-learn, or IDX files (MNIST's format)."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ._optional import optional

GZIP_MAGIC = b"\x1f\x8b"
IDX_UINT8 = 8


class DataError(ValueError):
    """A data file is missing, cut off or not what it should be."""


class Dataset(NamedTuple):
    """Images [N, C, H, W], float32 in [0, 1], and their labels [N], int64, in two splits."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return tuple(self.train_images.shape[1:])

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return 1 + int(max(self.train_labels.max(), self.test_labels.max()))


def load(data_dir: str | Path | None = None) -> Dataset:
    """The IDX files in `data_dir`, or scikit-learn's digits if it is None."""
    return digits() if data_dir is None else idx_files(Path(data_dir))


def digits() -> Dataset:
    """scikit-learn's 1797 digits of 8 x 8 pixels, the same stratified 20 % of them always the test split."""
    bunch = optional("sklearn.datasets").load_digits()
    images = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)  # [1797, 1, 8, 8]
    labels = torch.from_numpy(bunch.target).long()
    train, test = optional("sklearn.model_selection").train_test_split(
        torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    return Dataset("digits", images[train], labels[train], images[test], labels[test])


def idx_files(data_dir: Path) -> Dataset:
    """The four files of MNIST, Fashion-MNIST, KMNIST or EMNIST, gzipped or not, under MNIST's names.

    Raises:
        DataError: if a file is missing, cut off, of another format, or does not fit the others.
    """
    splits = []
    for prefix in ("train", "t10k"):
        images_path = _find(data_dir, f"{prefix}-images-idx3-ubyte")
        labels_path = _find(data_dir, f"{prefix}-labels-idx1-ubyte")
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if len(images) != len(labels):
            raise DataError(f"{images_path} holds {len(images)} images, {labels_path} {len(labels)} labels")
        splits += [images.float().div(255).unsqueeze(1), labels.long()]
    train, test = splits[0], splits[2]
    if train.shape[1:] != test.shape[1:]:
        raise DataError(
            f"images of {data_dir} are {list(train.shape[2:])} for training, {list(test.shape[2:])} for testing"
        )
    return Dataset(f"idx:{data_dir.name}", *splits)


def read_idx(path: Path, dims: int) -> Tensor:
    """A uint8 tensor of `dims` dimensions from an IDX file, gzipped or not.

    The format: two zero bytes, the type (8 is uint8), the number of dimensions, each dimension as a
    big-endian uint32, the values (Y. LeCun, "The MNIST database of handwritten digits").

    Raises:
        DataError: if the file is cut off, too long, empty or of another format.
    """
    raw = path.read_bytes()
    if raw.startswith(GZIP_MAGIC):
        try:
            raw = gzip.decompress(raw)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is no whole gzip file: {error}") from error
    start = 4 + 4 * dims
    magic = bytes((0, 0, IDX_UINT8, dims))
    if raw[:4] != magic or len(raw) < start:
        raise DataError(f"{path} must be an IDX file that starts with {magic.hex()}, got {raw[:4].hex() or 'nothing'}")
    shape = struct.unpack(f">{dims}I", raw[4:start])
    if len(raw) - start != math.prod(shape):
        raise DataError(f"{path} must hold {list(shape)} = {math.prod(shape)} bytes of values, got {len(raw) - start}")
    if 0 in shape:
        raise DataError(f"{path} holds no values: its shape is {list(shape)}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=start).view(shape)


def _find(data_dir: Path, name: str) -> Path:
    for path in (data_dir / name, data_dir / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{data_dir} has no file {name} or {name}.gz")
