"""The stages of plans but for tests: the extension, ceilings, compilation by many processes, rows, the sweep."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import ahead
import torch
from stages import ROOT, STATE, Outcome, Run, Stage, last_lines, publish, say, started

from vitfast.bench import ceilings, harness
from vitfast.bench.case import Case
from vitfast.bench.record import set_aside
from vitfast.choose import builtin, tuning_cache
from vitfast.kernels import extension as compiled_half
from vitfast.measure import device as devices
from vitfast.measure.timing import Sampler

SWEEP, DEFAULTS = (ROOT / "benchmarks" / name for name in ("sweep.py", "defaults.py"))
# with less time than that no extension is built
BUILD_S = 30.0
# exit status of sweep.py where it refuses a record, and when the time was up with rows left
MISUSED, MORE = 2, 4
# of the sweep's time, at most, for compiling; and for its last row
COMPILE_S, ROW_S = 150.0, 8.0


def extension(run: Run, stage: Stage, budget_s: float) -> Outcome:
    """Build the extension in place, unless it is there; without it ops run on stock operators, which is no failure."""
    failed = []
    cuda = run.device.type == "cuda"
    there = (ROOT / "vitfast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists()
    # what was built stays in the tree while its sources may be replaced; what could not be built is not tried again
    sources = tuning_cache.digest_of([ROOT / "setup.py", *sorted((ROOT / "csrc").rglob("*.*"))])
    built_from, wanted = ROOT / "build" / "built_from", f"{sources} {nvcc()}"
    if built_from.exists():
        known = built_from.read_text() == wanted
    else:
        # one that was built where there was no nvcc is of no use on a GPU
        known = there and (not cuda or compiled_half.build_report()["cuda"])
    if not run.tiny and budget_s > BUILD_S and not known:
        found = {"NVCC": nvcc()} if nvcc() else {}
        if cuda:
            # for this card only: a third of the time
            capability = torch.cuda.get_device_capability(run.device)
            os.environ.setdefault("VITFAST_CUDA_ARCHS", "90a" if capability == (9, 0) else "{}{}".format(*capability))
        status, seconds, text = started([sys.executable, "setup.py", "build_ext", "--inplace"], budget_s, run, **found)
        told = [line for line in text.splitlines() if line.startswith("vitfast:")]
        run.note("build", {"status": status, "seconds": seconds, "told": told[-1] if told else text[-300:]})
        say(f"extension: {run.record.data['run']['build']['told']}")
        if status is not None or budget_s >= stage.budget_s:
            built_from.parent.mkdir(exist_ok=True)
            built_from.write_text(wanted)
        if status == 0:
            if compiled_half.__package__ + "._C" in sys.modules:
                # the one that this process has loaded stays what it was
                run.restart()
        else:
            failed = [f"the extension was not built: {text[-300:] or f'no end after {budget_s:.0f} s'}"]
        compiled_half.load.cache_clear()
        importlib.invalidate_caches()
    run.no_extension = compiled_half.cuda_status()["why"] if cuda else compiled_half.load()[1]
    run.note("extension", f"absent: {run.no_extension}" if run.no_extension else "present")
    return Outcome(failed)


def nvcc() -> str:
    """Where it is; '' where it is not."""
    return shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which("/usr/local/cuda/bin/nvcc") or ""


def measure_ceilings(run: Run, stage: Stage, budget_s: float) -> Outcome:
    sizes = {"size": 256, "widths": (64,), "batch": 1} if run.tiny else {}
    seconds = 0.01 if run.tiny else min(2.0, budget_s / 14)
    run.record.data["ceilings"] = ceilings.measure(run.device, seconds=seconds, progress=say, **sizes)
    return Outcome()


# rows


class Hasty(devices.Cpu):
    """No pauses and short samples: nobody looks at the times of small sizes."""

    def sampler(self) -> Sampler:
        sampler = super().sampler()
        sampler.pause_s, sampler.min_ms = 0.0, 0.5
        return sampler


def rows(run: Run, stage: Stage, budget_s: float) -> Outcome:
    """Rows of cases. Each says so if the extension was absent; how much this process compiled stands with the call."""
    place = Hasty() if run.tiny and run.device.type == "cpu" else None
    made = (partly(maker, run) for maker in stage.makers(run))
    with compilations() as counted:
        try:
            red = harness.run_cases(
                made, run.record, budget_s=budget_s, stage=stage.name, seconds=seconds(run, stage.name), place=place,
                progress=say,
            )  # fmt: skip
        except harness.DeviceLost:
            blame(run)
            raise
        finally:
            run.stage(stage.name)["calls"][-1]["compiled"] = counted
    skipped = [each["why"] for each in run.record.data["skipped"] if each["stage"] == stage.name]
    left = harness.cut_short(run.record, stage.name) or any(why.startswith(harness.NO_TIME_LEFT) for why in skipped)
    return Outcome(red, harness.NO_TIME_LEFT if left else "")


def seconds(run: Run, name: str) -> float:
    """How long to time a row."""
    if run.tiny:
        return 0.05
    if run.device.type != "cuda":
        return 5.0
    return 0.5 if name.startswith("ops") else 1.0


def partly(maker: Callable[[], Case], run: Run) -> Callable[[], Case]:
    """The case without the variants that broke the device in an earlier call."""

    def make() -> Case:
        case = maker()
        lost = run.record.data["lost"].get(case.key, {})
        if {"*", case.baseline, case.yardstick} & lost.keys():
            raise ValueError(f"{case.key}: {'; '.join(lost.values())}")
        # rows that are there stay when a later part of the sweep makes other tables
        notes = {**case.notes, "tables": tables()}
        if run.no_extension:
            notes["extension"] = f"absent: {run.no_extension}"
        variants = {name: variant for name, variant in case.variants.items() if name not in lost}
        return replace(case, variants=variants, notes=notes)

    return make


def blame(run: Run) -> None:
    """Note which variant of the row in the making broke the device, so that the next call does without it."""
    key = run.record.running
    row = next((row for row in run.record.rows if row["key"] == key), {"variants": {}})
    broke = {
        name: each["not_timed"]
        for name, each in row["variants"].items()
        if each.get("not_timed", "the device was lost") != "the device was lost"
    }
    run.record.data["lost"].setdefault(key, {}).update(broke or {"*": "the device was lost"})


@contextlib.contextmanager
def compilations() -> Iterator[dict[str, int]]:
    """How many kernels of Triton and graphs of torch.compile this process compiled itself, having found no other's."""
    found = {"triton": 0, "graphs": 0}
    try:
        from triton import knobs
    except ImportError:
        knobs = None

    def listen(*, cache_hit: bool, **_: Any) -> None:
        found["triton"] += not cache_hit

    def graphs() -> int:
        utils = sys.modules.get("torch._dynamo.utils")
        return utils.counters["inductor"]["fxgraph_cache_miss"] if utils else 0

    before = graphs()
    if knobs is not None:
        knobs.compilation.listener = listen
    try:
        yield found
    finally:
        found["graphs"] = graphs() - before
        if knobs is not None:
            knobs.compilation.listener = None


