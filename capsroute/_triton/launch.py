"""From tensors to launches: which kernels run on which grids, with the bytes that each loads and stores beside it.

The number of launches, their bytes and the scratch are functions of the shape and the options alone. The bytes count
every load and store of a program, those that a cache would serve included; they suppose that nothing is masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype, out_capsules
from . import backward, forward, tuning
from .stream import Static

ACCUMULATION = {torch.float32: tl.float32, torch.float64: tl.float64}


class Launch(NamedTuple):
    """One kernel on one grid."""

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple
    constants: dict[str, Any]
    warps: int
    traffic: int  # bytes loaded and stored

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told: no fused multiply-add but the explicit ones, see `stream`."""
        return {**self.constants, "num_warps": self.warps, "num_stages": 1, "enable_fp_fusion": False}

    def run(self) -> None:
        self.kernel[self.grid](*self.args, **self.options)


class Sum(NamedTuple):
    """out = sum of parts over their first dimension, by torch, in a fixed order."""

    parts: Tensor
    out: Tensor

    name = "sum"

    @property
    def traffic(self) -> int:
        return self.parts.nbytes + self.out.nbytes

    def run(self) -> None:
        total = self.parts.sum(0)
        self.out.copy_(total.view(self.out.shape))


Step = Launch | Sum


def ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass
class Problem:
    """The tensors of a call in the order that the kernels read, and its sizes."""

    u: Tensor  # [B, I, D] or votes [B, I, J, O], features side by side
    weight: Tensor | None  # [I, D, J, O], or [J, O, D] of any strides
    bias: Tensor | None  # [J, O]
    logits: Tensor | None
    mask: Tensor | None
    form: str  # "pair", "output", "single" as csrc/cpu/routing.h names them, or "votes"
    over_inputs: bool
    leaky: bool
    B: int
    I: int
    D: int
    J: int
    O: int
    tuning: tuning.Tuning

    @classmethod
    def of(cls, u, weight, bias, logits, mask, over_inputs: bool, leaky: bool) -> Problem:
        J = out_capsules(u, weight, bias, logits)
        form = "votes"
        D, O = 0, u.shape[-1]
        if u.stride(-1) != 1 or (weight is None and u.stride(2) != u.shape[3]):
            u = u.contiguous()
        if weight is not None:
            form = {4: "pair", 3: "output", 2: "single"}[weight.dim()]
            O, D = weight.shape[-2:]
            weight = weight.permute(0, 3, 1, 2).contiguous() if form == "pair" else weight.expand(J, O, D)
        return cls(
            u,
            weight,
            None if bias is None else bias.contiguous(),
            logits,
            None if mask is None else mask.view(torch.uint8),
            form,
            over_inputs,
            leaky,
            *u.shape[:2],
            D,
            J,
            O,
            tuning.for_device(u.device),
        )

    @property
    def keys(self) -> bool:
        return self.form in ("output", "single")

    @property
    def X(self) -> int:
        """Features of a vote as the streams read it: u itself where the weight is the same for all i."""
        return self.D if self.keys else self.O

    @property
    def dtype(self) -> torch.dtype:
        """That sums are made in."""
        return accumulation_dtype(self.u.dtype)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of mask [b, i], logits [b, i, j] and u [b, i, j], 0 where they broadcast."""
        mask, logits = (
            (0,) * n if x is None else tuple(0 if size == 1 else s for size, s in zip(x.shape, x.stride(), strict=True))
            for x, n in ((self.mask, 2), (self.logits, 3))
        )
        return (*mask, *logits, *self.u.stride()[:2], self.u.stride(2) if self.form == "votes" else 0)

    @property
    def weight_strides(self) -> tuple[int, ...]:
        return tuple(self.weight.stride()) if self.keys else (0, 0, 0)

    def empty(self, *shape: int) -> Tensor:
        return self.u.new_empty(shape, dtype=self.dtype)

    def stream(self, per_thread: int) -> tuple[Static, tuple[int, int, int], int]:
        """What a stream over i in tiles of samples is compiled for, its grid and warps."""
        tile = tuning.tile(self.tuning, per_thread, self.B, self.J, self.X, self.dtype.itemsize)
        group = self.I if self.I <= self.tuning.alone else self.tuning.group
        static = Static(
            acc=ACCUMULATION[self.dtype],
            J=self.J,
            O=self.O,
            D=self.D,
            X=self.X,
            TB=tile.rows,
            JB=tile.outputs,
            XB=tile.features,
            OB=tuning.power_of_two(self.O),
            DB=tuning.power_of_two(max(self.D, 1)),
            group=max(group, 1),
            pair=self.form == "pair",
            keys=self.keys,
            over_inputs=self.over_inputs,
            leaky=self.leaky,
            mask=self.mask is not None,
            logits=self.logits is not None,
            tiled=self.tiled(tile.outputs),
        )
        return static, (ceil(self.B, tile.rows), ceil(self.J, tile.outputs), self.groups(static)), tile.warps

    def tiled(self, outputs: int) -> bool:
        return outputs < self.J and not self.over_inputs

    def groups(self, static: Static) -> int:
        return max(1, ceil(self.I, static.group))

    def finish(self) -> tuple[Static, tuple[int, int, int], int]:
        """Likewise of what runs between two streams, on V alone."""
        static, _, _ = self.stream(self.tuning.forward)
        tile = tuning.tile(
            replace(self.tuning, row=static.OB), self.tuning.finish, self.B, self.J, self.O, self.dtype.itemsize
        )
        static = replace(static, TB=tile.rows, JB=tile.outputs, tiled=False, logits=False, mask=False, leaky=False)
        return static, (ceil(self.B, tile.rows), ceil(self.J, tile.outputs), 1), tile.warps

    # Bytes

    def state(self) -> int:
        """Of one [B, J, X] as the streams read it."""
        return self.B * self.J * self.X * self.dtype.itemsize

    def read(self, static: Static, votes: bool = True) -> int:
        """Of all that a stream in tiles of samples reads of the inputs: W once for each tile of samples, u once for
        each tile of j.
        """
        across = ceil(self.J, static.JB)
        total = across * self.B * self.I if self.mask is not None else 0
        if self.logits is not None:
            total += self.B * self.I * self.J * self.logits.itemsize
        if not votes:
            return total
        if self.form == "votes":
            return total + self.B * self.I * self.J * self.O * self.u.itemsize
        total += across * self.B * self.I * self.D * self.u.itemsize
        if self.form == "pair":
            total += ceil(self.B, static.TB) * self.weight.nbytes
        return total

    def read_by_inputs(self, static: Static, across: int, shares: int) -> int:
        """Likewise of the last stream, in tiles of input capsules: W once for each share of the samples."""
        total = across * self.B * self.I if self.mask is not None else 0
        if self.logits is not None:
            total += self.B * self.I * self.J * self.logits.itemsize
        if self.form == "votes":
            return total + self.B * self.I * self.J * self.O * self.u.itemsize
        total += across * self.B * self.I * self.D * self.u.itemsize
        return total + (shares * self.weight.nbytes if self.form == "pair" else 0)


def run(steps: list[Step]) -> None:
    """On the current stream; nothing here waits for the device."""
    for step in steps:
        step.run()


def pass_forward(p: Problem, V: Tensor | None, coupling: Tensor | None) -> tuple[list[Step], Tensor, Tensor | None]:
    """One stream over i: the steps, s in parts [groups, B, J, X], and over i the parts' maxima and sums."""
    static, grid, warps = p.stream(p.tuning.forward)
    static = replace(static, query=V is not None, coupling=coupling is not None and not p.over_inputs)
    steps, rows = [], None
    if static.tiled:
        rows = p.empty(2, p.B, p.I)
        steps = row_steps(p, static, grid, warps, V, rows)
    groups = grid[2]
    parts = p.empty(groups, p.B, p.J, p.X)
    tops = p.empty(2, groups, p.B, p.J) if p.over_inputs else None
    traffic = p.read(static) + parts.nbytes
    traffic += groups * p.state() if V is not None else 0
    traffic += grid[1] * rows.nbytes if static.tiled else 0
    traffic += coupling.nbytes if static.coupling else 0
    traffic += tops.nbytes if p.over_inputs else 0
    args = (p.u, p.weight if static.pair else None, p.logits, p.mask, V, rows, coupling, parts, tops, p.B, p.I)
    steps.append(Launch(forward.pass_, grid, (*args, p.strides, static), {}, warps, traffic))
    return steps, parts, tops


