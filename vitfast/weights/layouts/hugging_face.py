"""Hugging Face's names, as its files have them, and as its modules have had them since transformers 5: ViT, ViT-MSN,
ViT-MAE, I-JEPA, DeiT, DINOv2 with and without registers.

On disk `save_pretrained` writes the older names; the rules have these, and newer ones are renamed to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitfast.config import ViTConfig
from vitfast.weights.layouts.layout import (
    HALF,
    IMAGENET,
    Facts,
    Known,
    Layout,
    Rule,
    View,
    class_token_with_position,
    grid_of,
    heads_of,
    joined,
    one,
    same,
    with_zero_position,
)  # fmt: skip

# (names in modules since transformers 5, names on disk)
RENAME = (
    # transformers 5 writes a ViT-MSN that has a classifier so
    (r"^/(encoder\.layer\.)", r"\1"),
    (r"(^|/)layers\.(\d+)\.", r"\1encoder.layer.\2."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
RENAME_VIT = (*RENAME, (r"\.mlp\.fc1\.", ".intermediate.dense."), (r"(layer\.\d+)\.mlp\.fc2\.", r"\1.output.dense."))
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu", "swish": "silu",
}  # fmt: skip
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
LAYER = "encoder.layer.{i}"
# of transformers' ViT, DeiT and DINOv2, where a config.json does not say
HEADS = 12


def activation_of(hf: Mapping[str, Any], key: str = "hidden_act") -> str | None:
    """ViTConfig's name of the activation, None where the config has none.

    Raises:
        NotImplementedError: an activation that ViTConfig does not have.
    """
    if key not in hf:
        return None
    if hf[key] not in ACTIVATIONS:
        raise NotImplementedError(f"{key} must be one of {', '.join(ACTIVATIONS)}, got {hf[key]!r}")
    return ACTIVATIONS[hf[key]]


def preprocessing_of(processor: Mapping[str, Any], assumed: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """timm's entries of transformers' preprocessor_config.json, and why where they are `assumed`."""
    if not processor:
        return dict(assumed), "the library's default; there is no preprocessor_config.json"
    found: dict[str, Any] = {"mean": tuple(processor["image_mean"])} if "image_mean" in processor else {}
    found |= {"std": tuple(processor["image_std"])} if "image_std" in processor else {}
    if processor.get("do_normalize") is False:
        found |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    if processor.get("resample") in INTERPOLATIONS:
        found["interpolation"] = INTERPOLATIONS[processor["resample"]]
    size, crop = _size(processor.get("size")), _size(processor.get("crop_size"))
    if processor.get("do_center_crop") and crop and size:
        found |= {"input_size": (3, *crop), "crop_pct": crop[0] / size[0], "crop_mode": "center"}
    elif size:
        found |= {"input_size": (3, *size), "crop_pct": 1.0, "crop_mode": "squash"}
    return found, ""


def _size(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        size = (size.get("height", edge), size.get("width", edge))
        return size if None not in size else None
    return None


def common(view: View, facts: Facts, given: Mapping[str, Any], eps: float, preprocessing: Mapping[str, Any]) -> Known:
    """What the family has in common: sizes by shapes, the rest by config.json or assumed."""
    hf, assumed = facts.hf, dict[str, str]()
    D, channels, *patch = view.shape("embeddings.patch_embeddings.projection.weight")
    depth = view.blocks(r"encoder\.layer\.(\d+)\.")
    fields: dict[str, Any] = {
        "dim": D, "channels": channels, "patch_size": tuple(patch), "depth": depth,
        "qkv_bias": "encoder.layer.0.attention.attention.query.bias" in view,
    }  # fmt: skip
    no_config = "config.json leaves it out" if hf else "there is no config.json"
    if hf.get("num_attention_heads") is not None:
        fields["heads"] = hf["num_attention_heads"]
    elif hf:
        fields["heads"], assumed["heads"] = HEADS, f"the library's default; {no_config}"
    elif "heads" not in facts.fields:
        fields["heads"], assumed["heads"] = heads_of(D, depth, given)
    fields["activation"] = activation_of(hf)
    if fields["activation"] is None:
        fields["activation"], assumed["activation"] = "gelu", f"the library's default; {no_config}"
    if hf.get("layer_norm_eps") is not None:
        fields["norm_eps"] = hf["layer_norm_eps"]
    else:
        fields["norm_eps"], assumed["norm_eps"] = eps, f"the library's default; {no_config}"
    rates = {"hidden_dropout_prob": ("emb_dropout", "proj_dropout"), "attention_probs_dropout_prob": ("attn_dropout",)}
    fields |= {ours: hf[key] for key, names in rates.items() if key in hf for ours in names}
    images, why = preprocessing_of(facts.processor, preprocessing)
    assumed |= {"preprocessing": why} if why else {}
    labels = {int(label): str(name) for label, name in (hf.get("id2label") or {}).items()}
    # what transformers writes where nobody named them
    labels = {} if all(name == f"LABEL_{label}" for label, name in labels.items()) else labels
    return Known(fields | dict(facts.fields), assumed, images, labels)


def with_grid(known: Known, view: View, facts: Facts, given: Mapping[str, Any], prefix: int) -> Known:
    """The image size, of positions [1, prefix + N, D]."""
    rows, patch = view.shape("embeddings.position_embeddings")[1], known.fields["patch_size"]
    size = facts.hf.get("image_size")
    grid = (
        tuple(n // p for n, p in zip((size, size) if isinstance(size, int) else size, patch, strict=True))
        if size
        else None
    )
    if grid is None or grid[0] * grid[1] != rows - prefix or "grid" in given:
        grid = grid_of(rows, prefix, given)
    known.fields["image_size"] = tuple(g * p for g, p in zip(grid, patch, strict=True))
    return known


def head(view: View, name: str = "/classifier") -> int:
    return view.shape(f"{name}.weight")[0] if f"{name}.weight" in view else 0


def _has(*names: str, without: Sequence[str] = ()) -> Any:
    def recognises(view: View, facts: Facts) -> str | None:
        names_there = all(name in view for name in names) and not any(name in view for name in without)
        return f"{', '.join(names)} {'are' if len(names) > 1 else 'is'} there" if names_there else None

    return recognises


def _vit(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    token = "embeddings.cls_token" in view
    known = _vit_or_deit(view, facts, given, HALF | {"interpolation": "bilinear", "crop_pct": 1.0})
    known.fields.update(num_classes=head(view), class_token=token, pool="token" if token else "mean")
    return with_grid(known, view, facts, given, int(token))


def _deit(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    known = _vit_or_deit(view, facts, given, IMAGENET | {"interpolation": "bicubic", "crop_pct": 0.875})
    two = "/distillation_classifier.weight" in view
    # where nobody reads the distillation token after the blocks it is a register that has a position
    known.fields.update({"distillation_token": True} if two else {"register_tokens": 1})
    known.fields["num_classes"] = head(view, "/cls_classifier" if two else "/classifier")
    return with_grid(known, view, facts, given, 2)


def _vit_or_deit(view: View, facts: Facts, given: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> Known:
    known = common(view, facts, given, 1e-12, preprocessing)
    known.fields.update(mlp_dim=view.shape("encoder.layer.0.intermediate.dense.weight")[0], norm_after_pool=False)
    return known


def _dinov2(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    known = common(view, facts, given, 1e-6, IMAGENET | {"interpolation": "bicubic", "crop_pct": 0.875})
    if "/classifier.weight" in view and "num_classes" not in given:
        raise NotImplementedError(
            "classifier reads the class token beside the mean of the patches, which ViTConfig does not have; "
            "num_classes=0 loads the model without it, num_classes=N with a new one on the class token"
        )
    packed = "encoder.layer.0.mlp.weights_in.weight" in view
    fc1 = "encoder.layer.0.mlp.weights_in.weight" if packed else "encoder.layer.0.mlp.fc1.weight"
    registers = view.shape("embeddings.register_tokens")[1] if "embeddings.register_tokens" in view else 0
    known.fields.update(
        mlp_dim=view.shape(fc1)[0], num_classes=0, layer_scale=facts.hf.get("layerscale_value", 1.0),
        register_tokens=registers, pos_embed="patches" if registers else "all",
    )  # fmt: skip
    if packed:
        known.fields.update(mlp="swiglu_packed", activation="silu")
        known.assumed.pop("activation", None)
    return with_grid(known, view, facts, given, 1)


def _embeddings() -> tuple[Rule, ...]:
    return (
        one("cls_token", "embeddings.cls_token"),
        one("pos_embed", "embeddings.position_embeddings"),
        *same("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        *joined("blocks.{i}.attn.qkv", *(f"{LAYER}.attention.attention.{name}" for name in ("query", "key", "value"))),
        *same("blocks.{i}.attn.proj", f"{LAYER}.attention.output.dense"),
        *same("norm", "layernorm"),
    )


def _vit_rules(config: ViTConfig) -> tuple[Rule, ...]:
    return (
        *_embeddings(),
        *same("blocks.{i}.norm1", f"{LAYER}.layernorm_before"),
        *same("blocks.{i}.norm2", f"{LAYER}.layernorm_after"),
        *same("blocks.{i}.mlp.fc1", f"{LAYER}.intermediate.dense"),
        *same("blocks.{i}.mlp.fc2", f"{LAYER}.output.dense"),
        *same("head", "/classifier"),
    )


def _deit_rules(config: ViTConfig) -> tuple[Rule, ...]:
    token = "dist_token" if config.distillation_token else "reg_token"
    heads = same("head", "/cls_classifier") if config.distillation_token else same("head", "/classifier")
    return (
        one(token, "embeddings.distillation_token"),
        *heads,
        *same("head_dist", "/distillation_classifier"),
        *_vit_rules(config),
    )


def _dinov2_rules(config: ViTConfig) -> tuple[Rule, ...]:
    tokens: tuple[Rule, ...] = ()
    if config.register_tokens:
        names = ("embeddings.cls_token", "embeddings.position_embeddings")
        tokens = (
            Rule("cls_token", names, class_token_with_position, lambda token, _: (token, None)),
            one("pos_embed", names[1], lambda tensors, *_: tensors[0][:, 1:], with_zero_position),
            one("reg_token", "embeddings.register_tokens"),
        )
    fc1, fc2 = ("weights_in", "weights_out") if config.mlp == "swiglu_packed" else ("fc1", "fc2")
    return (
        *tokens,
        *_embeddings(),
        *same("blocks.{i}.norm1", f"{LAYER}.norm1"),
        *same("blocks.{i}.norm2", f"{LAYER}.norm2"),
        *same("blocks.{i}.mlp.fc1", f"{LAYER}.mlp.{fc1}"),
        *same("blocks.{i}.mlp.fc2", f"{LAYER}.mlp.{fc2}"),
        one("blocks.{i}.ls1.gamma", f"{LAYER}.layer_scale1.lambda1"),
        one("blocks.{i}.ls2.gamma", f"{LAYER}.layer_scale2.lambda1"),
    )


ANCHOR = r"embeddings\.patch_embeddings\.projection\.weight"
IGNORED = {
    r"pooler\.": "a pooler (linear, tanh) after the class token, which few use and pretraining did not train",
    r"embeddings\.mask_token$": "the token that stands for hidden patches in pretraining",
    r"/decoder\.": "the decoder of masked pretraining",
}
TWO = {r"/classifier\.": "a classifier on the class token beside the mean of the patches"}
LAYOUTS = (
    Layout(
        "hf-dinov2-reg", "Hugging Face's DINOv2 with registers", ANCHOR,
        _has("encoder.layer.0.layer_scale1.lambda1", "embeddings.register_tokens"),
        _dinov2, _dinov2_rules, ("dinov2_with_registers.", ""), IGNORED | TWO, "timm", RENAME,
    ),
    Layout(
        "hf-dinov2", "Hugging Face's DINOv2", ANCHOR,
        _has("encoder.layer.0.layer_scale1.lambda1", "encoder.layer.0.norm1.weight"),
        _dinov2, _dinov2_rules, ("dinov2.", ""), IGNORED | TWO, "hf", RENAME,
    ),
    Layout(
        "hf-deit", "Hugging Face's DeiT", ANCHOR,
        _has("embeddings.distillation_token", "encoder.layer.0.layernorm_before.weight"),
        _deit, _deit_rules, ("deit.", ""), IGNORED, "hf", RENAME_VIT,
    ),
    Layout(
        "hf-vit", "Hugging Face's ViT", ANCHOR,
        _has("encoder.layer.0.layernorm_before.weight", without=["encoder.layer.0.lambda_1"]),
        _vit, _vit_rules, ("vit.", "ijepa.", ""), IGNORED, "hf", RENAME_VIT,
    ),
)  # fmt: skip
