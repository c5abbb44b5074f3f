"""Three pictures of a trained network: learning curves, reconstructions, the coupling of one image."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..nn import CapsNet
from ._optional import optional
from .data import Dataset
from .trainer import Epoch

# Two colours of Okabe and Ito, told apart by every kind of eye, and in grey by their lightness.
TRAIN, TEST = "#E69F00", "#0072B2"
RATIOS = (0.125, 0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.4, 2, 4, 8)  # marked beside the coupling's colours
MOST_CLASSES = 10  # that a picture shows
CANDIDATES = 256  # images among which the picture of the coupling chooses


def save_pictures(run_dir: Path, net: CapsNet, dataset: Dataset, history: list[Epoch]) -> list[Path]:
    """Write the three pictures into a directory; returns their paths."""
    figures = {
        "learning_curves.png": learning_curves(history),
        "reconstructions.png": reconstructions(net, dataset),
        "coupling.png": coupling(net, dataset),
    }
    for name, figure in figures.items():
        figure.savefig(run_dir / name, dpi=150)
    return [run_dir / name for name in figures]


def learning_curves(history: list[Epoch]):
    """The loss and the error rate of both splits by epoch, as a matplotlib figure."""
    figure = _figure(9, 3.6)
    loss, error = figure.subplots(1, 2)
    epochs = range(1, len(history) + 1)
    for axes, value in ((loss, lambda score: score.loss), (error, lambda score: 100 * (1 - score.accuracy))):
        axes.plot(epochs, [value(e.train) for e in history], color=TRAIN, ls="--", label="training (shifted images)")
        axes.plot(epochs, [value(e.test) for e in history], color=TEST, lw=2, label="test")
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    ticks = optional("matplotlib.ticker")
    loss.set_yscale("log")
    loss.yaxis.set_major_locator(ticks.LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_minor_formatter(ticks.NullFormatter())
    loss.set_ylabel("loss")
    loss.legend(frameon=False)
    error.set_yscale("symlog", linthresh=1)  # linear below 1 %, since an error of 0 has no logarithm
    error.yaxis.set_major_locator(ticks.FixedLocator([0, 0.5, 1, 2, 5, 10, 20, 50, 100]))
    error.set_ylim(bottom=0)
    error.set_ylabel("error, % of images")
    for axes in (loss, error):
        axes.xaxis.set_major_locator(ticks.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter("{x:g}")
    figure.suptitle(f"Test accuracy {history[-1].test.accuracy:.2%} after {len(history)} epochs")
    return figure


@torch.no_grad()
def reconstructions(net: CapsNet, dataset: Dataset):
    """The first test image of each class above what the decoder makes of its longest capsule."""
    classes = dataset.test_labels.unique().tolist()[:MOST_CLASSES]
    first = [int((dataset.test_labels == j).nonzero()[0]) for j in classes]
    images = dataset.test_images[first]
    output = net.eval()(images)
    figure = _figure(len(classes), 2.8)
    axes = figure.subplots(2, len(classes), squeeze=False)
    for column, (label, predicted) in enumerate(zip(classes, output.lengths.argmax(-1).tolist(), strict=True)):
        _show(axes[0, column], images[column])
        _show(axes[1, column], output.reconstruction[column])
        axes[0, column].set_title(str(label))
        axes[1, column].set_title(f"read as {predicted}")
    axes[0, 0].set_ylabel("image")
    axes[1, 0].set_ylabel("reconstruction")
    return figure


def coupling(net: CapsNet, dataset: Dataset):
    """How much the positions of one image couple to each class, as multiples of an even share 1/J."""
    image, label, share = surest_image(net, dataset)
    classes = sorted({label, *range(min(share.shape[2], MOST_CLASSES))})
    most = max(float(share.max()), 1.01)
    scale = optional("matplotlib.colors").LogNorm(1 / most, most)  # even is the middle, and white
    figure = _figure(11, 4.2)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 3.2))
    axes = left.subplots()
    _show(axes, image)
    axes.set_title(f"test image: {label}")
    grid = right.subplots(2, -(-len(classes) // 2), squeeze=False)
    for axes in grid.flat[len(classes) :]:
        axes.set_axis_off()
    for j, axes in zip(classes, grid.flat, strict=False):
        shown = axes.imshow(share[..., j].numpy(), cmap="PuOr_r", norm=scale)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"to {j}", fontweight="bold" if j == label else None)
        axes.spines[:].set_linewidth(3 if j == label else 0.8)
    grid[-1, 0].set(xlabel="position, left to right", ylabel="top to bottom")
    ticks = optional("matplotlib.ticker")
    bar = right.colorbar(shown, ax=grid, ticks=RATIOS, format="{x:g}")
    bar.ax.yaxis.set_minor_locator(ticks.NullLocator())
    bar.set_label("coupling, as multiple of an even share 1/J")
    figure.suptitle("Where the input capsules of each position send their votes: the coupling after routing")
    return figure


@torch.no_grad()
def surest_image(net: CapsNet, dataset: Dataset) -> tuple[Tensor, int, Tensor]:
    """The test image whose labelled capsule is the longest, among the first ones, and its coupling.

    Returns:
        The image ``[C, H, W]``, its label, and the coupling ``[height, width, J]``, a mean over the types
        of capsules at each position, as a multiple of 1/J.
    """
    images, labels = dataset.test_images[:CANDIDATES], dataset.test_labels[:CANDIDATES]
    lengths = net.eval()(images).lengths  # [B, J]
    chosen = int(lengths.gather(1, labels.unsqueeze(1)).argmax())
    u = net.primary_capsules(images[chosen : chosen + 1])  # [1, I, D]
    c = net.routing(u, return_coupling=True)[1].squeeze(0)  # [I, J]
    share = c.unflatten(0, net.grid).mean(2) * c.shape[1]
    return images[chosen], int(labels[chosen]), share


def _show(axes, image: Tensor) -> None:
    """An image [C, H, W] of values in [0, 1], in grey if it has one channel."""
    pixels = image.permute(1, 2, 0).numpy()  # [H, W, C]
    axes.imshow(pixels.squeeze(-1) if len(image) == 1 else pixels, cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])


def _figure(width: float, height: float):
    # Not pyplot: it keeps global state and may want a display.
    return optional("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
