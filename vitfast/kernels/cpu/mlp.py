"""MLPs and whole blocks in one pass by the C++ kernels of csrc/cpu/block.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitfast.kernels.cpu.arguments import DTYPES, act_number, no_copies
from vitfast.kernels.cpu.layer_norm import Norm, NormView
from vitfast.kernels.cpu.linear import PackedView, PackedWeight


def mlp(x: Tensor, norm: Norm, fc1: PackedWeight, fc2: PackedWeight, act: str, using: Any = None) -> Tensor:
    """x + fc2(act(fc1(norm(x)))), where only the result goes to memory; x [..., K], contiguous, not empty."""
    fc1.check("mlp", x, norm)
    fc1.follows("mlp", fc2)
    if fc2.D != fc1.K:
        raise ValueError(f"mlp: fc2 must give the [..., {fc1.K}] that fc1 takes, got one for [..., {fc2.D}]")
    out = torch.empty_like(x)
    fc1.kernels_for("mlp", using).mlp(
        x.data_ptr(), norm.view, fc1.view, fc2.view, out.data_ptr(), x.numel() // fc1.K, DTYPES[x.dtype],
        act_number(act), torch.get_num_threads(),
    )  # fmt: skip
    return out


class BlockView(NamedTuple):
    """What csrc/bindings.cpp reads of a `Block`."""

    norm1: NormView
    qkv: PackedView
    proj: PackedView
    norm2: NormView
    fc1: PackedView
    fc2: PackedView
    act: int


class Block:
    """What `block` runs: LayerNorm, attention, projection, LayerNorm, MLP, all of them plain.

    Raises:
        ValueError: the parts do not fit one another.
    """

    def __init__(
        self, norm1: Norm, qkv: PackedWeight, proj: PackedWeight, norm2: Norm, fc1: PackedWeight, fc2: PackedWeight,
        act: str, num_heads: int, head_dim: int, scale: float,
    ):  # fmt: skip
        C, inner = qkv.K, num_heads * head_dim
        if (qkv.D, proj.K, qkv.dtype) != (3 * inner, inner, proj.dtype) or inner < 1:
            raise ValueError(
                f"Block: qkv must give 3 * {num_heads} * {head_dim} numbers and proj take a third of them, got {qkv.D} "
                f"in {str(qkv.dtype)[6:]} and {proj.K} in {str(proj.dtype)[6:]}"
            )
        proj.kernels_for("Block", qkv.kernels)
        proj.follows("Block", fc1, fc2)
        if not proj.D == fc2.D == C:
            raise ValueError(f"Block: proj and fc2 must give the {C} numbers that qkv takes, got {proj.D} and {fc2.D}")
        for norm in (norm1, norm2):
            norm.check("Block", C, qkv.dtype)
        self.parts = norm1, qkv, proj, norm2, fc1, fc2  # keeps what the addresses point to
        self.view = BlockView(*(part.view for part in self.parts), act_number(act))
        self.num_heads, self.head_dim, self.scale = num_heads, head_dim, scale

    def __reduce_ex__(self, protocol: Any) -> Any:
        no_copies(self)


def block(x: Tensor, block: Block, using: Any = None) -> Tensor:
    """y = x + proj(attention(qkv(norm1(x)))), then y + fc2(act(fc1(norm2(y)))); x [B, N, C], contiguous, not empty."""
    block.parts[1].check("block", x)
    if x.dim() != 3:
        raise ValueError(f"block: x must be [B, N, C], got {list(x.shape)}")
    out = torch.empty_like(x)
    block.parts[1].kernels_for("block", using).block(
        x.data_ptr(), block.view, out.data_ptr(), *x.shape[:2], block.num_heads, block.head_dim, block.scale,
        DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out
