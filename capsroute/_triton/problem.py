"""A call's tensors as the kernels read them, its sizes and tiles, and what a launch is.

Beside every launch stands the number of bytes that it loads and stores. It counts every load and store of a program,
those that a cache would serve included, and supposes that nothing is masked or forbidden.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype, out_capsules
from . import tuning
from .kernels.stream import Static
from .tuning import divide_up

ACCUMULATION = {torch.float32: tl.float32, torch.float64: tl.float64}
Grid = tuple[int, int, int]
UNROLLED = 16  # features of an input capsule up to which the loop over them may be


class Launch(NamedTuple):
    """One kernel on one grid."""

    kernel: Any
    grid: Grid
    args: tuple
    warps: int
    traffic: int  # bytes loaded and stored

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told: no fused multiply-add but the explicit ones, see `kernels.stream`."""
        return {"num_warps": self.warps, "num_stages": 1, "enable_fp_fusion": False}

    def run(self) -> None:
        self.kernel[self.grid](*self.args, **self.options)


class Sum(NamedTuple):
    """out = sum of parts over their first dimension, by torch, in a fixed order."""

    parts: Tensor
    out: Tensor

    @property
    def traffic(self) -> int:
        return self.parts.nbytes + self.out.nbytes

    def run(self) -> None:
        self.out.copy_(self.parts.sum(0).view(self.out.shape))


class TakesPart(NamedTuple):
    """out [n, B, J]: whether any pair of an output capsule takes part, by torch. A masked pair counts as one that does,
    unless the softmax runs over i.
    """

    p: Problem
    out: Tensor  # of bytes

    @classmethod
    def of(cls, p: Problem, n: int) -> TakesPart | None:
        """None where all do."""
        if p.logits is None and not (p.over_inputs and p.mask is not None):
            return None
        return cls(p, p.u.new_empty(n, p.B, p.J, dtype=torch.uint8))

    @property
    def traffic(self) -> int:
        return self.out.nbytes + sum(x.nbytes for x in (self.p.logits, self.p.mask) if x is not None)

    def run(self) -> None:
        p, some = self.p, self.out.new_ones(1, 1, 1, dtype=torch.bool)
        if p.logits is not None:
            some = p.logits != -torch.inf
        if p.mask is not None:
            kept = p.mask.bool()[:, :, None]
            some = some & kept if p.over_inputs else some | ~kept
        self.out.copy_(some.expand(-1, p.I, -1).any(1))


Step = Launch | Sum | TakesPart


def run(steps: list[Step]) -> None:
    """On the current stream. Nothing here waits for the device, so that a CUDA graph can capture it."""
    for step in steps:
        step.run()


class Kind(NamedTuple):
    """What tiles and compiled kernels follow from."""

    tuning: tuning.Tuning
    form: str
    B: int
    I: int
    D: int
    J: int
    O: int
    X: int
    dtype: torch.dtype  # that sums are made in
    over_inputs: bool
    leaky: bool
    mask: bool
    logits: bool
    of_samples: int  # numbers from one sample, or output capsule, to the next, at most
    of_outputs: int


@functools.lru_cache(1024)
def _stream(kind: Kind, shape: tuple[int, int], unrolled: bool) -> tuple[Static, Grid, int]:
    pair, J = kind.form == "pair", kind.J
    group = tuning.group(kind.tuning, kind.I, J, kind.X, kind.D if pair else 1)
    groups = max(1, divide_up(kind.I, group))
    tile = tuning.tile(kind.tuning, shape, kind.B, J, kind.X, kind.dtype.itemsize, groups)
    static = Static(
        acc=ACCUMULATION[kind.dtype],
        J=J,
        O=kind.O,
        D=kind.D,
        X=kind.X,
        TB=tile.rows,
        JB=tile.outputs,
        XB=tile.features,
        OB=tuning.power_of_two(kind.O),
        DB=tuning.power_of_two(max(kind.D, 1)),
        group=group,
        pair=pair,
        keys=kind.form in ("output", "single"),
        over_inputs=kind.over_inputs,
        leaky=kind.leaky,
        mask=kind.mask,
        logits=kind.logits,
        tiled=tile.outputs < J and not kind.over_inputs,
        unrolled=pair and kind.D <= UNROLLED and unrolled,
        near=max(tile.rows * kind.of_samples, J * kind.of_outputs) < 2**31,
    )
    return static, (divide_up(kind.B, tile.rows), divide_up(J, tile.outputs), groups), tile.warps


@functools.lru_cache(1024)
def _between(kind: Kind) -> tuple[Static, Grid, int]:
    static, _, _ = _stream(kind, kind.tuning.backward, True)
    of_outputs = replace(kind.tuning, row=static.OB)
    tile = tuning.tile(of_outputs, kind.tuning.between, kind.B, kind.J, kind.O, kind.dtype.itemsize, 1)
    static = static.but(TB=tile.rows, JB=tile.outputs, tiled=False, logits=False, mask=False, leaky=False)
    return static, (divide_up(kind.B, tile.rows), divide_up(kind.J, tile.outputs), 1), tile.warps


