"""Images to tokens against everybody's way to compute it."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast import ops, reference
from vitfast.bench import work
from vitfast.bench.case import Case, Tensors
from vitfast.bench.compilers import compiled
from vitfast.bench.factory import dtype_of, one_of, positive, recorded
from vitfast.bench.op_case import Draw, Way, op_case

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@recorded
def patch_embed(
    *, batch: int, size: int, patch: int, width: int, images: str = "float", mode: str = "forward",
    dtype: str = "bf16", device: str = "cpu",
) -> Case:  # fmt: skip
    """Images to tokens with positions and a class token in front; the backward is that of the parameters.

    Args:
        images: 'float' (normalised, [B, 3, H, W] in `dtype`) or 'uint8' (rows of pixels as a decoder leaves them).
    """
    positive(batch=batch, size=size, patch=patch, width=width)
    raw = one_of("images", images, ("float", "uint8")) == "uint8"
    if size % patch:
        raise ValueError(f"size must be a multiple of patch={patch}, got {size}")
    to, tokens = dtype_of(dtype), 1 + (size // patch) ** 2

    def draw_inputs(draw: Draw) -> Tensors:
        pixels = 3 * patch * patch
        weight = draw(width, 3, patch, patch, scale=pixels**-0.5)
        given = draw(width, scale=0.1), draw(tokens, width, scale=0.5), draw(1, width, scale=0.5)
        if raw:
            decoded = draw.integers(256, batch, size, size, 3).to(torch.uint8).permute(0, 3, 1, 2)
            return decoded, weight, *given, draw.constant(MEAN), draw.constant(STD)
        x, last = draw(batch, 3, size, size), {"memory_format": torch.channels_last}
        return x, weight, *given, x.contiguous(**last), weight.contiguous(**last)

    def to_tokens(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, prefix: Tensor) -> Tensor:
        x = F.conv2d(x, weight, bias, stride=patch).flatten(2).transpose(1, 2)
        return torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1) + positions

    def stock(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, prefix: Tensor, *rest: Tensor) -> Tensor:
        if raw:
            mean, std = (t[:, None, None] for t in rest)
            x = x.float().div_(255).sub_(mean).div_(std).to(to)
        return to_tokens(x, weight, bias, positions, prefix)

    def one_pass(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, prefix: Tensor, *rest: Tensor) -> Tensor:
        mean, std = (t[:, None, None] for t in rest)
        x = torch.addcmul(-mean / std, x, 1 / (255 * std))
        return to_tokens(x.to(to), weight, bias, positions, prefix)

    def last(
        x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, prefix: Tensor, x_last: Tensor, weight_last: Tensor
    ) -> Tensor:
        return to_tokens(x_last, weight_last, bias, positions, prefix)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, prefix: Tensor, *rest: Tensor) -> Tensor:
        mean, std = rest if raw else (None, None)
        return ops.patch_embed(x, weight, bias, pos_embed=positions, prefix=prefix, mean=mean, std=std)

    def truth(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, prefix: Tensor, *rest: Tensor) -> Tensor:
        if raw:
            x = reference.normalise(x, *rest, torch.float64)
        return reference.patch_embed(x, weight, bias, positions, prefix)

    more = {"conv2d mul and add": Way(lambda: one_pass)}
    if not raw:
        more = {"conv2d channels_last": Way(lambda: last, leaves=(6, 2, 3, 4))}
    shape = {"size": size, "patch": patch, "width": width}
    return op_case(
        f"patch_embed {images}", shape, batch, mode, dtype, device, draw_inputs,
        images=(True,) + (False,) * 6 if raw else (True, False, False, False, False, True, False),
        results=((batch, tokens, width),), leaves=(1, 2, 3, 4), truth=truth,
        ways={
            "conv2d": Way(lambda: stock),
            "vitfast": Way(lambda: ours),
            **more,
            "compiled": Way(lambda: compiled(stock)),
        },
        count=partial(
            work.patch_embed, batch, (size, size), (patch, patch), 3, width, dtype,
            image_dtype="uint8" if raw else None, prefix=1,
        ),
        notes={} if raw else {"left_out": "conv2d channels_last: images and weight are channels last from the start"},
    )  # fmt: skip
