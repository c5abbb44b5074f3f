"""A training run and the directory that it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from ..nn import CapsNet
from .checkpoint import Checkpoint, save, write_atomically
from .data import Dataset
from .pictures import save_pictures
from .progress import training_bar
from .trainer import Epoch, TrainingOptions, train

CHECKPOINT = "checkpoint.safetensors"


class Run(NamedTuple):
    """What a run made: the network, its history, and the files in its directory."""

    net: CapsNet
    history: list[Epoch]
    files: list[Path]


def run_training(run_dir: Path, dataset: Dataset, model: dict, options: TrainingOptions, backend: str) -> Run:
    """Train with a progress bar, then write the checkpoint, the history and the pictures to `run_dir`."""
    run_dir.mkdir(parents=True, exist_ok=True)  # before training: a bad place should cost no time
    with training_bar(options.epochs, len(dataset.train_labels)) as report:
        net, history = train(dataset, model, options, backend=backend, report=report)
    info = {"dataset": dataset.name, "options": options._asdict(), "test": history[-1].test._asdict()}
    save(run_dir / CHECKPOINT, Checkpoint(net, model, info))
    epochs = [{"train": e.train._asdict(), "test": e.test._asdict(), "seconds": e.seconds} for e in history]
    write_atomically(run_dir / "history.json", json.dumps(epochs, indent=1).encode())
    pictures = save_pictures(run_dir, net, dataset, history)
    return Run(net, history, [run_dir / CHECKPOINT, run_dir / "history.json", *pictures])
