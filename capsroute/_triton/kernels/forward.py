"""The forward kernels. One pass is a stream over i,

    c_ij = softmax over j of (logits_ij + h_ij . V_j),   s_j = sum over i of c_ij h_ij,

and V, the sum of v over the passes so far, is the whole state between passes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .stream import at_sample, normalised, pairs, softmax_parts, squash_scale, tile, votes


@triton.jit
def stream(
    u, weight, logits, mask, tops, totals, left, coupling, V, b, j, x, begin, end, last, B, I, strides,
    P: tl.constexpr,
):  # fmt: skip
    """s [TB, JB, XB] over begin <= i < end.

    Where the softmax runs over i, s is the online sum of exp(b_ij - m_j) h_ij, and m, total [TB, JB, 1] its maximum
    and normaliser. Where they are wanted, the logits are left and the coupling is stored if `last`.
    """
    ACC: tl.constexpr = P.acc
    TB: tl.constexpr = P.TB
    JB: tl.constexpr = P.JB
    XB: tl.constexpr = P.XB
    J: tl.constexpr = P.J
    s = tl.zeros([TB, JB, XB], ACC)
    m = tl.full([TB, JB, 1], float("-inf"), ACC)
    total = tl.zeros([TB, JB, 1], ACC)
    for i in range(begin, end):
        row, allowed, prior = pairs(logits, mask, b < B, b, i, j, strides, P)
        h = votes(u, weight, b, i, j, x, row, allowed, strides, P)
        a = prior
        if P.query:
            a += tl.sum(h * V, 2, keep_dims=True)
        a = tl.where(allowed, a, float("-inf"))
        if left is not None:  # noqa: SIM102 - a choice of the compiler's, then one of the launch
            if last:
                tl.store(at_sample(left + i * J, b, I.to(tl.int64) * J, P) + j, a, mask=(b < B) & (j < J))
        if P.over_inputs:
            highest = tl.maximum(m, a)
            safe = tl.where(highest == float("-inf"), 0.0, highest)
            shrink, c = tl.exp(m - safe), tl.exp(a - safe)
            total = total * shrink + c
            s = s * shrink
            m = highest
        else:
            if P.tiled:
                top = tl.load(at_sample(tops + i, b, I, P), mask=b < B, other=0)
                of_row = tl.load(at_sample(totals + i, b, I, P), mask=b < B, other=1)
            else:
                top, of_row = softmax_parts(a, P)
            c = normalised(a, allowed, top, of_row)
            if coupling is not None:  # noqa: SIM102 - likewise
                if last:
                    at = at_sample(coupling + i * J, b, I.to(tl.int64) * J, P) + j
                    tl.store(at, c.to(coupling.dtype.element_ty), mask=(b < B) & (j < J))
        s = tl.fma(tl.broadcast_to(c, [TB, JB, XB]), h, s)
    return s, m, total


@triton.jit(do_not_specialize=["B", "I", "R", "unsaved"])
def route(
    u, weight, bias, logits, mask, v, s, tops, totals, left, coupling, turned, B, I, R, unsaved,
    eps: tl.float64, strides, weight_strides, SAVE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """All passes of a tile of samples, where one group holds every input capsule and one tile every j.

    With SAVE, s and the norms of all passes but the first `unsaved` are stored. For keys, sums and queries go through
    `turned` [2, B, J, D], of which no other program touches this tile: a thread needs what others hold.
    """
    ACC: tl.constexpr = P.acc
    TB: tl.constexpr = P.TB
    JB: tl.constexpr = P.JB
    XB: tl.constexpr = P.XB
    OB: tl.constexpr = P.OB
    J: tl.constexpr = P.J
    O: tl.constexpr = P.O
    X: tl.constexpr = P.X
    b, j, o = tile(P, OB)
    x = tl.arange(0, XB)[None, None, :]
    inside = (b < B) & (j < J) & (o < O)
    at = (b * J + j) * O + o
    beta = tl.zeros([1, JB, OB], ACC)
    if bias is not None:
        beta = tl.load(bias + j * O + o, mask=(j < J) & (o < O), other=0).to(ACC)
    V = tl.zeros([TB, JB, OB], ACC)
    v_k = V
    query = tl.zeros([TB, JB, XB], ACC)
    begin = tl.program_id(2).to(tl.int64)  # 0: there is one group
    for k in range(R):
        s_k, m, total = stream(
            u, weight if P.pair else None, logits, mask, None, None, left, coupling, query, b, j, x,
            begin, begin + I, k == R - 1, B, I, strides, P,
        )  # fmt: skip
        kept = tl.zeros([1, 1, 1], tl.int64) + k - unsaved
        if P.over_inputs:
            if SAVE:
                to = (kept * B.to(tl.int64) + b) * J + j
                here = (b < B) & (j < J) & (kept >= 0)
                tl.store(tops + to, tl.where(m == float("-inf"), 0.0, m), mask=here)
                tl.store(totals + to, total, mask=here)
            s_k = s_k / tl.where(total == 0, 1.0, total)
        if P.keys:
            key_at = (b * J + j) * X + x
            key_inside = (b < B) & (j < J) & (x < X)
            tl.store(turned + key_at, s_k, mask=key_inside)
            tl.debug_barrier()
            s_o = from_keys(turned, None, m, weight, b, j, o, 1, B, weight_strides, P) + beta
        else:
            s_o = s_k + beta
        if SAVE:
            tl.store(s + kept * (B.to(tl.int64) * (J * O)) + at, s_o, mask=inside & (kept >= 0))
        v_k = squash_scale(tl.sum(s_o * s_o, 2, keep_dims=True), eps) * s_o
        V += v_k
        if P.keys:
            if k < R - 1:
                queries = turned + B.to(tl.int64) * (J * X)
                to_keys(V, weight, queries, b, j, o, B, weight_strides, P)
                tl.debug_barrier()
                query = tl.load(queries + key_at, mask=key_inside, other=0)
        else:
            query = V
    tl.store(v + at, v_k.to(v.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "I"])
def rows(u, weight, logits, mask, V, parts, B, I, strides, P: tl.constexpr):
    """Where J takes several tiles: m and total of the softmax over the j of this tile, parts [tiles, 2, B, I].

    The leak is not in them; `merge_rows` adds it.
    """
    ACC: tl.constexpr = P.acc
    XB: tl.constexpr = P.XB
    J: tl.constexpr = P.J
    X: tl.constexpr = P.X
    b, j, x = tile(P, XB)
    V_t = tl.zeros([1, 1, 1], ACC)
    if P.query:
        V_t = tl.load(V + (b * J + j) * X + x, mask=(b < B) & (j < J) & (x < X), other=0)
    begin = tl.program_id(2).to(tl.int64) * P.group
    for i in range(begin, tl.minimum(begin + P.group, I)):
        row, allowed, a = pairs(logits, mask, b < B, b, i, j, strides, P)
        if P.query:
            h = votes(u, weight, b, i, j, x, row, allowed, strides, P)
            a += tl.sum(h * V_t, 2, keep_dims=True)
        m, total = softmax_parts(tl.where(allowed, a, float("-inf")), P)
        m = tl.where(total == 0, float("-inf"), m)
        at = parts + (tl.program_id(1) * 2 * B.to(tl.int64) + b) * I + i
        tl.store(at, m, mask=b < B)
        tl.store(at + B.to(tl.int64) * I, total, mask=b < B)


@triton.jit(do_not_specialize=["N", "tiles"])
def merge_rows(parts, tops, totals, means, N, tiles, P: tl.constexpr):
    """m, total and, after `backward.rows`, T over all tiles of j, each [N], from parts [tiles, 2 or 3, N]."""
    n: tl.constexpr = 3 if P.means else 2
    WIDTH: tl.constexpr = P.width
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = at < N
    N = N.to(tl.int64)
    m = tl.load(parts + at, mask=inside, other=0)
    for t in range(1, tiles):
        m = tl.maximum(m, tl.load(parts + n * t * N + at, mask=inside, other=0))
    m = tl.where(m == float("-inf"), 0.0, m)
    total = tl.zeros([WIDTH], P.acc)
    T = tl.zeros([WIDTH], P.acc)
    if P.leaky:
        m = tl.maximum(m, 0.0)
        total = tl.exp(-m)
    for t in range(tiles):
        part = parts + n * t * N + at
        shrink = tl.exp(tl.load(part, mask=inside, other=0) - m)
        total += shrink * tl.load(part + N, mask=inside, other=0)
        if P.means:
            T += shrink * tl.load(part + 2 * N, mask=inside, other=0)
    tl.store(tops + at, m, mask=inside)
    tl.store(totals + at, total, mask=inside)
    if P.means:
        tl.store(means + at, T / tl.where(total == 0, 1.0, total), mask=inside)


@triton.jit(do_not_specialize=["B", "I"])
def pass_(u, weight, logits, mask, V, tops, totals, left, coupling, parts, online, B, I, strides, P: tl.constexpr):
    """One group's part of s, parts [groups, B, J, X]; over i also its maxima and sums, online [2, groups, B, J]."""
    ACC: tl.constexpr = P.acc
    XB: tl.constexpr = P.XB
    J: tl.constexpr = P.J
    X: tl.constexpr = P.X
    b, j, x = tile(P, XB)
    inside = (b < B) & (j < J) & (x < X)
    at = (b * J + j) * X + x
    V_t = tl.zeros([1, 1, 1], ACC)
    if P.query:
        V_t = tl.load(V + at, mask=inside, other=0)
    g = tl.program_id(2).to(tl.int64)
    begin = g * P.group
    s, m, total = stream(
        u, weight, logits, mask, tops, totals, left, coupling, V_t, b, j, x,
        begin, tl.minimum(begin + P.group, I), True, B, I, strides, P,
    )  # fmt: skip
    tl.store(parts + g * (B.to(tl.int64) * (J * X)) + at, s, mask=inside)
    if P.over_inputs:
        to = online + (g * B + b) * J + j
        tl.store(to, m, mask=(b < B) & (j < J))
        tl.store(to + tl.num_programs(2) * (B.to(tl.int64) * J), total, mask=(b < B) & (j < J))


