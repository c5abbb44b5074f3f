"""The machine that a benchmark runs on: its processor, threads and versions."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path

import torch

from .. import _ops
from .._version import __version__
from .measure import on_gpu
from .registry import fused_backend


def describe_machine(dtype: torch.dtype) -> dict[str, object]:
    """What the figures depend on besides the code: processor, threads, versions."""
    compiler = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", _library())
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} logical processors",
        "gpu": _gpu(),
        "threads": torch.get_num_threads(),
        "fused": f"{fused_backend(torch.empty(1, 1, 1, 1, dtype=dtype))} ({_ops.cpu_library()[1]})",
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        "capsroute": __version__,
        "compiler": compiler[0].decode() if compiler else "unknown",
    }


def _gpu() -> str:
    if not on_gpu():
        return "not used"
    about = torch.cuda.get_device_properties()
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{about.name}, {about.multi_processor_count} processors, {about.total_memory >> 30} GiB, {runtime}"


def _library() -> bytes:
    """The library of kernels, in which the compiler leaves its name."""
    return _ops.LIBRARY.read_bytes() if _ops.LIBRARY.exists() else b""


def _processor() -> str:
    told = Path("/proc/cpuinfo")  # on Linux
    name = re.search(r"^model name\s*: (.+)$", told.read_text(), re.MULTILINE) if told.exists() else None
    return name[1] if name else platform.processor() or "unknown processor"
