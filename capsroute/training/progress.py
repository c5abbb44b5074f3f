"""A progress bar for training: loss, accuracy, images a second, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ._optional import optional


@contextmanager
def training_bar(epochs: int, images: int) -> Iterator[Callable[..., None]]:
    """A bar on stderr while the context lasts; what it yields is the `report` of :func:`trainer.train`.

    Args:
        epochs: how many there will be.
        images: how many an epoch has.
    """
    rich = optional("rich.progress")

    class Speed(rich.ProgressColumn):
        def render(self, task):
            return optional("rich.text").Text(f"{task.finished_speed or task.speed or 0:,.0f} images/s")

    columns = (
        rich.TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        rich.BarColumn(),
        rich.TextColumn("loss {task.fields[loss]:.4f}"),
        rich.TextColumn("test accuracy {task.fields[accuracy]}"),
        Speed(),
        rich.TimeRemainingColumn(elapsed_when_finished=True),
    )
    with rich.Progress(*columns, console=optional("rich.console").Console(stderr=True)) as progress:
        task = progress.add_task("train", total=epochs * images, epoch=1, epochs=epochs, loss=0.0, accuracy="-")

        def report(images: int = 0, **fields: float) -> None:
            if "accuracy" in fields:
                fields["accuracy"] = f"{fields['accuracy']:.2%}"
            progress.update(task, advance=images, **fields)

        yield report
