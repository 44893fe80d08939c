"""What follows a product while its tile is still in registers: norm, bias, activation, scales, residual.

The tile v becomes, each step where its flag says so,

    v = rstd * (v - mean * column)          NORM: the norm before the product, see `fold_norm` in linear_product.py
    v = v + bias                            BIAS
    aside = v                               ASIDE, unless SLOPE
    v = act(v)                              ACT
    v = v * gamma                           GAMMA: LayerScale, a number a column
    v = v * row_scale                       ROW_SCALE: stochastic depth, a number an image
    v = v + beside                          RESIDUAL

or, with SLOPE, on the way back through the activation: aside = act(beside), v = v * act'(beside). SUMS: the sum of each
column over the tile's rows is written as well, for the gradient of a bias.

The tile is cut into PARTS of columns that are finished one after the other: all at once does not fit into registers.

Statistics of rows travel with a residual stream, so that no pass over it is for them alone: with PIECES_OUT each part
of W columns writes its mean and its sum of squared distances from that, as rounded, to pieces [N / W, 2, M]; a product
whose norm is folded puts the pieces of a row together (Chan et al., "Updating formulae and a pairwise algorithm for
computing sample variances", 1979).
"""

import triton
import triton.language as tl

from vitfast.kernels.triton.activations import COMPILED, activate, activate_and_slope
from vitfast.kernels.triton.addresses import advance


@triton.jit
def widened(tile, like):  # [BM, W]; fp32 [BM, W]
    """`tile` in fp32, in the threads that have `like`.

    Two numbers at a time, which takes fewer instructions; and all that follows is computed there only, where it may
    otherwise be in the threads that read the tile as well.
    """
    if COMPILED:
        if tile.dtype == tl.bfloat16:
            tile = tl.inline_asm_elementwise(
                "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r,r,r", [tile, like], tl.float32, True, 2
            )
        elif tile.dtype == tl.float16:
            tile = tl.inline_asm_elementwise(
                "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
                "=f,=f,r,r,r", [tile, like], tl.float32, True, 2,
            )  # fmt: skip
        else:
            tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [tile, like], tl.float32, True, 1)
    return tile.to(tl.float32)


@triton.jit
def rounded(v, TYPE: tl.constexpr):  # fp32 [BM, W]
    """v to the numbers that TYPE has, in fp32: two at a time as well."""
    if COMPILED and TYPE.is_bf16():
        v = tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
            "=r,=r,r,r", [v], tl.float32, True, 2,
        )  # fmt: skip
    else:
        v = v.to(TYPE).to(tl.float32)
    return v


