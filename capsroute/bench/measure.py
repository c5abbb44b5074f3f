"""Time and memory of a call, measured so that the figures of several calls can be compared."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

MIN_ROUNDS = 3
CLEAR_REFS = Path("/proc/self/clear_refs")  # where a process can have its peak memory told
KILLED = "its process was killed"  # the notes of a result without memory
UNTOLD = "memory is told on Linux alone"
T = TypeVar("T")


class Timing(NamedTuple):
    """Seconds of a call over some rounds: the median, and the quartiles around it."""

    seconds: float
    lower: float
    upper: float
    rounds: int


class Result(NamedTuple):
    """What was measured of an implementation, None where it was not, and a note why.

    Attributes:
        name: of the implementation.
        seconds, lower, upper, rounds: as in :class:`Timing`.
        peak_bytes: extra memory, as :func:`peak_growth` gives it.
        note: why something was not measured.
    """

    name: str
    seconds: float | None = None
    lower: float | None = None
    upper: float | None = None
    rounds: int = 0
    peak_bytes: int | None = None
    note: str = ""


def on_gpu() -> bool:
    """Whether tensors are made on a GPU, where torch's default device says so."""
    return torch.get_default_device().type == "cuda"


def gpu_seconds(call: Callable[[], object]) -> float:
    """Seconds between two events of the current stream around a call, by the GPU's clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def alternate(
    calls: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Time the calls in turns, A B C A B C ..., so that a slow moment of the machine falls on all of them.

    Args:
        calls: what to time, by name; each is called once before, to warm up.
        seconds: begin no further round after this long, but make MIN_ROUNDS.
        clock: gives the time in seconds; on a GPU its own clock gives that of the calls.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds, end = 0, clock() + seconds
    while calls and (rounds < MIN_ROUNDS or clock() < end):
        for name, call in calls.items():
            if on_gpu():
                times[name].append(gpu_seconds(call))
                continue
            start = clock()
            call()
            times[name].append(clock() - start)
        rounds += 1
    timings = {}
    for name, taken in times.items():
        lower, median, upper = statistics.quantiles(taken, n=4, method="inclusive")
        timings[name] = Timing(median, lower, upper, rounds)
    return timings


def available_memory() -> int:
    """Bytes that can be allocated: on the GPU, or without swapping, as Linux estimates them. Elsewhere: no end."""
    if on_gpu():
        return torch.cuda.mem_get_info()[0]
    if not CLEAR_REFS.exists():
        return sys.maxsize
    return _kibibytes("/proc/meminfo", "MemAvailable")


def peak_growth(warm_up: Callable[[], object], work: Callable[[], list[Tensor]]) -> int:
    """Bytes by which the process's peak resident memory, or the GPU's, grows in `work`, less the tensors it returns.

    Call it in a fresh process: in one that has worked before, memory that the C library has kept hides a
    part. That is also why `warm_up`, which should load code and little else, is followed by a trim.
    """
    warm_up()
    if on_gpu():  # the caching allocator knows
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = work()
        return max(torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results), 0)
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")  # the peak begins again at what is resident now
    before = _kibibytes("/proc/self/status", "VmRSS")
    results = work()
    peak = _kibibytes("/proc/self/status", "VmHWM")
    return max(peak - before - sum(x.nbytes for x in results), 0)


def in_fresh_process(function: Callable[..., T], *args: object) -> T:
    """function(*args) in a new Python process; all must be picklable.

    Raises:
        concurrent.futures.process.BrokenProcessPool: if the process is killed, for example when memory runs out.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        return pool.submit(function, *args).result()


def _end_with_parent() -> None:
    """On Linux: a worker waits for work for ever if its parent is ended by a signal."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def with_memory(result: Result, weigh: Callable[..., int], *args: object) -> Result:
    """The result with its peak memory, weigh(*args) in a fresh process, or a note why it has none."""
    if not (on_gpu() or CLEAR_REFS.exists()):
        return result._replace(note=UNTOLD)
    try:
        return result._replace(peak_bytes=in_fresh_process(weigh, *args))
    except BrokenProcessPool:
        return result._replace(note=KILLED)


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Give an attribute another value while the context lasts."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _kibibytes(path: str, field: str) -> int:
    """A field of a file of /proc that is given in kB, in bytes."""
    return int(re.search(rf"^{field}:\s+(\d+) kB$", Path(path).read_text(), re.MULTILINE)[1]) * 1024
