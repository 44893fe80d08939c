"""Blocks of a prepared model on a GPU: norms and LayerScale are in the weights, and five kernels make a block.

Nothing here is differentiable, and nothing is checked: `vitfast.prepare` builds these and guards their use. A residual
stream travels with the statistics of its rows, which the product that wrote it has left (`pieces`), so that no norm
has to read it for them. Where a kernel does not run, its op computes the same from the same weights.

Where that was measured to be faster, a block takes the other form of vitfast/ops/prepared_block.py: products by cuBLAS
into the residual stream, which then travels without the biases of proj and fc2, `Stream.added`. What these sums are is
known when a model is prepared, see `carry`. Tokens that anybody else may hold are never written to.
Shapes: B images, N tokens, D channels, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast import ops, reference
from vitfast.inference.cpu_block import frozen
from vitfast.model.block import Attention, Block, Mlp
from vitfast.model.layers import (
    NORMS,
    activation_name,
    eps_of,
    gamma_of,
    norm_kind,
    norm_report,
    parameters_of,
    run_norm,
)
from vitfast.model.plain import any_global_hook, plain, stands_for
from vitfast.ops import prepared_block as deferred
from vitfast.ops.linear_folded import added_linear, folded_linear

# of the square of all weights: what that of pending biases may be, see `carry`
PENDING = 0.5


def _rounded(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.detach().to(dtype)


class Stream(NamedTuple):
    """Tokens between two blocks: x + added.

    Attributes:
        x: [B, N, D].
        pieces: as `After.pieces`, where the product that wrote x has left them.
        added: fp32 [D], biases that are pending; None for zeros.
        own: whether nobody else holds x, so that it may be written to; it is contiguous then.
    """

    x: Tensor
    pieces: Tensor | None = None
    added: Tensor | None = None
    own: bool = False

    def whole(self) -> Tensor:
        """The tokens: x itself where nothing is pending."""
        if self.added is None:
            return self.x
        # added in fp32, and rounded once, in one pass
        return torch.add(self.x, self.added, out=torch.empty_like(self.x))

    def normed(self, norm: nn.Module) -> Tensor:
        """`run_norm` of the tokens."""
        if self.added is None or not plain(norm, *NORMS) or any_global_hook():
            return run_norm(norm, self.whole())
        weight, bias = parameters_of(norm)
        return deferred.normed(self.x, self.added, weight, bias, eps_of(norm, weight), norm_kind(norm))


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
        # of `carry`: what is pending before each norm and behind the block, and where it is written back
        for name in ("entering", "between", "leaving"):
            self.register_buffer(name, None)
        self.writes, self.too_large = (False, False), []

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

    def extra_repr(self) -> str:
        return f"never deferred: biases of {' and '.join(self.too_large)}" if self.too_large else ""

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
        return self.step(Stream(x), attn_mask, keep).whole()

    def step(self, stream: Stream, attn_mask: Tensor | None = None, keep: int | None = None) -> Stream:
        """`forward` of tokens as they come from the block before, to the next one."""
        if not stream.x.is_meta and self._defers(stream):
            return self._deferred(stream, attn_mask, keep)
        x = stream.whole()
        pieces = stream.pieces if x is stream.x else None
        x, pieces = self._through_mlp(*self._through_attention(x, pieces, attn_mask, keep))
        if stream.x.is_meta:
            self._offer(stream)
        return Stream(x, pieces, own=x.is_contiguous())

    def carry(self, added: Tensor | None, size: float) -> tuple[Tensor | None, float]:
        """Decide what is pending where, as `carry` has it; returns the same for the next block."""
        of_proj, of_fc2 = (_square(part.weight) for part in (self.proj, self.fc2))
        parts = ("attn.proj", self.proj.bias, of_proj), ("mlp.fc2", self.fc2.bias, of_fc2)
        self.too_large = [name for name, bias, square in parts if _square(bias) > square]
        if self.too_large:
            return None, size + of_proj + of_fc2
        self.entering, first = added, _square(added) > PENDING * size
        self.between = _with_bias(None if first else added, self.proj.bias)
        second = _square(self.between) > PENDING * (size + of_proj)
        self.leaving = _with_bias(None if second else self.between, self.fc2.bias)
        self.writes = first, second
        return self.leaving, size + of_proj + of_fc2

    def _defers(self, stream: Stream) -> bool:
        # not a block alone out of the middle, whose tokens are whole
        if self.too_large or stream.added is not self.entering:
            return False
        # what somebody watches or has replaced has to run
        return deferred.defers(stream.x, self.fc1.weight, self.act, self.gated) and self._untouched()

    def _untouched(self) -> bool:
        parts = self.qkv, self.proj, self.fc1, self.fc2
        return not any_global_hook() and all(plain(part, FoldedLinear, AddedLinear) for part in parts)

    def _deferred(self, stream: Stream, mask: Tensor | None, keep: int | None) -> Stream:
        h, fc1 = stream.x, self.fc1
        first, second = self.writes
        if not stream.own:
            # the first norm writes the copy
            h, first = torch.empty_like(h, memory_format=torch.contiguous_format), True
        y = deferred.normed(stream.x, self.entering, None, None, self.qkv.eps, self.qkv.kind, h if first else None)

        def qkv(keep: int | None = None, begin: int = 0, end: int | None = None) -> Tensor:
            rows = y if keep is None else y[:, :keep]
            return F.linear(rows, self.qkv.weight[begin:end], self.qkv.bias[begin:end])

        a = self._attend(qkv, mask, keep)
        h = h if keep is None else h[:, :keep].contiguous()
        deferred.add_product(h, a, self.proj.weight)
        y = deferred.normed(h, self.between, None, None, fc1.eps, fc1.kind, h if second else None)
        u = deferred.hidden(y, fc1.weight, fc1.bias, self.act, self.gated)
        deferred.add_product(h, u, self.fc2.weight)
        return Stream(h, None, self.leaving, True)

    def _offer(self, stream: Stream) -> None:
        """Name the choice of a form to whoever records the calls of a model without memory: after those it is made of.

        Not for the first block, which is given no statistics of its rows.
        """
        if not stream.own or self.qkv.kind != self.fc1.kind:
            return
        qkv, fc1 = ((part.weight, part.sums, part.wide_bias, part.bias) for part in (self.qkv, self.fc1))
        proj, fc2 = ((part.weight, part.bias) for part in (self.proj, self.fc2))
        between = None if self.proj.bias is None else self.proj.bias.float()
        deferred.prepared_block(
            stream.x, stream.pieces, *qkv, *proj, *fc1, *fc2, between, self.num_heads, self.scale, self.qkv.eps,
            self.fc1.eps, self.qkv.kind, self.act, self.gated,
        )  # fmt: skip

    def attention_branch(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] after attention, residual included."""
        return self._through_attention(x, None, None, None)[0]

    def mlp_branch(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] after the MLP, residual included."""
        return self._through_mlp(x, None)[0]

    def _through_attention(self, x, pieces, mask, keep):
        def qkv(keep: int | None = None, begin: int = 0, end: int | None = None) -> Tensor:
            rows, known = (x, pieces) if keep is None else (x[:, :keep], None)
            return self.qkv(rows, known, begin=begin, end=end)

        return self.proj(self._attend(qkv, mask, keep), x if keep is None else x[:, :keep])

    def _through_mlp(self, x, pieces):
        if self.gated:
            gate, value = self.fc1(x, pieces).chunk(2, dim=-1)
            return self.fc2(reference.activation(gate, self.act) * value, x)
        return self.fc2(self.fc1(x, pieces, self.act), x)

    def _attend(self, qkv: Callable[..., Tensor], mask: Tensor | None, keep: int | None) -> Tensor:
        """qkv: the normed tokens, or the first `keep` of each image, through rows `begin` to `end` of the weight."""
        split = lambda t: t.unflatten(-1, (-1, self.num_heads, self.head_dim))  # noqa: E731
        normed = not (type(self.q_norm) is type(self.k_norm) is nn.Identity)
        if keep is None and not normed:
            return ops.attention_qkv(split(qkv()), scale=self.scale, mask=mask)
        if keep is None:
            q, k, v = split(qkv()).unbind(2)
        else:
            q = split(qkv(keep, end=self.inner)).squeeze(2)
            k, v = split(qkv(begin=self.inner)).unbind(2)
        q, k = run_norm(self.q_norm, q), run_norm(self.k_norm, k)
        return ops.attention(q, k, v, scale=self.scale, mask=mask)


def carry(blocks: Iterable[nn.Module]) -> None:
    """Decide for each block which biases are pending before and behind it, where it takes the form that defers them.

    A residual stream without its biases may be larger than the tokens are, and is rounded as it is. What a product
    adds to a row has, for inputs of unit size, the size of its weight: |W| (Frobenius). Inputs are smaller than that,
    so biases stay pending while their sum's square is at most half that of all weights so far; a norm adds the others,
    and writes the sum back. A bias larger than its own weight could cancel with its product, which only the product's
    own epilogue adds without rounding: such a block keeps its five kernels.
    """
    added, size = None, 0.0
    for block in blocks:
        # any other block adds its biases itself
        added, size = block.carry(added, size) if isinstance(block, FoldedBlock) else (None, size)


def _square(t: Tensor | None) -> float:
    """The sum of squares; 0 where there are no numbers."""
    return 0.0 if t is None or t.is_meta else t.float().square().sum().item()


def _with_bias(added: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if added is None or bias is None:
        return added if bias is None else bias.float()
    return added + bias


stands_for(FoldedBlock, FoldedLinear, AddedLinear)
