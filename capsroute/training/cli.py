"""The commands `capsroute train` and `capsroute eval`."""

from __future__ import annotations

import argparse
import datetime
import os
import time
from pathlib import Path
from shlex import quote

from .._console import add_backend, checked_backend, emit, given_path, number, say
from . import checkpoint, data, distributed
from .options import AMP_DTYPES, SCHEDULES, TrainingOptions
from .run import MODEL, TRAINING, RunError, Stored, image_shape, run_training, source_of, stored
from .trainer import evaluate

DATA_VARIABLE = "CAPSROUTE_DATA"
ENVIRONMENT = f"${DATA_VARIABLE}, else the digits of scikit-learn"
MODEL_DEFAULTS = {"channels": 64, "types": 32, "iterations": 3}
WHERE_DEFAULTS = {"backend": "auto", "device": "auto", "tensorboard": False}  # kept with a run, beside its options


def add_data(
    parser: argparse.ArgumentParser, default: str = f"the run's own; if it does not say, {ENVIRONMENT}"
) -> None:
    """Add the options that choose the images."""
    parser.add_argument(
        "--data-dir",
        type=given_path,
        help="IDX files (MNIST and its kin), CIFAR-10's binary files, or folders of images, one a class "
        f"(default: {default})",
    )
    parser.add_argument("--image-size", type=number(int, 1), metavar="N", help="resize images of folders to N x N")


