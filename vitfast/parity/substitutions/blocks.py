"""What attention and MLP of a block may do otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vitfast.model.layers import LayerScale, activation_name, build_activation
from vitfast.parity.substitutions.substitution import Substitution, eps, no_bias, on_blocks, removed, rewrite_rows
from vitfast.parity.variant import Variant, set_parameter

GELUS = {"gelu": "erf", "gelu_tanh": "tanh", "quick_gelu": "quick"}


def of_attention(variant: Variant) -> Iterator[Substitution]:
    yield from eps(variant)
    yield from layer_scale(variant)
    yield from order_of_qkv(variant)
    yield from head_split(variant)
    yield from heads(variant)
    yield from attention(variant)
    yield from without_norm("norm1")


def of_mlp(variant: Variant) -> Iterator[Substitution]:
    yield from activation(variant)
    yield from eps(variant)
    yield from layer_scale(variant)
    yield from mlp(variant)
    yield from without_norm("norm2")


def without_norm(name: str) -> Iterator[Substitution]:
    yield Substitution("norm", f"without {name}", on_blocks(lambda block: removed(block, name)), by_block=True)


def layer_scale(variant: Variant) -> Iterator[Substitution]:
    def change(block: Any) -> Any:
        if not isinstance(block.ls1, LayerScale):
            return False
        block.ls1, block.ls2 = nn.Identity(), nn.Identity()
        return None

    yield Substitution("layer scale", "without LayerScale", on_blocks(change), by_block=True)


def order_of_qkv(variant: Variant) -> Iterator[Substitution]:
    for order in itertools.permutations(range(3)):
        if order == (0, 1, 2):
            continue

        def change(block: Any, order: tuple[int, ...] = order) -> None:
            rewrite_rows(block.attn.qkv, lambda w: torch.cat([w.chunk(3)[i] for i in order]))

        names = ", ".join("qkv"[i] for i in order)
        yield Substitution("qkv order", f"rows of the projection in the order {names}", on_blocks(change), True)


def head_split(variant: Variant) -> Iterator[Substitution]:
    """Rows of the projection are [3, heads, head_dim] here; elsewhere they are read, or were written, otherwise."""
    named = "3", "heads", "head_dim"
    for order in itertools.permutations(range(3)):
        if order == (0, 1, 2):
            continue
        back = tuple(order.index(i) for i in range(3))
        layout = ", ".join(named[i] for i in order)

        def read(block: Any, order: tuple[int, ...] = order, back: tuple[int, ...] = back) -> None:
            sizes = 3, block.attn.num_heads, block.attn.head_dim
            there = [sizes[i] for i in order]
            rewrite_rows(block.attn.qkv, lambda w: w.reshape(*there, -1).permute(*back, 3).reshape(w.shape))

        def written(block: Any, order: tuple[int, ...] = order) -> None:
            sizes = 3, block.attn.num_heads, block.attn.head_dim
            rewrite_rows(block.attn.qkv, lambda w: w.reshape(*sizes, -1).permute(*order, 3).reshape(w.shape))

        yield Substitution("head split", f"rows of qkv read as [{layout}]", on_blocks(read), True)
        yield Substitution("head split", f"rows of qkv written as [{layout}]", on_blocks(written), True)


def heads(variant: Variant) -> Iterator[Substitution]:
    config = variant.model.config
    inner = config.heads * int(config.head_dim or 0)
    for count in range(1, inner + 1):
        if inner % count or count == config.heads or (inner // count < 8 and count > 2 * config.heads):
            continue

        def change(block: Any, count: int = count) -> Any:
            attn = block.attn
            if not isinstance(attn.q_norm, nn.Identity):
                return False
            attn.num_heads, attn.head_dim = count, inner // count
            attn.scale = attn.head_dim**-0.5
            return None

        what = f"{count} heads of {inner // count} channels in place of {config.heads}"
        yield Substitution("heads", what, on_blocks(change), True)


def attention(variant: Variant) -> Iterator[Substitution]:
    config = variant.model.config
    for value, told in ((1.0, "no"), (config.dim**-0.5, "1 / sqrt(dim) as the")):
        if value != int(config.head_dim or 0) ** -0.5:
            change = on_blocks(lambda block, v=value: setattr(block.attn, "scale", v))
            yield Substitution("attention scale", f"{told} scale of q k", change, True)
    for part, rows in (("q, k and v", (0, 1, 2)), ("k", (1,)), ("q", (0,)), ("v", (2,))):

        def without(block: Any, rows: tuple[int, ...] = rows) -> Any:
            bias = block.attn.qkv.bias
            if bias is None:
                return False
            parts = [torch.zeros_like(b) if i in rows else b for i, b in enumerate(bias.chunk(3))]
            return set_parameter(block.attn.qkv, "bias", torch.cat(parts))

        yield Substitution("bias", f"without the bias of {part}", on_blocks(without), True)
    yield Substitution("bias", "without the bias of attn.proj", on_blocks(lambda b: no_bias(b.attn.proj)), True)

    def no_qk_norm(block: Any) -> Any:
        if isinstance(block.attn.q_norm, nn.Identity):
            return False
        block.attn.q_norm, block.attn.k_norm = nn.Identity(), nn.Identity()
        return None

    yield Substitution("qk norm", "without the norms of q and k", on_blocks(no_qk_norm), True)


def activation(variant: Variant) -> Iterator[Substitution]:
    blocks = variant.model.blocks
    had = activation_name(blocks[0].mlp.act) if len(blocks) else ""
    for name in (*GELUS, "silu"):
        if name != had:
            change = on_blocks(lambda block, n=name: setattr(block.mlp, "act", build_activation(n)))
            told = f"GELU {GELUS[name]}" if name in GELUS else "SiLU"
            yield Substitution("gelu", f"{told} in place of {GELUS.get(had, had)}", change, True)


def mlp(variant: Variant) -> Iterator[Substitution]:
    def swap(block: Any) -> Any:
        inside = block.mlp
        if inside.kind == "swiglu":
            inside.fc1_g, inside.fc1_x = inside.fc1_x, inside.fc1_g
            return None
        if inside.kind != "swiglu_packed":
            return False
        return rewrite_rows(inside.fc1, lambda w: torch.cat([*reversed(w.chunk(2))]))

    yield Substitution("gate", "the gate after the value in the MLP", on_blocks(swap), True)
    for name in ("fc1", "fc2"):
        change = on_blocks(lambda block, n=name: no_bias(getattr(block.mlp, n, None)))
        yield Substitution("bias", f"without the bias of mlp.{name}", change, True)
