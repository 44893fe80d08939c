"""x w^T of a linear layer, with everything around it in the same kernel (see linear_finish.py).

`product` has three ways to share the work: a tile a program; PERSISTENT programs that take tiles in turn, so that one
tile's results are written while the next one's operands are read; and SPLIT programs a tile, each with a part of the
sum, where tiles are too few to fill a device. DESC moves tiles by descriptors (bulk copies on Hopper), which want rows
at multiples of 16 bytes; pointers take any.

A norm before the product is folded into it: with W' = W * norm_weight, LN(x) W^T + b is

    rstd * (x W'^T - mean * column_sums) + (W norm_bias + b),   column_sums = the sum of each row of W'

which leaves the operands as they lie in memory. What W' loses by rounding, `column_sums` of the rounded W' loses as
well, so that a large mean cancels.
"""

import triton
import triton.language as tl

from vitfast.kernels.triton import layer_norm_rows
from vitfast.kernels.triton.addresses import advance
from vitfast.kernels.triton.linear_finish import (
    finish,
    finish_part,
    load_ahead,
    load_statistics,
    load_tile,
    row_statistics,
)
from vitfast.kernels.triton.overlap import after_kernel_before

RUNTIME = ("M", "n_units", "k_units", "x_step", "w_step", "beside_step", "tokens", "programs")


@triton.jit
def place_of(t, tiles_m, tiles_n, GROUP: tl.constexpr):  # number of a tile; tiles in all
    """Tile t's row and column: GROUP rows of tiles go column by column, so that the L2 cache serves both operands."""
    width = GROUP * tiles_n
    first = t // width * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + t % width % size, t % width // size


