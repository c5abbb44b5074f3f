"""The steps of the backward: one stream for each pass from the last to the second, then one for all gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from . import tuning
from .forward import Parts, finish, merge_rows, stream_query
from .kernels import backward as kernels
from .kernels import gradients
from .problem import Grid, Launch, Problem, Step, Sum, TakesPart
from .tuning import divide_up

# Features of an input capsule up to which the last stream holds W_i in a tensor for each, and so adds up a vote in the
# order of the other streams. Beyond, it would hold more tensors than registers: 64 spilled.
EACH = 16


class Needs(NamedTuple):
    """Which gradients are wanted; third: the bias, or the query of one pass."""

    u: bool
    weight: bool
    third: bool
    logits: bool


class Statistics(NamedTuple):
    """Of the softmax of each pass, where one tile cannot know them: m, the sum of exp(b - m), and T. [R, B, J] where it
    runs over i, [R, B, I] where it runs over j and J takes several tiles.
    """

    tops: Tensor | None = None
    totals: Tensor | None = None
    means: Tensor | None = None


@dataclass
class Chain:
    """What the streams read, by pass k from 0."""

    R: int
    given: bool  # V^0 is a query
    V: Tensor  # [R - 1, B, J, O], from V^1; or the query [1, B, J, O]
    ds: Tensor  # [R, B, J, O]
    queries: Tensor  # V, for keys W^T V [.., B, J, D]
    slopes: Tensor  # ds, for keys W^T ds
    statistics: Statistics
    rows: bool

    @classmethod
    def empty(cls, p: Problem, R: int, norm: Tensor, query: Tensor | None = None) -> Chain:
        rows = p.tiled(gradient_tile(p)) or p.backward()[0].tiled
        if p.over_inputs:
            statistics = Statistics(*norm, p.empty(R, p.B, p.J))
        else:
            statistics = Statistics(*p.empty(3, R, p.B, p.I)) if rows else Statistics()
        V = p.empty(R - 1, p.B, p.J, p.O) if query is None else query.contiguous()[None]
        ds = p.empty(R, p.B, p.J, p.O)
        queries = p.empty(len(V), p.B, p.J, p.D) if p.keys else V
        slopes = p.empty(R, p.B, p.J, p.D) if p.keys else ds
        return cls(R, query is not None, V, ds, queries, slopes, statistics, rows)

    def read_bytes(self, p: Problem, k: int) -> int:
        """Of V and ds that a stream of pass k reads once."""
        return p.state_bytes * (2 if k > 0 or self.given else 1)


def route_backward(
    p: Problem, grad_v: Tensor, s: Tensor, norm: Tensor, R: int, eps: float, needs: Needs
) -> tuple[list[Step], tuple[Tensor, ...]]:
    """The steps, and the gradients of u, weight, bias and logits, which they fill, the weight's [I, D, J, O]."""
    results = empty_gradients(p, p.bias, needs)
    if p.B == 0:
        return zeros(results), results
    chain = Chain.empty(p, R, norm)
    steps: list[Step] = [start(p, grad_v, s, chain, eps)]
    of_weight = KeyWeight.empty(p, R) if p.keys and needs.weight else None
    dV = p.empty(p.B, p.J, p.O)
    for k in reversed(range(R)):
        steps += rows_of(p, chain, k) if chain.rows else []
        if k > 0 or of_weight is not None:
            streamed, parts = stream(p, chain, k, of_weight)
            steps += streamed
        if k > 0:
            steps.append(between(p, parts, s, dV, chain, k - 1, eps))
    steps += last_stream(p, chain, needs, results)
    if of_weight is not None:
        steps += of_weight.steps(p, chain, results[1])
    if needs.third:
        steps.append(Sum(chain.ds.view(-1, p.J, p.O), results[2]))
    return steps, results