@dataclass
class Problem:
    """The tensors in the order that the kernels read, and the sizes."""

    u: Tensor  # [B, I, D] or votes [B, I, J, O], the numbers of an input capsule (of a pair) side by side
    weight: Tensor | None  # [I, D, J, O]; or [J, O, D], the o side by side
    bias: Tensor | None  # [J, O]
    logits: Tensor | None  # [B or 1, I or 1, J]
    mask: Tensor | None  # [B or 1, I or 1] of bytes
    form: str  # "pair", "output", "single" as in csrc/cpu/routing.h, or "votes"
    over_inputs: bool
    leaky: bool
    B: int
    I: int
    D: int
    J: int
    O: int
    tuning: tuning.Tuning
    kept: dict[tuple, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, u, weight, third, logits, mask, over_inputs: bool, leaky: bool) -> Problem:
        """third: the bias of the whole operator, or the query of one pass, which is not kept here."""
        J = out_capsules(u, weight, third, logits)
        bias = third.contiguous() if third is not None and third.dim() == 2 else None
        form, D, O = "votes", 0, u.shape[-1]
        if weight is not None:
            form = {4: "pair", 3: "output", 2: "single"}[weight.dim()]
            O, D = weight.shape[-2:]
            if form == "pair":
                weight = weight.permute(0, 3, 1, 2).contiguous()
            else:  # products with it go through d, and their lanes are the o
                weight = weight.mT.contiguous().mT.expand(J, O, D)
        if u.shape[-1] > 1 and u.stride(-1) != 1:
            u = u.contiguous()
        return cls(
            u,
            weight,
            bias,
            logits,
            None if mask is None else mask.view(torch.uint8),
            form,
            over_inputs,
            leaky,
            *u.shape[:2],
            D,
            J,
            O,
            tuning.for_shape(u.device, form, J, O, D, u.dtype),
        )

    @property
    def keys(self) -> bool:
        """The weight is the same for all i: the streams read u_i itself, with W_j^T V_j as the query."""
        return self.form in ("output", "single")

    @property
    def X(self) -> int:
        """Features of a vote as the streams read it."""
        return self.D if self.keys else self.O

    @property
    def pair_weight(self) -> Tensor | None:
        return self.weight if self.form == "pair" else None

    @property
    def key_weight(self) -> Tensor | None:
        return self.weight if self.keys else None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the weight's gradient."""
        if self.weight is None:
            return ()
        return tuple(self.weight.shape[1:] if self.form == "single" else self.weight.shape)

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """That sums are made in."""
        return accumulation_dtype(self.u.dtype)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @functools.cached_property
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
        """In the accumulation type."""
        return self.u.new_empty(shape, dtype=self.dtype)

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Likewise, the same memory for all passes, which run one after another."""
        key = (name, *shape)
        if key not in self.kept:
            self.kept[key] = self.empty(*shape)
        return self.kept[key]

    # Tiles

    def forward(self, leaves: bool = False) -> tuple[Static, Grid, int]:
        """What a forward stream is compiled for, its grid and its warps."""
        if self.keys or self.X > 64:  # products with W in the same launch, or rows so long that they spilled
            return self.stream(self.tuning.between)
        warps, per_thread = self.tuning.loaded
        if self.logits is not None and not leaves:  # their addresses take registers: half the warps have twice as many
            return self.stream((warps // 2, 2 * per_thread), unrolled=False)
        more = self.mask is not None or self.over_inputs or leaves or tuning.tiled(self.tuning, self.J, self.X)
        return self.stream(self.tuning.loaded if more else self.tuning.forward)

    def backward(self) -> tuple[Static, Grid, int]:
        """Likewise of a pass of the backward."""
        return self.stream(self.tuning.backward)

    def stream(self, shape: tuple[int, int], unrolled: bool = True) -> tuple[Static, Grid, int]:
        """Of a stream over i in tiles of samples."""
        return _stream(self.kind, shape, unrolled)

    def between(self) -> tuple[Static, Grid, int]:
        """Likewise for what runs between two streams, on V alone."""
        return _between(self.kind)

    @functools.cached_property
    def kind(self) -> Kind:
        strides = self.strides
        return Kind(
            self.tuning, self.form, self.B, self.I, self.D, self.J, self.O, self.X, self.dtype, self.over_inputs,
            self.leaky, self.mask is not None, self.logits is not None,
            max(strides[0], strides[2], strides[5], self.I * self.J), max(strides[4], strides[7]),
        )  # fmt: skip

    def tiled(self, tile: tuning.Tile) -> bool:
        """Whether a softmax over j spans several tiles."""
        return tile.outputs < self.J and not self.over_inputs

    # Bytes

    @property
    def state_bytes(self) -> int:
        """Of one [B, J, X] as the streams read it, V or ds."""
        return self.B * self.J * self.X * self.itemsize

    @property
    def output_bytes(self) -> int:
        """Of one [B, J, O] in the accumulation type."""
        return self.B * self.J * self.O * self.itemsize

    @property
    def key_weight_bytes(self) -> int:
        """Of the key weight for one tile of samples, 0 if the weight is none."""
        return self.J * self.O * self.D * self.weight.itemsize if self.keys else 0

    def pair_bytes(self, tiles: int) -> int:
        """Of mask and logits, where j takes so many tiles."""
        total = tiles * self.B * self.I if self.mask is not None else 0
        return total + (self.B * self.I * self.J * self.logits.itemsize if self.logits is not None else 0)

    def vote_bytes(self, tiles: int, weights: int) -> int:
        """Of the votes, or of u for each tile of j, and of a pair weight that is read so many times."""
        if self.form == "votes":
            return self.B * self.I * self.J * self.O * self.u.itemsize
        total = tiles * self.B * self.I * self.D * self.u.itemsize
        return total + (weights * self.weight.nbytes if self.form == "pair" else 0)

    def read_bytes(self, grid: Grid) -> int:
        """Of all inputs, by a stream in tiles of samples, which reads W once for each of them."""
        return self.pair_bytes(grid[1]) + self.vote_bytes(grid[1], grid[0])
