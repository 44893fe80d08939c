"""Names of Meta's own code where these are not timm's: DINOv2 as torch.hub has it.

Source: github.com/facebookresearch/dinov2, dinov2/models/vision_transformer.py, layers/swiglu_ffn.py, hub/backbones.py
and hub/classifiers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitfast.config import ViTConfig
from vitfast.weights.layouts.layout import (
    IMAGENET,
    Facts,
    Known,
    Layout,
    Rule,
    View,
    alone,
    class_token_with_position,
    grid_of,
    heads_of,
    one,
    same,
    with_zero_position,
)

# models of the hub with registers resample with a low-pass filter, and those without by another scale
ANTIALIASED, BY_SCALE = "timm", "dinov2"


def _recognises(view: View, facts: Facts) -> str | None:
    # positions of the class token beside registers, gate and value in one: what timm's have otherwise
    signs = ("register_tokens", "blocks.0.mlp.w12.weight", "mask_token")
    found = [sign for sign in signs if sign in view]
    if "blocks.0.ls1.gamma" in view and found:
        return f"blocks.0.ls1.gamma and {found[0]} are there"
    return None


def _describe(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    D, channels, *patch = view.shape("patch_embed.proj.weight")
    depth = view.blocks(r"blocks\.(\d+)\.")
    if "/linear_head.weight" in view and "num_classes" not in given:
        raise NotImplementedError(
            "linear_head reads the class token beside the mean of the patches, which ViTConfig does not have; "
            "num_classes=0 loads the model without it, num_classes=N with a new one on the class token"
        )
    packed = "blocks.0.mlp.w12.weight" in view
    registers = view.shape("register_tokens")[1] if "register_tokens" in view else 0
    grid = grid_of(view.shape("pos_embed")[1], 1, given)
    heads, why = heads_of(D, depth, given)
    fields = {
        "dim": D, "channels": channels, "patch_size": tuple(patch), "depth": depth, "norm_eps": 1e-6,
        "mlp_dim": view.shape(f"blocks.0.mlp.{'w12' if packed else 'fc1'}.weight")[0], "num_classes": 0,
        "mlp": "swiglu_packed" if packed else "mlp", "activation": "silu" if packed else "gelu", "heads": heads,
        "layer_scale": 1.0, "register_tokens": registers, "pos_embed": "patches" if registers else "all",
        "qkv_bias": "blocks.0.attn.qkv.bias" in view,
        "image_size": tuple(g * p for g, p in zip(grid, patch, strict=True)),
    }  # fmt: skip
    return Known(fields, {"heads": why}, IMAGENET | {"interpolation": "bicubic", "crop_pct": 0.875})


def _rules(config: ViTConfig) -> tuple[Rule, ...]:
    tokens: tuple[Rule, ...] = ()
    if config.register_tokens:
        tokens = (
            Rule("cls_token", ("cls_token", "pos_embed"), class_token_with_position, alone),
            one("pos_embed", "pos_embed", lambda tensors, *_: tensors[0][:, 1:], with_zero_position),
            one("reg_token", "register_tokens"),
        )
    gated = (*same("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.w12"), *same("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.w3"))
    return (*tokens, *(gated if config.mlp == "swiglu_packed" else ()), one("{name}", "{name}"))


IGNORED = {
    "mask_token$": "the token that stands for hidden patches in pretraining",
    r"/linear_head\.": "a classifier on the class token beside the mean of the patches",
    r"/?/?(dino|ibot)_head\.": "the projection heads of DINO and iBOT",
}
# blocks in chunks, as FSDP wrapped them in training, keep their number in the whole
CHUNKED = ((r"((?:^|\.)blocks)\.\d+\.(\d+)\.", r"\1.\2."),)
ANCHOR = r"patch_embed\.proj\.weight"

LAYOUTS = (
    Layout(
        "dinov2-reg", "facebook's DINOv2 with registers", ANCHOR,
        lambda view, facts: _recognises(view, facts) if "register_tokens" in view else None,
        _describe, _rules, ("backbone.", ""), IGNORED, ANTIALIASED, CHUNKED,
    ),
    Layout(
        "dinov2", "facebook's DINOv2", ANCHOR, _recognises, _describe, _rules, ("backbone.", ""), IGNORED, BY_SCALE,
        CHUNKED,
    ),
)  # fmt: skip
