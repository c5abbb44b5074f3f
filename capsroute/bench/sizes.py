"""The option `--sizes` of bench and tune: a layer of one's own, as a case with other sizes."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from .._console import number
from .registry import LETTERS, Case

Size = tuple[str, int]


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--sizes` to the parser of a command."""
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=_size,
        default=[],
        metavar="LETTER=N",
        help=f"sizes instead of each case's own, for a layer of yours: any of {', '.join(LETTERS)}, such as J=5 O=8",
    )


def _size(text: str) -> Size:
    letter, _, size = text.partition("=")
    if letter not in LETTERS:
        raise argparse.ArgumentTypeError(f"must be LETTER=N with a letter of {', '.join(LETTERS)}, got {text}")
    return letter, number(int, 1)(size)


_size.__name__ = "size"  # argparse tells it


def resized(cases: Iterable[Case], sizes: list[Size]) -> list[Case]:
    """The cases with these sizes.

    Raises:
        ValueError: if a letter is there twice, or is D where votes are given.
    """
    cases, given = list(cases), [letter for letter, _ in sizes]
    if twice := next((letter for letter in given if given.count(letter) > 1), ""):
        raise ValueError(f"--sizes has {twice} twice")
    votes = next((case.name for case in cases if case.form == "votes"), "")
    if votes and "D" in given:
        raise ValueError(f"the votes of {votes} are given, without D, which is in --sizes")
    return [case._replace(**{LETTERS[letter]: size for letter, size in sizes}) for case in cases]
