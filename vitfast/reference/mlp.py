"""The MLP half of a block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vitfast.reference.activation import activation, scale_branch
from vitfast.reference.layer_norm import layer_norm


def mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    norm: str,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: str = "gelu",
    gated: bool = False,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """x + row_scale * gamma * (act(norm(x) @ w1.T + b1) @ w2.T + b2).

    Gated: w1 holds gate and value, gate first; the hidden activation is act(gate) * value.
    """
    h = F.linear(layer_norm(x, norm_weight, norm_bias, norm_eps, norm, w1.dtype), w1, b1)
    if gated:
        gate, value = h.chunk(2, dim=-1)
        h = activation(gate, act) * value
    else:
        h = activation(h, act)
    return x + scale_branch(F.linear(h, w2, b2), gamma, row_scale)
