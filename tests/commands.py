"""Commands run in this process, and what they run on: a tiny network, a trained one, a few images."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

from capsroute import cli

TINY = ["--epochs", "1", "--channels", "4", "--types", "1", "--batch-size", "128"]


def run(capsys, *argv) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `capsroute` with these arguments."""
    try:
        status = cli.main([str(word) for word in argv])
    except SystemExit as stop:  # argparse
        status = stop.code
    return status, *capsys.readouterr()


def last_json(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def train_tiny(path: Path) -> Path:
    """A run on the digits, with seed 4."""
    assert cli.main(["train", "--out", str(path), *TINY, "--seed", "4"]) == 0
    return path


def write_idx(folder: Path) -> Path:
    """Twelve images of 12 x 12 and three classes to train on, and as many to test."""
    for prefix in ("train", "t10k"):
        images = bytes((0, 0, 8, 3)) + struct.pack(">3I", 12, 12, 12) + bytes(range(144)) * 12
        labels = bytes((0, 0, 8, 1)) + struct.pack(">I", 12) + bytes(k % 3 for k in range(12))
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    return folder
