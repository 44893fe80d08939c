"""Checks of user input shared by the ops: all reasons are collected, then raised as one error."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import overload

import torch
from torch import Tensor

from vitfast.choose.exportable import refuse_proxy

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Reasons:
    """Collects what is wrong with the arguments of one op."""

    def __init__(self, op: str):
        self.op = op
        self.reasons: list[str] = []

    def shape(self, name: str, t: Tensor | None, expected: tuple[int, ...], because: str) -> None:
        if t is not None and tuple(t.shape) != tuple(expected):
            self.reasons.append(f"{name} must be {list(expected)} {because}, got {list(t.shape)} ({describe(t)})")

    def tensors(self, **named: Tensor | None) -> None:
        """All must be floating point tensors on one device."""
        given = {name: t for name, t in named.items() if t is not None}
        devices = [t.device for t in given.values()]
        if devices.count(devices[0]) != len(devices):
            where = ", ".join(f"{name} on {t.device}" for name, t in given.items())
            self.reasons.append(f"all tensors must be on one device, got {where}")
        for name, t in given.items():
            if t.dtype not in FLOATS:
                self.reasons.append(f"{name} must be a floating point tensor, got {str(t.dtype)[6:]}")

    def norm_dtypes(self, x: Tensor, **parameters: Tensor | None) -> None:
        """A norm's parameters have its input's dtype, or are float32 beside a half-precision input."""
        allowed = (x.dtype, torch.float32) if x.dtype in HALVES else (x.dtype,)
        given = {name: t.dtype for name, t in parameters.items() if t is not None}
        if any(dtype not in allowed for dtype in given.values()) or len(set(given.values())) > 1:
            which = ", ".join(f"{name} {str(dtype)[6:]}" for name, dtype in given.items())
            self.reasons.append(
                f"norm parameters must have x's dtype (or float32 beside half precision), got x {str(x.dtype)[6:]}, "
                f"{which}"
            )

    def same_dtype(self, **tensors: Tensor | None) -> None:
        found = {name: t.dtype for name, t in tensors.items() if t is not None}
        if len(set(found.values())) > 1:
            which = ", ".join(f"{name} {str(dtype)[6:]}" for name, dtype in found.items())
            self.reasons.append(f"these must have one dtype (or use autocast), got {which}")

    def fail(self, reason: str) -> None:
        self.reasons.append(reason)

    def raise_if_any(self) -> None:
        if self.reasons:
            raise ValueError(f"{self.op}: " + "; ".join(self.reasons))


def alike(x: Tensor, vectors: tuple[tuple[Tensor | None, int], ...], *others: Tensor | None) -> bool:
    """Whether all tensors given have x's floating dtype and device, and each of `vectors` the length beside it.

    The usual case, which an op's checks then need not look at one by one: they cost more than the op's dispatch.
    """
    dtype, device = x.dtype, x.device
    if dtype not in FLOATS:
        return False
    for t, length in vectors:
        if t is not None and (t.dtype is not dtype or t.shape != (length,) or t.device != device):
            return False
    return all(t is None or (t.dtype is dtype and t.device == device) for t in others)


def describe(t: Tensor) -> str:
    """'float32, cuda:0'"""
    return f"{str(t.dtype)[6:]}, {t.device}"


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """The dtype in which autocast wants this op to compute, None outside autocast; fp64 is left alone."""
    if type(t) is not Tensor:
        refuse_proxy(t)
    kind = t.device.type
    if t.dtype == torch.float64:
        return None
    if kind == "meta":
        return _thread.on_meta
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class _ThisThread(threading.local):
    on_meta: torch.dtype | None = None


_thread = _ThisThread()


@contextlib.contextmanager
def autocast_on_meta(dtype: torch.dtype | None) -> Iterator[None]:
    """Let ops on 'meta', which torch has no autocast for, see autocast to this dtype; None for none."""
    before, _thread.on_meta = _thread.on_meta, dtype
    try:
        yield
    finally:
        _thread.on_meta = before


@overload
def cast(t: Tensor, dtype: torch.dtype | None) -> Tensor: ...
@overload
def cast(t: Tensor | None, dtype: torch.dtype | None) -> Tensor | None: ...
def cast(t: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """`t` in `dtype`, itself where there is nothing to do."""
    return t if t is None or dtype is None or t.dtype == dtype else t.to(dtype)
