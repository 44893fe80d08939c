"""vitfast's own models."""

from __future__ import annotations

from torch import Tensor

from vitfast.model.layers import run_norm
from vitfast.model.vit import ViT
from vitfast.parity.adapters.adapter import Adapter, Step, UnknownPart
from vitfast.parity.chain import Stage, in_turn


def vit(model: ViT, images: Tensor) -> tuple[Stage, ...]:
    grid = model._grid_of(images) if model._has_grid() else None

    def patches(x: Tensor) -> Tensor:
        x = model.patch_embed(x)
        return x.flatten(1, 2) if x.dim() == 4 else x

    def patch_tokens(x: Tensor) -> Tensor:
        return model._before_blocks(model._pos_embed(x if grid is None else x.unflatten(1, grid)))

    steps: list[Step] = [("patches", patches), ("patch_tokens", patch_tokens)]
    for i, block in enumerate(model.blocks):
        if not isinstance(block, model.BLOCKS):
            raise UnknownPart(f"has {type(block).__name__} at blocks.{i}")
        steps += [(f"blocks.{i}.attn", block.attention_branch), (f"blocks.{i}.mlp", block.mlp_branch)]
    steps += [
        ("tokens", lambda x: run_norm(model.norm, x, model.ops)),
        ("pooled", lambda x: model.forward_head(x, pre_logits=True)),
    ]
    if not model.config.distillation_token:
        return in_turn(*steps, ("logits", model.head))
    # two heads read two tokens, of which 'pooled' is the mean
    return (*in_turn(*steps), Stage("logits", "tokens", model.forward_head))


ADAPTERS: dict[str, Adapter] = {
    "vitfast.model.vit.ViT": vit,
    "vitfast.inference.prepare.PreparedViT": vit,
}
