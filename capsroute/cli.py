"""The command `capsroute`: train, eval, bench, tune, info, demo."""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from functools import partial
from pathlib import Path

import torch

from . import __version__, backends
from .nn import CapsNet
from .training import checkpoint, data
from .training.run import CHECKPOINT, run_training
from .training.trainer import TrainingOptions, evaluate

DEMO_ACCURACY = 0.985  # that the demo must reach on the test split


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 fell short, 2 called wrongly."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ImportError, OSError, ValueError) as error:  # what the package raises for what a user can put right
        print(f"capsroute {args.command}: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="capsroute", description="Fused capsule routing for PyTorch.")
    parser.add_argument("--version", action="version", version=f"capsroute {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    train = command("train", _train, "Train a capsule network; write its checkpoint, history and pictures.")
    train.add_argument("--out", type=Path, required=True, metavar="RUN_DIR", help="directory to write to")
    _add_data(train)
    _add_training(train)

    evaluation = command("eval", _eval, "Measure a trained network on the test split.")
    evaluation.add_argument("path", type=Path, help="a RUN_DIR of `train`, or a checkpoint")
    _add_data(evaluation)
    _add_common(evaluation)

    from .bench import cli as bench  # above training and nn, and only wanted here

    bench.add_arguments(command("bench", bench.run, "Time and weigh routing against plain PyTorch."))

    from .bench import tune

    tune.add_arguments(
        command("tune", tune.execute, "Measure the Triton kernels' tiles on this GPU, and keep the best.")
    )

    info = command("info", _info, "Print versions, threads, and which backends can run here.")
    info.add_argument("--json", action="store_true", help="print one JSON object as the last line")

    demo = command(
        "demo", _demo, "Train on scikit-learn's digits, compare the training step with plain PyTorch, draw pictures."
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="RUN_DIR", help="default: %(default)s")
    _add_training(demo)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=("auto", *backends()), default="auto", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="directory with MNIST's four IDX files, gzipped or not (default: the digits of scikit-learn)",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    default = TrainingOptions()
    _add_common(parser)
    parser.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    for name, value, text in (
        ("epochs", default.epochs, "passes over the training split"),
        ("batch-size", default.batch_size, "images a step"),
        ("channels", 64, "channels of the first convolution (the paper: 256)"),
        ("types", 32, "primary capsules at each position"),
        ("iterations", 3, "routing passes"),
    ):
        parser.add_argument(f"--{name}", type=_positive(int), default=value, help=f"{text} (default: %(default)s)")
    parser.add_argument(
        "--learning-rate",
        type=_positive(float),
        default=default.learning_rate,
        help="the highest of the schedule (default: %(default)s)",
    )


def _positive(kind: type):
    """An argparse type: a finite number above 0."""

    def parse(text: str):
        number = kind(text)
        if not 0 < number < math.inf:
            raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
        return number

    parse.__name__ = kind.__name__  # argparse tells it: "invalid int value"
    return parse


def _checked_backend(name: str) -> str:
    can, why = backends().get(name, (True, ""))
    if not can:
        raise ValueError(f"--backend {name} cannot run here: {why}")
    return name


def _say(args: argparse.Namespace, *words: object) -> None:
    """Print for people: to stderr where stdout is for JSON."""
    print(*words, file=sys.stderr if args.json else sys.stdout, flush=True)


def _emit(args: argparse.Namespace, result: dict) -> None:
    if args.json:
        print(json.dumps({"command": args.command, **result}))


def _run(args: argparse.Namespace, dataset: data.Dataset) -> dict:
    """Train as the arguments say, and tell what came of it."""
    model = {
        "image_shape": dataset.image_shape,
        "classes": dataset.classes,
        "channels": args.channels,
        "types": args.types,
        "iterations": args.iterations,
    }
    options = TrainingOptions(args.epochs, args.batch_size, args.learning_rate, seed=args.seed)
    start = time.perf_counter()
    run = run_training(args.out, dataset, model, options, _checked_backend(args.backend))
    seconds = time.perf_counter() - start
    score = run.history[-1].test
    _say(args, f"test accuracy {score.accuracy:.2%} on {len(dataset.test_labels)} images, after {seconds:.0f} s")
    return {
        "dataset": dataset.name,
        "model": model,
        "options": options._asdict(),
        "test_accuracy": score.accuracy,
        "test_loss": score.loss,
        "seconds": seconds,
        "files": [str(path) for path in run.files],
    }


def _train(args: argparse.Namespace) -> int:
    result = _run(args, data.load(args.data_dir))
    _say(args, "wrote", *result["files"])
    _emit(args, result)
    return 0


def _eval(args: argparse.Namespace) -> int:
    path = args.path / CHECKPOINT if args.path.is_dir() else args.path
    loaded = checkpoint.load(path, backend=_checked_backend(args.backend))
    dataset = data.load(args.data_dir)
    expected = tuple(loaded.model["image_shape"]), loaded.model["classes"]
    if expected != (dataset.image_shape, dataset.classes):
        raise ValueError(
            f"{path} is for images {expected[0]} of {expected[1]} classes, "
            f"{dataset.name} has {dataset.image_shape} of {dataset.classes}"
        )
    score = evaluate(loaded.net, dataset.test_images, dataset.test_labels)
    _say(args, f"test accuracy {score.accuracy:.2%} on {len(dataset.test_labels)} images, loss {score.loss:.4f}")
    _emit(args, {"dataset": dataset.name, "test_accuracy": score.accuracy, "test_loss": score.loss})
    return 0


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
            _say(args, f"{name:15}{value}")
    for name, backend in result["backends"].items():
        _say(args, f"backend {name:12} {'yes' if backend['available'] else 'no'}: {backend['reason']}")
    _emit(args, result)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from .bench.compare import DisagreementError
    from .bench.step import compare_training_step, format_rows

    dataset = data.load()
    result = _run(args, dataset)
    _say(args, f"\nOne training step of this network, {args.batch_size} images:")
    images, labels = dataset.train_images[: args.batch_size], dataset.train_labels[: args.batch_size]
    try:
        result["training_step"] = compare_training_step(partial(_network, result["model"]), images, labels)
    except DisagreementError as error:
        return _fall_short(str(error))
    _say(args, format_rows(result["training_step"]))
    _say(args, "\nwrote", *result["files"])
    _emit(args, result)
    if result["test_accuracy"] < DEMO_ACCURACY:
        return _fall_short(f"the test accuracy is below the expected {DEMO_ACCURACY:.1%}")
    return 0


def _fall_short(why: str) -> int:
    print(f"capsroute demo: error: {why}", file=sys.stderr)
    return 1


def _network(model: dict, backend: str) -> CapsNet:
    return CapsNet(**model, backend=backend)
