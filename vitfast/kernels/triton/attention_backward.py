"""Attention backward: dq, dk and dv from q, k, v, the output, its gradient and lse, without atomics.

With P the weights, dP = grad v^T and delta = rowsum(grad * out): dS = P * (dP - delta), dq = scale dS k,
dk = scale dS^T q, dv = P^T grad (Dao et al., "FlashAttention", 2022, appendix B.4). P is computed again from lse.

`backward_head`: one program a head that first makes dq, then dk and dv, in blocks of both: seven products a tile, small
tiles, for devices and head dims where `backward_short` (attention_backward_short.py) does not fit.
`backward_queries`, `backward_keys`: the same two halves, one program a block of queries and one a block of keys, for
lengths that fill a device so. The first leaves delta for the second.

Every gradient is written by one program in a fixed order, so the result is the same to the bit in every run.
"""

import triton
import triton.language as tl

from vitfast.kernels.triton.addresses import advance, row_step
from vitfast.kernels.triton.attention_tiles import (
    add_product,
    kept,
    load_boxes,
    load_rows,
    products,
    store_rows,
    zero_rows,
)
from vitfast.kernels.triton.overlap import after_kernel_before

LOG2E = tl.constexpr(1.4426950408889634)
# sizes: a kernel for every length would be compiled in the middle of the work
RUNTIME = (
    "q_batch", "q_row", "q_head", "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head",
    "dq_batch", "dq_row", "dk_batch", "dk_row", "heads", "queries", "keys", "all_queries",
    "threshold",
)  # fmt: skip


@triton.jit
def key_step(
    q0, q1, g0, g1,  # [BM, W0], [BM, W1], twice
    log_sum, delta,  # fp32 [BM]
    k0, k1, v0, v1,  # [BN, W0], [BN, W1], twice
    dk0, dk1, dv0, dv1,  # fp32 [BN, W0], [BN, W1], twice
    first_query, first_key, n, bh,  # n: keys of the head; bh: head of all images
    seed, scale, threshold, inv_keep,  # scale of the logits; of dropout: the rate times 2**31, 1 / (1 - rate)
    W1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    left=0,  # queries that are there, read where TAIL
    TAIL: tl.constexpr = False,
):  # fmt: skip
    """What BM queries add to dk and dv of BN keys, and their dS^T [BN, BM], not yet scaled.

    TAIL: queries from `left` on are zeros, of which a key of infinities makes NaN.
    """
    p = tl.exp2((products(k0, k1, q0, q1, W1, PRECISION) * scale - log_sum[None, :]) * LOG2E)
    if MASKED:
        # of a key past the end the logit is 0, and exp(0 - lse) may be infinite
        p = tl.where((first_key + tl.arange(0, BN) < n)[:, None], p, 0.0)
    if TAIL:
        p = tl.where((tl.arange(0, BM) < left)[None, :], p, 0.0)
    dp = products(v0, v1, g0, g1, W1, PRECISION)
    used = p
    if DROPOUT:
        rows = first_query + tl.arange(0, BM)
        columns = first_key + tl.arange(0, BN)
        keep = kept(seed, bh, rows[None, :], columns[:, None], threshold)
        used = tl.where(keep, p * inv_keep, 0.0)
        dp = tl.where(keep, dp * inv_keep, 0.0)
    dv0, dv1 = add_product(used.to(g0.dtype), g0, g1, dv0, dv1, W1, PRECISION)
    ds = (p * (dp - delta[None, :])).to(q0.dtype)
    dk0, dk1 = add_product(ds, q0, q1, dk0, dk1, W1, PRECISION)
    return dk0, dk1, dv0, dv1, ds