@triton.jit
def multiply(
    x, w,  # [M, K], [N, K] or [K, N], as in `product`
    m, n, begin, end,  # the tile's row and column of tiles; the part of K
    M, N, K, x_step, w_step,  # sizes in elements; strides in UNIT elements
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr, DESC: tl.constexpr,
    ACROSS: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The part from `begin` to `end` of the sum of tile (m, n): fp32 [BM, BN], or with SWAP its transpose."""
    acc = tl.zeros((BN, BM), tl.float32) if SWAP else tl.zeros((BM, BN), tl.float32)
    if DESC:
        for k in tl.range(begin, end, BK, num_stages=STAGES):
            a = x.load([m * BM, k])
            b = w.load([k, n * BN]) if ACROSS else tl.trans(w.load([n * BN, k]))
            if SWAP:
                acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        inner = tl.arange(0, BK)
        # the first row again in place of those past the end: cheaper than a mask, and nobody reads what comes out
        rows = tl.arange(0, BM)
        rows = tl.where(rows < M - m * BM, rows, 0)
        a_at = advance(x, m * BM, x_step, UNIT) + (rows[:, None] * (x_step * UNIT) + inner[None, :])
        columns = n * BN + tl.arange(0, BN)
        if ACROSS:
            b_at = w + (inner[:, None] * (w_step * UNIT) + columns[None, :])
        else:
            places = tl.arange(0, BN)
            places = tl.where(places < N - n * BN, places, 0)
            b_at = advance(w, n * BN, w_step, UNIT) + (inner[:, None] + places[None, :] * (w_step * UNIT))
        for k in tl.range(begin, end, BK, num_stages=STAGES):
            b_now = b_at + k
            if ACROSS:
                b_now = advance(b_at, k, w_step, UNIT)
            a = tl.load(a_at + k) if EVEN_K else tl.load(a_at + k, mask=(k + inner < K)[None, :], other=0.0)
            if ACROSS:
                b = tl.load(b_now, mask=(k + inner < K)[:, None] & (columns < N)[None, :], other=0.0)
            elif EVEN_K:
                b = tl.load(b_now)
            else:
                b = tl.load(b_now, mask=(k + inner < K)[:, None], other=0.0)
            if SWAP:
                acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=RUNTIME)
def product(
    x,  # [M, K], K contiguous; with DESC a descriptor of boxes [BM, BK]
    w,  # [N, K], K contiguous, with ACROSS [K, N], N contiguous; with DESC a descriptor of [BN, BK] or [BK, BN]
    out,  # [M, N], contiguous; this and the next two with DESC descriptors of boxes [BM, BN / PARTS]
    aside,  # [M, N], contiguous, written where ASIDE
    beside,  # [M, N], N contiguous: the residual, or with SLOPE the numbers before the activation; with AHEAD a pointer
    bias, gamma,  # [N], each read where its flag says so
    row_scale,  # [B], a number an image
    mean, rstd,  # fp32 [M], or where PIECES is not 0 [PIECES, 2, M] and none: as in `load_statistics`
    column_sums,  # fp32 [N], read where NORM is "layer"
    sums,  # fp32 [ceil(M / BM), N], written where SUMS
    pieces,  # fp32 [N / (BN / PARTS), 2, M], written where PIECES_OUT
    partials,  # fp32 [tiles, SPLIT, BM, BN], where SPLIT > 1
    arrived,  # int32 [tiles], zeros before and after, where SPLIT > 1
    M, n_units, k_units,  # N and K in UNIT elements
    x_step, w_step, beside_step,  # strides in UNIT elements
    tokens, programs, eps,  # rows of an image; programs where PERSISTENT; added to the variance of pieces
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr, DESC: tl.constexpr, ACROSS: tl.constexpr, SWAP: tl.constexpr,
    EVEN_K: tl.constexpr, PERSISTENT: tl.constexpr, FLATTEN: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, ASIDE: tl.constexpr,
    GAMMA: tl.constexpr, ROW_SCALE: tl.constexpr, RESIDUAL: tl.constexpr, SUMS: tl.constexpr,
    PIECES_OUT: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    after_kernel_before()
    N, K = n_units * UNIT, k_units * UNIT
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    if PERSISTENT:
        for t in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=FLATTEN):
            m, n = place_of(t, tiles_m, tiles_n, GROUP)
            first, second = load_statistics(mean, rstd, m * BM, M, BM, NORM, PIECES)
            ahead = load_ahead(
                beside, bias, column_sums, m * BM, n * BN, beside_step, M, N,
                BM, BN // PARTS, UNIT, NORM, BIAS, RESIDUAL or SLOPE, AHEAD,
            )  # fmt: skip
            acc = multiply(
                x, w, m, n, 0, K, M, N, K, x_step, w_step,
                BM, BN, BK, STAGES, UNIT, DESC, ACROSS, SWAP, EVEN_K, PRECISION,
            )  # fmt: skip
            means, rstds = row_statistics(first, second, eps, NORM, PIECES, PIECE)
            finish(
                acc, ahead, m * BM, n * BN, means, rstds, out, aside, beside, bias, gamma, row_scale, column_sums,
                sums, pieces, M, N, n_units, beside_step, tokens, BM, BN, PARTS,
                UNIT, DESC, NORM, BIAS, ACT, SLOPE, ASIDE, GAMMA, ROW_SCALE, RESIDUAL, SUMS, PIECES_OUT, AHEAD,
            )  # fmt: skip
    else:
        t, s = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
        m, n = place_of(t, tiles_m, tiles_n, GROUP)
        if DESC:
            first, second = load_statistics(mean, rstd, m * BM, M, BM, NORM, PIECES)
        ahead = load_ahead(
            beside, bias, column_sums, m * BM, n * BN, beside_step, M, N,
            BM, BN // PARTS, UNIT, NORM, BIAS, RESIDUAL or SLOPE, AHEAD,
        )  # fmt: skip
        each = tl.cdiv(tl.cdiv(K, BK), SPLIT) * BK
        begin = (s.to(tl.int64) * each).to(tl.int32)
        acc = multiply(
            x, w, m, n, begin, tl.minimum(K, begin + each), M, N, K, x_step, w_step,
            BM, BN, BK, STAGES, UNIT, DESC, ACROSS, SWAP, EVEN_K, PRECISION,
        )  # fmt: skip
        if SWAP:
            acc = tl.trans(acc)
        last = True
        if SPLIT > 1:
            inside = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
            own = partials + t.to(tl.int64) * (SPLIT * BM * BN)
            tl.store(own + s.to(tl.int64) * (BM * BN) + inside, acc)
            # all threads have written before one of them says so
            tl.debug_barrier()
            last = tl.atomic_add(arrived + t, 1, sem="acq_rel") == SPLIT - 1
        if last:
            if SPLIT > 1:
                # for the next product
                tl.store(arrived + t, 0)
                # whoever comes last adds them up, in one order: the same bits in every run
                acc = tl.zeros((BM, BN), tl.float32)
                for i in tl.static_range(SPLIT):
                    acc += tl.load(own + i * (BM * BN) + inside, cache_modifier=".cg")
            if not DESC:
                # addresses leave no registers for them before
                first, second = load_statistics(mean, rstd, m * BM, M, BM, NORM, PIECES)
            means, rstds = row_statistics(first, second, eps, NORM, PIECES, PIECE)
            finish(
                acc, ahead, m * BM, n * BN, means, rstds, out, aside, beside, bias, gamma, row_scale, column_sums,
                sums, pieces, M, N, n_units, beside_step, tokens, BM, BN, PARTS,
                UNIT, DESC, NORM, BIAS, ACT, SLOPE, ASIDE, GAMMA, ROW_SCALE, RESIDUAL, SUMS, PIECES_OUT, AHEAD,
            )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def finish_rows(
    x,  # [M, N], N contiguous: what somebody else has multiplied
    out, aside,  # [M, N], contiguous; the second written where ASIDE
    beside,  # [M, N], N contiguous, as in `product`
    bias, gamma, row_scale,  # [N], [N], [B]
    sums,  # fp32 [ceil(M / BM), N], written where SUMS
    M, n_units,  # N in UNIT elements
    x_step, beside_step, tokens,  # strides in UNIT elements; rows of an image
    BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
    ASIDE: tl.constexpr, GAMMA: tl.constexpr, ROW_SCALE: tl.constexpr, RESIDUAL: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    after_kernel_before()
    N = n_units * UNIT
    tiles_n = tl.cdiv(N, BN)
    m, n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    v = load_tile(x, m * BM, n * BN, x_step, M, N, BM, BN, UNIT, False).to(tl.float32)
    means, rstds = load_statistics(x, x, 0, M, BM, "none", 0)
    finish_part(
        v, (v, means, means), m * BM, n * BN, means, rstds, out, aside, beside, bias, gamma, row_scale, out, sums, out,
        M, N, n_units, beside_step, tokens,
        BM, BN, UNIT, False, "none", BIAS, ACT, SLOPE, ASIDE, GAMMA, ROW_SCALE, RESIDUAL, SUMS, False, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=("N", "w_step"))
def fold_norm(
    w,  # [N, K], K contiguous
    norm_weight, norm_bias,  # [K]
    bias,  # [N]
    folded,  # [N, K], contiguous: w * norm_weight, written where WEIGHT, else w itself
    column_sums,  # fp32 [N]: of folded's rows, as rounded
    folded_bias,  # fp32 [N]: w norm_bias + bias
    N, w_step,  # rows; stride in UNIT elements
    K: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr, WEIGHT: tl.constexpr,
    NORM_BIAS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    after_kernel_before()
    first = tl.program_id(0) * BM
    left = N - first
    columns, rows = tl.arange(0, BLOCK), tl.arange(0, BM)
    tile = layer_norm_rows.load_tile(w, first, w_step, left, columns, K, BM, UNIT)
    added = tl.zeros((BM,), tl.float32)
    if NORM_BIAS:
        added += tl.sum(tile * layer_norm_rows.load_vector(norm_bias, columns, K)[None, :], 1)
    if BIAS:
        added += tl.load(bias + first + rows, mask=rows < left, other=0.0).to(tl.float32)
    if WEIGHT:
        tile = tile * layer_norm_rows.load_vector(norm_weight, columns, K)[None, :]
        layer_norm_rows.store_tile(folded, first, left, columns, tile, K, BM)
    sums = tl.sum(tile.to(folded.dtype.element_ty).to(tl.float32), 1)
    tl.store(column_sums + first + rows, sums, mask=rows < left)
    tl.store(folded_bias + first + rows, added, mask=rows < left)
