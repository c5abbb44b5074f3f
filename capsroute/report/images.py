"""Figures of images: what the decoder draws, and what a capsule's features mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._optional import optional
from ..nn import CapsNet
from ..training.batches import Batch
from ..training.data import Split
from ..training.trainer import predict
from .style import BLUE, FONT, MOST_CLASSES, ORANGE, figure, short, show, stacked

STEPS = torch.arange(-5, 6) / 20  # -0.25 to 0.25, what is added to a feature of a capsule: the paper's figure 4
PAIRS = 5  # of overlapping digits that are shown
COLOURS = ORANGE, BLUE  # the first digit of a pair, and the other


@torch.no_grad()
def reconstructions(net: CapsNet, split: Split, class_names: Sequence[str]):
    """The first image of each class, up to MOST_CLASSES, above what the decoder makes of its longest capsule."""
    classes = split.labels.unique().tolist()[:MOST_CLASSES]
    images = split[torch.stack([(split.labels == j).nonzero()[0, 0] for j in classes])].as_float()
    output = net.eval()(images)
    per_row = min(5, len(classes))
    blocks = -(-len(classes) // per_row)
    drawn = figure(0.2 + 2.45 * blocks)
    axes = drawn.subplots(2 * blocks, per_row, squeeze=False)
    for empty in axes.flat:
        empty.set_axis_off()
    for k, (label, named) in enumerate(zip(classes, output.lengths.argmax(-1).tolist(), strict=True)):
        upper, lower = (axes[2 * (k // per_row) + row, k % per_row] for row in (0, 1))
        for place, image in ((upper, images[k]), (lower, output.reconstruction[k])):
            place.set_axis_on()
            show(place, image)
        upper.set_title(short(class_names[label]))
        lower.set_title(stacked("as", short(class_names[named])), fontweight=None if named == label else "bold")
    for block in range(blocks):
        axes[2 * block, 0].set_ylabel("image")
        axes[2 * block + 1, 0].set_ylabel("drawn")
    return drawn


@torch.no_grad()
def perturbations(net: CapsNet, image: Tensor, label: int):
    """What the decoder draws when one feature of the capsule of a class is changed: a row for each feature.

    Sabour, Frosst and Hinton 2017, figure 4.
    """
    net.eval()
    capsules = net.routing(net.primary_capsules(image.unsqueeze(0)))  # [1, J, O]
    features = capsules.shape[2]
    changed = capsules.repeat(features * len(STEPS), 1, 1)
    changes = torch.eye(features).unsqueeze(1) * STEPS.view(1, -1, 1)  # [O, steps, O]
    changed[:, label] += changes.flatten(0, 1)
    drawings = net.decoder(changed, torch.full((len(changed),), label))  # [O * steps, C, H, W]
    height, width = image.shape[1:]
    drawings = torch.nn.functional.pad(drawings, (1, 1, 1, 1), value=0.35)  # a line between them
    mosaic = drawings.unflatten(0, (features, len(STEPS))).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    drawn = figure(0.7 + 4.6 * features * (height + 2) / (len(STEPS) * (width + 2)))
    axes = drawn.subplots()
    show(axes, mosaic)
    axes.set_xticks([(k + 0.5) * (width + 2) for k in (0, 5, 10)], ["-0.25", "0", "+0.25"])
    axes.set_yticks([(k + 0.5) * (height + 2) for k in range(features)], range(1, features + 1))
    axes.tick_params(length=0)
    axes.set(xlabel="added to the feature", ylabel="feature of the capsule")
    return drawn


@torch.no_grad()
def taken_apart(net: CapsNet, batch: Batch, class_names: Sequence[str]):
    """Overlapping digits, what they were made of, and what the decoder draws from the two longest capsules."""
    count = min(PAIRS, len(batch.images))
    images, labels, parts = (x[:count] for x in batch[:3])
    capsules = net.eval().routing(net.primary_capsules(images))
    named = predict(capsules.norm(dim=-1), 2)
    # In the order of the labels, so that a digit and its drawing have one colour.
    swap = (named[:, 0] == labels[:, 1]) | (named[:, 1] == labels[:, 0])
    named = torch.where(swap.unsqueeze(1), named.flip(1), named)
    drawings = net.decoder(capsules, named)  # [count, 2, C, H, W]
    drawn = figure(0.3 + count * 1.25)
    axes = drawn.subplots(count, 4, squeeze=False)
    for row, place in enumerate(axes):
        show(place[0], images[row])
        place[1].imshow(_coloured(parts[row]))
        for k in (0, 1):
            place[2 + k].imshow(_coloured(drawings[row, k : k + 1], k))
            right = bool((labels[row] == named[row, k]).any())
            name = short(class_names[int(named[row, k])])
            words = stacked(*(("read as", name) if right else ("read as", f"{name}:", "wrong")), within=16)
            place[2 + k].set_xlabel(words, color=COLOURS[k], fontweight="bold", fontsize=FONT - 1)
        one, other = (short(class_names[j]) for j in labels[row].tolist())
        place[1].set_xlabel(stacked(f"{one} and", other, within=16), fontsize=FONT - 1)
        for each in place:
            each.set(xticks=[], yticks=[])
    for place, title in zip(axes[0], ("image", "made of", "drawn alone", "and the other"), strict=True):
        place.set_title(title)
    return drawn


def _coloured(parts: Tensor, first: int = 0):
    """Parts ``[K, C, H, W]`` over each other, each in its colour, as an array ``[H, W, 3]``."""
    grey = parts.mean(1)  # [K, H, W]
    colours = optional("matplotlib.colors").to_rgba_array(COLOURS[first : first + len(parts)])[:, :3]
    return torch.einsum("khw,kc->hwc", grey, torch.tensor(colours).to(grey)).clamp(0, 1).numpy()