def compiled_by_many(run: Run, stage: Stage, budget_s: float, plan: str) -> Outcome:
    """Fill the compilers' caches for the rows that are left, with a process for almost every core."""
    # not what others left: one that hangs would take all of it
    took, counts, problems = ahead.compiled(run, plan, min(budget_s, stage.budget_s * run.patience))
    run.note("compiled", {"seconds": took, **counts, "problems": problems})
    say(f"compiled in {took:.0f} s: {counts}")
    return Outcome()


# the sweep, and the tables that are made from it


def sweep(run: Run, stage: Stage, budget_s: float) -> Outcome:
    """What every configuration takes; a process of its own, which goes on with the rows that are there."""
    # it may be in the middle of a row when its time is up
    limit_s = max(budget_s - ROW_S, 1.0)
    command = [
        sys.executable, str(SWEEP), "--out", str(run.tuned), "--resume", "--limit", f"{limit_s:.0f}", "--compile",
        f"{min(COMPILE_S, limit_s / 3):.0f}", *["--tiny"] * run.tiny,
    ]  # fmt: skip
    watch = partial(publish, run.tuned, run.out)
    status, seconds, text = started(command, budget_s, run, watch=watch)
    # of kernels that were mended since, or of another driver
    if status == MISUSED and (before := set_aside(run.tuned)):
        say(f"{last_lines(text)[-300:]}\nthat record is now {before}")
        set_aside(run.out / run.tuned.name)
        status, _, text = started(command, budget_s - seconds, run, watch=watch)
    run.stage(stage.name)["last"] = last_lines(text)
    say(text[-300:].strip())
    if status == 0:
        return Outcome()
    why = "no end" if status is None else f"exit status {status}"
    failed = [] if status in (None, MORE) else [f"sweep: {why}: {(text.strip().splitlines() or ['nothing'])[-1]}"]
    # a wrong result is in the file, and a wrong call does not get right by itself; the device may come back
    return Outcome(failed, "" if status in (1, 2) else why)


def defaults(run: Run, stage: Stage, budget_s: float) -> Outcome:
    """Make the built-in tables from the sweep. What this process has loaded are then others, so it begins again."""
    if not run.tuned.exists():
        run.note("defaults", "as they were: there is no sweep of this device")
        return Outcome()
    before = tables()
    command = [sys.executable, str(DEFAULTS), "--write", "--from", str(run.tuned)]
    if run.tiny:
        # times of small sizes decide nothing
        command += ["--into", str(STATE)]
    status, _, text = started(command, budget_s, run)
    changed = tables() != before
    run.note("defaults", {"status": status, "changed": changed, "last": last_lines(text)})
    say(f"defaults: status {status}, {'other' if changed else 'the same'} tables")
    if changed:
        run.restart()
    return Outcome()


def tables() -> str:
    """A digest of the built-in tables."""
    return tuning_cache.digest_of(sorted(builtin.FOLDER.glob("measured_sm*.json")))
