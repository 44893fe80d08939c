"""Kernels of tiles (AMX) or stock operators, which use the same units: who is faster is measured on this CPU.

Once a process for each kind of call, on the first such call's own tensors, for a fiftieth of a second or ten calls,
whichever is more. The last bits of results follow the choice. VITFAST_CPU_ISA with a name of `TILES` means the kernels,
unmeasured.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from vitfast.choose.exportable import stock_only
from vitfast.kernels.cpu.arguments import kernels

TILES = ("amx_bf16", "plain_tiles")
# by how much the kernels must win, or equals would take turns from process to process
MARGIN = 1.05


class Timed(NamedTuple):
    """Milliseconds of a call, stock's over the kernels' within a round of measuring, and the shapes of its matrices."""

    ours_ms: float
    stock_ms: float
    ratio: float
    shapes: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        return self.ratio >= MARGIN


_timed: dict[tuple[Hashable, ...], Timed] = {}
# one that a thread may take again: a block is timed out of parts that are chosen too
_lock = threading.RLock()


def _renew_lock() -> None:
    """In a forked process, where the thread that held it is none."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def tiled(dtype: torch.dtype) -> bool:
    """Whether the kernels multiply this dtype by tiles, so that `faster_of` says who runs."""
    # the dtype first: every call asks, and most are done then
    return dtype is torch.bfloat16 and (found := kernels()) is not None and found.name in TILES


def settled() -> bool:
    """Whether the user has said that the kernels run, so that nothing is measured."""
    return os.environ.get("VITFAST_CPU_ISA") in TILES


def faster_of(
    what: str, sizes: tuple[Hashable, ...], ours: Callable[..., Any], stock: Callable[..., Any], *args: Any
) -> Callable[..., Any]:
    """`ours` or `stock`, of which either computes the same from `args` and changes none of them.

    Args:
        what, sizes: what choices are kept under, beside the number of threads.
    """
    if settled():
        return ours
    key = (what, *sizes, torch.get_num_threads())
    if key not in _timed:
        if not _may_measure():
            return stock
        with _lock:
            if key not in _timed:
                matrices = (x for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.dim() > 1)
                shapes = tuple(str(tuple(x.shape)) for x in matrices)
                _timed[key] = time_both(ours, stock, args)._replace(shapes=shapes)
    return ours if _timed[key].ours else stock


def _may_measure() -> bool:
    """Not where operators are recorded or transformed: what is computed there need not be numbers."""
    return not (torch.compiler.is_compiling() or stock_only() or torch._C._len_torch_dispatch_stack())


def time_both(ours: Callable[..., Any], stock: Callable[..., Any], args: tuple[Any, ...]) -> Timed:
    # most processes measure nothing
    from vitfast.measure.timing import HostSampler, interleaved_medians

    class Sampler(HostSampler):
        # no pause: the kernels and torch share OpenMP's threads, and a user waits
        min_ms, pause_s = 1.0, 0.0

    found = interleaved_medians(
        {"stock": lambda: stock(*args), "ours": lambda: ours(*args)},
        budget_s=0.02, rounds=(3, 15), noise_limit=math.inf, sampler=Sampler(),
    )  # fmt: skip
    return Timed(found.median_ms["ours"], found.median_ms["stock"], found.ratio["ours"])


def measured() -> list[str]:
    """What was chosen so far, in words."""
    # a copy: another thread may measure
    return [
        f"{' '.join(_words(key, it))}, {key[-1]} threads: {kernels().name if it.ours else 'stock'} "
        f"(vitfast {it.ours_ms:.3g} ms, stock {it.stock_ms:.3g} ms)"
        for key, it in [*_timed.items()]
    ]


def _words(key: tuple[Hashable, ...], timed: Timed) -> list[str]:
    """Of a choice, with the shapes of the call that was timed: a key has powers of two, which serve many sizes."""
    parts = [part for part in key[:-1] if isinstance(part, str) and part] if timed.shapes else key[:-1]
    return [*map(str, parts), *timed.shapes]