def row_steps(p: Problem, static: Static, grid, warps: int, V: Tensor | None, rows: Tensor) -> list[Step]:
    """The statistics of the softmax over j where J takes several tiles: those of each tile, then of all."""
    parts = p.empty(grid[1], *rows.shape)
    traffic = p.read(static, votes=V is not None) + parts.nbytes + (grid[2] * p.state() if V is not None else 0)
    weight = p.weight if static.pair else None
    own = replace(static, leaky=False, coupling=False)
    args = (p.u, weight, p.logits, p.mask, V, parts, p.B, p.I, p.strides, own)
    return [Launch(forward.rows, grid, args, {}, warps, traffic), merge_step(p, static, parts, rows)]


def merge_step(p: Problem, static: Static, parts: Tensor, rows: Tensor) -> Launch:
    count = p.B * p.I
    static = replace(static, slope=len(rows) == 3, query=True, coupling=False)
    traffic = parts.nbytes * (len(rows) + 1) // len(rows) + rows.nbytes
    args = (parts, rows, count, len(parts), static)
    return Launch(forward.merge_rows, (ceil(count, static.width), 1, 1), args, {}, 4, traffic)


def route(p: Problem, R: int, eps: float, save: bool, return_coupling: bool) -> tuple[list[Step], tuple[Tensor, ...]]:
    """The whole forward: the steps, and (v, s, lse, coupling), which they fill."""
    v = p.u.new_empty(p.B, p.J, p.O)
    s = p.empty(*((R, p.B, p.J, p.O) if save else (0,)))
    lse = p.empty(*((R, p.B, p.J) if save and p.over_inputs else (0,)))
    coupling = p.u.new_empty((p.B, p.I, p.J) if return_coupling else (0,))
    outputs = v, s, lse, coupling
    if p.B == 0:
        return [], outputs
    wanted = coupling if return_coupling and p.I else None
    static, grid, _ = p.stream(p.tuning.forward)
    if grid[1:] == (1, 1) and not p.keys and not (p.over_inputs and return_coupling):
        return [route_step(p, R, eps, save, outputs)], outputs
    V, query = p.empty(p.B, p.J, p.O), p.empty(p.B, p.J, p.X) if p.keys else None
    seen = query if p.keys else V
    steps = []
    for k in range(R):
        last = k == R - 1
        given = None if k == 0 else seen
        stream, parts, tops = pass_forward(p, given, wanted if last else None)
        of_all_i = lse[k] if save and p.over_inputs else None
        if last and wanted is not None and p.over_inputs:
            of_all_i = p.empty(p.B, p.J) if of_all_i is None else of_all_i
        steps += stream
        steps.append(
            finish_step(p, parts, tops, V, s[k] if save else None, v, of_all_i, query, eps, k == 0, last)
        )
        if last and wanted is not None and p.over_inputs:
            steps.append(column_step(p, given, of_all_i, wanted))
    return steps, outputs


def route_step(p: Problem, R: int, eps: float, save: bool, outputs) -> Launch:
    static, grid, warps = p.stream(p.tuning.forward)
    v, s, lse, coupling = outputs
    static = replace(static, coupling=coupling.numel() > 0)
    traffic = R * p.read(static) + sum(x.nbytes for x in outputs)
    traffic += grid[0] * p.bias.nbytes if p.bias is not None else 0
    args = (p.u, p.weight, p.bias, p.logits, p.mask, v, *outputs[1:], p.B, p.I, R, eps, p.strides, save, static)
    return Launch(forward.route, grid, args, {}, warps, traffic)


