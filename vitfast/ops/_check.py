"""Checks of user input shared by the ops: all reasons are collected, then raised as one error."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Reasons:
    """Collects what is wrong with the arguments of one op."""

    def __init__(self, op: str):
        self.op = op
        self.reasons: list[str] = []

    def shape(self, name: str, t: Tensor | None, expected: tuple[int, ...], because: str) -> None:
        if t is not None and tuple(t.shape) != tuple(expected):
            self.reasons.append(f"{name} must be {list(expected)} {because}, got {list(t.shape)} ({describe(t)})")

    def same_device(self, **tensors: Tensor | None) -> None:
        found = {name: t.device for name, t in tensors.items() if t is not None}
        if len(set(found.values())) > 1:
            where = ", ".join(f"{name} on {device}" for name, device in found.items())
            self.reasons.append(f"all tensors must be on one device, got {where}")

    def same_dtype(self, **tensors: Tensor | None) -> None:
        found = {name: t.dtype for name, t in tensors.items() if t is not None}
        if len(set(found.values())) > 1:
            which = ", ".join(f"{name} {str(dtype)[6:]}" for name, dtype in found.items())
            self.reasons.append(f"these must have one dtype (or use autocast), got {which}")

    def floating(self, **tensors: Tensor | None) -> None:
        for name, t in tensors.items():
            if t is not None and t.dtype not in FLOATS:
                self.reasons.append(f"{name} must be a floating point tensor, got {str(t.dtype)[6:]}")

    def fail(self, reason: str) -> None:
        self.reasons.append(reason)

    def raise_if_any(self) -> None:
        if self.reasons:
            raise ValueError(f"{self.op}: " + "; ".join(self.reasons))


def describe(t: Tensor) -> str:
    """'float32, cuda:0'"""
    return f"{str(t.dtype)[6:]}, {t.device}"


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """The dtype in which autocast wants this op to compute, None outside autocast; fp64 is left alone."""
    kind = t.device.type
    if t.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def cast(t: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """`t` in `dtype`, itself where there is nothing to do."""
    return t if t is None or dtype is None or t.dtype == dtype else t.to(dtype)
