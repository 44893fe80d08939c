"""Products with packed weights by the C++ kernels of csrc/cpu/linear.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.kernels.cpu.arguments import (
    DTYPES,
    FLOATS,
    MAX_LANES,
    act_number,
    describe,
    fits,
    kernels,
    must_fit,
    no_copies,
)
from vitfast.kernels.cpu.layer_norm import Norm


def multiplies(dtype: torch.dtype, using: Any = None) -> bool:
    """Whether `linear` takes tensors of this dtype: fp32, and bf16 where the CPU multiplies that."""
    found = using or kernels()
    return found is not None and dtype in FLOATS and found.multiplies(DTYPES[dtype])


class PackedView(NamedTuple):
    """What csrc/bindings.cpp reads of a `PackedWeight`: addresses, a bias of 0 for None, and sizes."""

    cells: int
    bias: int
    K: int
    D: int


class PackedWeight:
    """A weight [D, K] and a bias [D] as `linear` and `mlp` read them.

    Args:
        weight: in a dtype for which `multiplies` is True; K even in bfloat16.
        using: kernels of another instruction set than this CPU's best; the same must multiply it.

    Raises:
        ValueError: K is odd in bfloat16; weight or bias does not fit.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, using: Any = None):
        if weight.dim() != 2 or not weight.is_cpu or not weight.numel() or not multiplies(weight.dtype, using):
            raise ValueError(f"PackedWeight: weight must be [D, K] in a dtype it can multiply, got {describe(weight)}")
        if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_cpu):
            raise ValueError(f"PackedWeight: bias must be [{weight.shape[0]}], got {describe(bias)}")
        (self.D, self.K), self.dtype = weight.shape, weight.dtype
        if not self.takes(self.K, weight.dtype):
            raise ValueError(f"PackedWeight: K must be even in bfloat16, got {self.K}")
        weight = weight.contiguous()
        self.kernels = using or kernels()
        size = self.kernels.packed_bytes(self.D, self.K, DTYPES[weight.dtype])
        self.cells = weight.new_empty(size, dtype=torch.uint8)
        self.kernels.pack_weight(weight.data_ptr(), self.cells.data_ptr(), self.D, self.K, DTYPES[weight.dtype])
        self.bias = None if bias is None else F.pad(bias.float(), (0, -self.D % MAX_LANES))
        self.view = PackedView(
            self.cells.data_ptr(), 0 if self.bias is None else self.bias.data_ptr(), K=self.K, D=self.D
        )

    @staticmethod
    def takes(K: int, dtype: torch.dtype) -> bool:
        return K % 2 == 0 or dtype is not torch.bfloat16

    def check(self, what: str, x: Tensor, norm: Norm | None = None) -> None:
        """Refuse an x or a norm of it that the kernels would read, or write results for, beside its memory.

        Raises:
            ValueError: x is not a contiguous [..., K] in the weight's dtype with rows in it, or the norm not one of it.
        """
        _must_be_rows(what, x, self.K, self.dtype, norm)

    def kernels_for(self, what: str, using: Any) -> Any:
        """The kernels that read this layout.

        Raises:
            ValueError: others are asked for, to which it would be other numbers.
        """
        if using is not None and using.name != self.kernels.name:
            raise ValueError(f"{what}: weights were packed for {self.kernels.name}, got kernels of {using.name}")
        return self.kernels

    def follows(self, what: str, *others: PackedWeight) -> None:
        """Refuse weights that do not take what this one gives; each takes the results of the one before it.

        Raises:
            ValueError: another width or dtype.
        """
        for one, other in zip((self, *others), others, strict=False):
            other.kernels_for(what, one.kernels)
            if one.D != other.K or one.dtype is not other.dtype:
                raise ValueError(
                    f"{what}: a weight must take the [..., {one.D}] in {str(one.dtype)[6:]} of the one before it, got "
                    f"one for [..., {other.K}] in {str(other.dtype)[6:]}"
                )

    def __reduce_ex__(self, protocol: Any) -> Any:
        no_copies(self)


def _must_be_rows(what: str, x: Tensor, K: int, dtype: torch.dtype, norm: Norm | None) -> None:
    shape = x.shape
    if not shape or shape[-1] != K or not x.numel() or not fits(x, shape, dtype):
        raise ValueError(f"{what}: x must be contiguous [..., {K}] in {str(dtype)[6:]}, got {describe(x)}")
    if norm is not None:
        norm.check(what, K, dtype)


def linear(
    x: Tensor,
    weight: PackedWeight,
    *,
    norm: Norm | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    using: Any = None,
) -> Tensor:
    """residual + act(norm(x) @ weight.T + bias), rounded once; the normed x is rounded too.

    Args:
        x: [..., K], contiguous, not empty, in the dtype of the weight.
        act: 'none' or one of ACTIVATIONS.
        residual: [..., D], contiguous.
    """
    weight.check("linear", x, norm)
    out = x.new_empty(*x.shape[:-1], weight.D)
    must_fit("linear", "residual", residual, out.shape, out.dtype)
    weight.kernels_for("linear", using).linear(
        x.data_ptr(), None if norm is None else norm.view, weight.view, 0 if residual is None else residual.data_ptr(),
        out.data_ptr(), x.numel() // weight.K, DTYPES[x.dtype], act_number(act), torch.get_num_threads(),
    )  # fmt: skip
    return out


def takes_unpacked(weight: Tensor, using: Any = None) -> bool:
    """Whether `linear_unpacked` runs with this weight [D, K] here: kernels of tiles, on whole ones."""
    found = using or kernels()
    if found is None or weight.dim() != 2 or not weight.numel() or weight.dtype not in FLOATS:
        return False
    return fits(weight, weight.shape, weight.dtype) and found.takes_unpacked(*weight.shape, DTYPES[weight.dtype])


def linear_unpacked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: Norm | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    using: Any = None,
) -> Tensor:
    """`linear` with a weight as it lies in memory.

    Args:
        x: [..., K], contiguous, not empty, in the dtype of the weight.
        weight: [D, K] that `takes_unpacked`; bias: [D] or None.
        act: 'none' or one of ACTIVATIONS.
        residual: [..., D], contiguous.

    Raises:
        ValueError: a tensor does not fit.
    """
    if not takes_unpacked(weight, using):
        raise ValueError(f"linear_unpacked: weight must be one that takes_unpacked, got {describe(weight)}")
    D, K = weight.shape
    _must_be_rows("linear_unpacked", x, K, weight.dtype, norm)
    if bias is not None and (bias.shape != (D,) or not bias.is_cpu):
        raise ValueError(f"linear_unpacked: bias must be [{D}], got {describe(bias)}")
    out, wide = x.new_empty(*x.shape[:-1], D), None if bias is None else bias.float().contiguous()
    must_fit("linear_unpacked", "residual", residual, out.shape, out.dtype)
    view = PackedView(weight.data_ptr(), 0 if wide is None else wide.data_ptr(), K=K, D=D)
    (using or kernels()).linear_unpacked(
        x.data_ptr(), None if norm is None else norm.view, view, 0 if residual is None else residual.data_ptr(),
        out.data_ptr(), x.numel() // K, DTYPES[x.dtype], act_number(act), torch.get_num_threads(),
    )  # fmt: skip
    return out
