"""Whether a kernel runs a call of an op, and what happens where it does not start: shared by all ops."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from vitfast import dispatch
from vitfast.extension import DoesNotFit

# Triton reads it when it is imported; its interpreter then runs kernels on CPU tensors
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def may_be_kernels(t: Tensor) -> bool:
    """Whether kernels exist for t's device."""
    return t.is_cuda or INTERPRETED


@functools.cache
def kernels(name: str) -> tuple[ModuleType | None, str]:
    """The module of `vitfast.kernels` with that name, or None and why it cannot be used here."""
    try:
        module = importlib.import_module(f"vitfast.kernels.{name}")
        if not getattr(module, "NEEDS_TRITON", True):
            return module, ""
        driver = importlib.import_module("triton").runtime.driver
    except ImportError as problem:
        return None, f"triton cannot be imported: {problem}"
    if not INTERPRETED:
        try:
            # it compiles a part of itself on first use
            driver.active.utils  # noqa: B018
        # for want of a compiler, of headers, of a driver
        except Exception as problem:
            return None, f"triton cannot compile here: {type(problem).__name__}: {problem}".splitlines()[0]
    return module, ""


def launched(kernel: str, launch: Callable[[], Any]) -> Any:
    """What `launch` returns; None, with the kernel switched off and a warning, where it does not compile or start.

    Raises:
        DoesNotFit, and what `dispatch.spare` raises: stock operators could do nothing about it.
        Exception: whatever it was, where the user forced the kernel.
    """
    try:
        return launch()
    except DoesNotFit:
        raise
    # compilers and drivers fail in many ways, and stock operators would have done it
    except Exception as problem:
        if INTERPRETED:
            raise
        dispatch.spare(kernel, problem)
        if dispatch.asked_for(kernel):
            raise
        dispatch.switch_off(kernel, f"{type(problem).__name__}: {problem}".splitlines()[0])
        return None


def attempt(
    kernel: str,
    module: str,
    like: Tensor,
    why_not: Callable[[ModuleType], Sequence[str]],
    shape: tuple[Hashable, ...],
    launch: Callable[[ModuleType, dispatch.Config | None], Any],
) -> Any:
    """What the kernel returns, None where stock operators are to run.

    Args:
        kernel: its name in `dispatch.KERNELS`.
        module: of `vitfast.kernels`, which `why_not` and `launch` are given.
        like: a tensor on the call's device.
        shape: what choices are kept under.
        launch: runs the kernel, with the chosen configuration if there is one.

    Raises:
        NotImplementedError: the user forced the kernel where it cannot run; says all the reasons.
    """
    if not may_be_kernels(like):
        return None
    found, why = kernels(module)
    reasons = (why,) if found is None else why_not(found)
    if not dispatch.choose(kernel, shape, like.device.index, reasons):
        return None
    config = dispatch.config_for(kernel, shape, like.device.index)
    return launched(kernel, lambda: launch(found, config))
