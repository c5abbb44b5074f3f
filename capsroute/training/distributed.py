"""Several processes that train together: what `torchrun` starts, found in its environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from .batches import WHOLE, Share

DEVICES = ("auto", "cpu", "cuda")


@contextmanager
def processes(device: torch.device) -> Iterator[Share]:
    """Join the processes that torchrun started, while the context lasts; yields this one's share of each batch."""
    if "WORLD_SIZE" not in os.environ:
        yield WHOLE
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        total(0, device=device)  # a barrier: rank 0 writes files that others may still be reading
        yield Share(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where torch sees one; each of several processes on a machine takes its own.

    Raises:
        ValueError: if the device is not there, or the name is not one of DEVICES.
    """
    if name not in DEVICES:  # not from the command line: a run's file says what its --device was
        raise ValueError(f"--device must be one of {', '.join(DEVICES)}, got {name!r}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


def total(*values: float, device: torch.device) -> list[float]:
    """Each value, summed over the processes."""
    if not dist.is_initialized():
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()
