"""Vision towers of CLIP and SigLIP under the names of OpenAI, open_clip and Hugging Face. Text towers are passed over.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021; Zhai et al., "Sigmoid
Loss for Language Image Pre-Training", 2023. The projection into the space shared with text is our classifier, whose
bias is zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitfast.config import ViTConfig
from vitfast.weights.layouts import timm
from vitfast.weights.layouts.hugging_face import activation_of, preprocessing_of
from vitfast.weights.layouts.layout import (
    HALF,
    IMAGENET,
    Facts,
    Known,
    Layout,
    Part,
    Rule,
    View,
    grid_of,
    heads_of,
    joined,
    needs,
    one,
    same,
    zeros,
)  # fmt: skip

OF_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
# numbers that the state dict of OpenAI's archive has beside the weights
OPENAI_ONLY = ("/input_resolution", "/context_length", "/vocab_size")
# (width, depth) -> heads, of open_clip's configs that timm does not have
OPEN_CLIP_HEADS = {(1792, 56): 16}
CROP_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}
SIGLIP_IMAGES = HALF | {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}
# what transformers takes where a config.json leaves it out, which Google's of SigLIP do
HF_CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 12}
HF_SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_attention_heads": 12}
CLIP_HAS_EITHER = "OpenAI's CLIP has quick_gelu, most of open_clip's gelu, and their weights have the same names"


def _image_size(
    known: Known, positions: int, prefix: int, size: Any, given: Mapping[str, Any], patch: Sequence[int]
) -> None:
    """The image size by the grid of positions, which are of the size that a config tells or of a square one."""
    size = (size, size) if isinstance(size, int) else size
    grid = tuple(n // p for n, p in zip(size, patch, strict=True)) if size else (0, 0)
    told = grid[0] * grid[1] == positions - prefix and "grid" not in given
    if not told:
        grid = grid_of(positions, prefix, given)
    known.fields["image_size"] = made = tuple(g * p for g, p in zip(grid, patch, strict=True))
    if told and made != tuple(size):
        known.assumed["image_size"] = f"the config says {tuple(size)}, of which patches of {tuple(patch)} cut the rest"


def _batched(tensors: Sequence[Tensor], _: ViTConfig, own: Tensor) -> Tensor:
    """With the leading dimensions of 1 that ours have."""
    return tensors[0][(None,) * (own.dim() - tensors[0].dim())]


def _transposed(tensors: Sequence[Tensor], *_: Any) -> Tensor:
    return tensors[0].T


def _without(ours: str, whose: str) -> Rule:
    """A bias that the library does not have."""

    def split(weight: Tensor, _: ViTConfig) -> tuple[Tensor, ...]:
        if weight.count_nonzero():
            raise NotImplementedError(f"{whose} has no place for {ours}, which must be zero and is not")
        return ()

    return Rule(ours, (), zeros, split)


# OpenAI and open_clip


def _openai(view: View, facts: Facts) -> str | None:
    if "conv1.weight" not in view or "transformer.resblocks.0.ln_1.weight" not in view:
        return None
    for name in view:
        if own := re.match(r"transformer\.resblocks\.\d+\.(attn\.(?!in_|out_)\w+|ln_attn|mlp\.ln)\b", name):
            raise NotImplementedError(f"the vision tower has open_clip's custom blocks ({own[1]}): not supported")
    return "conv1, class_embedding and transformer.resblocks are there"


def _openai_known(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    D, channels, *patch = view.shape("conv1.weight")
    depth = view.blocks(r"transformer\.resblocks\.(\d+)\.")
    model = facts.open_clip.get("model_cfg") or {}
    vision = model.get("vision_cfg") or {}
    openai = any(name in view for name in OPENAI_ONLY)
    pre_norm = "ln_pre.weight" in view
    told = given.keys() | facts.fields.keys()
    fields: dict[str, Any] = {
        "dim": D, "channels": channels, "patch_size": tuple(patch), "depth": depth, "pre_norm": pre_norm,
        "mlp_dim": view.shape("transformer.resblocks.0.mlp.c_fc.weight")[0],
        "qkv_bias": "transformer.resblocks.0.attn.in_proj_bias" in view,
        "layer_scale": (vision.get("ls_init_value") or 1e-5) if "transformer.resblocks.0.ls_1.gamma" in view else None,
        "num_classes": view.shape("proj")[1] if "proj" in view else 0,
        "norm_eps": (vision.get("norm_kwargs") or {}).get("eps", 1e-5),
    }  # fmt: skip
    assumed: dict[str, str] = {}
    known = Known(fields, assumed, _open_clip_images(facts, pre_norm))
    if not facts.open_clip:
        assumed["preprocessing"] = "as all towers with such weights; there is no open_clip_config.json"
    if "heads" not in told:
        if vision or openai:
            fields["heads"] = D // vision.get("head_width", 64)
        elif (D, depth) in OPEN_CLIP_HEADS:
            fields["heads"], assumed["heads"] = OPEN_CLIP_HEADS[D, depth], "as open_clip has it"
        else:
            fields["heads"], assumed["heads"] = heads_of(D, depth, given, "_clip_")
    if "activation" not in told:
        fields["activation"], why = _openai_activation(model, vision, openai, pre_norm)
        assumed |= {"activation": why} if why else {}
    if vision or pre_norm:
        mean = vision.get("pool_type", "tok") == "avg"
        fields.update(
            pool="mean" if mean else "token", norm_after_pool=mean and bool(vision.get("final_ln_after_pool"))
        )
    else:
        fields.update(pool="mean", norm_after_pool=True)
        assumed["pool"] = assumed["norm_after_pool"] = "as CLIPA, whose are the only towers without ln_pre"
    _image_size(known, view.shape("positional_embedding")[0], 1, vision.get("image_size"), given, patch)
    fields.update(facts.fields)
    return known


def _openai_activation(
    model: Mapping[str, Any], vision: Mapping[str, Any], openai: bool, pre_norm: bool
) -> tuple[str, str]:
    if model:
        tanh = (vision.get("act_kwargs") or {}).get("approximate") == "tanh"
        return ("quick_gelu" if model.get("quick_gelu") else "gelu_tanh" if tanh else "gelu"), ""
    if openai:
        return "quick_gelu", ""
    if not pre_norm:
        return "gelu", "as CLIPA, whose are the only towers without ln_pre"
    raise needs("activation", ["quick_gelu", "gelu"], f"{CLIP_HAS_EITHER}; there is no open_clip_config.json")


def _open_clip_images(facts: Facts, openai_like: bool = True) -> dict[str, Any]:
    """timm's entries of `preprocess_cfg`; where there is none as OpenAI's, or CLIPA's."""
    default = OF_CLIP | {"interpolation": "bicubic", "resize_mode": "shortest"}
    if not openai_like:
        default = IMAGENET | {"interpolation": "bilinear", "resize_mode": "squash"}
    cfg = default | {k: v for k, v in (facts.open_clip.get("preprocess_cfg") or {}).items() if v is not None}
    images = {"mean": tuple(cfg["mean"]), "std": tuple(cfg["std"]), "interpolation": cfg["interpolation"]}
    return images | {"crop_pct": 1.0, "crop_mode": CROP_MODES.get(cfg["resize_mode"], "center")}


