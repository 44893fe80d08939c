"""Stages before and of rows: the extension, ceilings, what many processes compile, rows of cases, built-in tables."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.core import ceilings, harness
from benchmarks.core.harness import COMPILERS, SEED
from benchmarks.gpu import workers
from benchmarks.gpu.stages import LOG_CHARACTERS, ROOT, STATE, Outcome, Run, Stage, Task, compilations, printed, say
from vitfast.check.case import DTYPES, Case, Variant
from vitfast.choose import builtin, tuning_cache
from vitfast.kernels import cpu as cpu_kernels
from vitfast.kernels import extension as compiled_half
from vitfast.measure import device as devices
from vitfast.measure.timing import Sampler

# with less time than that no extension is built
BUILD_S = 30.0
# GiB; a variant that needs more is compiled by few processes
LIGHT_GIB = 4.0
# of the memory, for such of one size; the rest is for others, and what a process needs before it computes anything
SHARE = 0.5


def extension(run: Run, stage: Stage, budget_s: float) -> Outcome:
    """Build the extension in place, unless it is there; without it ops run on stock operators, which is no failure."""
    failed, cuda = [], run.device.type == "cuda"
    # what was built stays in the tree while its sources may be replaced; what could not be built is not tried again
    sources = tuning_cache.digest_of([ROOT / "setup.py", *sorted((ROOT / "csrc").rglob("*.*"))])
    built_from, wanted = ROOT / "build" / "built_from", f"{sources} {nvcc()}"
    known = built_from.exists() and built_from.read_text() == wanted
    if not run.tiny and budget_s > BUILD_S and not known:
        found = {"NVCC": nvcc()} if nvcc() else {}
        if cuda:
            # for this card only: a third of the time
            major, minor = torch.cuda.get_device_capability(run.device)
            os.environ.setdefault("VITFAST_CUDA_ARCHS", "90a" if (major, minor) == (9, 0) else f"{major}{minor}")
        status, text = printed([sys.executable, "setup.py", "build_ext", "--inplace"], budget_s, **found)
        told = [line for line in text.splitlines() if line.startswith("vitfast:")]
        run.note("build", {"status": status, "told": told[-1] if told else text[-300:]})
        say(f"extension: {run.record.data['run']['build']['told']}")
        if status is not None or budget_s >= stage.budget_s:
            built_from.parent.mkdir(exist_ok=True)
            built_from.write_text(wanted)
        if status != 0:
            failed = [f"the extension was not built: {text[-300:] or f'no end after {budget_s:.0f} s'}"]
        compiled_half.load.cache_clear()
        importlib.invalidate_caches()
    why = no_extension(run)
    run.note("extension", f"absent: {why}" if why else "present")
    return Outcome(failed)


def no_extension(run: Run) -> str:
    """Why the extension is not used; '' where it is."""
    return compiled_half.cuda_status()["why"] if run.device.type == "cuda" else compiled_half.load()[1]


def nvcc() -> str:
    """Where it is; '' where it is not."""
    return shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which("/usr/local/cuda/bin/nvcc") or ""


def measure_ceilings(run: Run, stage: Stage, budget_s: float) -> Outcome:
    sizes = {"size": 256, "widths": (64,), "batch": 1} if run.tiny else {}
    seconds = 0.01 if run.tiny else min(2.0, budget_s / 14)
    run.record.data["ceilings"] = ceilings.measure(run.device, seconds=seconds, progress=say, **sizes)
    return Outcome()


class Hasty(devices.Cpu):
    """No pauses and short samples: nobody looks at the times of small sizes."""

    def sampler(self) -> Sampler:
        sampler = super().sampler()
        sampler.pause_s, sampler.min_ms = 0.0, 0.5
        return sampler


def place_of(run: Run) -> devices.Place:
    return Hasty() if run.tiny and run.device.type == "cpu" else devices.of(run.device)


def rows(run: Run, stage: Stage, budget_s: float) -> Outcome:
    """Rows of cases. Each says so if the extension was absent; how much this process compiled stands with the call."""
    notes = {"tables": tables()} | ({"extension": f"absent: {why}"} if (why := no_extension(run)) else {})
    on_gpu = 0.5 if stage.name.startswith("ops") else 1.0
    seconds = 0.05 if run.tiny else on_gpu if run.device.type == "cuda" else 5.0
    with compilations() as counted:
        try:
            red = harness.run_cases(
                open_cases([stage], run, notes), run.record, budget_s=budget_s, stage=stage.name,
                seconds=seconds, place=place_of(run), progress=say,
            )  # fmt: skip
        except harness.DeviceLost:
            blame(run)
            raise
        finally:
            run.stage(stage.name)["calls"][-1]["compiled"] = counted
            # what a CPU with tiles chose between them and stock, in this process
            if chosen := cpu_kernels.measured():
                run.stage(stage.name)["chosen"] = chosen
    skipped = [each["why"] for each in run.record.data["skipped"] if each["stage"] == stage.name]
    left = harness.cut_short(run.record, stage.name) or any(why.startswith(harness.NO_TIME_LEFT) for why in skipped)
    return Outcome(red, harness.NO_TIME_LEFT if left else "")


def open_cases(plan: Iterable[Stage], run: Run, notes: dict[str, str]) -> Iterator[Case | Callable[[], Case]]:
    """The cases of a plan without the variants that broke the device in an earlier call; for those that there are not
    the harness will say why."""
    for maker in (maker for stage in plan if stage.makers for maker in stage.makers(run)):
        try:
            case = maker()
        except Exception:
            yield maker
            continue
        lost = run.record.data["lost"].get(case.key, {})
        if {"*", case.baseline, case.yardstick} & lost.keys():
            yield lost_case(case.key, "; ".join(lost.values()))
        else:
            variants = {name: variant for name, variant in case.variants.items() if name not in lost}
            # rows that are there stay when a later part of the sweep makes other tables
            yield replace(case, variants=variants, notes={**case.notes, **notes})


def lost_case(key: str, why: str) -> Callable[[], Case]:
    def make() -> Case:
        raise ValueError(why)

    # by which the harness lists it
    make.__name__ = key
    return make


def blame(run: Run) -> None:
    """Note which variant of the row in the making broke the device, so that the next process does without it."""
    key, lost = run.record.running, "the device was lost"
    row = next((row for row in run.record.rows if row["key"] == key), {"variants": {}})
    told = {name: each.get("not_timed", lost) for name, each in row["variants"].items()}
    broke = {name: why for name, why in told.items() if why != lost}
    run.record.data["lost"].setdefault(key, {}).update(broke or {"*": lost})


def tables() -> str:
    """A digest of the built-in tables."""
    return tuning_cache.digest_of(sorted(builtin.FOLDER.glob("measured_sm*.json")))


def defaults(run: Run, stage: Stage, budget_s: float) -> Outcome:
    """Make the built-in tables from the sweep, for the processes after this one."""
    if not run.tuned.exists():
        run.note("defaults", "as they were: there is no sweep of this device")
        return Outcome()
    before = tables()
    command = [sys.executable, "-m", "benchmarks.gpu.defaults", "--write", "--from", str(run.tuned)]
    # times of small sizes decide nothing
    status, text = printed([*command, *(["--into", str(STATE)] if run.tiny else [])], budget_s)
    run.note("defaults", {"status": status, "changed": tables() != before, "last": text[-LOG_CHARACTERS:]})
    say(f"defaults: status {status}, {'other' if tables() != before else 'the same'} tables")
    return Outcome()


# what is compiled before rows are timed


def compiled(run: Run, stage: Stage, budget_s: float) -> Outcome:
    """Fill the compilers' caches for the rows that are left, with a process for almost every core."""
    began = time.perf_counter()
    done = workers.run_by_many(run.command, budget_s, 2 if run.tiny else 0)
    late = sum(why == workers.NOT_FINISHED for why in done.values())
    problems = [f"{task}: {why}" for task, why in done.items() if why and why != workers.NOT_FINISHED]
    counts = {"compiled": len(done) - late - len(problems), "failed": len(problems), "not_ended": late}
    run.note("compiled", {"seconds": time.perf_counter() - began, **counts, "problems": problems})
    say(f"compiled in {time.perf_counter() - began:.0f} s: {counts}")
    return Outcome()


