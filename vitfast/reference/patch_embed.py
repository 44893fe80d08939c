"""From images to tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_rows(images: Tensor, patch: tuple[int, int], order: str = "chw") -> Tensor:
    """Images [B, C, H, W] -> patch rows [B, N, C * ph * pw], row-major over the grid, in the given pixel order."""
    B, C, H, W = images.shape
    ph, pw = patch
    x = images.reshape(B, C, H // ph, ph, W // pw, pw)
    x = x.permute(0, 2, 4, 1, 3, 5) if order == "chw" else x.permute(0, 2, 4, 3, 5, 1)
    return x.reshape(B, (H // ph) * (W // pw), C * ph * pw)


def normalise(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images -> (images / 255 - mean) / std per channel."""
    x = images.to(dtype) / 255
    return (x - mean.to(dtype).view(-1, 1, 1)) / std.to(dtype).view(-1, 1, 1)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Images [B, C, H, W] -> tokens [B, P + N, D]: cut, project, add positions, put the prefix tokens first.

    weight [D, C, ph, pw]; prefix [P, D]; pos_embed [P + N, D] adds to all tokens, [N, D] to the patches only.
    uint8 images are divided by 255 and normalised with mean and std [C].
    """
    if images.dtype == torch.uint8:
        if mean is None or std is None:
            raise ValueError("patch_embed: uint8 images need mean and std, got None")
        images = normalise(images, mean, std, weight.dtype)
    D, _, ph, pw = weight.shape
    x = F.linear(patch_rows(images, (ph, pw)), weight.reshape(D, -1), bias)
    return with_prefix(x, pos_embed, prefix)


def with_prefix(x: Tensor, pos_embed: Tensor | None, prefix: Tensor | None) -> Tensor:
    """Patch tokens [B, N, D] -> [B, P + N, D] with the prefix in front and positions added.

    Positions are added to the patches, and to the prefix too where there is a position for it.
    """
    tokens = x
    if pos_embed is not None and pos_embed.shape[0] == x.shape[1]:
        tokens, pos_embed = x + pos_embed, None
    if prefix is not None:
        tokens = torch.cat([prefix.expand(x.shape[0], -1, -1), tokens], dim=1)
    return tokens if pos_embed is None else tokens + pos_embed
