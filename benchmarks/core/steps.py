"""What is timed of a whole model: one inference, or one training step without its optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import compilers
from benchmarks.core.rivals import Network
from vitfast.check.case import DTYPES, Function, Tensors

MODES = ("inference", "training")


@dataclass(frozen=True)
class Setting:
    """How all models of a row run.

    The functions made here take (images,) or (images, labels) and return logits, and in training also the gradients of
    the network's watched parameters.

    Attributes:
        dtype: of everything, or with `autocast` what autocast computes in, with weights and images in fp32.
    """

    mode: str
    dtype: str
    autocast: bool
    device: torch.device
    batch: int

    @property
    def training(self) -> bool:
        return self.mode == "training"

    @property
    def plain_on_cpu(self) -> bool:
        """What compilers of a CPU take."""
        return self.device.type == "cpu" and not self.training and not self.autocast

    @property
    def kept_in(self) -> str:
        """The dtype of weights and images."""
        return "fp32" if self.autocast else self.dtype

    def place(self, network: Network, dtype: torch.dtype | None = None) -> Network:
        network.module.to(self.device, dtype or DTYPES[self.kept_in]).train(self.training)
        network.module.requires_grad_(self.training)
        return network

    def eager(self, network: Network) -> Function:
        return self._function(network)

    def exact(self, network: Network) -> Function:
        """In fp64, outside autocast."""
        return replace(self, autocast=False)._function(network, dtype=torch.float64)

    def compiled(self, network: Network, mode: str | None = None) -> Function:
        """By torch.compile. With a mode, which means graphs of its own, results are copied, since the next call writes
        over them.
        """
        run = self._function(network, partial(compilers.compiled, mode=mode))
        if mode is None:
            return run

        def run_anew(*given: Tensor) -> Tensor | Tensors:
            torch.compiler.cudagraph_mark_step_begin()
            out = run(*given)
            return tuple(t.clone() for t in out) if isinstance(out, tuple) else out.clone()

        return run_anew

    def compiled_best(self, network: Network, example: Callable[[], Tensor], autotuned: bool = False) -> Function:
        """By torch.compile, on a CPU with the weights as constants where they are: `example` makes images for that."""
        if self.plain_on_cpu:
            return compilers.frozen(self.place(network).module, example(), autotuned)
        return self.compiled(network, "max-autotune" if autotuned else None)

    def _function(
        self, network: Network, by: Callable[[Function], Function] = lambda forward: forward,
        dtype: torch.dtype | None = None,
    ) -> Function:  # fmt: skip
        self.place(network, dtype)
        forward = by(lambda images: network.logits(network.module(images)))

        def cast() -> Any:
            if not self.autocast:
                return contextlib.nullcontext()
            return torch.autocast(self.device.type, dtype=DTYPES[self.dtype])

        def infer(images: Tensor) -> Tensor:
            with torch.inference_mode(), cast():
                return forward(images)

        parameters = dict(network.module.named_parameters())
        groups = [[parameters[name] for name in names] for names in network.watched]

        def train(images: Tensor, labels: Tensor) -> Tensors:
            with torch.enable_grad():
                with cast():
                    logits = forward(images)
                # in fp32, in fp64 for the reference
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                F.cross_entropy(wide, labels).backward()
            found = tuple(p[0].grad if len(p) == 1 else torch.cat([part.grad for part in p]) for p in groups)
            network.module.zero_grad(set_to_none=True)
            return logits.detach(), *found

        return train if self.training else infer
