"""Our weights as files of another library: its names, and the config files that it reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitfast.checkpoints.checkpoint import CONFIG_KEY
from vitfast.config import ViTConfig
from vitfast.loading.recognise import recognise
from vitfast.loading.report import LoadReport
from vitfast.loading.timm_config import timm_config
from vitfast.weights import vit_pytorch
from vitfast.weights.layouts import LAYOUTS
from vitfast.weights.layouts.hugging_face import ACTIVATIONS, INTERPOLATIONS
from vitfast.weights.layouts.layout import Facts, written

TOWER = "vision_model."
# of no account for what a model computes from its weights
NOT_COMPUTED = (
    "layer_scale", "dynamic_image_size", "dynamic_pad", "emb_dropout", "attn_dropout", "proj_dropout", "mlp_dropout",
    "head_dropout", "drop_path",
)  # fmt: skip

# part of our model that few libraries have -> the field that makes it
PARTS = {
    "fc_norm": "norm_after_pool", "norm_pre": "pre_norm", "reg_token": "register_tokens", "q_norm": "qk_norm",
    "ls1": "layer_scale", "attn_pool": "pool", "head_dist": "distillation_token", "fc1_g": "mlp",
}  # fmt: skip


class Files(NamedTuple):
    """What is to be written.

    Attributes:
        state: weights by their names in the file.
        beside: name of a file of a folder -> its JSON.
        metadata: of safetensors.
        notes: what whoever reads them has to know.
    """

    state: dict[str, Tensor]
    beside: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    notes: tuple[str, ...] = ()


def as_vitfast(state: Mapping[str, Tensor], config: ViTConfig, report: LoadReport) -> Files:
    return Files(dict(state), metadata={CONFIG_KEY: json.dumps(config.to_dict())})


def as_timm(state: Mapping[str, Tensor], config: ViTConfig, report: LoadReport) -> Files:
    """Raises NotImplementedError for vit-pytorch's architecture, which timm does not have."""
    if config.input_norm:
        raise NotImplementedError("timm has no norm of the pixels of a patch (input_norm), which vit-pytorch's ViT has")
    found, why = timm_config(config, report)
    return Files(dict(state), {"config.json": found} if found else {}, notes=() if found else (why,))


def as_vit_pytorch(state: Mapping[str, Tensor], config: ViTConfig, report: LoadReport) -> Files:
    """Raises NotImplementedError for another architecture than vit-pytorch's."""
    if not config.input_norm:
        raise NotImplementedError(
            "vit-pytorch's ViT has norms on both sides of its patch projection and no bias of queries, keys and values"
        )
    # its mean has been without a class token since 1.16
    pool = "none" if config.pool == "none" else "token" if config.class_token else "mean"
    written_as = config.replace(norm_eps=1e-5, activation="gelu", pool=pool, pool_prefix=False)
    _same_function(config, written_as, "vit-pytorch's ViT")
    try:
        renamed = vit_pytorch.from_vitfast(dict(state), config)
    except ValueError as error:
        raise NotImplementedError(f"vit-pytorch's ViT cannot hold this model: {error}") from error
    return Files(renamed)


def as_torchvision(state: Mapping[str, Tensor], config: ViTConfig, report: LoadReport) -> Files:
    facts = Facts(fields={"heads": config.heads, "image_size": config.image_size})
    return Files(_renamed("torchvision", state, config, facts))


def as_hugging_face(state: Mapping[str, Tensor], config: ViTConfig, report: LoadReport) -> Files:
    """A folder that `from_pretrained` reads: ViT, DeiT, DINOv2, or the vision tower of CLIP or SigLIP."""
    kind = next(kind for kind in HUGGING_FACE if kind.fits(config))
    hf = _hf_config(kind, config, report)
    names = _renamed(kind.layout, state, config, Facts(hf=hf))
    # a model without a classifier is the backbone itself, but for the towers
    prefix = kind.prefix if config.num_classes or kind.prefix == TOWER else ""
    state = {name[1:] if name.startswith("/") else prefix + name: value for name, value in names.items()}
    if kind.layout.startswith("hf-dinov2"):
        # without it transformers says that a weight is new
        state[f"{prefix}embeddings.mask_token"] = torch.zeros_like(next(iter(state.values())).new_empty(1, config.dim))
    beside = {"config.json": hf}
    if report.preprocessing.get("mean"):
        beside["preprocessor_config.json"] = _processor(report, config)
    notes = (f"{hf['architectures'][0]} makes its pooler anew",) if hf["architectures"][0] in POOLED else ()
    return Files(state, beside, {"format": "pt"}, notes)


