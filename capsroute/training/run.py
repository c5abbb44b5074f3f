"""A training run and the directory that it leaves behind.

`training.safetensors` is written before the first epoch and after every one, whole or not at all, and everything else
follows from it: a run that is killed loses the epoch that it was in, and goes on from there with the numbers it would
have had.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from .._console import rank
from .._files import remove_unfinished, write_atomically
from .._optional import optional
from ..nn import CapsNet
from . import distributed, overlap
from .batches import Share, steps_per_epoch
from .checkpoint import Checkpoint, history_to_json, load_training, save, save_training
from .data import Dataset, hold_out
from .options import TrainingOptions
from .progress import progress
from .tensorboard import tensorboard_log
from .trainer import Epoch, Report, Score, Training, evaluate, train_epoch

try:
    import fcntl
except ImportError:  # not on Windows, where two runs in one directory are not told apart
    fcntl = None

TRAINING = "training.safetensors"
MODEL = "model.safetensors"
HISTORY = "history.json"
REPORT = "report.html", "report"  # that `capsroute report` writes beside them


class RunError(ValueError):
    """A directory holds another run than the one that is asked for, or none."""


class Run(NamedTuple):
    """What a run made: the network of the best epoch, its history and its score on the test split."""

    net: CapsNet
    history: list[Epoch]
    best_epoch: int  # counted from 1
    test: Score


def image_shape(dataset: Dataset, options: TrainingOptions) -> tuple[int, int, int]:
    """(channels, height, width) of what the network sees: overlapping digits lie on a larger canvas."""
    return overlap.canvas(dataset.image_shape) if options.overlap else dataset.image_shape


def found_in(run_dir: Path) -> list[str]:
    """Which files of a run a directory holds."""
    return [name for name in (TRAINING, MODEL, HISTORY) if (run_dir / name).exists()]


def stored(run_dir: Path) -> tuple[Training, dict] | None:
    """The training in a directory and the `source` that it was begun with; None if none was begun."""
    path = run_dir / TRAINING
    if not path.exists():
        return None
    training, info = load_training(path)
    return training, info.get("source") or {}


def run_training(
    run_dir: Path,
    dataset: Dataset,
    model: dict,
    options: TrainingOptions,
    *,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    source: dict | None = None,
    on_step: Report = lambda **fields: None,
) -> Run:
    """Train with a progress bar, and leave the network, the history and the state to go on from in `run_dir`.

    With several processes under torchrun each calls this, the first one writes, and all return the same.

    Args:
        run_dir: made if it is not there.
        dataset: the images; `model["image_shape"]` must be :func:`image_shape` of it.
        model: keyword arguments of :class:`capsroute.nn.CapsNet`.
        options: how to train.
        backend: of the routing.
        device: to train on.
        resume: go on with the run in `run_dir` after its last whole epoch, if there is one.
        overwrite: begin anew, whatever is in `run_dir`; the old run is left alone until the new one can begin.
        tensorboard: also log to `run_dir/tensorboard`.
        source: where the images came from, and whatever else is to be known where :func:`stored` finds the run again.
            None: what a resumed run has.
        on_step: called after every step, as `report` of :func:`capsroute.training.trainer.train_epoch`.

    Raises:
        RunError: if another process writes to `run_dir`, if there is a run in it and neither `resume` nor `overwrite`
            is given, or one of another network, of other options or of other images, or nothing to go on from.
        CheckpointError: if what is to be resumed cannot be read.
        ValueError: if there are fewer images than processes, or than can be held out or be laid over each other.
        FloatingPointError: if the loss is no longer finite.
    """
    options.check()
    run_dir.mkdir(parents=True, exist_ok=True)  # before training: a bad place should cost no time,
    optional("safetensors.torch")  # nor should what is not installed
    device = torch.device(device)
    info = {"dataset": dataset.name, "checksum": dataset.checksum()}
    training = Training.begin(model, options, backend, device)
    writes = rank() == 0
    with ExitStack() as stack:
        if writes:
            stack.enter_context(_alone_in(run_dir))
            for name in (TRAINING, MODEL, HISTORY):
                remove_unfinished(run_dir / name)
        if (found := found_in(run_dir)) and not overwrite:
            if TRAINING not in found:
                raise RunError(f"{run_dir} holds {found[0]}, but no {TRAINING} to go on from: --overwrite begins anew")
            if not resume:
                raise RunError(
                    f"{run_dir} holds a run already: give --resume to go on with it, --overwrite to begin anew"
                )
            training, known = _resumed(training, run_dir, info, backend, device)
            source = known if source is None else source
        train, held_out = dataset.train, dataset.test
        if options.validation:
            train, held_out = hold_out(train, options.validation)
        if options.overlap:
            for split in (train, held_out, dataset.test):
                overlap.check(split.labels)
        share = stack.enter_context(distributed.processes(device))
        stack.callback(training.leave_processes)
        steps_per_epoch(len(train), options.batch_size, share.count)  # can all processes train?
        show, log = stack.enter_context(progress(training, len(train), share)), None
        if tensorboard and writes:
            log = stack.enter_context(tensorboard_log(run_dir / "tensorboard", len(training.history)))

        def report(**fields) -> None:
            on_step(**fields)
            show.step(**fields)

        def keep() -> None:
            if writes:
                save_training(run_dir / TRAINING, training, {**info, "source": source})

        keep()  # --resume is to find this run, its images and its options, whatever becomes of the first epoch
        if overwrite and writes:
            _remove_results(run_dir)
        while not training.finished:
            train_epoch(training, train, held_out, share=share, report=report)
            show.epoch(training.history)
            if log:
                log(training)
            keep()
        return _finish(run_dir, training, dataset, share, writes)


@contextmanager
def _alone_in(run_dir: Path) -> Iterator[None]:
    """Hold a directory, to which one process at a time may write."""
    if fcntl is None:
        yield
        return
    handle = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{run_dir} is being written to by another process") from error
        yield
    finally:
        os.close(handle)  # and with it the lock


def _remove_results(run_dir: Path) -> None:
    """What an older run made, which would pass for results of the one that has begun."""
    for name in (MODEL, HISTORY, *REPORT):
        path = run_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _resumed(
    fresh: Training, run_dir: Path, info: dict, backend: str, device: torch.device
) -> tuple[Training, dict | None]:
    """The training in a directory, and its source, if its network, options and images are those of a fresh one."""
    training, found = load_training(run_dir / TRAINING, backend=backend, device=device)
    asked = {**fresh.model, **fresh.options._asdict(), **info}
    stored = {**training.model, **training.options._asdict(), **{name: found.get(name) for name in info}}
    if found.get("checksum") == info["checksum"]:  # the same images, whatever their directory is called now
        stored["dataset"] = info["dataset"]
    asked, stored = json.loads(json.dumps([asked, stored]))  # tuples are lists in a file
    for name in sorted({*asked, *stored}):
        if asked.get(name) != stored.get(name):
            raise RunError(f"{run_dir} holds a run with {name} {stored.get(name)}, asked for is {asked.get(name)}")
    return training, found.get("source")


def _finish(run_dir: Path, training: Training, dataset: Dataset, share: Share, writes: bool) -> Run:
    """Test the result, and write what people and `capsroute eval` read."""
    net, options = training.result(), training.options
    test = evaluate(net, dataset.test, overlapping=options.overlap, share=share)
    run = Run(net, training.history, training.best_epoch, test)
    about = {
        "dataset": dataset.name,
        "class_names": list(dataset.class_names),
        "options": options._asdict(),
        "best_epoch": run.best_epoch,
        "test": test._asdict(),
    }
    if writes:
        save(run_dir / MODEL, Checkpoint(net, training.model, about))
        history = {"model": training.model, **about, "epochs": history_to_json(run.history)}
        write_atomically(run_dir / HISTORY, json.dumps(history, indent=1).encode())
    return run
