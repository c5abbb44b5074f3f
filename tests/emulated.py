"""The CUDA kernels, emulated on the CPU (csrc/emulation), as one more backend: "emulated".

    CAPSROUTE_TEST_BACKEND=emulated pytest -p emulated tests/test_routing.py

runs a file of the suite through them. `--emulated N` takes N parametrizations of each test, evenly spread.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from capsroute import _backends, _ops

ROOT = Path(__file__).parent.parent
ORDERS = {"forward": 0, "backward": 1, "random": 2}  # in which threads and blocks run


class Launch(NamedTuple):
    """One launch, and what the emulator counted of it."""

    kernel: str
    blocks: int
    threads: int
    shared: int  # bytes
    loaded: int
    stored: int


def build(target: str, folder: Path, *definitions: str) -> Path:
    """A target of CMakeLists.txt with the emulated kernels; what did not change is not compiled again."""
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in (
        ["cmake", "-S", ROOT, "-B", folder, "-DCAPSROUTE_EMULATION=ON", *definitions],
        ["cmake", "--build", folder, "--target", target, "--parallel", str(os.cpu_count())],
    ):
        run = subprocess.run(command, env={**os.environ, "PATH": tools}, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    return folder


@functools.cache
def library() -> ctypes.CDLL:
    """Build the ops, and load them as torch.ops.capsroute_emulated."""
    folder = build("capsroute_emulated", ROOT / "build" / "emulated", f"-DTORCH_ROOT={torch.__path__[0]}")
    path = folder / "libcapsroute_emulated.so"
    _ops.define("capsroute_emulated")
    torch.ops.load_library(path)
    found = ctypes.CDLL(str(path))
    found.capsroute_emulation_take_launches.restype = ctypes.c_char_p
    return found


def register() -> None:
    """Let "emulated" be a backend: the tests of a backend take its name."""

    def serves(u, weight):
        if not u.is_cpu:
            return False, f"the input capsules are on {u.device}, not on the CPU"
        return _backends._cuda_fits(u, weight)

    library()
    _backends.BACKENDS["emulated"] = _backends.of_ops("capsroute_emulated", lambda: (True, "for tests"), serves)


def unregister() -> None:
    """Other tests list the backends."""
    del _backends.BACKENDS["emulated"]


def run_in(order: str) -> None:
    library().capsroute_emulation_set_order(ORDERS[order])


def take_launches() -> list[Launch]:
    """Every launch since this was last called."""
    lines = library().capsroute_emulation_take_launches().decode().splitlines()
    return [Launch(name, *map(int, numbers)) for name, *numbers in map(str.split, lines)]


# As a plugin of pytest


def pytest_addoption(parser):
    parser.addoption("--emulated", type=int, default=0, metavar="N", help="parametrizations of each test; 0: all")


def pytest_configure(config):
    register()


def pytest_collection_modifyitems(config, items):
    few, by_test = config.getoption("emulated"), {}
    for item in items:
        by_test.setdefault((item.path, item.originalname), []).append(item)
    if few:
        kept = {same[(2 * k + 1) * len(same) // (2 * few)] for same in by_test.values() for k in range(few)}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
