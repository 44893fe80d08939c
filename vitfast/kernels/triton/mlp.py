"""The MLP half of a block out of fused products: norm + fc1 + activation, then fc2 + scale + residual; and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vitfast.choose import config_tables
from vitfast.choose.config_tables import Product
from vitfast.kernels.operands import Norm, Projections, Saved, Tail
from vitfast.kernels.triton import layer_norm, linear, mlp_gated, mlp_whole
from vitfast.kernels.triton.compilation import Compilation
from vitfast.kernels.triton.launch import (
    DTYPES,
    UNIT,
    architecture,
    device_reasons,
    dot_precision,
    launch,
    rows_of,
)
from vitfast.kernels.triton.linear import After, out_dtype, product
from vitfast.kernels.triton.linear_grads import before_product, column_sums


def why_not(x: Tensor, w1: Tensor) -> list[str]:
    """Everything that keeps the kernels from computing this; empty where they can."""
    reasons = device_reasons(x.device, w1.dtype)
    if x.dtype not in DTYPES:
        reasons.append(f"x of {str(x.dtype)[6:]} (fp16, bf16 and fp32 only)")
    if x.shape[-1] > layer_norm.WIDEST:
        reasons.append(f"a norm of rows of {x.shape[-1]} (up to {layer_norm.WIDEST} only)")
    return reasons


def forward(
    x: Tensor, norm: Norm, fc: Projections, tail: Tail, saves: str, *, config: Product | None = None
) -> tuple[Tensor | None, ...]:
    """(out, mean, rstd, pre, branch, hidden) of `ops.mlp`; all but the first None where no backward needs them."""
    keep = bool(saves)
    if config is not None and config.kernel == "whole" and not _lies_well(x, fc.w1):
        # tuned for rows of another stride
        config = None
    can_be_whole = not fc.gated and saves in ("", "fc1") and not (keep and tail.gamma is not None)
    first = config or linear.config_for(x, fc.w1)
    if first.kernel == "whole":
        reasons = why_not_whole(x, fc.w1, first) + ([] if can_be_whole else ["what its backward keeps, or a gate"])
        if reasons:
            raise NotImplementedError(f"mlp: one kernel for all of it cannot run: {'; '.join(reasons)}")
        mean = rstd = None
        if keep and norm.kind == "layer":
            *_, mean, rstd = layer_norm.forward(x, norm, None)
        return whole(x, norm, fc, tail, first), mean, rstd, None, None, None
    rows, folded, mean, rstd = linear.normed(x, fc.w1, fc.b1, norm, first, keep)
    pre, hidden = _hidden(rows, fc, first, folded, keeps_pre=saves in ("none", "act"))
    last = After(
        out_dtype(fc.w1, *tail), fc.b2, gamma=tail.gamma, row_scale=tail.row_scale, beside=tail.residual,
        tokens=layer_norm.tokens_of(x), aside=keep and tail.gamma is not None,
    )  # fmt: skip
    out, branch, _ = product(hidden, rows_of(fc.w2), last, config or linear.config_for(hidden, fc.w2))
    shaped = lambda t: None if t is None else t.view(*x.shape[:-1], t.shape[-1])  # noqa: E731
    return shaped(out), mean, rstd, shaped(pre), shaped(branch), shaped(hidden) if saves == "none" else None


def why_not_whole(x: Tensor, w1: Tensor, config: Product) -> list[str]:
    """Everything that keeps one kernel from computing all of an MLP; empty where it can."""
    F, C = w1.shape
    reasons = []
    if x.dtype != w1.dtype or x.dtype is torch.float32:
        reasons.append(f"x of {str(x.dtype)[6:]} and weights of {str(w1.dtype)[6:]} (one half precision only)")
    if sum(_parts(C)) != C or C < 2 * UNIT:
        reasons.append(f"width {C} (one or two powers of two from 16 on only)")
    if F % config.block_n:
        reasons.append(f"{F} hidden numbers (multiples of {config.block_n} only)")
    if not _lies_well(x, w1):
        reasons.append("rows that do not begin at multiples of 16 bytes, or that overlap")
    return reasons


def _lies_well(x: Tensor, w1: Tensor) -> bool:
    return w1.is_contiguous() and linear.describable(rows_of(x), w1)


def _parts(C: int) -> tuple[int, int]:
    """Columns of a row's two parts: the largest power of two, and the rest, which has to be one or 0."""
    first = 1 << (C.bit_length() - 1)
    rest = C - first
    return (first, rest) if rest & (rest - 1) == 0 and (rest == 0 or rest >= 16) else (first, 0)


