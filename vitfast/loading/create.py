"""`create_model`: timm's factory, for the models that are here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, overload

import torch
from torch import nn

from vitfast.checkpoints.checkpoint import read_checkpoint
from vitfast.loading.into_model import load_checkpoint
from vitfast.model.vit import ViT
from vitfast.timm_names import pretrained_cfg as cfgs
from vitfast.timm_names.variants import config_for


@overload
def create_model(
    model_name: str, pretrained: bool = False, *, features_only: Literal[False] = False, **more: Any
) -> ViT: ...
@overload
def create_model(model_name: str, pretrained: bool = False, *, features_only: bool, **more: Any) -> nn.Module: ...
def create_model(
    model_name: str,
    pretrained: bool = False,
    pretrained_cfg: Mapping[str, Any] | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    checkpoint_path: str | os.PathLike[str] | None = "",
    cache_dir: str | os.PathLike[str] | None = None,
    scriptable: bool | None = None,
    exportable: bool | None = None,
    no_jit: bool | None = None,
    *,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    feature_cls: str | type[nn.Module] | None = None,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    **timm_keywords: Any,
) -> ViT | nn.Module:
    """Build the model that timm has under this name, freshly initialised.

    Default values are timm's: what is not given is what `timm.create_model(name)` uses.

    Args:
        model_name: a name from `list_models()`, without a pretrained tag.
        pretrained: must be False; vitfast downloads nothing.
        pretrained_cfg: entries in the place of timm's for this name; channels, classes and image size that are not
            given follow them.
        pretrained_cfg_overlay: entries that stand before those.
        checkpoint_path: weights to load into the model, as `vitfast.load_checkpoint` does; of pickled files too, as
            timm's create_model does (tensors only: nothing in the file is run).
        cache_dir, no_jit, scriptable: nothing depends on them here. Models can be traced, not scripted.
        exportable: set the model's `exportable`, which lowers it to stock operators (see `set_exportable`).
        features_only: return timm's `FeatureGetterNet` around the model, which gives maps of some blocks; needs timm.
        out_indices: of these blocks, or of the last n for an int; timm's default is 3.
        feature_cls: 'getter' or that class.
        device: where the parameters are made; torch's default device when None. 'meta' allocates nothing.
        dtype: dtype of the parameters; torch's default when None.
        **timm_keywords: see `config_for`.

    Raises:
        ValueError: an unknown name, a name with a pretrained tag, or a value that breaks a rule of ViTConfig.
        TypeError: a keyword that timm's VisionTransformer does not have, or a value of the wrong type.
        NotImplementedError: `pretrained=True`, a name in `UNSUPPORTED`, or a value that no field of ViTConfig
            stands for; the message names the keyword and the value.
        ModuleNotFoundError: features_only without timm.
    """
    if pretrained:
        raise NotImplementedError(
            f"create_model: pretrained must be False, got {pretrained!r}: vitfast downloads no weights; pass their "
            "file as checkpoint_path"
        )
    given = {keyword: value for keyword, value in timm_keywords.items() if value is not None}
    cfg = _cfg_of(model_name, pretrained_cfg, pretrained_cfg_overlay)
    if pretrained_cfg or pretrained_cfg_overlay:
        timm_keywords = _sizes_of(cfg) | given
    config = config_for(model_name, **timm_keywords)
    with torch.device(device) if device is not None else nullcontext():
        model = ViT.from_config(config)
    model.pretrained_cfg = model.default_cfg = cfg
    model.exportable = bool(exportable)
    model._record(**given)
    if dtype is not None:
        model = model.to(dtype)
    if not features_only:
        return load_checkpoint(model, checkpoint_path, allow_pickle=True) if checkpoint_path else model
    getter = _features_of(model, 3 if out_indices is None else out_indices, feature_cls)
    if checkpoint_path:
        _load_features(model, checkpoint_path)
    asked = {"features_only": True, "out_indices": out_indices, "feature_cls": feature_cls}
    getter._model_args = given | {name: value for name, value in asked.items() if value is not None}
    return getter


def _cfg_of(model_name: str, given: Mapping | None, overlay: Mapping | None) -> dict[str, Any]:
    if given:
        cfg = cfgs.DEFAULTS | {"architecture": model_name} | cfgs.checked("pretrained_cfg", given)
    else:
        # the size is the one that the weights were trained at, as in timm
        own = config_for(model_name)
        size: Any = own.image_size
        cfg = cfgs.pretrained_cfg(model_name, size, own.num_classes)
    return cfg | (cfgs.checked("pretrained_cfg_overlay", overlay) if overlay else {})


def _sizes_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that follow from the entries, as in timm."""
    sizes = {"num_classes": cfg["num_classes"]} if cfg.get("num_classes", -1) >= 0 else {}
    if cfg.get("input_size") is not None:
        sizes |= {"in_chans": cfg["input_size"][0]}
        sizes |= {"img_size": tuple(cfg["input_size"][1:])} if cfg.get("fixed_input_size") else {}
    return sizes


def _load_features(model: ViT, path: str | os.PathLike[str]) -> None:
    """Load what the pruned model has; the file may be of the whole one, or of what features_only returned."""
    missing = sorted(model.state_dict().keys() - read_checkpoint(path, allow_pickle=True).keys())
    if missing:
        raise RuntimeError(f"create_model: checkpoint_path lacks {', '.join(missing)} of the model for features_only")
    load_checkpoint(model, path, strict=False, allow_pickle=True)


def _features_of(model: ViT, out_indices: int | Sequence[int], feature_cls: Any) -> Any:
    try:
        from timm.models._features import FeatureGetterNet
    except ImportError as error:
        raise ModuleNotFoundError(
            "create_model: features_only=True returns timm's FeatureGetterNet, and timm is not installed: pip install "
            "timm, or use model.forward_intermediates"
        ) from error
    if feature_cls not in (None, "getter", FeatureGetterNet):
        raise NotImplementedError(
            f"create_model: feature_cls={feature_cls!r} is not supported, only 'getter', timm's for these models"
        )
    getter: Any = FeatureGetterNet(model, out_indices)  # type: ignore[arg-type]  # timm takes lists
    getter._traits, getter.in_chans = model._traits, model.in_chans
    without = ("num_classes", "classifier")
    cfg = {name: entry for name, entry in model.pretrained_cfg.items() if name not in without}
    getter.pretrained_cfg = getter.default_cfg = cfg
    return getter
