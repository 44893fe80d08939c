"""The MLP half of a block out of fused products: norm + fc1 + activation, then fc2 + scale + residual; and back."""

from __future__ import annotations

import torch
from torch import Tensor

from vitfast.kernels import gated_rows, layer_norm, linear
from vitfast.kernels.launch import DTYPES, device_reasons
from vitfast.kernels.linear import After, out_dtype, product, rows_of
from vitfast.kernels.linear_grads import before_product, column_sums
from vitfast.kernels.tuning import Product


def why_not(x: Tensor, w1: Tensor) -> list[str]:
    """Everything that keeps the kernels from computing this; empty where they can."""
    reasons = device_reasons(x.device, w1.dtype)
    if x.dtype not in DTYPES:
        reasons.append(f"x of {str(x.dtype)[6:]} (fp16, bf16 and fp32 only)")
    if x.shape[-1] > layer_norm.WIDEST:
        reasons.append(f"a norm of rows of {x.shape[-1]} (up to {layer_norm.WIDEST} only)")
    return reasons


def forward(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, norm_eps: float, norm: str, w1: Tensor,
    b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, gated: bool, gamma: Tensor | None,
    row_scale: Tensor | None, saves: str, *, config: Product | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(out, mean, rstd, pre, branch, hidden) of `ops.mlp`; all but the first None where no backward needs them."""
    first = config or linear.config_for(x, w1)
    keep = bool(saves)
    rows, folded, mean, rstd = linear.normed(x, w1, b1, norm, norm_weight, norm_bias, norm_eps, first, keep)
    pre, hidden = _hidden(rows, w1, b1, act, gated, first, folded, keeps_pre=saves in ("none", "act"))
    last = After(
        out_dtype(w1, gamma, row_scale, x), b2, gamma=gamma, row_scale=row_scale, tokens=layer_norm.tokens_of(x),
        beside=x, aside=keep and gamma is not None,
    )  # fmt: skip
    out, branch, _ = product(hidden, rows_of(w2), last, config or linear.config_for(hidden, w2))
    shaped = lambda t: None if t is None else t.view(*x.shape[:-1], t.shape[-1])  # noqa: E731
    return shaped(out), mean, rstd, shaped(pre), shaped(branch), shaped(hidden) if saves == "none" else None


def _hidden(rows, w1, b1, act, gated, config, folded, keeps_pre):
    """(pre, hidden): fc1's output where that is kept, and the hidden activation."""
    if gated:
        pre, *_ = product(rows, rows_of(w1), After(w1.dtype, b1), config, folded=folded)
        return pre if keeps_pre else None, gated_rows.forward(pre, act)
    hidden, pre, _ = product(rows, rows_of(w1), After(w1.dtype, b1, act, aside=keeps_pre), config, folded=folded)
    return pre, hidden


def backward(
    grad: Tensor, x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, w1: Tensor, b1: Tensor | None,
    w2: Tensor, b2: Tensor | None, pre: Tensor | None, branch: Tensor | None, hidden: Tensor | None,
    gamma: Tensor | None, row_scale: Tensor | None, norm_eps: float, norm: str, act: str, gated: bool,
    mask: list[bool], *, config: Product | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, norm_weight, norm_bias, w1, b1, w2, b2 and gamma, each where `mask` asks for it."""
    need_x, need_norm_weight, need_norm_bias, need_w1, need_b1, need_w2, need_b2, need_gamma = mask
    need_pre = need_x or need_norm_weight or need_norm_bias or need_w1 or need_b1
    grad_y, grad_gamma = layer_norm.branch_grads(grad, branch, gamma, row_scale, w1.dtype, need_gamma)
    grad_y, pre, hidden = rows_of(grad_y), rows_of(pre), rows_of(hidden)
    if pre is None and (need_pre or (need_w2 and hidden is None)):
        first = linear.config_for(x, w1)
        rows, folded, *_ = linear.normed(x, w1, b1, norm, norm_weight, norm_bias, norm_eps, first, False)
        pre, *_ = product(rows, rows_of(w1), After(w1.dtype, b1), first, folded=folded)
    grad_x = grad_norm_weight = grad_norm_bias = grad_w1 = grad_b1 = grad_w2 = grad_b2 = None
    again = need_w2 and hidden is None
    if need_pre:
        config = config or linear.config_for(grad_y, w2, across=True)
        if gated:
            grad_hidden = grad_y @ w2
            grad_pre, made = gated_rows.backward(grad_hidden, pre, act, again)
            sums = None
        else:
            after = After(w1.dtype, act=act, slope=True, beside=pre, aside=again, sums=need_b1 and b1 is not None)
            grad_pre, made, sums = product(grad_y, rows_of(w2), after, config, across=True)
        hidden = made if again else hidden
        if need_b1:
            grad_b1 = column_sums(grad_pre, sums, b1)
        grad_x, grad_w1, grad_norm_weight, grad_norm_bias = before_product(
            grad_pre, x, w1, norm_weight, norm_bias, norm_eps, norm,
            [need_x, need_w1, need_norm_weight, need_norm_bias], residual_grad=grad,
        )  # fmt: skip
    elif again:
        hidden = gated_rows.forward(pre, act) if gated else linear.finish(pre, After(w1.dtype, act=act))[0]
    if need_w2:
        grad_w2 = grad_y.t() @ hidden
    if need_b2:
        grad_b2 = grad_y.sum(0, dtype=torch.float32).to(b2.dtype)
    return grad_x, grad_norm_weight, grad_norm_bias, grad_w1, grad_b1, grad_w2, grad_b2, grad_gamma
