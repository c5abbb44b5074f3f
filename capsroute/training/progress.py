"""What a training shows while it runs: loss, accuracy, images a second of the steps alone, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .._optional import optional
from .batches import Share
from .trainer import Epoch, Training

NARROW = 80  # columns: in fewer a bar would have no room for its words


class Shown:
    """What a training tells: after every step, and after every epoch. This one is silent."""

    def step(self, **fields) -> None:
        """As `on_step` of :func:`capsroute.training.trainer.train_epoch`."""

    def epoch(self, history: list[Epoch]) -> None:
        """With the scores of all epochs so far."""


class _Lines(Shown):
    """A line on stderr after every epoch: for logs."""

    def __init__(self, epochs: int, done: int, images: int, held_out: str):
        self.epochs, self.images, self.first, self.start = epochs, images, done, time.monotonic()
        self.held_out = held_out

    def epoch(self, history: list[Epoch]) -> None:
        last, done = history[-1], len(history)
        left = (time.monotonic() - self.start) / (done - self.first) * (self.epochs - done)
        print(
            f"epoch {done}/{self.epochs}  training loss {last.train.loss:.4f}  "
            f"{self.held_out} accuracy {last.held_out.accuracy:.2%}  "
            f"{self.images / last.seconds:,.0f} images/s  {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


class _Bar(Shown):
    """A bar on the terminal."""

    def __init__(self, bar, epochs: int, done: int, images: int, share: Share):
        self.bar, self.share, self.images = bar, share, images
        self.at, self.since, self.seen = 0, 0.0, 0  # an epoch, its first step, and the images after that
        fields = {"epoch": done, "epochs": epochs, "loss": 0.0, "accuracy": "-", "rate": 0.0}
        self.task = bar.add_task("train", total=epochs * images, completed=done * images, **fields)

    def step(self, *, epoch: int, images: int, loss: float, **_) -> None:
        advance, now = images * self.share.count, time.monotonic()
        self.bar.update(self.task, advance=advance, epoch=epoch, loss=loss)
        if epoch != self.at:
            self.at, self.since, self.seen = epoch, now, 0
            return
        self.seen += advance
        self.bar.update(self.task, rate=self.seen / max(now - self.since, 1e-9))

    def epoch(self, history: list[Epoch]) -> None:
        last = history[-1]
        self.bar.update(self.task, accuracy=f"{last.held_out.accuracy:.2%}", rate=self.images / last.seconds)


@contextmanager
def progress(training: Training, images: int, share: Share) -> Iterator[Shown]:
    """Show a training on stderr while the context lasts: a bar on a terminal that is wide enough, else a line an epoch.

    Args:
        training: where it begins.
        images: how many an epoch has.
        share: of this process; only the first one shows anything.
    """
    epochs, done, held_out = training.options.epochs, len(training.history), training.options.held_out
    if share.rank or training.finished:
        yield Shown()
        return
    rich = optional("rich.progress")
    console = optional("rich.console").Console(stderr=True)
    if not console.is_terminal or console.width < NARROW:
        yield _Lines(epochs, done, images, held_out)
        return

    unbroken = optional("rich.table").Column(no_wrap=True)  # as texts are: the bar gives way
    columns = (
        rich.TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        rich.BarColumn(),
        rich.TextColumn("loss {task.fields[loss]:.4f}"),
        rich.TextColumn(f"{held_out} accuracy {{task.fields[accuracy]}}"),
        rich.TextColumn("{task.fields[rate]:,.0f} images/s"),
        rich.TimeRemainingColumn(elapsed_when_finished=True, table_column=unbroken),
    )
    with rich.Progress(*columns, console=console) as bar:
        yield _Bar(bar, epochs, done, images, share)
