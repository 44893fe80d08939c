"""Gradients of linear layers: kernels for what is beside the products, cuBLAS for products without anything beside."""

from __future__ import annotations

import torch
from torch import Tensor

from vitfast.kernels.operands import Norm, Saved, Tail
from vitfast.kernels.triton import layer_norm, linear
from vitfast.kernels.triton.launch import rows_of
from vitfast.kernels.triton.linear import After, finish


def why_not(x: Tensor, weight: Tensor, norm: str) -> list[str]:
    """Everything that keeps the kernels from computing these gradients; empty where they can."""
    return linear.why_not(x, weight, norm, None, "none", False)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, act: str, saved: Saved, tail: Tail,
    mask: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight, bias, norm_weight, norm_bias and gamma of `ops.linear`, each where `mask` asks for it."""
    need_x, need_weight, need_bias, need_norm_weight, need_norm_bias, need_gamma = mask
    grad, grad_gamma = layer_norm.branch_grads(grad, saved.branch, tail, weight.dtype, need_gamma)
    rows, sums = rows_of(grad), None
    if act != "none":
        after = After(weight.dtype, act=act, slope=True, beside=saved.pre, sums=need_bias)
        rows, _, sums = finish(rows, after)
    grad_x, grad_weight, grad_norm_weight, grad_norm_bias = before_product(rows, x, weight, norm, mask[:2] + mask[3:5])
    grad_bias = column_sums(rows, sums, bias) if need_bias else None
    return grad_x, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias, grad_gamma


def before_product(
    rows: Tensor, x: Tensor, weight: Tensor, norm: Norm, mask: list[bool], residual_grad: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, norm_weight and norm_bias of norm(x) @ weight.T, whose gradient is rows [M, N].

    residual_grad: added to the gradient of x.
    """
    need_x, need_weight, need_norm_weight, need_norm_bias = mask
    grad_x = grad_weight = grad_norm_weight = grad_norm_bias = None
    if need_weight:
        h = x
        if norm.kind != "none":
            # normed again rather than kept: one light pass against M * K numbers of memory
            _, h, *_ = layer_norm.forward(x, norm, weight.dtype, statistics=False)
        grad_weight = rows.t() @ rows_of(h.to(weight.dtype))
    if need_x or need_norm_weight or need_norm_bias:
        grad_x = (rows @ weight).view(x.shape)
        if norm.kind != "none":
            need = (need_x, need_norm_weight, need_norm_bias)
            grad_x, grad_norm_weight, grad_norm_bias, *_ = layer_norm.backward(
                grad_x, x, norm, need, total_grad=residual_grad
            )
    return grad_x, grad_weight, grad_norm_weight, grad_norm_bias


def column_sums(rows: Tensor, sums: Tensor | None, bias: Tensor) -> Tensor:
    """The bias's gradient: what a kernel has added up on its way, else the sum of the rows."""
    return rows.sum(0, dtype=torch.float32).to(bias.dtype) if sums is None else sums.to(bias.dtype)
