"""What the commands share: output for people and for programs, and numbers on the command line."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ._backends import BACKENDS, backends


def rank() -> int:
    """This process's number among those that torchrun started: the first one, 0, speaks and writes for all.

    It is 0 without torchrun: a RANK that something else has set silences nobody.
    """
    return int(os.environ.get("RANK", "0")) if "WORLD_SIZE" in os.environ else 0


def say(args: argparse.Namespace, *words: object) -> None:
    """Print for people: to stderr where stdout is for JSON."""
    if rank() == 0:
        print(*words, file=sys.stderr if args.json else sys.stdout, flush=True)


def emit(args: argparse.Namespace, result: dict) -> None:
    """Print one JSON object, alone on the last line, if asked for."""
    if args.json and rank() == 0:
        print(json.dumps({"command": args.command, **result}, allow_nan=False), flush=True)


def complain(args: argparse.Namespace, error: object) -> None:
    """Print what went wrong, in one line."""
    print(f"capsroute {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)


def number(kind: type, least: float = 0, *, above: bool = False, most: float = 2**31 - 1) -> Callable[[str], float]:
    """An argparse type: a number of at least `least`, or above it, and at most `most`."""

    def parse(text: str):
        value = kind(text)
        if not (least < value if above else least <= value) or value == math.inf:
            raise argparse.ArgumentTypeError(
                f"must be a finite number {'above' if above else 'of at least'} {least}, got {text}"
            )
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse tells it: "invalid int value"
    return parse


def given_path(text: str) -> Path:
    """An argparse type: a path; nothing, as of a variable that was not set, is not the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def add_backend(parser: argparse.ArgumentParser, default: str | None = "auto") -> None:
    """Add --backend; pass its value through :func:`checked_backend`."""
    parser.add_argument("--backend", choices=("auto", *backends()), default=default, help="default: auto")


def checked_backend(name: str, device: torch.device | str = "cpu") -> str:
    """The backend, if it can run here and serves tensors of that device.

    Raises:
        ValueError: with the reason why not.
    """
    if name == "auto":
        return name
    if not isinstance(name, str) or name not in BACKENDS:  # a run's file says what its --backend was
        raise ValueError(f"--backend must be one of {', '.join(('auto', *BACKENDS))}, got {name!r}")
    can, why = BACKENDS[name].here()
    if can:
        can, why = BACKENDS[name].serves(torch.empty(1, 1, 1, 1, device=device), None)
    if not can:
        raise ValueError(f"--backend {name} cannot run here: {why}")
    return name


def check_writable(option: str, file: Path | None) -> None:
    """Check that a file can be written, before its content takes long to make.

    Raises:
        ValueError: if it is not a file, or its directory does not exist or cannot be written to.
    """
    if file is None:
        return
    if (file.exists() and not file.is_file()) or not file.parent.is_dir():
        raise ValueError(f"{option} must be a file in an existing directory, got {file}")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{option} must be a file in a writable directory, got {file}")
