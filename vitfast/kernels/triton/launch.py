"""What all launchers share: which devices and dtypes kernels are for, and how a kernel is started."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vitfast.choose import config_tables
from vitfast.kernels import plans
from vitfast.kernels.triton import addresses
from vitfast.kernels.triton.overlap import overlaps

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


# by kernel and all that decides how it is compiled. Triton finds the same by the text of it, which takes the host ten
# times as long
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, grid: Sequence[int], tensors: Sequence[Tensor], numbers: Sequence[int | float],
    constants: dict[str, Any], warps: int, stages: int = 2, registers: int = 0, boxes: Sequence[Any] = (),
) -> None:  # fmt: skip
    """Start `kernel` on the device of its tensors; nothing where the grid is empty.

    Args:
        grid: one or two dimensions.
        tensors, numbers: the arguments that are no constants, in their order. No whole number is specialised upon.
        constants: the rest, of one kernel always in the same order.
        registers: of a thread at most; 0: no limit.
        boxes: what of the first tensors a descriptor moves at once, None for those that have none. Constants decide it.
    """
    if not all(grid):
        return
    device = tensors[0].get_device()
    if device >= 0 and torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, constants, warps, stages, registers, boxes)
        return
    key = (
        kernel, device, warps, stages, registers, *[n < 1 << 31 for n in numbers], *constants.values(),
        *[t.dtype for t in tensors], *[t.data_ptr() & 15 for t in tensors],
    )  # fmt: skip
    layouts = [box and (t.shape, t.stride(), list(box)) for t, box in zip(tensors, boxes, strict=False)]
    compiled = _compiled.get(key)
    if compiled is not None:
        start = _start(compiled, device, grid, numbers, constants, layouts)
        start(tensors)
    else:
        options = {"num_warps": warps, "num_stages": stages} | ({"maxnreg": registers} if registers else {})
        options |= {"launch_pdl": True} if overlaps(device) else {}

        def start(tensors: Sequence[Tensor]) -> Any:
            given = _with(layouts, tensors, TensorDescriptor)
            return kernel[tuple(grid)](*given, *numbers, **constants, **options)

        # Triton's interpreter has operators of torch at work
        with plans.unwatched():
            compiled = start(tensors)
        if not interpreted():
            _compiled[key] = compiled
            start = _start(compiled, device, grid, numbers, constants, layouts)
    if (seen := plans.recorder()) is not None:
        seen.started(start, tensors)


def _start(
    compiled: Any, device: int, grid: Sequence[int], numbers: Sequence[int | float], constants: dict[str, Any],
    layouts: Sequence[Any],
) -> Callable[[Sequence[Tensor]], None]:  # fmt: skip
    """What starts a compiled kernel on tensors of these layouts."""
    # constants are compiled in; only their number counts
    run, rest = compiled[*grid, 1, 1], (*numbers, *constants.values())

    def start(tensors: Sequence[Tensor]) -> None:
        if device >= 0 and torch.cuda.current_device() != device:
            with torch.cuda.device(device):
                run(*_with(layouts, tensors, _Described), *rest)
        else:
            run(*_with(layouts, tensors, _Described), *rest)

    return start


class _Described:
    """What a launcher reads of a descriptor; it was checked when the kernel was compiled."""

    __slots__ = ("base", "shape", "strides")
    padding = "zero"

    def __init__(self, t: Tensor, shape: Sequence[int], strides: Sequence[int], box: Any):
        self.base, self.shape, self.strides = t, shape, strides


def _with(layouts: Sequence[Any], tensors: Sequence[Tensor], described: Any) -> Sequence[Any]:
    """The tensors, those that have a layout (shape, strides, box) as descriptors."""
    if not layouts:
        return tensors
    first = [t if layout is None else described(t, *layout) for t, layout in zip(tensors, layouts, strict=False)]
    return [*first, *tensors[len(layouts) :]]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def architecture(device: torch.device) -> int:
    """The architecture whose tables a device uses."""
    if device.type != "cuda":
        return 90
    return config_tables.architecture_of(torch.cuda.get_device_capability(device))


def dot_precision(dtype: torch.dtype) -> str:
    """As torch's own products in fp32 run on GPUs, whichever of its two switches said so."""
    exact = dtype is not torch.float32 or torch.backends.cuda.matmul.fp32_precision in ("none", "ieee")
    return "ieee" if exact else "tf32"
