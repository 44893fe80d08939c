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
from vitfast.checkpoints.progress import Progress
from vitfast.loading.take import take
from vitfast.model.vit import ViT
from vitfast.weights.names import own_weights


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
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"load: dtype must be a floating point torch.dtype, got {dtype!r}")
    taken = take(
        source, num_classes=num_classes, image_size=image_size, patch_size=patch_size, channels=channels, grid=grid,
        resampling=resampling, as_=as_, key=key, allow_pickle=allow_pickle, **fields,
    )  # fmt: skip
    with torch.device("meta"):
        model = ViT.from_config(taken.config)
    model = model.to(dtype or torch.get_default_dtype()).to_empty(device=device or torch.get_default_device())
    places, bad = own_weights(model), list[str]()
    total = sum(place.nbytes for place in places.values())
    with torch.no_grad(), Progress(f"loading {taken.report.source}", total) as progress:
        for name, weight in taken.weights:
            bad += not_finite({name: weight})
            places[name].copy_(weight)
            progress.add(places[name].nbytes)
    if bad:
        warnings.warn(f"load: {taken.report.source} has NaN or Inf in {', '.join(bad)}", stacklevel=2)
    model.load_report = replace(taken.report, not_finite=tuple(bad))
    model.pretrained_cfg = model.default_cfg = taken.report.pretrained_cfg(taken.config)
    return model.eval()
