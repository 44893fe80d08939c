"""Compare the variants of a case: check every one, time what is right in interleaved rounds.

A variant of ours whose result `vitfast.check.acceptance` rejects gets no time, only the rule's message. A rival that is
rejected is timed and marked. So is one in int8, which is held to a tolerance of its own and tells its error. What
fails, runs out of memory or is not installed is listed with the reason.

The policy is the same for all variants: the same input sets, drawn from one seed and rotated so that none is in the
cache when its turn comes; every call allocates its results from torch's caching allocator and drops them; compilation
is over before anything is timed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vitfast.check.calls import SEED
from vitfast.check.case import Case, Tensors, Variant
from vitfast.check.judge import Judge, sets_to_judge
from vitfast.measure import device as devices
from vitfast.measure.machine import OtherProcesses
from vitfast.measure.timing import Comparison, Repeated, interleaved_medians, rotating

Row = dict[str, Any]

NO_TIME_LEFT = "no time left"
# by variant: how long it last took to build, so that a compiler is not started that cannot finish in time
TOOK_S: dict[str, float] = {}
# what a row says also where nothing was timed
UNKNOWN = {
    "noise": None, "noise_25": None, "noise_75": None, "rounds": 0, "noisy": 0, "others": None, "before": None,
    "after": None,
}  # fmt: skip


class DeviceLost(RuntimeError):
    """The device answers no more, so that nothing later in this process can be right.

    Attributes:
        row: as far as it got; None where that isn't known.
    """

    row: Row | None = None


class _Failed(Exception):
    """The call of one variant raised."""

    def __init__(self, name: str, problem: Exception) -> None:
        super().__init__(devices.first_line(problem))
        self.name, self.problem = name, problem


def compare(
    case: Case, *, seconds: float, place: devices.Place | None = None, deadline: float | None = None,
    building: Callable[[str | None], None] = lambda name: None,
) -> Row:  # fmt: skip
    """Build, check and time the variants of `case` in this process.

    Args:
        seconds: aimed-at time for the interleaved rounds; building and checking come on top.
        place: in place of the device that the case names.
        deadline: on `place.clock`: what has not been built by then is not.
        building: gets the name of each variant before it is built and first called, which may end the process, and
            None when all are.

    Returns:
        "variants" by name, and what was found out of all of them together: `benchmarks/core/record.py` says what.

    Raises:
        DeviceLost: a variant has broken the device for everybody.
    """
    place = place or devices.of(case.device)
    run = _Run(case, place, seconds, deadline)
    with place.current():
        try:
            run.prepare()
            run.build(building)
            run.time()
        except DeviceLost as lost:
            for name in run.open():
                run.variants[name]["not_timed"] = "the device was lost"
            lost.row = run.row
            raise
        finally:
            run.release()
    return run.row


class _Run:
    """One comparison in the making."""

    def __init__(self, case: Case, place: devices.Place, seconds: float, deadline: float | None) -> None:
        self.case, self.place, self.seconds, self.deadline = case, place, seconds, deadline
        self.variants: dict[str, Row] = {}
        for name, variant in case.variants.items():
            told = {"part": True if variant.part else None, "tolerance": variant.tolerance}
            self.variants[name] = {"ours": variant.ours} | {k: v for k, v in told.items() if v is not None}
            if missing := variant.missing():
                verb = "are" if len(missing) > 1 else "is"
                self.variants[name]["absent"] = f"{' and '.join(missing)} {verb} not installed"
        self.calls: dict[str, Callable[[], Any]] = {}
        self.sets: list[Tensors] = []
        self.judge: Judge | None = None
        on_gpu = case.dtype == "fp32" and case.device.type == "cuda"
        tf32 = torch.get_float32_matmul_precision() != "highest" if on_gpu else None
        self.row: Row = {"tf32": tf32, **UNKNOWN, "variants": self.variants}

    def open(self) -> list[str]:
        """Variants of which nothing is known yet."""
        return [name for name, found in self.variants.items() if not {"absent", "not_timed", "ms"} & found.keys()]

    def fail(self, name: str, problem: Exception) -> None:
        out_of_memory = isinstance(problem, torch.OutOfMemoryError)
        text = devices.first_line(problem)
        self.variants[name]["not_timed"] = f"out of memory: {text}" if out_of_memory else text
        self.calls.pop(name, None)
        # tracebacks hold the tensors that did not fit
        chained: BaseException | None = problem
        while chained is not None:
            chained.__traceback__, chained = None, chained.__context__
        try:
            self.place.synchronize()
            self.place.release()
        except Exception as lost:
            raise DeviceLost(f"after {name}: {text}; {devices.first_line(lost)}") from problem

    def prepare(self) -> None:
        case, generator = self.case, torch.Generator(self.case.device).manual_seed(SEED)
        try:
            first = case.inputs(generator)
            size = sum(t.numel() * t.element_size() for t in first)
            self.sets = [first]
            judged = sets_to_judge(case, first)
            wanted = max(devices.input_sets(self.place, size, case.work.bytes), judged)
            self.sets += [case.inputs(generator) for _ in range(wanted - 1)]
            self.judge = Judge(case, first, self.sets[1:judged])
        except Exception as problem:
            for name in self.open():
                self.fail(name, problem)

    def build(self, building: Callable[[str | None], None]) -> None:
        first = [self.case.yardstick, self.case.baseline]
        for name in sorted(self.open(), key=lambda name: first.index(name) if name in first else len(first)):
            if self.deadline is not None and self.place.clock() + TOOK_S.get(name, 0.0) > self.deadline:
                self.variants[name]["not_timed"] = NO_TIME_LEFT
                continue
            building(name)
            try:
                self.build_one(name, self.case.variants[name])
            # other people's software may fail in any way, which must not cost the rest of the run
            except Exception as problem:
                if name == self.case.yardstick:
                    self.judge.no_measure = f"the yardstick failed: {devices.first_line(problem)}"
                self.fail(name, problem)
        building(None)

    def build_one(self, name: str, variant: Variant) -> None:
        found, began = self.variants[name], self.place.clock()
        try:
            function = variant.build()
        except NotImplementedError as problem:
            found["absent"] = devices.first_line(problem)
            return
        results = function(*self.sets[0])
        self.place.synchronize()
        found["compile_s"] = TOOK_S[name] = self.place.clock() - began
        results = [] if variant.part else self.judge.judged(function, results)
        if self.judge.is_changed(self.sets[0]):
            self.sets[0] = self.case.inputs(torch.Generator(self.case.device).manual_seed(SEED))
            found["not_timed"] = "it changes its inputs"
            return
        if name == self.case.yardstick:
            self.judge.low = results
        verdict, fault = ({}, "") if variant.part else self.judge.judge(results, variant.ours, variant.tolerance)
        found |= verdict
        if fault:
            found["not_timed" if variant.ours else "why_not_accepted"] = fault
        if not (fault and variant.ours):
            self.calls[name] = _guarded(name, rotating(function, self.sets, keep_results=self.place.graphs))

    def time(self) -> None:
        case, place = self.case, self.place
        others = OtherProcesses() if case.device.type == "cpu" else None
        if case.mode in ("training", "forward+backward") or isinstance(place, devices.Cpu) and case.kind != "op":
            # what brings graphs of its own has its memory in their pool, whose peak is past
            for name in [name for name in self.calls if case.variants[name].graph]:
                try:
                    self.variants[name] |= place.peak_mib(self.calls[name])
                except Exception as problem:
                    self.fail(name, problem.problem if isinstance(problem, _Failed) else problem)
        place.release()
        self.row["before"] = place.state()
        while self.calls:
            # the first is what ratios compare with
            calls = {name: self.calls[name] for name in sorted(self.calls, key=lambda name: name != case.baseline)}
            left = self.seconds if self.deadline is None else min(self.seconds, self.deadline - place.clock())
            try:
                place.warm_up(next(iter(calls.values())))
                arranged = devices.arrange(calls, {n: case.variants[n].graph for n in calls}, place, len(self.sets))
                result = interleaved_medians(
                    {name: each.call for name, each in arranged.items()}, budget_s=max(left, 0.0),
                    sampler=place.sampler(),
                )  # fmt: skip
            except _Failed as failed:
                self.fail(failed.name, failed.problem)
                continue
            # an error that the device reports later than the call that made it
            except Exception as problem:
                for name in calls:
                    self.fail(name, problem)
                continue
            self.row["others"] = None if others is None else others.share()
            self.note(result, {name: each.facts for name, each in arranged.items()})
            first = next(iter(calls))
            call = arranged[first].call
            times = call.times if isinstance(call, Repeated) else 1
            # the times are there; where this breaks the device, the next row will say so
            with contextlib.suppress(Exception):
                self.row["after"] = place.state_under(call, result.median_ms[first] * times)
            return

    def note(self, result: Comparison, facts: Mapping[str, Row]) -> None:
        baseline = self.case.baseline
        self.row |= {"rounds": result.rounds, "noisy": result.noisy}
        if baseline in result.median_ms:
            low, high = result.noise_spread()
            self.row |= {"noise": result.noise, "noise_25": low, "noise_75": high}
        for name in result.median_ms:
            ms_20, ms, ms_80 = result.quantiles_ms(name)
            found = self.variants[name]
            found |= {"ms": ms, "ms_20": ms_20, "ms_80": ms_80, **facts[name]}
            if baseline in result.median_ms and name != baseline:
                low, high = result.spread[name]
                found |= {"ratio": result.ratio[name], "ratio_25": low, "ratio_75": high}
                found["within_noise"] = result.within_noise(name)

    def release(self) -> None:
        self.row["sets"] = len(self.sets)
        self.calls.clear()
        self.sets.clear()
        self.judge = None
        # what it compiled, or else the graphs of one row would fill the memory of the next
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        # where the device is lost, the next to use it will say so
        with contextlib.suppress(Exception):
            self.place.release()


def _guarded(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def guard() -> Any:
        try:
            return call()
        except Exception as problem:
            raise _Failed(name, problem) from problem

    return guard
