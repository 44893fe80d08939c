"""timm's `VisionTransformer` and its distilled one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitfast.parity.adapters.adapter import Adapter, Step, expect, halves
from vitfast.parity.chain import Stage, in_turn


def vision_transformer(model: Any, images: Tensor) -> tuple[Stage, ...]:
    grid = model.patch_embed.dynamic_feat_size(tuple(images.shape[2:]))

    def patches(x: Tensor) -> Tensor:
        x = model.patch_embed(x)
        return x.flatten(1, 2) if x.dim() == 4 else x

    def patch_tokens(x: Tensor) -> Tensor:
        x = model._pos_embed(x.unflatten(1, grid) if model.dynamic_img_size else x)
        return model.norm_pre(model.patch_drop(x))

    steps: list[Step] = [("patches", patches), ("patch_tokens", patch_tokens)]
    for i, block in enumerate(model.blocks):
        steps += _block(i, block)
    steps += [("tokens", model.norm), ("pooled", lambda x: model.forward_head(x, pre_logits=True))]
    if not hasattr(model, "head_dist"):
        return in_turn(*steps, ("logits", model.head))
    return (*in_turn(*steps), Stage("logits", "tokens", model.forward_head))


def _block(i: int, block: Any) -> list[Step]:
    if type(block).__name__ in ("ResPostBlock", "ParallelScalingBlock", "DiffParallelScalingBlock"):
        # another order of norms, or both branches at once: a block of these is one stage
        return [(f"blocks.{i}.mlp", block)]
    expect(block, "Block")
    return halves(
        i,
        block,
        lambda x: x + block.drop_path1(block.ls1(block.attn(block.norm1(x)))),
        lambda x: x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))),
        lambda attn, normed: attn(normed),
    )


ADAPTERS: dict[str, Adapter] = {
    "timm.models.vision_transformer.VisionTransformer": vision_transformer,
    "timm.models.deit.VisionTransformerDistilled": vision_transformer,
}
