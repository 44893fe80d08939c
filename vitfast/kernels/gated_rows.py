"""act(gate) * value and its gradients, each in one pass over a projection [M, 2 F] that holds gate and value."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitfast.kernels.activations import activate, activate_and_slope
from vitfast.kernels.launch import launch

BLOCK = 1024
RUNTIME = ("F", "blocks", "row_step")


@triton.jit(do_not_specialize=RUNTIME)
def gated_forward(pre, hidden, F, blocks, row_step, ACT: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    gate = pre + row * row_step
    g = tl.load(gate + columns, mask=columns < F, other=0.0).to(tl.float32)
    v = tl.load(gate + F + columns, mask=columns < F, other=0.0).to(tl.float32)
    y = activate(g, ACT) * v
    tl.store(hidden + row * F + columns, y.to(hidden.dtype.element_ty), mask=columns < F)


@triton.jit(do_not_specialize=RUNTIME)
def gated_backward(
    grad, pre, dpre, hidden, F, blocks, row_step, ACT: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr
):
    """HIDDEN: write act(gate) * value as well."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    gate, dgate = pre + row * row_step, dpre + row * 2 * F
    d = tl.load(grad + row * F + columns, mask=columns < F, other=0.0).to(tl.float32)
    g = tl.load(gate + columns, mask=columns < F, other=0.0).to(tl.float32)
    v = tl.load(gate + F + columns, mask=columns < F, other=0.0).to(tl.float32)
    y, slope = activate_and_slope(g, ACT)
    tl.store(dgate + columns, (d * v * slope).to(dpre.dtype.element_ty), mask=columns < F)
    tl.store(dgate + F + columns, (d * y).to(dpre.dtype.element_ty), mask=columns < F)
    if HIDDEN:
        tl.store(hidden + row * F + columns, (y * v).to(hidden.dtype.element_ty), mask=columns < F)


def forward(pre: Tensor, act: str) -> Tensor:
    """[M, 2 F] -> [M, F]"""
    M, F = pre.shape[0], pre.shape[1] // 2
    hidden = torch.empty(M, F, dtype=pre.dtype, device=pre.device)
    blocks = -(-F // BLOCK)
    constants = {"ACT": act, "BLOCK": BLOCK}
    launch(pre, gated_forward, (M * blocks,), (pre, hidden, F, blocks, pre.stride(0)), constants, 4)
    return hidden


def backward(grad: Tensor, pre: Tensor, act: str, hidden_too: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient of pre [M, 2 F] from that of the hidden activation [M, F], contiguous; and the latter itself."""
    M, F = grad.shape
    dpre = torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)
    hidden = torch.empty_like(grad) if hidden_too else None
    blocks = -(-F // BLOCK)
    tensors = (grad, pre, dpre, dpre if hidden is None else hidden)
    constants = {"ACT": act, "HIDDEN": hidden_too, "BLOCK": BLOCK}
    launch(pre, gated_backward, (M * blocks,), (*tensors, F, blocks, pre.stride(0)), constants, 4)
    return dpre, hidden
