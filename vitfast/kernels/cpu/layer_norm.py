"""LayerNorm by the C++ kernel of csrc/cpu/layer_norm.h, and as a part of others."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitfast.kernels.cpu.arguments import DTYPES, FLOATS, describe, fits, kernels, must_fit, no_copies


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, using: Any = None) -> Tensor:
    """LayerNorm over the last dim of contiguous x, not empty; weight and bias [D] contiguous; one dtype of FLOATS."""
    if x.dtype not in FLOATS or not x.numel() or not x.dim() or not fits(x, x.shape, x.dtype):
        which = "contiguous [..., D] in float32, bfloat16 or float16"
        raise ValueError(f"layer_norm: x must be {which}, got {describe(x)}")
    y, D = torch.empty_like(x), x.shape[-1]
    must_fit("layer_norm", "weight", weight, (D,), x.dtype)
    must_fit("layer_norm", "bias", bias, (D,), x.dtype)
    (using or kernels()).layer_norm(
        x.data_ptr(), y.data_ptr(), 0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
        x.numel() // D, D, eps, DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y


class NormView(NamedTuple):
    """What csrc/bindings.cpp reads of a `Norm`: addresses, 0 for None."""

    weight: int
    bias: int
    eps: float


class Norm:
    """A LayerNorm as `linear` and `mlp` read it: weight and bias [K], contiguous, in the dtype of x, or None.

    Raises:
        ValueError: weight or bias has gaps, another rank, or is not on the CPU.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None, eps: float):
        # what the addresses point to stays, whatever becomes of a parameter's `data`
        weight, bias = (None if t is None else t.detach() for t in (weight, bias))
        self.weight, self.bias = weight, bias
        given = [t for t in (weight, bias) if t is not None]
        self.sizes = {(t.shape, t.dtype) for t in given}
        if any(t.dim() != 1 or not fits(t, t.shape, t.dtype) for t in given):
            got = "; ".join(map(describe, given))
            raise ValueError(f"Norm: weight and bias must be contiguous [K] on the CPU, got {got}")
        self.view = NormView(*(0 if t is None else t.data_ptr() for t in (weight, bias)), eps)

    def check(self, what: str, K: int, dtype: torch.dtype) -> None:
        """Refuse rows of another length or dtype than weight and bias have.

        Raises:
            ValueError: they do not fit.
        """
        for shape, found in self.sizes:
            if shape[0] != K or found is not dtype:
                raise ValueError(
                    f"{what}: the norm's weight and bias must be [{K}] in {str(dtype)[6:]}, got {list(shape)} in "
                    f"{str(found)[6:]}"
                )

    def __reduce_ex__(self, protocol: Any) -> Any:
        no_copies(self)