def _openai_rules(config: ViTConfig) -> tuple[Rule, ...]:
    block = "transformer.resblocks.{i}"
    absent = (_without("head.bias", "CLIP"), _without("patch_embed.proj.bias", "CLIP"))
    return (
        *absent,
        one("cls_token", "class_embedding", _batched, lambda token, _: (token[0, 0],)),
        one("pos_embed", "positional_embedding", _batched, lambda positions, _: (positions[0],)),
        one("patch_embed.proj.weight", "conv1.weight"),
        *same("norm_pre", "ln_pre"),
        *same("blocks.{i}.norm1", f"{block}.ln_1"),
        one("blocks.{i}.attn.qkv.weight", f"{block}.attn.in_proj_weight"),
        one("blocks.{i}.attn.qkv.bias", f"{block}.attn.in_proj_bias"),
        *same("blocks.{i}.attn.proj", f"{block}.attn.out_proj"),
        one("blocks.{i}.ls1.gamma", f"{block}.ls_1.gamma"),
        *same("blocks.{i}.norm2", f"{block}.ln_2"),
        *same("blocks.{i}.mlp.fc1", f"{block}.mlp.c_fc"),
        *same("blocks.{i}.mlp.fc2", f"{block}.mlp.c_proj"),
        one("blocks.{i}.ls2.gamma", f"{block}.ls_2.gamma"),
        *same("norm", "ln_post"),
        *same("fc_norm", "ln_post"),
        one("head.weight", "proj", _transposed, lambda weight, _: (weight.T,)),
    )


