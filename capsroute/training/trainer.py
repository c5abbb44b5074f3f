"""Train a capsule network, epoch by epoch, and measure it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..nn import CapsNet, CapsNetLoss
from .batches import WHOLE, Share, evaluation_batches, steps_per_epoch, training_batches
from .data import Split
from .distributed import total
from .options import AMP_DTYPES, TrainingOptions

ADVICE = "try a lower learning rate (--learning-rate), or clip the gradient (--clip 1)"

OnStep = Callable[..., None]


class Score(NamedTuple):
    """Means over a split: the loss, and the share of images whose labels are all named.

    Named are the longest capsule, or the two longest where two digits overlap.
    """

    loss: float
    accuracy: float


class Epoch(NamedTuple):
    """One epoch: the score on augmented images while training, and after it on images that are not trained on."""

    train: Score
    held_out: Score  # on the validation split; on the test split where there is none, and then it decides nothing
    seconds: float  # of the training alone


@dataclass
class Training:
    """A training after some whole epochs: everything that the next one depends on."""

    net: CapsNet
    model: dict  # the keyword arguments of CapsNet
    options: TrainingOptions
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of float16's loss; idle for other dtypes
    history: list[Epoch] = field(default_factory=list)
    best: dict[str, Tensor] | None = None  # the parameters of the best epoch, where there is a validation split

    @classmethod
    def begin(
        cls, model: dict, options: TrainingOptions, backend: str = "auto", device: torch.device | str = "cpu"
    ) -> Training:
        """A training of a new network; the seed alone decides its parameters, and no random state is touched."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(options.seed)  # torch.manual_seed would seed the GPUs' too
            return cls.of(CapsNet(**model, backend=backend), model, options, device)

    @classmethod
    def of(cls, net: CapsNet, model: dict, options: TrainingOptions, device: torch.device | str = "cpu") -> Training:
        """A training of an existing network."""
        net = net.to(device)
        optimizer = torch.optim.AdamW(net.parameters(), options.learning_rate, weight_decay=options.weight_decay)
        scaler = torch.amp.GradScaler(torch.device(device).type, enabled=options.amp == "float16")
        return cls(net, model, options, optimizer, scaler)

    @property
    def best_epoch(self) -> int:
        """The epoch, counted from 1, whose network is the result: of the lowest validation loss, else the last."""
        if not self.options.validation:
            return len(self.history)
        return 1 + min(range(len(self.history)), key=lambda k: self.history[k].held_out.loss)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or patience is out."""
        since = len(self.history) - self.best_epoch if self.history else 0
        return len(self.history) >= self.options.epochs or 0 < self.options.patience <= since

    @cached_property
    def trained(self) -> nn.Module:
        """The network as a step calls it: inside a process group, one that takes the mean of the gradients."""
        return nn.parallel.DistributedDataParallel(self.net) if dist.is_initialized() else self.net

    def leave_processes(self) -> None:
        """Before a process group ends, let go of what belongs to it: freed later, it waits for the group forever."""
        self.__dict__.pop("trained", None)

    def result(self) -> CapsNet:
        """The network of the best epoch."""
        if self.best is None or self.best_epoch == len(self.history):
            return self.net
        net = CapsNet(**self.model, backend=self.net.routing.backend, device="meta")
        net.load_state_dict(self.best, assign=True)
        return net


def train_epoch(
    training: Training, train: Split, held_out: Split, *, share: Share = WHOLE, on_step: OnStep = lambda **_: None
) -> None:
    """One more epoch.

    The same seed gives the same network on the same machine and number of threads, whatever was interrupted
    and taken up again between epochs.

    Args:
        training: what goes on.
        train, held_out: the images to train on, and to evaluate on afterwards.
        share: of this process, one of several inside :func:`capsroute.training.distributed.processes`.
        on_step: called after every step with `epoch` (from 1), `step` (from 1 in the whole training), `images`,
            `loss` and `correct`, the last two of this process's own images.

    Raises:
        FloatingPointError: if the loss is no longer finite, in a step or after the last one.
    """
    start = time.perf_counter()
    options = training.options
    score = _train_batches(training, train, share, on_step)
    seconds = time.perf_counter() - start
    judged = evaluate(training.net, held_out, overlapping=options.overlap, share=share)
    training.history.append(Epoch(score, judged, seconds))
    if options.validation and training.best_epoch == len(training.history):
        training.best = {name: x.detach().clone() for name, x in training.net.state_dict().items()}


def _train_batches(training: Training, train: Split, share: Share, on_step: OnStep) -> Score:
    net, options, optimizer, scaler = training.net.train(), training.options, training.optimizer, training.scaler
    device = next(net.parameters()).device
    loss_of, sums = CapsNetLoss(), []
    steps = steps_per_epoch(len(train), options.batch_size, share.count)
    epoch = 1 + len(training.history)
    batches = training_batches(
        train,
        options.batch_size,
        options.augmentation,
        seed=options.seed,
        epoch=epoch,
        overlapping=options.overlap,
        share=share,
    )
    for step, batch in enumerate(batches, (epoch - 1) * steps):
        images, labels, parts, whole = batch.to(device)
        for group in optimizer.param_groups:
            group["lr"] = options.rate(step, options.epochs * steps)
        optimizer.zero_grad()
        with torch.autocast(device.type, AMP_DTYPES[options.amp], enabled=options.amp != "off"):
            output = training.trained(images, labels)
            loss = loss_of(output, parts, labels)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss became {value} in epoch {epoch}: {ADVICE}")
        # A mean over this process's images; DDP takes the mean over processes, whose shares may differ by one.
        scaler.scale(loss * (len(images) * share.count / whole)).backward()
        if options.clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), options.clip)
        scaler.step(optimizer)
        scaler.update()
        correct = count_correct(output.lengths, labels)
        sums.append((value * len(images), correct, len(images)))
        on_step(epoch=epoch, step=step + 1, images=len(images), loss=value, correct=correct)
    loss_sum, correct, count = total(*map(sum, zip(*sums, strict=True)), device=device)
    return Score(loss_sum / count, correct / count)


@torch.no_grad()
def evaluate(net: CapsNet, split: Split, *, overlapping: bool = False, share: Share = WHOLE) -> Score:
    """The network's score on a split; with `overlapping` on the split's fixed pairs of overlapping digits.

    The loss is that of training, whose reconstructions are of the labelled capsules; the labels reach nothing of
    the accuracy.

    Raises:
        FloatingPointError: if the loss is not finite; damage by the last step shows here first.
    """
    net.eval()
    device = next(net.parameters()).device
    loss_of = CapsNetLoss()
    loss_sum, correct, count = 0.0, 0, 0
    for batch in evaluation_batches(split, overlapping=overlapping, share=share):
        images, labels, parts, _ = batch.to(device)
        if not len(images):
            continue  # a last batch of fewer images than processes
        output = net(images, labels)
        loss_sum += loss_of(output, parts, labels).item() * len(images)
        correct += count_correct(output.lengths, labels)
        count += len(images)
    loss_sum, correct, count = total(loss_sum, correct, count, device=device)
    if not math.isfinite(loss_sum):
        raise FloatingPointError(f"the loss of the trained network is {loss_sum / count}: {ADVICE}")
    return Score(loss_sum / count, correct / count)


def predict(lengths: Tensor, count: int) -> Tensor:
    """The classes of the `count` longest capsules, longest first: int64 ``[B, count]`` of lengths ``[B, J]``."""
    return lengths.topk(count, -1).indices


def count_correct(lengths: Tensor, labels: Tensor) -> int:
    """How many images have all of their labels ``[B, K]``, and no other class, among the K longest capsules."""
    named = predict(lengths, labels.shape[1])
    return int((named.sort(-1).values == labels.sort(-1).values).all(-1).sum())
