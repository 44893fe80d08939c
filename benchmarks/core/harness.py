"""Run benchmark cases within a budget: `vitfast.check.compare` each, count the work, write the rows to a record."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from benchmarks.core import apart
from benchmarks.core import ceilings as limits
from benchmarks.core import record as records
from vitfast.check.calls import SEED  # noqa: F401
from vitfast.check.case import Case
from vitfast.check.compare import NO_TIME_LEFT, DeviceLost, Row, compare
from vitfast.measure import device as devices

# what names of variants end in that take most of the time of a row to get ready
COMPILERS = ("compiled", "reduce-overhead", "max-autotune")
# share of the CPUs' time that other processes may take before a row says so
OTHERS = 0.03
CUT_SHORT = "the run was cut short while its process ran"

Maker = Callable[[], Case]


def run_case(
    case: Case, *, seconds: float, place: devices.Place | None = None, ceilings: Mapping[str, Any] | None = None,
    stage: str = "", deadline: float | None = None, keep: Callable[[Row], None] = lambda row: None,
    building: Callable[[str | None], None] = lambda name: None,
) -> Row:  # fmt: skip
    """Build, check and time the variants of `case`.

    Args:
        seconds: aimed-at time for the interleaved rounds; building and checking come on top.
        place: in place of the device that the case names.
        ceilings: what `ceilings.measure` returned, for the percent of them.
        deadline: on `place.clock`: what has not been built by then is not.
        keep: gets the row before variants that are `apart` are started, which may take long.
        building: as `compare`.

    Returns:
        The row that `benchmarks.core.record` describes, without what `Record.add` puts in.

    Raises:
        DeviceLost: a variant has broken the device for everybody.
    """
    place = place or devices.of(case.device)
    began = place.clock()
    here = {name: variant for name, variant in case.variants.items() if variant.apart is None}
    waiting = {
        name: {"ours": variant.ours, "not_timed": CUT_SHORT}
        for name, variant in case.variants.items()
        if variant.apart is not None
    }

    def row(found: Row) -> Row:
        variants = {name: (found["variants"] | waiting)[name] for name in case.variants}
        for each in variants.values():
            _count_work(each, case, ceilings or {}, bool(found["tf32"]))
        return {
            "key": case.key, "kind": case.kind, "name": case.name, "mode": case.mode, "shape": dict(case.shape),
            "batch": case.batch, "dtype": case.dtype, "autocast": case.autocast, "notes": dict(case.notes),
            "work": dataclasses.asdict(case.work), "baseline": case.baseline, "yardstick": case.yardstick, **found,
            "stage": stage, "seconds": place.clock() - began, "variants": variants,
        }  # fmt: skip

    try:
        found = compare(
            dataclasses.replace(case, variants=here), seconds=seconds, place=place, deadline=deadline, building=building
        )
    except DeviceLost as lost:
        for each in waiting.values():
            each["not_timed"] = "the device was lost"
        lost.row = row(lost.row)
        raise
    if waiting:
        keep(row(found))
    for name, each in waiting.items():
        limit = case.variants[name].apart
        if deadline is not None:
            limit = min(limit, deadline - place.clock())
        if limit <= 0:
            each["not_timed"] = NO_TIME_LEFT
        else:
            waiting[name] = apart.run(case, name, seconds, limit)
    return row(found)


def _count_work(found: Row, case: Case, ceilings: Mapping[str, Any], tf32: bool) -> None:
    if "ms" not in found:
        return
    work = case.work
    found |= {"tflops": work.flops / found["ms"] / 1e9, "gbps": work.bytes / found["ms"] / 1e6}
    if (roofline := limits.roofline(work, ceilings, case.dtype, tf32=tf32)) is not None:
        ms, limit = roofline
        found |= {"percent": 100 * ms / found["ms"], "limit": limit}


def run_cases(
    cases: Iterable[Case | Maker], record: records.Record, *, budget_s: float, stage: str, seconds: float = 2.0,
    place: devices.Place | None = None, progress: Callable[[str], None] = print,
    clock: Callable[[], float] = time.perf_counter,
) -> list[str]:  # fmt: skip
    """Run `cases` in order and write each row to `record` as soon as it is there.

    Cases with times in the record are left out, unless there was no time for one of their variants; those with
    compilers come last. One that would probably not fit into what is left of the budget, going by the last rows of its
    kind, is listed as skipped. Interrupted, it lists the rest likewise and passes the interrupt on.

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
    began, red, skipped = clock(), [], 0
    took: dict[tuple[bool, str], list[float]] = {}
    made = list(_made(cases, record, stage, progress))
    done = record.finished() - cut_short(record, stage)
    waiting = sorted((case for case in made if case.key not in done), key=_is_compiled)
    if len(waiting) < len(made):
        progress(f"{stage}: {len(made) - len(waiting)} of {len(made)} rows are there already")
    for i, case in enumerate(waiting):
        left = budget_s - (clock() - began)
        of_kind = took.setdefault((_is_compiled(case), case.mode), [])
        needed = max(of_kind[-3:], default=seconds)
        if needed > left:
            skipped += 1
            why = f"{NO_TIME_LEFT}: {max(left, 0):.0f} s of {budget_s:.0f}, a row takes about {needed:.0f}"
            record.skip(stage, [case.key], why)
            continue
        record.running, row_began = case.key, clock()
        earlier = next((each for each in record.rows if each["key"] == case.key), {"variants": {}})

        def keep(row: Row, earlier: Row = earlier) -> None:
            if _timed(row) >= _timed(earlier):
                record.add(row)

        def building(name: str | None) -> None:
            record.building = name

        rest = [each.key for each in waiting[i:]]
        try:
            row = run_case(
                case, seconds=seconds, place=place, ceilings=record.data["ceilings"], stage=stage,
                deadline=row_began + left, keep=keep, building=building,
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
        progress(f"{stage}: {skipped} of {len(made)} rows skipped, {why}")
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
    cases: Iterable[Case | Maker], record: records.Record, stage: str, progress: Callable[[str], None]
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
    return "; ".join(f"{name}: {told}" for name, told in of_variants(row))


def of_variants(row: Row) -> Iterator[tuple[str, str]]:
    """What is to be told of each variant. A ratio above 1 is faster than the baseline, ~ is within the noise."""
    others = row.get("others") or 0
    for name, found in row["variants"].items():
        if "ms" not in found:
            yield (
                name,
                (found.get("absent") or found.get("not_timed", "not timed")).removeprefix("NotImplementedError: "),
            )
            continue
        first = name == row.get("baseline")
        told = f"{found['ms']:.4g} ms" + (f" ({found['ms_20']:.4g}-{found['ms_80']:.4g})" if "ms_20" in found else "")
        if found.get("ratio") is not None:
            sign = "~" if found.get("within_noise") else ""
            told += f", {sign}{found['ratio']:.2f}x ({found['ratio_25']:.2f}-{found['ratio_75']:.2f})"
        elif first and row.get("noise_25") is not None:
            told += f", noise {row['noise_25']:.2f}-{row['noise_75']:.2f}"
        if found.get("percent") is not None:
            told += f", {found['percent']:.2g} % of {found['limit']}"
        if found.get("error_ratio") is not None:
            told += f", error {found['error_ratio']:.2f}"
        if found.get("error") is not None:
            told += f", {found['error']:.1%} off"
        marks = {
            "not accepted": found.get("accepted") is False,
            "not checked": found.get("accepted") is None and not found.get("part"),
            "a part": found.get("part"),
            "graph": found.get("graph"),
            "bound by the host": found.get("host_bound"),
            "apart": found.get("apart"),
            f"ready after {found.get('compile_s', 0):.0f} s": found.get("compile_s", 0) >= 1,
            f"{row.get('noisy')} of {row.get('rounds')} rounds noisy": first and row.get("noisy"),
            f"{others:.0%} of the CPUs used by others": first and others > OTHERS,
        }
        yield name, told + "".join(f" [{mark}]" for mark, holds in marks.items() if holds)
