"""How far a model's stages are from timm's, measured against timm in fp64."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitfast.check.acceptance import RMS_RATIO, rms_bound


@dataclass(frozen=True)
class StageRow:
    """Errors of one stage against fp64: ours and timm's, both computed in the same dtype from the same weights.

    Attributes:
        stage: the name `ViT.intermediates` gives it.
        max_abs_err: largest absolute error.
        rel_rms_err: root mean square of the error over that of the fp64 value.
        timm_max_abs_err, timm_rel_rms_err: the same for timm.
        allowed_rel_rms_err: by clause C of `acceptance.accept`, with timm's error for that of stock operators.
    """

    stage: str
    max_abs_err: float
    rel_rms_err: float
    timm_max_abs_err: float
    timm_rel_rms_err: float
    allowed_rel_rms_err: float

    @property
    def passed(self) -> bool:
        return self.rel_rms_err <= self.allowed_rel_rms_err


def compare(model: nn.Module, timm_model: nn.Module, images: Tensor, dtype: torch.dtype) -> list[StageRow]:
    """Run both models in `dtype` and compare every stage of both with timm's in fp64.

    The reference starts from weights and images already rounded to `dtype`: what is compared is the arithmetic, and
    rounding the weights, which is the same for both, does not hide it. The models given stay as they are.

    Args:
        model: a vitfast model; timm_model: timm's, with the same weights.
        images: [B, C, H, W] on the device to compare on.
        dtype: torch.float32, torch.float16 or torch.bfloat16.

    Raises:
        ValueError: another dtype, or the models have different stages or shapes of stages.
    """
    if dtype not in RMS_RATIO:
        raise ValueError(f"compare: dtype must be one of {', '.join(map(str, RMS_RATIO))}, got {dtype}")
    images = images.to(dtype)
    ours, theirs = (copy.deepcopy(m).to(images.device, dtype).eval() for m in (model, timm_model))
    with torch.inference_mode():
        out = ours.intermediates(images)
        low = timm_intermediates(theirs, images)
        ref = timm_intermediates(theirs.double(), images.double())
    shapes, expected = ({k: list(v.shape) for k, v in taps.items()} for taps in (out, ref))
    if shapes != expected:
        wrong = sorted(shapes.keys() ^ expected.keys()) or [k for k in shapes if shapes[k] != expected[k]]
        raise ValueError(f"compare: model and timm_model must have the same stages, these differ: {', '.join(wrong)}")
    rows = []
    for stage, exact in ref.items():
        max_abs, rel_rms = errors(out[stage], exact)
        timm_max_abs, timm_rel_rms = errors(low[stage], exact)
        rows.append(StageRow(stage, max_abs, rel_rms, timm_max_abs, timm_rel_rms, rms_bound(timm_rel_rms, 1.0, dtype)))
    return rows


def timm_intermediates(timm_model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """timm's values at the stages of `ViT.intermediates`, read by hooks that are gone afterwards."""
    taps: dict[str, Tensor] = {}
    handles = []

    def tap_input(name: str, module: nn.Module) -> None:
        handles.append(module.register_forward_pre_hook(lambda _, args: taps.__setitem__(name, args[0])))

    def tap_output(name: str, module: nn.Module) -> None:
        handles.append(module.register_forward_hook(lambda _, args, out: taps.__setitem__(name, out)))

    try:
        tap_input("patch_tokens", timm_model.blocks[0])
        for i, block in enumerate(timm_model.blocks):
            tap_input(f"blocks.{i}.attn", block.norm2)
            tap_output(f"blocks.{i}.mlp", block)
        tap_output("tokens", timm_model.norm)
        tap_input("pooled", timm_model.head)
        taps["logits"] = timm_model(images)
    finally:
        for handle in handles:
            handle.remove()
    return taps


def errors(value: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest absolute error, and root mean square error relative to `exact` in fp64."""
    error = value.double() - exact
    rms, scale = error.square().mean().sqrt(), exact.square().mean().sqrt()
    # where zeros are right, zeros have no error and anything else has an infinite one
    relative = rms / scale if scale else torch.where(rms == 0, 0.0, torch.inf)
    return error.abs().max().item(), relative.item()


def worst_by_kind(rows: Iterable[StageRow]) -> list[StageRow]:
    """One row for all blocks' attention and one for all blocks' MLPs: the one that uses up most of what it may."""
    worst: dict[str, StageRow] = {}
    for row in rows:
        kind = re.sub(r"^blocks\.\d+\.", "blocks.*.", row.stage)
        if kind not in worst or _used(row) > _used(worst[kind]):
            worst[kind] = row
    return list(worst.values())


def _used(row: StageRow) -> float:
    share = row.rel_rms_err / row.allowed_rel_rms_err
    return float("inf") if share != share else share
