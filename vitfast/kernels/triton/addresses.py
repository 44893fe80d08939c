"""Addresses inside tensors of any size: 64-bit where an offset may pass 2**31, 32-bit within a tile."""

import triton
import triton.language as tl


@triton.jit
def row_step(stride, UNIT: tl.constexpr, WIDE: tl.constexpr):  # from row to row, in UNIT elements
    """Elements from row to row, as offsets within a tile count them."""
    step = stride * UNIT
    if WIDE:
        step = tl.cast(stride, tl.int64) * UNIT
    return step


@triton.jit
def advance(
    ptr,  # [...], whatever lies there
    index,  # of a row, head or image
    stride,  # between these, in UNIT elements
    UNIT: tl.constexpr,
):
    """`ptr` moved on by `index` strides."""
    return ptr + tl.cast(index, tl.int64) * (tl.cast(stride, tl.int64) * UNIT)
