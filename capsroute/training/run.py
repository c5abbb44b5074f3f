"""A training run and the directory that it leaves behind.

`training.safetensors` is written before the first epoch and after every one, whole or not at all, and everything else
follows from it: a run that is killed loses the epoch that it was in, and resumes with the numbers it would have had.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from .._console import rank
from .._files import remove_unfinished, write_atomically
from .._optional import optional
from ..nn import CapsNet
from . import distributed, overlap
from .batches import Share, steps_per_epoch
from .checkpoint import (
    Checkpoint,
    CheckpointError,
    history_to_json,
    load_configuration,
    load_training,
    pack_training,
    save,
)
from .data import Dataset, Split, hold_out
from .options import TrainingOptions
from .progress import progress
from .tensorboard import logs_in, tensorboard_log
from .trainer import Epoch, OnStep, Score, Training, evaluate, train_epoch

try:
    import fcntl
except ImportError:  # not on Windows, where two runs in one directory are not told apart
    fcntl = None

TRAINING = "training.safetensors"
MODEL = "model.safetensors"
HISTORY = "history.json"
LOGS = "tensorboard"
# What `capsroute report` writes beside them: a page, and a folder of the pictures that it has.
PAGE = "report.html"
PICTURES = "report"
PICTURE_NAMES = "curves", "confusion", "coupling", "apart", "reconstructions", "perturbations", "speed"
SOURCE_KINDS = {"data_dir": str, "image_size": int, "tensorboard": bool}  # that the commands look at


class RunError(ValueError):
    """A directory holds another run than asked for, or none."""


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


class Stored(NamedTuple):
    """What a training was begun with."""

    model: dict
    options: TrainingOptions
    source: dict


def stored(run_dir: Path) -> Stored | None:
    """What the training in a directory was begun with; None if none was begun."""
    path = run_dir / TRAINING
    if not path.exists():
        return None
    model, options, info = load_configuration(path)
    return Stored(model, options, source_of(path, info))


def source_of(path: Path, info: dict) -> dict:
    """The `source` of a run, as the info of one of its files tells it; empty if it does not.

    Raises:
        CheckpointError: if no run could have written it.
    """
    source = info.get("source") or {}
    if not isinstance(source, dict):
        raise CheckpointError(f"{path} does not say where its images came from: source is {source!r}")
    for name, kind in SOURCE_KINDS.items():
        value = source.get(name)
        if value is not None and type(value) is not kind:  # True is an int, but no size
            raise CheckpointError(f"{path}: {name} must be of type {kind.__name__}, got {value!r}")
    return source


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
    on_step: OnStep = lambda **fields: None,
) -> Run:
    """Train with a progress bar, and leave the network, the history and the state to resume from in `run_dir`.

    With several processes under torchrun, each calls this, the first one writes, and all return the same.

    Args:
        run_dir: made by the first process if it is not there.
        dataset: the images; `model["image_shape"]` must be :func:`image_shape` of it.
        model: keyword arguments of :class:`capsroute.nn.CapsNet`.
        options: how to train.
        backend: of the routing.
        device: to train on.
        resume: go on with the run in `run_dir` after its last whole epoch, if there is one.
        overwrite: start anew, whatever is in `run_dir`; the old run is left alone until the new one has made a step.
        tensorboard: also log to `run_dir/tensorboard`.
        source: where the images came from, and whatever else :func:`stored` should return with the run. None: the
            resumed run's.
        on_step: called after every step, as by :func:`capsroute.training.trainer.train_epoch`.

    Raises:
        RunError: if another process writes to `run_dir`; if it holds a run and neither `resume` nor `overwrite` is
            given; if that run has another network, other options or other images, or nothing to resume from.
        CheckpointError: if the run to resume cannot be read.
        ValueError: if there are fewer images than processes, or too few to hold out or to overlap.
        FloatingPointError: if the loss is no longer finite.
    """
    options.check()
    device, writes, splits = torch.device(device), rank() == 0, _splits(dataset, options)
    if writes:  # before training, so that a bad place costs no time; of other processes it may be named by another time
        run_dir.mkdir(parents=True, exist_ok=True)
    optional("safetensors.torch")  # likewise, if it is not installed
    info = {"dataset": dataset.name, "checksum": dataset.checksum()}
    with ExitStack() as stack:
        if writes:
            stack.enter_context(alone_in(run_dir))
            for name in (TRAINING, MODEL, HISTORY):
                remove_unfinished(run_dir / name)
        if (found := found_in(run_dir)) and not overwrite:
            _check_resumable(run_dir, found, resume)
            training, known = load_training(run_dir / TRAINING, backend=backend, device=device)
            _check_same(run_dir, training, known, {**model, **options._asdict(), **info})
            source = known.get("source") if source is None else source
        else:
            training = Training.begin(model, options, backend, device)
        share = stack.enter_context(distributed.processes(device))
        stack.callback(training.leave_processes)
        pack = partial(pack_training, training, {**info, "source": source}) if writes else None
        _train(
            run_dir, training, splits, share, pack, replaces=bool(found) and overwrite, log=tensorboard, on_step=on_step
        )
        return _finish(run_dir, training, dataset, source, share, writes)


def _train(
    run_dir: Path,
    training: Training,
    splits: tuple[Split, Split],
    share: Share,
    pack: Callable[[], bytes] | None,
    *,
    replaces: bool,
    log: bool,
    on_step: OnStep,
) -> None:
    """The epochs that are left, shown, and kept and logged by the process that is given what packs them."""
    path, (train, held_out) = run_dir / TRAINING, splits
    steps_per_epoch(len(train), training.options.batch_size, share.count)  # can all processes train?
    with ExitStack() as stack:
        show = stack.enter_context(progress(training, len(train), share))
        after_step, after_epoch = [on_step, show.step], [lambda training: show.epoch(training.history)]
        old_logs = logs_in(run_dir / LOGS)
        if pack:
            if log:
                after_epoch.append(stack.enter_context(tensorboard_log(run_dir / LOGS, len(training.history))))
            # --resume is to find this run, whatever becomes of the first epoch; but one that can make no step is to
            # replace none
            if replaces:
                after_step.append(_replacing(run_dir, pack(), old_logs))
            else:
                write_atomically(path, pack())
            after_epoch.append(lambda _: write_atomically(path, pack()))
        while not training.finished:
            train_epoch(training, train, held_out, share=share, on_step=_each(*after_step))
            for call in after_epoch:
                call(training)


def _replacing(run_dir: Path, begun: bytes, old_logs: Collection[Path]) -> OnStep:
    """What puts a training in the place of an older run, as it was before the first step, after that."""
    left = [begun]

    def replace(**_) -> None:
        if left:
            write_atomically(run_dir / TRAINING, left.pop())
            _remove_results(run_dir, old_logs)

    return replace


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
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


def _remove_results(run_dir: Path, logs: Collection[Path]) -> None:
    """What an older run made, which would pass for results of the one that has begun; nothing but that."""
    for path in (*(run_dir / name for name in (MODEL, HISTORY, PAGE)), *logs):
        path.unlink(missing_ok=True)
    remove_pictures(run_dir)
    with suppress(OSError):  # it holds something else, the new run's log, or is not there
        (run_dir / LOGS).rmdir()


def remove_pictures(run_dir: Path, but: Collection[str] = ()) -> None:
    """Remove the pictures of an older report, but those named; their folder too, if it holds nothing else."""
    folder = run_dir / PICTURES
    if not folder.is_dir():
        return
    for name in set(PICTURE_NAMES) - set(but):
        (folder / f"{name}.png").unlink(missing_ok=True)
    with suppress(OSError):  # it holds something else, or is a link
        folder.rmdir()


def _check_resumable(run_dir: Path, found: list[str], resume: bool) -> None:
    if TRAINING not in found:
        raise RunError(f"{run_dir} holds {found[0]}, but no {TRAINING} to resume from: --overwrite starts anew")
    if not resume:
        raise RunError(f"{run_dir} already holds a run: give --resume to go on with it, or --overwrite to replace it")


def _check_same(run_dir: Path, training: Training, info: dict, asked: dict) -> None:
    """That the network, options and images of a training in a directory are those asked for."""
    images = {name: info.get(name) for name in ("dataset", "checksum")}
    if images["checksum"] != asked["checksum"]:
        same = images["dataset"] == asked["dataset"]
        are = "are there now" if same else f"you asked for, {asked['dataset']}"
        raise RunError(f"{run_dir} holds a run that was trained on other images, {images['dataset']}, than {are}")
    images["dataset"] = asked["dataset"]  # whatever their directory is called now
    known = {**training.model, **training.options._asdict(), **images}
    asked, known = json.loads(json.dumps([asked, known]))  # tuples are lists in a file
    for name in sorted({*asked, *known}, key=lambda name: (name in ("image_shape", "classes"), name)):  # they follow
        if asked.get(name) != known.get(name):
            raise RunError(
                f"{run_dir} holds a run with {name} = {known.get(name)}, but you asked for {name} = {asked.get(name)}"
            )


def _splits(dataset: Dataset, options: TrainingOptions) -> tuple[Split, Split]:
    """The images to train on, and those to look at after each epoch, if they can be laid over each other."""
    train, held_out = dataset.train, dataset.test
    if options.validation:
        own = dataset.validation
        train, held_out = hold_out(train, options.validation) if own is None else (train, own)
    if options.overlap:
        for split in (train, held_out, dataset.test):
            overlap.check(split.labels)
    return train, held_out


def _each(*calls: OnStep) -> OnStep:
    """All of these in their order, as one."""

    def call(**fields) -> None:
        for one in calls:
            one(**fields)

    return call


def _finish(
    run_dir: Path, training: Training, dataset: Dataset, source: dict | None, share: Share, writes: bool
) -> Run:
    """Test the result, and write what people and `capsroute eval` read."""
    net, options = training.result(), training.options
    test = evaluate(net, dataset.test, overlapping=options.overlap, share=share)
    run = Run(net, training.history, training.best_epoch, test)
    about = {
        "dataset": dataset.name,
        "checksum": dataset.checksum(),
        "class_names": list(dataset.class_names),
        "options": options._asdict(),
        "source": source,
        "best_epoch": run.best_epoch,
        "test": test._asdict(),
    }
    if writes:
        save(run_dir / MODEL, Checkpoint(net, training.model, about))
        history = {"model": training.model, **about, "epochs": history_to_json(run.history)}
        write_atomically(run_dir / HISTORY, json.dumps(history, indent=1).encode())
    return run
