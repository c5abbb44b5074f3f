"""IDX files: the format of MNIST, Fashion-MNIST, KMNIST, EMNIST."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .dataset import DataError, Dataset, Split, hold_out, make_dataset

GZIP_MAGIC = b"\x1f\x8b"
IDX_UINT8 = 8
TRAIN, TEST = ("train",), ("t10k", "test")


def has_idx_files(data_dir: Path) -> bool:
    """Whether the directory holds images in IDX files."""
    return any(_files(data_dir, "*-images*idx3-ubyte*"))


def _files(data_dir: Path, pattern: str) -> list[Path]:
    """Neither folders, into which some archives are unpacked, nor the `._` files of macOS."""
    return sorted(path for path in data_dir.glob(pattern) if path.is_file() and not path.name.startswith("."))


def idx_files(data_dir: Path) -> Dataset:
    """The files of MNIST's names, gzipped or not: `train-images-idx3-ubyte` and so on, `t10k-` or `test-`.

    EMNIST puts its own name before them. Of a file that is there both ways the plain one is read. If there is only
    one of the two pairs, a fixed, stratified 20 % of it is the test split.

    Raises:
        DataError: if a file is missing, cut off, of another format, or does not fit the others.
    """
    train, test = _split(data_dir, TRAIN), _split(data_dir, TEST)
    if train is None or test is None:
        one = train or test
        if one is None:
            raise DataError(f"{data_dir} has no file train-images-idx3-ubyte or t10k-images-idx3-ubyte, gzipped or not")
        train, test = hold_out(one, 0.2)
    return make_dataset(f"idx:{data_dir.resolve().name}", train, test)


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
            raise DataError(f"{path} is not a complete gzip file: {error}") from error
    start = 4 + 4 * dims
    magic = bytes((0, 0, IDX_UINT8, dims))
    if raw[:4] != magic:
        raise DataError(f"{path} must be an IDX file that starts with {magic.hex()}, got {raw[:4].hex() or 'nothing'}")
    if len(raw) < start:
        raise DataError(f"{path} must have a header of {start} bytes, got {len(raw)}")
    shape = struct.unpack(f">{dims}I", raw[4:start])
    if len(raw) - start != math.prod(shape):
        raise DataError(f"{path} must hold {list(shape)} = {math.prod(shape)} bytes of values, got {len(raw) - start}")
    if 0 in shape:
        raise DataError(f"{path} holds no values: its shape is {list(shape)}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=start).view(shape)


def _split(data_dir: Path, prefixes: tuple[str, ...]) -> Split | None:
    """The images and labels under one of the prefixes; None if there are no such images."""
    found: dict[str, Path] = {}
    for prefix in prefixes:
        for path in _files(data_dir, f"*{prefix}-images*idx3-ubyte*"):  # "NAME" comes before "NAME.gz"
            found.setdefault(path.name.removesuffix(".gz"), path)
    if not found:
        return None
    if len(found) > 1:
        raise DataError(f"{data_dir} must hold one data set, got {', '.join(path.name for path in found.values())}")
    ((name, images_path),) = found.items()
    stem = name.replace("images", "labels").replace("idx3", "idx1")
    labels_path = next((p for p in (data_dir / stem, data_dir / f"{stem}.gz") if p.is_file()), None)
    if labels_path is None:
        raise DataError(f"{data_dir} has no file {stem} or {stem}.gz")
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(f"{images_path} holds {len(images)} images, {labels_path} {len(labels)} labels")
    return Split(images.unsqueeze(1), labels.long())
