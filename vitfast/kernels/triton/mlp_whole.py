"""The MLP half of a narrow block in one kernel: norm, fc1, activation, fc2, scale, residual.

A program keeps BM rows: their normed numbers, and the sum of fc2's products over BH hidden numbers at a time, which
never reach memory. A row of C numbers is held as W0 and W1 columns, powers of two (192 = 128 + 64). What bounds C is
that both have to stay in registers.
"""

import triton
import triton.language as tl

from vitfast.kernels.triton.activations import activate
from vitfast.kernels.triton.addresses import advance
from vitfast.kernels.triton.overlap import after_kernel_before

RUNTIME = ("M", "x_step", "tokens")


@triton.jit
def load_rows(
    ptr,  # [first + left, start + W or more], columns contiguous; with DESC a descriptor of boxes [ROWS, W]
    first, start, step, left,  # row and column; stride in UNIT elements; rows from `first` on
    ROWS: tl.constexpr, W: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    """[ROWS, W]; zeros past the last row where MASKED."""
    if DESC:
        tile = ptr.load([first, start])
    else:
        rows = tl.arange(0, ROWS)
        where = advance(ptr, first, step, UNIT) + (rows[:, None] * (step * UNIT) + (start + tl.arange(0, W))[None, :])
        tile = tl.load(where, mask=(rows < left)[:, None], other=0.0) if MASKED else tl.load(where)
    return tile


@triton.jit
def store_rows(
    ptr,  # [first + left, start + W or more], columns contiguous; with DESC a descriptor of boxes [ROWS, W]
    first, start, step, left,  # row and column; stride in elements; rows from `first` on
    tile,  # fp32 [ROWS, W]
    ROWS: tl.constexpr, W: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    if DESC:
        ptr.store([first, start], tile.to(ptr.dtype))
    else:
        rows = tl.arange(0, ROWS)
        where = advance(ptr, first, step, 1) + (rows[:, None] * step + (start + tl.arange(0, W))[None, :])
        tl.store(where, tile.to(ptr.dtype.element_ty), mask=(rows < left)[:, None])


@triton.jit
def affine(
    centered,  # fp32 [BM, W]
    rstd,  # fp32 [BM]
    norm_weight, norm_bias,  # [C]
    columns,  # int32 [W]
    WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    h = centered * rstd[:, None]
    if WEIGHT:
        h = h * tl.load(norm_weight + columns).to(tl.float32)[None, :]
    if BIAS:
        h = h + tl.load(norm_bias + columns).to(tl.float32)[None, :]
    return h


@triton.jit
def finish_part(
    acc,  # fp32 [BM, W]
    x, out,  # [M, C] as in `mlp_whole`
    b2, gamma, row_scale,  # [C], [C], [B]
    first, start, x_step,  # row and column; stride in UNIT elements
    left, tokens,  # rows from `first` on; rows of an image
    C: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr, B2: tl.constexpr, GAMMA: tl.constexpr,
    ROW_SCALE: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    columns, rows = start + tl.arange(0, W), tl.arange(0, BM)
    if B2:
        acc = acc + tl.load(b2 + columns).to(tl.float32)[None, :]
    if GAMMA:
        acc = acc * tl.load(gamma + columns).to(tl.float32)[None, :]
    if ROW_SCALE:
        scale = tl.load(row_scale + (first + rows) // tokens, mask=rows < left, other=0.0)
        acc = acc * scale.to(tl.float32)[:, None]
    acc = acc + load_rows(x, first, start, x_step, left, BM, W, UNIT, True, DESC).to(tl.float32)
    store_rows(out, first, start, C, left, acc, BM, W, DESC)


@triton.jit(do_not_specialize=RUNTIME)
def mlp_whole(
    x0, x1,  # [M, C], C contiguous; all of these twice, with DESC descriptors of boxes for both parts of a row
    w10, w11,  # [F, C], contiguous: fc1's weight
    w20, w21,  # [C, F], contiguous: fc2's weight
    out0, out1,  # [M, C], contiguous
    norm_weight, norm_bias,  # [C]
    b1, b2,  # [F], [C]
    gamma, row_scale,  # [C], [B]
    M, x_step,  # rows; stride in UNIT elements
    tokens, eps,  # rows of an image; added to the variance
    C: tl.constexpr, F: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr, DESC: tl.constexpr, ACT: tl.constexpr, RMS: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, GAMMA: tl.constexpr,
    ROW_SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F is a multiple of BH."""
    after_kernel_before()
    first = tl.program_id(0) * BM
    left = M - first
    c0 = load_rows(x0, first, 0, x_step, left, BM, W0, UNIT, True, DESC).to(tl.float32)
    total = tl.sum(c0, 1)
    if W1 > 0:
        c1 = load_rows(x1, first, W0, x_step, left, BM, W1, UNIT, True, DESC).to(tl.float32)
        total += tl.sum(c1, 1)
    if not RMS:
        c0 = c0 - (total / C)[:, None]
    squares = tl.sum(c0 * c0, 1)
    if W1 > 0:
        if not RMS:
            c1 = c1 - (total / C)[:, None]
        squares += tl.sum(c1 * c1, 1)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / C + eps))
    dtype = w10.dtype if DESC else w10.dtype.element_ty
    h0 = affine(c0, rstd, norm_weight, norm_bias, tl.arange(0, W0), WEIGHT, BIAS).to(dtype)
    acc0 = tl.zeros((BM, W0), tl.float32)
    if W1 > 0:
        h1 = affine(c1, rstd, norm_weight, norm_bias, W0 + tl.arange(0, W1), WEIGHT, BIAS).to(dtype)
        acc1 = tl.zeros((BM, W1), tl.float32)
    for f in tl.range(0, F, BH, num_stages=STAGES):
        s = tl.dot(h0, tl.trans(load_rows(w10, f, 0, C, BH, BH, W0, 1, False, DESC)), input_precision=PRECISION)
        if W1 > 0:
            b = tl.trans(load_rows(w11, f, W0, C, BH, BH, W1, 1, False, DESC))
            s = tl.dot(h1, b, s, input_precision=PRECISION)
        if B1:
            s = s + tl.load(b1 + f + tl.arange(0, BH)).to(tl.float32)[None, :]
        hidden = activate(s, ACT, dtype).to(dtype)
        b = tl.trans(load_rows(w20, 0, f, F, W0, W0, BH, 1, False, DESC))
        acc0 = tl.dot(hidden, b, acc0, input_precision=PRECISION)
        if W1 > 0:
            # columns of fc2's weight from W0 on
            b = tl.trans(load_rows(w21, W0, f, F, W1, W1, BH, 1, False, DESC))
            acc1 = tl.dot(hidden, b, acc1, input_precision=PRECISION)
    finish_part(
        acc0, x0, out0, b2, gamma, row_scale, first, 0, x_step, left, tokens, C, W0, BM, UNIT, B2, GAMMA, ROW_SCALE,
        DESC,
    )  # fmt: skip
    if W1 > 0:
        finish_part(
            acc1, x1, out1, b2, gamma, row_scale, first, W0, x_step, left, tokens, C, W1, BM, UNIT, B2, GAMMA,
            ROW_SCALE, DESC,
        )  # fmt: skip
