"""The command `capsroute report`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .._console import add_backend, emit, number, say
from .._optional import optional
from ..bench.step import format_rows
from ..training.checkpoint import CheckpointError, history_from_json
from ..training.cli import add_data, load_run
from ..training.run import HISTORY
from . import build


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `capsroute report`."""
    parser.add_argument("path", type=Path, metavar="RUN_DIR", help="of `train`; report.html is written there")
    parser.add_argument("--no-speed", action="store_true", help="do not compare the training step with plain PyTorch")
    parser.add_argument("--seconds", type=number(float), default=10.0, help="to time it (default: %(default)g)")
    add_data(parser)
    add_backend(parser)


def run(args: argparse.Namespace) -> int:
    """Run `capsroute report`."""
    if not args.path.is_dir():
        raise NotADirectoryError(f"{args.path} is no directory of a run")
    emit(args, write_report(args, args.path, speed=not args.no_speed, seconds=args.seconds))
    return 0


def write_report(args: argparse.Namespace, run_dir: Path, *, speed: bool, seconds: float = 10.0) -> dict:
    """Write the report of a run, and tell what it holds."""
    optional("matplotlib")  # before anything takes long
    loaded, dataset = load_run(args, run_dir)
    report = build.Report(loaded, dataset, _history(run_dir), ())
    judged = build.judge(loaded.net, dataset, overlapping=report.options.overlap)
    if speed:
        count = report.options.batch_size
        say(args, f"One training step of this network, {count} images:")
        rows = build.training_step_rows(loaded.net, loaded.model, judged.first, count, seconds)
        say(args, format_rows(rows))
        report = report._replace(rows=rows)
    files = build.write(run_dir, report, judged)
    say(args, f"wrote {files[0]}")
    for row in report.rows:
        row["images_per_second"] = row["seconds"] and report.options.batch_size / row["seconds"]
    return {"files": [str(path) for path in files], "training_step": list(report.rows)}


def _history(run_dir: Path) -> list:
    path = run_dir / HISTORY
    try:
        return history_from_json(json.loads(path.read_text())["epochs"])
    except FileNotFoundError:
        return []
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} is no history of a run: {error}") from error