def routing_pass_backward(
    p: Problem, grad_s: Tensor, s: Tensor, norm: Tensor, query: Tensor | None, needs: Needs
) -> tuple[list[Step], tuple[Tensor, ...]]:
    """Likewise of one pass; the third gradient is the query's, [B, J, O] in the accumulation type."""
    results = empty_gradients(p, query, needs)
    if p.B == 0:
        return zeros(results), results
    chain = Chain.empty(p, 1, norm, query)
    steps: list[Step] = []
    if query is not None:
        steps, read = stream_query(p, chain.V[0])
        chain.queries = read[None]
    steps.append(start(p, grad_s, s, chain))
    steps += rows_of(p, chain, 0) if chain.rows else []
    of_weight = KeyWeight.empty(p, 1 + chain.given) if p.keys and needs.weight else None
    if needs.third or of_weight is not None:
        streamed, parts = stream(p, chain, 0, of_weight)
        steps += streamed
        if needs.third:
            steps.append(finish(p, Parts(parts, None), results[2], None))
    steps += last_stream(p, chain, needs, results)
    if of_weight is not None:
        steps += of_weight.steps(p, chain, results[1])
    return steps, results


def empty_gradients(p: Problem, third: Tensor | None, needs: Needs) -> tuple[Tensor, ...]:
    """Dense, each in its tensor's dtype; empty where not wanted."""
    shapes = (
        p.u.shape,
        p.weight_shape,
        () if third is None else third.shape,
        () if p.logits is None else p.logits.shape,
    )
    tensors = (p.u, p.weight, third, p.logits)
    return tuple(
        x.new_empty(shape) if need else p.u.new_empty(0) for x, shape, need in zip(tensors, shapes, needs, strict=True)
    )


def zeros(results: tuple[Tensor, ...]) -> list[Step]:
    """Sums over no samples."""
    return [Sum(x.new_empty(0, *x.shape), x) for x in results if x.numel()]


def start(p: Problem, grad: Tensor, s: Tensor, chain: Chain, eps: float | None = None) -> Launch:
    """V^1 .. V^(R-1) and ds^R; without eps there is no squash, and ds is grad."""
    static, grid, warps = p.between()
    squash = eps is not None
    traffic = p.output_bytes // p.itemsize * grad.itemsize + ds_bytes(p, grid)
    traffic += chain.R * p.output_bytes if squash else p.output_bytes if p.over_inputs else 0
    if squash:
        traffic += chain.V.nbytes
        traffic += (chain.R - 1) * (grid[0] * p.key_weight_bytes + p.state_bytes) if p.keys else 0
    args = (grad, s, p.key_weight, p.bias, chain.V, chain.ds, chain.queries, chain.slopes, chain.statistics.means)
    strides = (*p.weight_strides, *grad.stride())
    args = (*args, p.B, chain.R, eps or 0.0, strides, squash, static)
    return Launch(kernels.start, grid, args, warps, traffic)


def ds_bytes(p: Problem, grid: Grid) -> int:
    """Of `kernels.store_ds`: ds, over i also T, for keys also W^T ds."""
    total = p.output_bytes
    if p.over_inputs:
        total += p.B * p.J * p.itemsize + (grid[0] * p.bias.nbytes if p.bias is not None else 0)
    return total + (grid[0] * p.key_weight_bytes + p.state_bytes if p.keys else 0)


def between(p: Problem, parts: Tensor, s: Tensor, dV: Tensor, chain: Chain, k: int, eps: float) -> Launch:
    """dV^k and ds^k from the parts of the stream of pass k + 1."""
    static, grid, warps = p.between()
    first = k == chain.R - 2  # nothing is in dV yet
    traffic = parts.nbytes + p.output_bytes * (2 if first else 3) + ds_bytes(p, grid)
    traffic += grid[0] * p.key_weight_bytes
    args = (parts, s, p.key_weight, p.bias, dV, chain.ds, chain.slopes, chain.statistics.means, k, p.B, len(parts), eps)
    return Launch(kernels.between, grid, (*args, p.weight_strides, first, static), warps, traffic)


