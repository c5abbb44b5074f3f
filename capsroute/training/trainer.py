"""Train a capsule network, and measure it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import CapsNet, CapsNetLoss
from .data import Dataset


class TrainingOptions(NamedTuple):
    """How to train.

    Attributes:
        epochs: passes over the training split.
        batch_size: images a step.
        learning_rate: the highest of the schedule (a short rise, then half a cosine down to 0).
        shift: how far training images are shifted at random, at most, as a fraction of their side (the
            paper: 2 of 28 pixels).
        seed: of the initial parameters, the order of the images and their shifts.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 1e-2
    shift: float = 2 / 28
    seed: int = 0


class Score(NamedTuple):
    """Means over a split: the loss, and the share of images whose longest capsule is the label's."""

    loss: float
    accuracy: float


class Epoch(NamedTuple):
    """One epoch: the score on the shifted images while training, that on the test split after it."""

    train: Score
    test: Score
    seconds: float


def train(
    dataset: Dataset,
    model: dict,
    options: TrainingOptions,
    *,
    backend: str = "auto",
    report: Callable[..., None] = lambda **fields: None,
) -> tuple[CapsNet, list[Epoch]]:
    """A network trained on the dataset, and what became of it in every epoch.

    The same seed gives the same network on the same machine; the caller's random state is left as it was.

    Args:
        dataset: the images.
        model: keyword arguments of :class:`capsroute.nn.CapsNet`.
        options: how to train.
        backend: of the routing.
        report: called after every step with `epoch` (from 1), `images` and `loss`, and after every epoch with
            the test `accuracy`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        net = CapsNet(**model, backend=backend)
        optimizer = torch.optim.AdamW(net.parameters(), options.learning_rate)
        steps = options.epochs * -(-len(dataset.train_labels) // options.batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, steps, pct_start=0.1)
        history = []
        for epoch in range(1, options.epochs + 1):
            start = time.perf_counter()
            score = _train_epoch(net, dataset, options, optimizer, schedule, partial(report, epoch=epoch))
            test = evaluate(net, dataset.test_images, dataset.test_labels)
            report(accuracy=test.accuracy)
            history.append(Epoch(score, test, time.perf_counter() - start))
    return net, history


def _train_epoch(net, dataset, options, optimizer, schedule, report) -> Score:
    net.train()
    loss_of = CapsNetLoss()
    count = len(dataset.train_labels)
    loss_sum, correct = 0.0, 0
    for chosen in torch.randperm(count).split(options.batch_size):
        images = shift_at_random(dataset.train_images[chosen], options.shift)
        labels = dataset.train_labels[chosen]
        output = net(images, labels)
        loss = loss_of(output, images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        loss_sum += loss.item() * len(chosen)
        correct += _correct(output.lengths, labels)
        report(images=len(chosen), loss=loss.item())
    return Score(loss_sum / count, correct / count)


@torch.no_grad()
def evaluate(net: CapsNet, images: Tensor, labels: Tensor, batch_size: int = 256) -> Score:
    """The network's score as it predicts: reconstructing from the longest capsule, not from the label."""
    net.eval()
    loss_of = CapsNetLoss()
    loss_sum, correct = 0.0, 0
    for batch, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        output = net(batch)
        loss_sum += loss_of(output, batch, truth).item() * len(truth)
        correct += _correct(output.lengths, truth)
    return Score(loss_sum / len(labels), correct / len(labels))


def shift_at_random(images: Tensor, fraction: float) -> Tensor:
    """Each image [C, H, W] of a batch moved up to `fraction` of its sides in x and y, zeros coming in."""
    moves = torch.eye(2, 3).repeat(len(images), 1, 1)  # [B, 2, 3], affine
    moves[:, :, 2] = (2 * torch.rand(len(images), 2) - 1) * 2 * fraction  # a side is 2 long there
    grid = F.affine_grid(moves, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _correct(lengths: Tensor, labels: Tensor) -> int:
    return int((lengths.argmax(-1) == labels).sum())
