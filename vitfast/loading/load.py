"""`load`: a ViT of weights from anywhere."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.checkpoints.not_finite import not_finite
from vitfast.config import ViTConfig
from vitfast.loading.recognise import Recognised, recognise
from vitfast.loading.report import LoadReport
from vitfast.loading.source import source_of
from vitfast.model.vit import ViT
from vitfast.timm_names import pretrained_cfg as cfgs
from vitfast.weights.layouts.layout import Known, converted, sources_of
from vitfast.weights.names import own_weights
from vitfast.weights.resample import adapt_input_channels, resample_patch_embed, resample_pos_embed

HEADS = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")


def load(
    source: str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    grid: tuple[int, int] | None = None,
    resampling: str | None = None,
    as_: str | None = None,
    key: str | None = None,
    allow_pickle: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **fields: Any,
) -> ViT:
    """A ViT with the weights of a file, a folder or another library's model, in evaluation mode.

    Whose weights they are is told by their names and shapes; eps, GELU, pooling, norms, tokens and preprocessing
    follow from that and from config files beside them. What nothing tells is assumed where one library has one answer,
    and said in `model.load_report`; where two libraries differ, the error asks for the field.

    Args:
        source: a path, see `read_checkpoint`; 'hf-hub:owner/name', from the cache or downloaded; a state dict; a model
            of timm, Hugging Face, torchvision, vit-pytorch or vitfast.
        num_classes: of the model; where it differs from the weights' the classifier is new, and zero (Dosovitskiy et
            al., "An Image is Worth 16x16 Words", 2021, section 3.2). 0 for none.
        image_size: of the model, pixels; positions are resampled.
        patch_size: of the model, pixels; the projection is resampled (see `resample_patch_embed`).
        channels: of the model's images; the projection is summed or repeated, as timm does.
        grid: rows and columns of the weights' positions, where they are not square and no config says so.
        resampling: how positions are resampled (see `resample_pos_embed`); by default as the weights' library does.
        as_: the layout by name, in place of recognising it.
        key, allow_pickle: as `read_checkpoint`.
        dtype, device: of the parameters; torch's defaults when None.
        **fields: fields of `ViTConfig` that win over what was recognised: `activation`, `norm_eps`, `heads`, `pool` ...

    Raises:
        ValueError: unknown weights, or a field that has to be given: says which, and between what.
        RuntimeError: weights that are missing, left over or of another shape.
        NotImplementedError: a model that no ViTConfig describes; names what is missing.
        FileNotFoundError, ValueError: as `read_checkpoint`.
        TypeError: no source, or a field that ViTConfig does not have.
    """
    state, facts, name, _, note = source_of(source, allow_pickle=allow_pickle, key=key)
    sizes = _given(num_classes=num_classes, image_size=image_size, patch_size=patch_size, channels=channels)
    given = fields | sizes | _given(grid=grid)
    try:
        found = recognise(state, facts, as_)
        del state
        known = found.layout.describe(found.view, facts, given)
        known = known._replace(assumed={name: why for name, why in known.assumed.items() if name not in fields})
        config = ViTConfig(**known.fields | fields)
        target = config.replace(**sizes)
        model, report = _filled(found, known, config, target, resampling, dtype, device, name)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise type(error)(f"load: {name}: {error}") from error
    model.load_report = replace(report, chosen=note)
    model.pretrained_cfg = model.default_cfg = _pretrained_cfg(target, report)
    return model.eval()


def _given(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def _filled(
    found: Recognised, known: Known, config: ViTConfig, target: ViTConfig, resampling: str | None,
    dtype: torch.dtype | None, device: torch.device | str | None, name: str,
) -> tuple[ViT, LoadReport]:  # fmt: skip
    with torch.device("meta"):
        own, model = own_weights(ViT.from_config(config)), ViT.from_config(target)
    # all that can be wrong is found before anything is allocated
    sources = sources_of(found.layout, found.view, config, own)
    resampling = resampling or found.layout.resampling
    changed = _changes(config, target, resampling)
    model = model.to(dtype or torch.get_default_dtype()).to_empty(device=device or torch.get_default_device())
    places, bad = own_weights(model), list[str]()
    with torch.no_grad():
        for weight_name, weight in converted(sources, found.view, config, own):
            bad += not_finite({weight_name: weight})
            if weight_name in places and not (weight_name in HEADS and config.num_classes != target.num_classes):
                places.pop(weight_name).copy_(_fitted(weight_name, weight, config, target, resampling))
        for place in places.values():
            # a new classifier
            place.zero_()
    if bad:
        warnings.warn(f"load: {name} has NaN or Inf in {', '.join(bad)}", stacklevel=3)
    return model, LoadReport(
        name, found.layout.name, found.layout.whose, found.why, found.prefix, config, known.assumed, sources.ignored,
        changed, known.preprocessing, known.labels, tuple(bad),
    )  # fmt: skip


def _changes(config: ViTConfig, target: ViTConfig, resampling: str) -> tuple[str, ...]:
    """What will differ from the weights, in words.

    Raises:
        NotImplementedError: what cannot be changed in weights of vit-pytorch's architecture.
    """
    changed = []
    if config.num_classes != target.num_classes:
        new = f"a new one, zero, for {target.num_classes} classes" if target.num_classes else "none"
        changed.append(f"classifier: {new} in place of {config.num_classes}")
    for name in ("channels", "patch_size"):
        if getattr(config, name) != getattr(target, name):
            if config.input_norm:
                raise NotImplementedError(
                    f"{name} must stay {getattr(config, name)}: vit-pytorch's projection reads normalised rows of "
                    f"pixels, got {getattr(target, name)}"
                )
            changed.append(f"patch projection: {name} {getattr(target, name)} in place of {getattr(config, name)}")
    if config.grid_size != target.grid_size and config.pos_embed != "none":
        change = "x".join(map(str, target.grid_size)) + " in place of " + "x".join(map(str, config.grid_size))
        changed.append(f"positions: {change} patches, resampled as {resampling!r}")
    return tuple(changed)


def _fitted(name: str, weight: Tensor, config: ViTConfig, target: ViTConfig, resampling: str) -> Tensor:
    """A weight for the model's image size, patch and channels."""
    if name == "pos_embed" and config.grid_size != target.grid_size:
        prefix = config.num_prefix_tokens if config.pos_embed == "all" else 0
        rows = weight if weight.dim() == 3 else weight[None]
        rows = resample_pos_embed(rows, target.grid_size, config.grid_size, prefix, mode=resampling)
        return rows if weight.dim() == 3 else rows[0]
    if name == "patch_embed.proj.weight":
        if config.channels != target.channels:
            weight = adapt_input_channels(weight, target.channels)
        if config.patch_size != target.patch_size:
            weight = resample_patch_embed(weight, target.patch_size)  # type: ignore[arg-type]  # a pair
    return weight


def _pretrained_cfg(config: ViTConfig, report: LoadReport) -> dict[str, Any]:
    """timm's entries, which its tools read."""
    size = {"input_size": (config.channels, *config.image_size)}  # type: ignore[misc]  # a pair
    names = {"first_conv": "patch_embed.proj", "classifier": "head"}
    labels = {"label_names": tuple(report.labels.values())} if report.labels else {}
    return cfgs.DEFAULTS | names | report.preprocessing | size | {"num_classes": config.num_classes} | labels