def rows_of(p: Problem, chain: Chain, k: int) -> list[Step]:
    """The statistics of pass k over all j: those of each tile, then of all."""
    static, grid, warps = p.backward()
    static = static.but(given=chain.given)
    parts = p.scratch("rows of tiles", grid[1], 3, p.B, p.I)
    traffic = p.read_bytes(grid) + parts.nbytes + grid[2] * chain.read_bytes(p, k)
    of_tile = static.but(leaky=False)
    args = (p.u, p.pair_weight, p.logits, p.mask, chain.queries, chain.slopes, parts, k, p.B, p.I, p.strides, of_tile)
    return [
        Launch(kernels.rows, grid, args, warps, traffic),
        merge_rows(p, static, parts, [x[k] for x in chain.statistics]),
    ]


def stream(p: Problem, chain: Chain, k: int, of_weight: KeyWeight | None) -> tuple[list[Step], Tensor]:
    """The stream of pass k, and sum over i of db_ij h_ij in parts [groups, B, J, X]."""
    static, grid, warps = p.backward()
    static = static.but(need_weight=of_weight is not None, given=chain.given)
    parts = p.scratch("parts", grid[2], p.B, p.J, p.X)
    sums = p.scratch("sums", *parts.shape) if of_weight is not None else None
    traffic = p.read_bytes(grid) + grid[2] * chain.read_bytes(p, k) + parts.nbytes * (1 if sums is None else 2)
    if p.over_inputs:
        traffic += 3 * p.B * p.I * p.J * p.itemsize  # at each i again, served by the cache
    elif static.tiled:
        traffic += 3 * grid[1] * p.B * p.I * p.itemsize
    args = (p.u, p.pair_weight, p.logits, p.mask, chain.queries, chain.slopes, *chain.statistics, parts, sums)
    steps: list[Step] = [Launch(kernels.pass_, grid, (*args, k, p.B, p.I, p.strides, static), warps, traffic)]
    if of_weight is not None:
        steps.append(Sum(sums, of_weight.sum_p[k]))
        at = k - 1 + chain.given
        if at >= 0:
            steps.append(Sum(parts, of_weight.sum_db[at]))
            parts = of_weight.sum_db[at][None]
    return steps, parts


