"""The streams of the backward, one for each pass from the last to the second, and what is between them. From
ds^k = dL/ds^k of a pass, with p its coupling,

    t_ij  = h_ij . ds^k_j,    db_ij = p_ij (t_ij - T),    dV^(k-1)_j = dV^k_j + sum over i of db_ij h_ij,

where T = sum over j of p_ij t_ij, or over i, which is (s^k_j - bias_j) . ds^k_j. `gradients.py` has the last stream.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import added, from_keys, to_keys
from .stream import normalised, pairs, softmax_parts, squash_root, squash_scale, tile, votes


@triton.jit
def squash_gradient(s, g, eps):
    """J_sq(s)^T g; this form is accurate to |s| = 1e18 in float32."""
    n2 = tl.sum(s * s, 2, keep_dims=True)
    r = squash_root(n2, eps)
    f = n2 / (1 + n2) / r
    unit = s / r
    return f * g + (2 * r / (1 + n2) / (1 + n2) - f) * tl.sum(unit * g, 2, keep_dims=True) * unit


@triton.jit(do_not_specialize=["B", "R"])
def start(
    grad, s, weight, bias, V, ds, queries, slopes, means, B, R, eps: tl.float64, strides,
    SQUASH: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """V^1 .. V^(R-1) from what was saved, and ds^R = J_sq(s^R)^T dv; for keys also W^T V and W^T ds.

    Over i also T_j = (s_j - bias_j) . ds_j.
    """
    ACC: tl.constexpr = P.acc
    TB: tl.constexpr = P.TB
    JB: tl.constexpr = P.JB
    OB: tl.constexpr = P.OB
    J: tl.constexpr = P.J
    O: tl.constexpr = P.O
    D: tl.constexpr = P.D
    b, j, o = tile(P, OB)
    inside = (b < B) & (j < J) & (o < O)
    at = (b * J + j) * O + o
    n = B.to(tl.int64) * (J * O)
    V_k = tl.zeros([TB, JB, OB], ACC)
    for k in range(0, R - 1):
        s_k = tl.load(s + k * n + at, mask=inside, other=0)
        V_k += squash_scale(tl.sum(s_k * s_k, 2, keep_dims=True), eps) * s_k
        tl.store(V + k * n + at, V_k, mask=inside)
        if P.keys:
            to_keys(V_k, weight, queries + k * (B.to(tl.int64) * (J * D)), b, j, o, B, strides, P)
    at_grad = grad + b * strides[3] + j.to(tl.int64) * strides[4] + o.to(tl.int64) * strides[5]
    g = tl.load(at_grad, mask=inside, other=0).to(ACC)
    s_k = g
    if SQUASH:
        s_k = tl.load(s + (R - 1) * n + at, mask=inside, other=0)
        g = squash_gradient(s_k, g, eps)
    elif P.over_inputs:
        s_k = tl.load(s + at, mask=inside, other=0)
    store_ds(g, s_k, weight, bias, ds, slopes, means, b, j, o, R - 1, B, strides, P)


@triton.jit
def store_ds(ds_k, s_k, weight, bias, ds, slopes, means, b, j, o, k, B, strides, P: tl.constexpr):
    """ds^k [TB, JB, OB], for keys also W^T ds^k, which the streams of pass k read; over i T."""
    ACC: tl.constexpr = P.acc
    J: tl.constexpr = P.J
    O: tl.constexpr = P.O
    D: tl.constexpr = P.D
    inside = (b < B) & (j < J) & (o < O)
    n = B.to(tl.int64) * J
    tl.store(ds + k * (n * O) + (b * J + j) * O + o, ds_k, mask=inside)
    if P.over_inputs:
        if bias is not None:
            s_k -= tl.load(bias + j * O + o, mask=(j < J) & (o < O), other=0).to(ACC)
        tl.store(means + k * n + b * J + j, tl.sum(s_k * ds_k, 2, keep_dims=True), mask=(b < B) & (j < J))
    if P.keys:
        to_keys(ds_k, weight, slopes + k * (n * D), b, j, o, B, strides, P)


@triton.jit(do_not_specialize=["B", "k", "groups"])
def between(
    parts, s, weight, bias, dV, ds, slopes, means, k, B, groups, eps: tl.float64, strides,
    FIRST: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """dV^k = dV^(k+1) + sum of the parts of the stream of pass k + 1, and ds^k = J_sq(s^k)^T dV^k, k from 0."""
    OB: tl.constexpr = P.OB
    J: tl.constexpr = P.J
    O: tl.constexpr = P.O
    b, j, o = tile(P, OB)
    inside = (b < B) & (j < J) & (o < O)
    at = (b * J + j) * O + o
    if P.keys:
        g = from_keys(parts, None, 0.0, weight, b, j, o, groups, B, strides, P)
    else:
        g = added(parts, None, 0.0, b, j, o, groups, B, P)
    if not FIRST:
        g += tl.load(dV + at, mask=inside, other=0)
    tl.store(dV + at, g, mask=inside)
    s_k = tl.load(s + k * (B.to(tl.int64) * (J * O)) + at, mask=inside, other=0)
    ds_k = squash_gradient(s_k, g, eps)
    store_ds(ds_k, s_k, weight, bias, ds, slopes, means, b, j, o, k, B, strides, P)


@triton.jit
def query_before(queries, k, n, at, inside, P: tl.constexpr):
    """What pass k, from 0, is compared with, n numbers: the sum of v over k passes, at k - 1. Of none it is 0."""
    GIVEN: tl.constexpr = P.given
    place = k * n + at
    if not GIVEN:
        place -= n
        # Both say k > 0; beside W_i this one leaves no registers spilled, elsewhere the other.
        inside = inside & (tl.zeros([1, 1, 1], tl.int32) + k > 0 if P.pair else place >= 0)
    return tl.load(queries + place, mask=inside, other=0)


@triton.jit
def of_query(x, k, P: tl.constexpr):
    """x, a factor of what query_before(k) gives or a product with it; 0 where there is no V, as 0 * inf is NaN.

    Needed for one pass whose logits want a gradient; in several passes such a vote reaches the result anyway.
    """
    GIVEN: tl.constexpr = P.given
    if not GIVEN:
        x = tl.where(k > 0, x, 0.0)
    return x


@triton.jit
def coupling_and_db(h, prior, allowed, V, ds, tops, totals, means, k, row, b, i, j, B, I, P: tl.constexpr):
    """p_ij and db_ij of pass k, [TB, JB, 1].

    tops, totals, means: m, the sum of exp(a - m), and T, each [R, B, J] where the softmax runs over i; [R, B, I] where
    it runs over j and J takes several tiles.
    """
    J: tl.constexpr = P.J
    a, t = prior, tl.zeros_like(prior)
    if P.moves:
        of_votes = tl.sum(h * V, 2, keep_dims=True)
        if P.need_logits != "":
            of_votes = of_query(of_votes, k, P)
        a += of_votes
        t = tl.sum(h * ds, 2, keep_dims=True)
        if P.logits:  # of a forbidden pair ds may be NaN
            t = tl.where(allowed, t, 0.0)
    a = tl.where(allowed, a, float("-inf"))
    if P.over_inputs or P.tiled:
        sample = k * B.to(tl.int64) + b
        if P.over_inputs:
            at, inside = sample * J + j, (b < B) & (j < J)
        else:
            at, inside = sample * I + i, row
        p = normalised(a, allowed, tl.load(tops + at, mask=inside, other=0), tl.load(totals + at, mask=inside, other=1))
        T = tl.load(means + at, mask=inside, other=0)
    else:
        m, total = softmax_parts(a, P)
        p = normalised(a, allowed, m, total)
        T = tl.sum(p * t, 1, keep_dims=True)
    return p, tl.where(allowed, p * (t - T), 0.0)


@triton.jit(do_not_specialize=["B", "I", "k"])
def rows(u, weight, logits, mask, queries, slopes, parts, k, B, I, strides, P: tl.constexpr):
    """Where J takes several tiles: m, total and sum of exp(a - m) t over the j of this tile, parts [tiles, 3, B, I]."""
    XB: tl.constexpr = P.XB
    J: tl.constexpr = P.J
    X: tl.constexpr = P.X
    b, j, x = tile(P, XB)
    inside = (b < B) & (j < J) & (x < X)
    at = (b * J + j) * X + x
    n = B.to(tl.int64) * (J * X)
    V = query_before(queries, k, n, at, inside, P)
    ds = tl.load(slopes + k * n + at, mask=inside, other=0)
    begin = tl.program_id(2).to(tl.int64) * P.group
    for i in range(begin, tl.minimum(begin + P.group, I)):
        row, allowed, prior = pairs(logits, mask, b < B, b, i, j, strides, P)
        h = votes(u, weight, b, i, j, x, row, allowed, strides, P)
        a = tl.where(allowed, prior + of_query(tl.sum(h * V, 2, keep_dims=True), k, P), float("-inf"))
        m, total = softmax_parts(a, P)
        t = tl.where(allowed, tl.sum(h * ds, 2, keep_dims=True), 0.0)
        T = tl.sum(tl.exp(a - m) * t, 1, keep_dims=True)
        m = tl.where(total == 0, float("-inf"), m)
        to = parts + (tl.program_id(1) * 3 * B.to(tl.int64) + b) * I + i
        tl.store(to, m, mask=b < B)
        tl.store(to + B.to(tl.int64) * I, total, mask=b < B)
        tl.store(to + 2 * (B.to(tl.int64) * I), T, mask=b < B)


@triton.jit(do_not_specialize=["B", "I", "k"])
def pass_(
    u, weight, logits, mask, queries, slopes, tops, totals, means, parts, sums, k, B, I, strides, P: tl.constexpr
):
    """One group's part of sum over i of db_ij h_ij, parts [groups, B, J, X]; with sums that of p_ij h_ij too."""
    ACC: tl.constexpr = P.acc
    TB: tl.constexpr = P.TB
    JB: tl.constexpr = P.JB
    XB: tl.constexpr = P.XB
    J: tl.constexpr = P.J
    X: tl.constexpr = P.X
    b, j, x = tile(P, XB)
    inside = (b < B) & (j < J) & (x < X)
    at = (b * J + j) * X + x
    n = B.to(tl.int64) * (J * X)
    V = query_before(queries, k, n, at, inside, P)
    ds = tl.load(slopes + k * n + at, mask=inside, other=0)
    e = tl.zeros([TB, JB, XB], ACC)
    c = tl.zeros([TB, JB, XB], ACC)
    g = tl.program_id(2).to(tl.int64)
    begin = g * P.group
    for i in range(begin, tl.minimum(begin + P.group, I)):
        row, allowed, prior = pairs(logits, mask, b < B, b, i, j, strides, P)
        h = votes(u, weight, b, i, j, x, row, allowed, strides, P)
        p, db = coupling_and_db(h, prior, allowed, V, ds, tops, totals, means, k, b < B, b, i, j, B, I, P)
        e = tl.fma(tl.broadcast_to(db, [TB, JB, XB]), h, e)
        if P.need_weight:
            c = tl.fma(tl.broadcast_to(p, [TB, JB, XB]), h, c)
    tl.store(parts + g * n + at, e, mask=inside)
    if P.need_weight:
        tl.store(sums + g * n + at, c, mask=inside)
