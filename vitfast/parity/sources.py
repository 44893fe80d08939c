"""Models from what a command line says of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitfast.loading.create import create_model
from vitfast.loading.load import load
from vitfast.parity.chain import Outside
from vitfast.parity.oracle import onnx_model
from vitfast.timm_names import pretrained_cfg as cfgs
from vitfast.timm_names.variants import VARIANTS
from vitfast.weights.layouts.hugging_face import preprocessing_of

FORMS = "vitfast:NAME, timm:NAME, torchvision:NAME, hf:FOLDER, a folder of transformers, a file of weights, FILE.onnx"


def model_of(
    text: str, *, as_: str | None = None, pretrained: bool = False, taps: Mapping[str, str] | None = None,
    seed: int = 0, **fields: Any,
) -> nn.Module | Outside:  # fmt: skip
    """The model that `text` names, see `FORMS`; of a name alone with random weights (`same_weights`).

    Args:
        as_: the layout of a file of weights, see `vitfast.load`.
        pretrained: timm's own weights under a timm name, from its cache or downloaded.
        taps: of an ONNX file, see `onnx_model`.
        seed: of random weights.
        **fields: of `vitfast.load`, for a file of weights.

    Raises:
        ValueError: nothing of the kind, or as the library that it is of.
        ModuleNotFoundError: that library is not there.
        FileNotFoundError: no such file.
    """
    kind, _, name = text.partition(":")
    torch.manual_seed(seed)
    if kind == "vitfast" and name in VARIANTS:
        return create_model(name)
    if kind == "timm":
        return _library("timm").create_model(name, pretrained=pretrained)
    if kind == "torchvision":
        return _torchvision(name)
    if kind == "hf":
        return _hugging_face(Path(name))
    path = Path(name if kind == "vitfast" else text)
    if path.suffix == ".onnx":
        return onnx_model(path, taps)
    if kind != "vitfast" and path.is_dir() and "model_type" in _json(path / "config.json"):
        return _hugging_face(path)
    if path.exists() or text.startswith("hf-hub:"):
        return load(text if text.startswith("hf-hub:") else path, as_=as_, allow_pickle=True, **fields)
    raise ValueError(f"a model must be given as {FORMS}; got {text!r}")


def is_name(text: str) -> bool:
    """Whether a model of this text has random weights, so that it can take the other one's."""
    kind, _, name = text.partition(":")
    return (kind == "vitfast" and name in VARIANTS) or kind in ("timm", "torchvision")


def same_weights(model: nn.Module, other: nn.Module) -> None:
    """Give `model`, which is ours or timm's, the weights of `other`.

    Raises:
        ValueError: they do not fit, or it is a model of another library.
    """
    try:
        weights = load(other).state_dict()
        if not hasattr(model, "patch_embed"):
            raise ValueError("only models of vitfast and timm take the other one's weights; name it first")
        model.load_state_dict(weights)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ValueError(f"the other model's weights do not fit: {error}") from error


def _library(name: str) -> Any:
    try:
        if name == "timm":
            import timm as found
        elif name == "torchvision":
            import torchvision as found  # type: ignore[no-redef]
        else:
            import transformers as found  # type: ignore[no-redef]
    except ImportError as error:
        raise ModuleNotFoundError(f"a model of {name} needs {name}: pip install {name}") from error
    return found


def _torchvision(name: str) -> nn.Module:
    models = _library("torchvision").models
    if name not in models.list_models(models):
        raise ValueError(f"torchvision has no model {name!r}")
    model = models.get_model(name, weights=None)
    # as its pretrained weights are used
    model.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    model.pretrained_cfg |= {"interpolation": "bilinear", "input_size": (3, model.image_size, model.image_size)}
    return model


def _hugging_face(folder: Path) -> nn.Module:
    transformers = _library("transformers")
    config = _json(folder / "config.json")
    name = (config.get("architectures") or [None])[0]
    if name is None or not hasattr(transformers, name):
        raise ValueError(f"{folder}/config.json must name a class of transformers as architectures, got {name!r}")
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model = getattr(transformers, name).from_pretrained(os.fspath(folder), local_files_only=True)
    finally:
        if shown:
            bars.enable_progress_bar()
    model.pretrained_cfg = preprocessing_of(_json(folder / "preprocessor_config.json"), {})[0]
    return model


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def size_of(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of its images.

    Raises:
        ValueError: it does not say.
    """
    stem = getattr(model, "patch_embed", None)
    size, channels = getattr(stem, "img_size", None), getattr(getattr(stem, "proj", None), "in_channels", 3)
    if size is None and hasattr(model, "config"):
        size, channels = getattr(model.config, "image_size", None), getattr(model.config, "num_channels", 3)
    size = getattr(model, "image_size", None) if size is None else size
    if size is None and "input_size" in (getattr(model, "pretrained_cfg", None) or {}):
        channels, *size = model.pretrained_cfg["input_size"]
    if size is None:
        raise ValueError("the size of its images is not known: give it with --size")
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def statistics_of(model: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of its images; ImageNet's where nobody knows."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    get = cfg.get if hasattr(cfg, "get") else lambda name, default: getattr(cfg, name, default)
    return tuple(get("mean", cfgs.DEFAULTS["mean"])), tuple(get("std", cfgs.DEFAULTS["std"]))