class KeyWeight(NamedTuple):
    """dW_j = sum over k, b of ds^k_j (sum_i p_ij u_i)^T + V^(k-1)_j (sum_i db_ij u_i)^T, of the b, j of which any pair
    takes part: of the others ds or a query may be NaN.
    """

    sum_p: Tensor  # [R, B, J, D]: sum_i p_ij u_i
    sum_db: Tensor  # as Chain.V: sum_i db_ij u_i

    @classmethod
    def empty(cls, p: Problem, R: int) -> KeyWeight:
        return cls(p.empty(R, p.B, p.J, p.D), p.empty(R - 1, p.B, p.J, p.D))

    def steps(self, p: Problem, chain: Chain, out: Tensor) -> list[Step]:
        products = [(chain.ds, self.sum_p[: chain.R])]
        if len(self.sum_db):
            products.append((chain.V, self.sum_db))
        static = p.between()[0]
        J = p.J if p.form == "output" else 1  # one weight for all j: they are rows as samples are
        static = static.but(J=J, OB=min(static.OB, 32), DB=min(static.DB, 32))
        across = divide_up(p.D, static.DB), divide_up(p.O, static.OB)
        counts = [x.numel() // (J * p.O) for x, _ in products]
        share = tuning.share(p.tuning, counts[0], J * across[0] * across[1])
        parts = p.empty(sum(divide_up(count, share) for count in counts), J, p.O, p.D)
        takes_part = TakesPart.of(p, max(len(x) for x, _ in products))
        steps: list[Step] = [] if takes_part is None else [takes_part]
        flags = None if takes_part is None else takes_part.out
        done = 0
        for (x, y), count in zip(products, counts, strict=True):
            shares = divide_up(count, share)
            to = parts[done : done + shares]
            done += shares
            grid = (J, across[0] * across[1], shares)
            traffic = to.nbytes + x.nbytes * across[0] + y.nbytes * across[1]
            traffic += count * J * across[0] * across[1] if flags is not None else 0
            steps.append(Launch(gradients.outer, grid, (x, y, flags, to, count, share, static), 4, traffic))
        return [*steps, Sum(parts, out)]


def gradient_tile(p: Problem) -> tuning.Tile:
    narrow = p.u.itemsize < p.itemsize
    return tuning.gradient_tile(p.tuning, p.I, p.J, p.X, p.D if p.form == "pair" else 1, p.itemsize, narrow)


def last_stream(p: Problem, chain: Chain, needs: Needs, results) -> list[Step]:
    """The gradients of u, a pair weight and the logits, and the sums of their parts."""
    du, dweight, _, dlogits = results
    of_pairs = needs.weight and p.form == "pair"
    if not (needs.u or of_pairs or needs.logits):
        return []
    tile = gradient_tile(p)
    tiles = max(1, divide_up(p.I, tile.rows)), divide_up(p.J, tile.outputs)
    kept = "".join(letter for letter, n in zip("bi", dlogits.shape[:2], strict=True) if n != 1) if needs.logits else ""
    kept = kept or ("j" if needs.logits else "")
    if p.form == "pair" or kept in ("i", "j"):
        share = tuning.share(p.tuning, p.B, tiles[0] * tiles[1])
    else:  # no weight is read for a share, and nothing summed over samples: more programs fill a GPU
        share = max(min(p.tuning.fewest, p.B), divide_up(p.B, tuning.MOST))
    grid = (*tiles, divide_up(p.B, share))
    static = p.backward()[0].but(TB=tile.rows, JB=tile.outputs, XB=tile.features, tiled=p.tiled(tile),
        held=1 if p.D <= EACH else p.backward()[0].DB,
        near=False, given=chain.given, moves=chain.R > 1 or chain.given or needs.logits,
        need_u=needs.u, need_weight=of_pairs, need_logits=kept,
    )  # fmt: skip
    sums: list[Step] = []

    def target(out: Tensor, parts: int, *shape: int) -> Tensor:
        """Where a program stores: the gradient itself, or what must be added to give it."""
        if parts == 1:
            return out
        added = p.empty(parts, *shape)
        sums.append(Sum(added, out))
        return added

    to_u = target(du, 1 if p.form == "votes" else grid[1], *p.u.shape) if needs.u else None
    to_weight = target(dweight, grid[2], *p.weight.shape) if of_pairs else None
    to_logits = None
    if needs.logits:
        size = {"bi": (1,), "b": (grid[0], p.B, p.J), "i": (grid[2], p.I, p.J), "j": (grid[2] * grid[0], p.J)}[kept]
        to_logits = target(dlogits, *size)
    traffic = p.pair_bytes(grid[1])
    traffic += p.vote_bytes(grid[1], grid[2]) if static.moves or static.pair else 0
    traffic += sum(grid[0] * chain.read_bytes(p, k) for k in range(chain.R))
    if p.over_inputs:
        traffic += chain.R * 3 * grid[0] * p.B * p.J * p.itemsize
    elif static.tiled:
        traffic += chain.R * 3 * grid[1] * p.B * p.I * p.itemsize
    traffic += sum(x.nbytes for x in (to_u, to_weight, to_logits) if x is not None)
    args = (p.u, p.pair_weight, p.logits, p.mask, chain.queries, chain.slopes, *chain.statistics)
    args = (*args, to_u, to_weight, to_logits, chain.R, p.B, p.I, share, p.strides, static)
    return [Launch(gradients.gradients, grid, args, tile.warps, traffic), *sums]
