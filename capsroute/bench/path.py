"""The path that the CPU kernels take for a case, as they themselves plan it, and the arithmetic on it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import _autograd, _ops, reference
from .registry import Case, Problem
from .table import format_bytes


class Plan(NamedTuple):
    """The choices of csrc/cpu/routing.h, Plan; `chunk`, `keeps_pairs` and `few_inputs` are of a backward alone."""

    scratch: int
    kept_inputs: int
    tile: int
    tiles: int
    groups: int
    by_group: bool
    chunk: int
    keeps_pairs: bool
    few_inputs: bool
    product_first: bool
    handed: bool
    by_samples: bool
    copied: bool
    as_read: bool
    half_vectors: bool
    threads: int


def path_of(problem: Problem, backward: bool) -> Plan:
    """The path of the forward, or of the backward, with gradients for u and the weight.

    Raises:
        ValueError: if the C++ kernels are not there.
    """
    can, why = _ops.cpu_library()
    if not can:
        raise ValueError(why)
    u, weight, iterations = problem.u, problem.weight, problem.iterations
    logits = None if problem.logits is None else problem.logits[None]
    if backward and problem.detach_coupling and iterations > 1:  # one pass, from the logits of the last
        iterations, logits = 1, u.new_zeros(1, 1, problem.grad_v.shape[1])
    named = reference.Options(iterations, problem.coupling, False, problem.detach_coupling, 1e-9)
    room = _autograd.room_for_votes("capsroute", u, weight, named) if backward else 0
    options = (iterations, problem.coupling == "in", False, 1e-9, room, backward)
    numbers = torch.ops.capsroute.plan(u.detach(), weight, None, logits, None, *options)
    found = dict(pair.split("=") for pair in numbers.split())
    return Plan(*(int(found[name]) for name in Plan._fields))


def explain(case: Case, path: Plan, backward: bool) -> str:
    """The path, and why, in words."""
    shared = "one weight for all i: the stream reads u itself, and W meets V and the sums alone"
    rows = {
        "pair": "votes W u are made in the stream, of several samples for each load of W",
        "votes": "votes are read as given",
    }
    words = [rows.get(case.form, shared)]
    if path.half_vectors:
        words.append("in vectors of half the width, which rows fill where they would not fill whole ones")
    if path.copied:
        words.append("W is put into the kernels' order before")
    if path.as_read:
        words.append("W is read as it lies, or put into the kernels' order as it is read, as that is seldom")
    passes = streamed(case, backward)
    if path.by_samples:
        words.append("a lane is a sample, as there are enough of them and their votes stay near")
    if case.form == "pair" and (passes > 1 or path.handed):
        together = f"{min(case.batch, 4)} samples" if case.batch > 1 else "one sample"
        samples = "a vector's samples" if path.by_samples else together
        if path.handed:
            words.append(f"those of {path.kept_inputs} input capsules are there from the forward, which kept them")
        elif path.kept_inputs == case.inputs:
            words.append(f"kept between passes, as those of {samples} are few enough")
        else:
            first = f", but for the first {path.kept_inputs} input capsules" if path.kept_inputs else ""
            words.append(f"made anew in each pass, as those of {samples} are too many to keep{first}")
    shared_out = "their groups are shared out" if path.by_group else "a thread takes whole tiles"
    samples, inputs = min(path.tile, path.chunk), -(-case.inputs // path.groups)
    tiles = f"{path.tiles} x {samples} samples, {path.groups} x {inputs} input capsules"
    words.append(f"{tiles}, threads {path.threads}: {shared_out}")
    if backward:
        kept = "coupling kept for the gradients" if path.keeps_pairs else "coupling made anew for the gradients"
        words.append(f"{path.chunk} of {case.batch} samples at a time, {kept}")
        if path.few_inputs:
            words.append("few input capsules at a time, as W and dW of more would leave the cache between samples")
    words.append(f"scratch {format_bytes(path.scratch)}")
    return "; ".join(words)


def streamed(case: Case, backward: bool) -> int:
    """Passes that are streamed: in the backward not the first, but for the gradient of a shared weight."""
    if not backward:
        return case.iterations
    return (1 if case.detach_coupling else case.iterations) - (not case.shared)


def operations(case: Case, path: Plan, backward: bool) -> int:
    """Floating-point operations of the forward, or the backward: two for each multiply-add of votes, agreement, sums
    and gradients. Exponentials, squash and what is of the size of v are not counted.
    """
    B, I, D, J, O, R = case.sizes.values()
    row = 2 * B * I * J * (D if case.shared else O)  # of agreement, or a sum, in one pass
    votes = 2 * B * I * J * O * D if case.form == "pair" else 0
    products = 2 * B * J * O * D if case.shared else 0  # of W with V or a sum
    kept = path.kept_inputs / max(I, 1)
    if not backward:
        # the first pass couples all alike: its sums may be a product of their own
        alike = path.product_first and case.coupling == "out"
        made = kept * (1 + alike) + (1 - kept) * R
        return round(made * votes) + (2 * R - 1 - alike) * (row + products)
    if case.detach_coupling:
        R = 1
    passes = streamed(case, backward)
    made = 0 if path.handed else min(1, passes)
    stream = round((kept * made + (1 - kept) * passes) * votes) + (R - 1) * 3 * row
    stream += (R * row + (2 * R - 1) * 3 * products) if case.shared else 0
    made_again = 0 if path.keeps_pairs else (R - 1) * 2 * row + votes
    return stream + made_again + (2 * R - 1) * row + 2 * votes  # dh, then du and dW
