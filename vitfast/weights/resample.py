"""Position embeddings on another grid, and projections of another patch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.choose.exportable import exporting

# how a library resamples positions -> what torch's interpolate is told
MODES: dict[str, dict[str, Any]] = {
    "timm": {"mode": "bicubic", "antialias": True},
    "hf": {"mode": "bicubic"},
    "dinov2": {"mode": "bicubic"},
    "torchvision": {"mode": "bicubic", "align_corners": True},
    "google": {"mode": "bilinear", "align_corners": True},
    "bilinear": {"mode": "bilinear", "antialias": True},
}


def resample_pos_embed(
    pos_embed: Tensor,
    new_grid: tuple[int, int],
    old_grid: tuple[int, int],
    num_prefix: int = 0,
    *,
    mode: str = "timm",
) -> Tensor:
    """Resample learned positions from one grid of patches to another, in fp32, as one of the libraries does.

    Args:
        pos_embed: [1, P + h * w, D], prefix positions first; those are kept as they are.
        new_grid, old_grid: (rows, columns). Both are needed: 2 x 8 and 4 x 4 have the same number of patches.
        num_prefix: P.
        mode: one of `MODES`.
            'timm': bicubic with a low-pass filter where the grid shrinks; also DINOv2's models with registers.
            'hf': bicubic without the filter; Hugging Face's ViT, DeiT and DINOv2, MAE and DeiT's own code.
            'dinov2': bicubic without the filter, at a scale of (size + 0.1) / old size; DINO's and DINOv2's own code.
            'torchvision': bicubic with aligned corners, of square grids only, as its `interpolate_embeddings`.
            'google': bilinear with aligned corners; scipy.ndimage.zoom of order 1.
            'bilinear': bilinear with a low-pass filter where the grid shrinks; jax.image.resize.

    Returns:
        [1, P + rows * columns, D] in the same dtype; `pos_embed` itself where the grids are equal.

    Raises:
        ValueError: another mode, pos_embed has not P + h * w rows, or a grid that is not square for 'torchvision'.
    """
    rows, columns = old_grid
    if mode not in MODES:
        raise ValueError(f"resample_pos_embed: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if pos_embed.shape[1] != num_prefix + rows * columns:
        raise ValueError(
            f"resample_pos_embed: pos_embed must be [1, {num_prefix + rows * columns}, D] for {num_prefix} prefix "
            f"tokens and a {rows}x{columns} grid, got {list(pos_embed.shape)}"
        )
    export = exporting()
    # an exported program serves all sizes, so it must not be told that this one needs no resampling
    if not export and tuple(new_grid) == tuple(old_grid):
        return pos_embed
    if mode == "torchvision" and (rows != columns or new_grid[0] != new_grid[1]):
        raise ValueError(
            f"resample_pos_embed: mode='torchvision' takes square grids as torchvision does, got {rows}x{columns} to "
            f"{new_grid[0]}x{new_grid[1]}; another mode takes any"
        )
    prefix, grid = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    grid = grid if grid.dtype is torch.float64 else grid.float()
    grid = grid.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    if torch.compiler.is_compiling() and not export:
        grid = _interpolate_by_products(grid, new_grid, MODES[mode])
    elif mode == "dinov2":
        scale = [(new + 0.1) / old for new, old in zip(new_grid, old_grid, strict=True)]
        grid = F.interpolate(grid, scale_factor=scale, **MODES[mode])
    else:
        grid = F.interpolate(grid, size=tuple(new_grid), **MODES[mode])
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([prefix, grid], dim=1) if num_prefix else grid


@torch.no_grad()
def adapt_input_channels(weight: Tensor, channels: int) -> Tensor:
    """Patch projection for images of another number of channels, as timm makes it.

    For one channel the sum over all; otherwise the channels over and over, scaled by old / new, so that a constant
    image gives the same tokens where the new number is a multiple.

    Args:
        weight: [D, C, height, width].

    Returns:
        [D, channels, height, width], computed in fp32, in the dtype of `weight`.
    """
    C, wide = weight.shape[1], weight if weight.dtype is torch.float64 else weight.float()
    if channels == 1:
        return wide.sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = wide.repeat(1, -(-channels // C), 1, 1)[:, :channels]
    return (repeated * (C / channels)).to(weight.dtype)


@torch.no_grad()
def resample_patch_embed(weight: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Projection of another patch that gives, of an image resized with the patch, the tokens that `weight` gave.

    That is exact where the patch grows, and the nearest in the least squares sense where it shrinks (Beyer et al.,
    "FlexiViT", 2023, section 3.4: the pseudoinverse of the transposed matrix of the bicubic resize, here with a
    low-pass filter, as timm's).

    Args:
        weight: [D, C, height, width].

    Returns:
        [D, C, *patch_size], computed in fp32, in the dtype of `weight`.
    """
    (h, w), (rows, columns) = weight.shape[2:], patch_size
    pixels = torch.eye(h * w, device=weight.device).view(-1, 1, h, w)
    resize = F.interpolate(pixels, size=(rows, columns), mode="bicubic", antialias=True).flatten(1)
    resampled = weight.float().flatten(2) @ torch.linalg.pinv(resize).T
    return resampled.view(*weight.shape[:2], rows, columns).to(weight.dtype)


def _interpolate_by_products(grid: Tensor, size: tuple[int, int], how: dict[str, Any]) -> Tensor:
    """The same interpolation as two matrix products: inductor (torch 2.11) fails on the gradient of the other form
    where the size is symbolic, which it is when images of several sizes are trained on.
    """
    for dim, (old, new) in enumerate(zip(grid.shape[2:], size, strict=True)):
        with torch.no_grad():
            unit = torch.eye(old, dtype=grid.dtype, device=grid.device)[None, None]
            weights = F.interpolate(unit, size=(new, old), **how)[0, 0]
        grid = torch.einsum("nr,bdrc->bdnc" if dim == 0 else "nc,bdrc->bdrn", weights, grid)
    return grid
