"""What the attention kernels are made of: tiles of rows in memory, products of rows, and dropout by counters.

A head's rows are D wide. Tensor cores want multiples of 16, Triton powers of two: a row is held as one part of W0
columns and, where W1 is not 0, a second one of W1 (72 and 80 are 64 + 16, 96 is 64 + 32); see `widths` in
attention.py. Padding to the next power of two instead would be half as much work again.

Addresses: the part of an offset that may pass 2**31 (image, head, first row of a tile) is 64-bit and scalar, the part
within a tile 32-bit, unless WIDE says that a stride is too large for that. Strides come in units of UNIT elements:
with 8, the compiler knows that every row begins at a multiple of 16 bytes, also where a head is 72 wide.
"""

import triton
import triton.language as tl


@triton.jit
def load_part(
    ptr,  # [left, D], D contiguous
    step, left,  # elements from row to row; rows that are there
    ROWS: tl.constexpr, START: tl.constexpr, W: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
    WIDE: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """[ROWS, W]: zeros from row `left` on (where MASKED) and from column D on.

    AGAIN: in place of those from row `left` on, row 0 again.
    """
    rows = tl.arange(0, ROWS)
    if AGAIN:
        rows = tl.where(rows < left, rows, 0)
    columns = START + tl.arange(0, W)
    # separate names: what a mask reads must not become 64-bit
    at = rows
    if WIDE:
        at = rows.to(tl.int64)
    where = ptr + (at[:, None] * step + columns[None, :])
    if START + W > D:
        if MASKED:
            tile = tl.load(where, mask=(rows < left)[:, None] & (columns < D)[None, :], other=0.0)
        else:
            tile = tl.load(where, mask=(columns < D)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(where, mask=(rows < left)[:, None], other=0.0)
    else:
        tile = tl.load(where)
    return tile


@triton.jit
def load_rows(
    ptr,  # [left, D], D contiguous
    step, left,  # elements from row to row; rows that are there
    ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    AGAIN: tl.constexpr = False,
):  # fmt: skip
    """Both parts of the rows; the first one again in place of a second that there is not."""
    first = load_part(ptr, step, left, ROWS, 0, W0, D, MASKED, WIDE, AGAIN)
    second = first
    if W1 > 0:
        second = load_part(ptr, step, left, ROWS, W0, W1, D, MASKED, WIDE, AGAIN)
    return first, second


@triton.jit
def load_boxes(
    first, second,  # descriptors of [B, heads, rows, D] with boxes of [1, 1, ROWS, W0] and [1, 1, ROWS, W1]
    image, head, row,  # int32: the first row
    ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
):  # fmt: skip
    """As `load_rows`, by bulk copies: zeros from the image's last row and the head's last column on."""
    tile = tl.reshape(first.load([image, head, row, 0]), (ROWS, W0))
    rest = tile
    if W1 > 0:
        rest = tl.reshape(second.load([image, head, row, W0]), (ROWS, W1))
    return tile, rest


@triton.jit
def store_part(
    ptr,  # [left, D], D contiguous
    step, left,  # elements from row to row; rows that are there
    tile,  # [ROWS, W]
    ROWS: tl.constexpr, START: tl.constexpr, W: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    columns = START + tl.arange(0, W)
    at = rows
    if WIDE:
        at = rows.to(tl.int64)
    where = ptr + (at[:, None] * step + columns[None, :])
    mask = (rows < left)[:, None]
    if START + W > D:
        mask = mask & (columns < D)[None, :]
    tl.store(where, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(
    ptr,  # [left, D], D contiguous
    step, left,  # elements from row to row; rows that are there
    first, second,  # [ROWS, W0], [ROWS, W1]
    ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write both parts of the rows before row `left`."""
    store_part(ptr, step, left, first, ROWS, 0, W0, D, WIDE)
    if W1 > 0:
        store_part(ptr, step, left, second, ROWS, W0, W1, D, WIDE)


@triton.jit
def products(
    a0, a1,  # [M, W0], [M, W1]
    b0, b1,  # [N, W0], [N, W1]
    W1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T, fp32 [M, N]."""
    s = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if W1 > 0:
        s = tl.dot(a1, tl.trans(b1), s, input_precision=PRECISION)
    return s


@triton.jit
def add_product(
    weights,  # [M, N]
    b0, b1,  # [N, W0], [N, W1]
    acc0, acc1,  # fp32 [M, W0], [M, W1]
    W1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + weights b, both parts."""
    acc0 = tl.dot(weights, b0, acc0, input_precision=PRECISION)
    if W1 > 0:
        acc1 = tl.dot(weights, b1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def zero_rows(ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    first = tl.zeros((ROWS, W0), tl.float32)
    second = first
    if W1 > 0:
        second = tl.zeros((ROWS, W1), tl.float32)
    return first, second


@triton.jit
def zero_columns(BM: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    first = tl.zeros((W0, BM), tl.float32)
    second = first
    if W1 > 0:
        second = tl.zeros((W1, BM), tl.float32)
    return first, second


@triton.jit
def query_rows(
    ds,  # [BN, BM]
    k0, k1,  # [BN, W0], [BN, W1]
    dq0, dq1,  # fp32 [BM, W0], [BM, W1], with TURNED [W0, BM], [W1, BM]
    W1: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What BN keys add to dq of BM queries."""
    if TURNED:
        dq0 = tl.dot(tl.trans(k0), ds, dq0, input_precision=PRECISION)
        if W1 > 0:
            dq1 = tl.dot(tl.trans(k1), ds, dq1, input_precision=PRECISION)
    else:
        dq0, dq1 = add_product(tl.trans(ds), k0, k1, dq0, dq1, W1, PRECISION)
    return dq0, dq1


@triton.jit
def kept(
    seed,  # int64
    head,  # of all images
    rows, columns,  # int32 [BM, 1] and [1, BN], or [1, BM] and [BN, 1]: queries and keys
    threshold,  # the rate times 2**31
):  # fmt: skip
    """Which attention weights dropout leaves: a number a weight, whatever tile it is computed in.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) of (query, key, head).
    """
    zero = rows * 0 + columns * 0
    number, _, _, _ = tl.philox(seed, zero + rows, zero + columns, zero + head, zero)
    return (number >> 1).to(tl.int32) >= threshold
