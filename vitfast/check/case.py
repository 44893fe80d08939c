"""Ways to compute the same: what `compare` judges and times, for tuning and for benchmarks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Tensors = tuple[Tensor, ...]
Function = Callable[..., "Tensor | Tensors"]


@dataclass(frozen=True)
class Work:
    """The least that a computation must do.

    Attributes:
        flops: multiplications and additions of its matrix products (one multiply-add is 2).
        bytes: every input read once and every output written once.
    """

    flops: int
    bytes: int


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Attributes:
        build: makes it ready (weights, compilation) and returns the function that is timed. That is called with one
            set of the case's inputs, must not change them, and returns the case's results in the case's order.
        ours: whether it is vitfast's: then it is timed only if its result is accepted.
        needs: modules without which it is listed as absent.
        graph: whether replaying it from a CUDA graph is fair; False where it brings graphs of its own.
        apart: run in a process of its own with this many seconds, for compilers that may take minutes.
        part: whether it computes a part of the case only, which shows what the rest costs: timed, neither judged nor
            taken for a rival.
        tolerance: of what computes in fewer bits than the case's dtype, as int8 does, and so cannot be as exact as the
            rule wants: the rms error of its results that is accepted in place of the rule, as a share of their rms in
            fp64. It is timed and its error is told, and it is not taken for a rival either.
    """

    build: Callable[[], Function]
    ours: bool = False
    needs: tuple[str, ...] = ()
    graph: bool = True
    apart: float | None = None
    part: bool = False
    tolerance: float | None = None

    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


@dataclass(frozen=True)
class Case:
    """A computation, its inputs, and everybody's way of doing it.

    Attributes:
        kind, name, mode, shape, batch, dtype, autocast: what it is; together its identity.
        inputs: makes one set of inputs on `device` from a seeded generator of that device, of random normal data.
        reference: the truth in fp64, from fp64 copies of one set of inputs cut to `check_images` images; on the CPU
            or on `device`.
        cut: one set of inputs, cut to its first n images.
        per_image: for each result, whether its first dim is the image, so that those of the first images can be judged
            in a larger batch. Others (weight gradients) are judged on a batch of at most `check_images`.
        variants: by name. `baseline` is what ratios compare with, `yardstick` the stock operator whose error measures
            everybody's.
        notes: more that a record shall say.
        work: the least work, for the percent of the ceilings.
    """

    kind: Literal["op", "model", "patched model"]
    name: str
    mode: Literal["forward", "forward+backward", "inference", "training"]
    shape: Mapping[str, int]
    batch: int
    dtype: str
    device: torch.device
    inputs: Callable[[torch.Generator], Tensors]
    reference: Function
    cut: Callable[[Tensors, int], Tensors]
    per_image: tuple[bool, ...]
    variants: Mapping[str, Variant]
    baseline: str
    yardstick: str
    work: Work = Work(0, 0)
    autocast: bool = False
    check_images: int = 8
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        shape = " ".join(f"{name}{value}" for name, value in self.shape.items())
        autocast = " autocast" if self.autocast else ""
        return f"{self.kind}/{self.name}/{self.mode}/{shape}/batch {self.batch}/{self.dtype}{autocast}"
