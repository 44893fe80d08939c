"""Norms, activations and branch scaling with their gradients, out of stock PyTorch operators where those are best.

Used inside op implementations, below autograd. One place, so that `linear` and `mlp` cannot disagree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitfast import reference
from vitfast.kernels import cpu as cpu_kernels
from vitfast.kernels.operands import Norm, Tail
from vitfast.ops._check import cast

aten = torch.ops.aten


def norm_forward(x: Tensor, norm: Norm, out_dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The normed rows in `out_dtype`, and mean and rstd as torch keeps them (None for kind 'rms')."""
    # contiguous first, here and below: the same result to the bit whatever the strides
    x = x.contiguous()
    if norm.kind == "rms":
        return reference.layer_norm(x, *norm).to(out_dtype), None, None
    x = _in_dtype_of(norm.weight, x)
    h, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return cast(h, out_dtype), mean, rstd


def stats_fake(x: Tensor, norm: Norm) -> tuple[Tensor | None, Tensor | None]:
    """Mean and rstd of `norm_forward`, shapes and dtypes only."""
    if norm.kind != "layer":
        return None, None
    x = _in_dtype_of(norm.weight, x.contiguous())
    _, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], norm.weight, norm.weight, 1e-6)
    return mean, rstd


def _in_dtype_of(weight: Tensor | None, x: Tensor) -> Tensor:
    # float32 norm parameters beside a half-precision input: torch takes that on CPUs only
    return x if weight is None or weight.dtype == x.dtype else x.to(weight.dtype)


def norm_backward(
    grad: Tensor, x: Tensor, norm: Norm, mean: Tensor | None, rstd: Tensor | None, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, each only where `mask` asks for it."""
    grad, x = grad.contiguous(), x.contiguous()
    weight, bias, eps, kind = norm
    if kind == "layer":
        wide = _in_dtype_of(weight, x)
        grad = cast(grad, wide.dtype)
        grads = aten.native_layer_norm_backward(grad, wide, x.shape[-1:], mean, rstd, weight, bias, mask)
        return cast(grads[0], x.dtype), grads[1], grads[2]
    dtype = torch.promote_types(x.dtype, torch.float32)
    x_hat = x.to(dtype)
    scale = torch.rsqrt(x_hat.square().mean(-1, keepdim=True) + eps)
    x_hat, grad = x_hat * scale, grad.to(dtype)
    grad_x = grad_weight = None
    if weight is not None and mask[1]:
        grad_weight = (grad * x_hat).flatten(0, -2).sum(0).to(weight.dtype)
    if mask[0]:
        inner = grad if weight is None else grad * weight.to(dtype)
        grad_x = (scale * (inner - x_hat * (inner * x_hat).mean(-1, keepdim=True))).to(x.dtype)
    return grad_x, grad_weight, None


def _has_kernel(x: Tensor, name: str) -> bool:
    return name != "none" and x.device.type == "cpu" and x.is_contiguous() and cpu_kernels.takes(x)


def activation(x: Tensor, name: str) -> Tensor:
    """`reference.activation`, by the C++ kernel on CPUs: torch's tanh GELU takes four times as long there."""
    if _has_kernel(x, name):
        return cpu_kernels.activation(x, name, torch.empty_like(x))
    return reference.activation(x, name)


def activation_in_place(x: Tensor, name: str) -> Tensor:
    """`activation`, over `x` where that is possible."""
    if _has_kernel(x, name):
        return cpu_kernels.activation(x, name, x)
    if name in ("gelu", "gelu_tanh"):
        return aten.gelu_(x, approximate="none" if name == "gelu" else "tanh")
    return aten.silu_(x) if name == "silu" else reference.activation(x, name)


def activation_backward(grad: Tensor, x: Tensor, name: str) -> Tensor:
    """Gradient of `reference.activation` at `x`."""
    if name == "none":
        return grad
    if name in ("gelu", "gelu_tanh"):
        return aten.gelu_backward(grad, x, approximate="none" if name == "gelu" else "tanh")
    if name == "silu":
        return aten.silu_backward(grad, x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    s = torch.sigmoid(1.702 * wide)
    return (grad * (s + 1.702 * wide * s * (1 - s))).to(grad.dtype)


def add_branch(branch: Tensor, tail: Tail) -> Tensor:
    """residual + row_scale * gamma * branch, contiguous; a fresh tensor unless all three are None.

    Rounds where the stock chain of operators rounds. `branch` may be overwritten when gamma is None.
    """
    gamma, row_scale, residual = tail
    if gamma is not None:
        branch = branch * gamma
    if row_scale is not None:
        branch = branch * row_scale.view(-1, *[1] * (branch.dim() - 1))
    if residual is None:
        return branch
    if residual.dtype == branch.dtype and residual.shape == branch.shape:
        return branch.add_(residual)
    return (residual + branch).contiguous()


def branch_grads(
    grad: Tensor, branch: Tensor | None, tail: Tail, dtype: torch.dtype, need_gamma: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the branch in `dtype`, and of gamma where needed. `grad` is the gradient of the sum."""
    grad = grad.contiguous()
    if tail.row_scale is not None:
        grad = grad * tail.row_scale.view(-1, *[1] * (grad.dim() - 1))
    grad_gamma = None
    if tail.gamma is not None:
        if need_gamma:
            grad_gamma = (grad * branch).flatten(0, -2).sum(0).to(tail.gamma.dtype)
        grad = grad * tail.gamma
    return cast(grad, dtype), grad_gamma


def matmul_grads(
    grad: Tensor, h: Tensor | None, weight: Tensor, mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias of `h @ weight.T + bias`; `h` is read only for the weight's."""
    rows = grad.reshape(-1, grad.shape[-1])
    grad_h = (rows @ weight).view(*grad.shape[:-1], weight.shape[1]) if mask[0] else None
    grad_weight = rows.t() @ h.reshape(-1, h.shape[-1]) if mask[1] else None
    grad_bias = rows.sum(0) if mask[2] else None
    return grad_h, grad_weight, grad_bias
