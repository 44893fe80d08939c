"""Attention forward: softmax(scale q k^T) v for the lengths of a ViT.

`forward_short`: all keys of a head at once, no online softmax, for up to 272 keys. They come in up to three parts (208
keys are 128 + 64 + 16), so that 197 keys cost 208 and not 256.
`forward_online`: any number of keys, in blocks, with the online softmax (Milakov and Gimelshein, 2018).

Both read q, k and v wherever they lie, one row of D elements after another at any distance, and write the output where
the next projection reads it. Weights and sums are fp32; lse is the natural logarithm.
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

LN2 = tl.constexpr(0.6931471805599453)
# sizes: a kernel for every length would be compiled in the middle of the work
RUNTIME = (
    "q_batch", "q_row", "q_head", "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head", "heads", "queries",
    "keys", "all_queries", "threshold",
)  # fmt: skip


@triton.jit
def part_scores(
    q0, q1,  # [BM, W0], [BM, W1]
    k0, k1,  # [P, W0], [P, W1], from key `first` on
    first, n,  # keys; n of a head
    P: tl.constexpr, W1: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits, fp32 [BM, P], not yet scaled, with -inf from key `n` on where M."""
    s = products(q0, q1, k0, k1, W1, PRECISION)
    if M:
        s = tl.where((first + tl.arange(0, P) < n)[None, :], s, float("-inf"))
    return s


