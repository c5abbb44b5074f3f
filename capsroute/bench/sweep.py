"""How the time of the CPU kernels grows with one size of a case, and whether it jumps anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .._optional import optional
from .measure import alternate, available_memory
from .path import path_of
from .registry import CASES, Case, Problem, make_problem, routed, run
from .table import format_seconds

MOST = {"batch": 256, "inputs": 4096, "outputs": 128}
NAMES = {"batch": "samples, B", "inputs": "input capsules, I", "outputs": "output capsules, J"}
LANES = 16  # of the widest vectors, each an input capsule or a sample: fewer take as long
SAMPLES = 4  # that share a load of the weight where a lane is a feature
CLIFF = 1.2  # a step up of more than this is one


class Step(NamedTuple):
    """A size, the seconds of the call and for one of it, and how that compares with the size before."""

    size: int
    seconds: float
    growth: float  # of the time for one, as far as a tile that is not full does not explain it

    @property
    def each(self) -> float:
        return self.seconds / self.size


class Curve(NamedTuple):
    """The steps of a case and pass, and the sizes that do not fit into memory."""

    label: str
    axis: str
    steps: list[Step]
    left_out: Sequence[int] = ()

    def cliffs(self) -> list[Step]:
        return [step for step in self.steps if step.growth > CLIFF]


def sizes(axis: str) -> list[int]:
    """1, 2, 3, then about four an octave, with the neighbours of powers of two, where tiles and vectors end."""
    powers = [2**k for k in range(MOST[axis].bit_length()) if 2**k <= MOST[axis]]
    near = {n for power in powers for n in (power - 1, power, power + 1, power * 5 // 4, power * 3 // 2)}
    return sorted(n for n in near if 1 <= n <= MOST[axis])


def measure(case: Case, axis: str, backward: bool, dtype: torch.dtype, seconds: float) -> Curve:
    """Time the fused kernels at all sizes, in turns: the forward with no gradient wanted, or forward and backward."""
    fit = fitting(case, axis, dtype)
    problems = {size: make_problem(case._replace(**{axis: size}), dtype) for size in fit}
    kernels = partial(routed, backend="cpu")
    calls = {str(size): partial(run, kernels, problem, backward) for size, problem in problems.items()}
    times = {int(name): timing.lower for name, timing in alternate(calls, seconds).items()}
    tiles = {size: _tile(problem, axis, backward) for size, problem in problems.items()}
    named = case._replace(**{axis: getattr(CASES.get(case.name, case), axis)})  # what it sweeps is no part of its title
    return Curve(named.label(backward), axis, steps(times, tiles), sizes(axis)[len(fit) :])


def fitting(case: Case, axis: str, dtype: torch.dtype) -> list[int]:
    """The sizes whose problems fit into memory: all at once, since they are timed in turns, and gradients of one."""
    room, fit = available_memory(), []
    for size in sizes(axis):
        with torch.device("meta"):
            problem = make_problem(case._replace(**{axis: size}), dtype)
        needed = sum(x.nbytes for x in problem if isinstance(x, Tensor))
        room -= needed
        if room < needed:
            break
        fit.append(size)
    return fit


def steps(times: dict[int, float], tiles: dict[int, int]) -> list[Step]:
    """The steps of times by size. A tile that is not full may take as long as a full one: then only the rest counts."""
    found: list[Step] = []
    for size, seconds in times.items():
        growth = 1.0
        if found:
            last = found[-1]
            tile = max(tiles[size], tiles[last.size])
            before, now = (-(-n // tile) * tile for n in (last.size, size))
            longer = seconds / last.seconds
            growth = min(longer * last.size / size, longer * before / now)
        found.append(Step(size, seconds, growth))
    return found


def rows(curve: Curve) -> str:
    """A table of a curve, and what is to be said of it."""
    lines = [
        f"| {curve.label}: {curve.axis} | time | for each | step |",
        "| ---: | ---: | ---: | ---: |",
        *(
            f"| {step.size} | {format_seconds(step.seconds)} | {format_seconds(step.each)} | {step.growth:.2f}x |"
            for step in curve.steps
        ),
    ]
    cliffs = ", ".join(f"at {step.size} ({step.growth:.2f}x)" for step in curve.cliffs())
    verdict = f"steps up of more than {CLIFF - 1:.0%} beyond what a tile that is not full explains: {cliffs or 'none'}"
    if curve.left_out:
        verdict += f"; left out, as they do not fit into memory: {curve.left_out[0]} to {curve.left_out[-1]}"
    return "\n".join([*lines, "", f"{curve.label}: {verdict}\n"])


def plot(curves: Sequence[Curve], file: Path) -> None:
    """Draw the time for one against the size."""
    figure = optional("matplotlib.figure").Figure((7, 4.5), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        axes.plot([s.size for s in curve.steps], [s.each * 1e6 for s in curve.steps], ".-", label=curve.label)
    axes.set(xscale="log", yscale="log", xlabel=NAMES[curves[0].axis], ylabel="µs for each of them")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")  # else they lie over each other
    axes.set_title(f"capsroute's CPU kernels, threads: {torch.get_num_threads()}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)


def _tile(problem: Problem, axis: str, backward: bool) -> int:
    if axis == "batch":
        return LANES if path_of(problem, backward).by_samples else SAMPLES
    return LANES if axis == "inputs" else 1