def finish_step(p, parts, tops, V, s, v, lse, query, eps, first, last, squash=True) -> Launch:
    """s from its parts and what follows from it; `first`: V begins here."""
    static, grid, warps = p.finish()
    static = replace(static, query=not first)
    groups = len(parts)
    numbers = p.B * p.J * p.O * p.dtype.itemsize
    traffic = parts.nbytes + (0 if s is None else s.nbytes)
    traffic += grid[0] * p.bias.nbytes if p.bias is not None else 0
    if p.keys:
        traffic += grid[0] * p.J * p.O * p.D * p.weight.itemsize * (1 if last else 2)
    if p.over_inputs:
        traffic += tops.nbytes + tops.nbytes // 2 + (0 if lse is None else lse.nbytes)
        traffic += (p.D if p.keys else 1) * tops.nbytes // 2
    if squash:
        traffic += v.nbytes if last else numbers + (0 if first else numbers) + (p.state() if p.keys else 0)
    weight = p.weight if p.keys else None
    constants = {"SQUASH": squash, "LAST": last, "SAVE": s is not None}
    args = (parts, tops, weight, p.bias, V, s, v, lse, query, p.B, groups, eps, p.weight_strides)
    return Launch(forward.finish, grid, args, {**constants, "P": static}, warps, traffic)


def column_step(p: Problem, V: Tensor | None, lse: Tensor, coupling: Tensor) -> Launch:
    static, grid, warps = p.stream(p.tuning.forward)
    static = replace(static, query=V is not None)
    traffic = p.read(static, votes=V is not None) + coupling.nbytes + grid[2] * lse.nbytes
    traffic += grid[2] * p.state() if V is not None else 0
    args = (p.u, p.weight if static.pair else None, p.logits, p.mask, V, lse, coupling, p.B, p.I, p.strides, static)
    return Launch(forward.column_coupling, grid, args, {}, warps, traffic)


@dataclass
class Needs:
    """Which gradients are wanted, of tensors that are there."""

    u: bool
    weight: bool
    bias: bool
    logits: bool

    @classmethod
    def of(cls, p: Problem, u: bool, weight: bool, bias: bool, logits: bool, detach: bool) -> Needs:
        return cls(
            u,
            weight and p.weight is not None,
            bias and p.bias is not None,
            logits and p.logits is not None and not detach,
        )