@triton.jit
def online_totals(online, b, j, groups, B, P: tl.constexpr):
    """The maximum over the groups and the sum of exp(b_ij - maximum) over all i, [TB, JB, 1]."""
    ACC: tl.constexpr = P.acc
    TB: tl.constexpr = P.TB
    JB: tl.constexpr = P.JB
    J: tl.constexpr = P.J
    n = B.to(tl.int64) * J
    at, inside = online + b * J + j, (b < B) & (j < J)
    m = tl.full([TB, JB, 1], float("-inf"), ACC)
    for g in range(groups):
        m = tl.maximum(m, tl.load(at + g * n, mask=inside, other=float("-inf")))
    m = tl.where(m == float("-inf"), 0.0, m)
    total = tl.zeros([TB, JB, 1], ACC)
    for g in range(groups):
        shrink = tl.exp(tl.load(at + g * n, mask=inside, other=float("-inf")) - m)
        total += shrink * tl.load(at + (groups + g) * n, mask=inside, other=0)
    return m, total


@triton.jit
def added(parts, online, m, b, j, x, groups, B, P: tl.constexpr):
    """The groups' parts in order: sum over g of parts[g, b, j, x], over i each times exp(m_g - m)."""
    J: tl.constexpr = P.J
    X: tl.constexpr = P.X
    n = B.to(tl.int64) * J
    at, inside = (b * J + j) * X + x, (b < B) & (j < J) & (x < X)
    total = tl.load(parts + at, mask=inside, other=0)
    if online is not None:
        total *= tl.exp(tl.load(online + b * J + j, mask=(b < B) & (j < J), other=0) - m)
    for g in range(1, groups):
        part = tl.load(parts + g * (n * X) + at, mask=inside, other=0)
        if online is not None:
            part *= tl.exp(tl.load(online + g * n + b * J + j, mask=(b < B) & (j < J), other=0) - m)
        total += part
    return total


