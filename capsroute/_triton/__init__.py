"""The Triton backend, for NVIDIA and AMD GPUs, and for the CPU in Triton's interpreter.

Importing this package imports no Triton: `load` does. Imports point downward: `ops` (the op set), `forward` and
`backward` (which launches, with their bytes), `problem` (a call's tensors, sizes and tiles), `tuning`, `kernels`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re

import torch

NAMESPACE = "capsroute_triton"
OLDEST = (3, 6)
PACKAGES = ("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton", "triton-windows")


def installed() -> tuple[bool, str]:
    """Whether a Triton that serves is installed, or why not; nothing is imported."""
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    version = next((found for name in PACKAGES if (found := _version(name))), "")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        return False, f"the version of the installed Triton is unknown: {version!r}"
    if tuple(map(int, numbers.groups())) < OLDEST:
        return False, f"Triton {version} is too old, {'.'.join(map(str, OLDEST))} or newer is needed"
    return True, f"Triton {version}{', interpreted' if _interpreted() else ''}"


def here() -> tuple[bool, str]:
    """Whether there is also something that it can run on, or why not."""
    can, why = installed()
    if can and not _interpreted() and not torch.cuda.is_available():
        return False, f"{why}, but torch sees no CUDA or ROCm device here"
    return can, why


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def load() -> tuple[bool, str]:
    """Import Triton and define the ops, once; whether that went well, or why not."""
    return _load()


@functools.cache
def _load() -> tuple[bool, str]:
    can, why = installed()
    if can:
        try:
            from . import ops  # noqa: F401 - importing it defines them
        except ImportError as error:
            return False, f"Triton could not be imported: {error}"
    return can, why


# For torch.compile, constants. The decorator for it, torch.compiler.assume_constant_result, sets just this, but first
# it imports torch._dynamo, which imports Triton.
_interpreted._dynamo_marked_constant = True
load._dynamo_marked_constant = True


def serves(u: torch.Tensor) -> tuple[bool, str]:
    """Whether the kernels run on the device of u."""
    if u.device.type not in ("cuda", "cpu"):  # ROCm's device is called cuda too
        return False, f"the input capsules are on {u.device}, not on a CUDA or ROCm GPU"
    if u.device.type == "cpu" and not _interpreted():
        return False, (
            "the input capsules are on the CPU, where Triton runs only in its interpreter, for tests: "
            "with TRITON_INTERPRET=1 set before Python starts"
        )
    return load()
