"""Which implementation computes an attention: the Triton kernels, or what is in `_attention_stock`; at every call."""

from __future__ import annotations

import functools
import os
from collections.abc import Hashable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vitfast import dispatch
from vitfast.ops import _attention_stock as stock
from vitfast.ops._attention_stock import nothing

# Triton reads it when it is imported; its interpreter then runs kernels on CPU tensors
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def may_be_kernels(q: Tensor) -> bool:
    """Whether kernels exist for q's device; on others `F.scaled_dot_product_attention` does what they would do."""
    return q.is_cuda or INTERPRETED


@functools.cache
def _kernels() -> tuple[ModuleType | None, str]:
    try:
        from vitfast.kernels import attention
    except ImportError as problem:
        return None, f"triton cannot be imported: {problem}"
    return attention, ""


@functools.lru_cache(maxsize=4096)
def _why_not(device: torch.device, dtype: torch.dtype, head_dim: int, positive: bool) -> tuple[str, ...]:
    kernels, why = _kernels()
    return (why,) if kernels is None else tuple(kernels.why_not(device, dtype, head_dim, positive))


def kernels_for(kernel: str, q: Tensor, k: Tensor, scale: float) -> tuple[ModuleType, Any] | None:
    """The kernels' launchers and the tuned configuration, if there is one, where they compute this; else None.

    Args:
        kernel: its name in `dispatch.KERNELS`.

    Raises:
        NotImplementedError: the user forced it where it cannot run; says all the reasons.
    """
    if not may_be_kernels(q):
        return None
    why_not = _why_not(q.device, q.dtype, q.shape[3], scale > 0)
    kernels, shape = _kernels()[0], shape_key(q, k)
    if not dispatch.choose(kernel, shape, q.device.index, why_not, True):
        return None
    tuned = dispatch.tuned_config(kernel, shape, q.device.index)
    return kernels, None if tuned is None else kernels.Config(**tuned)


def shape_key(q: Tensor, k: Tensor) -> tuple[Hashable, ...]:
    """What tuned choices are kept under: heads of all images by powers of two, since a few more change nothing."""
    heads = (q.shape[0] * q.shape[2]).bit_length()
    return str(q.dtype)[6:], heads, q.shape[1], k.shape[1], q.shape[3]


def rows_in_place(t: Tensor) -> Tensor:
    """`t` itself where its rows lie in one piece, as kernels read them; else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _forward(q, k, v, scale, lengths, dropout_p, seed):
    """Out and lse by the kernels or the formula; None where a stock kernel may do it."""
    found = kernels_for("attention", q, k, scale)
    if found is not None:
        kernels, config = found
        q, k, v = map(rows_in_place, (q, k, v))
        return kernels.forward(q, k, v, scale, lengths=lengths, dropout_p=dropout_p, seed=seed, config=config)
    if lengths is not None or dropout_p:
        return stock.attention_formula(q, k, v, scale, lengths, dropout_p, seed)
    return None


def _backward(grad, q, k, v, out, lse, scale, lengths, dropout_p, seed, into=None):
    found = kernels_for("attention_backward", q, k, scale)
    if found is not None:
        kernels, config = found
        q, k, v = map(rows_in_place, (q, k, v))
        extras = {"lengths": lengths, "dropout_p": dropout_p, "seed": seed, "into": into, "config": config}
        return kernels.backward(grad.contiguous(), q, k, v, out, lse, scale, **extras)
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
    return _forward(q, k, v, scale, lengths, dropout_p, seed) or stock.attention_cuda(q, k, v, scale)


def attention_qkv_cpu(qkv, scale, lengths=None, dropout_p=0.0, seed=None):
    if INTERPRETED or lengths is not None or dropout_p:
        return attention_cpu(*qkv.unbind(2), scale, lengths, dropout_p, seed)
    return stock.attention_qkv_cpu(qkv, scale)


def attention_qkv_cuda(qkv, scale, lengths=None, dropout_p=0.0, seed=None):
    return attention_cuda(*qkv.unbind(2), scale, lengths, dropout_p, seed)


def attention_backward_cpu(grad, q, k, v, out, lse, scale, lengths=None, dropout_p=0.0, seed=None):
    if q.numel() and k.numel():
        found = _backward(grad, q, k, v, out, lse, scale, lengths, dropout_p, seed)
        if found is not None:
            return found
    return stock.attention_backward_cpu(grad, q, k, v, out, lse, scale)


def attention_backward_cuda(grad, q, k, v, out, lse, scale, lengths=None, dropout_p=0.0, seed=None):
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    found = _backward(grad, q, k, v, out, lse, scale, lengths, dropout_p, seed)
    return found or stock.attention_backward_cuda(grad, q, k, v, out, lse, scale)


def _packed_backward(backward):
    """`backward` of the packed projection, whose gradient is written where it belongs or stacked."""

    def run(grad, qkv, out, lse, scale, lengths=None, dropout_p=0.0, seed=None):
        q, k, v = qkv.unbind(2)
        if qkv.numel() and kernels_for("attention_backward", q, k, scale) is not None:
            packed = torch.empty_like(qkv, memory_format=torch.contiguous_format)
            _backward(grad, q, k, v, out, lse, scale, lengths, dropout_p, seed, into=packed.unbind(2))
            return packed
        return torch.stack(backward(grad, q, k, v, out, lse, scale, lengths, dropout_p, seed), dim=2)

    return run


attention_qkv_backward_cpu = _packed_backward(attention_backward_cpu)
attention_qkv_backward_cuda = _packed_backward(attention_backward_cuda)
