"""Run a plan of benchmarks: check, tune, models, patched, tests, profile and rest for a GPU, cpu and amx for a CPU.

    python -m benchmarks.gpu.run PLAN|next|all [--out FOLDER] [--minutes M] [--resume] [--device DEVICE] [--tiny]

check    the extension, a test of each kernel and each kind of model, also under compute-sanitizer, ceilings
tune     every configuration of every kernel beside stock operators, and from it the built-in tables
models   ViT-B, S, then others: ours, timm's, Hugging Face's and torchvision's, compiled and not, inference and training
patched  other libraries' ViT-S as they are and after vitfast.patch, inference and training
tests    all tests that need a GPU
profile  what the hardware counts in three kernels, by ncu
rest     ops and further models, for the tables of the report
next     what comes next of these in this order, going on where the last call stopped, for --minutes (9)
all      all of them, for as long as it takes
cpu      ceilings, models and ops against what people would use instead
amx      parts of a prepared model beside oneDNN's, then ViT-S and B beside every compiler, and which goals are met

A plan is a list of stages in order of value, and a stage is a process with a budget: this one never touches the device,
starts them one after the other, ends what has no end with all that it started, and starts a stage again whose process
says that the device was lost. What is known is in one record a plan (and the sweep's own), which a stage's process
writes after every row and about every second of tests, in benchmarks/state with a copy in --out. The record names the
row in the making, so that the process after one that was lost, hung or died leaves out what broke it. What needs
compiling is compiled by many processes that share a list of tasks, before one that compiles nothing takes times. Going
on is nothing but running the same plan again: stages, rows and tests that are in the record are left out.

Each plan of a GPU is over in nine minutes, check and patched in five, on sixteen cores. Needs nothing but this source
tree and a python with torch, triton, timm, transformers, pytest and xdist: no network, nothing installed; rows of a
library that is not there are listed as skipped. What one stage leaves of its budget goes to the next ones, one that
fails or overruns costs those after it nothing, what does not fit is listed as skipped.
`next`, `all` and --resume go on with what is in benchmarks/state, so on another machine put files of an earlier call
there; what is not gone on with gets the suffix .before. --tiny runs every stage on small sizes, on any device; its
records have names of their own, and a copy only where --out says so.

Compilers keep their results in $VITFAST_CACHE_DIR (~/.cache/vitfast), in a folder named after device and versions.
Exit status: 0; 1 where by the records a test failed or a result of ours was wrong; 2 for wrong use; 3 where the time
was up in the middle of something.
"""

from __future__ import annotations

import time

# importing torch takes its part of the time
BEGAN = time.perf_counter()

import argparse  # noqa: E402
import fcntl  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

from benchmarks.core import harness, record  # noqa: E402
from benchmarks.core.cli import PACKAGES  # noqa: E402
from benchmarks.gpu import stages, workers  # noqa: E402
from benchmarks.gpu.plans import LIMITS_S, ON_CPU, ORDER, PLANS  # noqa: E402
from benchmarks.gpu.stages import LOST, ROOT, Kept, Run, Stage, begun, killed, perform, say, slug  # noqa: E402
from vitfast.measure import machine  # noqa: E402
from vitfast.measure.machine import cpu_name  # noqa: E402

NEXT_MINUTES = 9.0
# for who owns a GPU: nobody waits longer, and no budget cuts off what only takes its time
ALL_MINUTES, PATIENCE = 12 * 60.0, 10.0
# for what cannot be interrupted when the time is up, and to end
GRACE_S, LAST_S = 8.0, 2.0
MOST_STARTS = 20
# what a stage's process that was ended says in place of a status: the call's time was up
TIME_UP = "cut short"


