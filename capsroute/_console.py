"""What the commands share: what is for people, what is for programs, and numbers on the command line."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable

from ._backends import backends


def silent() -> bool:
    """Whether another process of the same torchrun speaks for this one."""
    return os.environ.get("RANK", "0") != "0"


def say(args: argparse.Namespace, *words: object) -> None:
    """Print for people: to stderr where stdout is for JSON."""
    if not silent():
        print(*words, file=sys.stderr if args.json else sys.stdout, flush=True)


def emit(args: argparse.Namespace, result: dict) -> None:
    """Print one JSON object, alone on the last line, if it is asked for."""
    if args.json and not silent():
        print(json.dumps({"command": args.command, **result}), flush=True)


def complain(args: argparse.Namespace, error: object) -> None:
    """Print what went wrong, in one line."""
    print(f"capsroute {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)


def number(kind: type, least: float = 0, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number of at least `least`, or above it."""

    def parse(text: str):
        value = kind(text)
        if not (least < value if above else least <= value) or value == math.inf:
            raise argparse.ArgumentTypeError(
                f"must be a finite number {'above' if above else 'of at least'} {least}, got {text}"
            )
        return value

    parse.__name__ = kind.__name__  # argparse tells it: "invalid int value"
    return parse


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Add --backend; what it names is to go through :func:`checked_backend`."""
    parser.add_argument("--backend", choices=("auto", *backends()), default="auto", help="default: %(default)s")


def checked_backend(name: str) -> str:
    """The backend, if it can run here.

    Raises:
        ValueError: with the reason why not.
    """
    can, why = backends().get(name, (True, ""))
    if not can:
        raise ValueError(f"--backend {name} cannot run here: {why}")
    return name
