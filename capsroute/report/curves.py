"""Figures of numbers: learning curves, the confusion matrix, speed and memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._optional import optional
from ..bench.table import format_bytes
from ..training.trainer import Epoch, predict
from .style import BLUE, GREY, ORANGE, figure, plain, short

MOST_NUMBERS = 12  # classes of a confusion matrix whose cells have room for numbers
MOST_NAMES = 30  # classes whose names have room
ERRORS = 0, 0.5, 1, 2, 5, 10, 20, 50, 100  # in percent, that are written beside the curves


def learning_curves(history: Sequence[Epoch], best_epoch: int, held_out: str, *, augmented: bool = True):
    """The loss and the share of errors by epoch, on the training images and on those held out."""
    drawn = figure(5.0)
    loss, error = drawn.subplots(2, 1, sharex=True)
    epochs = range(1, len(history) + 1)
    seen = "training, augmented images" if augmented else "training"
    marker = "o" if len(history) < 3 else None  # a line of one point cannot be seen
    for axes, value in ((loss, lambda score: score.loss), (error, lambda score: 100 * (1 - score.accuracy))):
        train, held = [value(e.train) for e in history], [value(e.held_out) for e in history]
        axes.plot(epochs, train, color=ORANGE, ls="--", marker=marker, label=seen)
        axes.plot(epochs, held, color=BLUE, lw=2, marker=marker, label=held_out)
        axes.plot(best_epoch, held[best_epoch - 1], "D", color=BLUE, ms=6, label=f"the result: epoch {best_epoch}")
        plain(axes)
    ticks = optional("matplotlib.ticker")
    loss.set_yscale("log")
    loss.yaxis.set_major_locator(ticks.LogLocator(subs=(1, 2, 3, 5, 7)))
    loss.yaxis.set_minor_formatter(ticks.NullFormatter())
    loss.set_ylabel("loss")
    loss.legend(frameon=False)
    error.set_yscale("symlog", linthresh=1)  # linear below 1 %, since an error of 0 has no logarithm
    error.yaxis.set_major_locator(ticks.FixedLocator(ERRORS))
    least, most = error.dataLim.intervaly
    below = max(tick for tick in ERRORS if tick < least or tick == 0)
    above = min(tick for tick in ERRORS if tick > most or tick == 100)
    error.set_ylim(below, 1.1 * above)  # a marker at the top is drawn whole
    error.set_ylabel("errors, %")
    error.set_xlabel("epoch")
    error.set_xlim(0.5, len(history) + 0.5)
    error.xaxis.set_major_locator(ticks.MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    for axes in (loss, error):
        axes.yaxis.set_major_formatter("{x:g}")
    return drawn


def confusion(lengths: Tensor, labels: Tensor) -> Tensor:
    """How often class j was named where class i was to be seen: int64 ``[J, J]`` at [i, j].

    Of overlapping digits each is counted: under itself where it was found, else under a class that was named
    in its place.

    Args:
        lengths: ``[N, J]``.
        labels: ``[N, K]``.
    """
    classes = lengths.shape[1]
    named = torch.zeros_like(lengths, dtype=torch.bool).scatter_(1, predict(lengths, labels.shape[1]), True)
    seen = torch.zeros_like(named).scatter_(1, labels, True)
    counts = torch.diag((named & seen).sum(0))
    # As many are missed as are named in their place, and both come in the order of samples.
    samples, missed = (seen & ~named).nonzero().unbind(1)
    other, instead = (named & ~seen).nonzero().unbind(1)
    assert torch.equal(samples, other)
    counts += torch.bincount(missed * classes + instead, minlength=classes**2).view(classes, classes)
    return counts


def confusion_matrix(counts: Tensor, class_names: Sequence[str]):
    """The counts as a figure: rows are what was to be seen, columns what was named."""
    classes = len(class_names)
    drawn = figure(5.0)
    axes = drawn.subplots()
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    # The root shows single errors beside rows of hundreds of hits.
    axes.imshow(share.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
    if classes <= MOST_NUMBERS:
        for i, row in enumerate(counts.tolist()):
            for j, count in enumerate(row):
                if count:
                    colour = "white" if share[i, j] > 0.4 else "black"
                    axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=8)
    if classes <= MOST_NAMES:
        places, names = range(classes), [short(name) for name in class_names]
        axes.set_xticks(places, names, rotation=0 if max(map(len, names)) < 3 else 90)
        axes.set_yticks(places, names)
    axes.set(xlabel="named", ylabel="to be seen")
    return drawn


def speed(rows: Sequence[dict], batch: int):
    """Images a second, and extra memory, of a training step; rows of :func:`capsroute.bench.step`."""
    measured = [row for row in rows if row["seconds"] is not None]
    drawn = figure(1.2 + 0.5 * len(measured))
    rate, memory = drawn.subplots(1, 2, sharey=True)
    names = [row["name"] for row in measured]
    colours = [BLUE if name == "fused" else GREY for name in names]
    rates = [batch / row["seconds"] for row in measured]
    spread = [[abs(batch / row[end] - batch / row["seconds"]) for row in measured] for end in ("upper", "lower")]
    for axes, values, error, words, title in (
        (rate, rates, spread, "{:,.0f}".format, "images/s: more is better"),
        (memory, [row["peak_bytes"] for row in measured], None, format_bytes, "extra memory: less is better"),
    ):
        known = [value or 0 for value in values]  # the process that measures memory may be killed
        bars = axes.barh(names, known, xerr=error, capsize=3, color=colours, height=0.6)
        axes.bar_label(bars, ["not measured" if value is None else words(value) for value in values], padding=3)
        axes.set_xlim(0, 1.45 * max(*known, 1))
        axes.set_title(title)
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    rate.invert_yaxis()  # shared
    return drawn
