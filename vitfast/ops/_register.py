"""How an op of vitfast becomes known to torch, and the list that `vitfast info` prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

LIBRARY = torch.library.Library("vitfast", "DEF")


class Implementation(NamedTuple):
    """What runs an op on a device: a name, or None and the reason why there is nothing better."""

    path: str
    kernel: str | None
    why_no_kernel: str


IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {}

NO_CUDA_KERNEL = "its Triton or CUDA kernel is not part of this release"
NO_CPU_KERNEL = "its C++ kernel is not part of this release"


def op(schema: str, *, cpu: Callable, cuda: Callable, fake: Callable) -> Callable:
    """Define `vitfast::<schema>` for CPU and CUDA with its shape function; returns the callable op.

    Registered by `Library.define` and `impl`, not by `custom_op`: the call costs a quarter of the time, and a
    model makes about fifty of them.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"vitfast::{name}", fake, lib=LIBRARY)
    if not name.endswith("_backward"):
        IMPLEMENTATIONS[name] = {
            "cpu": Implementation("stock PyTorch operators", None, NO_CPU_KERNEL),
            "cuda": Implementation("stock PyTorch operators", None, NO_CUDA_KERNEL),
        }
    return getattr(torch.ops.vitfast, name).default


def autograd(name: str, *, setup_context: Callable, backward: Callable) -> None:
    """Register the gradient of `vitfast::<name>`; the backward calls an op of its own."""
    torch.library.register_autograd(f"vitfast::{name}", backward, setup_context=setup_context, lib=LIBRARY)
