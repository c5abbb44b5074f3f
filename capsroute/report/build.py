"""The report of a run: which figures it has, and what they say."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .._files import write_atomically
from .._version import __version__
from ..bench.step import compare_training_step
from ..nn import CapsNet, CapsNetOutput
from ..training.batches import Batch, evaluation_batches
from ..training.checkpoint import Checkpoint
from ..training.data import Dataset
from ..training.options import AMP_DTYPES
from ..training.overlap import lay_over
from ..training.run import PAGE, PICTURES, remove_pictures
from ..training.trainer import Epoch, count_correct
from . import coupling, curves, images
from .page import Section, render
from .style import MOST_CLASSES, styled


class Report(NamedTuple):
    """What a report is made of.

    Attributes:
        loaded: the network and how it was trained.
        dataset: its images.
        epochs: the history; empty if it is not known.
        best_epoch: of them the one, counted from 1, whose network it is.
        rows: of :func:`capsroute.bench.step.compare_training_step`; empty if not measured.
        unmeasured: why not, if it was to be measured.
    """

    loaded: Checkpoint
    dataset: Dataset
    epochs: Sequence[Epoch]
    best_epoch: int
    rows: Sequence[dict]
    unmeasured: str = ""


class Judged(NamedTuple):
    """The network's view of the test split."""

    lengths: Tensor  # [N, J]
    labels: Tensor  # [N, K]
    first: Batch  # the first images

    @property
    def accuracy(self) -> float:
        return count_correct(self.lengths, self.labels) / len(self.labels)


@torch.no_grad()
def judge(net: CapsNet, dataset: Dataset, *, overlapping: bool) -> Judged:
    """The lengths of all output capsules for every test image."""
    net.eval()
    lengths, labels, first = [], [], None
    for batch in evaluation_batches(dataset.test, overlapping=overlapping):
        first = first or batch
        lengths.append(net(batch.images).lengths)
        labels.append(batch.labels)
    return Judged(torch.cat(lengths), torch.cat(labels), first)