@triton.jit
def weight_at(j, o, strides):
    """Where W_j[o, 0] is in a shared weight, [1, JB, OB]; its strides may pass 2^31 numbers."""
    return j.to(tl.int64) * strides[0] + o.to(tl.int64) * strides[1]


@triton.jit
def from_keys(parts, online, m, weight, b, j, o, groups, B, strides, P: tl.constexpr):
    """s_j = W_j (sum over i of c_ij u_i) [TB, JB, OB], the inner sum in parts."""
    ACC: tl.constexpr = P.acc
    TB: tl.constexpr = P.TB
    JB: tl.constexpr = P.JB
    OB: tl.constexpr = P.OB
    J: tl.constexpr = P.J
    O: tl.constexpr = P.O
    D: tl.constexpr = P.D
    s = tl.zeros([TB, JB, OB], ACC)
    at = weight_at(j, o, strides)
    for d in range(D):
        x_d = added(parts, online, m, b, j, d, groups, B, P)
        w_d = tl.load(weight + at, mask=(j < J) & (o < O), other=0).to(ACC)
        s = tl.fma(tl.broadcast_to(x_d, [TB, JB, OB]), tl.broadcast_to(w_d, [TB, JB, OB]), s)
        at += strides[2]
    return s


@triton.jit
def to_keys(V, weight, out, b, j, o, B, strides, P: tl.constexpr):
    """Store W_j^T V_j [B, J, D] for V [TB, JB, OB]: u_i . (W_j^T V_j) = (W_j u_i) . V_j."""
    ACC: tl.constexpr = P.acc
    J: tl.constexpr = P.J
    O: tl.constexpr = P.O
    D: tl.constexpr = P.D
    at = weight_at(j, o, strides)
    out += (b * J + j) * D
    for _ in range(D):
        w_d = tl.load(weight + at, mask=(j < J) & (o < O), other=0).to(ACC)
        q_d = tl.sum(V * w_d, 2, keep_dims=True)
        tl.store(out, q_d, mask=(b < B) & (j < J))
        at += strides[2]
        out += 1


