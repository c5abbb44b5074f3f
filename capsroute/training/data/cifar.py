"""CIFAR-10's binary version."""

from __future__ import annotations

from pathlib import Path

import torch

from .dataset import DataError, Dataset, Split, make_dataset

SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32  # a label, then the red, green and blue plane, row by row
TRAIN = [f"data_batch_{k}.bin" for k in range(1, 6)]
TEST = ["test_batch.bin"]
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def has_cifar10(data_dir: Path) -> bool:
    """Whether the directory holds CIFAR-10's binary files."""
    return (data_dir / TEST[0]).is_file() or (data_dir / TRAIN[0]).is_file()


def cifar10(data_dir: Path) -> Dataset:
    """The six binary files of CIFAR-10 (A. Krizhevsky, "Learning Multiple Layers of Features", 2009).

    Raises:
        DataError: if a file is missing, cut off, or holds a label above 9.
    """
    return make_dataset("cifar10", *(_read([data_dir / name for name in names]) for names in (TRAIN, TEST)), NAMES)


def _read(paths: list[Path]) -> Split:
    records = []
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path.parent} has no file {path.name}")
        raw = bytearray(path.read_bytes())
        if not raw or len(raw) % RECORD:
            raise DataError(f"{path} must hold records of {RECORD} bytes, got {len(raw)} bytes")
        records.append(torch.frombuffer(raw, dtype=torch.uint8).view(-1, RECORD))
        if records[-1][:, 0].max() >= len(NAMES):
            raise DataError(f"{path} must hold labels 0 to 9, got {int(records[-1][:, 0].max())}")
    whole = torch.cat(records)
    return Split(whole[:, 1:].reshape(-1, *SHAPE), whole[:, 0].long())
