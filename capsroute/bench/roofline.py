"""How close the CPU kernels come to the machine's limits of arithmetic and memory, which are measured too."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from .._optional import optional
from .measure import alternate
from .path import explain, operations, path_of
from .registry import Case, make_problem, passes, routed, run
from .table import format_seconds
from .traffic import fewest

SIZE, CHANNELS, SIDE, BYTES, SECONDS = 1024, 256, 56, 256 << 20, 3.0
ABOVE = "above the roof lies what stays in a cache from one call to the next"


class Machine(NamedTuple):
    """Floating-point operations of a dtype and bytes read, a second, with the threads that torch has."""

    flops: float
    bandwidth: float
    dtype: str = "float32"


class Point(NamedTuple):
    """A case and pass: seconds, operations, the fewest bytes that it must move, and the path."""

    label: str
    seconds: float
    operations: int
    bytes: int
    path: str

    @property
    def case(self) -> str:
        return self.label.rpartition(", ")[0]

    @property
    def flops(self) -> float:
        return self.operations / self.seconds

    @property
    def intensity(self) -> float:
        """Operations for a byte."""
        return self.operations / self.bytes

    def roof(self, machine: Machine) -> float:
        """What the machine could do with so many operations for a byte."""
        return min(machine.flops, self.intensity * machine.bandwidth)


def measure_machine(dtype: torch.dtype = torch.float32) -> Machine:
    """By torch's own product of matrices or convolution, and by adding up more than a cache holds: the lower quartile.

    The dtype is the one to accumulate in: kernels with instructions for bfloat16 may go beyond the peak of float32.
    On an AMD EPYC MKL, which makes the product, left AVX-512 out, and oneDNN, which convolves, did not. That knows no
    float64, of which a vector holds half as many numbers.
    """
    a, b = torch.randn(SIZE, SIZE, dtype=dtype), torch.randn(SIZE, SIZE, dtype=dtype)
    image, kernels = torch.randn(1, CHANNELS, SIDE, SIDE), torch.randn(CHANNELS, CHANNELS, 3, 3)
    image, kernels = (x.contiguous(memory_format=torch.channels_last) for x in (image, kernels))
    calls = {
        "mm": partial(torch.mm, a, b, out=torch.empty(SIZE, SIZE, dtype=dtype)),
        "conv": partial(torch.conv2d, image, kernels),
        "sum": partial(torch.sum, torch.ones(BYTES // 4)),
    }
    timings = alternate(calls, SECONDS)
    product = 2 * SIZE**3 / timings["mm"].lower
    convolution = 2 * (3 * CHANNELS * (SIDE - 2)) ** 2 / timings["conv"].lower * 4 / dtype.itemsize
    return Machine(max(product, convolution), BYTES / timings["sum"].lower, str(dtype).removeprefix("torch."))


def measure(case: Case, backward: bool, dtype: torch.dtype, seconds: float) -> Point:
    """Time the fused kernels on a case: the forward with no gradient wanted, or forward and backward."""
    problem = make_problem(case, dtype)
    timing = alternate({"fused": partial(run, partial(routed, backend="cpu"), problem, backward)}, seconds)["fused"]
    paths = {each: path_of(problem, each) for each in passes(backward)}
    total = sum(operations(case, path, each) for each, path in paths.items())
    words = explain(case, paths[backward], backward)
    return Point(case.label(backward), timing.seconds, total, fewest(problem, backward), words)


def rows(machine: Machine, points: Sequence[Point]) -> str:
    """A table of the points against the machine, and the path of each below."""
    lines = [
        f"{machine.flops / 1e9:.4g} GFLOP/s in {machine.dtype} (a product of matrices or a convolution), "
        f"{machine.bandwidth / 1e9:.3g} GB/s (a sum), with {torch.get_num_threads()} threads",
        "",
        f"| operations, and the fewest bytes | time | GFLOP/s | of {machine.dtype}'s peak | MB | of the bandwidth | "
        "of the roof |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for p in points:
        shares = p.flops / machine.flops, p.bytes / p.seconds / machine.bandwidth, p.flops / p.roof(machine)
        peak, bandwidth, roof = (f"{share:.0%}" for share in shares)
        lines.append(
            f"| {p.label} | {format_seconds(p.seconds)} | {p.flops / 1e9:.3g} | {peak} | {p.bytes / 1e6:.4g} | "
            f"{bandwidth} | {roof} |"
        )
    if any(p.flops > p.roof(machine) for p in points):
        lines += ["", f"{ABOVE.capitalize()}."]
    return "\n".join([*lines, "", *(f"- {p.label}: {p.path}" for p in points)])


def plot(machine: Machine, points: Sequence[Point], file: Path) -> None:
    """Draw the points and the roof."""
    figure = optional("matplotlib.figure").Figure((8, 5), layout="constrained")
    axes = figure.subplots()
    least = min([p.intensity for p in points]) / 2
    most = max([p.intensity for p in points] + [2 * machine.flops / machine.bandwidth]) * 2
    ridge = machine.flops / machine.bandwidth
    axes.plot([least, ridge, most], [least * machine.bandwidth, machine.flops, machine.flops], color="black")
    markers = "os^vD<>Pp*Xh8dH"  # each has a face, which is empty for a backward
    cases = list(dict.fromkeys(p.case for p in points))
    for p in points:
        index = cases.index(p.case)
        colour, marker = f"C{index % 10}", markers[index % len(markers)]
        filled = "none" if "backward" in p.label else colour
        axes.plot(p.intensity, p.flops, marker, color=colour, markerfacecolor=filled, label=p.label)
    axes.set(xscale="log", yscale="log", xlabel="operations for each byte that must be moved", ylabel="operations / s")
    axes.set_title(f"CPU kernels, and what this machine can do in {machine.dtype}\n({ABOVE})", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=150)
