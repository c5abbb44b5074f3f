"""Checkpoints: a network's parameters and configuration in one safetensors file. Nothing is unpickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from ..nn import CapsNet
from ._optional import optional

KEY = "capsroute"  # of the safetensors metadata, whose values are strings: JSON here
VERSION = 1


class CheckpointError(ValueError):
    """A file is no checkpoint of capsroute, or is cut off."""


class Checkpoint(NamedTuple):
    """A network and what belongs to it.

    Attributes:
        net: the network.
        model: the keyword arguments that it was made with.
        info: whatever is worth keeping with it, as JSON knows it.
    """

    net: CapsNet
    model: dict
    info: dict


def save(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint; a reader sees the old file or the whole new one, also after a crash."""
    metadata = {"version": VERSION, "model": checkpoint.model, "info": checkpoint.info}
    tensors = {name: x.contiguous() for name, x in checkpoint.net.state_dict().items()}
    write_atomically(path, optional("safetensors.torch").save(tensors, {KEY: json.dumps(metadata)}))


def load(path: str | Path, *, backend: str = "auto") -> Checkpoint:
    """The checkpoint in a file that :func:`save` wrote, with the network's routing on `backend`.

    Raises:
        CheckpointError: if the file is cut off, not a checkpoint, or does not fit its own configuration.
        OSError: if it cannot be read.
    """
    safetensors = optional("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}  # the file may change later
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}") from error
    if KEY not in metadata:
        raise CheckpointError(f"{path} is a safetensors file, but no checkpoint of capsroute")
    try:
        content = json.loads(metadata[KEY])
        if content["version"] != VERSION:
            raise CheckpointError(f"{path} is a checkpoint of version {content['version']}, expected {VERSION}")
        net = CapsNet(**content["model"], backend=backend, device="meta")  # draws no random numbers
        net.load_state_dict(tensors, assign=True)
        return Checkpoint(net, content["model"], content["info"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit its own configuration: {error}") from error


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that at no time a part of it can be seen."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a crash could leave the new name with none of its data
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
