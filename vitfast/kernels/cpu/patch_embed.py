"""Images to rows of pixels, or to tokens, by the C++ kernels of csrc/cpu/patch_rows.h and patch_embed.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitfast.kernels.cpu.arguments import DTYPES, FLOATS, PATCH_ORDERS, describe, kernels, must_fit
from vitfast.kernels.cpu.linear import PackedWeight


def patch_rows(
    images: Tensor,
    patch_size: tuple[int, int],
    *,
    order: str = "chw",
    dtype: torch.dtype = torch.float32,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    prefix: int = 0,
    pad: bool = False,
    out: Tensor | None = None,
    using: Any = None,
) -> Tensor:
    """Images -> rows of pixels for the patch projection, `reference.patch_rows` in one pass.

    Args:
        images: [B, C, H, W] of any strides, in a dtype of DTYPES.
        patch_size: ph, pw.
        order: of the pixels in a row, 'chw' as conv weights [D, C, ph, pw] flatten, or 'hwc'.
        dtype: of the rows, one of FLOATS.
        mean, std: [C], for uint8 images, which become (images / 255 - mean) / std; without, they become 0 to 255.
        prefix: rows of zeros in front of each image's patches.
        pad: zeros, after the normalisation, at right and bottom where the patch does not divide the image.
        out: where to write the rows, contiguous.
        using: kernels of another instruction set than this CPU's best.

    Returns:
        [B, prefix + N, C * ph * pw], N = ceil(H / ph) * ceil(W / pw), row-major.

    Raises:
        ValueError: dtype or order is not one of these; the patch does not divide the image and pad is False; out, mean
            or std does not fit.
    """
    if images.dtype not in DTYPES or dtype not in FLOATS or order not in PATCH_ORDERS:
        raise ValueError(
            f"patch_rows: images must be one of {[str(d)[6:] for d in DTYPES]}, dtype one of "
            f"{[str(d)[6:] for d in FLOATS]} and order one of {list(PATCH_ORDERS)}, got {str(images.dtype)[6:]}, "
            f"{str(dtype)[6:]} and {order!r}"
        )
    B, C, H, W, ph, pw = _sizes("patch_rows", images, patch_size)
    if prefix < 0:
        raise ValueError(f"patch_rows: prefix must be at least 0, got {prefix}")
    if not pad and (H % ph or W % pw):
        raise ValueError(f"patch_rows: images must be a multiple of the patch {ph}x{pw} in size, got {H}x{W}")
    shape = B, prefix + -(-H // ph) * -(-W // pw), C * ph * pw
    if out is None:
        out = images.new_empty(shape, dtype=dtype)
    must_fit("patch_rows", "out", out, shape, dtype)
    scaling = _Scaling("patch_rows", images, mean, std)
    (using or kernels()).patch_rows(
        images.data_ptr(), images.shape, images.stride(), (ph, pw), prefix, PATCH_ORDERS[order], out.data_ptr(),
        *scaling.addresses, DTYPES[images.dtype], DTYPES[dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _sizes(what: str, images: Tensor, patch_size: tuple[int, int]) -> tuple[int, ...]:
    if images.dim() != 4 or not images.is_cpu or min(patch_size) < 1:
        raise ValueError(
            f"{what}: images must be [B, C, H, W] and the patch at least 1x1, got {describe(images)} and {patch_size}"
        )
    return *images.shape, *patch_size


class _Scaling:
    """What uint8 pixels are multiplied by and what is added; keeps what the addresses point to."""

    def __init__(self, what: str, images: Tensor, mean: Tensor | None, std: Tensor | None):
        self.addresses = 0, 0
        if images.dtype == torch.uint8 and mean is not None and std is not None:
            for name, t in (("mean", mean), ("std", std)):
                if t.shape != images.shape[1:2] or not t.is_cpu:
                    raise ValueError(f"{what}: {name} must be [{images.shape[1]}] to match images, got {describe(t)}")
            scale = 1 / std.double()
            self.shift = -(mean.double() * scale).float()
            self.scale = (scale / 255).float()
            self.addresses = self.scale.data_ptr(), self.shift.data_ptr()


def embed(
    images: Tensor,
    patch_size: tuple[int, int],
    weight: PackedWeight,
    positions: Tensor | None,
    prefix: Tensor | None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    using: Any = None,
) -> Tensor:
    """Images -> tokens [B, P + N, D] in the weight's dtype: prefix, and rows of pixels @ weight.T + bias + positions.

    Args:
        images, patch_size, mean, std: as in `patch_rows`, in the order chw; the patch may not divide the image, then
            there are zeros at right and bottom.
        weight: of the projection, K = C * ph * pw.
        positions: [P + N, D], contiguous, in the weight's dtype; those of prefix tokens are not looked at.
        prefix: [P, D], contiguous, in the weight's dtype, with their positions.

    Raises:
        ValueError: a tensor does not fit.
    """
    B, C, H, W, ph, pw = _sizes("embed", images, patch_size)
    P = 0 if prefix is None else len(prefix)
    tokens = P + -(-H // ph) * -(-W // pw)
    if C * ph * pw != weight.K or images.dtype not in DTYPES:
        raise ValueError(f"embed: images must have {weight.K // (ph * pw)} channels, got {C} in {images.dtype}")
    for name, t, shape in (("positions", positions, (tokens, weight.D)), ("prefix", prefix, (P, weight.D))):
        must_fit("embed", name, t, shape, weight.dtype)
    out = images.new_empty(B, tokens, weight.D, dtype=weight.dtype)
    scaling = _Scaling("embed", images, mean, std)
    weight.kernels_for("embed", using).embed(
        images.data_ptr(), images.shape, images.stride(), (ph, pw), P, PATCH_ORDERS["chw"], *scaling.addresses,
        DTYPES[images.dtype], DTYPES[weight.dtype], torch.get_num_threads(), weight.view,
        0 if positions is None else positions.data_ptr(), 0 if prefix is None else prefix.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out