class Call:
    """One call of this program, on one device."""

    def __init__(self, told: argparse.Namespace) -> None:
        self.told, self.device, self.cut = told, told.device, False
        self.several = told.run in ("next", "all")
        self.plans = ORDER if self.several else (told.run,)
        self.patience = PATIENCE if told.run == "all" else 1.0
        minutes = {"next": NEXT_MINUTES, "all": ALL_MINUTES}.get(told.run) or LIMITS_S[told.run] / 60
        self.ends = BEGAN + 60 * (minutes if told.minutes is None else told.minutes) - GRACE_S - LAST_S
        self.made = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()
        self.facts = machine.describe(self.device, PACKAGES)
        self.records: dict[str, Kept] = {}

    def files(self, plan: str) -> list[str]:
        """A plan's record, and of tune what the sweep writes."""
        name = stages.name_of(self.made, plan, self.told.tiny)
        return [f"{name}-plan.json", f"{name}.json"] if plan == "tune" else [f"{name}.json"]

    def open(self, plan: str) -> Kept:
        """What this call goes on with; what it does not, in either folder, is set aside."""
        if plan not in self.records:
            path, data = stages.STATE / self.files(plan)[0], None
            resume = self.told.resume or self.several
            if path.exists() and resume:
                try:
                    data = record.open_for_resume(path, self.facts).data
                except ValueError as problem:
                    # of one plan it must not cost the others
                    say(str(problem))
            if data is None:
                # the sweep sees itself whether it goes on with its record
                for name in self.files(plan)[:1] if resume else self.files(plan):
                    for before in filter(None, map(record.set_aside, {stages.STATE / name, self.told.out / name})):
                        say(f"an earlier record is now {before}")
                data = record.Record(path, self.facts).data
            self.records[plan] = Kept(path, data, self.told.out)
        return self.records[plan]

    def run_all(self) -> None:
        """Every plan that is not finished; then again, since there was time that later stages left."""
        for plan in (*self.plans, *self.plans):
            kept = self.open(plan)
            if not is_finished(PLANS[plan], kept.data["stages"]) and self.ends > time.perf_counter():
                kept.write()
                say(f"plan {plan}: {self.ends - time.perf_counter():.0f} s")
                run = Run(self.device, kept, self.told.tiny)
                go(PLANS[plan], run, self.ends, lambda *how, plan=plan: self.start(plan, *how), self.patience)

    def start(self, plan: str, stage: Stage, budget_s: float) -> int | str:
        """Run a stage in a process of its own: its exit status, or why it was ended."""
        command = [
            sys.executable, "-m", "benchmarks.gpu.run", plan, "--device", str(self.device), "--out", str(self.told.out),
            "--record", str(self.records[plan].path), "--stage", stage.name, *["--tiny"] * self.told.tiny,
            "--until", f"{time.time() + budget_s:.1f}",
        ]  # fmt: skip
        left, limit_s = self.ends + GRACE_S - time.perf_counter(), budget_s + stage.overrun_s * self.patience
        process = begun(command)
        try:
            return process.wait(min(left, limit_s))
        except subprocess.TimeoutExpired:
            if left <= limit_s:
                self.cut = True
                return TIME_UP
            return f"no end after {limit_s:.0f} s" if stage.overrun_s else harness.NO_TIME_LEFT
        finally:
            killed(process)

    def report(self) -> int:
        """Say what is done and what is not; exit status."""
        failed = 0
        for plan, kept in self.records.items():
            known = kept.data["stages"]
            left = [stage.name for stage in PLANS[plan] if not is_finished([stage], known)]
            for line in (line for stage in known.values() for line in stage["failed"]):
                failed = 1
                print(f"run: {plan}: {line}", file=sys.stderr)
            # names have commas in them
            told = f"left: {'; '.join(left)}" if left else "finished"
            say(f"{self.told.out / kept.path.name}: {len(kept.rows)} rows, {len(kept.data['skipped'])} skipped, {told}")
        say(f"{time.perf_counter() - BEGAN:.0f} s")
        return 3 if self.cut else failed


def is_finished(plan: Iterable[Stage], known: dict[str, Any]) -> bool:
    return all(stage.always or known.get(stage.name, {}).get("done") for stage in plan)


