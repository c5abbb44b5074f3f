"""What every kernel shares: reading a pair's votes and prior logits, and the softmax over them.

Tiles are [TB, JB, XB]: samples, output capsules, features of a vote. Indices keep all three dimensions, so that
they broadcast: b [TB, 1, 1] in 64 bits, j [1, JB, 1], x [1, 1, XB]; i is one input capsule. Everything is cast to
the accumulation type right after it is read.

Triton has no fused multiply-add of its own choice here (the launcher turns it off: lanes that hold copies of one
sum would round it differently, and then the last bit depends on which of them stores it); `tl.fma` is explicit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl


@dataclass(frozen=True)
class Static:
    """What a kernel is compiled for: the layer's sizes and options, and the tile."""

    acc: Any  # the accumulation type
    J: int
    O: int
    D: int
    X: int  # features of a vote as the stream reads it: O, but D for keys
    TB: int
    JB: int
    XB: int
    OB: int
    DB: int
    group: int  # input capsules whose sum is one part
    pair: bool  # the votes are W_ij u_i
    keys: bool  # one weight for all i: the votes are u_i itself, for all j, and V is W_j^T V_j
    over_inputs: bool
    leaky: bool
    mask: bool
    logits: bool
    tiled: bool  # J takes several tiles, so the softmax over j reads its maximum and sum
    unrolled: bool = False  # the loop over d that makes a vote, where W is one of each pair
    near: bool = False  # the samples of a tile, and output capsules, lie less than 2^31 numbers apart
    query: bool = True
    means: bool = False  # rows hold T as well
    width: int = 256  # of a tile of rows
    held: int = 0  # features of u of which W_i is held in one tensor: 1 adds them up as `votes` does
    need_u: bool = False
    need_weight: bool = False
    need_logits: str = ""  # the dimensions of b, i that the logits have, "j" if none
    moves: bool = True  # the gradient goes through the logits too: false of one pass whose logits want none
    given: bool = False  # V^0 is given: the backward of one pass from a query

    @functools.lru_cache(1024)  # noqa: B019 - there are few; Triton finds a kernel sooner by an object that it has seen
    def but(self, **changes) -> Static:
        """The same with changes."""
        return replace(self, **changes)


@triton.jit
def tile(P: tl.constexpr, FEATURES: tl.constexpr):
    """The indices b, j of this program's tile, and the features of a tile that wide."""
    TB: tl.constexpr = P.TB
    JB: tl.constexpr = P.JB
    b = (tl.program_id(0).to(tl.int64) * TB + tl.arange(0, TB))[:, None, None]
    j = (tl.program_id(1) * JB + tl.arange(0, JB))[None, :, None]
    return b, j, tl.arange(0, FEATURES)[None, None, :]


@triton.jit
def at_sample(pointer, b, stride, P: tl.constexpr):
    """pointer + b stride, if possible in 32 bits from the tile's first sample: 64 bits for each fill the registers."""
    if P.near:
        TB: tl.constexpr = P.TB
        first = tl.program_id(0).to(tl.int64) * TB
        return pointer + first * stride + (b - first).to(tl.int32) * stride
    else:
        return pointer + b * stride


@triton.jit
def at_output(j, stride, P: tl.constexpr):
    """j stride, likewise."""
    if P.near:
        return j * stride
    else:
        return j.to(tl.int64) * stride


@triton.jit
def pairs(logits, mask, row, b, i, j, strides, P: tl.constexpr):
    """Which rows are not masked, of those that exist; which of their pairs take part [TB, JB, 1]; prior logits.

    What takes no part is never read, so that it cannot leak.
    """
    ACC: tl.constexpr = P.acc
    TB: tl.constexpr = P.TB
    JB: tl.constexpr = P.JB
    J: tl.constexpr = P.J
    if P.mask:
        row = tl.load(at_sample(mask + i * strides[1], b, strides[0], P), mask=row, other=0) != 0
    allowed = row & (j < J)
    prior = tl.zeros([TB, JB, 1], ACC)
    if P.logits:
        at = at_sample(logits + i * strides[3], b, strides[2], P) + at_output(j, strides[4], P)
        prior = tl.load(at, mask=allowed, other=0).to(ACC)
        allowed = allowed & (prior != float("-inf"))
    return row, allowed, prior


@triton.jit
def add_feature(h, u, w, row, here, P: tl.constexpr):
    """h + W_ijd u_id."""
    ACC: tl.constexpr = P.acc
    u_d = tl.load(u, mask=row, other=0).to(ACC)
    w_d = tl.load(w, mask=here, other=0).to(ACC)
    return tl.fma(tl.broadcast_to(u_d, h.shape), tl.broadcast_to(w_d, h.shape), h)


@triton.jit
def votes(u, weight, b, i, j, x, row, allowed, strides, P: tl.constexpr):
    """h_ij = W_ij u_i [TB, JB, XB], or what was given for it; 0 where the pair takes no part."""
    ACC: tl.constexpr = P.acc
    TB: tl.constexpr = P.TB
    JB: tl.constexpr = P.JB
    XB: tl.constexpr = P.XB
    J: tl.constexpr = P.J
    X: tl.constexpr = P.X
    D: tl.constexpr = P.D
    at = at_sample(u + i * strides[6], b, strides[5], P)
    if P.pair:
        h = tl.zeros([TB, JB, XB], ACC)
        w = weight + i * (D * J * X) + j * X + x
        here = (j < J) & (x < X)
        # A loop makes addresses and masks anew for every d, seven instructions for one that multiplies. A pass without
        # a query, which has less to do for a vote, is left it: unrolled it spilled registers.
        if P.unrolled and P.query:
            for d in tl.static_range(D):
                h = add_feature(h, at + d, w + d * (J * X), row, here, P)
        else:
            for d in range(D):
                h = add_feature(h, at + d, w + d * (J * X), row, here, P)
        if P.logits:
            h = tl.where(allowed, h, 0)
    elif P.keys:
        h = tl.load(at + x, mask=row & (x < X), other=0).to(ACC)
        h = tl.where(allowed, tl.broadcast_to(h, [TB, JB, XB]), 0)
    else:
        h = tl.load(at + at_output(j, strides[7], P) + x, mask=allowed & (x < X), other=0).to(ACC)
    return h


@triton.jit
def softmax_parts(a, P: tl.constexpr):
    """The maximum m of a over j, 0 if there is none, and the sum of exp(a - m), leak included, both [TB, 1, 1]."""
    m = tl.max(a, 1, keep_dims=True)
    if P.leaky:
        m = tl.maximum(m, 0.0)
    m = tl.where(m == float("-inf"), 0.0, m)
    total = tl.sum(tl.exp(a - m), 1, keep_dims=True)
    if P.leaky:
        total += tl.exp(-m)
    return m, total


@triton.jit
def normalised(a, allowed, m, total):
    """exp(a - m) / total, 0 where the pair takes no part."""
    return tl.where(allowed, tl.exp(a - m) / tl.where(total == 0, 1.0, total), 0.0)


@triton.jit
def squash_root(n2, eps):
    """sqrt(n2 + eps), of an eps that a kernel takes in float64: a number of Python would be float32."""
    return tl.sqrt(n2 + tl.full([1, 1, 1], eps, n2.dtype))


@triton.jit
def squash_scale(n2, eps):
    """v = squash_scale(|s|^2) s."""
    return n2 / (1 + n2) / squash_root(n2, eps)
