"""Run benchmark cases: check every variant, time what is right in interleaved rounds, count the work.

A variant of ours whose result `vitfast.check.acceptance` rejects gets no time, only the rule's message. A rival that is
rejected is timed and marked. What fails, runs out of memory or is not installed is listed with the reason.

The policy is the same for all variants: the same input sets, drawn from one seed and rotated so that none is in the
cache when its turn comes; every call allocates its results from torch's caching allocator and drops them; compilation
is over before anything is timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from vitfast.bench import apart
from vitfast.bench import ceilings as limits
from vitfast.bench import record as records
from vitfast.bench.case import Case, Tensors, Variant
from vitfast.bench.judge import Judge, sets_to_judge
from vitfast.measure import device as devices
from vitfast.measure.machine import OtherProcesses
from vitfast.measure.timing import Comparison, Repeated, interleaved_medians, rotating

Row = dict[str, Any]

SEED = 0
NO_TIME_LEFT = "no time left"
# what names of variants end in that take most of the time of a row to get ready
COMPILERS = ("compiled", "reduce-overhead", "max-autotune")
# by variant: how long it last took to build, so that a compiler is not started that cannot finish in time
TOOK_S: dict[str, float] = {}
CUT_SHORT = "the run was cut short while its process ran"


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


def run_case(
    case: Case,
    *,
    seconds: float,
    place: devices.Cpu | devices.Cuda | None = None,
    ceilings: Mapping[str, Any] | None = None,
    stage: str = "",
    deadline: float | None = None,
    keep: Callable[[Row], None] = lambda row: None,
) -> Row:
    """Build, check and time the variants of `case`.

    Args:
        seconds: aimed-at time for the interleaved rounds; building and checking come on top.
        place: in place of the device that the case names.
        ceilings: what `vitfast.bench.ceilings.measure` returned, for the percent of them.
        deadline: on `place.clock`: what has not been built by then is not.
        keep: gets the row before variants that are `apart` are started, which may take long.

    Returns:
        The row that `vitfast.bench.record` describes, without what `Record.add` puts in.

    Raises:
        DeviceLost: a variant has broken the device for everybody.
    """
    place = place or devices.of(case.device)
    run = _Run(case, place, seconds, deadline)
    with place.current():
        try:
            run.prepare()
            run.build()
            run.time()
        except DeviceLost as lost:
            for name in (*run.open(), *run.open(apart=True)):
                run.variants[name]["not_timed"] = "the device was lost"
            lost.row = run.finish(stage)
            raise
        finally:
            run.release()
    run.count_work(ceilings or {})
    if waiting := run.open(apart=True):
        row = run.finish(stage)
        row["variants"] |= {name: row["variants"][name] | {"not_timed": CUT_SHORT} for name in waiting}
        keep(row)
    run.run_apart()
    run.count_work(ceilings or {})
    return run.finish(stage)


class _Run:
    """One row in the making."""

    def __init__(self, case: Case, place: devices.Cpu | devices.Cuda, seconds: float, deadline: float | None) -> None:
        self.case, self.place, self.seconds, self.deadline = case, place, seconds, deadline
        self.began = place.clock()
        self.variants: dict[str, Row] = {}
        for name, variant in case.variants.items():
            missing = variant.missing()
            verb = "are" if len(missing) > 1 else "is"
            self.variants[name] = {"ours": variant.ours} | ({"part": True} if variant.part else {})
            if missing:
                self.variants[name]["absent"] = f"{' and '.join(missing)} {verb} not installed"
        self.calls: dict[str, Callable[[], Any]] = {}
        self.sets: list[Tensors] = []
        self.judge: Judge | None = None
        self.facts: Row = {}
        tf32 = case.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        self.tf32 = tf32 if case.dtype == "fp32" and case.device.type == "cuda" else None

    def open(self, apart: bool = False) -> list[str]:
        """Variants of which nothing is known yet."""
        return [
            name
            for name, variant in self.case.variants.items()
            if (variant.apart is not None) == apart and not {"absent", "not_timed", "ms"} & self.variants[name].keys()
        ]

    def fail(self, name: str, problem: Exception) -> None:
        out_of_memory = isinstance(problem, torch.OutOfMemoryError)
        text = devices.first_line(problem)
        self.variants[name]["not_timed"] = f"out of memory: {text}" if out_of_memory else text
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
        case, place = self.case, self.place
        generator = torch.Generator(case.device).manual_seed(SEED)
        try:
            first = case.inputs(generator)
            size = sum(t.numel() * t.element_size() for t in first)
            self.sets = [first]
            judged = sets_to_judge(case, first)
            wanted = max(devices.input_sets(place, size, case.work.bytes), judged)
            self.sets += [case.inputs(generator) for _ in range(wanted - 1)]
            self.judge = Judge(case, first, bool(self.tf32), self.sets[1:judged])
        except Exception as problem:
            for name in (*self.open(), *self.open(apart=True)):
                self.fail(name, problem)

    def build(self) -> None:
        first = dict.fromkeys([self.case.yardstick, self.case.baseline])
        for name in [*first, *(name for name in self.open() if name not in first)]:
            if name not in self.open():
                continue
            if self.deadline is not None and self.place.clock() + TOOK_S.get(name, 0.0) > self.deadline:
                self.variants[name]["not_timed"] = NO_TIME_LEFT
                continue
            try:
                self.build_one(name, self.case.variants[name])
            # other people's software may fail in any way, which must not cost the rest of the run
            except Exception as problem:
                if name == self.case.yardstick:
                    self.judge.no_measure = f"the yardstick failed: {devices.first_line(problem)}"
                self.fail(name, problem)

    def build_one(self, name: str, variant: Variant) -> None:
        began = self.place.clock()
        found = self.variants[name]
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
        verdict, fault = ({}, "") if variant.part else self.judge.judge(results, variant.ours)
        found |= verdict
        if fault and variant.ours:
            found["not_timed"] = fault
            return
        if fault:
            found["why_not_accepted"] = fault
        self.calls[name] = self.guarded(name, rotating(function, self.sets, keep_results=self.place.graphs))

    def guarded(self, name: str, call: Callable[[], Any]) -> Callable[[], Any]:
        def guard() -> Any:
            try:
                return call()
            except Exception as problem:
                raise _Failed(name, problem) from problem

        return guard

    def time(self) -> None:
        baseline = self.case.baseline
        others = OtherProcesses() if self.case.device.type == "cpu" else None
        if self.case.mode in ("training", "forward+backward"):
            # what brings graphs of its own has its memory in their pool, whose peak is past
            for name in [name for name in self.calls if self.case.variants[name].graph]:
                try:
                    self.variants[name] |= self.place.peak_mib(self.calls[name])
                except _Failed as failed:
                    self.drop(name, failed.problem)
                except Exception as problem:
                    self.drop(name, problem)
        self.place.release()
        before = self.place.state()
        while self.calls:
            # the first is what ratios compare with
            calls = {name: self.calls[name] for name in sorted(self.calls, key=lambda name: name != baseline)}
            graph = {name: self.case.variants[name].graph for name in calls}
            left = self.seconds if self.deadline is None else min(self.seconds, self.deadline - self.place.clock())
            try:
                self.place.warm_up(next(iter(calls.values())))
                arranged = devices.arrange(calls, graph, self.place, len(self.sets))
                result = interleaved_medians(
                    {name: each.call for name, each in arranged.items()},
                    budget_s=max(left, 0.0),
                    sampler=self.place.sampler(),
                )
            except _Failed as failed:
                self.drop(failed.name, failed.problem)
            # an error that the device reports later than the call that made it
            except Exception as problem:
                for name in list(self.calls):
                    self.drop(name, problem)
            else:
                self.facts["others"] = None if others is None else others.share()
                self.note(result, {name: each.facts for name, each in arranged.items()})
                first = next(iter(calls))
                call = arranged[first].call
                times = call.times if isinstance(call, Repeated) else 1
                # the times are there; where this breaks the device, the next row will say so
                with contextlib.suppress(Exception):
                    self.facts["after"] = self.place.state_under(call, result.median_ms[first] * times)
                break
        self.facts["before"] = before

    def drop(self, name: str, problem: Exception) -> None:
        del self.calls[name]
        self.fail(name, problem)

    def note(self, result: Comparison, facts: Mapping[str, Row]) -> None:
        baseline = self.case.baseline
        self.facts |= {"rounds": result.rounds, "noisy": result.noisy}
        if baseline in result.median_ms:
            low, high = result.noise_spread()
            self.facts |= {"noise": result.noise, "noise_25": low, "noise_75": high}
        for name in result.median_ms:
            ms_20, ms, ms_80 = result.quantiles_ms(name)
            found = self.variants[name]
            found |= {"ms": ms, "ms_20": ms_20, "ms_80": ms_80, **facts[name]}
            if baseline in result.median_ms and name != baseline:
                low, high = result.spread[name]
                found |= {"ratio": result.ratio[name], "ratio_25": low, "ratio_75": high}
                found["within_noise"] = result.within_noise(name)

    def release(self) -> None:
        self.facts.setdefault("sets", len(self.sets))
        self.calls.clear()
        self.sets, self.judge = [], None
        # what it compiled, or else the graphs of one row would fill the memory of the next
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        # where the device is lost, the next to use it will say so
        with contextlib.suppress(Exception):
            self.place.release()

    def run_apart(self) -> None:
        for name in self.open(apart=True):
            limit = self.case.variants[name].apart
            if self.deadline is not None:
                limit = min(limit, self.deadline - self.place.clock())
            if limit <= 0:
                self.variants[name]["not_timed"] = NO_TIME_LEFT
            else:
                self.variants[name] |= apart.run(self.case, name, self.seconds, limit)

    def count_work(self, ceilings: Mapping[str, Any]) -> None:
        work = self.case.work
        roofline = limits.roofline(work, ceilings, self.case.dtype, tf32=bool(self.tf32))
        for found in self.variants.values():
            if "ms" in found:
                found |= {"tflops": work.flops / found["ms"] / 1e9, "gbps": work.bytes / found["ms"] / 1e6}
                if roofline is not None:
                    ms, limit = roofline
                    found |= {"percent": 100 * ms / found["ms"], "limit": limit}

    def finish(self, stage: str) -> Row:
        case = self.case
        return {
            "key": case.key, "kind": case.kind, "name": case.name, "mode": case.mode, "shape": dict(case.shape),
            "batch": case.batch, "dtype": case.dtype, "autocast": case.autocast, "notes": dict(case.notes),
            "tf32": self.tf32, "work": dataclasses.asdict(case.work), "baseline": case.baseline,
            "yardstick": case.yardstick, "noise": None, "noise_25": None, "noise_75": None, "rounds": 0, "noisy": 0,
            "others": None, "before": None, "after": None, **self.facts, "stage": stage,
            "seconds": self.place.clock() - self.began, "variants": dict(self.variants),
        }  # fmt: skip


def run_cases(
    cases: Iterable[Case | Callable[[], Case]],
    record: records.Record,
    *,
    budget_s: float,
    stage: str,
    seconds: float = 2.0,
    place: devices.Cpu | devices.Cuda | None = None,
    progress: Callable[[str], None] = print,
    clock: Callable[[], float] = time.perf_counter,
) -> list[str]:
    """Run `cases` in order and write each row to `record` as soon as it is there.

    Cases with times in the record are left out, unless there was no time for one of their variants; those with
    compilers come last. One that would probably not fit into
    what is left of the budget, going by the last rows of its kind, is listed as skipped. Interrupted, it lists the
    rest likewise and passes the interrupt on.

    Args:
        cases: a callable makes its case when its turn comes.
        budget_s: for all of them.
        stage: what the rows say they belong to.
        seconds: as `run_case`.

    Returns:
        Which of our variants got no time, and why.

    Raises:
        DeviceLost: after noting the rest as skipped.
    """
    began, red, skipped, left = clock(), [], [], budget_s
    took: dict[tuple[bool, str], list[float]] = {}
    made = list(_made(cases, record, stage, progress))
    done = record.finished() - cut_short(record, stage)
    waiting = sorted((case for case in made if case.key not in done), key=_is_compiled)
    if len(waiting) < len(made):
        progress(f"{stage}: {len(made) - len(waiting)} of {len(made)} rows are there already")
    for i, case in enumerate(waiting):
        left = budget_s - (clock() - began)
        rest = [each.key for each in waiting[i:]]
        of_kind = took.setdefault((_is_compiled(case), case.mode), [])
        needed = max(of_kind[-3:], default=seconds)
        if needed > left:
            skipped.append(case.key)
            why = f"{NO_TIME_LEFT}: {max(left, 0):.0f} s of {budget_s:.0f}, a row takes about {needed:.0f}"
            record.skip(stage, [case.key], why)
            continue
        record.running = case.key
        earlier = next((each for each in record.rows if each["key"] == case.key), {"variants": {}})

        def keep(row: Row, earlier: Row = earlier) -> None:
            if _timed(row) >= _timed(earlier):
                record.add(row)

        row_began = clock()
        try:
            row = run_case(
                case, seconds=seconds, place=place, ceilings=record.data["ceilings"], stage=stage,
                deadline=row_began + left, keep=keep,
            )  # fmt: skip
        except DeviceLost as lost:
            if lost.row is not None:
                record.add(lost.row)
            record.skip(stage, rest[1:], f"the device was lost: {devices.first_line(lost)}")
            raise
        except KeyboardInterrupt:
            record.skip(stage, [key for key in rest if key not in record.finished()], "interrupted")
            raise
        keep(row)
        of_kind.append(clock() - row_began)
        left = budget_s - (clock() - began)
        progress(f"{stage} {i + 1}/{len(waiting)}, {max(left, 0):.0f} s left: {case.key}: {summary(row)}")
        red += [
            f"{case.key}: {name}: {variant['not_timed']}"
            for name, variant in row["variants"].items()
            if variant["ours"] and "not_timed" in variant
        ]
    record.running = None
    if skipped:
        progress(f"{stage}: {len(skipped)} of {len(made)} rows skipped, {why}")
    return red


def cut_short(record: records.Record, stage: str) -> set[str]:
    """Keys of the rows of `stage` that lack a variant for which there was no time."""
    return {
        row["key"]
        for row in record.rows
        if row.get("stage") == stage
        and any(each.get("not_timed") in (NO_TIME_LEFT, CUT_SHORT) for each in row["variants"].values())
    }


def _timed(row: Row) -> int:
    return sum("ms" in variant for variant in row["variants"].values())


def _is_compiled(case: Case) -> bool:
    return any(name.endswith(COMPILERS) for name in case.variants)


def _made(
    cases: Iterable[Case | Callable[[], Case]], record: records.Record, stage: str, progress: Callable[[str], None]
) -> Iterator[Case]:
    for case in cases:
        try:
            yield case if isinstance(case, Case) else case()
        # a case that needs what is not installed
        except Exception as problem:
            name = getattr(getattr(case, "func", case), "__name__", "a case")
            key = " ".join([name, *map(str, getattr(case, "keywords", {}).values())])
            record.skip(stage, [key], devices.first_line(problem))
            progress(f"{stage}: {key} skipped: {devices.first_line(problem)}")


def summary(row: Row) -> str:
    """A row in one line."""
    parts = []
    for name, found in row["variants"].items():
        if "ms" in found:
            ratio = f" ({found['ratio']:.2f}x)" if "ratio" in found else ""
            marks = [mark for mark in ("graph", "host_bound", "within_noise", "apart") if found.get(mark)]
            marks += ["not accepted"] * (found.get("accepted") is False) + ["a part"] * bool(found.get("part"))
            parts.append(f"{name} {found['ms']:.4g} ms{ratio}" + "".join(f" [{m.replace('_', ' ')}]" for m in marks))
        else:
            parts.append(f"{name}: {found.get('absent') or found.get('not_timed')}")
    return "; ".join(parts)
