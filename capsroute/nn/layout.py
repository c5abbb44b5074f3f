"""Weights of other implementations: from their layouts to ours and back."""

from __future__ import annotations

import math

from torch import Tensor

from .._checks import check_sizes

LOGICAL = ("[I, J, O, D]", "[J, O, D]", "[O, D]")


def from_layout(weight: Tensor, layout: str, **sizes: int) -> Tensor:
    """A weight that is stored in another layout, as ``[I, J, O, D]``, ``[J, O, D]`` or ``[O, D]``.

    A view wherever torch can make one, so that a gradient reaches ``weight`` itself::

        from_layout(w, "[J, I, D, O]")               # gram-ai/capsule-networks and most copies of it
        from_layout(w, "[1, I, J, O, D]")            # higgsfield/Capsule-Network-Tutorial
        from_layout(w, "[I, D, J*O]", J=10)          # the authors' TensorFlow code

    Args:
        weight: the tensor.
        layout: its dimensions by the letters I, J, O and D, each at most once; ``1`` for a dimension of
            size 1, ``J*O`` for two in one, the last of them fastest.
        **sizes: of letters, where a product such as ``J*O`` leaves two unknown.

    Raises:
        TypeError, ValueError: if the layout is not valid, or does not fit the tensor.
    """
    axes = _parse(layout)
    check_sizes(**sizes)
    letters = [letter for axis in axes for letter in axis]
    unknown = sorted(set(sizes) - set(letters))
    if unknown:
        raise ValueError(f"sizes must be of letters of the layout {layout}, got {', '.join(unknown)}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor {layout}, got {type(weight).__name__}")
    if weight.dim() != len(axes):
        raise ValueError(f"weight must be {layout}, got {list(weight.shape)}")
    shape = []
    for axis, size in zip(axes, weight.shape, strict=True):
        left = [letter for letter in axis if letter not in sizes]
        if len(left) > 1:
            raise ValueError(f"the size of {' or '.join(left)} must be given: {'*'.join(axis)} is {size} in weight")
        known = math.prod([sizes[letter] for letter in axis if letter in sizes])
        rest = size // known if left else 1
        if known * rest != size:
            raise ValueError(f"weight must be {layout} with {_show(sizes)}, got {list(weight.shape)}")
        shape += [sizes.get(letter, rest) for letter in axis]
    order = [letters.index(letter) for letter in "IJOD" if letter in letters]
    return weight.reshape(shape).permute(order)


def to_layout(weight: Tensor, layout: str) -> Tensor:
    """The inverse of :func:`from_layout`.

    Args:
        weight: ``[I, J, O, D]``, ``[J, O, D]`` or ``[O, D]``.
        layout: as :func:`from_layout` takes it, of the letters that the weight has.

    Returns:
        The weight in that layout.

    Raises:
        TypeError, ValueError: if the layout is not valid, or has other letters than the weight.
    """
    axes = _parse(layout)
    letters = [letter for axis in axes for letter in axis]
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor {_logical(letters)}, got {type(weight).__name__}")
    if weight.dim() != len(letters):
        raise ValueError(f"weight must be {_logical(letters)} for the layout {layout}, got {list(weight.shape)}")
    own = _logical(letters).strip("[]").split(", ")
    sizes = dict(zip(own, weight.shape, strict=True))
    shape = [math.prod([sizes[letter] for letter in axis]) for axis in axes]
    return weight.permute([own.index(letter) for letter in letters]).reshape(shape)


def _parse(layout: str) -> list[list[str]]:
    """The letters of each dimension; none for a 1."""
    if not isinstance(layout, str):
        raise TypeError(f'layout must be a str such as "[J, I, D, O]", got {type(layout).__name__}')
    axes = [[letter.strip() for letter in axis.split("*")] for axis in layout.strip("[] ").split(",")]
    axes = [[] if axis == ["1"] else axis for axis in axes]
    letters = [letter for axis in axes for letter in axis]
    known = _logical(letters) in LOGICAL and set(letters) <= set("IJOD")
    if not known or len(set(letters)) != len(letters):
        raise ValueError(
            f"layout must have the letters of {', '.join(LOGICAL)} in any order, "
            f'such as "[1, I, D, J*O]", got {layout!r}'
        )
    return axes


def _logical(letters: list[str]) -> str:
    return "[" + ", ".join(letter for letter in "IJOD" if letter in letters) + "]"


def _show(sizes: dict[str, int]) -> str:
    return " and ".join(f"{letter} = {size}" for letter, size in sizes.items()) or "whole sizes"
