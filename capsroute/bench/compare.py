"""Compare the implementations on a case: first their results, then their time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import accumulation_dtype
from .measure import Result, alternate, available_memory, peak_growth, with_memory
from .registry import IMPLEMENTATIONS, Case, Forward, Problem, make_problem, run

# |x - reference| / |reference| that rounding may explain, over a whole tensor
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class DisagreementError(RuntimeError):
    """An implementation's result differs from the reference's, so its speed is not reported."""


MISCOMPILED = "wrong results"


def compare(
    case: Case, backward: bool, names: Sequence[str], *, dtype: torch.dtype, seconds: float, memory: bool
) -> list[Result]:
    """Measure implementations on a case.

    Args:
        case: the shape.
        backward: measure forward and backward with all gradients, else the forward with none wanted.
        names: of the implementations.
        dtype: of all tensors.
        seconds: about how long to time.
        memory: also measure peak memory, each implementation in a process of its own.

    Raises:
        DisagreementError: if a result differs from the reference's. That of what torch compiled is left out instead,
            as :data:`MISCOMPILED`: it is made of the reference.
    """
    prepared = prepare(case, backward, names, dtype)
    calls = {name: partial(run, forward, prepared.problem, backward) for name, forward in prepared.forwards.items()}
    timings = alternate(calls, seconds)
    results = []
    for name in names:
        if name in prepared.left_out:
            results.append(Result(name, note=prepared.left_out[name]))
            continue
        result = Result(name, *timings[name])
        if memory:
            machine = torch.get_num_threads(), str(torch.get_default_device())
            result = with_memory(result, _case_memory, case, backward, name, dtype, *machine)
        results.append(result)
    return results


class Prepared(NamedTuple):
    """A case's tensors, the implementations that can run and agree, and why the others cannot."""

    problem: Problem
    forwards: dict[str, Forward]
    left_out: dict[str, str]


def prepare(case: Case, backward: bool, names: Sequence[str], dtype: torch.dtype = torch.float32) -> Prepared:
    """Get a case ready to be measured: arguments and errors as for :func:`compare`."""
    problem = make_problem(case, dtype)
    room = available_memory()
    reasons = {name: why_not(name, case, backward, dtype, room) for name in names}
    forwards = {name: IMPLEMENTATIONS[name].make() for name, reason in reasons.items() if not reason}
    part = checked_part(problem, bytes_held("reference", case, backward, dtype), room)
    for name in miscompiled(forwards, part, backward):
        del forwards[name]
        reasons[name] = MISCOMPILED
    return Prepared(problem, forwards, {name: reason for name, reason in reasons.items() if reason})


def why_not(name: str, case: Case, backward: bool, dtype: torch.dtype, room: int) -> str:
    """Why an implementation cannot be measured on a case with `room` bytes of memory, or an empty string."""
    implementation = IMPLEMENTATIONS[name]
    if not implementation.computes(case):
        return "another routing"
    if implementation.only not in (None, dtype):
        return f"{str(implementation.only).removeprefix('torch.')} only"
    if reason := implementation.missing():
        return reason
    needed = bytes_held(name, case, backward, dtype)
    return f"needs ~{needed / 2**30:.0f} GiB" if needed > room else ""


def bytes_held(name: str, case: Case, backward: bool, dtype: torch.dtype) -> int:
    """About the most memory that an implementation holds, less inputs and results."""
    return int(IMPLEMENTATIONS[name].held[backward] * case.votes * accumulation_dtype(dtype).itemsize)


def checked_part(problem: Problem, needed: int, room: int) -> Problem:
    """The problem, or if the reference needs more room than there is, as many samples as take a quarter."""
    batch = len(problem.u)
    return problem if needed <= room else problem.first(max(1, batch * room // (4 * needed)))


def miscompiled(forwards: dict[str, Forward], problem: Problem, backward: bool) -> list[str]:
    """The compiled forwards that do not give the reference's v and gradients; DisagreementError if another does not."""
    expected, wrong = run(IMPLEMENTATIONS["reference"].make(), problem, backward), []
    for name in (name for name in forwards if name != "reference"):
        try:
            check_equal(name, run(forwards[name], problem, backward), expected)
        except DisagreementError:
            if not IMPLEMENTATIONS[name].compiles:
                raise
            wrong.append(name)
    return wrong


def check_equal(name: str, results: list[Tensor], expected: list[Tensor], rounding: float = 0.0) -> None:
    """Raise DisagreementError unless every result is close to what is expected, by the norm of the difference.

    Rounding explains a share of that norm: what its dtype does, or more.
    """
    for index, (x, y) in enumerate(zip(results, expected, strict=True)):
        if x.shape != y.shape or x.dtype != y.dtype:
            raise DisagreementError(
                f"{name}: result {index} is {x.dtype} {list(x.shape)}, the reference's {y.dtype} {list(y.shape)}"
            )
        norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
        difference, limit = norm(x - y).item(), max(rounding, TOLERANCE[y.dtype]) * norm(y).item()
        if not difference <= limit:  # NaN fails this too
            raise DisagreementError(
                f"{name}: result {index} is {difference:.1e} from the reference's, at most {limit:.1e} is rounding"
            )


def _case_memory(case: Case, backward: bool, name: str, dtype: torch.dtype, threads: int, device: str) -> int:
    torch.set_num_threads(threads)
    if device != "cpu":
        torch.set_default_device(device)
    implementation, problem = IMPLEMENTATIONS[name], make_problem(case, dtype)
    forward = implementation.make()
    # The small problem leaves nothing behind that the first true call would need; a compiled one has no choice.
    small = problem if implementation.compiles else problem.first(2)
    return peak_growth(lambda: run(forward, small, backward), lambda: run(forward, problem, backward))