def training_step_rows(report: Report, batch: Batch, seconds: float) -> list[dict]:
    """Time and memory of a step of the run's training, on images like those of a batch, fused against plain PyTorch."""
    options = report.loaded.options
    repeats = -(-options.batch_size // len(batch.labels))
    parts, labels = (
        x.repeat(repeats, *(1,) * (x.dim() - 1))[: options.batch_size] for x in (batch.parts, batch.labels)
    )
    return compare_training_step(partial(_Trained, options.amp, report.loaded.model), parts, labels, seconds=seconds)


class _Trained(CapsNet):  # of a module, so that a fresh process finds it
    """A network as a training calls it: parts are laid over each other, and it computes in mixed precision."""

    def __init__(self, amp: str, model: dict, backend: str):
        super().__init__(**model, backend=backend)
        self.amp = amp

    def forward(self, parts: Tensor, labels: Tensor) -> CapsNetOutput:
        with torch.autocast("cpu", AMP_DTYPES[self.amp], enabled=self.amp != "off"):
            return super().forward(lay_over(parts), labels)


def sections(report: Report, judged: Judged) -> Iterator[Section]:
    """The figures, in the order of the page; their names are those of PICTURE_NAMES."""
    loaded, names = report.loaded, report.dataset.class_names
    shown = _surest(judged)
    image, labels = judged.first.images[shown], judged.first.labels[shown].tolist()
    if report.epochs:
        yield _curves(report)
    yield _section(
        "confusion",
        "What is taken for what",
        "Rows: the labels. Columns: what the network named. The errors are off the diagonal; the colour is the square "
        "root of the share of the row, so that single errors can be seen.",
        curves.confusion_matrix(curves.confusion(judged.lengths, judged.labels), names),
    )
    if loaded.net.routing.iterations > 1:  # in one pass alone all shares are even
        yield _section(
            "coupling",
            "Routing, pass by pass",
            f"One test image of {' and '.join(names[j] for j in labels)}. Each map: how strongly the input capsules "
            "of a position couple to the output capsule of the row; white is an even share, orange more, violet less. "
            "In the first pass all shares are even; each later one gives more to votes that agreed with the outcome "
            "of those before. Below each map is the capsule's length.",
            coupling.coupling(loaded.net, image, labels, names),
        )
    yield _apart(report, judged) if loaded.options.overlap else _reconstructions(report)
    yield _section(
        "perturbations",
        "What a capsule's numbers mean",
        f"The capsule of {names[labels[0]]}, drawn with one of its features changed at a time, from -0.25 to 0.25: "
        "a row for each feature. The middle column is the unchanged capsule.",
        images.perturbations(loaded.net, image, labels[0]),
    )
    if report.rows:
        yield _speed(report)


def _curves(report: Report) -> Section:
    options = report.loaded.options
    held_out = "validation" if options.validation else "test, which decided nothing"
    augmented = any(options.augmentation)
    harder = "Augmented images may be harder than those held out" if augmented else "The network still learns meanwhile"
    return _section(
        "curves",
        "Learning",
        f"Loss and errors by epoch; the dashed line is a mean over the steps of an epoch. {harder}, so it may lie "
        "above the other line.",
        curves.learning_curves(report.epochs, report.best_epoch, held_out, augmented=augmented),
    )


def _apart(report: Report, judged: Judged) -> Section:
    return _section(
        "apart",
        "Overlapping images taken apart",
        "The network sees the first column alone. The two longest capsules are its answer, and the decoder draws "
        "each of them without the other. Of what a row is made of, the first is orange, the second blue.",
        images.taken_apart(report.loaded.net, judged.first, report.dataset.class_names),
    )


def _reconstructions(report: Report) -> Section:
    net, names = report.loaded.net, report.dataset.class_names
    first = f", the first {MOST_CLASSES} of {len(names)}" if len(names) > MOST_CLASSES else ""
    return _section(
        "reconstructions",
        "Drawn again from one capsule",
        f"Above a test image of each class{first}, below what the decoder draws from the longest capsule alone: "
        f"{net.routing.out_features} numbers.",
        images.reconstructions(net, report.dataset.test, names),
    )


def _speed(report: Report) -> Section:
    options = report.loaded.options
    batch = options.batch_size
    notes = "; ".join(f"{row['name']}: {row['note']}" for row in report.rows if row["note"])
    mixed = "" if options.amp == "off" else f" in mixed precision, {options.amp}"
    return _section(
        "speed",
        "Speed and memory",
        f"A training step of this network{mixed}: forward, loss, backward and AdamW, {batch} {options.samples}, on "
        f"the CPU that drew this page (threads: {torch.get_num_threads()}), in turns in one process: fused is "
        "capsroute, reference plain PyTorch, compiled the reference under torch.compile. Losses and gradients were "
        "compared before anything was timed; the thin lines hold the middle half of the times. Memory is without "
        "parameters, gradients and the optimizer's state. "
        f"{notes}",
        curves.speed(report.rows, batch),
    )


def write(run_dir: Path, report: Report, judged: Judged) -> tuple[list[Path], str]:
    """Write the page and its figures to a directory.

    Returns:
        Their paths, the page first; and what is to be said of letters that no font has, if there are any.
    """
    with styled() as boxes:
        made = list(sections(report, judged))
    fonts = f"No font here has {''.join(sorted(boxes))}: figures show boxes in their place." if boxes else ""
    folder = run_dir / PICTURES
    folder.mkdir(exist_ok=True)
    paths = [run_dir / PAGE]
    for section in made:
        paths.append(folder / f"{section.name}.png")
        write_atomically(paths[-1], section.png)
    write_atomically(paths[0], page_of(report, judged, made, fonts).encode(errors="replace"))
    remove_pictures(run_dir, but={section.name for section in made})
    return paths, fonts


def page_of(report: Report, judged: Judged, made: Sequence[Section], fonts: str = "") -> str:
    """The page, with the figures that were made, and what is to be said of the fonts."""
    loaded, options = report.loaded, report.loaded.options
    test = judged.accuracy
    parameters = sum(x.numel() for x in loaded.net.parameters())
    what = options.samples if options.overlap else "test images"
    cards = [
        ("test accuracy", f"{test:.2%}"),
        (what, f"{len(judged.labels):,}"),
        ("epochs", f"{len(report.epochs) or options.epochs}"),
        ("parameters", f"{parameters:,}"),
    ]
    data = loaded.info.get("dataset", report.dataset.name)
    shown = {"data": data, **loaded.model, **options._asdict(), "capsroute": __version__}
    notes = [fonts] if fonts else []
    if not options.overlap:
        notes.append("Overlapping images are taken apart in the report of a run of: capsroute train --overlap")
    if not report.rows:
        why = f": {report.unmeasured}" if report.unmeasured else ""
        notes.append(f"Speed was not measured{why}.")
    return render(
        f"Capsule network on {report.dataset.name}",
        f"{'Both right classes were' if options.overlap else 'The right class was'} named in {test:.2%} of "
        f"{len(judged.labels):,} {what}.",
        cards,
        made,
        [(name.replace("_", " "), _words(value)) for name, value in shown.items()],
        notes,
    )


def _surest(judged: Judged) -> int:
    """Among the first images that whose labelled capsules are the longest."""
    labels = judged.first.labels
    return int(judged.lengths[: len(labels)].gather(1, labels).amin(1).argmax())


def _section(name: str, title: str, caption: str, figure) -> Section:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return Section(name, title, caption.strip(), png.getvalue())


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return " x ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
