"""Whether a kernel runs a call of an op, and what happens where it does not start: shared by all ops."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

from vitfast.choose import dispatch
from vitfast.kernels.extension import DoesNotFit

# Triton reads it when it is imported; its interpreter then runs kernels on CPU tensors
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def may_be_kernels(t: Tensor) -> bool:
    """Whether kernels exist for t's device."""
    return t.is_cuda or INTERPRETED


@functools.cache
def why_no_triton() -> str:
    """Why no Triton kernel can be started in this process, "" where they can."""
    try:
        from triton.runtime import driver

        # of older releases the launchers import what is not there
        from vitfast.kernels.triton import launch  # noqa: F401
    except ImportError as problem:
        return f"triton cannot be imported: {problem}"
    if not INTERPRETED:
        try:
            # it compiles a part of itself on first use
            driver.active.utils  # noqa: B018
        # for want of a compiler, of headers, of a driver
        except Exception as problem:
            return f"triton cannot compile here: {type(problem).__name__}: {problem}".splitlines()[0]
    return ""


def ready(kernel: str, like: Tensor) -> bool:
    """Whether this kernel's launcher, which imports triton, can be imported for a call on like's device.

    Raises:
        NotImplementedError: the user forced the kernel where it cannot; says why.
    """
    if not may_be_kernels(like):
        return False
    why = why_no_triton() if dispatch.language(kernel) == "Triton" else ""
    # not otherwise: who watches what ops ask would learn of a shape that no call has
    if why and dispatch.asked_for(kernel):
        dispatch.choose(kernel, (), like.device.index, (why,))
    return not why


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
    like: Tensor,
    why_not: Sequence[str],
    shape: tuple[Hashable, ...],
    launch: Callable[[dispatch.Config | None], Any],
) -> Any:
    """What the kernel returns, None where stock operators are to run.

    Args:
        kernel: its name in `dispatch.KERNELS`; it must be `ready`.
        like: a tensor on the call's device.
        why_not: all that keeps the kernel from running this call.
        shape: what choices are kept under.
        launch: runs the kernel, with the chosen configuration if there is one.

    Raises:
        NotImplementedError: the user forced the kernel where it cannot run; says all the reasons.
    """
    if not dispatch.choose(kernel, shape, like.device.index, why_not):
        return None
    config = dispatch.config_for(kernel, shape, like.device.index)
    return launched(kernel, lambda: launch(config))