def compilable(plan: Iterable[Stage], run: Run) -> Iterator[Task]:
    """What there is to compile for this process; who can takes heavy variants first, since few can."""
    # choices between kernels that were timed beside all others are not kept
    from torch._inductor import config as inductor

    inductor.autotune_local_cache = False
    cuda = run.device.type == "cuda"
    memory = torch.cuda.get_device_properties(run.device).total_memory / 2**30 if cuda else 1e9
    cases = [case for case in open_cases(plan, run, {}) if isinstance(case, Case)]
    cases = [case for case in cases if case.key not in run.record.finished()]
    for case in sorted(cases, key=lambda each: gib(each) <= LIGHT_GIB):
        if gib(case) > LIGHT_GIB and int(os.environ[workers.NUMBER]) >= max(1, int(SHARE * memory / gib(case))):
            continue
        for name, variant in case.variants.items():
            if compiles(name, variant):
                yield f"{case.key}: {name}", partial(call_once, case, variant)


def compiles(name: str, variant: Variant) -> bool:
    """Not what is compiled in a process of its own, nor what measures while it compiles: others would disturb that."""
    measures = variant.apart is not None or name.endswith("max-autotune")
    return not measures and not variant.missing() and (variant.ours or name.endswith(COMPILERS))


def gib(case: Case) -> float:
    """About what a call needs, of activations: in training those of all blocks are kept."""
    if case.kind == "op" or "tokens" not in case.shape:
        return 0.0
    # an eager block keeps 17 times its input for its backward
    kept = 17 * case.shape["depth"] if case.mode == "training" else 20
    return case.batch * case.shape["tokens"] * case.shape["dim"] * kept * DTYPES[case.dtype].itemsize / 2**30


def call_once(case: Case, variant: Variant) -> None:
    """In every shape in which the harness will call it."""
    place = devices.of(case.device)
    try:
        with place.current():
            function, inputs = variant.build(), case.inputs(torch.Generator(case.device).manual_seed(SEED))
            function(*inputs)
            if not all(case.per_image) and case.batch > case.check_images:
                function(*case.cut(inputs, case.check_images))
            place.synchronize()
    finally:
        torch._dynamo.reset()
        place.release()
