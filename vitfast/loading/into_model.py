"""`load_checkpoint`: weights of a file into a model that is there."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from operator import methodcaller

import torch
from torch import Tensor, nn

from vitfast.checkpoints.checkpoint import unwrapped
from vitfast.checkpoints.dtypes import check_dtypes
from vitfast.checkpoints.not_finite import warn_not_finite
from vitfast.config import ViTConfig
from vitfast.loading.recognise import Recognised, described, recognise
from vitfast.loading.report import LoadReport
from vitfast.loading.source import Source, source_of
from vitfast.model.vit import ViT
from vitfast.weights.hints import prefixes
from vitfast.weights.layouts.layout import Facts, NeedsArgument, converted, sources_of
from vitfast.weights.names import own_weights, rename_keys, without_wrappers
from vitfast.weights.resample import resample_pos_embed
from vitfast.weights.state_dict import load_most

# layouts whose names `ViT.load_state_dict` takes
OWN = ("timm", "vit-pytorch")
# what a model computes and weights do not show
SILENT = ("activation", "norm_eps", "heads", "pool", "pool_prefix", "norm_after_pool")


def load_checkpoint(
    model: ViT,
    source: str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module,
    *,
    strict: bool = True,
    allow_pickle: bool = False,
    key: str | None = None,
    num_classes: int | None = None,
    resampling: str | None = None,
    as_: str | None = None,
) -> ViT:
    """Load weights of any layout that `load` knows into a model that is there.

    Positions of another image size are resampled to the model's grid. The file's own config says from which grid; a
    file without one is taken to have square images. Where the weights are known to be of a model with another
    activation, eps, number of heads or pooling than this one has, a warning says so. `model.load_report` says whose
    they are and which of several.

    Args:
        source: as `load`.
        strict: False loads what fits by name; that has to be half of the model or half of what is in the file.
        allow_pickle, key: as `read_checkpoint`.
        num_classes: the model's, where the weights' classifier has another size: the model's is zero then.
        resampling, as_: as `load`.

    Raises:
        RuntimeError: one error that lists every missing, unexpected and wrongly shaped key; nothing is loaded then.
        FileNotFoundError, ValueError: as `read_checkpoint`.
        TypeError: no ViT.
    """
    wrapped, model = model, unwrapped(model)
    if not isinstance(model, ViT):
        raise TypeError(f"load_checkpoint: model must be a vitfast.ViT, got {type(model).__name__}")
    if num_classes is not None and num_classes != model.num_classes:
        raise ValueError(f"load_checkpoint: num_classes must be the model's {model.num_classes}, got {num_classes}")
    found = source_of(source, allow_pickle=allow_pickle, key=key)
    state, grid, mode, report = _under_our_names(found, model, as_, resampling)
    state = _joined(state, model)
    bad = warn_not_finite(state, f"load_checkpoint: {found.name}", stacklevel=2)
    # blocks compiled or wrapped one by one
    own_names = {without_wrappers(name): name for name in own_weights(model)}
    state = rename_keys(state, lambda name: own_names.get(name, name))
    own = own_weights(model)
    floats = {name for name, weight in own.items() if weight.is_floating_point()}
    taken = {name: value for name, value in state.items() if name in floats and isinstance(value, Tensor)}
    check_dtypes(taken, f"load_checkpoint: {found.name}")
    _resample(state, model, grid, mode)
    other_head = _other_head(state, model)
    if other_head and num_classes is not None:
        state |= {name: torch.zeros_like(weight) for name, weight in other_head.items()}
    try:
        load_most(model, state) if not strict else model.load_state_dict(state)
    except RuntimeError as error:
        hint = report.why if report.why.startswith("these are weights") else ""
        if strict and other_head and num_classes is None:
            hint = f"load_checkpoint(..., num_classes={model.num_classes}) loads all but the classifier, zero then"
        if not hint:
            raise
        raise RuntimeError(f"{error}\n  ({hint})") from None
    for differs in report.changed:
        whose = report.whose
        warnings.warn(f"load_checkpoint: {whose}: {differs}: vitfast.load(source) builds theirs", stacklevel=2)
    replaced = other_head and num_classes is not None
    new_head = (f"classifier: a new one, zero, for {num_classes} classes",) if replaced else ()
    model.load_report = replace(report, changed=(*report.changed, *new_head), not_finite=tuple(bad), chosen=found.note)
    return wrapped


def _under_our_names(
    source: Source, model: ViT, as_: str | None, resampling: str | None
) -> tuple[dict[str, Tensor], tuple[int, int] | None, str, LoadReport]:
    """The weights, the grid of their positions where it is known, how these are resampled, and whose they are."""
    report = LoadReport(source.name, "", "vitfast", "by the model's own names", "", model.config)
    grid = ViTConfig(**source.facts.fields).grid_size if source.has_config else None
    try:
        found = recognise(source.state, source.facts, as_)
    except (ValueError, NotImplementedError) as error:
        if as_ is not None:
            raise
        # they may fit a model to which somebody added such a part; if not, its own error says so too
        why = str(error) if isinstance(error, NotImplementedError) else report.why
        return source.state, grid, resampling or "timm", replace(report, why=why)
    report = replace(report, layout=found.layout.name, whose=found.layout.whose, why=found.why, prefix=found.prefix)
    mode = resampling or found.layout.resampling
    if found.layout.name in OWN:
        return source.state, grid, mode, report
    config, differs = _config_of(found, source.facts, model)
    with torch.device("meta"):
        own = own_weights(ViT.from_config(config))
    sources = sources_of(found.layout, found.view, config, own)
    report = replace(report, config=config, ignored=sources.ignored, changed=(differs,) if differs else ())
    return dict(converted(sources, found.view, config, own)), config.grid_size, mode, report


def _config_of(found: Recognised, facts: Facts, model: ViT) -> tuple[ViTConfig, str]:
    """Of the weights; what they do not tell is as the model has it. And where they tell another thing, in words."""
    silent = {name: getattr(model.config, name) for name in SILENT}
    describe = functools.partial(described, found, facts)
    try:
        known = describe({})
    except NeedsArgument:
        known = describe(silent | {"image_size": model.config.image_size})
    else:
        not_told = {name: value for name, value in silent.items() if name in known.assumed}
        known = known._replace(fields=describe(not_told).fields)
    config = ViTConfig(**known.fields)
    differs = [
        f"{name}={getattr(config, name)!r}, the model has {value!r}"
        for name, value in silent.items()
        if name not in known.assumed and getattr(config, name) != value
    ]
    return config, f"weights of a model with {'; '.join(differs)}" if differs else ""


def _resample(state: dict[str, Tensor], model: ViT, grid: tuple[int, int] | None, mode: str) -> None:
    own, given = model.pos_embed, state.get("pos_embed")
    if own is None or given is None or not given.dim() == own.dim() == 3:
        return
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    if grid is None and given.shape[1] != own.shape[1]:
        grid = (math.isqrt(max(given.shape[1] - prefix, 0)),) * 2
    grid = grid or model.patch_embed.grid_size
    if prefix + grid[0] * grid[1] == given.shape[1]:
        state["pos_embed"] = resample_pos_embed(given, model.patch_embed.grid_size, grid, prefix, mode=mode)


def _other_head(state: dict[str, Tensor], model: ViT) -> dict[str, Tensor]:
    """The model's classifier, where that of the weights has another size."""
    own = {name: weight for name, weight in own_weights(model).items() if name.startswith(("head.", "head_dist."))}
    differs = any(name not in state or state[name].shape != weight.shape for name, weight in own.items())
    return own if differs and any(name.startswith("head.") for name in state) else {}


def _joined(state: dict[str, Tensor], model: ViT) -> dict[str, Tensor]:
    """A backbone under a prefix and the classifier beside it, where together they are the model and nothing else."""
    own = own_weights(model)
    for prefix in prefixes(state, own):
        joined = [key.removeprefix(prefix) for key in state]
        if len(joined) == len(own) and own.keys() == {*joined}:
            return rename_keys(state, methodcaller("removeprefix", prefix))
    return state
