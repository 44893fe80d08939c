"""Weights of any source as ours, one by one: what `load` and `convert` have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitfast.checkpoints.dtypes import check_dtypes
from vitfast.config import ViTConfig
from vitfast.loading.recognise import Recognised, described, recognise
from vitfast.loading.report import LoadReport
from vitfast.loading.source import source_of
from vitfast.model.vit import ViT
from vitfast.weights.layouts.layout import Sources, View, converted, sources_of
from vitfast.weights.names import own_weights
from vitfast.weights.resample import MODES, adapt_input_channels, resample_patch_embed, resample_pos_embed

HEADS = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")


class Taken(NamedTuple):
    """A model that its weights were fitted to.

    Attributes:
        config: of the model; report: whose weights these are and what was changed.
        weights: (our name, weight) of every weight of such a model, in the dtype of the source.
    """

    config: ViTConfig
    report: LoadReport
    weights: Iterator[tuple[str, Tensor]]


def take(
    source: Any,
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
    **fields: Any,
) -> Taken:
    """Read and recognise a source. All that can be wrong is found here, before a weight is made.

    Args, raises: as `vitfast.load`.
    """
    state, facts, name, _, note = source_of(source, allow_pickle=allow_pickle, key=key)
    if grid is not None and not (isinstance(grid, Sequence) and len(grid) == 2 and all(type(n) is int for n in grid)):
        raise TypeError(f"load: grid must be (rows, columns), got {grid!r}")
    if resampling is not None and resampling not in MODES:
        raise ValueError(f"load: resampling must be one of {', '.join(MODES)}, got {resampling!r}")
    sizes = _given(num_classes=num_classes, image_size=image_size, patch_size=patch_size, channels=channels)
    given = fields | sizes | _given(grid=grid)
    try:
        found = recognise(state, facts, as_)
        del state
        known = described(found, facts, given)
        config = ViTConfig(**known.fields | fields)
        target = config.replace(**sizes)
        with torch.device("meta"):
            own = own_weights(ViT.from_config(config))
            wanted = own_weights(ViT.from_config(target))
        sources = _sources(found, config, own)
        used = {name for _, theirs in sources.rules.values() for name in theirs}
        check_dtypes({name: found.view[name] for name in sorted(used)}, found.layout.whose)
        mode = resampling or found.layout.resampling
        changed = _changes(config, target, mode)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise type(error)(f"load: {name}: {error}") from error
    assumed = {field: why for field, why in known.assumed.items() if field not in fields}
    labels = known.labels if target.num_classes == config.num_classes else {}
    report = LoadReport(
        name, found.layout.name, found.layout.whose, found.why, found.prefix, config, assumed, sources.ignored,
        changed, known.preprocessing, labels, chosen=note,
    )  # fmt: skip
    return Taken(target, report, _fitted(sources, found.view, own, wanted, config, target, mode))


def _sources(found: Recognised, config: ViTConfig, own: Mapping[str, Tensor]) -> Sources:
    try:
        return sources_of(found.layout, found.view, config, own)
    except RuntimeError as error:
        # what stands around the model is of somebody's training
        if not found.prefix or not any(name.startswith("/") for name in found.view):
            raise
        key = found.prefix.rstrip("./")
        raise RuntimeError(f"{error}\n  (key={key!r} takes what stands under it alone)") from error


def _given(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def _fitted(
    sources: Sources, view: View, own: Mapping[str, Tensor], wanted: Mapping[str, Tensor], config: ViTConfig,
    target: ViTConfig, mode: str,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    new_head = config.num_classes != target.num_classes
    like = next((value.dtype for value in view.values() if value.is_floating_point()), torch.get_default_dtype())
    for name, weight in converted(sources, view, config, own):
        if name in wanted and not (name in HEADS and new_head):
            yield name, _resized(name, weight, config, target, mode)
    for name in HEADS:
        if name in wanted and new_head:
            yield name, torch.zeros(wanted[name].shape, dtype=like, device="cpu")


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


def _resized(name: str, weight: Tensor, config: ViTConfig, target: ViTConfig, resampling: str) -> Tensor:
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
