"""A linear layer with everything a ViT block puts around it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vitfast.reference.activation import activation, scale_branch
from vitfast.reference.layer_norm import layer_norm


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm: str = "none",
    act: str = "none",
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + row_scale * gamma * act(norm(x) @ weight.T + bias); each part is optional."""
    h = x if norm == "none" else layer_norm(x, norm_weight, norm_bias, norm_eps, norm, weight.dtype)
    y = scale_branch(activation(F.linear(h, weight, bias), act), gamma, row_scale)
    return y if residual is None else residual + y
