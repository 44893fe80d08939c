"""What `vitfast.warmup` measures: whether a kernel, as it runs where nobody tuned, is faster here than stock operators.

`vitfast tune` is the thorough way: every configuration, checked as it is timed, and for longer. Who wins is decided by
its rule.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from vitfast import builtin, dispatch, tuning, tuning_cache
from vitfast.bench import device as devices
from vitfast.calls import Call
from vitfast.families import Family
from vitfast.timing import Comparison, interleaved_medians, rotating
from vitfast.tuning import BUILT_IN, STOCK, Place
from vitfast.tuning_cache import Choice
from vitfast.warm_up import SEED, see_device

# aimed-at time for the rounds of one call, and how long each of their measurements has to last
SECONDS, SAMPLE_MS = 0.1, 5.0
# what a model's op reads and no cache holds is large, so that few sets of it fill one; drawing more takes time
MOST_SETS = 32
# no host needs as long to issue a call: to find that out would take longer than to time it
LONG_MS = 1.0


class Measurer:
    """Times calls on one device; what comes out holds in this process at once, and in later ones after `keep`."""

    def __init__(self, place: Place) -> None:
        self.place, self.at_work = place, False
        self.device: Hashable = None
        self.choices: tuning_cache.Table = {}

    def row(self, family: Family, call: Call, asked: dispatch.Seen) -> tuning.Row | None:
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
            see_device(family, self.place, why)
            self.place.release()
            return tuning.Row(family.kernel, str(call), "", why=f"not measured: {why}")
        use, why = tuning.verdict(found.ratio[BUILT_IN], found.within_noise(BUILT_IN))
        choice = Choice(use == "kernel", None, found.median_ms[BUILT_IN], found.median_ms[STOCK])
        self.device = asked.device
        self.choices[name] = choice
        dispatch.learn(asked.device, {name: choice})
        return tuning.Row(family.kernel, str(call), use, choice.stock_ms, choice.kernel_ms, why=why)

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
            tuning.keep(self.device, new, "warmup", stacklevel=5)


def _bytes(args: tuple[Any, ...]) -> int:
    return sum(arg.numel() * arg.element_size() for arg in args if isinstance(arg, Tensor))