def go(
    plan: Iterable[Stage], run: Run, ends: float, start: Callable[[Stage, float], int | str], patience: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> None:  # fmt: skip
    """Run the stages that are not done; each has its budget and what those before it left, as far as the time goes.

    A stage that takes longer costs those after it nothing while there is time, and one that fails costs them nothing.
    """
    saved = 0.0
    for stage in plan:
        if run.stage(stage.name)["done"] and not stage.always:
            continue
        began, whole = clock(), f"all of {stage.name}"
        # one that is in every call and hangs must not take what others left
        budget = min(stage.budget_s * patience + (0.0 if stage.always else saved), ends - began)
        if budget < (min(stage.least_s, 2.0) if run.tiny else stage.least_s):
            if not stage.always:
                run.record.skip(stage.name, [whole], harness.NO_TIME_LEFT)
            say(f"{stage.name}: skipped, {harness.NO_TIME_LEFT}")
            continue
        run.record.data["skipped"] = [each for each in run.record.data["skipped"] if each["key"] != whole]
        say(f"{stage.name}: {budget:.0f} s of {ends - began:.0f}")
        for _ in range(MOST_STARTS):
            left = budget - (clock() - began)
            if left <= 0 or not goes_on(run, stage, left, start):
                break
        saved = max(0.0, saved + stage.budget_s * patience - (clock() - began))


def goes_on(run: Run, stage: Stage, budget_s: float, start: Callable[[Stage, float], int | str]) -> bool:
    """Start a stage's process and see how it ended; whether another one is to go on at once."""
    run.stage(stage.name)["calls"].append({"date": machine.now(), "budget_s": budget_s, "left": TIME_UP})
    # nor is to be blamed what an earlier call was killed in
    run.record.running = None
    status = start(stage, budget_s)
    kept = run.record
    # what that process wrote
    kept.data = record.read(kept.path)
    key, name, facts = kept.running, kept.building, run.stage(stage.name)
    if status in (0, LOST):
        return status == LOST
    why = status if isinstance(status, str) else f"its process ended with status {status}"
    facts["calls"][-1]["left"] = why
    if why in (TIME_UP, harness.NO_TIME_LEFT):
        key = None
    else:
        facts["failed"].append(": ".join([stage.name, *filter(None, [key or "the stage", name]), why]))
        # what ended it is not known; a second time it is given up
        facts["done"] = key is None and [call["left"] for call in facts["calls"]].count(why) > 1
        say(facts["failed"][-1])
    if key is not None:
        kept.data["lost"].setdefault(key, {})[name or "*"] = why
    kept.running = None
    return key is not None


def perform_one(told: argparse.Namespace) -> int:
    """What a stage's process does, and one that compiles for it."""
    plan, path = PLANS[told.run], Path(told.record)
    command = [sys.executable, "-m", "benchmarks.gpu.run", *sys.argv[1:]]
    run = Run(told.device, Kept(path, record.read(path), told.out), told.tiny, command)
    stage = next(stage for stage in plan if stage.name == told.stage)
    stages.same_keys()
    if told.claims is not None:
        workers.work(told.claims, stage.tasks(run))
        return 0
    stages.end_with_parent()
    status = perform(run, stage, told.until - time.time())
    sys.stdout.flush()
    # a device that was lost is not to be waited for
    os._exit(status)


def alone() -> Any:
    """What to keep open as long as nobody else may run a plan in this tree; None where somebody does."""
    stages.STATE.mkdir(parents=True, exist_ok=True)
    file = (stages.STATE / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def keep_caches(device: torch.device) -> None:
    """Let compilers keep what they made, apart for each device and set of versions."""
    # torch's own names of files tell neither CPUs nor threads apart, for which it chose between its products
    on_cpu = f"{cpu_name()} {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    key = slug(f"{name} torch {torch.__version__} triton {machine.version('triton')}")
    folder = Path(os.environ.get("VITFAST_CACHE_DIR", "~/.cache/vitfast")).expanduser() / key
    for variable, part in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(variable, str(folder / part))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", choices=[*PLANS, "next", "all"], metavar="PLAN")
    parser.add_argument("--out", type=Path, help="(default: benchmarks/results; of --tiny benchmarks/state)")
    parser.add_argument("--resume", action="store_true", help="go on with what is there; next and all always do")
    parser.add_argument("--device", type=torch.device, help="(default: cuda, of the plans cpu and amx: cpu)")
    parser.add_argument("--minutes", type=float, help="for all of the call (default: the plan's; of next 9)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see whether everything works")
    # of the processes that this one starts
    for name, kind in (("--stage", str), ("--until", float), ("--record", Path), (workers.FLAG, Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    told = parser.parse_args(argv)
    if told.minutes is not None and not 0 < told.minutes < math.inf:
        parser.error(f"--minutes must be more than 0, got {told.minutes}")
    told.device = told.device or torch.device("cpu" if told.run in ON_CPU else "cuda")
    # tables and built-in choices are made of what is in results
    told.out = (told.out or (stages.STATE if told.tiny else ROOT / "benchmarks" / "results")).resolve()
    if told.stage is not None:
        return perform_one(told)
    if told.device.type == "cuda" and not torch.cuda.is_available():
        print("run: torch finds no GPU here, `vitfast info` says why; --device cpu --tiny tries it", file=sys.stderr)
        return 2
    if (lock := alone()) is None:
        print(f"run: another run has {stages.STATE}, and would disturb times", file=sys.stderr)
        return 2
    keep_caches(told.device)
    # so that what it started is ended
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        told.out.mkdir(parents=True, exist_ok=True)
        call = Call(told)
        call.run_all()
    except OSError as problem:
        print(f"run: {problem}", file=sys.stderr)
        return 2
    finally:
        lock.close()
    return call.report()


if __name__ == "__main__":
    sys.exit(main())