@triton.jit
def query_step(
    q0, q1, g0, g1,  # [BM, W0], [BM, W1], twice
    log_sum, delta,  # fp32 [BM]
    k, v,  # [n, D] of a head, D contiguous; with DESC those of `backward_queries`
    k_rest, v_rest, b, h,  # read with DESC: the same for second parts, the image, its head
    dq0, dq1,  # fp32 [BM, W0], [BM, W1]
    first_query, j, n, bh,  # j: first key; n: keys of the head; bh: head of all images
    seed, k_row, v_row, scale, threshold, inv_keep,  # strides in UNIT elements; the rest as in `key_step`
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr, MASKED: tl.constexpr, DESC: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What keys j to j + BN add to dq of BM queries, not yet scaled."""
    if DESC:
        k0, k1 = load_boxes(k, k_rest, b, h, j, BN, W0, W1)
        v0, v1 = load_boxes(v, v_rest, b, h, j, BN, W0, W1)
    else:
        k0, k1 = load_rows(advance(k, j, k_row, UNIT), row_step(k_row, UNIT, WIDE), n - j, BN, W0, W1, D, MASKED, WIDE)
        v0, v1 = load_rows(advance(v, j, v_row, UNIT), row_step(v_row, UNIT, WIDE), n - j, BN, W0, W1, D, MASKED, WIDE)
    p = tl.exp2((products(q0, q1, k0, k1, W1, PRECISION) * scale - log_sum[:, None]) * LOG2E)
    columns = j + tl.arange(0, BN)
    if MASKED:
        p = tl.where((columns < n)[None, :], p, 0.0)
    dp = products(g0, g1, v0, v1, W1, PRECISION)
    if DROPOUT:
        rows = first_query + tl.arange(0, BM)
        dp = tl.where(kept(seed, bh, rows[:, None], columns[None, :], threshold), dp * inv_keep, 0.0)
    ds = (p * (dp - delta[:, None])).to(k0.dtype)
    return add_product(ds, k0, k1, dq0, dq1, W1, PRECISION)


@triton.jit
def row_dot(a0, a1, b0, b1, W1: tl.constexpr):  # [M, W0], [M, W1], twice -> fp32 [M]
    total = tl.sum(a0.to(tl.float32) * b0.to(tl.float32), 1)
    if W1 > 0:
        total += tl.sum(a1.to(tl.float32) * b1.to(tl.float32), 1)
    return total


@triton.jit
def store_scaled(
    ptr,  # [first + left, D] of a head, D contiguous
    first, left, row,  # rows before, rows from there on; stride in 8 elements
    a0, a1, scale,  # fp32 [ROWS, W0], [ROWS, W1]; what they are multiplied by
    ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    a0 = a0 * scale
    if W1 > 0:
        a1 = a1 * scale
    store_rows(advance(ptr, first, row, 8), row_step(row, 8, WIDE), left, a0, a1, ROWS, W0, W1, D, WIDE)


@triton.jit
def queries_tile(
    q, k, v,  # [queries, D], [n, D], [n, D] of a head, D contiguous; with DESC k and v of `backward_queries`
    k_rest, v_rest, b, h,  # as in `query_step`
    grad, out,  # [queries, D] of a head, D contiguous
    lse, delta,  # fp32 [queries] of a head
    dq,  # [queries, D] of a head, D contiguous
    first, n, queries, bh,  # first query; keys and queries of the head; head of all images
    seed, q_row, k_row, v_row, out_row, dq_row,  # strides in UNIT elements, the last two in 8
    scale, threshold, inv_keep,  # as in `key_step`
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    PEEL: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, DESC: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and delta of BM queries of one head, from query `first` on."""
    left = queries - first
    rows = tl.arange(0, BM)
    q0, q1 = load_rows(advance(q, first, q_row, UNIT), row_step(q_row, UNIT, WIDE), left, BM, W0, W1, D, True, WIDE)
    g0, g1 = load_rows(advance(grad, first, out_row, 8), row_step(out_row, 8, WIDE), left, BM, W0, W1, D, True, WIDE)
    o0, o1 = load_rows(advance(out, first, out_row, 8), row_step(out_row, 8, WIDE), left, BM, W0, W1, D, True, WIDE)
    sums = row_dot(o0, o1, g0, g1, W1)
    tl.store(delta + first + rows, sums, mask=rows < left)
    log_sum = tl.load(lse + first + rows, mask=rows < left, other=float("inf"))
    dq0, dq1 = zero_rows(BM, W0, W1)
    whole = n
    if PEEL:
        whole = n // BN * BN
    for j in tl.range(0, whole, BN, num_stages=STAGES):
        dq0, dq1 = query_step(
            q0, q1, g0, g1, log_sum, sums, k, v, k_rest, v_rest, b, h, dq0, dq1, first, j, n, bh, seed, k_row, v_row,
            scale, threshold, inv_keep, D, W0, W1, BM, BN, UNIT, WIDE, not PEEL, DESC, DROPOUT, PRECISION,
        )  # fmt: skip
    if PEEL and whole < n:
        dq0, dq1 = query_step(
            q0, q1, g0, g1, log_sum, sums, k, v, k_rest, v_rest, b, h, dq0, dq1, first, whole, n, bh, seed, k_row,
            v_row, scale, threshold, inv_keep, D, W0, W1, BM, BN, UNIT, WIDE, True, DESC, DROPOUT, PRECISION,
        )  # fmt: skip
    store_scaled(dq, first, left, dq_row, dq0, dq1, scale, BM, W0, W1, D, WIDE)


@triton.jit
def keys_tile(
    q, k, v,  # [queries, D], [n, D], [n, D] of a head, D contiguous
    grad,  # [queries, D] of a head, D contiguous
    q_rest, grad_rest, b, h,  # read with DESC, where q and grad are those of `backward_keys`, as these are; image, head
    lse, delta,  # fp32 [queries] of a head
    dk, dv,  # [keys, D] of a head, D contiguous
    first, n, keys, queries, bh,  # first key; keys that take part, all keys, queries; head of all images
    seed, q_row, k_row, v_row, out_row, dk_row,  # strides in UNIT elements, the last two in 8; dk_row: dv's too
    scale, threshold, inv_keep,  # as in `key_step`
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, LENGTHS: tl.constexpr, DESC: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys of one head, from key `first` on; zeros from key `n` on."""
    k0, k1 = load_rows(
        advance(k, first, k_row, UNIT), row_step(k_row, UNIT, WIDE), n - first, BN, W0, W1, D, True, WIDE
    )
    v0, v1 = load_rows(
        advance(v, first, v_row, UNIT), row_step(v_row, UNIT, WIDE), n - first, BN, W0, W1, D, True, WIDE
    )
    dk0, dk1 = zero_rows(BN, W0, W1)
    dv0, dv1 = zero_rows(BN, W0, W1)
    rows = tl.arange(0, BM)
    q_step = row_step(q_row, UNIT, WIDE)
    g_step = row_step(out_row, 8, WIDE)
    last = queries
    if LENGTHS:
        # an image without keys has an lse of -inf
        last = tl.where(first < n, queries, 0)
    for i in tl.range(0, last, BM, num_stages=STAGES):
        left = queries - i
        if DESC:
            q0, q1 = load_boxes(q, q_rest, b, h, i, BM, W0, W1)
            g0, g1 = load_boxes(grad, grad_rest, b, h, i, BM, W0, W1)
        else:
            # of a row of zeros a key of infinities would get NaN
            q0, q1 = load_rows(advance(q, i, q_row, UNIT), q_step, left, BM, W0, W1, D, False, WIDE, True)
            g0, g1 = load_rows(advance(grad, i, out_row, 8), g_step, left, BM, W0, W1, D, True, WIDE)
        log_sum = tl.load(lse + i + rows, mask=rows < left, other=float("inf"))
        sums = tl.load(delta + i + rows, mask=rows < left, other=0.0)
        dk0, dk1, dv0, dv1, _ = key_step(
            q0, q1, g0, g1, log_sum, sums, k0, k1, v0, v1, dk0, dk1, dv0, dv1, i, first, n, bh, seed,
            scale, threshold, inv_keep, W1, BM, BN, LENGTHS, DROPOUT, PRECISION, left, DESC,
        )  # fmt: skip
    store_scaled(dk, first, keys - first, dk_row, dk0, dk1, scale, BN, W0, W1, D, WIDE)
    store_scaled(dv, first, keys - first, dk_row, dv0, dv1, 1.0, BN, W0, W1, D, WIDE)


@triton.jit(do_not_specialize=RUNTIME)
def backward_queries(
    q,  # [B, queries, heads, D], with PACKED [1, all_queries, heads, D]; D contiguous
    k, v,  # [B, keys, heads, D], with PACKED [1, all keys, heads, D]; D contiguous. With DESC as in `load_boxes`
    k_rest, v_rest,  # the same, with DESC and W1 for the second parts of rows: boxes of [1, 1, BN, W1]
    grad, out,  # [B, queries, heads * D], with PACKED [1, all_queries, heads * D]; contiguous
    lse, delta,  # fp32 [B, heads, queries], with PACKED [1, heads, all_queries]; contiguous
    dq,  # [B, queries, heads, D], with PACKED [1, all_queries, heads, D]; heads D apart
    lengths, seed,  # int32 [B], read where LENGTHS; int64 [1], read where DROPOUT
    q_starts, k_starts,  # int32 [B + 1], read where PACKED: where each image begins among all
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,  # strides in UNIT elements
    dq_batch, dq_row,  # strides in 8 elements
    heads, queries, keys, all_queries,  # of an image, with PACKED the most of one; all_queries: of all images
    scale, threshold, inv_keep,  # as in `key_step`
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    PEEL: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, LENGTHS: tl.constexpr, PACKED: tl.constexpr,
    DESC: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and delta. DESC, not with LENGTHS and PACKED: keys and values come by bulk copies."""
    after_kernel_before()
    tiles = tl.cdiv(queries, BM)
    program = tl.program_id(0)
    m = program % tiles
    bh = program // tiles
    b = bh // heads
    h = bh % heads
    n = keys
    rows = queries
    out_row = heads * (D // 8)
    at_out = (b.to(tl.int64) * queries * heads + h) * D
    at_sums = bh.to(tl.int64) * queries
    first_query = b.to(tl.int64) * 0
    first_key = first_query
    image = b
    if PACKED:
        first_query = tl.load(q_starts + b).to(tl.int64)
        first_key = tl.load(k_starts + b).to(tl.int64)
        rows = tl.load(q_starts + b + 1) - tl.load(q_starts + b)
        n = tl.load(k_starts + b + 1) - tl.load(k_starts + b)
        at_out = (first_query * heads + h) * D
        at_sums = h.to(tl.int64) * all_queries + first_query
        image = b * 0
    if LENGTHS:
        n = tl.minimum(tl.load(lengths + b), keys)
    number = 0
    if DROPOUT:
        number = tl.load(seed)
    if not DESC:
        k = advance(advance(advance(k, image, k_batch, UNIT), first_key, k_row, UNIT), h, k_head, UNIT)
        v = advance(advance(advance(v, image, v_batch, UNIT), first_key, v_row, UNIT), h, v_head, UNIT)
    if m * BM < rows:
        queries_tile(
            advance(advance(advance(q, image, q_batch, UNIT), first_query, q_row, UNIT), h, q_head, UNIT),
            k, v, k_rest, v_rest, b, h,
            grad + at_out, out + at_out, lse + at_sums, delta + at_sums,
            advance(advance(dq, image, dq_batch, 8), first_query, dq_row, 8) + h * D,
            m * BM, n, rows, bh, number, q_row, k_row, v_row, out_row, dq_row, scale, threshold, inv_keep,
            D, W0, W1, BM, BN, STAGES, PEEL, UNIT, WIDE, DESC, DROPOUT, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def backward_keys(
    q,  # [B, queries, heads, D], with PACKED [1, all_queries, heads, D]; D contiguous. With DESC as in `load_boxes`
    k, v,  # [B, keys, heads, D], with PACKED [1, all keys, heads, D]; D contiguous
    grad,  # [B, queries, heads * D], with PACKED [1, all_queries, heads * D]; contiguous. With DESC as q
    q_rest, grad_rest,  # the same, with DESC and W1 for the second parts of rows: boxes of [1, 1, BM, W1]
    lse, delta,  # fp32 [B, heads, queries], with PACKED [1, heads, all_queries]; contiguous
    dk, dv,  # [B, keys, heads, D], with PACKED [1, all keys, heads, D]; heads D apart
    lengths, seed,  # int32 [B], read where LENGTHS; int64 [1], read where DROPOUT
    q_starts, k_starts,  # int32 [B + 1], read where PACKED: where each image begins among all
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,  # strides in UNIT elements
    dk_batch, dk_row,  # strides of dk and dv in 8 elements
    heads, queries, keys, all_queries,  # of an image, with PACKED the most of one; all_queries: of all images
    scale, threshold, inv_keep,  # as in `key_step`
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, LENGTHS: tl.constexpr, PACKED: tl.constexpr, DESC: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv, after `backward_queries`. DESC, not with LENGTHS and PACKED: q and grad come by bulk copies."""
    after_kernel_before()
    tiles = tl.cdiv(keys, BN)
    program = tl.program_id(0)
    block = program % tiles
    bh = program // tiles
    b = bh // heads
    h = bh % heads
    there = keys
    rows = queries
    out_row = heads * (D // 8)
    at_out = (b.to(tl.int64) * queries * heads + h) * D
    at_sums = bh.to(tl.int64) * queries
    first_query = b.to(tl.int64) * 0
    first_key = first_query
    image = b
    if PACKED:
        first_query = tl.load(q_starts + b).to(tl.int64)
        first_key = tl.load(k_starts + b).to(tl.int64)
        rows = tl.load(q_starts + b + 1) - tl.load(q_starts + b)
        there = tl.load(k_starts + b + 1) - tl.load(k_starts + b)
        at_out = (first_query * heads + h) * D
        at_sums = h.to(tl.int64) * all_queries + first_query
        image = b * 0
    n = there
    if LENGTHS:
        n = tl.minimum(tl.load(lengths + b), keys)
    number = 0
    if DROPOUT:
        number = tl.load(seed)
    if not DESC:
        q = advance(advance(advance(q, image, q_batch, UNIT), first_query, q_row, UNIT), h, q_head, UNIT)
        grad += at_out
    if block * BN < there:
        keys_tile(
            q,
            advance(advance(advance(k, image, k_batch, UNIT), first_key, k_row, UNIT), h, k_head, UNIT),
            advance(advance(advance(v, image, v_batch, UNIT), first_key, v_row, UNIT), h, v_head, UNIT),
            grad, q_rest, grad_rest, b, h, lse + at_sums, delta + at_sums,
            advance(advance(dk, image, dk_batch, 8), first_key, dk_row, 8) + h * D,
            advance(advance(dv, image, dk_batch, 8), first_key, dk_row, 8) + h * D,
            block * BN, n, there, rows, bh, number, q_row, k_row, v_row, out_row, dk_row,
            scale, threshold, inv_keep,
            D, W0, W1, BM, BN, STAGES, UNIT, WIDE, LENGTHS, DESC, DROPOUT, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def backward_head(
    q, k, v,  # [B, queries, heads, D], twice [B, keys, heads, D]; D contiguous
    grad, out,  # [B, queries, heads * D], contiguous
    lse, delta,  # fp32 [B, heads, queries], contiguous
    dq, dk, dv,  # [B, queries, heads, D], twice [B, keys, heads, D]; heads D apart
    lengths, seed,  # int32 [B], read where LENGTHS; int64 [1], read where DROPOUT
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,  # strides in UNIT elements
    dq_batch, dq_row, dk_batch, dk_row,  # strides in 8 elements; dk's are dv's too
    heads, queries, keys,  # of an image
    scale, threshold, inv_keep,  # as in `key_step`
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    PEEL: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, LENGTHS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, then dk and dv, of one head."""
    after_kernel_before()
    bh = tl.program_id(0)
    b = bh // heads
    h = bh % heads
    q = advance(advance(q, b, q_batch, UNIT), h, q_head, UNIT)
    k = advance(advance(k, b, k_batch, UNIT), h, k_head, UNIT)
    v = advance(advance(v, b, v_batch, UNIT), h, v_head, UNIT)
    out_row = heads * (D // 8)
    at_out = (b.to(tl.int64) * queries * heads + h) * D
    grad += at_out
    lse += bh.to(tl.int64) * queries
    delta += bh.to(tl.int64) * queries
    n = keys
    if LENGTHS:
        n = tl.minimum(tl.load(lengths + b), keys)
    number = 0
    if DROPOUT:
        number = tl.load(seed)
    for first in tl.range(0, queries, BM, num_stages=1):
        queries_tile(
            q, k, v, k, v, b, h, grad, out + at_out, lse, delta, advance(dq, b, dq_batch, 8) + h * D, first, n, queries,
            bh, number, q_row, k_row, v_row, out_row, dq_row, scale, threshold, inv_keep,
            D, W0, W1, BM, BN, STAGES, PEEL, UNIT, WIDE, False, DROPOUT, PRECISION,
        )  # fmt: skip
    # the second half reads what all threads have left in delta
    tl.debug_barrier()
    for first in tl.range(0, keys, BN, num_stages=1):
        keys_tile(
            q, k, v, grad, q, grad, b, h, lse, delta,
            advance(dk, b, dk_batch, 8) + h * D, advance(dv, b, dk_batch, 8) + h * D,
            first, n, keys, queries, bh, number, q_row, k_row, v_row, out_row, dk_row,
            scale, threshold, inv_keep, D, W0, W1, BM, BN, STAGES, UNIT, WIDE, LENGTHS, False, DROPOUT, PRECISION,
        )  # fmt: skip
