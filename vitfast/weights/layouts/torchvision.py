"""torchvision's names: of its `vit_*` models, and of those that it had before its MLPs were lists of modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitfast.config import ViTConfig
from vitfast.weights.layouts.layout import IMAGENET, Facts, Known, Layout, Rule, View, grid_of, heads_of, one, same

LAYER = "encoder.layers.encoder_layer_{i}"
FIRST = "encoder.layers.encoder_layer_0"


def _recognises(view: View, facts: Facts) -> str | None:
    return f"conv_proj and {FIRST} are there" if f"{FIRST}.self_attention.in_proj_weight" in view else None


def _describe(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    D, channels, *patch = view.shape("conv_proj.weight")
    depth = view.blocks(r"encoder\.layers\.encoder_layer_(\d+)\.")
    if "heads.pre_logits.weight" in view and "num_classes" not in given:
        raise NotImplementedError(
            "heads.pre_logits (representation_size) is a layer before the classifier, which ViTConfig does not have; "
            "num_classes=0 loads the model without both, num_classes=N with a new classifier"
        )
    whole = "heads.head.weight" in view and "heads.pre_logits.weight" not in view
    classes = view.shape("heads.head.weight")[0] if whole else 0
    grid = grid_of(view.shape("encoder.pos_embedding")[1], 1, given)
    fields = {
        "dim": D, "channels": channels, "patch_size": tuple(patch), "depth": depth, "norm_eps": 1e-6,
        "mlp_dim": view.shape(f"{FIRST}.mlp.0.weight")[0], "num_classes": classes,
        "image_size": tuple(g * p for g, p in zip(grid, patch, strict=True)),
    }  # fmt: skip
    assumed = {"preprocessing": "torchvision's for its first weights; SWAG's have others"}
    if "heads" not in facts.fields:
        fields["heads"], assumed["heads"] = heads_of(D, depth, given)
    images = IMAGENET | {"interpolation": "bilinear", "crop_pct": 0.875}
    return Known(fields | dict(facts.fields), assumed, images)


def _rules(config: ViTConfig) -> tuple[Rule, ...]:
    return (
        one("cls_token", "class_token"),
        one("pos_embed", "encoder.pos_embedding"),
        *same("patch_embed.proj", "conv_proj"),
        *same("blocks.{i}.norm1", f"{LAYER}.ln_1"),
        one("blocks.{i}.attn.qkv.weight", f"{LAYER}.self_attention.in_proj_weight"),
        one("blocks.{i}.attn.qkv.bias", f"{LAYER}.self_attention.in_proj_bias"),
        *same("blocks.{i}.attn.proj", f"{LAYER}.self_attention.out_proj"),
        *same("blocks.{i}.norm2", f"{LAYER}.ln_2"),
        *same("blocks.{i}.mlp.fc1", f"{LAYER}.mlp.0"),
        *same("blocks.{i}.mlp.fc2", f"{LAYER}.mlp.3"),
        *same("norm", "encoder.ln"),
        *same("head", "heads.head"),
    )


LAYOUTS = (
    Layout(
        "torchvision", "torchvision", r"conv_proj\.weight", _recognises, _describe, _rules,
        ignored={r"heads\.": "a classifier of two layers"}, resampling="torchvision",
        rename=((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")),
    ),
)  # fmt: skip