def add_device(parser: argparse.ArgumentParser, default: str | None = "auto") -> None:
    """Add --device."""
    parser.add_argument(
        "--device", choices=distributed.DEVICES, default=default, help="default: a GPU if torch sees one"
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options of a training; one that is not given is None."""
    default = TrainingOptions()._asdict() | MODEL_DEFAULTS

    def option(name: str, kind, text: str, **more) -> None:
        value = default[name.replace("-", "_")]
        shown = f"{value:.3g}" if isinstance(value, float) else value
        parser.add_argument(f"--{name}", type=kind, help=f"{text} (default: {shown})", **more)

    count, amount = number(int, 1), number(float)
    option("epochs", count, "passes over the training images")
    option("batch-size", count, "images a step, over all processes")
    option("learning-rate", number(float, above=True), "peak learning rate of AdamW")
    option("schedule", str, "what the learning rate does after a short rise", choices=SCHEDULES)
    option("weight-decay", amount, "weight decay of AdamW")
    option("clip", amount, "maximum norm of the whole gradient; 0: no clipping")
    option("amp", str, "automatic mixed precision", choices=AMP_DTYPES)
    option("shift", amount, "augmentation: shift by up to this share of the side")
    option("rotation", amount, "augmentation: rotate by up to this many degrees")
    option("scale", amount, "augmentation: zoom in and out by up to this share")
    option("shear", amount, "augmentation: shear by up to this many degrees")
    option("validation", amount, "choose the best epoch by this share of the training images, or by a folder val")
    option("patience", number(int), "stop when the validation loss has not fallen for this many epochs; 0: never")
    option("channels", count, "channels of the first convolution (the paper: 256)")
    option("types", count, "primary capsules at each position")
    option("iterations", count, "routing passes")
    parser.add_argument(
        "--overlap",
        action="store_true",
        default=None,
        help="train and test on two overlapping digits (the paper's MultiMNIST)",
    )


def add_train(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `capsroute train`."""
    parser.add_argument(
        "--out", type=given_path, metavar="RUN_DIR", help="directory to write to (default: runs/DATE_TIME)"
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        action="store_true",
        help="resume the run in RUN_DIR after its last whole epoch, with its own options where none are given",
    )
    start.add_argument("--overwrite", action="store_true", help="start anew, and replace the run in RUN_DIR")
    parser.add_argument("--tensorboard", action="store_true", default=None, help="also log to RUN_DIR/tensorboard")
    add_data(parser, ENVIRONMENT)
    add_training(parser)
    add_backend(parser, None)
    add_device(parser, None)


def load_data(args: argparse.Namespace, run: dict | None = None) -> tuple[data.Dataset, dict]:
    """The images that the arguments name, else those that a run was trained on, else those of the environment.

    Returns them and where they came from, which a later call takes as `run`.
    """
    whose = "images of the run"
    if not run:
        run, whose = {"data_dir": os.environ.get(DATA_VARIABLE)}, DATA_VARIABLE
    data_dir = args.data_dir or run.get("data_dir") or None
    size = args.image_size or (run.get("image_size") if data.resizes(data_dir) else None)
    try:
        dataset = data.load(data_dir, size)
    except data.DataError as error:
        if args.data_dir or data_dir is None:
            raise
        raise data.DataError(f"{whose}: {error}") from error  # the command line does not name them
    return dataset, {"data_dir": data_dir and str(Path(data_dir).resolve()), "image_size": size}


def train(args: argparse.Namespace) -> int:
    """Run `capsroute train`."""
    if args.out is None:
        if args.resume:
            raise RunError("--resume needs --out, the run to resume")
        args.out = Path("runs") / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    known = stored(args.out) if args.resume else None
    if args.resume and known is None and not _says_what(args):
        raise RunError(
            f"{args.out} holds no run to resume; to start one, name images or options, such as --data-dir or --epochs"
        )
    dataset, source = load_data(args, known and known.source)
    old = _written(args.out) if args.overwrite else None
    try:
        result = train_as_asked(args, dataset, source, known, resume=args.resume, overwrite=args.overwrite)
    except KeyboardInterrupt:
        if _written(args.out) == old:  # nothing of this run
            raise
        raise KeyboardInterrupt(f"resume with: {_resume(args.out)}") from None
    say(args, f"wrote {args.out}; look at it with: capsroute report {quote(str(args.out))}")
    emit(args, result)
    return 0


def _written(run_dir: Path) -> int | None:
    """When the training in a directory was written, in ns."""
    path = run_dir / TRAINING
    return path.stat().st_mtime_ns if path.exists() else None


def _resume(run_dir: Path) -> str:
    return f"capsroute train --out {quote(str(run_dir))} --resume"


def _given(args: argparse.Namespace) -> dict:
    """The arguments that were given: the others leave it to a run, or to the defaults."""
    return {name: value for name, value in vars(args).items() if value is not None}


def _says_what(args: argparse.Namespace) -> bool:
    """Whether images or options are named, so that a training can begin where there is no run to resume."""
    names = {"data_dir", "image_size", *TrainingOptions._fields, *MODEL_DEFAULTS}
    return bool(os.environ.get(DATA_VARIABLE) or names & _given(args).keys())


def train_as_asked(
    args: argparse.Namespace,
    dataset: data.Dataset,
    source: dict,
    known: Stored | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> dict:
    """Train with the arguments of :func:`add_training`, else the known run's, and return the results."""
    known = known or Stored(MODEL_DEFAULTS, TrainingOptions(), {})
    given = _given(args)
    options = known.options._replace(**{name: given[name] for name in TrainingOptions._fields if name in given}).check()
    model = known.model | {name: given[name] for name in MODEL_DEFAULTS if name in given}
    model |= {"image_shape": image_shape(dataset, options), "classes": dataset.classes}
    where = {name: given.get(name, known.source.get(name, value)) for name, value in WHERE_DEFAULTS.items()}
    if dataset.validation and not options.validation:
        say(args, f"{len(dataset.validation)} validation images are not used: give --validation to use them")
    start = time.perf_counter()
    device = distributed.pick_device(where["device"])
    run = run_training(
        args.out,
        dataset,
        model,
        options,
        backend=checked_backend(where["backend"], device),
        device=device,
        resume=resume,
        overwrite=overwrite,
        tensorboard=where["tensorboard"],
        source={**known.source, **source, **where},
    )
    seconds = time.perf_counter() - start
    say(
        args,
        f"test accuracy {run.test.accuracy:.2%} on {len(dataset.test)} {options.samples}, epoch {run.best_epoch} of "
        f"{len(run.history)}, after {seconds:.0f} s",
    )
    return {
        "dataset": dataset.name,
        "model": model,
        "options": options._asdict(),
        "epochs": len(run.history),
        "best_epoch": run.best_epoch,
        "test_accuracy": run.test.accuracy,
        "test_loss": run.test.loss,
        "seconds": seconds,
        "out": str(args.out),
    }


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `capsroute eval`."""
    parser.add_argument("path", type=given_path, help=f"a RUN_DIR of `train`, or its {MODEL}")
    add_data(parser)
    add_backend(parser)
    add_device(parser)


def load_run(args: argparse.Namespace, run_dir: Path, backend: str) -> tuple[checkpoint.Checkpoint, data.Dataset]:
    """The network of a run, or of a file, on the CPU, and its images: those of --data-dir, else its own.

    Raises:
        ValueError: if the network does not fit the images, was trained on other images than its run's directory
            holds now, or the training is not finished.
    """
    path = run_dir / MODEL if run_dir.is_dir() else run_dir
    if not path.exists() and (run_dir / TRAINING).exists():
        raise RunError(f"the training in {run_dir} is not finished; resume with: {_resume(run_dir)}")
    loaded = checkpoint.load(path, backend=backend)
    dataset, _ = load_data(args, source_of(path, loaded.info))
    try:
        options = loaded.options
    except (LookupError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{path} does not say how it was trained: {error}") from error
    expected = tuple(loaded.model["image_shape"]), loaded.model["classes"]
    found = image_shape(dataset, options), dataset.classes
    if expected != found:
        raise ValueError(
            f"{path} is for images {expected[0]} of {expected[1]} classes, {dataset.name} has {found[0]} of {found[1]}"
        )
    own, names = loaded.info.get("class_names"), list(dataset.class_names)
    if args.data_dir and own is not None:
        if not isinstance(own, list) or len(own) != len(names):
            raise checkpoint.CheckpointError(f"{path} does not say what its {len(names)} classes are called: {own!r}")
        for j, (one, other) in enumerate(zip(own, names, strict=True)):
            if one != other:
                raise ValueError(f"{path} calls class {j} {one}, {dataset.name} {other}: they must be called alike")
    known = loaded.info.get("checksum")  # none in a file that checkpoint.save wrote by itself
    if not args.data_dir and known not in (None, dataset.checksum()):
        raise ValueError(f"{dataset.name}: these are not the images that {path} was trained on: give --data-dir")
    return loaded, dataset


def evaluate_run(args: argparse.Namespace) -> int:
    """Run `capsroute eval`."""
    device = distributed.pick_device(args.device)
    loaded, dataset = load_run(args, args.path, checked_backend(args.backend, device))
    score = evaluate(loaded.net.to(device), dataset.test, overlapping=loaded.options.overlap)
    samples = loaded.options.samples
    say(args, f"test accuracy {score.accuracy:.2%} on {len(dataset.test)} {samples}, loss {score.loss:.4f}")
    emit(args, {"dataset": dataset.name, "test_accuracy": score.accuracy, "test_loss": score.loss})
    return 0