def whole(x: Tensor, norm: Norm, fc: Projections, tail: Tail, config: Product) -> Tensor:
    """`ops.mlp` in one kernel."""
    rows, w2 = rows_of(x), fc.w2.contiguous()
    if not linear.describable(w2):
        w2 = w2.clone()
    (M, C), F = rows.shape, fc.w1.shape[0]
    out = torch.empty(M, C, dtype=out_dtype(fc.w1, *tail), device=x.device)
    given = (norm.weight, norm.bias, fc.b1, fc.b2, tail.gamma, tail.row_scale)
    vectors = [x if t is None else t for t in given]
    tiles = [rows, rows, fc.w1, fc.w1, w2, w2, out, out]
    flags = ("WEIGHT", "BIAS", "B1", "B2", "GAMMA", "ROW_SCALE")
    constants = _whole_constants(C, F, config, x.dtype) | {"ACT": fc.act, "RMS": norm.kind == "rms"}
    constants |= {flag: t is not None for flag, t in zip(flags, given, strict=True)}
    numbers = (M, rows.stride(0) // UNIT, layer_norm.tokens_of(x), norm.eps)
    grid = (-(-M // config.block_m),)
    boxes = _boxes(C, config) if config.descriptors else ()
    launch(mlp_whole.mlp_whole, grid, (*tiles, *vectors), numbers, constants, config.warps, config.stages, boxes=boxes)
    return out.view(x.shape)


def _whole_constants(C: int, F: int, config: Product, dtype: torch.dtype) -> dict[str, Any]:
    W0, W1 = _parts(C)
    return {
        "C": C, "F": F, "W0": W0, "W1": W1, "BM": config.block_m, "BH": config.block_n, "STAGES": config.stages,
        "UNIT": UNIT, "DESC": config.descriptors, "PRECISION": dot_precision(dtype),
    }  # fmt: skip


def _boxes(C: int, config: Product) -> list[tuple[int, int]]:
    """Of x, w1, w2 and the result, each for both parts of a row."""
    W0, W1 = _parts(C)
    W1 = W1 or W0
    rows, hidden = config.block_m, config.block_n
    return [(rows, W0), (rows, W1), (hidden, W0), (hidden, W1), (W0, hidden), (W1, hidden), (rows, W0), (rows, W1)]


def whole_configs(device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype, F: int, C: int) -> list[Product]:
    """What computes an MLP without a gate in one kernel."""
    config = config_tables.WHOLE[architecture(device)].get(C)
    x, w1 = (torch.empty(n, C, dtype=t, device="meta") for n, t in ((1, dtype), (F, weight_dtype)))
    return [] if config is None or why_not_whole(x, w1, config) else [config]


def compilations(arch: int) -> Iterator[Compilation]:
    """One kernel for a whole MLP at the widths of its table, and the gated activation."""
    for C, config in config_tables.WHOLE[arch].items():
        for scaled in (False, True):
            constants = _whole_constants(C, 4 * C, config, torch.bfloat16) | {
                "ACT": "gelu", "RMS": False, "WEIGHT": True, "BIAS": True, "B1": True, "B2": True, "GAMMA": scaled,
                "ROW_SCALE": scaled,
            }  # fmt: skip
            types = {name: "*bf16" for name in mlp_whole.mlp_whole.arg_names if name not in constants}
            types |= dict.fromkeys(mlp_whole.RUNTIME, "i32") | {"eps": "fp32"}
            if config.descriptors:
                tiles = ("x0", "x1", "w10", "w11", "w20", "w21", "out0", "out1")
                boxes = zip(tiles, _boxes(C, config), strict=True)
                types |= {name: f"tensordesc<bf16[{rows},{columns}]>" for name, (rows, columns) in boxes}
            pointers = tuple(name for name, kind in types.items() if kind.startswith("*"))
            name = f"mlp_whole C{C} {config.block_m}x{config.block_n} w{config.warps} s{config.stages}"
            name += " desc" * config.descriptors + " scaled" * scaled
            yield Compilation(
                name, mlp_whole.mlp_whole, types, constants, pointers, config.warps, config.stages,
                default=C in config_tables.WHOLE_FIRST.get(arch, ()),
            )  # fmt: skip
    for kernel in (mlp_gated.gated_forward, mlp_gated.gated_backward):
        constants = {"ACT": "silu", "BLOCK": mlp_gated.BLOCK, "HIDDEN": True, "UNIT": UNIT}
        constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
        types = {name: "*bf16" for name in kernel.arg_names if name not in constants}
        types |= dict.fromkeys(mlp_gated.RUNTIME, "i32")
        pointers = tuple(name for name, kind in types.items() if kind.startswith("*"))
        yield Compilation(f"{kernel.__name__} bf16", kernel, types, constants, pointers, 4, 2)


def _hidden(rows, fc, config, folded, keeps_pre):
    """(pre, hidden): fc1's output where that is kept, and the hidden activation."""
    w1, dtype = rows_of(fc.w1), fc.w1.dtype
    if fc.gated:
        pre, *_ = product(rows, w1, After(dtype, fc.b1), config, folded=folded)
        return pre if keeps_pre else None, mlp_gated.forward(pre, fc.act)
    hidden, pre, _ = product(rows, w1, After(dtype, fc.b1, fc.act, aside=keeps_pre), config, folded=folded)
    return pre, hidden


def backward(
    grad: Tensor, x: Tensor, norm: Norm, fc: Projections, saved: Saved, tail: Tail, mask: list[bool], *,
    config: Product | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, norm_weight, norm_bias, w1, b1, w2, b2 and gamma, each where `mask` asks for it."""
    need_x, need_norm_weight, need_norm_bias, need_w1, need_b1, need_w2, need_b2, need_gamma = mask
    need_pre = need_x or need_norm_weight or need_norm_bias or need_w1 or need_b1
    w1, b1, w2, b2, act, gated = fc
    grad_y, grad_gamma = layer_norm.branch_grads(grad, saved.branch, tail, w1.dtype, need_gamma)
    grad_y, pre, hidden = rows_of(grad_y), rows_of(saved.pre), rows_of(saved.hidden)
    if pre is None and (need_pre or (need_w2 and hidden is None)):
        first = config or linear.config_for(x, w1)
        rows, folded, *_ = linear.normed(x, w1, b1, norm, first, False)
        pre, *_ = product(rows, rows_of(w1), After(w1.dtype, b1), first, folded=folded)
    grad_x = grad_norm_weight = grad_norm_bias = grad_w1 = grad_b1 = grad_w2 = grad_b2 = None
    again = need_w2 and hidden is None
    if need_pre:
        config = config or linear.config_for(grad_y, w2, across=True)
        if gated:
            grad_hidden = grad_y @ w2
            grad_pre, made = mlp_gated.backward(grad_hidden, pre, act, again)
            sums = None
        else:
            after = After(w1.dtype, act=act, slope=True, beside=pre, aside=again, sums=need_b1 and b1 is not None)
            grad_pre, made, sums = product(grad_y, rows_of(w2), after, config, across=True)
        hidden = made if again else hidden
        if need_b1:
            grad_b1 = column_sums(grad_pre, sums, b1)
        grad_x, grad_w1, grad_norm_weight, grad_norm_bias = before_product(
            grad_pre, x, w1, norm, [need_x, need_w1, need_norm_weight, need_norm_bias], residual_grad=grad
        )
    elif again:
        hidden = mlp_gated.forward(pre, act) if gated else linear.finish(pre, After(w1.dtype, act=act))[0]
    if need_w2:
        grad_w2 = grad_y.t() @ hidden
    if need_b2:
        grad_b2 = grad_y.sum(0, dtype=torch.float32).to(b2.dtype)
    return grad_x, grad_norm_weight, grad_norm_bias, grad_w1, grad_b1, grad_w2, grad_b2, grad_gamma
