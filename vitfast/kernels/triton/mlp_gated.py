"""act(gate) * value and its gradients, each in one pass over a projection [M, 2 F] that holds gate and value."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitfast.kernels.triton.activations import activate, activate_and_slope
from vitfast.kernels.triton.addresses import advance
from vitfast.kernels.triton.launch import UNIT, launch
from vitfast.kernels.triton.overlap import after_kernel_before

BLOCK = 1024
RUNTIME = ("units", "blocks", "row_step")


@triton.jit
def place_of(units, blocks, UNIT: tl.constexpr, BLOCK: tl.constexpr):  # as in `gated_forward`
    """Row and first column of this program, 64-bit, and which of the columns from there on are there."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    return row, start, start + tl.arange(0, BLOCK) < units * UNIT


@triton.jit(do_not_specialize=RUNTIME)
def gated_forward(
    pre,  # [M, 2 F], columns contiguous
    hidden,  # [M, F], contiguous
    units,  # F in UNIT elements
    blocks,  # programs of a row
    row_step,  # of pre, in UNIT elements
    ACT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    after_kernel_before()
    row, start, there = place_of(units, blocks, UNIT, BLOCK)
    columns, F = tl.arange(0, BLOCK), tl.cast(units, tl.int64) * UNIT
    gate = advance(pre, row, row_step, UNIT) + start
    g = tl.load(gate + columns, mask=there, other=0.0).to(tl.float32)
    v = tl.load(gate + F + columns, mask=there, other=0.0).to(tl.float32)
    y = activate(g, ACT, hidden.dtype.element_ty) * v
    tl.store(hidden + row * F + start + columns, y.to(hidden.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=RUNTIME)
def gated_backward(
    grad,  # [M, F], contiguous
    pre,  # [M, 2 F], columns contiguous
    dpre,  # [M, 2 F], contiguous
    hidden,  # [M, F], contiguous, written where HIDDEN
    units, blocks, row_step,  # as in `gated_forward`
    ACT: tl.constexpr, HIDDEN: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    after_kernel_before()
    row, start, there = place_of(units, blocks, UNIT, BLOCK)
    columns, F = tl.arange(0, BLOCK), tl.cast(units, tl.int64) * UNIT
    gate, dgate = advance(pre, row, row_step, UNIT) + start, dpre + row * 2 * F + start
    d = tl.load(grad + row * F + start + columns, mask=there, other=0.0).to(tl.float32)
    g = tl.load(gate + columns, mask=there, other=0.0).to(tl.float32)
    v = tl.load(gate + F + columns, mask=there, other=0.0).to(tl.float32)
    y, slope = activate_and_slope(g, ACT, dpre.dtype.element_ty)
    tl.store(dgate + columns, (d * v * slope).to(dpre.dtype.element_ty), mask=there)
    tl.store(dgate + F + columns, (d * y).to(dpre.dtype.element_ty), mask=there)
    if HIDDEN:
        tl.store(hidden + row * F + start + columns, (y * v).to(hidden.dtype.element_ty), mask=there)


def _sizes(F: int, pre: Tensor) -> tuple[int, tuple[int, int, int]]:
    """(unit, numbers for a kernel)"""
    unit = UNIT if F % UNIT == 0 and pre.stride(0) % UNIT == 0 and pre.data_ptr() % 16 == 0 else 1
    return unit, (F // unit, -(-F // BLOCK), pre.stride(0) // unit)


def forward(pre: Tensor, act: str) -> Tensor:
    """[M, 2 F] -> [M, F]"""
    M, F = pre.shape[0], pre.shape[1] // 2
    hidden = torch.empty(M, F, dtype=pre.dtype, device=pre.device)
    unit, sizes = _sizes(F, pre)
    constants = {"ACT": act, "UNIT": unit, "BLOCK": BLOCK}
    launch(gated_forward, (M * sizes[1],), (pre, hidden), sizes, constants, 4)
    return hidden


def backward(grad: Tensor, pre: Tensor, act: str, hidden_too: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient of pre [M, 2 F] from that of the hidden activation [M, F], contiguous; and the latter itself."""
    M, F = grad.shape
    dpre = torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)
    hidden = torch.empty_like(grad) if hidden_too else None
    unit, sizes = _sizes(F, pre)
    tensors = (grad, pre, dpre, dpre if hidden is None else hidden)
    constants = {"ACT": act, "HIDDEN": hidden_too, "UNIT": unit, "BLOCK": BLOCK}
    launch(gated_backward, (M * sizes[1],), tensors, sizes, constants, 4)
    return dpre, hidden
