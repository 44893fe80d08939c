"""vit-pytorch's `ViT` and `SimpleViT`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitfast.parity.adapters.adapter import Adapter, Step, expect, halves
from vitfast.parity.chain import Stage, in_turn


def vit(model: Any, images: Tensor) -> tuple[Stage, ...]:
    def patch_tokens(x: Tensor) -> Tensor:
        # [1, 1, D] and [1, N, D] in releases before 1.16.1
        token, positions = model.cls_token, model.pos_embedding
        x = torch.cat([token.expand(x.shape[0], *token.shape[-2:]), x], dim=1)
        return model.dropout(x + positions[..., : x.shape[1], :])

    steps: list[Step] = [("patches", model.to_patch_embedding), ("patch_tokens", patch_tokens)]
    steps += _transformer(model)
    if model.mlp_head is None:
        return in_turn(*steps)

    def pooled(x: Tensor) -> Tensor:
        return model.to_latent(x.mean(dim=1) if model.pool == "mean" else x[:, 0])

    return in_turn(*steps, ("pooled", pooled), ("logits", model.mlp_head))


def simple_vit(model: Any, images: Tensor) -> tuple[Stage, ...]:
    return in_turn(
        ("patches", model.to_patch_embedding),
        ("patch_tokens", lambda x: x + model.pos_embedding.to(x.device, x.dtype)),
        *_transformer(model),
        ("pooled", lambda x: model.to_latent(x.mean(dim=1))),
        ("logits", model.linear_head),
    )


def _transformer(model: Any) -> list[Step]:
    transformer = expect(model.transformer, "Transformer")
    steps: list[Step] = []
    for i, layer in enumerate(transformer.layers):
        steps += _layer(i, layer, transformer)
    return [*steps, ("tokens", transformer.norm)]


def _layer(i: int, layer: Any, transformer: Any) -> list[Step]:
    attn, mlp = layer
    return halves(
        i, layer, lambda x: attn(x) + x, lambda x: mlp(x) + x, lambda attn, normed: attn(normed), holder=transformer
    )


ADAPTERS: dict[str, Adapter] = {"vit_pytorch.vit.ViT": vit, "vit_pytorch.simple_vit.SimpleViT": simple_vit}
