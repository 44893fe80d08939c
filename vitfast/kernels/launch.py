"""What all launchers share: which devices and dtypes kernels are for, and how a kernel is started."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from vitfast.kernels import addresses

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# elements that strides are counted in where all of them are multiples: rows then begin at multiples of 16 bytes
UNIT = 8
# rows of the largest tile
TILE = 256


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU: TRITON_INTERPRET was set before triton's import."""
    return not isinstance(addresses.advance, triton.JITFunction)


@functools.cache
def _device_reasons(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    reasons = []
    if dtype not in DTYPES:
        reasons.append(f"dtype {str(dtype)[6:]} (fp16, bf16 and fp32 only)")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            reasons.append("compute capability {}.{} (8.0 or newer only)".format(*capability))
    elif not interpreted():
        reasons.append(f"tensors on {device.type} (CUDA only, or any in Triton's interpreter)")
    elif dtype is torch.bfloat16:
        reasons.append("bf16 in Triton's interpreter, which computes it wrongly")
    return tuple(reasons)


def device_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """What of device and dtype keeps kernels from running; empty where nothing does."""
    return list(_device_reasons(device, dtype))


def rows_of(t: Tensor | None) -> Tensor | None:
    """[..., C] as rows [M, C] whose numbers lie side by side: a view where the strides allow that."""
    if t is None:
        return None
    rows = t.reshape(-1, t.shape[-1])
    # offsets within a tile are 32-bit
    near = TILE * abs(rows.stride(0)) < 1 << 31
    return rows if rows.stride(-1) == 1 and near else rows.contiguous()


def launch(
    like: Tensor, kernel: Any, grid: Sequence[int], arguments: Sequence[Any], constants: dict[str, Any], warps: int,
    stages: int = 2,
) -> None:  # fmt: skip
    """Start `kernel` on the device of `like`; nothing where the grid is empty."""
    if not all(grid):
        return
    if like.is_cuda and torch.cuda.current_device() != like.device.index:
        with torch.cuda.device(like.device):
            kernel[tuple(grid)](*arguments, **constants, num_warps=warps, num_stages=stages)
    else:
        kernel[tuple(grid)](*arguments, **constants, num_warps=warps, num_stages=stages)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def architecture(device: torch.device) -> int:
    """The architecture whose tables a device uses."""
    if device.type != "cuda":
        return 90
    return architecture_of(torch.cuda.get_device_capability(device))


def architecture_of(capability: tuple[int, int]) -> int:
    """Of devices that are none of the four, one with the least shared memory."""
    major, minor = capability
    return 10 * major if (major, minor) == (8, 0) or major in (9, 10) else 89


def dot_precision(dtype: torch.dtype) -> str:
    """As torch's own products in fp32 run on GPUs, whichever of its two switches said so."""
    exact = dtype is not torch.float32 or torch.backends.cuda.matmul.fp32_precision in ("none", "ieee")
    return "ieee" if exact else "tf32"
