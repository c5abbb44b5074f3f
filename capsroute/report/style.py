"""What all figures share: colours that every kind of eye tells apart, sizes that a phone can show."""

from __future__ import annotations

import re
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
# Chinese, Japanese and Korean letters are drawn in the first of these that is installed and has them.
CJK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR", "Source Han Sans SC"),
    *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "NanumGothic", "IPAGothic"),  # Linux
    *("Microsoft YaHei", "SimHei", "Yu Gothic", "MS Gothic", "Malgun Gothic"),  # Windows
    *("PingFang SC", "Hiragino Sans GB", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS"),  # macOS
)
NO_GLYPH = re.compile(r"Glyph (\d+) .* missing from font")  # what matplotlib warns of, before it draws a box
MOST_LETTERS = 12  # of a class's name: beside an image, or below one, there is room for no more


def figure(height: float):
    """An empty matplotlib figure; not pyplot's, which keeps global state and may want a display."""
    return optional("matplotlib.figure").Figure(figsize=(WIDTH, height), layout="constrained", dpi=DPI)


@contextmanager
def styled() -> Iterator[set[str]]:
    """The context in which figures are drawn and saved; the letters that were drawn as boxes are in what it yields."""
    installed = {font.name for font in optional("matplotlib.font_manager").fontManager.ttflist}
    families = ["sans-serif", *(name for name in CJK_FONTS if name in installed)]
    settings = {"font.family": families, "font.size": FONT, "axes.titlesize": FONT, "text.parse_math": False}
    boxes: set[str] = set()
    with optional("matplotlib").rc_context(settings), warnings.catch_warnings():
        show_others = warnings.showwarning

        def note(message, *where, **more) -> None:
            if found := NO_GLYPH.match(str(message)):
                boxes.add(chr(int(found[1])))
            else:
                show_others(message, *where, **more)

        warnings.filterwarnings("always", NO_GLYPH.pattern)
        warnings.showwarning = note
        yield boxes


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
