"""Names of Meta's own code, and of what follows it, where these are not timm's: DINOv2 as torch.hub has it, whole
checkpoints of DINO and iBOT, masked autoencoders with their decoder, DeiT III.

What has timm's names alone (backbones of DINO, iBOT and MAE, fine-tuned MAE, DeiT with and without distillation) is
read as timm's. Sources:
  github.com/facebookresearch/dinov2: dinov2/models/vision_transformer.py, layers/swiglu_ffn.py, hub/backbones.py and
    hub/classifiers.py
  github.com/facebookresearch/dino: vision_transformer.py, main_dino.py, utils.py (MultiCropWrapper), eval_linear.py
  github.com/bytedance/ibot: models/vision_transformer.py, models/head.py, main_ibot.py
  github.com/facebookresearch/mae: models_mae.py, models_vit.py, util/pos_embed.py, util/datasets.py
  github.com/facebookresearch/deit: models_v2.py, main.py, README_revenge.md
"""

from __future__ import annotations

import re
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
    class_token_with_position,
    grid_of,
    grid_side,
    heads_of,
    one,
    same,
    with_zero_position,
)

# DINOv2's models with registers resample with a low-pass filter, those without and DINO's by another scale
ANTIALIASED, BY_SCALE, BICUBIC = "timm", "dinov2", "hf"


def _dinov2_why(view: View) -> str | None:
    # positions of the class token beside registers, gate and value in one: what timm's have otherwise
    signs = ("register_tokens", "blocks.0.mlp.w12.weight", "mask_token")
    found = [sign for sign in signs if sign in view]
    if "blocks.0.ls1.gamma" in view and found:
        return f"blocks.0.ls1.gamma and {found[0]} are there"
    return None


def _sign(view: View, pattern: str) -> str | None:
    """Why, where a name of this pattern stands beside a ViT."""
    sign = next((name for name in view if re.match(pattern, name)), None)
    return f"{sign.lstrip('/')} is there" if sign and "blocks.0.attn.qkv.weight" in view else None


def _dino_why(view: View, facts: Facts) -> str | None:
    why = _sign(view, f"{HEAD}|masked_embed$")
    # LayerScale under DeiT III's names, where the class token has a position, which DeiT III's has not
    if why is None and "pos_embed" in view and grid_side(view.shape("pos_embed")[1] - 1) is not None:
        why = _sign(view, GAMMA)
    return why


def _common(view: View, facts: Facts, given: Mapping[str, Any], scale: str) -> Known:
    """What all have in common; scale: the name of the first block's LayerScale."""
    D, channels, *patch = view.shape("patch_embed.proj.weight")
    depth = view.blocks(r"blocks\.(\d+)\.")
    mean, packed = "fc_norm.weight" in view, "blocks.0.mlp.w12.weight" in view
    assumed = {"preprocessing": "as its authors evaluate classifiers; weights do not tell"}
    fields: dict[str, Any] = {
        "dim": D, "channels": channels, "patch_size": tuple(patch), "depth": depth, "norm_eps": 1e-6,
        "mlp_dim": view.shape(f"blocks.0.mlp.{'w12' if packed else 'fc1'}.weight")[0],
        "mlp": "swiglu_packed" if packed else "mlp", "activation": "silu" if packed else "gelu",
        "layer_scale": 1.0 if scale in view else None, "qkv_bias": "blocks.0.attn.qkv.bias" in view,
        "final_norm": mean or "norm.weight" in view, "pool": "mean" if mean else "token", "norm_after_pool": mean,
        "num_classes": view.shape("head.weight")[0] if "head.weight" in view else 0,
    }  # fmt: skip
    if "heads" not in facts.fields:
        fields["heads"], assumed["heads"] = heads_of(D, depth, given)
    # as all but DeiT III evaluate
    images = IMAGENET | {"interpolation": "bicubic", "crop_pct": 0.875}
    return Known(fields | dict(facts.fields), assumed, images)


def _with_grid(known: Known, view: View, given: Mapping[str, Any], prefix: int) -> Known:
    grid = grid_of(view.shape("pos_embed")[1], prefix, given)
    known.fields["image_size"] = tuple(g * p for g, p in zip(grid, known.fields["patch_size"], strict=True))
    return known


