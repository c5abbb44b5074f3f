"""TensorBoard logs of a training: loss, accuracy, seconds and learning rate by epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .._optional import optional
from .trainer import Training

SUFFIX = ".capsroute"  # of the names of files: others may be a user's


def logs_in(log_dir: Path) -> list[Path]:
    """The files that runs have logged to a directory."""
    return list(log_dir.glob(f"events.out.tfevents.*{SUFFIX}"))


@contextmanager
def tensorboard_log(log_dir: Path, epochs: int) -> Iterator[Callable[[Training], None]]:
    """Log to a directory while the context lasts; call what it yields after every epoch.

    Args:
        log_dir: the directory, made if it is not there.
        epochs: how many are done; what an interrupted run has logged beyond them is dropped.
    """
    optional("tensorboard", extra="tensorboard")  # torch's own error does not say what to install
    make = optional("torch.utils.tensorboard").SummaryWriter
    writers = []  # one, once it has something to say: its first words drop what was logged before

    def log(training: Training) -> None:
        epoch, number = training.history[-1], len(training.history)
        if not writers:
            writers.append(make(str(log_dir), purge_step=epochs + 1, filename_suffix=SUFFIX))
        (writer,) = writers
        for split, score in (("training", epoch.train), (training.options.held_out, epoch.held_out)):
            writer.add_scalar(f"loss/{split}", score.loss, number)
            writer.add_scalar(f"accuracy/{split}", score.accuracy, number)
        writer.add_scalar("learning_rate", training.optimizer.param_groups[0]["lr"], number)
        writer.add_scalar("seconds", epoch.seconds, number)
        writer.flush()

    try:
        yield log
    finally:
        for writer in writers:
            writer.close()
