"""Activations by the C++ kernel of csrc/cpu/activation.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitfast.kernels.cpu.arguments import ACTIVATIONS, DTYPES, FLOATS, describe, fits, kernels, must_fit


def activation(x: Tensor, name: str, out: Tensor, using: Any = None) -> Tensor:
    """The activation of contiguous x in a dtype of FLOATS, written to `out` (which may be x)."""
    if x.dtype not in FLOATS or not fits(x, x.shape, x.dtype):
        raise ValueError(f"activation: x must be contiguous in float32, bfloat16 or float16, got {describe(x)}")
    must_fit("activation", "out", out, x.shape, x.dtype)
    (using or kernels()).activation(
        x.data_ptr(), out.data_ptr(), x.numel(), DTYPES[x.dtype], ACTIVATIONS[name], torch.get_num_threads()
    )
    return out