def _dinov2(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    if "/linear_head.weight" in view and "num_classes" not in given:
        raise NotImplementedError(
            "linear_head reads the class token beside the mean of the patches, which ViTConfig does not have; "
            "num_classes=0 loads the model without it, num_classes=N with a new one on the class token"
        )
    known = _common(view, facts, given, "blocks.0.ls1.gamma")
    registers = view.shape("register_tokens")[1] if "register_tokens" in view else 0
    known.fields.update(register_tokens=registers, pos_embed="patches" if registers else "all")
    return _with_grid(known, view, given, 1)


def _dino(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    return _with_grid(_common(view, facts, given, "blocks.0.gamma_1"), view, given, 1)


def _mae(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    known = _dino(view, facts, given)
    known.assumed["pool"] = "as where only a classifier is trained; where all is, MAE's own code may read the mean"
    return known


def _deit3(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    known = _common(view, facts, given, "blocks.0.gamma_1")
    rows = view.shape("pos_embed")[1]
    of_patches = given["grid"][0] * given["grid"][1] == rows if "grid" in given else grid_side(rows) is not None
    if of_patches:
        known.fields["pos_embed"] = "patches"
        known.assumed["pos_embed"] = "learned ones alone; timm's vit_*_rope_ape, with rotary ones too, has equal names"
        known.preprocessing["crop_pct"] = 1.0
    return _with_grid(known, view, given, 0 if of_patches else 1)


def _dinov2_rules(config: ViTConfig) -> tuple[Rule, ...]:
    tokens: tuple[Rule, ...] = ()
    if config.register_tokens:
        tokens = (
            Rule("cls_token", ("cls_token", "pos_embed"), class_token_with_position, lambda token, _: (token, None)),
            one("pos_embed", "pos_embed", lambda tensors, *_: tensors[0][:, 1:], with_zero_position),
            one("reg_token", "register_tokens"),
        )
    gated = (*same("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.w12"), *same("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.w3"))
    return (*tokens, *(gated if config.mlp == "swiglu_packed" else ()), one("{name}", "{name}"))


def _rules(config: ViTConfig) -> tuple[Rule, ...]:
    gammas = (one(f"blocks.{{i}}.ls{n}.gamma", f"blocks.{{i}}.gamma_{n}") for n in (1, 2))
    return (*gammas, one("{name}", "{name}"))


MASK = {r"(mask_token|masked_embed)$": "the token that stands for hidden patches in pretraining"}
IGNORED = MASK | {
    r"/linear_head\.": "a classifier on the class token beside the mean of the patches",
    r"/?/?(dino|ibot)_head\.": "the projection heads of DINO and iBOT",
}
# blocks in chunks, as FSDP wrapped them in training, keep their number in the whole
CHUNKED = ((r"((?:^|\.)blocks)\.\d+\.(\d+)\.", r"\1.\2."),)
ANCHOR = r"patch_embed\.proj\.weight"
INNER = ("backbone.", "")
HEAD = r"/head\.(mlp2?|last_layer2?|last_norm2?)\."
GAMMA = r"blocks\.0\.gamma_1$"
DECODER = r"decoder_(embed|blocks|norm|pred|pos_embed)\b"

LAYOUTS = (
    Layout(
        "dinov2-reg", "facebook's DINOv2 with registers", ANCHOR,
        lambda view, facts: _dinov2_why(view) if "register_tokens" in view else None,
        _dinov2, _dinov2_rules, INNER, IGNORED, ANTIALIASED, CHUNKED,
    ),
    Layout(
        "dinov2", "facebook's DINOv2", ANCHOR, lambda view, facts: _dinov2_why(view),
        _dinov2, _dinov2_rules, INNER, IGNORED, BY_SCALE, CHUNKED,
    ),
    Layout(
        "dino", "DINO or iBOT", ANCHOR, _dino_why, _dino, _rules, INNER,
        MASK | {HEAD: "the projection head of DINO or iBOT"}, BY_SCALE,
    ),
    Layout(
        "mae", "a masked autoencoder (MAE)", ANCHOR, lambda view, facts: _sign(view, DECODER),
        _mae, _rules, ("",), MASK | {DECODER: "the decoder of a masked autoencoder"}, BICUBIC,
    ),
    Layout(
        "deit3", "DeiT III", ANCHOR, lambda view, facts: _sign(view, GAMMA),
        _deit3, _rules, ("",), {}, BICUBIC,
    ),
)  # fmt: skip
