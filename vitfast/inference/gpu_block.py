"""Blocks of a prepared model on a GPU: norms and LayerScale are in the weights, and five kernels make a block.

Nothing here is differentiable, and nothing is checked: `vitfast.prepare` builds these and guards their use. A residual
stream travels with the statistics of its rows, which the product that wrote it has left (`pieces`), so that no norm
has to read it for them. Where a kernel does not run, its op computes the same from the same weights.
Shapes: B images, N tokens, D channels, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitfast import ops, reference
from vitfast.inference.cpu_block import frozen
from vitfast.model.block import Attention, Block, Mlp
from vitfast.model.layers import activation_name, eps_of, gamma_of, norm_kind, norm_report, run_norm
from vitfast.model.plain import stands_for
from vitfast.ops.linear_folded import added_linear, folded_linear


def _rounded(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.detach().to(dtype)


class FoldedLinear(nn.Module):
    """act(norm(x) @ weight.T + bias) with the norm's parameters in weight and bias."""

    def __init__(self, norm: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        wide, scale, shift = weight.detach().float(), norm.weight, getattr(norm, "bias", None)
        self.kind, self.eps = norm_kind(norm), eps_of(norm, scale)
        added = torch.zeros_like(wide[:, 0]) if bias is None else bias.detach().float().clone()
        if shift is not None:
            added += wide @ shift.detach().float()
        if scale is not None:
            wide = wide * scale.detach().float()
        self.register_buffer("weight", wide.to(dtype).contiguous())
        # of the rounded ones: what rounding adds to a product with a row's mean is then subtracted again
        self.register_buffer("sums", self.weight.float().sum(1))
        self.register_buffer("wide_bias", added)
        self.register_buffer("bias", added.to(dtype))

    def forward(
        self, x: Tensor, pieces: Tensor | None, act: str = "none", begin: int = 0, end: int | None = None
    ) -> Tensor:
        """x [..., K] -> [..., D], or its outputs from `begin` to `end`; pieces as `After.pieces`, of x's rows."""
        if end is None and not begin:
            weights = self.weight, self.sums, self.wide_bias, self.bias
        else:
            weights = (t[begin:end] for t in (self.weight, self.sums, self.wide_bias, self.bias))
        return folded_linear(x, *weights, pieces, self.eps, self.kind, act)


class AddedLinear(nn.Module):
    """residual + x @ weight.T + bias, with LayerScale in both."""

    def __init__(self, linear: nn.Linear, gamma: Tensor | None, dtype: torch.dtype):
        super().__init__()
        weight, bias = linear.weight.detach(), linear.bias
        if gamma is not None:
            weight = weight * gamma.detach()[:, None]
            bias = None if bias is None else bias * gamma.detach()
        self.register_buffer("weight", weight.to(dtype).contiguous())
        self.register_buffer("bias", _rounded(bias, dtype))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., D] and the statistics of its rows, where the kernel made them."""
        return added_linear(x, self.weight, self.bias, residual)


class FoldedBlock(nn.Module):
    """What `Block` computes in eval mode. All its parts are as `Block` built them, and `takes` said yes."""

    def __init__(self, block: Block, dtype: torch.dtype):
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.num_heads, self.head_dim, self.scale, self.inner = (
            attn.num_heads, attn.head_dim, attn.scale, attn.attn_dim,
        )  # fmt: skip
        self.act, self.gated = activation_name(mlp.act), mlp.kind == "swiglu_packed"
        self.qkv = FoldedLinear(block.norm1, attn.qkv.weight, attn.qkv.bias, dtype)
        self.q_norm, self.k_norm = frozen(attn.q_norm, dtype), frozen(attn.k_norm, dtype)
        self.proj = AddedLinear(attn.proj, gamma_of(block.ls1), dtype)
        self.fc1 = FoldedLinear(block.norm2, mlp.fc1.weight, mlp.fc1.bias, dtype)
        self.fc2 = AddedLinear(mlp.fc2, gamma_of(block.ls2), dtype)

    @staticmethod
    def takes(block: Block) -> bool:
        """Whether this class computes such a block: no norms inside of its branches, two projections an MLP."""
        attn, mlp = block.attn, block.mlp
        return (
            type(attn) is Attention
            and type(mlp) is Mlp
            and mlp.kind in ("mlp", "swiglu_packed")
            and type(attn.norm) is type(mlp.norm) is nn.Identity
            and type(attn.proj) is nn.Linear
        )

    def fusion_report(self) -> list[tuple[str, str, list[str]]]:
        """`Block.fusion_report`: nothing here can be changed any more."""
        gate = [("mlp gate", "", ["the activation and the product with it are stock operators"])] if self.gated else []
        return [
            ("norm1 + attn.qkv", "folded_linear", []),
            *norm_report([("attn.q_norm", self.q_norm), ("attn.k_norm", self.k_norm)]),
            ("attn softmax", "attention", []),
            ("attn.proj + residual", "added_linear", []),
            ("norm2 + mlp.fc1", "folded_linear", []),
            *gate,
            ("mlp.fc2 + residual", "added_linear", []),
        ]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, keep: int | None = None) -> Tensor:
        """Tokens [B, N, D] -> [B, N, D], or the first `keep` of them."""
        return self.step(x, None, attn_mask, keep)[0]

    def step(
        self, x: Tensor, pieces: Tensor | None, attn_mask: Tensor | None = None, keep: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` of tokens that come with the statistics of their rows, and so do the results."""
        return self._through_mlp(*self._through_attention(x, pieces, attn_mask, keep))

    def attention_branch(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] after attention, residual included."""
        return self._through_attention(x, None, None, None)[0]

    def mlp_branch(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] after the MLP, residual included."""
        return self._through_mlp(x, None)[0]

    def _through_attention(self, x, pieces, mask, keep):
        return self.proj(self._attend(x, pieces, mask, keep), x if keep is None else x[:, :keep])

    def _through_mlp(self, x, pieces):
        if self.gated:
            gate, value = self.fc1(x, pieces).chunk(2, dim=-1)
            return self.fc2(reference.activation(gate, self.act) * value, x)
        return self.fc2(self.fc1(x, pieces, self.act), x)

    def _attend(self, x, pieces, mask, keep):
        split = lambda t: t.unflatten(-1, (-1, self.num_heads, self.head_dim))  # noqa: E731
        normed = not (type(self.q_norm) is type(self.k_norm) is nn.Identity)
        if keep is None and not normed:
            return ops.attention_qkv(split(self.qkv(x, pieces)), scale=self.scale, mask=mask)
        if keep is None:
            q, k, v = split(self.qkv(x, pieces)).unbind(2)
        else:
            q = split(self.qkv(x[:, :keep], None, end=self.inner)).squeeze(2)
            k, v = split(self.qkv(x, pieces, begin=self.inner)).unbind(2)
        q, k = run_norm(self.q_norm, q), run_norm(self.k_norm, k)
        return ops.attention(q, k, v, scale=self.scale, mask=mask)


stands_for(FoldedBlock)
