"""Bytes that a GPU's kernels load and store: exact, from the shape alone, so that no GPU is needed to compare them.

They count every load and store of the Triton kernels, re-reads that a cache would serve included
(`capsroute._triton.problem`); `tests/test_triton_traffic.py` counts them in the interpreter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..reference import accumulation_dtype
from .registry import Case, Problem, make_problem, routed, run


class Traffic(NamedTuple):
    """Of one case: the bytes moved, the launches of the fused kernels, and the bytes of their scratch at once."""

    fused: int
    fewest: int
    eager: int
    launches: int
    scratch: int


def traffic(case: Case, backward: bool, dtype: torch.dtype = torch.float32) -> Traffic:
    """The traffic of a case: the forward with no gradient wanted, or forward and backward with all."""
    with torch.device("meta"):
        problem = make_problem(case, dtype)
    steps, scratch = planned(problem, backward)
    moved = sum(step.traffic for step in steps)
    return Traffic(moved, fewest(problem, backward), eager(problem, backward), len(steps), scratch)


def planned(problem: Problem, backward: bool) -> tuple[list, int]:
    """The steps that the Triton backend would take, and the bytes that they hold besides inputs and results; the
    tensors may be on the meta device.
    """
    from .._triton import backward as plan_backward
    from .._triton import forward as plan_forward
    from .._triton.problem import Problem as Planned

    u, weight, logits, iterations, grad_v, coupling, detach = problem
    logits = None if logits is None else logits[None]
    p = Planned.of(u.detach(), weight, None, logits, None, coupling == "in", False)
    saved = (1 if detach else iterations) if backward else 0
    steps, results = plan_forward.route(p, iterations, 1e-9, saved, False)
    scratch = _scratch(steps, (p.u, p.weight, logits, *results))
    if backward:
        _, s, norm, last_logits, _ = results
        logits = last_logits if detach and iterations > 1 else logits
        p = Planned.of(u.detach(), weight, None, logits, None, coupling == "in", False)
        needs = plan_backward.Needs(True, weight is not None, False, False)
        second, gradients = plan_backward.route_backward(p, grad_v, s, norm, saved, 1e-9, needs)
        scratch = max(scratch, _scratch(second, (p.u, p.weight, logits, grad_v, s, norm, *gradients)))
        steps += second
    return steps, scratch


def _scratch(steps: list, kept: tuple) -> int:
    """Bytes of the storages that steps use, without those of the tensors that are kept."""
    storages = {}
    for step in steps:
        for x in step.args if hasattr(step, "args") else step:
            if isinstance(x, Tensor):
                storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
    for x in kept:
        if x is not None:
            storages.pop(x.untyped_storage()._cdata, None)
    return sum(storages.values())


def fewest(problem: Problem, backward: bool) -> int:
    """Each input read once and each result written once, by the forward and by the backward."""
    u, weight, logits, iterations, grad_v, _, detach = problem
    inputs = sum(x.nbytes for x in (u, weight, logits) if x is not None)
    v = grad_v.nbytes
    if not backward:
        return inputs + v
    s = (1 if detach else iterations) * grad_v.numel() * accumulation_dtype(u.dtype).itemsize
    gradients = u.nbytes + (0 if weight is None else weight.nbytes)
    return (inputs + v + s) + (inputs + v + s + gradients)


class _Bytes(TorchDispatchMode):
    """Count what each operator reads and writes; views move nothing."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if not op.is_view and "_unsafe_view" not in op.name():
            flat = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.total += sum(_distinct_bytes(x) for x in flat if isinstance(x, Tensor))
        return result


def _distinct_bytes(x: Tensor) -> int:
    """What must be moved for x: a number that is expanded is read once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * x.itemsize


def eager(problem: Problem, backward: bool) -> int:
    """What the reference's operators read and write in eager PyTorch."""
    with _Bytes() as moved:
        run(lambda problem: routed(problem, "reference"), problem, backward)
    return moved.total


def rows(measured: list[tuple[Case, bool, Traffic]]) -> str:
    """A table of cases, with or without the backward, and their traffic."""
    lines = [
        "| bytes moved by the Triton kernels | launches | fused | fewest possible | eager PyTorch |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for case, backward, found in measured:
        label = case.label(backward)
        cells = [f"{found.fused / 1e6:.4g} MB", f"{found.fewest / 1e6:.4g} MB, {found.fused / found.fewest:.3g}x"]
        cells.append(f"{found.eager / 1e6:.4g} MB, {found.eager / found.fused:.3g}x")
        lines.append(f"| {label} | {found.launches} | {' | '.join(cells)} |")
    return "\n".join(lines)
