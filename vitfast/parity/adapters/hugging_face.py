"""transformers' ViT, DeiT, DINOv2 and DINOv2 with registers: the model alone and its classifiers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.parity.adapters.adapter import Adapter, Step, UnknownPart, expect, halves
from vitfast.parity.chain import Stage, in_turn

BASES = ("vit", "deit", "dinov2", "dinov2_with_registers")


def classifier(model: Any, images: Tensor) -> tuple[Stage, ...]:
    """`...ForImageClassification`."""
    name = next((name for name in BASES if name in model._modules), None)
    if name is None:
        raise UnknownPart(f"has none of {', '.join(BASES)}")
    base, config = getattr(model, name), model.config
    steps = _tokens(base, images)
    if "cls_classifier" in model._modules:
        first, second = model.cls_classifier, model.distillation_classifier
        return (
            *in_turn(*steps, ("pooled", lambda x: (x[:, 0] + x[:, 1]) / 2)),
            Stage("logits", "tokens", lambda x: (first(x[:, 0]) + second(x[:, 1])) / 2),
        )
    prefix = 1 + getattr(config, "num_register_tokens", 0)
    both = name.startswith("dinov2")
    pooled = lambda x: torch.cat([x[:, 0], x[:, prefix:].mean(dim=1)], dim=1) if both else x[:, 0]  # noqa: E731
    return in_turn(*steps, ("pooled", pooled), ("logits", model.classifier))


def alone(model: Any, images: Tensor) -> tuple[Stage, ...]:
    """`...Model`."""
    steps = _tokens(model, images)
    pooler = model._modules.get("pooler")
    if pooler is not None:
        return in_turn(*steps, ("pooled", pooler))
    return in_turn(*steps)


def _tokens(base: Any, images: Tensor) -> list[Step]:
    embeddings, size = base.embeddings, images.shape[1:]
    how = {"interpolate_pos_encoding": True} if resamples(base, images) else {}

    def patches(x: Tensor) -> Tensor:
        return embeddings.patch_embeddings(x)

    def patch_tokens(x: Tensor) -> Tensor:
        # their own code around patches that are there already
        given, around = copy.copy(embeddings.patch_embeddings), copy.copy(embeddings)
        given.forward = lambda *_, **__: x
        around._modules = embeddings._modules | {"patch_embeddings": given}
        return around(x.new_empty(x.shape[0], *size), **how)

    layers = base.layers if hasattr(base, "layers") else base.encoder.layer
    steps: list[Step] = [("patches", patches), ("patch_tokens", patch_tokens)]
    for i, layer in enumerate(layers):
        steps += _layer(i, layer)
    return [*steps, ("tokens", base.layernorm)]


def _layer(i: int, layer: Any) -> list[Step]:
    expect(layer, "ViTLayer", "DeiTLayer", "Dinov2Layer", "Dinov2WithRegistersLayer")
    inside = layer._modules
    if not {"attention", "mlp"} <= inside.keys():
        raise UnknownPart(f"has a {type(layer).__name__} of another release")
    identity = nn.Identity()

    def part(*names: str) -> Any:
        return next((inside[name] for name in names if name in inside), identity)

    norm1, norm2 = part("layernorm_before", "norm1"), part("layernorm_after", "norm2")
    scale1, scale2, drop = part("layer_scale1"), part("layer_scale2"), part("dropout", "drop_path")
    return halves(
        i,
        layer,
        lambda x: drop(scale1(layer.attention(norm1(x))[0])) + x,
        lambda x: drop(scale2(layer.mlp(norm2(x)))) + x,
        lambda attn, normed: attn(normed)[0],
    )


def resamples(model: Any, images: Tensor) -> bool:
    """Whether these images are of another size than the positions, and the model has to be asked for resampling."""
    base = next((model._modules[name] for name in BASES if name in model._modules), model)
    size = getattr(getattr(base, "embeddings", None), "image_size", None)
    return size is not None and tuple(size) != tuple(images.shape[2:])


_PACKAGES = {
    "ViT": "vit.modeling_vit", "DeiT": "deit.modeling_deit", "Dinov2": "dinov2.modeling_dinov2",
    "Dinov2WithRegisters": "dinov2_with_registers.modeling_dinov2_with_registers",
}  # fmt: skip
ADAPTERS: dict[str, Adapter] = {
    f"transformers.models.{package}.{name}{kind}": adapter
    for name, package in _PACKAGES.items()
    for kind, adapter in (
        ("Model", alone), ("ForImageClassification", classifier), ("ForImageClassificationWithTeacher", classifier),
    )
}  # fmt: skip
