"""The figure of routing: to which output capsule the input capsules of each position couple, pass by pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from .._optional import optional
from ..nn import CapsNet, CapsuleLinear
from .style import figure, short, show, stacked

SHOWN = 5  # output capsules: the labelled ones and the longest others


@torch.no_grad()
def coupling_by_pass(net: CapsNet, image: Tensor) -> tuple[Tensor, Tensor]:
    """What routing decides for one image ``[C, H, W]``, after each of its R passes.

    Returns:
        The coupling ``[R, height, width, J]``, a mean over the types of capsules at each position, as a multiple
        of an even share 1/J; and the lengths of the output capsules ``[R, J]``.
    """
    layer = net.eval().routing
    u = net.primary_capsules(image.unsqueeze(0))  # [1, I, D]
    passes = [stop_after(layer, k)(u, return_coupling=True) for k in range(1, layer.iterations + 1)]
    share = torch.stack([c.squeeze(0) for _, c in passes]) * layer.out_capsules  # [R, I, J]
    lengths = torch.stack([v.squeeze(0).norm(dim=-1) for v, _ in passes])  # [R, J]
    return share.unflatten(1, net.grid).mean(3), lengths


def stop_after(layer: CapsuleLinear, iterations: int) -> CapsuleLinear:
    """The layer, its parameters the same tensors, with another number of passes."""
    shorter = copy.copy(layer)
    shorter.iterations = iterations
    return shorter


def coupling(net: CapsNet, image: Tensor, labels: Sequence[int], class_names: Sequence[str]):
    """A row for each output capsule, a column for each pass: where its input comes from, and how long it is."""
    share, lengths = coupling_by_pass(net, image)
    others = [j for j in lengths[-1].argsort(descending=True).tolist() if j not in labels]
    classes = [*labels, *others[: SHOWN - len(labels)]]
    passes = len(share)
    shown = share[..., classes]
    least = max(float(shown.min()), 1 / share.shape[-1])  # as far below even as any share can be above: J times
    most = max(float(shown.max()), 1 / least, 1.01)
    scale = optional("matplotlib.colors").LogNorm(1 / most, most, clip=True)  # even is the middle, and white
    drawn = figure(0.5 + 1.25 * len(classes))
    axes = drawn.subplots(len(classes), 1 + passes, squeeze=False)
    show(axes[0, 0], image)
    axes[0, 0].set_title("image")
    for empty in axes[1:, 0]:
        empty.set_axis_off()
    for row, j in enumerate(classes):
        present = j in labels
        for k in range(passes):
            place = axes[row, 1 + k]
            heat = place.imshow(share[k, ..., j].numpy(), cmap="PuOr_r", norm=scale)
            place.set(xticks=[], yticks=[], xlabel=f"length {lengths[k, j]:.2f}")
            place.spines[:].set_linewidth(2.5 if present else 0.8)
            if row == 0:
                place.set_title(f"pass {k + 1}")
        axes[row, 1].set_ylabel(stacked("to", short(class_names[j])), fontweight="bold" if present else None)
    _add_scale(drawn, axes, heat, cut=bool(shown.min() < 1 / most))
    return drawn


def _add_scale(drawn, axes, heat, *, cut: bool) -> None:
    """What the colours mean; `cut` where some shares are below the last of them."""
    most = heat.norm.vmax
    ticks = [most**power for power in (-1, -0.5, 0, 0.5, 1)]
    fine = "{x:.3f}" if most < 1.03 else "{x:.2f}"  # so that no two ticks are called alike
    words = {"format": fine if most < 2 else "{x:.2g}", "extend": "min" if cut else "neither"}
    bar = drawn.colorbar(heat, ax=axes, location="bottom", ticks=ticks, shrink=0.8, aspect=40, **words)
    bar.ax.xaxis.set_minor_locator(optional("matplotlib.ticker").NullLocator())
    bar.set_label("coupling, as a multiple of an even share 1/J")
