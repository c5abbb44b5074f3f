"""The command `capsroute`: train, eval, report, bench, tune, info, demo."""

from __future__ import annotations

import argparse
import io
import os
import platform
import sys
from pathlib import Path

import torch

from ._backends import backends
from ._console import add_backend, complain, emit, given_path, number, rank, say
from ._version import __version__

DEMO_ACCURACY = 0.985  # that the demo must reach on the test split

# What the package raises for what a user can put right.
EXPECTED = (ImportError, OSError, ValueError, FloatingPointError, torch.OutOfMemoryError)
# On a CPU torch has no class of its own for that.
NO_MEMORY = ("allocate memory", "no memory for", "size calculation overflowed")
INTERRUPTED, UNREAD = 130, 141  # as a shell reports SIGINT and SIGPIPE


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 fell short, 2 called wrongly, 130 interrupted, 141 unread."""
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # it may be none
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does
    torch.manual_seed(args.seed or 0)
    try:
        return args.run(args)
    except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest as it ends
        return UNREAD
    except EXPECTED as error:
        complain(args, error)
        return 2
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_MEMORY):
            raise
        complain(args, error)
        return 2
    except KeyboardInterrupt as interrupt:
        complain(args, ": ".join(("interrupted", *interrupt.args)))
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    # Above the modules of the library, and wanted by the command line alone.
    from .bench import cli as bench
    from .bench import tune
    from .report import cli as report
    from .training import cli as training

    parser = argparse.ArgumentParser(prog="capsroute", description="Fused capsule routing for PyTorch.")
    parser.add_argument("--version", action="version", version=f"capsroute {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, text: str, seed: str = "0") -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        added.add_argument(
            "--seed",
            type=number(int, most=2**32 - 1),
            metavar="N",
            help=f"seed of all random numbers (default: {seed})",
        )
        added.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        return added

    train = command("train", training.train, "Train a capsule network on images.", "0, or the run's with --resume")
    training.add_train(train)
    training.add_eval(command("eval", training.evaluate_run, "Measure a trained network on the test split."))
    report.add_arguments(command("report", report.run, "Show what a trained network has learnt, on one HTML page."))
    bench.add_arguments(command("bench", bench.run, "Compare time and memory of routing with plain PyTorch."))
    tune.add_arguments(
        command("tune", tune.execute, "Find and keep the fastest tiles of the Triton kernels on this GPU.")
    )
    command("info", _info, "Print versions, threads, and which backends can run here.")
    demo = command("demo", _demo, "Train on scikit-learn's digits, compare with plain PyTorch, write the report.")
    demo.add_argument("--out", type=given_path, default=Path("demo"), metavar="RUN_DIR", help="default: %(default)s")
    demo.set_defaults(data_dir=None, image_size=None)
    training.add_training(demo)
    add_backend(demo)
    training.add_device(demo)
    return parser


def _info(args: argparse.Namespace) -> int:
    result = {
        "capsroute": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "backends": {name: {"available": can, "reason": why} for name, (can, why) in backends().items()},
    }
    for name, value in result.items():
        if name != "backends":
            say(args, f"{name:15}{value}")
    for name, backend in result["backends"].items():
        say(args, f"backend {name:12} {'yes' if backend['available'] else 'no'}: {backend['reason']}")
    emit(args, result)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from .bench.compare import DisagreementError
    from .report.cli import check_libraries, write_report
    from .training import cli as training
    from .training import data
    from .training.run import PAGE, PICTURES, RunError, found_in, stored

    check_libraries()  # before anything takes long
    known = stored(args.out)
    drawn = any((args.out / name).exists() for name in (PAGE, PICTURES))
    found = "a run" if found_in(args.out) else "a report" if drawn else None
    if found and not (known and known.source.get("demo")):
        raise RunError(f"{args.out} holds {found} that is not the demo's: choose another --out")
    result = training.train_as_asked(args, data.digits(), {"demo": True}, overwrite=True)
    if rank():
        return 0  # the first process draws and judges
    try:
        result = write_report(args, args.out) | result
    except DisagreementError as error:
        complain(args, error)
        return 1
    emit(args, result)
    if result["test_accuracy"] < DEMO_ACCURACY:
        complain(args, f"the test accuracy is below the expected {DEMO_ACCURACY:.1%}")
        return 1
    return 0
