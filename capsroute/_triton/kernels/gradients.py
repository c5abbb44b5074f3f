"""The last stream of the backward, which makes every gradient from

    dh_ij = sum over k of p^k_ij ds^k_j + db^k_ij V^(k-1)_j,    V^0 = 0,

and the product that makes the gradient of a shared weight.
"""

# ruff: noqa: RUF005 - Triton's tuples grow by + alone

from __future__ import annotations

import triton
import triton.language as tl

from .backward import coupling_and_db, of_query, query_before
from .stream import pairs, votes


@triton.jit
def vote_gradient(h, prior, allowed, queries, slopes, tops, totals, means, row, b, i, j, x, R, B, I, P: tl.constexpr):
    """dh_ij = sum over k of p ds + db V [IB, JB, XB], and sum over k of db [IB, JB, 1]. One that does not move
    the logits needs no votes.
    """
    ACC: tl.constexpr = P.acc
    IB: tl.constexpr = P.TB
    JB: tl.constexpr = P.JB
    XB: tl.constexpr = P.XB
    J: tl.constexpr = P.J
    X: tl.constexpr = P.X
    inside = (j < J) & (x < X)
    at = (b * J + j) * X + x
    n = B.to(tl.int64) * (J * X)
    dh = tl.zeros([IB, JB, XB], ACC)
    dlogits = tl.zeros([IB, JB, 1], ACC)
    for k in range(R):
        V = dh  # not read where logits do not move
        if P.moves:
            V = query_before(queries, k, n, at, inside, P)
        ds = tl.load(slopes + k * n + at, mask=inside, other=0)
        p, db = coupling_and_db(h, prior, allowed, V, ds, tops, totals, means, k, row, b, i, j, B, I, P)
        dh = tl.fma(tl.broadcast_to(p, [IB, JB, XB]), tl.broadcast_to(ds, [IB, JB, XB]), dh)
        if P.moves:
            factor = db
            if P.need_logits != "":
                factor = of_query(db, k, P)
            dh = tl.fma(tl.broadcast_to(factor, [IB, JB, XB]), tl.broadcast_to(V, [IB, JB, XB]), dh)
            dlogits += db
    if P.mask or P.logits:
        dh = tl.where(allowed, dh, 0.0)
    return dh, dlogits


@triton.jit
def read_weight(weight, i, j, x, d, I, P: tl.constexpr):
    """W_i, a tensor [IB, held, JB, XB] for each `held` of the D features."""
    HELD: tl.constexpr = P.held
    J: tl.constexpr = P.J
    X: tl.constexpr = P.X
    D: tl.constexpr = P.D
    W = ()
    at = weight + i[:, :, :, None] * (D * J * X) + d * (J * X) + (j * X + x)[:, None, :, :]
    inside = (i < I)[:, :, :, None] & ((j < J) & (x < X))[:, None, :, :]
    for first in tl.static_range(0, D, HELD):
        W = W + (tl.load(at + first * (J * X), mask=inside & (first + d < D), other=0).to(P.acc),)
    return W


