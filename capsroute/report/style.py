"""What all figures share: colours that every kind of eye tells apart, sizes that a phone can show."""

from __future__ import annotations

from torch import Tensor

from .._optional import optional

# Okabe and Ito's colours; in grey they differ by their lightness.
ORANGE, BLUE, GREEN, GREY = "#E69F00", "#0072B2", "#009E73", "#666666"
MOST_CLASSES = 10  # that a figure of images shows
WIDTH = 5.2  # inches; at a phone's width the letters of 9 points are still read
DPI = 200
FONT = 9


def figure(height: float):
    """An empty matplotlib figure; not pyplot's, which keeps global state and may want a display."""
    return optional("matplotlib.figure").Figure(figsize=(WIDTH, height), layout="constrained", dpi=DPI)


def styled():
    """The context in which figures are drawn and saved."""
    return optional("matplotlib").rc_context({"font.size": FONT, "axes.titlesize": FONT, "figure.titlesize": FONT + 1})


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
