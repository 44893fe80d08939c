"""What all launchers of C++ kernels share: which kernels this CPU has, and whether a tensor fits.

C++ cannot see how long the memory behind an address is, so every function of this package checks that before it hands
one on, and raises ValueError where a tensor does not fit: of weights once, where they are packed or made a part of a
block.

Which instruction set they use is decided at the first call: the best that this CPU has, or the one that the environment
variable VITFAST_CPU_ISA names (portable, avx2, avx512, avx512_bf16, amx_bf16, plain_tiles).
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from vitfast.kernels import extension

# as in csrc/cpu/kernels.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "quick_gelu": 2, "silu": 3}
PATCH_ORDERS = {"chw": 0, "hwc": 1}
NO_ACT = -1
MAX_LANES = 16
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def kernels() -> Any:
    """The kernels for this CPU, None where there is no extension.

    Raises:
        ValueError: VITFAST_CPU_ISA names no instruction set that this CPU and build have.
    """
    module, _ = extension.load()
    if module is None:
        return None
    usable = {each.name: each for each in module.usable_kernels()}
    wanted = os.environ.get("VITFAST_CPU_ISA")
    if not wanted:
        return next(reversed(usable.values()))
    if wanted not in usable:
        raise ValueError(f"VITFAST_CPU_ISA must be one of {list(usable)} on this machine, got {wanted!r}")
    return usable[wanted]


def takes(t: Tensor) -> bool:
    """Whether the kernels for floating point tensors run on this one here."""
    return t.dtype in FLOATS and kernels() is not None


def has_amx(dtype: torch.dtype) -> bool:
    """Whether this process multiplies tiles of this dtype (AMX), as oneDNN and so torch do."""
    unit = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}.get(dtype)
    return unit is not None and bool(torch.cpu.get_capabilities().get(unit)) and not _refuses_tiles()


@functools.cache
def _refuses_tiles() -> bool:
    """Whether the system refuses them to this process: torch, which reports the CPU's, cannot use them either."""
    module, _ = extension.load()
    return module is not None and bool(module.why_no_tiles())


def fits(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return t.dtype is dtype and t.shape == shape and t.is_cpu and t.is_contiguous()


def must_fit(what: str, name: str, t: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if t is not None and not fits(t, shape, dtype):
        raise ValueError(f"{what}: {name} must be contiguous {list(shape)} in {str(dtype)[6:]}, got {describe(t)}")


def describe(t: Tensor) -> str:
    on = "" if t.is_cpu else f" on {t.device}"
    return f"{list(t.shape)} in {str(t.dtype)[6:]}{on}, strides {t.stride()}"


def no_copies(what: Any) -> None:
    raise NotImplementedError(f"{type(what).__name__} holds addresses and cannot be copied or pickled")


def act_number(name: str) -> int:
    return NO_ACT if name == "none" else ACTIVATIONS[name]
