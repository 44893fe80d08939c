"""What `vitfast.warmup` measures: whether a kernel, as it runs where nobody tuned, is faster here than stock operators.

`vitfast tune` is the thorough way: every configuration, checked as it is timed, and for longer. Who wins is decided by
its rule.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitfast.check.calls import SEED, Call
from vitfast.check.families.family import Family
from vitfast.choose import builtin, dispatch, tuning_cache
from vitfast.choose.tuning_cache import Choice
from vitfast.measure import device as devices
from vitfast.measure.device import Place
from vitfast.measure.timing import Comparison, interleaved_medians, rotating

STOCK, BUILT_IN = "stock", "built-in"
# aimed-at time for the rounds of one call, and how long each of their measurements has to last
SECONDS, SAMPLE_MS = 0.1, 5.0
# what a model's op reads and no cache holds is large, so that few sets of it fill one; drawing more takes time
MOST_SETS = 32
# no host needs as long to issue a call: to find that out would take longer than to time it
LONG_MS = 1.0


class Row(NamedTuple):
    """What was measured for one call.

    Attributes:
        call: op, shapes and dtype.
        use: "kernel", "stock", or "" where nothing could be decided.
        stock_ms, kernel_ms: time of one call, the kernel's with its fastest configuration; None where not timed.
        config: the fastest configuration; None where that is the built-in choice, or nothing was timed.
        why: what decided.
        wrong: configurations with a wrong result.
        stock: the stock operators that were fastest; None where that are the built-in ones.
    """

    kernel: str
    call: str
    use: str
    stock_ms: float | None = None
    kernel_ms: float | None = None
    config: dispatch.Config | None = None
    why: str = ""
    wrong: tuple[str, ...] = ()
    stock: dispatch.Config | None = None


class Measurer:
    """Times calls on one device; what comes out holds in this process at once, and in later ones after `keep`."""

    def __init__(self, place: Place) -> None:
        self.place, self.at_work = place, False
        self.device: Hashable = None
        self.choices: tuning_cache.Table = {}

    def row(self, family: Family, call: Call, asked: dispatch.Seen) -> Row | None:
        """What came out for a call whose kernel was found right; None where there is nothing to decide.

        That is where somebody decided before, and where no choice is kept: in Triton's interpreter, whose times say
        nothing, where kernels run everywhere, and for calls that ask under no shape.

        Raises:
            RuntimeError: the device is lost.
        """
        name = asked.kernel, asked.shape
        known = dispatch.cached(*name, asked.device) is not None or dispatch.asked_for(asked.kernel)
        if known or asked.device is None or builtin.EVERYWHERE or not asked.shape:
            return None
        why = ""
        try:
            found = self._compared(family, call, dispatch.config_for(*name, asked.device))
        # the kernel was right a moment ago; where it is broken after all its next call switches it off
        except Exception as problem:
            why = devices.first_line(problem)
        if why:
            dispatch.see_device(family.kernel, self.place.synchronize, why)
            self.place.release()
            return Row(family.kernel, str(call), "", why=f"not measured: {why}")
        use, why = verdict(found.ratio[BUILT_IN], found.within_noise(BUILT_IN))
        choice = Choice(use == "kernel", None, found.median_ms[BUILT_IN], found.median_ms[STOCK])
        self.device = asked.device
        self.choices[name] = choice
        dispatch.learn(asked.device, {name: choice})
        return Row(family.kernel, str(call), use, choice.stock_ms, choice.kernel_ms, why=why)

    def _compared(self, family: Family, call: Call, config: dispatch.Config | None) -> Comparison:
        place, generator = self.place, torch.Generator(self.place.device).manual_seed(SEED)
        first = family.draw(call, generator)
        count = min(devices.input_sets(place, _bytes(first), 0), MOST_SETS)
        sets = [(first,), *((family.draw(call, generator),) for _ in range(count - 1))]
        ways = {STOCK: family.stock, BUILT_IN: functools.partial(family.with_config, config=config)}
        calls = {name: rotating(way, sets, keep_results=place.graphs) for name, way in ways.items()}
        if not self.at_work:
            place.warm_up(calls[STOCK])
            self.at_work = True
        sampler = place.sampler()
        sampler.min_ms = SAMPLE_MS
        if min([sampler(call, 2) for call in calls.values()]) < LONG_MS:
            arranged = devices.arrange(calls, dict.fromkeys(calls, True), place, count)
            calls = {name: each.call for name, each in arranged.items()}
        return interleaved_medians(calls, budget_s=SECONDS, sampler=sampler)

    def keep(self) -> None:
        """Write what came out for later processes, but for what others have written meanwhile: they may have tuned."""
        if self.at_work:
            # where the device is lost, the next to use it will say so
            with contextlib.suppress(Exception):
                self.place.release()
        if self.choices:
            there = tuning_cache.load(self.device)
            new = {name: choice for name, choice in self.choices.items() if name not in there}
            keep(self.device, new, "warmup", stacklevel=5)


def _bytes(args: tuple[Any, ...]) -> int:
    return sum(arg.numel() * arg.element_size() for arg in args if isinstance(arg, Tensor))


def verdict(ratio: float, within_noise: bool) -> tuple[str, str]:
    """Who runs what was timed, and why: the kernel only where it is faster beyond the noise."""
    noise = ", within the noise" if within_noise else ""
    return "kernel" if ratio > 1 and not within_noise else "stock", f"the kernel is {ratio:.2f} x as fast{noise}"


def keep(device: Any, choices: tuning_cache.Table, what: str, stacklevel: int) -> Path | None:
    """Let `choices` hold in this process, and in later ones if they can be written; `what` warns if not."""
    dispatch.learn(device, choices)
    try:
        return tuning_cache.store(device, choices)
    except OSError as problem:
        warnings.warn(
            f"{what}: {tuning_cache.folder()} cannot be written, so that this holds for this process only: {problem}",
            RuntimeWarning,
            stacklevel=stacklevel,
        )
        return None
