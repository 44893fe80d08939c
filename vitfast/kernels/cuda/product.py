"""Starts the product by turns of csrc/cuda/product.cuh, by `vitfast._C.cuda`: one that nobody has measured.

It is offered to `vitfast tune` and the sweep beside the configurations of the Triton kernel, and is no built-in choice.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vitfast.choose.config_tables import Product
from vitfast.kernels.cpu.arguments import DTYPES
from vitfast.kernels.cuda import patch_embed
from vitfast.kernels.extension import DoesNotFit

ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2}
# numbers of 16 bytes, at whose multiples rows begin
UNIT = 8
MOST = 1 << 30


@functools.cache
def _tiles() -> dict[tuple[int, int], tuple[int, int]]:
    """Number and stages by rows and columns."""
    found = patch_embed.functions().product_tiles()
    return {(rows, columns): (number, stages) for number, (rows, columns, stages) in enumerate(found)}


def device_reasons(device: torch.device) -> list[str]:
    """What keeps the kernel from running on this device; empty where nothing does."""
    reasons = list(patch_embed.device_reasons(device))
    if not reasons and patch_embed.code_of(device) not in ("sm_90a", "host"):
        reasons.append("not compute capability 9.0, or built without sm_90a (VITFAST_CUDA_ARCHS)")
    return reasons


def configs(device: torch.device) -> list[Product]:
    """A configuration for each tile; none where the kernel cannot run."""
    if device_reasons(device):
        return []
    return [
        Product("turns", rows, columns, 64, warps=12, stages=stages, descriptors=True, persistent=True)
        for (rows, columns), (_, stages) in _tiles().items()
    ]


def why_not(x: Tensor, weight: Tensor, act: str) -> list[str]:
    """What keeps the kernel from multiplying these rows [M, K] with a weight [N, K]; empty where nothing does."""
    reasons = device_reasons(x.device)
    if weight.dtype not in patch_embed.HALVES or x.dtype != weight.dtype:
        reasons.append(f"x in {str(x.dtype)[6:]} and a weight in {str(weight.dtype)[6:]} (fp16 or bf16, both the same)")
    if act not in ACTIVATIONS:
        reasons.append(f"activation {act!r} ({', '.join(ACTIVATIONS)} only)")
    for name, t in (("x", x), ("weight", weight)):
        if t.shape[0] > 1 and (t.stride(0) % UNIT or t.stride(0) < t.shape[1]):
            reasons.append(f"rows of {name} {t.stride(0)} apart (a multiple of {UNIT}, at least {t.shape[1]})")
        if t.data_ptr() % 16 or t.stride(1) != 1 or max(t.shape) >= MOST:
            reasons.append(f"{name} that begins between multiples of 16 bytes, has gaps in its rows or 2^30 of them")
    if weight.shape[0] % UNIT:
        reasons.append(f"{weight.shape[0]} columns (a multiple of {UNIT} only)")
    return reasons


def _must_fit(like: Tensor, name: str, t: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse a tensor that the kernel would read beside its memory: CUDA cannot see how long that is."""
    if t is None:
        return
    if tuple(t.shape) != shape or t.dtype is not torch.float32 or t.device != like.device or not t.is_contiguous():
        raise DoesNotFit(
            f"product: {name} must be {list(shape)} in float32 on {like.device}, contiguous, got {list(t.shape)} in "
            f"{str(t.dtype)[6:]} on {t.device}"
        )


def product(
    x: Tensor, weight: Tensor, bias: Tensor, act: str, config: Product, *, column_sums: Tensor | None = None,
    mean: Tensor | None = None, rstd: Tensor | None = None, pieces: Tensor | None = None, kind: str = "layer",
    eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """act(norm(x) @ weight.T + bias) [M, N], the norm's parameters being in weight and bias.

    Args:
        x: [M, K], not empty; weight: [N, K]; both such that `why_not` is empty.
        bias: fp32 [N].
        config: one of `configs`.
        column_sums: fp32 [N], those of the weight's rows; None for no norm.
        mean, rstd: fp32 [M]; without a mean an RMS norm.
        pieces: in their place statistics of equal parts of each row, fp32 [pieces, 2, M], with `eps`.
        kind: 'layer' or 'rms', of pieces.

    Raises:
        ValueError: a tensor does not fit, or this build has no such configuration.
        RuntimeError: the kernel did not start; with CUDA's error.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or x.device != weight.device or not x.numel():
        raise DoesNotFit(
            f"product: x and weight must be [M, K] and [N, K] on one device, not empty, got {list(x.shape)} on "
            f"{x.device} and {list(weight.shape)} on {weight.device}"
        )
    if reasons := why_not(x, weight, act):
        raise DoesNotFit(f"product: {'; '.join(reasons)}")
    (M, K), N = x.shape, weight.shape[0]
    if (config.block_m, config.block_n) not in _tiles():
        raise DoesNotFit(f"product: config must be one of {configs(x.device)}, got {config}")
    if column_sums is not None and (rstd is None) == (pieces is None):
        raise DoesNotFit("product: a norm takes either rstd or pieces")
    count = 0 if pieces is None or not pieces.dim() else pieces.shape[0]
    if pieces is not None and (not count or K % count):
        raise DoesNotFit(f"product: pieces must be [pieces, 2, {M}] of equal parts of {K}, got {list(pieces.shape)}")
    _must_fit(x, "pieces", pieces, (count, 2, M))
    for name, t, length in (("bias", bias, N), ("column_sums", column_sums, N), ("mean", mean, M), ("rstd", rstd, M)):
        _must_fit(x, name, t, (length,))
    out = x.new_empty(M, N)
    address = lambda t: 0 if t is None else t.data_ptr()  # noqa: E731
    matrix = lambda t: (t.data_ptr(), *t.shape, t.stride(0) if t.shape[0] > 1 else -(-K // UNIT) * UNIT)  # noqa: E731
    norm = (
        address(column_sums), address(mean if pieces is None else pieces), address(rstd), count, kind == "layer", eps
    )  # fmt: skip
    number, _ = _tiles()[config.block_m, config.block_n]
    error = patch_embed.functions().product(
        matrix(x), matrix(weight), address(bias), norm, ACTIVATIONS[act], (out.data_ptr(), DTYPES[out.dtype]), number,
        patch_embed.place_of(x.device),
    )  # fmt: skip
    patch_embed.started(error, "product")
    return out
