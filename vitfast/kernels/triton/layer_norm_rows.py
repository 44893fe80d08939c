"""LayerNorm and RMSNorm of rows, alone or of a residual sum, and the gradients of all that.

A program holds some whole rows of C columns; statistics in fp32, the variance as the mean of squared distances from the
mean. With BRANCH the rows are x + row_scale * gamma * branch (LayerScale, stochastic depth), with ADDED x + added, a
vector; with TOTAL that sum is written as well.
Source: Ba et al., "Layer Normalization" (2016); Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).

Gradients of vectors (weight, bias, gamma) are sums over all rows. Each program adds up its own rows and writes what
comes out; `add_up` adds these in one order, so that every run gives the same bits.
"""

import triton
import triton.language as tl

from vitfast.kernels.triton.addresses import advance
from vitfast.kernels.triton.overlap import after_kernel_before

RUNTIME = ("rows", "tokens", "each", "x_row", "branch_row", "grad_row", "total_grad_row", "programs")


@triton.jit
def load_tile(
    ptr,  # [first + left, C], C contiguous
    first, row, left,  # rows before; stride in UNIT elements; rows from there on
    columns,  # int32 [BLOCK], 0 and on
    C: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """fp32 [BM, BLOCK]; zeros where there is no row or column."""
    rows = tl.arange(0, BM)
    where = advance(ptr, first, row, UNIT) + (rows[:, None] * (row * UNIT) + columns[None, :])
    return tl.load(where, mask=(rows < left)[:, None] & (columns < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_tile(
    ptr,  # [first + left, C], contiguous
    first, left,  # rows before; rows from there on
    columns,  # int32 [BLOCK], 0 and on
    tile,  # fp32 [BM, BLOCK]
    C: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BM)
    where = advance(ptr, first, C, 1) + (rows[:, None] * C + columns[None, :])
    tl.store(where, tile.to(ptr.dtype.element_ty), mask=(rows < left)[:, None] & (columns < C)[None, :])


@triton.jit
def load_vector(ptr, columns, C: tl.constexpr):  # [C]; int32 [BLOCK], 0 and on
    return tl.load(ptr + columns, mask=columns < C, other=0.0).to(tl.float32)


@triton.jit
def load_row_scale(
    row_scale,  # [B]
    first, left,  # rows before; rows from there on
    tokens,  # rows of an image
    BM: tl.constexpr,
):  # fmt: skip
    """fp32 [BM]: for each row the factor of its image."""
    rows = tl.arange(0, BM)
    return tl.load(row_scale + (first + rows) // tokens, mask=rows < left, other=0.0).to(tl.float32)


@triton.jit
def statistics(
    tile,  # fp32 [BM, BLOCK], zeros from column C on
    columns,  # int32 [BLOCK], 0 and on
    eps,  # added to the variance
    C: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """The rows less their mean (as they are for RMS), mean and 1 / standard deviation."""
    mean = tl.sum(tile, 1) / C
    if RMS:
        mean = mean * 0.0
        centered = tile
    else:
        centered = tl.where((columns < C)[None, :], tile - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, 1) / C
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    return centered, mean, rstd


@triton.jit(do_not_specialize=RUNTIME)
def norm_forward(
    x, branch,  # [rows, C], C contiguous
    gamma, row_scale,  # [C], [B]
    added,  # fp32 [C], read where ADDED
    weight, bias,  # [C]
    total, out,  # [rows, C], contiguous: the sum where TOTAL, which may be x; the normed rows where OUT
    mean, rstd,  # fp32 [rows], written where STATISTICS
    rows, tokens,  # of all images, of one
    x_row, branch_row,  # strides in UNIT elements
    eps,  # added to the variance
    C: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr, BRANCH: tl.constexpr,
    GAMMA: tl.constexpr, ROW_SCALE: tl.constexpr, ADDED: tl.constexpr, TOTAL: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, OUT: tl.constexpr, STATISTICS: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    after_kernel_before()
    first = tl.program_id(0) * BM
    left = rows - first
    columns = tl.arange(0, BLOCK)
    tile = load_tile(x, first, x_row, left, columns, C, BM, UNIT)
    if BRANCH:
        beside = load_tile(branch, first, branch_row, left, columns, C, BM, UNIT)
        if GAMMA:
            beside = beside * load_vector(gamma, columns, C)[None, :]
        if ROW_SCALE:
            beside = beside * load_row_scale(row_scale, first, left, tokens, BM)[:, None]
        tile += beside
    if ADDED:
        tile += load_vector(added, columns, C)[None, :]
    if TOTAL:
        store_tile(total, first, left, columns, tile, C, BM)
        # the norm is of what was written, not of something more exact
        tile = tile.to(total.dtype.element_ty).to(tl.float32)
    centered, means, rstds = statistics(tile, columns, eps, C, RMS)
    if STATISTICS:
        at = tl.arange(0, BM)
        tl.store(mean + first + at, means, mask=at < left)
        tl.store(rstd + first + at, rstds, mask=at < left)
    if OUT:
        normed = centered * rstds[:, None]
        if WEIGHT:
            normed = normed * load_vector(weight, columns, C)[None, :]
        if BIAS:
            normed = normed + load_vector(bias, columns, C)[None, :]
        store_tile(out, first, left, columns, normed, C, BM)


@triton.jit(do_not_specialize=RUNTIME)
def norm_backward(
    grad, total_grad,  # [rows, C], C contiguous: of the normed rows, read where NORM; of the sum, where TOTAL_GRAD
    x, branch,  # [rows, C], C contiguous: the rows that were normed; read where DGAMMA
    gamma, row_scale, weight,  # [C], [B], [C]
    dx, dbranch,  # [rows, C], contiguous: of x or the sum, where DX; where DBRANCH
    sums,  # fp32 [3, programs, C]: of weight and bias where DWEIGHT, of gamma where DGAMMA
    rows, each, tokens,  # of all images, of a program, of an image
    grad_row, total_grad_row, x_row, branch_row,  # strides in UNIT elements
    programs, eps,  # of this launch; added to the variance
    C: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr, NORM: tl.constexpr,
    TOTAL_GRAD: tl.constexpr, GAMMA: tl.constexpr, ROW_SCALE: tl.constexpr, WEIGHT: tl.constexpr, DSUM: tl.constexpr,
    DX: tl.constexpr, DBRANCH: tl.constexpr, DWEIGHT: tl.constexpr, DGAMMA: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """`each` rows a program, BM at a time. DSUM: some gradient goes through the sum."""
    after_kernel_before()
    begin = tl.program_id(0).to(tl.int64) * each
    end = tl.minimum(begin + each, rows)
    columns = tl.arange(0, BLOCK)
    weights = columns * 0.0 + 1.0
    if WEIGHT:
        weights = load_vector(weight, columns, C)
    gammas = weights
    if GAMMA:
        gammas = load_vector(gamma, columns, C)
    of_weight = tl.zeros((BM, BLOCK), tl.float32)
    of_bias = tl.zeros((BM, BLOCK), tl.float32)
    of_gamma = tl.zeros((BM, BLOCK), tl.float32)
    for first in tl.range(begin, end, BM):
        left = (end - first).to(tl.int32)
        d = tl.zeros((BM, BLOCK), tl.float32)
        if NORM:
            centered, _, rstd = statistics(load_tile(x, first, x_row, left, columns, C, BM, UNIT), columns, eps, C, RMS)
            # without eps infinite past the end, whose rows are added to the others
            rstd = tl.where(tl.arange(0, BM) < left, rstd, 0.0)
            x_hat = centered * rstd[:, None]
            g = load_tile(grad, first, grad_row, left, columns, C, BM, UNIT)
            if DWEIGHT:
                of_weight += g * x_hat
                of_bias += g
            if DSUM:
                if WEIGHT:
                    g = g * weights[None, :]
                along = tl.sum(g * x_hat, 1) / C
                if RMS:
                    d = (g - x_hat * along[:, None]) * rstd[:, None]
                else:
                    d = (g - (tl.sum(g, 1) / C)[:, None] - x_hat * along[:, None]) * rstd[:, None]
        if DSUM:
            if TOTAL_GRAD:
                d += load_tile(total_grad, first, total_grad_row, left, columns, C, BM, UNIT)
            if DX:
                store_tile(dx, first, left, columns, d, C, BM)
            if ROW_SCALE:
                d = d * load_row_scale(row_scale, first, left, tokens, BM)[:, None]
            if DGAMMA:
                of_gamma += d * load_tile(branch, first, branch_row, left, columns, C, BM, UNIT)
            if DBRANCH:
                if GAMMA:
                    d = d * gammas[None, :]
                store_tile(dbranch, first, left, columns, d, C, BM)
    own = sums + tl.program_id(0).to(tl.int64) * C
    step = tl.cast(programs, tl.int64) * C
    if DWEIGHT:
        tl.store(own + columns, tl.sum(of_weight, 0), mask=columns < C)
        tl.store(own + step + columns, tl.sum(of_bias, 0), mask=columns < C)
    if DGAMMA:
        tl.store(own + 2 * step + columns, tl.sum(of_gamma, 0), mask=columns < C)


@triton.jit(do_not_specialize=("programs",))
def add_up(
    sums,  # fp32 [n, programs, C]
    out,  # [n, C]
    programs,  # numbers of each sum
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """n in the grid's second dimension."""
    after_kernel_before()
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.arange(0, BM)
    which = tl.program_id(1).to(tl.int64)
    where = sums + which * programs * C + (rows[:, None] * C + columns[None, :])
    total = tl.zeros((BM, BN), tl.float32)
    for first in tl.range(0, programs, BM):
        there = (first + rows < programs)[:, None] & (columns < C)[None, :]
        total += tl.load(where + tl.cast(first, tl.int64) * C, mask=there, other=0.0)
    tl.store(out + which * C + columns, tl.sum(total, 0).to(out.dtype.element_ty), mask=columns < C)