@triton.jit(do_not_specialize=["B", "groups"])
def finish(
    parts, online, weight, bias, V, s, v, tops, totals, query, B, groups, eps: tl.float64, strides,
    SQUASH: tl.constexpr, LAST: tl.constexpr, SAVE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Between two passes: s from its parts, v = squash(s), V += v, and, for keys, the next query W_j^T V_j.

    After the last pass only v; without SQUASH only s.
    """
    ACC: tl.constexpr = P.acc
    OB: tl.constexpr = P.OB
    J: tl.constexpr = P.J
    O: tl.constexpr = P.O
    b, j, o = tile(P, OB)
    inside = (b < B) & (j < J) & (o < O)
    at = (b * J + j) * O + o
    m, total = 0.0, 1.0
    if online is not None:
        m, total = online_totals(online, b, j, groups, B, P)
        if tops is not None:
            tl.store(tops + b * J + j, m, mask=(b < B) & (j < J))
            tl.store(totals + b * J + j, total, mask=(b < B) & (j < J))
    if P.keys:
        s_k = from_keys(parts, online, m, weight, b, j, o, groups, B, strides, P)
    else:
        s_k = added(parts, online, m, b, j, o, groups, B, P)
    if online is not None:
        s_k = s_k / tl.where(total == 0, 1.0, total)
    if bias is not None:
        s_k += tl.load(bias + j * O + o, mask=(j < J) & (o < O), other=0).to(ACC)
    if SAVE:
        tl.store(s + at, s_k, mask=inside)
    if SQUASH:
        v_k = squash_scale(tl.sum(s_k * s_k, 2, keep_dims=True), eps) * s_k
        if LAST:
            tl.store(v + at, v_k.to(v.dtype.element_ty), mask=inside)
        else:
            if P.query:
                v_k += tl.load(V + at, mask=inside, other=0)
            tl.store(V + at, v_k, mask=inside)
            if P.keys:
                to_keys(v_k, weight, query, b, j, o, B, strides, P)


@triton.jit(do_not_specialize=["B", "I"])
def column_coupling(u, weight, logits, mask, V, tops, totals, coupling, B, I, strides, P: tl.constexpr):
    """c_ij = exp(b_ij - m_j) / total_j, which is known only when all i have been seen."""
    ACC: tl.constexpr = P.acc
    XB: tl.constexpr = P.XB
    J: tl.constexpr = P.J
    X: tl.constexpr = P.X
    b, j, x = tile(P, XB)
    V_t = tl.zeros([1, 1, 1], ACC)
    if P.query:
        V_t = tl.load(V + (b * J + j) * X + x, mask=(b < B) & (j < J) & (x < X), other=0)
    m = tl.load(tops + b * J + j, mask=(b < B) & (j < J), other=0)
    total = tl.load(totals + b * J + j, mask=(b < B) & (j < J), other=1)
    begin = tl.program_id(2).to(tl.int64) * P.group
    for i in range(begin, tl.minimum(begin + P.group, I)):
        row, allowed, prior = pairs(logits, mask, b < B, b, i, j, strides, P)
        h = votes(u, weight, b, i, j, x, row, allowed, strides, P)
        a = prior
        if P.query:
            a += tl.sum(h * V_t, 2, keep_dims=True)
        c = normalised(a, allowed, m, total)
        tl.store(coupling + (b * I + i) * J + j, c.to(coupling.dtype.element_ty), mask=(b < B) & (j < J))


@triton.jit(do_not_specialize=["B"])
def key_query(query, weight, out, B, strides, P: tl.constexpr):
    """W_j^T q_j [B, J, D] of a query [B, J, O]."""
    OB: tl.constexpr = P.OB
    J: tl.constexpr = P.J
    O: tl.constexpr = P.O
    b, j, o = tile(P, OB)
    q = tl.load(query + (b * J + j) * O + o, mask=(b < B) & (j < J) & (o < O), other=0)
    to_keys(q, weight, out, b, j, o, B, strides, P)