@triton.jit
def part_weights(
    s,  # fp32 [BM, P], logits not yet scaled
    shift,  # fp32 [BM]
    scale_log2,  # scale / ln 2
    seed, bh, m, first, threshold,  # as in `kept`: head of all images, tile of queries, first key
    BM: tl.constexpr, P: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """exp2(scale_log2 * s - shift), what is left of it after dropout, and its sum before, fp32 [BM].

    shift: the largest of scale_log2 * s, rounded. What it is off by is the same factor for the whole row: it cancels
    in the output, and `finish_tile` takes it out of lse.
    """
    p = tl.exp2(tl.fma(s, scale_log2, -shift[:, None]))
    total = tl.sum(p, 1)
    if DROPOUT:
        rows = m * BM + tl.arange(0, BM)
        columns = first + tl.arange(0, P)
        p = tl.where(kept(seed, bh, rows[:, None], columns[None, :], threshold), p, 0.0)
    return p, total


@triton.jit
def short_tile(
    q,  # [queries, D] of a head, D contiguous
    out,  # [queries, D] of a head, D contiguous
    lse,  # fp32 [queries] of a head
    m, bh, n, queries,  # tile of queries, head of all images, keys and queries of the head
    seed, q_row, out_row,  # of dropout; strides in UNIT and in 8 elements
    scale, scale_log2, threshold, inv_keep,  # of the logits, and that / ln 2; the rate times 2**31, 1 / (1 - rate)
    k00, k01, k10, k11, k20, k21,  # [P0, W0], [P0, W1], [P1, W0], [P1, W1], [P2, W0], [P2, W1]
    v00, v01, v10, v11, v20, v21,  # [P0, W0], [P0, W1], [P1, W0], [P1, W1], [P2, W0], [P2, W1]
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, BM: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries m * BM and on, of one head, against all its keys."""
    left = queries - m * BM
    q0, q1 = load_rows(advance(q, m * BM, q_row, UNIT), row_step(q_row, UNIT, WIDE), left, BM, W0, W1, D, True, WIDE)
    s0 = part_scores(q0, q1, k00, k01, 0, n, P0, W1, LENGTHS or P1 == 0, PRECISION)
    top = tl.max(s0, 1)
    if P1 > 0:
        s1 = part_scores(q0, q1, k10, k11, P0, n, P1, W1, LENGTHS or P2 == 0, PRECISION)
        top = tl.maximum(top, tl.max(s1, 1))
    if P2 > 0:
        s2 = part_scores(q0, q1, k20, k21, P0 + P1, n, P2, W1, True, PRECISION)
        top = tl.maximum(top, tl.max(s2, 1))
    if LENGTHS:
        # no key at all: all weights are exp2(-inf - 0)
        top = tl.where(n > 0, top, 0.0)
    shift = tl.fma(top, scale_log2, 0.0)
    acc0, acc1 = zero_rows(BM, W0, W1)
    p0, total = part_weights(s0, shift, scale_log2, seed, bh, m, 0, threshold, BM, P0, DROPOUT)
    acc0, acc1 = add_product(p0.to(v00.dtype), v00, v01, acc0, acc1, W1, PRECISION)
    if P1 > 0:
        p1, more = part_weights(s1, shift, scale_log2, seed, bh, m, P0, threshold, BM, P1, DROPOUT)
        total += more
        acc0, acc1 = add_product(p1.to(v00.dtype), v10, v11, acc0, acc1, W1, PRECISION)
    if P2 > 0:
        p2, more = part_weights(s2, shift, scale_log2, seed, bh, m, P0 + P1, threshold, BM, P2, DROPOUT)
        total += more
        acc0, acc1 = add_product(p2.to(v00.dtype), v20, v21, acc0, acc1, W1, PRECISION)
    finish_tile(
        out, lse, m, n, left, out_row, acc0, acc1, top, shift, total, scale, scale_log2, inv_keep,
        D, W0, W1, BM, WIDE, LENGTHS, DROPOUT,
    )  # fmt: skip


@triton.jit
def finish_tile(
    out,  # [queries, D] of a head, D contiguous
    lse,  # fp32 [queries] of a head
    m, n, left, out_row,  # tile of queries, keys of the head, queries from this tile on; stride in 8 elements
    acc0, acc1,  # fp32 [BM, W0], [BM, W1]
    top, shift, total,  # fp32 [BM]: largest logit, not yet scaled; what exponents are less; sum of the weights
    scale, scale_log2, inv_keep,  # of the logits, and that / ln 2; 1 / (1 - rate)
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, BM: tl.constexpr, WIDE: tl.constexpr,
    EMPTY: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Divide by the sums; write out and lse. EMPTY: there may be no key, which gives zeros and an lse of -inf."""
    log_sum = top * scale + (tl.log2(total) - tl.fma(top, scale_log2, -shift)) * LN2
    if EMPTY:
        log_sum = tl.where(n > 0, log_sum, float("-inf"))
        total = tl.where(n > 0, total, 1.0)
    rows = tl.arange(0, BM)
    tl.store(lse + m * BM + rows, log_sum, mask=rows < left)
    factor = 1.0 / total
    if DROPOUT:
        factor = factor * inv_keep
    acc0 = acc0 * factor[:, None]
    if W1 > 0:
        acc1 = acc1 * factor[:, None]
    store_rows(advance(out, m * BM, out_row, 8), row_step(out_row, 8, WIDE), left, acc0, acc1, BM, W0, W1, D, WIDE)


@triton.jit(do_not_specialize=RUNTIME)
def forward_short(
    q,  # [B, queries, heads, D], D contiguous
    k, v,  # [B, keys, heads, D], D contiguous
    out,  # [B, queries, heads * D], contiguous
    lse,  # fp32 [B, heads, queries], contiguous
    lengths, seed,  # int32 [B], read where LENGTHS; int64 [1], read where DROPOUT
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,  # strides in UNIT elements
    heads, queries, keys,  # of an image
    scale, scale_log2, threshold, inv_keep,  # of the logits, and that / ln 2; the rate times 2**31, 1 / (1 - rate)
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, BM: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, LOOP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P0 + P1 + P2 is at least `keys`, and without the last of them less: only that one is masked.

    LOOP: one program a head, which reads keys and values once; otherwise one a tile of queries.
    """
    after_kernel_before()
    tiles = tl.cdiv(queries, BM)
    bh = tl.program_id(0)
    m = 0
    if not LOOP:
        m = bh % tiles
        bh = bh // tiles
    b = bh // heads
    h = bh % heads
    n = keys
    if LENGTHS:
        n = tl.minimum(tl.load(lengths + b), keys)
    number = 0
    if DROPOUT:
        number = tl.load(seed)
    q = advance(advance(q, b, q_batch, UNIT), h, q_head, UNIT)
    k = advance(advance(k, b, k_batch, UNIT), h, k_head, UNIT)
    v = advance(advance(v, b, v_batch, UNIT), h, v_head, UNIT)
    out_row = heads * (D // 8)
    out = out + (b.to(tl.int64) * queries * heads + h) * D
    lse = lse + bh.to(tl.int64) * queries
    k_step = row_step(k_row, UNIT, WIDE)
    v_step = row_step(v_row, UNIT, WIDE)
    k00, k01 = load_rows(k, k_step, n, P0, W0, W1, D, LENGTHS or P1 == 0, WIDE)
    v00, v01 = load_rows(v, v_step, n, P0, W0, W1, D, LENGTHS or P1 == 0, WIDE)
    k10, k11, v10, v11, k20, k21, v20, v21 = k00, k01, v00, v01, k00, k01, v00, v01
    if P1 > 0:
        k10, k11 = load_rows(k + P0 * k_step, k_step, n - P0, P1, W0, W1, D, LENGTHS or P2 == 0, WIDE)
        v10, v11 = load_rows(v + P0 * v_step, v_step, n - P0, P1, W0, W1, D, LENGTHS or P2 == 0, WIDE)
    if P2 > 0:
        k20, k21 = load_rows(k + (P0 + P1) * k_step, k_step, n - P0 - P1, P2, W0, W1, D, True, WIDE)
        v20, v21 = load_rows(v + (P0 + P1) * v_step, v_step, n - P0 - P1, P2, W0, W1, D, True, WIDE)
    if LOOP:
        for each in tl.range(0, tiles):
            short_tile(
                q, out, lse, each, bh, n, queries, number, q_row, out_row, scale, scale_log2, threshold, inv_keep,
                k00, k01, k10, k11, k20, k21, v00, v01, v10, v11, v20, v21,
                D, W0, W1, BM, P0, P1, P2, UNIT, WIDE, LENGTHS, DROPOUT, PRECISION,
            )  # fmt: skip
    else:
        short_tile(
            q, out, lse, m, bh, n, queries, number, q_row, out_row, scale, scale_log2, threshold, inv_keep,
            k00, k01, k10, k11, k20, k21, v00, v01, v10, v11, v20, v21,
            D, W0, W1, BM, P0, P1, P2, UNIT, WIDE, LENGTHS, DROPOUT, PRECISION,
        )  # fmt: skip


@triton.jit
def online_step(
    q0, q1,  # [BM, W0], [BM, W1]
    k, v,  # [n, D] of a head, D contiguous; with DESC those of `forward_online`
    k_rest, v_rest, b, h,  # read with DESC: the same for second parts, the image, its head
    acc0, acc1,  # fp32 [BM, W0], [BM, W1]
    top, shift, total,  # fp32 [BM], as in `finish_tile`
    j, n, bh, m,  # first key, keys of the head, head of all images, tile of queries
    seed, k_row, v_row, scale_log2, threshold,  # strides in UNIT elements; the rest as in `short_tile`
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr, MASKED: tl.constexpr, DESC: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys j to j + BN, all of them there unless MASKED."""
    if DESC:
        k0, k1 = load_boxes(k, k_rest, b, h, j, BN, W0, W1)
    else:
        k0, k1 = load_rows(advance(k, j, k_row, UNIT), row_step(k_row, UNIT, WIDE), n - j, BN, W0, W1, D, MASKED, WIDE)
    s = part_scores(q0, q1, k0, k1, j, n, BN, W1, MASKED, PRECISION)
    higher = tl.maximum(top, tl.max(s, 1))
    # as long as every logit was -inf there is nothing to scale, and -inf - -inf is no number
    # fma, lest a compiler makes one of the product and the difference below, which would be of another shift
    shift_now = tl.fma(tl.where(higher == float("-inf"), 0.0, higher), scale_log2, 0.0)
    shrink = tl.exp2(shift - shift_now)
    p, more = part_weights(s, shift_now, scale_log2, seed, bh, m, j, threshold, BM, BN, DROPOUT)
    acc0 = acc0 * shrink[:, None]
    if W1 > 0:
        acc1 = acc1 * shrink[:, None]
    if DESC:
        v0, v1 = load_boxes(v, v_rest, b, h, j, BN, W0, W1)
    else:
        v0, v1 = load_rows(advance(v, j, v_row, UNIT), row_step(v_row, UNIT, WIDE), n - j, BN, W0, W1, D, MASKED, WIDE)
    acc0, acc1 = add_product(p.to(v0.dtype), v0, v1, acc0, acc1, W1, PRECISION)
    return acc0, acc1, higher, shift_now, total * shrink + more


@triton.jit(do_not_specialize=RUNTIME)
def forward_online(
    q,  # [B, queries, heads, D], with PACKED [1, all_queries, heads, D]; D contiguous
    k, v,  # [B, keys, heads, D], with PACKED [1, all keys, heads, D]; D contiguous. With DESC as in `load_boxes`
    k_rest, v_rest,  # the same, with DESC and W1 for the second parts of rows: boxes of [1, 1, BN, W1]
    out,  # [B, queries, heads * D], with PACKED [1, all_queries, heads * D]; contiguous
    lse,  # fp32 [B, heads, queries], with PACKED [1, heads, all_queries]; contiguous
    lengths, seed,  # int32 [B], read where LENGTHS; int64 [1], read where DROPOUT
    q_starts, k_starts,  # int32 [B + 1], read where PACKED: where each image begins among all
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,  # strides in UNIT elements
    heads, queries, keys, all_queries,  # of an image, with PACKED the most of one; all_queries: of all images
    scale, scale_log2, threshold, inv_keep,  # of the logits, and that / ln 2; the rate times 2**31, 1 / (1 - rate)
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    PEEL: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, LENGTHS: tl.constexpr, PACKED: tl.constexpr,
    DESC: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PEEL: the last block of keys apart, so that only that one is masked, at the price of its code twice.

    PACKED: images of any length, one after the other. DESC, not with it: keys and values come by bulk copies.
    """
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
    if PACKED:
        first = tl.load(q_starts + b)
        rows = tl.load(q_starts + b + 1) - first
        q = advance(q, first, q_row, UNIT)
        out = out + (first.to(tl.int64) * heads + h) * D
        lse = lse + h.to(tl.int64) * all_queries + first
        first = tl.load(k_starts + b)
        n = tl.load(k_starts + b + 1) - first
        k = advance(k, first, k_row, UNIT)
        v = advance(v, first, v_row, UNIT)
    else:
        q = advance(q, b, q_batch, UNIT)
        if not DESC:
            k = advance(k, b, k_batch, UNIT)
            v = advance(v, b, v_batch, UNIT)
        out = out + (b.to(tl.int64) * queries * heads + h) * D
        lse = lse + bh.to(tl.int64) * queries
    if LENGTHS:
        n = tl.minimum(tl.load(lengths + b), keys)
    number = 0
    if DROPOUT:
        number = tl.load(seed)
    q = advance(q, h, q_head, UNIT)
    if not DESC:
        k = advance(k, h, k_head, UNIT)
        v = advance(v, h, v_head, UNIT)
    left = rows - m * BM
    if left > 0:
        q0, q1 = load_rows(
            advance(q, m * BM, q_row, UNIT), row_step(q_row, UNIT, WIDE), left, BM, W0, W1, D, True, WIDE
        )
        acc0, acc1 = zero_rows(BM, W0, W1)
        top = tl.full((BM,), float("-inf"), tl.float32)
        shift = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        whole = n
        if PEEL:
            whole = n // BN * BN
        for j in tl.range(0, whole, BN, num_stages=STAGES):
            acc0, acc1, top, shift, total = online_step(
                q0, q1, k, v, k_rest, v_rest, b, h, acc0, acc1, top, shift, total, j, n, bh, m, number, k_row, v_row,
                scale_log2, threshold, D, W0, W1, BM, BN, UNIT, WIDE, not PEEL, DESC, DROPOUT, PRECISION,
            )  # fmt: skip
        if PEEL and whole < n:
            acc0, acc1, top, shift, total = online_step(
                q0, q1, k, v, k_rest, v_rest, b, h, acc0, acc1, top, shift, total, whole, n, bh, m, number, k_row,
                v_row, scale_log2, threshold, D, W0, W1, BM, BN, UNIT, WIDE, True, DESC, DROPOUT, PRECISION,
            )  # fmt: skip
        finish_tile(
            out, lse, m, n, left, out_row, acc0, acc1, top, shift, total, scale, scale_log2, inv_keep,
            D, W0, W1, BM, WIDE, LENGTHS or PACKED, DROPOUT,
        )  # fmt: skip
