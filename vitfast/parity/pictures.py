"""Images from files, for both models the same tensors."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP")
# of a file, looked at before anything is decoded
PIXELS = 64_000_000


def image_of(
    path: str | os.PathLike[str], size: tuple[int, int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Normalised pixels [C, H, W]: turned as its EXIF says, resized to cover the size, cropped at the centre.

    Transparent pixels are white. 16 bits are divided by 257.

    Raises:
        ValueError: no picture in one of `FORMATS`, one of too many pixels, of several frames, or of another mode.
        ModuleNotFoundError: Pillow is not there.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ModuleNotFoundError("--image needs Pillow: pip install pillow") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(path, formats=FORMATS)
        width, height = picture.size
        if width * height > PIXELS:
            raise ValueError(f"{os.fspath(path)} must have at most {PIXELS} pixels, got {width}x{height}")
        if getattr(picture, "n_frames", 1) > 1:
            raise ValueError(f"{os.fspath(path)} must be one picture, got {picture.n_frames} frames")
        picture.load()
        picture = ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{os.fspath(path)} must be a picture as {', '.join(FORMATS)}: {error}") from error
    channels, rows, columns = size
    if channels not in (1, 3):
        raise ValueError(f"--image takes models of 1 or 3 channels, got {channels}")
    picture = _plain(picture, "L" if channels == 1 else "RGB")
    picture = ImageOps.fit(picture, (columns, rows), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(rows, columns, channels)
    m, s = (torch.tensor(each[:channels]).view(-1, 1, 1) for each in (mean, std))
    return (pixels.permute(2, 0, 1).float() / 255 - m) / s


def _plain(picture: Any, mode: str) -> Any:
    from PIL import Image

    if picture.mode.startswith("I"):
        picture = picture.point(lambda value: value / 257).convert("L")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    if picture.mode not in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise ValueError(f"--image takes grey, RGB, palette and CMYK pictures, got mode {picture.mode}")
    return picture.convert(mode)
