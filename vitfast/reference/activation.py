"""The activations of ViTs, and what LayerScale and stochastic depth do to a branch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def activation(x: Tensor, name: str) -> Tensor:
    """'gelu' is x * Phi(x) by erf; 'gelu_tanh' and 'quick_gelu' are its two published approximations."""
    if name == "none":
        return x
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if name == "silu":
        return F.silu(x)
    raise ValueError(f"activation must be 'none', 'gelu', 'gelu_tanh', 'quick_gelu' or 'silu', got {name!r}")


def scale_branch(branch: Tensor, gamma: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """LayerScale per channel (gamma [C]) and stochastic depth per image (row_scale [B])."""
    if gamma is not None:
        branch = branch * gamma
    if row_scale is not None:
        branch = branch * row_scale.view(-1, *[1] * (branch.dim() - 1))
    return branch
