"""Which implementation computes an attention: the Triton kernels, or what is in `_attention_stock`; at every call."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vitfast import dispatch
from vitfast.ops import _attention_stock as stock
from vitfast.ops._attention_stock import nothing
from vitfast.ops._launch import INTERPRETED, kernels, launched, may_be_kernels

# of smaller ones fp32 makes 0, and 0 times the -inf of a masked logit is no number
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def kernels_run(q: Tensor, scale: float) -> bool:
    """Whether kernels compute this with dropout or lengths; torch.compile is told what holds for any kernel.

    Raises:
        NotImplementedError: the user forced them where they cannot; says all the reasons.
    """
    if not may_be_kernels(q) or torch.compiler.is_compiling():
        return may_be_kernels(q)
    why_not = _why_not(q.device, q.dtype, q.shape[3], scale >= SMALLEST_SCALE)
    return dispatch.choose("attention", (), q.device.index, why_not)


@functools.lru_cache(maxsize=4096)
def _why_not(device: torch.device, dtype: torch.dtype, head_dim: int, positive: bool) -> tuple[str, ...]:
    module, why = kernels("attention")
    return (why,) if module is None else tuple(module.why_not(device, dtype, head_dim, positive))


def kernels_for(
    kernel: str, q: Tensor, k: Tensor, scale: float, extras: bool = False
) -> tuple[ModuleType, Any] | None:
    """The kernels' launchers and the chosen configuration, if there is one, where they compute this; else None.

    Args:
        kernel: its name in `dispatch.KERNELS`.
        extras: with dropout, lengths or packed sequences, which nobody tunes.

    Raises:
        NotImplementedError: the user forced it where it cannot run; says all the reasons.
    """
    if not may_be_kernels(q):
        return None
    why_not = _why_not(q.device, q.dtype, q.shape[3], scale >= SMALLEST_SCALE)
    module, shape = kernels("attention")[0], () if extras else shape_key(q, k)
    if not dispatch.choose(kernel, shape, q.device.index, why_not):
        return None
    config = dispatch.config_for(kernel, shape, q.device.index)
    return module, None if config is None else module.Config(**config)


def shape_key(q: Tensor, k: Tensor) -> tuple[Hashable, ...]:
    """What choices are kept under: heads of all images by powers of two, since a few more change nothing."""
    heads = (q.shape[0] * q.shape[2]).bit_length()
    return str(q.dtype)[6:], heads, q.shape[1], k.shape[1], q.shape[3]


def rows_in_place(t: Tensor) -> Tensor:
    """`t` itself where its rows lie in one piece, as kernels read them; else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _forward(q, k, v, scale, lengths, dropout_p, seed):
    """Out and lse by the kernels or the formula; None where a stock kernel may do it."""
    found = kernels_for("attention", q, k, scale, bool(dropout_p) or lengths is not None)
    if found is not None:
        module, config = found
        rows = map(rows_in_place, (q, k, v))
        extras = {"lengths": lengths, "dropout_p": dropout_p, "seed": seed, "config": config}
        out = launched("attention", lambda: module.forward(*rows, scale, **extras))
        if out is not None:
            return out
    if lengths is not None or dropout_p:
        return stock.attention_formula(q, k, v, scale, lengths, dropout_p, seed)
    return None


def _backward(grad, q, k, v, out, lse, scale, lengths, dropout_p, seed, into=None):
    found = kernels_for("attention_backward", q, k, scale, bool(dropout_p) or lengths is not None)
    if found is not None:
        module, config = found
        rows = map(rows_in_place, (q, k, v))
        extras = {"lengths": lengths, "dropout_p": dropout_p, "seed": seed, "into": into, "config": config}
        grads = launched(
            "attention_backward", lambda: module.backward(grad.contiguous(), *rows, out, lse, scale, **extras)
        )
        if grads is not None:
            return grads
    if lengths is not None or dropout_p:
        return stock.attention_formula_backward(grad, q, k, v, out, lse, scale, lengths, dropout_p, seed)
    return None


def attention_cpu(q, k, v, scale, lengths=None, dropout_p=0.0, seed=None):
    if q.numel() and k.numel():
        found = _forward(q, k, v, scale, lengths, dropout_p, seed)
        if found is not None:
            return found
    return stock.attention_cpu(q, k, v, scale)


def attention_cuda(q, k, v, scale, lengths=None, dropout_p=0.0, seed=None):
    if not q.numel() or not k.numel():
        return nothing(q)
    found = _forward(q, k, v, scale, lengths, dropout_p, seed)
    if found is None:
        which = dispatch.stock_config("attention", shape_key(q, k), q.device.index)
        found = stock.attention_cuda(q, k, v, scale, **(which or {}))
    return found


def attention_qkv_cpu(qkv, scale, lengths=None, dropout_p=0.0, seed=None):
    if INTERPRETED or lengths is not None or dropout_p:
        return attention_cpu(*qkv.unbind(2), scale, lengths, dropout_p, seed)
    return stock.attention_qkv_cpu(qkv, scale)


def attention_qkv_cuda(qkv, scale, lengths=None, dropout_p=0.0, seed=None):
    return attention_cuda(*qkv.unbind(2), scale, lengths, dropout_p, seed)


def attention_backward_cpu(grad, q, k, v, out, lse, scale, lengths=None, dropout_p=0.0, seed=None, into=None):
    if q.numel() and k.numel():
        found = _backward(grad, q, k, v, out, lse, scale, lengths, dropout_p, seed, into)
        if found is not None:
            return found
    return stock.attention_backward_cpu(grad, q, k, v, out, lse, scale)


def attention_backward_cuda(grad, q, k, v, out, lse, scale, lengths=None, dropout_p=0.0, seed=None, into=None):
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    found = _backward(grad, q, k, v, out, lse, scale, lengths, dropout_p, seed, into)
    return found or stock.attention_backward_cuda(grad, q, k, v, out, lse, scale)


def _packed_backward(backward):
    """`backward` of the packed projection, whose gradient is written where it belongs or stacked."""

    def run(grad, qkv, out, lse, scale, lengths=None, dropout_p=0.0, seed=None):
        q, k, v = qkv.unbind(2)
        if not may_be_kernels(qkv):
            return torch.stack(backward(grad, q, k, v, out, lse, scale, lengths, dropout_p, seed), dim=2)
        packed = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        parts = packed.unbind(2)
        grads = backward(grad, q, k, v, out, lse, scale, lengths, dropout_p, seed, parts)
        return packed if grads is parts else torch.stack(grads, dim=2)

    return run


attention_qkv_backward_cpu = _packed_backward(attention_backward_cpu)
attention_qkv_backward_cuda = _packed_backward(attention_backward_cuda)
