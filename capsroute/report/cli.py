"""The command `capsroute report`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from .._console import add_backend, checked_backend, complain, emit, given_path, number, say
from .._optional import optional
from ..bench.compare import DisagreementError
from ..bench.step import format_rows
from ..training.checkpoint import CheckpointError, history_from_json
from ..training.cli import add_data, load_run
from ..training.run import HISTORY, alone_in
from ..training.trainer import Epoch
from . import build
from .curves import confusion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `capsroute report`."""
    parser.add_argument(
        "path", type=given_path, metavar="RUN_DIR", help="a directory of `train`; report.html is written there"
    )
    parser.add_argument("--no-speed", action="store_true", help="do not compare the training step with plain PyTorch")
    parser.add_argument(
        "--seconds", type=number(float), default=10.0, help="how long to time the training step (default: %(default)g)"
    )
    add_data(parser)
    add_backend(parser)


def run(args: argparse.Namespace) -> int:
    """Run `capsroute report`; returns the exit status, 1 if the training step was wrong."""
    if not args.path.is_dir():
        raise NotADirectoryError(f"{args.path} is not the directory of a run")
    try:
        backend = checked_backend(args.backend)
        result = write_report(args, args.path, backend=backend, speed=not args.no_speed, seconds=args.seconds)
    except DisagreementError as error:
        complain(args, error)
        return 1
    emit(args, result)
    return 0


def check_libraries() -> None:
    """Raise ImportError, which says how to install it, unless all that a report needs is there."""
    for library in ("matplotlib", "jinja2"):
        optional(library)


def write_report(
    args: argparse.Namespace, run_dir: Path, *, backend: str = "auto", speed: bool = True, seconds: float = 10.0
) -> dict:
    """Write the report of a run, and tell what it holds.

    It computes on the CPU, wherever the run was trained: `backend` is to serve that.

    Raises:
        DisagreementError: once the rest of it is written, if the training step is wrong, of whose speed it then
            says nothing.
    """
    disagreement = None
    check_libraries()  # before anything takes long
    if not os.access(run_dir, os.W_OK):
        raise PermissionError(f"the report is written to {run_dir}, which cannot be written to")
    with alone_in(run_dir):
        loaded, dataset = load_run(args, run_dir, backend)
        options = loaded.options
        report = build.Report(loaded, dataset, *_history(run_dir), ())
        judged = build.judge(loaded.net, dataset, overlapping=options.overlap)
        if speed:
            say(args, f"One training step of this network, {options.batch_size} {options.samples}:")
            try:
                report = report._replace(rows=build.training_step_rows(report, judged.first, seconds))
                say(args, format_rows(report.rows))
            except DisagreementError as error:
                disagreement, report = error, report._replace(unmeasured=str(error))
        files, fonts = build.write(run_dir, report, judged)
    if fonts:
        say(args, fonts)
    say(args, f"wrote {files[0]}")
    if disagreement:
        raise disagreement
    for row in report.rows:
        row["images_per_second"] = row["seconds"] and options.batch_size / row["seconds"]
    return {
        "files": [str(path) for path in files],
        "dataset": dataset.name,
        "test_accuracy": judged.accuracy,
        "class_names": list(dataset.class_names),
        "confusion": confusion(judged.lengths, judged.labels).tolist(),
        "training_step": list(report.rows),
    }


def _history(run_dir: Path) -> tuple[list[Epoch], int]:
    """The epochs of a run, and which of them is the best."""
    path = run_dir / HISTORY
    try:
        stored = json.loads(path.read_text())
        epochs, best = history_from_json(stored["epochs"]), stored["best_epoch"]
        if best not in range(1, len(epochs) + 1):
            raise ValueError(f"best_epoch must be from 1 to {len(epochs)}, got {best}")
        return epochs, best
    except FileNotFoundError:
        return [], 0
    except LookupError as error:
        raise CheckpointError(f"{path} is not the history of a run: it lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not the history of a run: {error}") from error
