"""Parts of a prepared model on a CPU: weights in the layout of the C++ kernels, or of oneDNN where that is faster.

Nothing here is differentiable, and nothing is checked: `vitfast.prepare` builds these and guards their use.
Shapes: B images, N tokens, D channels, H heads.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast import reference
from vitfast.kernels import cpu as cpu_kernels
from vitfast.model.block import Block
from vitfast.model.layers import LayerScale, activation_name, run_norm
from vitfast.model.patch_embed import PatchEmbed
from vitfast.model.plain import plain, stands_for
from vitfast.ops import _stock
from vitfast.ops._attention_check import check_mask
from vitfast.ops._attention_stock import attention_cpu
from vitfast.ops.patch_embed import place_prefix

# Rows that oneDNN's layout is chosen for. It picks one for few rows and one for many, and the first is half as fast on
# many; from 197 to 16,384 rows the choice was the same.
ONEDNN_ROWS = 1024
# Tokens with which blocks are timed at most: 8 images of 224 pixels in patches of 16.
TIMED_TOKENS = 8 * 197


def own_product(dtype: torch.dtype, K: int) -> bool:
    """Whether the C++ kernels multiply faster than oneDNN here; of tiles `own_blocks` has the last word.

    Alone they are as fast with AVX-512 and gain what surrounds the product: norm, activation, addition, and the memory
    between them. With AVX2 they lose up to 6 % on wide layers; AMX, which oneDNN has, is several times as fast in bf16.
    """
    kernels = cpu_kernels.kernels()
    if kernels is None or not cpu_kernels.multiplies(dtype) or not cpu_kernels.PackedWeight.takes(K, dtype):
        return False
    if cpu_kernels.tiled(dtype):
        return True
    return kernels.name.startswith(("avx512", "amx")) and not cpu_kernels.has_amx(dtype)


def own_blocks(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a whole block on tiles is faster than one on oneDNN's products, with one image and with eight.

    One layout of the weights serves every number of images, so that the kernels have to win with few and with many.
    True where tiles are no matter.
    """
    if not cpu_kernels.tiled(dtype) or not len(model.blocks):
        return True
    block, N = model.blocks[0], model.config.num_patches + model.config.num_prefix_tokens
    attn, mlp, width = block.attn, block.mlp, block.attn.qkv.in_features
    made = functools.cache(lambda own: PackedBlock(block, dtype, splits_qkv=False, own=own))
    drawn = torch.Generator().manual_seed(0)  # the user's numbers stay as they are
    tokens = functools.cache(lambda B: torch.randn(B, N, width, generator=drawn, device="cpu").to(dtype))
    ours, stock = (lambda B, own=own: made(own)(tokens(B)) for own in (True, False))
    sizes = N, width, attn.num_heads, attn.head_dim, mlp.fc2.in_features
    norms = block.norm1, block.norm2, attn.q_norm, attn.k_norm, attn.norm, mlp.norm
    parts = *(type(norm).__name__ for norm in norms), mlp.kind, activation_name(mlp.act)
    few_and_many = 1, min(8, max(1, TIMED_TOKENS // N))
    return all(
        cpu_kernels.faster_of("prepared block", (B, *sizes, *parts), ours, stock, B) is ours for B in few_and_many
    )


def refuse(name: str) -> Callable:
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name}: a prepared model is frozen; use the original, and prepare it again")

    method.__name__ = name
    return method


class Packed(nn.Module):
    """What holds addresses: its memory must stay where it is, and a copy would read the original's."""

    _apply = refuse("moving or converting")
    __reduce_ex__ = refuse("copying or pickling")
    __deepcopy__ = refuse("copying or pickling")


class PackedLinear(Packed):
    """x @ weight.T + bias with what comes before and after it in the same pass.

    Args:
        weight: [D, K]; bias: [D] or None.
        gamma: [D], LayerScale of the result, multiplied into both before they are rounded to `dtype`.
        own: False for oneDNN's layout, whatever `own_product` says.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, gamma: Tensor | None = None, own: bool = True
    ):
        super().__init__()
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        if gamma is not None:
            gamma = gamma.detach()
            weight, bias = weight * gamma[:, None], None if bias is None else bias * gamma
        self.out_features, self.in_features = weight.shape
        weight, bias = weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype)
        # plain attributes: opaque tensors have no storage that a module could move or save
        own = own and own_product(dtype, self.in_features)
        self.own = cpu_kernels.PackedWeight(weight, bias) if own else None
        self.weight = self.bias = None
        if self.own is None:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ONEDNN_ROWS)
            self.bias = None if bias is None else bias.clone()
        self.has_bias = bias is not None

    def packed_bytes(self) -> int:
        """Bytes of the packed weight, padding included."""
        return self.own.cells.nbytes if self.own else torch.ops.mkldnn._nbytes(self.weight)

    def bias_bytes(self) -> int:
        bias = self.own.bias if self.own else self.bias
        return 0 if bias is None else bias.nbytes

    def extra_repr(self) -> str:
        by = "vitfast" if self.own else "oneDNN"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.has_bias}, by={by}"

    def forward(self, x: Tensor, act: str = "none", norm: nn.Module | None = None) -> Tensor:
        """act(norm(x) @ weight.T + bias), x [..., K] -> [..., D]."""
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.out_features)
        if self.own:
            first = norm_of(norm, x.dtype)
            if norm is not None and first is None:
                x = run(norm, x)
            return cpu_kernels.linear(x.contiguous(), self.own, norm=first, act=act)
        if norm is not None:
            x = run(norm, x)
        if act in ("gelu", "gelu_tanh") and x.dtype is torch.float32:
            approximate = "none" if act == "gelu" else "tanh"
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], approximate)
        y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        # oneDNN's own takes twice as long on bf16 as the C++ kernel
        return y if act == "none" else _stock.activation_in_place(y, act)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x @ weight.T + bias, rounded once."""
        if not x.numel():
            return residual.clone()
        if self.own:
            return cpu_kernels.linear(x.contiguous(), self.own, residual=residual.contiguous())
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


class PackedStem(nn.Module):
    """What `ViT.embed` computes up to the first norm: images are read once, whatever their dtype and strides.

    Args:
        patch_embed: a plain one, whose projection is a convolution and whose norm is none.
        own: as in `PackedLinear`.
    """

    def __init__(self, patch_embed: PatchEmbed, dtype: torch.dtype, own: bool = True):
        super().__init__()
        proj = patch_embed.proj
        self.dtype, self.patch_size, self.pad = dtype, patch_embed.patch_size, patch_embed.dynamic_img_pad
        self.proj = PackedLinear(proj.weight.flatten(1), proj.bias, dtype, own=own)

    @staticmethod
    def takes(patch_embed: nn.Module) -> bool:
        return (
            cpu_kernels.kernels() is not None
            and plain(patch_embed, PatchEmbed)
            and patch_embed.input_norm is None
            and patch_embed.cuts_patches()
            and plain(patch_embed.norm, nn.Identity)
        )

    def forward(
        self, images: Tensor, positions: Tensor | None, prefix: Tensor | None, normalisation: tuple | None
    ) -> Tensor:
        """[B, C, H, W] in any dtype of `cpu_kernels.DTYPES` -> tokens [B, P + N, D]."""
        P = 0 if prefix is None else prefix.shape[0]
        mean, std = normalisation or (None, None)
        if self.proj.own is not None and images.numel():
            return self._in_one_pass(images, positions, prefix, mean, std)
        rows = cpu_kernels.patch_rows(
            images, self.patch_size, dtype=self.dtype, mean=mean, std=std, prefix=P, pad=self.pad
        )
        tokens = self.proj(rows)
        return place_prefix(tokens[:, P:], positions, prefix, tokens)

    def _in_one_pass(
        self, images: Tensor, positions: Tensor | None, prefix: Tensor | None, mean: Tensor | None, std: Tensor | None
    ) -> Tensor:
        P = 0 if prefix is None else prefix.shape[0]
        (H, W), (ph, pw) = images.shape[2:], self.patch_size
        if positions is not None and P:
            if len(positions) == P + -(-H // ph) * -(-W // pw):
                prefix = prefix + positions[:P]
            else:
                positions = torch.cat([torch.zeros_like(prefix), positions])
        positions = None if positions is None else positions.contiguous()
        prefix = None if prefix is None else prefix.contiguous()
        return cpu_kernels.embed(images, self.patch_size, self.proj.own, positions, prefix, mean, std)


class PackedBlock(Packed):
    """What `Block` computes in eval mode, with packed weights.

    Args:
        block: all of whose parts are as `Block` built them.
        splits_qkv: keep the projection of the queries apart from that of keys and values, for `keep`.
        own: as in `PackedLinear`.
    """

    def __init__(self, block: Block, dtype: torch.dtype, splits_qkv: bool, own: bool = True):
        super().__init__()
        attn, mlp = block.attn, block.mlp
        gamma = lambda scale: scale.gamma if isinstance(scale, LayerScale) else None  # noqa: E731
        pack = lambda linear, scale=None: PackedLinear(linear.weight, linear.bias, dtype, scale, own)  # noqa: E731
        self.num_heads, self.head_dim, self.scale = attn.num_heads, attn.head_dim, attn.scale
        self.norm1, self.norm2 = frozen(block.norm1, dtype), frozen(block.norm2, dtype)
        if splits_qkv:
            bias, inner = attn.qkv.bias, attn.attn_dim
            self.q = PackedLinear(attn.qkv.weight[:inner], None if bias is None else bias[:inner], dtype, own=own)
            self.kv = PackedLinear(attn.qkv.weight[inner:], None if bias is None else bias[inner:], dtype, own=own)
        else:
            self.qkv = pack(attn.qkv)
        self.q_norm, self.k_norm = frozen(attn.q_norm, dtype), frozen(attn.k_norm, dtype)
        self.attn_norm = frozen(attn.norm, dtype)
        self.normed = not (type(attn.q_norm) is type(attn.k_norm) is nn.Identity)
        self.ls1 = None
        if isinstance(attn.proj, nn.Linear):
            self.proj = pack(attn.proj, gamma(block.ls1))
        else:
            self.proj = None
            if isinstance(block.ls1, LayerScale):
                self.ls1 = frozen(block.ls1, dtype).gamma
        self.mlp_kind, self.act = mlp.kind, activation_name(mlp.act)
        self.first = nn.ModuleList(pack(getattr(mlp, name)) for name in mlp.first_names)
        self.mlp_norm = frozen(mlp.norm, dtype)
        self.fc2 = pack(mlp.fc2, gamma(block.ls2))
        self.whole = self._whole(dtype)

    def _whole(self, dtype: torch.dtype) -> cpu_kernels.Block | None:
        """All of it for one call, None where some part is not plain."""
        # copies: a module's parameters can be moved
        norms = [norm_of(copy.deepcopy(each), dtype) for each in (self.norm1, self.norm2)]
        if "qkv" not in self._modules or self.proj is None or self.mlp_kind != "mlp" or None in norms or self.normed:
            return None
        linears = self.qkv, self.proj, self.first[0], self.fc2
        nothing = type(self.attn_norm) is type(self.mlp_norm) is nn.Identity
        if not nothing or any(linear.own is None for linear in linears):
            return None
        qkv, proj, fc1, fc2 = (linear.own for linear in linears)
        return cpu_kernels.Block(
            norms[0], qkv, proj, norms[1], fc1, fc2, self.act, self.num_heads, self.head_dim, self.scale
        )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, keep: int | None = None) -> Tensor:
        """Tokens [B, N, D] -> [B, N, D], or the first `keep` of them."""
        if self.whole is not None and attn_mask is None and keep is None and x.numel() and x.is_contiguous():
            return cpu_kernels.block(x, self.whole)
        return self.mlp_branch(self.attention_branch(x, attn_mask, keep))

    def attention_branch(self, x: Tensor, attn_mask: Tensor | None = None, keep: int | None = None) -> Tensor:
        """x + attention(norm1(x))"""
        out = self._attend(x, attn_mask, keep)
        if keep is not None:
            x = x[:, :keep].contiguous()
        out = run_norm(self.attn_norm, out)
        if self.proj is not None:
            return self.proj.add_to(x, out)
        return x + (out if self.ls1 is None else out * self.ls1)

    def _attend(self, x: Tensor, mask: Tensor | None, keep: int | None) -> Tensor:
        if "qkv" in self._modules:
            q, k, v = self.split(self.qkv(x, norm=self.norm1), 3)
        else:
            (q,) = self.split(self.q(x if keep is None else x[:, :keep], norm=self.norm1), 1)
            k, v = self.split(self.kv(x, norm=self.norm1), 2)
        if self.normed:
            q, k = run(self.q_norm, q), run(self.k_norm, k)
        if mask is not None:
            check_mask(mask, q, k)
            return reference.attention(q, k, v, self.scale, mask)
        return attention_cpu(q, k, v, self.scale, with_lse=False)[0]

    def split(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[B, N, parts * H * head_dim] -> parts times [B, N, H, head_dim]"""
        return projected.view(*projected.shape[:2], parts, self.num_heads, self.head_dim).unbind(2)

    def mlp_branch(self, x: Tensor) -> Tensor:
        """x + mlp(norm2(x))"""
        if self._in_one_pass(x):
            return cpu_kernels.mlp(x, norm_of(self.norm2, x.dtype), self.first[0].own, self.fc2.own, self.act)
        return self.fc2.add_to(x, run(self.mlp_norm, self._hidden(x)))

    def _in_one_pass(self, x: Tensor) -> bool:
        return (
            self.mlp_kind == "mlp"
            and self.first[0].own is not None
            and self.fc2.own is not None
            and type(self.mlp_norm) is nn.Identity
            and x.is_contiguous()
            and x.numel() > 0
            and norm_of(self.norm2, x.dtype) is not None
        )

    def _hidden(self, x: Tensor) -> Tensor:
        if self.mlp_kind == "mlp":
            return self.first[0](x, self.act, self.norm2)
        if self.mlp_kind == "swiglu":
            h = run(self.norm2, x)
            return self.first[0](h, self.act).mul_(self.first[1](h))
        gate, value = self.first[0](x, norm=self.norm2).chunk(2, dim=-1)
        return _stock.activation(gate, self.act) * value


def norm_of(module: nn.Module | None, dtype: torch.dtype) -> cpu_kernels.Norm | None:
    """The norm as the kernels read it, None where they do not know it."""
    if type(module) is not nn.LayerNorm:
        return None
    if any(t is not None and t.dtype is not dtype for t in (module.weight, module.bias)):
        return None
    return cpu_kernels.Norm(module.weight, module.bias, module.eps)


def run(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(x)` of a norm or nothing, by the shortest way."""
    if type(norm) is nn.LayerNorm:
        if x.numel() and x.is_contiguous() and cpu_kernels.takes(x) and norm_of(norm, x.dtype):
            return cpu_kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return x if type(norm) is nn.Identity else run_norm(norm, x)


def frozen(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in eval mode and `dtype` whose parameters want no gradient."""
    return copy.deepcopy(module).to(dtype).eval().requires_grad_(False)


stands_for(PackedBlock)
