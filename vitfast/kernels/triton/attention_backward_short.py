"""Attention backward of few keys: one program a head, all keys in registers, queries in blocks: five products a tile.

Up to 256 keys, in up to three parts as in the forward. `backward_short` makes delta as it goes, or reads what
`backward_delta` has left. Formulas and the other ways: attention_backward.py.
"""

import triton
import triton.language as tl

from vitfast.kernels.triton.addresses import advance, row_step
from vitfast.kernels.triton.attention_backward import RUNTIME, key_step, row_dot, store_scaled
from vitfast.kernels.triton.attention_tiles import load_rows, query_rows, zero_columns, zero_rows
from vitfast.kernels.triton.overlap import after_kernel_before


@triton.jit(do_not_specialize=RUNTIME)
def backward_delta(
    grad, out,  # [B, queries, heads * D], contiguous
    delta,  # fp32 [B, heads, queries], contiguous
    heads, queries,  # of an image
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, BM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    after_kernel_before()
    tiles = tl.cdiv(queries, BM)
    first = tl.program_id(0) % tiles * BM
    bh = tl.program_id(0) // tiles
    left = queries - first
    out_row = heads * (D // 8)
    at_out = ((bh // heads).to(tl.int64) * queries * heads + bh % heads) * D
    step = row_step(out_row, 8, WIDE)
    g0, g1 = load_rows(advance(grad + at_out, first, out_row, 8), step, left, BM, W0, W1, D, True, WIDE)
    o0, o1 = load_rows(advance(out + at_out, first, out_row, 8), step, left, BM, W0, W1, D, True, WIDE)
    rows = tl.arange(0, BM)
    tl.store(delta + bh.to(tl.int64) * queries + first + rows, row_dot(o0, o1, g0, g1, W1), mask=rows < left)


@triton.jit(do_not_specialize=RUNTIME)
def backward_short(
    q, k, v,  # [B, queries, heads, D], twice [B, keys, heads, D]; D contiguous
    grad, out,  # [B, queries, heads * D], contiguous
    lse, delta,  # fp32 [B, heads, queries], contiguous
    dq, dk, dv,  # [B, queries, heads, D], twice [B, keys, heads, D]; heads D apart
    lengths, seed,  # int32 [B], read where LENGTHS; int64 [1], read where DROPOUT
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,  # strides in UNIT elements
    dq_batch, dq_row, dk_batch, dk_row,  # strides in 8 elements; dk's are dv's too
    heads, queries, keys,  # of an image
    scale, threshold, inv_keep,  # as in `key_step`
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, BM: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    P2: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, LENGTHS: tl.constexpr,
    DROPOUT: tl.constexpr, DELTA: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P0 + P1 + P2 is at least `keys`, and without the last of them less: only that one is masked.

    DELTA: it is there already. TURNED: dq is made with its columns as rows, of which there are 64 for a wgmma.
    """
    after_kernel_before()
    bh = tl.program_id(0)
    b = bh // heads
    h = bh % heads
    q = advance(advance(q, b, q_batch, UNIT), h, q_head, UNIT)
    k = advance(advance(k, b, k_batch, UNIT), h, k_head, UNIT)
    v = advance(advance(v, b, v_batch, UNIT), h, v_head, UNIT)
    dq = advance(dq, b, dq_batch, 8) + h * D
    dk = advance(dk, b, dk_batch, 8) + h * D
    dv = advance(dv, b, dk_batch, 8) + h * D
    out_row = heads * (D // 8)
    at_out = (b.to(tl.int64) * queries * heads + h) * D
    grad += at_out
    out += at_out
    lse += bh.to(tl.int64) * queries
    delta += bh.to(tl.int64) * queries
    n = keys
    if LENGTHS:
        n = tl.minimum(tl.load(lengths + b), keys)
    number = 0
    if DROPOUT:
        number = tl.load(seed)
    k_step = row_step(k_row, UNIT, WIDE)
    v_step = row_step(v_row, UNIT, WIDE)
    k00, k01 = load_rows(k, k_step, n, P0, W0, W1, D, LENGTHS or P1 == 0, WIDE)
    v00, v01 = load_rows(v, v_step, n, P0, W0, W1, D, LENGTHS or P1 == 0, WIDE)
    dk00, dk01 = zero_rows(P0, W0, W1)
    dv00, dv01 = zero_rows(P0, W0, W1)
    k10, k11, v10, v11, dk10, dk11, dv10, dv11 = k00, k01, v00, v01, dk00, dk01, dv00, dv01
    k20, k21, v20, v21, dk20, dk21, dv20, dv21 = k00, k01, v00, v01, dk00, dk01, dv00, dv01
    if P1 > 0:
        k10, k11 = load_rows(k + P0 * k_step, k_step, n - P0, P1, W0, W1, D, LENGTHS or P2 == 0, WIDE)
        v10, v11 = load_rows(v + P0 * v_step, v_step, n - P0, P1, W0, W1, D, LENGTHS or P2 == 0, WIDE)
        dk10, dk11 = zero_rows(P1, W0, W1)
        dv10, dv11 = zero_rows(P1, W0, W1)
    if P2 > 0:
        k20, k21 = load_rows(k + (P0 + P1) * k_step, k_step, n - P0 - P1, P2, W0, W1, D, True, WIDE)
        v20, v21 = load_rows(v + (P0 + P1) * v_step, v_step, n - P0 - P1, P2, W0, W1, D, True, WIDE)
        dk20, dk21 = zero_rows(P2, W0, W1)
        dv20, dv21 = zero_rows(P2, W0, W1)
    rows = tl.arange(0, BM)
    for i in tl.range(0, queries, BM, num_stages=STAGES):
        left = queries - i
        # as in `keys_tile`
        q0, q1 = load_rows(
            advance(q, i, q_row, UNIT), row_step(q_row, UNIT, WIDE), left, BM, W0, W1, D, False, WIDE, True
        )
        g0, g1 = load_rows(advance(grad, i, out_row, 8), row_step(out_row, 8, WIDE), left, BM, W0, W1, D, True, WIDE)
        if DELTA:
            sums = tl.load(delta + i + rows, mask=rows < left, other=0.0)
        else:
            o0, o1 = load_rows(advance(out, i, out_row, 8), row_step(out_row, 8, WIDE), left, BM, W0, W1, D, True, WIDE)
            sums = row_dot(o0, o1, g0, g1, W1)
        log_sum = tl.load(lse + i + rows, mask=rows < left, other=float("inf"))
        if TURNED:
            dq0, dq1 = zero_columns(BM, W0, W1)
        else:
            dq0, dq1 = zero_rows(BM, W0, W1)
        dk00, dk01, dv00, dv01, ds0 = key_step(
            q0, q1, g0, g1, log_sum, sums, k00, k01, v00, v01, dk00, dk01, dv00, dv01, i, 0, n, bh, number,
            scale, threshold, inv_keep, W1, BM, P0, LENGTHS or P1 == 0, DROPOUT, PRECISION,
        )  # fmt: skip
        dq0, dq1 = query_rows(ds0, k00, k01, dq0, dq1, W1, TURNED, PRECISION)
        if P1 > 0:
            dk10, dk11, dv10, dv11, ds1 = key_step(
                q0, q1, g0, g1, log_sum, sums, k10, k11, v10, v11, dk10, dk11, dv10, dv11, i, P0, n, bh, number,
                scale, threshold, inv_keep, W1, BM, P1, LENGTHS or P2 == 0, DROPOUT, PRECISION,
            )  # fmt: skip
            dq0, dq1 = query_rows(ds1, k10, k11, dq0, dq1, W1, TURNED, PRECISION)
        if P2 > 0:
            dk20, dk21, dv20, dv21, ds2 = key_step(
                q0, q1, g0, g1, log_sum, sums, k20, k21, v20, v21, dk20, dk21, dv20, dv21, i, P0 + P1, n, bh, number,
                scale, threshold, inv_keep, W1, BM, P2, True, DROPOUT, PRECISION,
            )  # fmt: skip
            dq0, dq1 = query_rows(ds2, k20, k21, dq0, dq1, W1, TURNED, PRECISION)
        if TURNED:
            dq0 = tl.trans(dq0)
            if W1 > 0:
                dq1 = tl.trans(dq1)
        store_scaled(dq, i, left, dq_row, dq0, dq1, scale, BM, W0, W1, D, WIDE)
    store_scaled(dk, keys * 0, keys, dk_row, dk00, dk01, scale, P0, W0, W1, D, WIDE)
    store_scaled(dv, keys * 0, keys, dk_row, dv00, dv01, 1.0, P0, W0, W1, D, WIDE)
    if P1 > 0:
        store_scaled(dk, keys * 0 + P0, keys - P0, dk_row, dk10, dk11, scale, P1, W0, W1, D, WIDE)
        store_scaled(dv, keys * 0 + P0, keys - P0, dk_row, dv10, dv11, 1.0, P1, W0, W1, D, WIDE)
    if P2 > 0:
        store_scaled(dk, keys * 0 + (P0 + P1), keys - P0 - P1, dk_row, dk20, dk21, scale, P2, W0, W1, D, WIDE)
        store_scaled(dv, keys * 0 + (P0 + P1), keys - P0 - P1, dk_row, dv20, dv21, 1.0, P2, W0, W1, D, WIDE)
