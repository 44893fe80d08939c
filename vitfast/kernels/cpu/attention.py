"""Softmax attention by the C++ kernel of csrc/cpu/attention.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitfast.kernels.cpu.arguments import DTYPES, FLOATS, describe, has_amx, kernels, takes


def attends(t: Tensor) -> bool:
    """Whether `attention` runs on this tensor here, where `tiled` is False: not where the CPU has AMX for its dtype.

    Without tiles it does not use that, and torch's own, which does, takes half its time (bf16 on a Xeon with AMX, 8
    images, 2.77 and 1.43 ms for S/16, 5.51 and 2.78 for B/16).
    """
    return takes(t) and not has_amx(t.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, with_lse: bool, using: Any = None) -> tuple:
    """softmax(scale q k^T) v as [B, Nq, H * D], and the lse [B, H, Nq] or None.

    Args:
        q: [B, Nq, H, D], k and v [B, Nk, H, D], all of one dtype of FLOATS, not empty, D side by side.
        using: kernels of another instruction set than this CPU's best.

    Raises:
        ValueError: a tensor does not fit.
    """
    if not _are_heads(q, 4) or not _are_heads(k, 4) or not _are_heads(v, 4) or q.dtype is not k.dtype:
        raise ValueError(
            "attention: q must be [B, Nq, H, D], k and v [B, Nk, H, D] in one dtype of float32, bfloat16 and float16, "
            f"with numbers in them and D side by side, got {'; '.join(map(describe, (q, k, v)))}"
        )
    B, Nq, H, D = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[2:] != q.shape[2:] or k.dtype is not v.dtype:
        raise ValueError(
            f"attention: k and v must be [{B}, Nk, {H}, {D}] in {str(q.dtype)[6:]} to match q, got "
            f"{describe(k)}; {describe(v)}"
        )
    views = [(t.data_ptr(), *t.stride()[:3]) for t in (q, k, v)]
    return _attention(q, views, B, H, Nq, k.shape[1], D, scale, with_lse, using)


def _are_heads(t: Tensor, dims: int) -> bool:
    return t.dim() == dims and t.dtype in FLOATS and t.is_cpu and t.stride(-1) == 1 and t.numel() > 0


def attention_qkv(qkv: Tensor, scale: float, with_lse: bool, using: Any = None) -> tuple:
    """`attention` of the packed projection [B, N, 3, H, D]."""
    if not _are_heads(qkv, 5) or qkv.shape[2] != 3:
        raise ValueError(
            "attention_qkv: qkv must be [B, N, 3, H, D] in float32, bfloat16 or float16, with numbers in it and D side "
            f"by side, got {describe(qkv)}"
        )
    B, N, _, H, D = qkv.shape
    image, token, part, head, _ = qkv.stride()
    start, step = qkv.data_ptr(), part * qkv.element_size()
    views = [(start + i * step, image, token, head) for i in range(3)]
    return _attention(qkv, views, B, H, N, N, D, scale, with_lse, using)


def _attention(like, views, B, H, Nq, Nk, D, scale, with_lse, using):
    out = like.new_empty(B, Nq, H * D)
    lse = like.new_empty(B, H, Nq, dtype=torch.float32) if with_lse else None
    (using or kernels()).attention(
        *views, out.data_ptr(), lse.data_ptr() if with_lse else 0, B, H, Nq, Nk, D, scale, DTYPES[like.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return out, lse