class Chain(NamedTuple):
    """What the streams of the backward read, by pass k from 0: V^k after it, ds^k; for keys times W^T."""

    V: Tensor  # [R - 1, B, J, O]
    ds: Tensor  # [R, B, J, O]
    queries: Tensor  # [R - 1, B, J, X]
    slopes: Tensor  # [R, B, J, X]
    rows: Tensor | None  # [R, 3, B, I]: m, total and T, where J takes several tiles
    lse: Tensor | None  # [R, B, J]
    columns: Tensor | None  # [R, B, J]: T

    @classmethod
    def empty(cls, p: Problem, R: int, lse: Tensor, rows: bool) -> Chain:
        V, ds = p.empty(R - 1, p.B, p.J, p.O), p.empty(R, p.B, p.J, p.O)
        return cls(
            V,
            ds,
            p.empty(R - 1, p.B, p.J, p.X) if p.keys else V,
            p.empty(R, p.B, p.J, p.X) if p.keys else ds,
            p.empty(R, 3, p.B, p.I) if rows else None,
            lse if p.over_inputs else None,
            p.empty(R, p.B, p.J) if p.over_inputs else None,
        )

    @property
    def statistics(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.rows, self.lse, self.columns


def route_backward(
    p: Problem, grad_v: Tensor, s: Tensor, lse: Tensor, R: int, eps: float, detach: bool, needs: Needs
) -> tuple[list[Step], tuple[Tensor, ...]]:
    """The whole backward: the steps, and the gradients that they fill, the weight's [I, D, J, O]."""
    outputs = gradient_tensors(p, needs)
    if p.B == 0:
        return [Sum(x.new_empty(0, *x.shape), x) for x in outputs if x.numel()], outputs
    tile = gradient_tile(p)
    chain = Chain.empty(p, R, lse, rows=p.tiled(tile.outputs) or p.stream(p.tuning.backward)[0].tiled)
    steps: list[Step] = [start_step(p, grad_v, s, chain, R, eps)]
    of_weight = KeyWeight.empty(p, R) if p.keys and needs.weight else None
    dV = p.empty(p.B, p.J, p.O)
    only_last = detach
    for k in reversed(range(R)):
        needed = k > 0 and not only_last  # for dV^(k-1)
        streamed = needed or of_weight is not None
        if chain.rows is not None:
            steps += slope_rows(p, chain, k)
        if streamed:
            stream, parts = pass_backward(p, chain, k, of_weight, needed)
            steps += stream
        if needed:
            steps.append(step_step(p, parts, s, dV, chain, k - 1, R, eps))
        if only_last:
            break
    first = R - 1 if detach else 0
    steps += gradient_steps(p, chain, tile, first, R, detach, needs, outputs)
    if of_weight is not None:
        steps += of_weight.steps(p, chain, first, R, detach, outputs[1])
    if needs.bias:
        ds = chain.ds[first:]
        steps.append(Sum(ds.view(-1, p.J, p.O), outputs[2]))
    return steps, outputs


def gradient_tensors(p: Problem, needs: Needs) -> tuple[Tensor, ...]:
    """Dense, each in its tensor's dtype; empty where not wanted."""

    def like(x: Tensor | None, need: bool, shape=None) -> Tensor:
        return x.new_empty(x.shape if shape is None else shape) if need else p.u.new_empty(0)

    shape = None
    if p.form == "single":
        shape = p.weight.shape[1:]
    return (
        like(p.u, needs.u),
        like(p.weight, needs.weight, shape),
        like(p.bias, needs.bias),
        like(p.logits, needs.logits),
    )


def start_step(p: Problem, grad_v: Tensor, s: Tensor, chain: Chain, R: int, eps: float, squash: bool = True) -> Launch:
    static, grid, warps = p.finish()
    traffic = s.nbytes + grad_v.numel() * grad_v.itemsize + chain.V.nbytes + slope_traffic(p, grid)
    if p.keys:
        traffic += (R - 1) * (grid[0] * p.J * p.O * p.D * p.weight.itemsize + p.state())
    weight = p.weight if p.keys else None
    args = (grad_v, s, weight, p.bias, None, chain.V, chain.ds, chain.queries, chain.slopes, chain.columns, p.B, R, eps)
    strides = (*p.weight_strides, *grad_v.stride())
    return Launch(backward.start, grid, (*args, strides), {"SQUASH": squash, "P": static}, warps, traffic)


def slope_traffic(p: Problem, grid) -> int:
    """Of `backward.store_slope`."""
    total = p.B * p.J * p.O * p.dtype.itemsize
    if p.over_inputs:
        total += p.B * p.J * p.dtype.itemsize + (grid[0] * p.bias.nbytes if p.bias is not None else 0)
    if p.keys:
        total += grid[0] * p.J * p.O * p.D * p.weight.itemsize + p.state()
    return total


def step_step(p: Problem, parts: Tensor, s: Tensor, dV: Tensor, chain: Chain, k: int, R: int, eps: float) -> Launch:
    static, grid, warps = p.finish()
    static = replace(static, over_inputs=p.over_inputs)
    numbers = p.B * p.J * p.O * p.dtype.itemsize
    first = k == R - 2
    traffic = parts.nbytes + numbers * (2 if first else 3) + slope_traffic(p, grid)
    if p.keys:
        traffic += grid[0] * p.J * p.O * p.D * p.weight.itemsize
    weight = p.weight if p.keys else None
    args = (parts, s, weight, p.bias, dV, chain.ds, chain.slopes, chain.columns, k, p.B, len(parts), eps)
    constants = {"FIRST": first, "P": static}
    return Launch(backward.step, grid, (*args, p.weight_strides), constants, warps, traffic)


def chain_traffic(p: Problem, static: Static, grid, k: int) -> int:
    """Of V^(k-1), ds^k and the statistics, as a stream in tiles of samples reads them in pass k."""
    total = grid[2] * p.state() * (2 if k > 0 else 1)
    if p.over_inputs:
        total += 2 * p.B * p.I * p.J * p.dtype.itemsize  # of each i again: a cache serves them
    elif static.tiled:
        total += 3 * grid[1] * p.B * p.I * p.dtype.itemsize
    return total


def slope_rows(p: Problem, chain: Chain, k: int) -> list[Step]:
    static, grid, warps = p.stream(p.tuning.backward)
    parts = p.empty(grid[1], 3, p.B, p.I)
    traffic = p.read(static) + parts.nbytes + grid[2] * p.state() * (2 if k > 0 else 1)
    own = replace(static, leaky=False)
    weight = p.weight if static.pair else None
    args = (p.u, weight, p.logits, p.mask, chain.queries, chain.slopes, parts, k, p.B, p.I, p.strides, own)
    return [Launch(backward.rows, grid, args, {}, warps, traffic), merge_step(p, static, parts, chain.rows[k])]


class KeyWeight(NamedTuple):
    """dW_j = sum over k, b of ds^k_j (sum_i p_ij u_i)^T + V^(k-1)_j (sum_i db_ij u_i)^T."""

    sums: Tensor  # [R, B, J, D]: sum_i p_ij u_i
    slopes: Tensor  # [R - 1, B, J, D]: sum_i db_ij u_i

    @classmethod
    def empty(cls, p: Problem, R: int) -> KeyWeight:
        return cls(p.empty(R, p.B, p.J, p.D), p.empty(R - 1, p.B, p.J, p.D))

    def steps(self, p: Problem, chain: Chain, first: int, R: int, detach: bool, out: Tensor) -> list[Step]:
        products = [(chain.ds[first:], self.sums[first:])]
        if not detach and R > 1:
            products.append((chain.V, self.slopes))
        static = p.finish()[0]
        J = p.J if p.form == "output" else 1
        rows = [x.shape[0] * p.B * p.J // J for x, _ in products]
        static = replace(static, J=J, OB=min(static.OB, 32), DB=min(static.DB, 32))
        tiles = ceil(p.O, static.OB) * ceil(p.D, static.DB)
        share = max(64, ceil(rows[0], ceil(p.tuning.programs, J * tiles)))
        parts = p.empty(sum(ceil(n, share) for n in rows), J, p.O, p.D)
        steps, done = [], 0
        for (x, y), n in zip(products, rows, strict=True):
            shares = ceil(n, share)
            to = parts[done : done + shares]
            done += shares
            traffic = to.nbytes + x.nbytes * ceil(p.D, static.DB) + y.nbytes * ceil(p.O, static.OB)
            steps.append(Launch(backward.outer, (J, tiles, shares), (x, y, to, n, share, static), {}, 4, traffic))
        return [*steps, Sum(parts, out)]


def pass_backward(p: Problem, chain: Chain, k: int, of_weight: KeyWeight | None, needed: bool):
    """The stream of pass k: the steps, and sum over i of db_ij h_ij in parts [groups, B, J, X]."""
    static, grid, warps = p.stream(p.tuning.backward)
    static = replace(static, need_weight=of_weight is not None)
    parts = p.empty(grid[2], p.B, p.J, p.X)
    sums = torch.empty_like(parts) if of_weight is not None else None
    traffic = p.read(static) + chain_traffic(p, static, grid, k) + parts.nbytes * (1 if of_weight is None else 2)
    rows, lse, columns = chain.statistics
    weight = p.weight if static.pair else None
    args = (p.u, weight, p.logits, p.mask, chain.queries, chain.slopes, rows, lse, columns, parts, sums, k, p.B, p.I)
    steps: list[Step] = [Launch(backward.pass_, grid, (*args, p.strides, static), {}, warps, traffic)]
    if of_weight is not None:
        steps.append(Sum(sums, of_weight.sums[k]))
        if needed:
            steps.append(Sum(parts, of_weight.slopes[k - 1]))
            parts = of_weight.slopes[k - 1][None]
    return steps, parts


def gradient_tile(p: Problem) -> tuning.Tile:
    return tuning.gradient_tile(p.tuning, p.I, p.J, p.X, p.D if p.form == "pair" else 1, p.dtype.itemsize)


def gradient_steps(p, chain, tile, first, R, detach, needs, outputs) -> list[Step]:
    """The last stream and the sums of its parts."""
    du, dweight, _, dlogits = outputs
    of_pairs = needs.weight and p.form == "pair"
    if not (needs.u or of_pairs or needs.logits) or (p.I == 0 and not needs.logits):
        return []
    static, _, _ = p.stream(p.tuning.backward)
    tiles = max(1, ceil(p.I, tile.rows)), ceil(p.J, tile.outputs)
    share = ceil(p.B, max(1, min(ceil(p.tuning.programs, tiles[0] * tiles[1]), ceil(p.B, p.tuning.share))))
    shares = ceil(p.B, share)
    kept = ""
    if needs.logits:
        own = "".join(letter for letter, n, size in zip("bi", p.logits.shape, (p.B, p.I)) if n == size and n != 1)
        kept = own or "j"
    static = replace(
        static, TB=tile.rows, JB=tile.outputs, XB=tile.features, tiled=p.tiled(tile.outputs), need_u=needs.u,
        need_weight=of_pairs, need_logits=kept, detach=detach,
    )  # fmt: skip
    after: list[Step] = []

    def target(out: Tensor, count: int, *shape: int) -> Tensor:
        """`out` itself, or where it is a sum, its parts."""
        if count == 1 and out.numel() == torch.Size(shape).numel():
            return out
        parts = p.empty(count, *shape)
        after.append(Sum(parts, out))
        return parts

    to_u = to_weight = to_logits = None
    if needs.u:
        split = 1 if p.form == "votes" else tiles[1]
        to_u = target(du, split, *p.u.shape)
    if of_pairs:
        to_weight = target(dweight, shares, *p.weight.shape)
    if needs.logits:
        shape = {"bi": (1, p.B, p.I, p.J), "b": (tiles[0], p.B, p.J), "i": (shares, p.I, p.J), "j": (shares * tiles[0], p.J)}
        to_logits = target(dlogits, *shape[kept])
    rows, lse, columns = chain.statistics
    weight = p.weight if static.pair else None
    args = (
        p.u, weight, p.logits, p.mask, chain.queries, chain.slopes, rows, lse, columns, to_u, to_weight, to_logits,
        first, R, p.B, p.I, share, p.strides, static,
    )  # fmt: skip
    passes = range(first, R)
    traffic = p.read_by_inputs(static, tiles[1], shares) + sum(
        tiles[0] * p.state() * (2 if k > 0 else 1) for k in passes
    )
    if p.over_inputs:
        traffic += len(passes) * 2 * tiles[0] * p.B * p.J * p.dtype.itemsize
    elif static.tiled:
        traffic += len(passes) * 3 * tiles[1] * p.B * p.I * p.dtype.itemsize
    traffic += sum(x.nbytes for x in (to_u, to_weight, to_logits) if x is not None)
    return [Launch(backward.gradients, (*tiles, shares), args, {}, tile.warps, traffic), *after]
