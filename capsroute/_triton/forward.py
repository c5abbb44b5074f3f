"""The steps of the forward: one launch for a small problem, else two for each pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .kernels import forward as kernels
from .kernels.stream import Static
from .problem import Grid, Launch, Problem, Step
from .tuning import divide_up


class Parts(NamedTuple):
    """What a stream leaves: s in parts [groups, B, J, X] and, over i, their maxima and sums [2, groups, B, J]."""

    s: Tensor
    online: Tensor | None


class Pairs(NamedTuple):
    """What a pass leaves of every pair, each [B, I, J] or None: its logits, prior ones included, and its coupling."""

    logits: Tensor | None = None
    coupling: Tensor | None = None


class Norm(NamedTuple):
    """Of the softmax over i: the maximum of the logits and the sum of exp(logit - maximum), each [saved, B, J] or, of
    one pass, [B, J].
    """

    tops: Tensor
    totals: Tensor

    def of_pass(self, k: int) -> Norm:
        return Norm(self.tops[k], self.totals[k])


def route(
    p: Problem, R: int, eps: float, save: int, return_coupling: bool
) -> tuple[list[Step], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """The steps of all passes, and (v, s, norm, last_logits, coupling), which they fill; s and norm of the last `save`
    passes.
    """
    v = p.u.new_empty(p.B, p.J, p.O)
    s = p.empty(*((save, p.B, p.J, p.O) if save else (0,)))
    norm = p.empty(*((2, save, p.B, p.J) if save and p.over_inputs else (0,)))
    last_logits = p.empty(*((p.B, p.I, p.J) if 0 < save < R else (0,)))
    coupling = p.u.new_empty((p.B, p.I, p.J) if return_coupling else (0,))
    results = v, s, norm, last_logits, coupling
    if p.B == 0:
        return [], results
    wanted = Pairs(*(x if x.numel() else None for x in (last_logits, coupling)))
    static, grid, _ = p.forward()
    # With keys the tile must hold v as well, and the logits' addresses are more than the registers hold besides.
    fits = not p.keys or (static.OB <= static.XB and wanted.logits is None)
    if grid[1:] == (1, 1) and fits and not (p.over_inputs and return_coupling):
        return [whole(p, R, eps, v, s, norm, wanted)], results
    V = p.empty(p.B, p.J, p.O)
    query = p.empty(p.B, p.J, p.X) if p.keys else V
    norms = Norm(*norm) if norm.numel() else None
    steps: list[Step] = []
    for k in range(R):
        last, kept = k == R - 1, k - (R - save)
        given = query if k > 0 else None
        steps += one_pass(
            p, given, s[kept] if kept >= 0 else None, norms.of_pass(kept) if norms and kept >= 0 else None,
            wanted if last else Pairs(),
            Squash(V, v, query if p.keys else None, eps, first=k == 0, last=last),
        )  # fmt: skip
    return steps, results


def routing_pass(
    p: Problem, query: Tensor | None, save: bool, return_coupling: bool
) -> tuple[list[Step], tuple[Tensor, Tensor, Tensor]]:
    """The steps of one pass from a query [B, J, O], and (s, norm, coupling), which they fill."""
    s = p.empty(p.B, p.J, p.O)
    norm = p.empty(*((2, 1, p.B, p.J) if save and p.over_inputs else (0,)))
    coupling = p.u.new_empty((p.B, p.I, p.J) if return_coupling else (0,))
    if p.B == 0:
        return [], (s, norm, coupling)
    steps, query = stream_query(p, query)
    norms = Norm(*norm).of_pass(0) if norm.numel() else None
    steps += one_pass(p, query, s, norms, Pairs(None, coupling if coupling.numel() else None))
    return steps, (s, norm, coupling)


def stream_query(p: Problem, query: Tensor | None) -> tuple[list[Step], Tensor | None]:
    """The query as the streams read it: dense, and for keys W_j^T q_j."""
    if query is None:
        return [], None
    query = query.contiguous()
    if not p.keys:
        return [], query
    static, grid, warps = p.between()
    of_keys = p.empty(p.B, p.J, p.D)
    traffic = query.nbytes + grid[0] * p.key_weight_bytes + of_keys.nbytes
    args = (query, p.key_weight, of_keys, p.B, p.weight_strides, static)
    return [Launch(kernels.key_query, grid, args, warps, traffic)], of_keys


class Squash(NamedTuple):
    """What follows a pass: v of the last, else V += v, and for keys the next query."""

    V: Tensor
    v: Tensor
    query: Tensor | None
    eps: float
    first: bool
    last: bool


def one_pass(
    p: Problem, V: Tensor | None, s: Tensor | None, norm: Norm | None, wanted: Pairs, squash: Squash | None = None
) -> list[Step]:
    """A stream over i with the query V, and what comes after it; V as the streams read it."""
    afterwards = p.over_inputs and wanted.coupling is not None
    if afterwards and norm is None:
        norm = Norm(*p.empty(2, p.B, p.J))
    steps, parts = stream(p, V, wanted._replace(coupling=None) if afterwards else wanted)
    steps.append(finish(p, parts, s, norm, squash))
    if afterwards:
        steps.append(column_coupling(p, V, norm, wanted.coupling))
    return steps


def whole(p: Problem, R: int, eps: float, v: Tensor, s: Tensor, norm: Tensor, wanted: Pairs) -> Launch:
    """All passes in one launch."""
    static, grid, warps = p.forward(wanted.logits is not None)
    static = static.but(unrolled=False)  # it spilled
    traffic = R * p.read_bytes(grid) + sum(x.nbytes for x in (v, s, norm, *wanted) if x is not None)
    traffic += grid[0] * p.bias.nbytes if p.bias is not None else 0
    turned = p.empty(2, p.B, p.J, p.D) if p.keys else None
    if p.keys:  # sums through W in each pass, queries between them
        traffic += (2 * R - 1) * (grid[0] * p.key_weight_bytes + 2 * p.state_bytes)
    norms = norm if norm.numel() else (None, None)
    save = len(s)
    args = (p.u, p.weight, p.bias, p.logits, p.mask, v, s, *norms, *wanted, turned)
    args = (*args, p.B, p.I, R, R - save, eps, p.strides, p.weight_strides)
    return Launch(kernels.route, grid, (*args, save > 0, static), warps, traffic)


def stream(p: Problem, V: Tensor | None, wanted: Pairs) -> tuple[list[Step], Parts]:
    """The stream itself, with the two steps before it where a softmax over j spans several tiles."""
    static, grid, warps = p.forward(wanted.logits is not None)
    static = static.but(query=V is not None)
    steps, rows = rows_of(p, static, grid, warps, V) if static.tiled else ([], (None, None))
    online = p.scratch("online", 2, grid[2], p.B, p.J) if p.over_inputs else None
    parts = Parts(p.scratch("parts", grid[2], p.B, p.J, p.X), online)
    traffic = p.read_bytes(grid) + sum(x.nbytes for x in (*parts, *wanted) if x is not None)
    traffic += grid[2] * p.state_bytes if V is not None else 0
    traffic += 2 * grid[1] * p.B * p.I * p.itemsize if static.tiled else 0
    args = (p.u, p.pair_weight, p.logits, p.mask, V, *rows, *wanted, *parts, p.B, p.I, p.strides, static)
    return [*steps, Launch(kernels.pass_, grid, args, warps, traffic)], parts


def rows_of(p: Problem, static: Static, grid: Grid, warps: int, V: Tensor | None) -> tuple[list[Step], list[Tensor]]:
    """Maximum and sum [B, I] of the softmax over j: those of each tile, then of all."""
    parts = p.scratch("rows of tiles", grid[1], 2, p.B, p.I)
    traffic = p.pair_bytes(grid[1]) + parts.nbytes
    traffic += p.vote_bytes(grid[1], grid[0]) + grid[2] * p.state_bytes if V is not None else 0
    of_tile = static.but(leaky=False)
    args = (p.u, p.pair_weight, p.logits, p.mask, V, parts, p.B, p.I, p.strides, of_tile)
    rows = list(p.scratch("rows", 2, p.B, p.I))
    return [Launch(kernels.rows, grid, args, warps, traffic), merge_rows(p, static, parts, [*rows, None])], rows


def merge_rows(p: Problem, static: Static, parts: Tensor, rows: list[Tensor | None]) -> Launch:
    """The statistics of all tiles from those of each, parts [tiles, 2 or 3, B, I]."""
    count, kinds = p.B * p.I, parts.shape[1]
    static = static.but(means=kinds == 3, query=True)
    traffic = parts.nbytes * (kinds + 1) // kinds + kinds * count * p.itemsize
    grid = (max(1, divide_up(count, static.width)), 1, 1)
    return Launch(kernels.merge_rows, grid, (parts, *rows, count, len(parts), static), 4, traffic)


def finish(p: Problem, parts: Parts, s: Tensor | None, norm: Norm | None, squash: Squash | None = None) -> Launch:
    """s from its parts, and what follows."""
    static, grid, warps = p.between()
    groups = len(parts.s)
    static = static.but(query=squash is not None and not squash.first)
    last = squash is not None and squash.last
    traffic = parts.s.nbytes + (0 if s is None else s.nbytes) + grid[0] * p.key_weight_bytes
    traffic += grid[0] * p.bias.nbytes if p.bias is not None else 0
    if parts.online is not None:  # the maxima twice, and again for each number of a key
        again = 2 + (p.D if p.keys else 1)
        traffic += parts.online.nbytes // 2 * (1 + again) + (2 * norm.tops.nbytes if norm else 0)
    if last:
        traffic += squash.v.nbytes
    elif squash is not None:
        traffic += p.output_bytes * (1 if squash.first else 2)
        traffic += grid[0] * p.key_weight_bytes + p.state_bytes if p.keys else 0
    V, v, query, eps, *_ = squash or (None, None, None, 0.0)
    args = (*parts, p.key_weight, p.bias, V, s, v, *(norm or (None, None)), query, p.B, groups, eps, p.weight_strides)
    return Launch(kernels.finish, grid, (*args, squash is not None, last, s is not None, static), warps, traffic)


def column_coupling(p: Problem, V: Tensor | None, norm: Norm, coupling: Tensor) -> Launch:
    """The coupling where the softmax runs over i, from its totals."""
    warps, per_thread = p.tuning.loaded
    static, grid, warps = p.stream((warps, per_thread // 2))  # with as many as the stream it spilled
    static = static.but(query=V is not None)
    traffic = p.pair_bytes(grid[1]) + coupling.nbytes + 2 * grid[2] * norm.tops.nbytes
    traffic += p.vote_bytes(grid[1], grid[0]) + grid[2] * p.state_bytes if V is not None else 0
    args = (p.u, p.pair_weight, p.logits, p.mask, V, *norm, coupling, p.B, p.I, p.strides, static)
    return Launch(kernels.column_coupling, grid, args, warps, traffic)
