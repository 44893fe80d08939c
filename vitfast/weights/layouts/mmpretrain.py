"""mmpretrain's names: of its ViT, DeiT with and without distillation, DeiT III, DINOv2, MAE and CLIP.

Source: github.com/open-mmlab/mmpretrain, mmpretrain/models/backbones/vision_transformer.py, deit.py and deit3.py,
utils/attention.py, utils/swiglu_ffn.py, heads/vision_transformer_head.py, deit_head.py and linear_head.py,
selfsup/mae.py, multimodal/clip/clip.py; github.com/open-mmlab/mmcv, mmcv/cnn/bricks/transformer.py (FFN).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitfast.config import ViTConfig
from vitfast.weights.layouts.clip import OF_CLIP
from vitfast.weights.layouts.layout import (
    IMAGENET,
    Facts,
    Known,
    Layout,
    Rule,
    View,
    grid_of,
    grid_side,
    heads_of,
    needs,
    one,
    same,
    zeros,
)

LAYER, FIRST = "layers.{i}", "layers.0"
HEAD, PROJECTION = "/head.layers.head.weight", "/visual_proj.proj"
# its 'small' has no namesake elsewhere: (width, depth, the MLP's width) -> heads
OWN_HEADS = {(768, 8, 2304): 8}


def _recognises(view: View, facts: Facts) -> str | None:
    signs = "patch_embed.projection.weight", f"{FIRST}.ln1.weight", f"{FIRST}.attn.qkv.weight"
    return f"{', '.join(signs)} are there" if all(sign in view for sign in signs) else None


def _recognises_clip(view: View, facts: Facts) -> str | None:
    return f"visual_proj.proj is there, and {why}" if PROJECTION in view and (why := _recognises(view, facts)) else None


def _describe(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    assumed = {
        "norm_eps": "mmpretrain's default; weights do not tell",
        "preprocessing": "as most of mmpretrain's configs have it; weights do not tell",
    }
    D, channels, *patch = view.shape("patch_embed.projection.weight")
    depth = view.blocks(r"layers\.(\d+)\.")
    packed, pre_norm = f"{FIRST}.ffn.w12.weight" in view, "pre_norm.weight" in view
    mean, class_token = "ln2.weight" in view, "cls_token" in view
    if mean and "ln1.weight" in view:
        raise NotImplementedError("ln1 before pooling and ln2 after it: ViTConfig has one final norm")
    mlp_dim = view.shape(f"{FIRST}.ffn.{'w12' if packed else 'layers.0.0'}.weight")[0]
    fields: dict[str, Any] = {
        "dim": D, "channels": channels, "patch_size": tuple(patch), "depth": depth, "mlp_dim": mlp_dim,
        "mlp": "swiglu_packed" if packed else "mlp", "norm_eps": 1e-6, "pre_norm": pre_norm,
        "qkv_bias": f"{FIRST}.attn.qkv.bias" in view, "class_token": class_token,
        "distillation_token": "dist_token" in view, "num_classes": _classes(view, given),
        # the initial value; which it was nobody can tell by now
        "layer_scale": 1e-5 if f"{FIRST}.attn.gamma1.weight" in view else None,
        "final_norm": mean or "ln1.weight" in view, "norm_after_pool": mean,
        "pool": "mean" if mean or not class_token else "token",
    }  # fmt: skip
    if (D, depth, mlp_dim) in OWN_HEADS and "heads" not in given:
        fields["heads"], assumed["heads"] = OWN_HEADS[D, depth, mlp_dim], "as mmpretrain's 'small' has it"
    else:
        fields["heads"], assumed["heads"] = heads_of(D, depth, given)
    fields["activation"] = _activation(view, packed, pre_norm, given, assumed)
    prefix = int(class_token) + int(fields["distillation_token"])
    rows = view.shape("pos_embed")[1]
    of_patches = given["grid"][0] * given["grid"][1] == rows if "grid" in given else grid_side(rows) is not None
    if prefix and of_patches:
        prefix, fields["pos_embed"] = 0, "patches"
        assumed["pos_embed"] = "and norms as DeiT III has them; mmpretrain's DeiT3 puts ln1 before its MLP too, not ln2"
    grid = grid_of(rows, prefix, given)
    fields["image_size"] = tuple(g * p for g, p in zip(grid, patch, strict=True))
    images = IMAGENET | {"interpolation": "bicubic", "crop_pct": 0.875}
    if PROJECTION in view:
        images = OF_CLIP | {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}
    return Known(fields | dict(facts.fields), assumed, images)


def _classes(view: View, given: Mapping[str, Any]) -> int:
    """Rows of the classifier.

    Raises:
        NotImplementedError: there is another layer before it, and nobody asked for a new one.
    """
    if PROJECTION in view:
        return view.shape(PROJECTION)[1]
    before = [name for name in view if name.startswith(("/head.layers.pre_logits.", "/neck.bn."))]
    if HEAD not in view or not before:
        return view.shape(HEAD)[0] if HEAD in view else 0
    if "num_classes" not in given:
        raise NotImplementedError(
            f"{before[0][1:]} is of a layer before the classifier, which ViTConfig does not have; num_classes=0 loads "
            "the model without both, num_classes=N with a new classifier"
        )
    return 0


def _activation(view: View, packed: bool, pre_norm: bool, given: Mapping[str, Any], assumed: dict[str, str]) -> str:
    if "activation" in given:
        return given["activation"]
    if packed:
        return "silu"
    if not pre_norm:
        return "gelu"
    if PROJECTION in view:
        assumed["activation"] = "as mmpretrain's configs of CLIP with a text tower have it"
        return "quick_gelu"
    raise needs("activation", ("gelu", "quick_gelu"), "weights do not tell, and CLIP's towers have either")


def _rules(config: ViTConfig) -> tuple[Rule, ...]:
    fc1, fc2 = ("w12", "w3") if config.mlp == "swiglu_packed" else ("layers.0.0", "layers.1")
    return (
        *(one(name, name) for name in ("cls_token", "dist_token", "pos_embed")),
        *same("patch_embed.proj", "patch_embed.projection"),
        *same("norm_pre", "pre_norm"),
        *same("blocks.{i}.norm1", f"{LAYER}.ln1"),
        *same("blocks.{i}.attn.qkv", f"{LAYER}.attn.qkv"),
        *same("blocks.{i}.attn.proj", f"{LAYER}.attn.proj"),
        one("blocks.{i}.ls1.gamma", f"{LAYER}.attn.gamma1.weight"),
        *same("blocks.{i}.norm2", f"{LAYER}.ln2"),
        *same("blocks.{i}.mlp.fc1", f"{LAYER}.ffn.{fc1}"),
        *same("blocks.{i}.mlp.fc2", f"{LAYER}.ffn.{fc2}"),
        one("blocks.{i}.ls2.gamma", f"{LAYER}.ffn.gamma2.weight"),
        *same("norm", "ln1"),
        *same("fc_norm", "ln2"),
        *same("head", "/head.layers.head"),
        *same("head_dist", "/head.layers.head_dist"),
    )


def _clip_rules(config: ViTConfig) -> tuple[Rule, ...]:
    return (
        one("head.weight", PROJECTION, lambda tensors, *_: tensors[0].T, lambda weight, _: (weight.T,)),
        Rule("head.bias", (), zeros, None),
        *_rules(config),
    )


ANCHOR = r"patch_embed\.projection\.weight"
IGNORED = {
    r"/neck\.(decoder|mask_token)": "the decoder of a masked autoencoder",
    r"/neck\.": "a neck between backbone and head",
    r"/head\.": "a head of pretraining, or the classifier that was not asked for",
}
TEXT = {
    r"/(transformer|token_embedding|positional_embedding|ln_final|text_projection|logit_scale)\b": "the text tower",
}
LAYOUTS = (
    Layout(
        "mmpretrain-clip", "mmpretrain's CLIP", ANCHOR, _recognises_clip, _describe, _clip_rules, ("visual.", ""), TEXT,
        "hf",
    ),
    Layout(
        "mmpretrain", "mmpretrain", ANCHOR, _recognises, _describe, _rules, ("backbone.", ""), IGNORED, "hf",
        rename=((r"(^|/)head\.fc\.", r"\1head.layers.head."),),
    ),
)  # fmt: skip