@triton.jit
def store_weight_gradient(dweight, dW, i, j, x, d, I, P: tl.constexpr):
    """dW_i, likewise."""
    HELD: tl.constexpr = P.held
    J: tl.constexpr = P.J
    X: tl.constexpr = P.X
    D: tl.constexpr = P.D
    to = dweight + tl.program_id(2) * (I.to(tl.int64) * (D * J * X))
    to += i[:, :, :, None] * (D * J * X) + d * (J * X) + (j * X + x)[:, None, :, :]
    inside = (i < I)[:, :, :, None] & ((j < J) & (x < X))[:, None, :, :]
    for first in tl.static_range(0, D, HELD):
        dW_d = dW[first // HELD].to(dweight.dtype.element_ty)
        tl.store(to + first * (J * X), dW_d, mask=inside & (first + d < D))


@triton.jit
def votes_of_held(W, u, row, d, P: tl.constexpr):
    """h_i = W_i u_i of a sample [IB, JB, XB], and u_i as [IB, held, 1, 1]. Where held is 1 it is added up as `votes`
    does it: the logits have the bits that their maxima and sums were made of.
    """
    HELD: tl.constexpr = P.held
    D: tl.constexpr = P.D
    h, u_b = tl.zeros_like(W[0]), ()
    for first in tl.static_range(0, D, HELD):
        u_d = tl.load(u + first + d, mask=row[:, :, :, None] & (first + d < D), other=0).to(P.acc)
        h = tl.fma(tl.broadcast_to(u_d, h.shape), W[first // HELD], h)
        u_b = u_b + (u_d,)
    return tl.sum(h, 1), u_b


@triton.jit
def store_input_gradient(du, dh, W, row, b, i, j, x, d, B, I, P: tl.constexpr):
    """du_i of a sample, of given votes dh itself."""
    HELD: tl.constexpr = P.held
    D: tl.constexpr = P.D
    J: tl.constexpr = P.J
    X: tl.constexpr = P.X
    if P.pair:
        to = du + ((tl.program_id(1) * B.to(tl.int64) + b) * I + i)[:, :, :, None] * D + d
        for first in tl.static_range(0, D, HELD):
            W_d = W[first // HELD]
            du_d = tl.sum(tl.sum(W_d * dh[:, None, :, :], 3, keep_dims=True), 2, keep_dims=True)
            if P.mask:  # W may hold what is not finite
                du_d = tl.where(row[:, :, :, None], du_d, 0.0)
            tl.store(to + first, du_d.to(du.dtype.element_ty), mask=(i < I)[:, :, :, None] & (first + d < D))
    elif P.keys:
        to = du + ((tl.program_id(1) * B.to(tl.int64) + b) * I + i) * X + x
        tl.store(to, tl.sum(dh, 1, keep_dims=True).to(du.dtype.element_ty), mask=(i < I) & (x < X))
    else:
        to = du + ((b * I.to(tl.int64) + i) * J + j) * X + x
        tl.store(to, dh.to(du.dtype.element_ty), mask=(i < I) & (j < J) & (x < X))


@triton.jit
def add_weight_gradient(dW, u_b, dh, P: tl.constexpr):
    """dW_i + dh_i u_i^T."""
    HELD: tl.constexpr = P.held
    D: tl.constexpr = P.D
    added = ()
    for n in tl.static_range((D + HELD - 1) // HELD):
        to = dW[n]
        added = added + (tl.fma(tl.broadcast_to(u_b[n], to.shape), tl.broadcast_to(dh[:, None, :, :], to.shape), to),)
    return added


@triton.jit
def store_logit_gradient(dlogits, db, b, i, j, B, I, P: tl.constexpr):
    """Of a sample, where the logits have b."""
    J: tl.constexpr = P.J
    if P.need_logits == "bi":
        tl.store(dlogits + (b * I + i) * J + j, db.to(dlogits.dtype.element_ty), mask=(i < I) & (j < J))
    else:
        to = dlogits + (tl.program_id(0) * B.to(tl.int64) + b) * J + j
        tl.store(to, tl.sum(db, 0, keep_dims=True), mask=j < J)


@triton.jit
def store_logit_sum(dlogits, of_share, i, j, I, P: tl.constexpr):
    """Of a share of the samples, where the logits have no b."""
    J: tl.constexpr = P.J
    if P.need_logits == "i":
        tl.store(dlogits + (tl.program_id(2) * I.to(tl.int64) + i) * J + j, of_share, mask=(i < I) & (j < J))
    elif P.need_logits == "j":
        to = dlogits + (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * J + j
        tl.store(to, tl.sum(of_share, 0, keep_dims=True), mask=j < J)


@triton.jit(do_not_specialize=["B", "I", "R", "share"])
def gradients(
    u, weight, logits, mask, queries, slopes, tops, totals, means, du, dweight, dlogits,
    R, B, I, share, strides, P: tl.constexpr,
):  # fmt: skip
    """The last stream: a program owns IB input capsules, W_i in registers, and goes through a share of the samples.

    du_i = sum over j of W_ij^T dh_ij, in parts [tiles of j, B, I, D]; the gradient of given votes is dh itself.
    dW_ij = sum over b of dh_ij u_i^T, in parts [shares, I, D, J, O].
    dlogits by P.need_logits, the dimensions that the logits have: "bi" [B, I, J]; "b" parts [tiles of i, B, J]; "i"
    parts [shares, I, J]; "j" parts [shares, tiles of i, J].
    The tile has i where the other streams have samples: [IB, JB, XB], for W and dW see `read_weight`.
    """
    ACC: tl.constexpr = P.acc
    IB: tl.constexpr = P.TB
    JB: tl.constexpr = P.JB
    XB: tl.constexpr = P.XB
    HELD: tl.constexpr = P.held
    D: tl.constexpr = P.D
    first = tl.program_id(0).to(I.dtype if P.pair else tl.int64)  # W_i leaves few registers; tiles end at 2^31 too
    i = (first * IB + tl.arange(0, IB)).to(tl.int64)[:, None, None]
    j = (tl.program_id(1) * JB + tl.arange(0, JB))[None, :, None]
    x = tl.arange(0, XB)[None, None, :]
    d = tl.arange(0, HELD)[None, :, None, None]
    W, dW = (), ()
    if P.pair:
        W = read_weight(weight, i, j, x, d, I, P)
        for _ in tl.static_range(0, D, HELD):
            dW = dW + (tl.zeros([IB, HELD, JB, XB], ACC),)
    of_share = tl.zeros([IB, JB, 1], ACC)
    begin = tl.program_id(2).to(tl.int64) * share
    for sample in range(begin, tl.minimum(begin + share, B)):
        b = tl.zeros([1, 1, 1], tl.int64) + sample
        row, allowed, prior = pairs(logits, mask, i < I, b, i, j, strides, P)
        h = tl.zeros([IB, JB, XB], ACC)
        if P.pair:
            h, u_b = votes_of_held(W, u + (b * strides[5] + i * strides[6])[:, :, :, None], row, d, P)
            if P.logits:
                h = tl.where(allowed, h, 0.0)
        elif P.moves:
            h = votes(u, weight, b, i, j, x, row, allowed, strides, P)
        dh, db = vote_gradient(h, prior, allowed, queries, slopes, tops, totals, means, i < I, b, i, j, x, R, B, I, P)
        if P.pair:  # noqa: SIM102 - dW exists only there
            if P.need_weight:
                dW = add_weight_gradient(dW, u_b, dh, P)
        if P.need_u:
            store_input_gradient(du, dh, W, row, b, i, j, x, d, B, I, P)
        if P.need_logits == "bi" or P.need_logits == "b":
            store_logit_gradient(dlogits, db, b, i, j, B, I, P)
        else:
            of_share += db
    if P.pair:  # noqa: SIM102 - dW exists only there
        if P.need_weight:
            store_weight_gradient(dweight, dW, i, j, x, d, I, P)
    store_logit_sum(dlogits, of_share, i, j, I, P)


@triton.jit(do_not_specialize=["N", "share"])
def outer(x, y, takes_part, out, N, share, P: tl.constexpr):
    """out [shares, J, O, D]: sum over n of x[n, j, o] y[n, j, d], of rows n, j that take part; shares of the N rows."""
    ACC: tl.constexpr = P.acc
    OB: tl.constexpr = P.OB
    DB: tl.constexpr = P.DB
    O: tl.constexpr = P.O
    D: tl.constexpr = P.D
    J: tl.constexpr = P.J
    j = tl.program_id(0).to(tl.int64)
    tiles = (D + DB - 1) // DB
    o = (tl.program_id(1) // tiles * OB + tl.arange(0, OB))[:, None]
    d = (tl.program_id(1) % tiles * DB + tl.arange(0, DB))[None, :]
    total = tl.zeros([OB, DB], ACC)
    begin = tl.program_id(2).to(tl.int64) * share
    for n in range(begin, tl.minimum(begin + share, N)):
        x_n = tl.load(x + (n * J + j) * O + o, mask=o < O, other=0)
        y_n = tl.load(y + (n * J + j) * D + d, mask=d < D, other=0)
        if takes_part is not None:
            x_n = tl.where(tl.load(takes_part + n * J + j) != 0, x_n, 0.0)
        total = tl.fma(tl.broadcast_to(x_n, [OB, DB]), tl.broadcast_to(y_n, [OB, DB]), total)
    to = out + ((tl.program_id(2).to(tl.int64) * J + j) * O + o) * D + d
    tl.store(to, total, mask=(o < O) & (d < D))