def _renamed(layout_name: str, state: Mapping[str, Tensor], config: ViTConfig, facts: Facts) -> dict[str, Tensor]:
    """Under the layout's names, if the model that is read from there computes what this one does.

    Raises:
        NotImplementedError: it does not; names the fields.
    """
    layout = next(layout for layout in LAYOUTS if layout.name == layout_name)
    try:
        names = written(layout, state, config)
    except NotImplementedError as error:
        fields = [field for part, field in PARTS.items() if any(part in name.split(".") for name in state)]
        told = [f"{field}={getattr(config, field)!r}" for field in fields]
        raise NotImplementedError(
            ": this model has ".join([str(error), *([", ".join(told)] if told else [])])
        ) from error
    # read again as a whole file: what stands around the backbone needs the library's own prefix before it
    inner = max(layout.inner, key=len)
    whole = {name[1:] if name.startswith("/") else inner + name: value for name, value in names.items()}
    found = recognise(whole, facts, layout_name)
    try:
        known = layout.describe(found.view, facts, {})
    except ValueError as error:
        raise NotImplementedError(f"{layout.whose} does not say what this model is: {error}") from error
    _same_function(config, ViTConfig(**known.fields), layout.whose)
    return names


def _same_function(config: ViTConfig, other: ViTConfig, whose: str) -> None:
    """Raise NotImplementedError where a model of `other` computes something else."""
    rest = {name: getattr(other, name) for name in NOT_COMPUTED if name != "layer_scale"}
    rest |= {"pos_embed": other.pos_embed} if not config.num_prefix_tokens else {}
    rest |= (
        {"pool": other.pool, "norm_after_pool": other.norm_after_pool} if config.pool == other.pool == "none" else {}
    )
    if config.layer_scale and other.layer_scale:
        rest["layer_scale"] = other.layer_scale
    ours, theirs = config.replace(**rest).to_dict(), other.to_dict()
    differ = [f"{name}={theirs[name]!r}, this model has {ours[name]!r}" for name in ours if ours[name] != theirs[name]]
    if differ:
        raise NotImplementedError(f"{whose} has {'; '.join(differ)}")


# whose pooler (linear, tanh) is no part of ours
POOLED = ("ViTModel", "DeiTModel")


class Kind(NamedTuple):
    """A family of transformers.

    Attributes:
        model_type, layout, prefix: its name in config.json, our layout of it, and the prefix of its backbone.
        classes: of a model without and with a classifier.
        fits: whether a config is of this family; the first one is taken.
    """

    model_type: str
    layout: str
    prefix: str
    classes: tuple[str, str]
    fits: Callable[[ViTConfig], bool]


HUGGING_FACE = (
    Kind("siglip_vision_model", "hf-siglip", TOWER, ("SiglipVisionModel", ""), lambda c: c.pool == "map"),
    Kind(
        "clip_vision_model", "hf-clip", TOWER, ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
        lambda c: c.pre_norm,
    ),
    Kind(
        "dinov2_with_registers", "hf-dinov2-reg", "dinov2_with_registers.", ("Dinov2WithRegistersModel", ""),
        lambda c: c.layer_scale is not None and c.register_tokens > 0,
    ),
    Kind("dinov2", "hf-dinov2", "dinov2.", ("Dinov2Model", ""), lambda c: c.layer_scale is not None),
    Kind(
        "deit", "hf-deit", "deit.", ("DeiTModel", "DeiTForImageClassificationWithTeacher"),
        lambda c: c.distillation_token,
    ),
    Kind(
        "deit", "hf-deit", "deit.", ("DeiTModel", "DeiTForImageClassification"),
        lambda c: c.register_tokens == 1 and c.pos_embed == "all",
    ),
    Kind(
        "ijepa", "hf-vit", "ijepa.", ("IJepaModel", "IJepaForImageClassification"), lambda c: not c.class_token,
    ),
    Kind("vit", "hf-vit", "vit.", ("ViTModel", "ViTForImageClassification"), lambda c: True),
)  # fmt: skip


