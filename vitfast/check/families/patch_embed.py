"""The entries of patch embedding: images of every layout and number type that its kernel reads in a way of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitfast import reference
from vitfast.check.calls import Call, Like, contiguous
from vitfast.check.families.family import Family, Results
from vitfast.check.families.rows import gradients, named_arguments
from vitfast.choose.dispatch import Config
from vitfast.ops.patch_embed import patches_of

SHARED = frozenset({"weight", "bias", "pos_embed", "prefix", "mean", "std"})
# of the small images that a kernel is checked with, in patches
SMALL_GRID = (5, 3)


def _draw(call: Call, generator: torch.Generator) -> tuple[Any, ...]:
    return tuple(
        _in_range(name, arg, generator) if isinstance(arg, Like) else arg for name, arg in named_arguments(call).items()
    )


def _in_range(name: str, like: Like, generator: torch.Generator) -> Tensor:
    if like.dtype == torch.uint8:
        drawn = like._replace(dtype=torch.float32).draw(generator)
        return drawn.mul_(64).add_(128).clamp_(0, 255).to(torch.uint8)
    drawn = like.draw(generator)
    if name == "weight":
        return drawn.mul_(drawn[0].numel() ** -0.5)
    if name == "std":
        return drawn.abs_().add_(0.2)
    return drawn.mul_(0.5) if name != "images" else drawn


def _smaller(call: Call) -> list[Call]:
    """Three images that fill no tile: as they are, with channels last, and of uint8."""
    of = named_arguments(call)
    images, (ph, pw) = of["images"], of["weight"].shape[2:] if "weight" in of else of["patch"]
    B, C, H, W = 3, images.shape[1], SMALL_GRID[0] * ph, SMALL_GRID[1] * pw
    planar = contiguous(B, C, H, W, dtype=images.dtype)
    last = planar._replace(stride=(C * H * W, 1, W * C, C))
    vector = contiguous(C, dtype=torch.float32)
    found = [_resized(call, planar), _resized(call, last)]
    # pixels that stock operators normalise in half precision are no yardstick for rows of them
    for like in () if call.op == "image_rows" else (planar, last):
        found.append(_resized(call, like._replace(dtype=torch.uint8), mean=vector, std=vector))
    return found


def _resized(call: Call, images: Like, **more: Like) -> Call:
    of, (B, N) = named_arguments(call), (images.shape[0], SMALL_GRID[0] * SMALL_GRID[1])
    P = of["prefix"].shape[0] if of.get("prefix") is not None else 0
    changed = {"images": images, **more}
    if (positions := of.get("pos_embed")) is not None:
        before = patches_of(of["images"], of["weight"].shape[2:])
        changed["pos_embed"] = contiguous(N + positions.shape[0] - before, positions.shape[1], dtype=positions.dtype)
    if (grad := of.get("grad")) is not None:
        changed["grad"] = contiguous(B, P + N, grad.shape[2], dtype=grad.dtype)
    if "mask" in of and images.dtype == torch.uint8:
        changed["mask"] = (False, *of["mask"][1:])
    return Call(call.op, tuple((of | changed).values()))


def _normalised(images: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
    # uint8 ones come as fp64 here
    return images if mean is None else reference.normalise(images, mean, std, images.dtype)


def _embed(images, weight, bias, pos_embed, prefix, mean, std) -> Results:
    return (reference.patch_embed(_normalised(images, mean, std), weight, bias, pos_embed, prefix),)


def _embed_backward(grad, images, weight, pos_embed, prefix, mean, std, mask) -> Results:
    given = (_normalised(images, mean, std), weight, torch.zeros_like(weight[:, 0, 0, 0]), pos_embed, prefix)
    return gradients(reference.patch_embed, given, mask, (grad,))


def _rows(images, patch, dtype, mean, std, order) -> Results:
    return (reference.patch_rows(_normalised(images, mean, std), patch, order),)


def _tiles(call: Call, device: torch.device) -> Sequence[Config | None]:
    from vitfast.kernels.cuda import patch_embed

    of = named_arguments(call)
    if patch_embed.device_reasons(device):
        return [None]
    images, weight = of["images"], of["weight"]
    patches = images.shape[0] * patches_of(images, weight.shape[2:])
    return [tile.as_dict() for tile in patch_embed.configs(device, weight.dtype, patches, weight.shape[0])]


def _only_builtin(call: Call, device: torch.device) -> list[None]:
    return [None]


def _family(op: str, kernel: str, truth: Any, configs: Any = _only_builtin, **more: Any) -> Family:
    return Family(
        kernel=kernel, run=lambda *args: getattr(torch.ops.vitfast, op)(*args), truth=truth, smaller=_smaller,
        configs=configs, draw=_draw, shared=SHARED, **more,
    )  # fmt: skip


def _ways(call: Call, device: torch.device) -> Sequence[Config | None]:
    from vitfast.kernels.cuda import patch_embed

    of = named_arguments(call)
    if patch_embed.device_reasons(device):
        return [None]
    return patch_embed.gradient_configs(device, of["weight"].dtype)


PATCH_EMBED: dict[str, Family] = {
    "patch_embed": _family("patch_embed", "patch_embed", _embed, _tiles),
    "image_rows": _family("image_rows", "patch_embed", _rows),
    "patch_embed_backward": _family(
        "patch_embed_backward",
        "patch_embed_backward",
        _embed_backward,
        _ways,
        grad=True,
        sums=frozenset({1, 2, 3, 4}),
    ),
}
