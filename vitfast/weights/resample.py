"""Position embeddings on another grid, and projections of another patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.choose.exportable import exporting


def resample_pos_embed(
    pos_embed: Tensor,
    new_grid: tuple[int, int],
    old_grid: tuple[int, int],
    num_prefix: int = 0,
    *,
    antialias: bool = True,
) -> Tensor:
    """Resample learned positions from one grid of patches to another by 2-D bicubic interpolation, in fp32.

    Args:
        pos_embed: [1, P + h * w, D], prefix positions first; those are kept as they are.
        new_grid, old_grid: (rows, columns). Both are needed: 2 x 8 and 4 x 4 have the same number of patches.
        num_prefix: P.
        antialias: low-pass filter when the grid shrinks. True in timm, False in Hugging Face's ViT.

    Returns:
        [1, P + rows * columns, D] in the same dtype; `pos_embed` itself where the grids are equal.

    Raises:
        ValueError: pos_embed has not P + h * w rows.
    """
    rows, columns = old_grid
    if pos_embed.shape[1] != num_prefix + rows * columns:
        raise ValueError(
            f"resample_pos_embed: pos_embed must be [1, {num_prefix + rows * columns}, D] for {num_prefix} prefix "
            f"tokens and a {rows}x{columns} grid, got {list(pos_embed.shape)}"
        )
    export = exporting()
    # an exported program serves all sizes, so it must not be told that this one needs no resampling
    if not export and tuple(new_grid) == tuple(old_grid):
        return pos_embed
    prefix, grid = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    grid = grid.float().reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    if torch.compiler.is_compiling() and not export:
        grid = _interpolate_by_products(grid, new_grid, antialias)
    else:
        grid = F.interpolate(grid, size=tuple(new_grid), mode="bicubic", antialias=antialias)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([prefix, grid], dim=1) if num_prefix else grid


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


def _interpolate_by_products(grid: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    """The same interpolation as two matrix products: inductor (torch 2.11) fails on the gradient of the other form
    where the size is symbolic, which it is when images of several sizes are trained on.
    """
    for dim, (old, new) in enumerate(zip(grid.shape[2:], size, strict=True)):
        with torch.no_grad():
            unit = torch.eye(old, dtype=grid.dtype, device=grid.device)[None, None]
            weights = F.interpolate(unit, size=(new, old), mode="bicubic", antialias=antialias)[0, 0]
        grid = torch.einsum("nr,bdrc->bdnc" if dim == 0 else "nc,bdrc->bdrn", weights, grid)
    return grid