def _hf_config(kind: Kind, config: ViTConfig, report: LoadReport) -> dict[str, Any]:
    """transformers' config.json.

    Raises:
        NotImplementedError: a classifier where the family has none, sizes that it does not take, or an MLP whose width
            it cannot say.
    """
    architecture = kind.classes[bool(config.num_classes)]
    if not architecture:
        raise NotImplementedError(
            f"{kind.classes[0]} has no classifier on the class token: num_classes=0 writes the model without it"
        )
    if kind.prefix == TOWER and (len({*config.image_size}), len({*config.patch_size})) != (1, 1):  # type: ignore[misc]
        raise NotImplementedError(
            f"{architecture} has square images and patches only, this model has image_size={config.image_size}, "
            f"patch_size={config.patch_size}"
        )
    if kind.layout == "hf-dinov2" and len({*config.grid_size}) != 1:
        raise NotImplementedError(
            f"{architecture} takes its positions for those of a square, this model has {config.grid_size} patches"
        )
    flat = lambda pair: pair[0] if pair[0] == pair[1] else list(pair)  # noqa: E731
    hf: dict[str, Any] = {
        "architectures": [architecture], "model_type": kind.model_type, "hidden_size": config.dim,
        "num_hidden_layers": config.depth, "num_attention_heads": config.heads, "layer_norm_eps": config.norm_eps,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
        "image_size": flat(config.image_size), "patch_size": flat(config.patch_size), "num_channels": config.channels,
    }  # fmt: skip
    if kind.prefix == TOWER:
        hf |= {"intermediate_size": config.mlp_dim, "attention_dropout": config.attn_dropout}
        hf |= {"projection_dim": config.num_classes} if config.num_classes else {}
        return hf
    hf |= {
        "qkv_bias": config.qkv_bias, "hidden_dropout_prob": config.proj_dropout,
        "attention_probs_dropout_prob": config.attn_dropout,
    }  # fmt: skip
    if kind.layout.startswith("hf-dinov2"):
        hf |= _dinov2_mlp(config) | {"layerscale_value": config.layer_scale}
        hf |= {"num_register_tokens": config.register_tokens} if config.register_tokens else {}
    else:
        hf["intermediate_size"] = config.mlp_dim
    if config.num_classes:
        names = [report.labels.get(i, f"LABEL_{i}") for i in range(config.num_classes)]
        hf["id2label"] = {str(i): name for i, name in enumerate(names)}
        hf["label2id"] = {name: i for i, name in enumerate(names)}
    return hf


def _dinov2_mlp(config: ViTConfig) -> dict[str, Any]:
    gated, D, width = config.mlp == "swiglu_packed", config.dim, int(config.mlp_dim or 0)
    # transformers' width of a gated MLP: two thirds of dim * mlp_ratio, rounded up to a multiple of eight
    for ratio in range(1, 17):
        made = D * ratio
        if (2 * ((int(made * 2 / 3) + 7) // 8 * 8) if gated else made) == width:
            return {"mlp_ratio": ratio, "use_swiglu_ffn": gated}
    raise NotImplementedError(f"Hugging Face's DINOv2 has no mlp_ratio for an MLP of {width} beside {D}")


def _processor(report: LoadReport, config: ViTConfig) -> dict[str, Any]:
    """transformers' preprocessor_config.json."""
    images, (h, w) = report.preprocessing, config.image_size  # type: ignore[misc]  # a pair
    resample = next((n for n, name in INTERPOLATIONS.items() if name == images.get("interpolation")), 3)
    found = {
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": list(images["mean"]),
        "image_std": list(images["std"]), "resample": resample, "rescale_factor": 1 / 255,
    }  # fmt: skip
    share = images.get("crop_pct", 1.0)
    if images.get("crop_mode") == "squash" or (share == 1.0 and images.get("crop_mode") is None):
        return found | {"image_processor_type": "ViTImageProcessor", "size": {"height": h, "width": w}}
    edge = int(min(h, w) / share)
    crop = {"crop_size": {"height": h, "width": w}, "do_center_crop": True, "size": {"shortest_edge": edge}}
    return found | crop | {"image_processor_type": "BitImageProcessor"}


WRITERS: dict[str, Callable[[Mapping[str, Tensor], ViTConfig, LoadReport], Files]] = {
    "vitfast": as_vitfast, "timm": as_timm, "hf": as_hugging_face, "vit_pytorch": as_vit_pytorch,
    "torchvision": as_torchvision,
}  # fmt: skip
