"""A training run and the directory that it leaves behind.

`training.safetensors` is written after every epoch, whole or not at all, and everything else follows from it: a run
that is killed loses the epoch that it was in, and goes on from there with the numbers it would have had.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from .._optional import optional
from ..nn import CapsNet
from . import distributed, overlap
from .batches import Share
from .checkpoint import Checkpoint, history_to_json, load_training, save, save_training, write_atomically
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


class RunError(ValueError):
    """A directory holds another run than the one that is asked for."""


class Run(NamedTuple):
    """What a run made: the network of the best epoch, its history and its score on the test split."""

    net: CapsNet
    history: list[Epoch]
    best_epoch: int  # counted from 1
    test: Score


def image_shape(dataset: Dataset, options: TrainingOptions) -> tuple[int, int, int]:
    """(channels, height, width) of what the network sees: overlapping digits lie on a larger canvas."""
    return overlap.canvas(dataset.image_shape) if options.overlap else dataset.image_shape


def stored(run_dir: Path) -> tuple[Training, dict] | None:
    """The training in a directory and where its images came from; None if no epoch has come to its end."""
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
        overwrite: begin anew, whatever is in `run_dir`.
        tensorboard: also log to `run_dir/tensorboard`.
        source: where the images came from, to be kept with the state.
        on_step: called after every step, as `report` of :func:`capsroute.training.trainer.train_epoch`.

    Raises:
        RunError: if another process writes to `run_dir`, if there is a run in it and neither `resume` nor `overwrite`
            is given, or one of another network, of other options or of other images.
        CheckpointError: if what is to be resumed cannot be read.
        FloatingPointError: if the loss is no longer finite.
    """
    options.check()
    run_dir.mkdir(parents=True, exist_ok=True)  # before training: a bad place should cost no time,
    optional("safetensors.torch")  # nor should what is not installed
    device = torch.device(device)
    info = {"dataset": dataset.name, "checksum": dataset.checksum()}
    training = Training.begin(model, options, backend, device)
    writes = distributed.rank() == 0
    with ExitStack() as stack:
        if writes:
            stack.enter_context(_alone_in(run_dir))
        if overwrite and writes:  # before the first epoch ends, --resume must not find the old run
            for name in (TRAINING, MODEL, HISTORY):
                (run_dir / name).unlink(missing_ok=True)
        if (run_dir / TRAINING).exists() and not overwrite:
            if not resume:
                raise RunError(
                    f"{run_dir} holds a run already: give --resume to go on with it, --overwrite to begin anew"
                )
            training = _resumed(training, run_dir, info, backend, device)
        train, held_out = dataset.train, dataset.test
        if options.validation:
            train, held_out = hold_out(train, options.validation)
        share = stack.enter_context(distributed.processes(device))
        stack.callback(training.leave_processes)
        show, log = stack.enter_context(progress(training, len(train), share)), None
        if tensorboard and writes:
            log = stack.enter_context(tensorboard_log(run_dir / "tensorboard", len(training.history)))

        def report(**fields) -> None:
            on_step(**fields)
            show.step(**fields)

        while not training.finished:
            train_epoch(training, train, held_out, share=share, report=report)
            show.epoch(training.history)
            if log:
                log(training)
            if writes:
                save_training(run_dir / TRAINING, training, {**info, "source": source})
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


def _resumed(fresh: Training, run_dir: Path, info: dict, backend: str, device: torch.device) -> Training:
    """The training in a directory, if it is one of the same network, options and images as a fresh one."""
    training, found = load_training(run_dir / TRAINING, backend=backend, device=device)
    asked = {**fresh.model, **fresh.options._asdict(), **info}
    stored = {**training.model, **training.options._asdict(), **{name: found.get(name) for name in info}}
    if found.get("checksum") == info["checksum"]:  # the same images, whatever their directory is called now
        stored["dataset"] = info["dataset"]
    asked, stored = json.loads(json.dumps([asked, stored]))  # tuples are lists in a file
    for name in sorted({*asked, *stored}):
        if asked.get(name) != stored.get(name):
            raise RunError(f"{run_dir} holds a run with {name} {stored.get(name)}, asked for is {asked.get(name)}")
    return training


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