# open_clip around a model of timm


def _trunk(view: View, facts: Facts) -> str | None:
    if not any(re.match(r"/(text|token_embedding|logit_scale|head\.proj)\b", name) for name in view):
        return None
    for name in view:
        if re.match(r"/head\.(mlp|pool|proj\.bias)\b", name):
            raise NotImplementedError(f"only visual.head.proj.weight is supported beside visual.trunk, got {name[1:]}")
    return "patch_embed.proj and blocks are in a trunk" if "blocks.0.attn.qkv.weight" in view else None


def _linear(view: View, facts: Facts) -> str | None:
    why = _trunk(view, facts)
    return f"{why}, head.proj beside it" if why and "/head.proj.weight" in view else None


def _trunk_known(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    vision = (facts.open_clip.get("model_cfg") or {}).get("vision_cfg") or {}
    if vision.get("timm_model_name") and not facts.fields:
        size = vision.get("image_size", 224)
        cfg = _open_clip_images(facts) | {"input_size": (3, *((size, size) if isinstance(size, int) else size))}
        facts = facts._replace(timm={
            "architecture": vision["timm_model_name"], "model_args": vision.get("timm_model_kwargs") or {},
            "global_pool": vision.get("timm_pool") or None, "pretrained_cfg": cfg,
        })  # fmt: skip
    known = timm._describe(view, facts, given)
    if "/head.proj.weight" in view:
        known.fields["num_classes"] = view.shape("/head.proj.weight")[0]
        # open_clip takes the classifier off a model that is built, and its norm stays where it is
        known.fields["norm_after_pool"] = "fc_norm.weight" in view
    if "attn_pool.latent" in view and not facts.timm and not facts.fields:
        known = known._replace(preprocessing=SIGLIP_IMAGES)
        known.assumed["preprocessing"] = "as open_clip's SigLIP; there is no open_clip_config.json"
    return known


def _linear_rules(config: ViTConfig) -> tuple[Rule, ...]:
    return (
        one("head.weight", "/head.proj.weight"),
        _without("head.bias", "open_clip's projection"),
        *timm._rules(config),
    )


# Hugging Face


def _hf_clip(view: View, facts: Facts) -> str | None:
    there = "pre_layrnorm.weight" in view and "encoder.layers.0.self_attn.q_proj.weight" in view
    return "embeddings.class_embedding and pre_layrnorm are there" if there else None


def _hf_siglip(view: View, facts: Facts) -> str | None:
    if "post_layernorm.weight" not in view or "encoder.layers.0.self_attn.q_proj.weight" not in view:
        return None
    if "embeddings.class_embedding" in view:
        return None
    if view["embeddings.patch_embedding.weight"].dim() == 2:
        raise NotImplementedError(
            "the vision tower is SigLIP2's NaFlex (a linear patch_embedding), which reads patches of any shape"
        )
    return "embeddings.patch_embedding, self_attn and post_layernorm are there, and no class token"


def _hf_known(
    view: View, facts: Facts, given: Mapping[str, Any], defaults: Mapping[str, Any], family: str, images: dict[str, Any]
) -> Known:
    """What both families have in common; `images` is what their preprocessing is by default."""
    D, channels, *patch = view.shape("embeddings.patch_embedding.weight")
    depth = view.blocks(r"encoder\.layers\.(\d+)\.")
    hf = facts.hf.get("vision_config") or facts.hf
    hf = {**defaults, **hf} if hf else {}
    told = given.keys() | facts.fields.keys()
    found, why = preprocessing_of(facts.processor, images)
    labels = facts.hf.get("id2label") or {} if "/classifier.weight" in view else {}
    fields: dict[str, Any] = {
        "dim": D, "channels": channels, "patch_size": tuple(patch), "depth": depth,
        "mlp_dim": view.shape("encoder.layers.0.mlp.fc1.weight")[0],
        "norm_eps": hf.get("layer_norm_eps", defaults["layer_norm_eps"]),
        "attn_dropout": hf.get("attention_dropout", 0.0),
    }  # fmt: skip
    assumed = {"preprocessing": why} if why else {}
    known = Known(fields, assumed, found, {int(label): str(name) for label, name in labels.items()})
    if not hf:
        assumed["norm_eps"] = "transformers' default; there is no config.json"
    if "heads" not in told:
        if hf:
            fields["heads"] = hf["num_attention_heads"]
        else:
            fields["heads"], assumed["heads"] = heads_of(D, depth, given, family)
    if "activation" not in told:
        if hf:
            fields["activation"] = activation_of(hf)
        elif defaults is HF_CLIP:
            raise needs("activation", ["quick_gelu", "gelu"], f"{CLIP_HAS_EITHER}; there is no config.json")
        else:
            fields["activation"], assumed["activation"] = "gelu_tanh", "as all of SigLIP; there is no config.json"
    prefix = int("embeddings.class_embedding" in view)
    positions = view.shape("embeddings.position_embedding.weight")[0]
    _image_size(known, positions, prefix, hf.get("image_size"), given, patch)
    return known


def _hf_clip_known(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    known = _hf_known(view, facts, given, HF_CLIP, "_clip_", _open_clip_images(Facts()))
    if "/classifier.weight" in view:
        # it reads the mean of the patches as the last block leaves them
        own = {"num_classes": view.shape("/classifier.weight")[0], "pool": "mean", "final_norm": False}
    else:
        projected = "/visual_projection.weight" in view
        own = {"num_classes": view.shape("/visual_projection.weight")[0] if projected else 0}
    known.fields.update({"pre_norm": True} | own | dict(facts.fields))
    return known


def _hf_siglip_known(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    known = _hf_known(view, facts, given, HF_SIGLIP, "_siglip_", SIGLIP_IMAGES)
    known.fields.update(class_token=False, num_classes=0, norm_after_pool=False, pool="none")
    if "/classifier.weight" in view and given.get("pool") in (None, "mean"):
        known.fields.update(num_classes=view.shape("/classifier.weight")[0], pool="mean")
    elif any(name.startswith("head.") for name in view):
        known.fields["pool"] = "map"
    known.fields.update(facts.fields)
    return known


def _hf_rules(config: ViTConfig) -> tuple[Rule, ...]:
    layer = "encoder.layers.{i}"
    return (
        one("pos_embed", "embeddings.position_embedding.weight", _batched, lambda positions, _: (positions[0],)),
        *same("patch_embed.proj", "embeddings.patch_embedding"),
        *same("blocks.{i}.norm1", f"{layer}.layer_norm1"),
        *joined("blocks.{i}.attn.qkv", *(f"{layer}.self_attn.{name}_proj" for name in "qkv")),
        *same("blocks.{i}.attn.proj", f"{layer}.self_attn.out_proj"),
        *same("blocks.{i}.norm2", f"{layer}.layer_norm2"),
        *same("blocks.{i}.mlp.fc1", f"{layer}.mlp.fc1"),
        *same("blocks.{i}.mlp.fc2", f"{layer}.mlp.fc2"),
        *same("norm", "post_layernorm"),
    )


def _hf_clip_rules(config: ViTConfig) -> tuple[Rule, ...]:
    projection = one("head.weight", "/visual_projection.weight"), _without("head.bias", "CLIP's projection")
    return (
        *(projection if config.final_norm else same("head", "/classifier")),
        one("cls_token", "embeddings.class_embedding", _batched, lambda token, _: (token[0, 0],)),
        *same("norm_pre", "pre_layrnorm"),
        *_hf_rules(config),
    )


def _rows(ours: str, theirs: str, start: int, parts: int) -> Rule:
    """Some of the three parts of a joint projection, from `start` on."""
    join: Callable[..., Tensor] = lambda tensors, *_: torch.cat(tensors[0].chunk(3)[start : start + parts])  # noqa: E731
    return one(ours, theirs, join, lambda weight, _: (Part(start, weight),))


def _hf_siglip_rules(config: ViTConfig) -> tuple[Rule, ...]:
    attention = "head.attention"
    return (
        one("attn_pool.latent", "head.probe"),
        *(_rows(f"attn_pool.q.{kind}", f"{attention}.in_proj_{kind}", 0, 1) for kind in ("weight", "bias")),
        *(_rows(f"attn_pool.kv.{kind}", f"{attention}.in_proj_{kind}", 1, 2) for kind in ("weight", "bias")),
        *same("attn_pool.proj", f"{attention}.out_proj"),
        *same("attn_pool.norm", "head.layernorm"),
        *same("attn_pool.mlp.fc1", "head.mlp.fc1"),
        *same("attn_pool.mlp.fc2", "head.mlp.fc2"),
        *same("head", "/classifier"),
        *_hf_rules(config),
    )


TEXT = "the text tower"
SIMILARITY = {r"/logit_(scale|bias)$": "scale and shift of the similarity of images and texts"}
IGNORED = SIMILARITY | {
    r"/(text\.|transformer\.|token_embedding\.|positional_embedding$|ln_final\.|text_projection)": TEXT,
    r"/(input_resolution|context_length|vocab_size)$": "numbers of OpenAI's archive",
}
IGNORED_HF = SIMILARITY | {
    r"/(text_model|text_projection)\.": TEXT,
    r"embeddings\.position_ids$": "the numbers of the positions",
}
AROUND_TRUNK = ("visual.trunk.", "trunk.")
TRUNK_ANCHOR, AROUND = r"patch_embed\.proj\.weight", ((r"^/visual\.", "/"),)
LAYOUTS = (
    Layout(
        "openai-clip", "OpenAI's CLIP and open_clip", "class_embedding",
        _openai, _openai_known, _openai_rules, ("visual.", ""), IGNORED,
    ),
    Layout(
        "open_clip-timm-linear", "open_clip's models around timm's, with a projection", TRUNK_ANCHOR,
        _linear, _trunk_known, _linear_rules, AROUND_TRUNK, IGNORED, rename=AROUND,
    ),
    Layout(
        "open_clip-timm", "open_clip's models around timm's", TRUNK_ANCHOR,
        _trunk, _trunk_known, timm._rules, AROUND_TRUNK, IGNORED, rename=AROUND,
    ),
    Layout(
        "hf-clip", "Hugging Face's CLIP", r"embeddings\.class_embedding",
        _hf_clip, _hf_clip_known, _hf_clip_rules, ("vision_model.", ""),
        IGNORED_HF | {r"post_layernorm\.": "a norm that the classifier of the patches' mean does not read"}, "hf",
    ),
    Layout(
        "hf-siglip", "Hugging Face's SigLIP", r"embeddings\.patch_embedding\.weight",
        _hf_siglip, _hf_siglip_known, _hf_siglip_rules, ("vision_model.", ""),
        IGNORED_HF | {
            r"head\.": "the pooling head, which the classifier of the tokens' mean does not read",
            r"/classifier\.": "a classifier of the tokens' mean",
        }, "hf",
    ),
)  # fmt: skip
