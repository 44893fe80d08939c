"""torchvision's `VisionTransformer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitfast.parity.adapters.adapter import Adapter, Step, expect, halves
from vitfast.parity.chain import Stage, in_turn


def vision_transformer(model: Any, images: Tensor) -> tuple[Stage, ...]:
    encoder = expect(model.encoder, "Encoder")

    def patch_tokens(x: Tensor) -> Tensor:
        x = torch.cat([model.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return encoder.dropout(x + encoder.pos_embedding)

    steps: list[Step] = [("patches", model._process_input), ("patch_tokens", patch_tokens)]
    for i, block in enumerate(encoder.layers):
        steps += _block(i, expect(block, "EncoderBlock"))
    *before, head = model.heads

    def pooled(x: Tensor) -> Tensor:
        x = x[:, 0]
        for module in before:
            x = module(x)
        return x

    return in_turn(*steps, ("tokens", encoder.ln), ("pooled", pooled), ("logits", head))


def _block(i: int, block: Any) -> list[Step]:
    def attend(attn: Any, x: Tensor) -> Tensor:
        return attn(x, x, x, need_weights=False)[0]

    return halves(
        i,
        block,
        lambda x: block.dropout(attend(block.self_attention, block.ln_1(x))) + x,
        lambda x: x + block.mlp(block.ln_2(x)),
        attend,
    )


ADAPTERS: dict[str, Adapter] = {"torchvision.models.vision_transformer.VisionTransformer": vision_transformer}
