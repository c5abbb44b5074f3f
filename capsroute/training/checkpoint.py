"""Checkpoints: safetensors files, whose metadata holds the configuration as JSON. Nothing is unpickled.

There are two kinds. "model" is a network to use; "training" is everything that a training needs to go on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .._files import write_atomically
from .._optional import optional
from ..nn import CapsNet
from .options import TrainingOptions
from .trainer import Epoch, Score, Training

KEY = "capsroute"  # of the safetensors metadata, whose values are strings: JSON here
VERSION = 2
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of a parameter

# What a foreign configuration can raise on its way through the constructors.
WRONG = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError)


class CheckpointError(ValueError):
    """A file is not a checkpoint of capsroute, is cut off, or contradicts itself."""


class Checkpoint(NamedTuple):
    """A network and what belongs to it.

    Attributes:
        net: the network.
        model: the keyword arguments that it was made with.
        info: whatever is worth keeping with it; JSON must be able to hold it.
    """

    net: CapsNet
    model: dict
    info: dict

    @property
    def options(self) -> TrainingOptions:
        """How it was trained, which the info of a run's network says."""
        return TrainingOptions(**self.info["options"]).check()


def save(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a network; a reader sees the old file or the whole new one, also after a crash."""
    content = {"model": checkpoint.model, "info": checkpoint.info}
    write_atomically(path, _pack("model", checkpoint.net.state_dict(), content))


def load(path: str | Path, *, backend: str = "auto") -> Checkpoint:
    """The network in a file that :func:`save` wrote, with its routing on `backend`.

    Raises:
        CheckpointError: if the file is cut off, not such a checkpoint, or does not fit its own configuration.
        OSError: if it cannot be read.
    """
    tensors, content = _read(path, "model")
    try:
        return Checkpoint(_network(content["model"], tensors, backend), content["model"], dict(content["info"]))
    except WRONG as error:
        raise _misfit(path, error) from error


def pack_training(training: Training, info: dict) -> bytes:
    """A training as a file, from which it can go on as if it had not been interrupted.

    Args:
        training: after some whole epochs.
        info: what to check before it goes on; JSON must be able to hold it.
    """
    names = [name for name, _ in training.net.named_parameters()]
    moments = training.optimizer.state_dict()["state"]  # by the number of the parameter
    tensors = {f"net.{name}": x for name, x in training.net.state_dict().items()}
    tensors |= {f"{key}.{names[k]}": x for k, state in moments.items() for key, x in state.items()}
    tensors |= {f"best.{name}": x for name, x in (training.best or {}).items()}
    content = {
        "model": training.model,
        "options": training.options._asdict(),
        "scaler": training.scaler.state_dict(),
        "history": history_to_json(training.history),
        "info": info,
    }
    return _pack("training", tensors, content)


def load_training(
    path: str | Path, *, backend: str = "auto", device: torch.device | str = "cpu"
) -> tuple[Training, dict]:
    """The training in a file that :func:`pack_training` made, and its info.

    Raises:
        CheckpointError: if the file is cut off, not such a checkpoint, or does not fit its own configuration.
        OSError: if it cannot be read.
    """
    tensors, content = _read(path, "training")
    groups: dict[str, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = x
    try:
        options = TrainingOptions(**content["options"]).check()
        net = _network(content["model"], groups.pop("net"), backend)
        training = Training.of(net, content["model"], options, device)
        training.history = history_from_json(content["history"])
        training.best = groups.pop("best", None)
        if training.best is not None:
            _network(content["model"], training.best, backend)  # fits
            training.best = {name: x.to(device) for name, x in training.best.items()}
        _load_moments(training, groups)
        training.scaler.load_state_dict(content["scaler"])
        return training, dict(content["info"])
    except WRONG as error:
        raise _misfit(path, error) from error


def load_configuration(path: str | Path) -> tuple[dict, TrainingOptions, dict]:
    """The network's keyword arguments, the options and the info of a training, of whose tensors none is read.

    Raises:
        CheckpointError: if the file is cut off, or not such a checkpoint.
        OSError: if it cannot be read.
    """
    _, content = _read(path, "training", tensors=False)
    try:
        return dict(content["model"]), TrainingOptions(**content["options"]).check(), dict(content["info"])
    except WRONG as error:
        raise _misfit(path, error) from error


def history_to_json(history: list[Epoch]) -> list[dict]:
    """The history for JSON: scores by name."""
    return [{"train": e.train._asdict(), "held_out": e.held_out._asdict(), "seconds": e.seconds} for e in history]


def history_from_json(epochs: list[dict]) -> list[Epoch]:
    """The inverse of :func:`history_to_json`; numbers come back bit for bit."""
    return [Epoch(Score(**e["train"]), Score(**e["held_out"]), float(e["seconds"])) for e in epochs]


def _pack(kind: str, tensors: dict[str, Tensor], content: dict) -> bytes:
    metadata = {KEY: json.dumps({"version": VERSION, "kind": kind, **content})}
    contiguous = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    return optional("safetensors.torch").save(contiguous, metadata)


def _read(path: str | Path, kind: str, *, tensors: bool = True) -> tuple[dict[str, Tensor], dict]:
    safetensors = optional("safetensors")
    if Path(path).is_dir():  # of which safetensors says less
        raise IsADirectoryError(f"{path} is a directory, not the file of a checkpoint")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys() if tensors else ()
            found = {name: file.get_tensor(name).clone() for name in names}  # the file may change later
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error
    if KEY not in metadata:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of capsroute")
    try:
        content = json.loads(metadata[KEY])
        version, found_kind = content["version"], content["kind"]
    except WRONG as error:
        raise _misfit(path, error) from error
    if version != VERSION:
        raise CheckpointError(f"{path} is a checkpoint of version {version}, expected {VERSION}")
    if found_kind != kind:
        raise CheckpointError(f'{path} is a checkpoint of kind "{found_kind}", expected "{kind}"')
    return found, content


def _network(model: dict, tensors: dict[str, Tensor], backend: str) -> CapsNet:
    """The network of a configuration with the parameters given, which must be what it needs."""
    if len(model.get("hidden", ())) > len(tensors):  # before a foreign file has us build layers without end
        raise ValueError(f"hidden has {len(model['hidden'])} widths, the file {len(tensors)} tensors")
    net = CapsNet(**model, backend=backend, device="meta")  # takes no memory, draws no random numbers
    for name, x in net.state_dict().items():
        if name in tensors and tensors[name].dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype}, got {tensors[name].dtype}")
    net.load_state_dict(tensors, assign=True)
    return net


def _load_moments(training: Training, groups: dict[str, dict[str, Tensor]]) -> None:
    """AdamW's state from tensors by moment and name of the parameter.

    There is none before the first step, and in float16 as long as each of them overflowed.
    """
    if not groups and (not training.history or training.options.amp == "float16"):
        return
    if set(groups) != set(MOMENTS):
        raise ValueError(f"the optimizer's state must be {', '.join(MOMENTS)}, got {', '.join(sorted(groups))}")
    state = {}
    for k, (name, parameter) in enumerate(training.net.named_parameters()):
        state[k] = {key: groups[key].pop(name) for key in MOMENTS}
        for key, x in state[k].items():
            expected = torch.Size() if key == "step" else parameter.shape
            if x.shape != expected or x.dtype != torch.float32:
                raise ValueError(f"{key}.{name} must be float32 {list(expected)}, got {x.dtype} {list(x.shape)}")
    if left := [f"{key}.{name}" for key in MOMENTS for name in groups[key]]:
        raise ValueError(f"there is no parameter for {', '.join(left)}")
    empty = training.optimizer.state_dict()
    training.optimizer.load_state_dict({**empty, "state": state})


def _misfit(path: str | Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} does not fit its own configuration: {type(error).__name__}: {error}")
