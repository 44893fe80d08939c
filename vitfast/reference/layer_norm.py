"""LayerNorm and RMSNorm, alone or of a residual sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.choose.exportable import forward_mode
from vitfast.reference.activation import scale_branch


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str = "layer",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """(x - mean) * rstd * weight + bias over the last dim, or x * rstd * weight for kind 'rms'."""
    shape = [int(x.shape[-1])]  # a number also where a tracer makes a tensor of it
    dtype = x.dtype if out_dtype is None else out_dtype
    if weight is not None and weight.dtype != x.dtype:
        # float32 parameters beside a half-precision input: torch takes that on CPUs only
        x = x.to(weight.dtype)
    if kind == "rms":
        y = F.rms_norm(x, shape, weight, eps)
    elif forward_mode():
        y = _layer_norm_by_hand(x, weight, bias, eps)
    else:
        y = F.layer_norm(x, shape, weight, bias, eps)
    return y.to(dtype)


def _layer_norm_by_hand(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    # the gradient of F.layer_norm's tangent takes mean and rstd for constants (torch 2.11 and 2.14)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    y = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def add_layer_norm(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str = "layer",
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The new residual, `residual + row_scale * gamma * branch`, and its norm."""
    total = residual + scale_branch(branch, gamma, row_scale)
    return total, layer_norm(total, weight, bias, eps, kind, out_dtype)