@triton.jit
def load_tile(
    ptr,  # [M, N], N contiguous; with DESC a descriptor of boxes [BM, W]
    row, column, step,  # where the tile begins; stride in UNIT elements
    M, N,  # rows and columns that are there
    BM: tl.constexpr, W: tl.constexpr, UNIT: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    """[BM, W]; zeros outside of [M, N]."""
    if DESC:
        tile = ptr.load([row, column])
    else:
        rows, columns = tl.arange(0, BM), column + tl.arange(0, W)
        where = advance(ptr, row, step, UNIT) + (rows[:, None] * (step * UNIT) + columns[None, :])
        tile = tl.load(where, mask=(row + rows < M)[:, None] & (columns < N)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(
    ptr,  # [M, N], N contiguous; with DESC a descriptor of boxes [BM, W]
    row, column, tile, step,  # where the tile begins; fp32 [BM, W]; stride in UNIT elements
    M, N,  # rows and columns that are there
    BM: tl.constexpr, W: tl.constexpr, UNIT: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    if DESC:
        ptr.store([row, column], tile.to(ptr.dtype))
    else:
        rows, columns = tl.arange(0, BM), column + tl.arange(0, W)
        where = advance(ptr, row, step, UNIT) + (rows[:, None] * (step * UNIT) + columns[None, :])
        mask = (row + rows < M)[:, None] & (columns < N)[None, :]
        tl.store(where, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_columns(ptr, columns, N):  # [N]; int32 [BN]
    return tl.load(ptr + columns, mask=columns < N, other=0.0).to(tl.float32)


@triton.jit
def load_statistics(
    mean,  # fp32 [M], or [PIECES, 2, M] where PIECES is not 0
    rstd,  # fp32 [M], not read where PIECES is not 0
    row, M,  # the first row, and all
    BM: tl.constexpr, NORM: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """What `row_statistics` makes mean and rstd of: loads only, so that the product before it hides how long they take.

    fp32 [BM] each, or of pieces [PIECES and zeros, BM].
    """
    rows = row + tl.arange(0, BM)
    if PIECES > 0:
        piece = tl.arange(0, triton.next_power_of_2(PIECES))[:, None]
        at = mean + piece * (2 * tl.cast(M, tl.int64)) + rows[None, :]
        inside = (piece < PIECES) & (rows < M)[None, :]
        means = tl.load(at, mask=inside, other=0.0)
        rstds = tl.load(at + M, mask=inside, other=0.0)
    else:
        means = tl.zeros((BM,), tl.float32)
        rstds = means
        if NORM != "none":
            rstds = tl.load(rstd + rows, mask=rows < M, other=0.0)
            if NORM == "layer":
                means = tl.load(mean + rows, mask=rows < M, other=0.0)
    return means, rstds


@triton.jit
def row_statistics(
    means, rstds,  # of `load_statistics`
    eps,  # added to the variance of pieces
    NORM: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of the rows, fp32 [BM] each."""
    if PIECES > 0:
        away, squares = means, rstds
        if NORM == "layer":
            means = tl.sum(away, 0) * (1.0 / PIECES)
            piece = tl.arange(0, triton.next_power_of_2(PIECES))[:, None]
            away = tl.where(piece < PIECES, away - means[None, :], 0.0)
        squares = tl.sum(squares + away * away * PIECE, 0)
        rstds = tl.rsqrt(squares * (1.0 / (PIECES * PIECE)) + eps)
        if NORM != "layer":
            means = rstds
    return means, rstds


@triton.jit
def load_ahead(
    beside, bias, column_sums,  # as in `product`
    row, column, step,  # as in `load_tile`
    M, N,  # rows and columns that are there
    BM: tl.constexpr, W: tl.constexpr, UNIT: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    BESIDE: tl.constexpr, NOW: tl.constexpr,
):  # fmt: skip
    """What a part reads of beside, [BM, W], column sums and bias, fp32 [W]; nothing of what it does not, or unless NOW.

    Loads only: where they stand before other work, that hides how long they take.
    """
    tile = tl.zeros((1, 1), tl.float32)
    of_mean = tl.zeros((1,), tl.float32)
    offsets = of_mean
    if NOW:
        columns = column + tl.arange(0, W)
        if BESIDE:
            tile = load_tile(beside, row, column, step, M, N, BM, W, UNIT, False)
        if NORM == "layer":
            of_mean = load_columns(column_sums, columns, N)
        if BIAS:
            offsets = load_columns(bias, columns, N)
    return tile, of_mean, offsets


@triton.jit
def finish_part(
    v,  # fp32 [BM, BN]
    ahead,  # of `load_ahead`
    row, column,  # where it begins
    means, rstds,  # fp32 [BM], read where NORM
    out, aside, beside,  # [M, N] as in `product`
    bias, gamma, row_scale, column_sums,  # [N], [N], [B], fp32 [N]
    sums,  # fp32 [ceil(M / BM), N], written where SUMS
    pieces,  # fp32 [N / BN, 2, M], written where PIECES_OUT
    M, N, n_step, beside_step, tokens,  # as in `product`; n_step: stride of out and aside in UNIT elements
    BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr, DESC: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, ASIDE: tl.constexpr, GAMMA: tl.constexpr, ROW_SCALE: tl.constexpr,
    RESIDUAL: tl.constexpr, SUMS: tl.constexpr, PIECES_OUT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    TYPE: tl.constexpr = out.dtype if DESC else out.dtype.element_ty
    tile, of_mean, offsets = ahead
    if not AHEAD:
        _, of_mean, offsets = load_ahead(
            beside, bias, column_sums, row, column, beside_step, M, N, BM, BN, UNIT, NORM, BIAS, False, True
        )
    if NORM != "none":
        if NORM == "layer":
            v = v - means[:, None] * of_mean[None, :]
        v = v * rstds[:, None]
    if BIAS:
        v = v + offsets[None, :]
    if SLOPE:
        if not AHEAD:
            tile = load_tile(beside, row, column, beside_step, M, N, BM, BN, UNIT, DESC)
        y, slope = activate_and_slope(widened(tile, v), ACT, TYPE)
        if ASIDE:
            store_tile(aside, row, column, y, n_step, M, N, BM, BN, UNIT, DESC)
        v = v * slope
    else:
        if ASIDE:
            store_tile(aside, row, column, v, n_step, M, N, BM, BN, UNIT, DESC)
        v = activate(v, ACT, TYPE)
    if GAMMA:
        v = v * load_columns(gamma, columns, N)[None, :]
    if ROW_SCALE:
        v = v * tl.load(row_scale + rows // tokens, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    if RESIDUAL:
        if not AHEAD:
            tile = load_tile(beside, row, column, beside_step, M, N, BM, BN, UNIT, DESC)
        v = v + widened(tile, v)
    store_tile(out, row, column, v, n_step, M, N, BM, BN, UNIT, DESC)
    if SUMS:
        v = tl.where((rows < M)[:, None], v, 0.0)
        at = sums + (row // BM).to(tl.int64) * N + columns
        tl.store(at, tl.sum(v, 0), mask=columns < N)
    if PIECES_OUT:
        v = rounded(v, TYPE)
        center = tl.sum(v, 1) / BN
        away = v - center[:, None]
        at = pieces + (column // BN).to(tl.int64) * 2 * M + rows
        # parts fill N, a tile of several parts may not
        inside = (rows < M) & (column < N)
        tl.store(at, center, mask=inside)
        tl.store(at + M, tl.sum(away * away, 1), mask=inside)


@triton.jit
def finish(
    v,  # fp32 [BM, BN]
    ahead,  # of `load_ahead`, for the first part
    row, column,  # where it begins
    means, rstds,  # fp32 [BM], read where NORM
    out, aside, beside,  # [M, N] as in `product`
    bias, gamma, row_scale, column_sums,  # [N], [N], [B], fp32 [N]
    sums,  # fp32 [ceil(M / BM), N], written where SUMS
    pieces,  # fp32 [N / (BN / PARTS), 2, M], written where PIECES_OUT
    M, N, n_step, beside_step, tokens,  # as in `finish_part`
    BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, DESC: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, ASIDE: tl.constexpr,
    GAMMA: tl.constexpr, ROW_SCALE: tl.constexpr, RESIDUAL: tl.constexpr, SUMS: tl.constexpr,
    PIECES_OUT: tl.constexpr, AHEAD: tl.constexpr, MORE: tl.constexpr = False,
):  # fmt: skip
    """Finish the tile and write what comes out; where MORE of a larger tile follow, `ahead` of the next part."""
    if PARTS == 1:
        following = load_ahead(
            beside, bias, column_sums, row, column + BN, beside_step, M, N,
            BM, BN, UNIT, NORM, BIAS, RESIDUAL or SLOPE, AHEAD and MORE,
        )  # fmt: skip
        finish_part(
            v, ahead, row, column, means, rstds, out, aside, beside, bias, gamma, row_scale, column_sums, sums, pieces,
            M, N, n_step, beside_step, tokens,
            BM, BN, UNIT, DESC, NORM, BIAS, ACT, SLOPE, ASIDE, GAMMA, ROW_SCALE, RESIDUAL, SUMS, PIECES_OUT, AHEAD,
        )  # fmt: skip
    else:
        first, second = tl.split(tl.permute(tl.reshape(v, (BM, 2, BN // 2)), (0, 2, 1)))
        ahead = finish(
            first, ahead, row, column, means, rstds, out, aside, beside, bias, gamma, row_scale, column_sums, sums,
            pieces, M, N, n_step, beside_step, tokens, BM, BN // 2, PARTS // 2,
            UNIT, DESC, NORM, BIAS, ACT, SLOPE, ASIDE, GAMMA, ROW_SCALE, RESIDUAL, SUMS, PIECES_OUT, AHEAD, True,
        )  # fmt: skip
        following = finish(
            second, ahead, row, column + BN // 2, means, rstds, out, aside, beside, bias, gamma, row_scale,
            column_sums, sums, pieces, M, N, n_step, beside_step, tokens, BM, BN // 2, PARTS // 2,
            UNIT, DESC, NORM, BIAS, ACT, SLOPE, ASIDE, GAMMA, ROW_SCALE, RESIDUAL, SUMS, PIECES_OUT, AHEAD, MORE,
        )  # fmt: skip
    return following
