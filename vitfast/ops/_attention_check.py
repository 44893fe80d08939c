"""What q, k, v, a mask, lengths and a rate of dropout must be for attention."""

from __future__ import annotations

import torch
from torch import Tensor

from vitfast.choose.exportable import refuse_proxy
from vitfast.ops._check import Reasons


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise where q [B, Nq, H, D], k and v [B, Nk, H, D] cannot be attended to."""
    refuse_proxy(q)
    check = Reasons("attention")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            check.fail(f"{name} must be [B, N, H, D], got {list(t.shape)}")
    check.raise_if_any()
    B, _, H, D = q.shape
    check.shape("k", k, (B, k.shape[1], H, D), "to match q")
    check.shape("v", v, tuple(k.shape), "to match k")
    check.tensors(q=q, k=k, v=v)
    check.same_dtype(q=q, k=k, v=v)
    check.raise_if_any()


def check_extras(
    q: Tensor, k: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None, dropout_p: float = 0.0
) -> None:
    """Raise where mask, lengths or dropout cannot be used with q [B, Nq, H, D] and k [B, Nk, H, D]."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"attention: dropout_p must be from 0 to 1, got {dropout_p}")
    if mask is not None:
        check_mask(mask, q, k)
    if lengths is None:
        return
    if mask is not None:
        raise ValueError("attention: lengths must not come together with a mask, which can say the same")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"attention: lengths must be int32 or int64, got {str(lengths.dtype)[6:]}")
    if lengths.shape != (q.shape[0],) or lengths.device != q.device:
        got = f"{list(lengths.shape)} on {lengths.device}"
        raise ValueError(f"attention: lengths must be [{q.shape[0]}] on {q.device}, got {got}")


def check_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    """Raise where `mask` cannot be used with q [B, Nq, H, D] and k [B, Nk, H, D]."""
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise TypeError(
            f"attention: mask must be bool or float (float32 or q's {str(q.dtype)[6:]}), got {str(mask.dtype)[6:]}"
        )
    B, Nq, H, _ = q.shape
    full = (B, H, Nq, k.shape[1])
    missing = 4 - mask.dim()
    if not 0 <= missing <= 2 or any(n not in (1, size) for n, size in zip(mask.shape, full[missing:], strict=True)):
        raise ValueError(f"attention: mask must be broadcastable to {list(full)}, got {list(mask.shape)}")
