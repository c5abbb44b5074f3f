"""What all figures share: colours that every kind of eye tells apart, sizes that a phone can show."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from .._optional import optional

# Okabe and Ito's colours; in grey they differ by their lightness.
ORANGE, BLUE, GREY = "#E69F00", "#0072B2", "#666666"
MOST_CLASSES = 10  # that a figure of images shows
WIDTH = 5.2  # inches; at a phone's width the letters of 9 points are still read
DPI = 200
FONT = 9
MOST_LETTERS = 12  # of a class's name: beside an image, or below one, there is room for no more


def figure(height: float):
    """An empty matplotlib figure; not pyplot's, which keeps global state and may want a display."""
    return optional("matplotlib.figure").Figure(figsize=(WIDTH, height), layout="constrained", dpi=DPI)


@contextmanager
def styled() -> Iterator[None]:
    """The context in which figures are drawn and saved."""
    settings = {"font.size": FONT, "axes.titlesize": FONT, "text.parse_math": False}
    with optional("matplotlib").rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in any script is drawn, if as boxes
        yield


def short(name: str) -> str:
    """A class's name in a figure: in one line, cut where there is no room for the rest."""
    name = " ".join(name.encode(errors="replace").decode().split())  # a folder's may be no Unicode
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…"


def stacked(*words: str, within: int = MOST_LETTERS) -> str:
    """Words in one line of so many letters, or else each in a line of its own."""
    line = " ".join(words)
    return line if len(line) <= within else "\n".join(words)


def show(axes, image: Tensor) -> None:
    """An image ``[C, H, W]`` of values in [0, 1], in grey unless it has three channels."""
    if image.shape[0] == 3:
        axes.imshow(image.permute(1, 2, 0).numpy())
    else:
        axes.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])


def plain(axes) -> None:
    """A grid behind the data, and no box around it."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
