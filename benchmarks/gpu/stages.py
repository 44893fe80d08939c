"""What plans are made of: stages with budgets, the records that they leave, and the processes that they start.

A record is kept in `STATE`, with a copy in the output folder after every change. It is that of `vitfast.bench.record`
with two things more:

    stages   by name: "done", whether it needs not be run again; "calls", of each "date", "seconds" and, where something
             is left, "left"; "failed", what of ours failed, a line each; "traceback" where the stage itself did; and
             what stages note of their own ("tests", "compiled", ...)
    lost     by key of a row: variants that broke the device, or "*" for one that had no end, and what was said then
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from outcomes import is_lost

from vitfast.bench import harness, record
from vitfast.bench.case import Case
from vitfast.measure import device as devices
from vitfast.measure import machine

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / "benchmarks" / "state"
LEAST_S = 2.0
# what a stage may take beyond its budget, for what cannot be interrupted, before it counts as stuck
OVERRUN_S = 45.0
LOG_CHARACTERS = 2000

Makers = Iterable[Callable[[], Case]]


class Kept(record.Record):
    """A record with a copy in another folder after every change."""

    def __init__(self, path: Path, data: dict[str, Any], out: Path) -> None:
        self.path, self.data, self.out = path, {"stages": {}, "lost": {}} | data, out

    def write(self) -> None:
        super().write()
        publish(self.path, self.out)


def publish(file: Path, folder: Path) -> None:
    """Copy `file` so that at any time `folder` has a whole one of that name, old or new."""
    if not file.exists() or file.parent == folder:
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{file.name}.tmp"
    # with its time, by which the newer of both is told
    shutil.copy2(file, temporary)
    os.replace(temporary, folder / file.name)


@dataclass
class Run:
    """What the stages of a plan share.

    Attributes:
        ends: when the call has to be over, by time.perf_counter.
        tiny: small sizes only.
        patience: by what budgets are multiplied.
        no_extension: why the compiled extension is not used; '' where it is.
        restart: begins this process again, with what time is left, and does not return.
    """

    device: torch.device
    record: Kept
    ends: float
    tiny: bool
    name: str
    patience: float = 1.0
    no_extension: str = ""
    restart: Callable[[], None] = lambda: None

    @property
    def out(self) -> Path:
        return self.record.out

    @property
    def tuned(self) -> Path:
        """What benchmarks/sweep.py writes for this device."""
        return STATE / f"{self.name.rpartition('-')[0]}-tune.json"

    def note(self, what: str, value: Any) -> None:
        """Into the facts of this call."""
        self.record.data["run"][what] = value
        self.record.write()

    def stage(self, name: str) -> dict[str, Any]:
        empty = {"done": False, "calls": [], "failed": []}
        return self.record.data["stages"].setdefault(name, empty)


@dataclass
class Outcome:
    """What of ours failed, a line each, and why something is left to do, '' where nothing is."""

    failed: list[str] = field(default_factory=list)
    left: str = ""


@dataclass(frozen=True)
class Stage:
    """A part of a plan.

    Attributes:
        budget_s: how long it may take.
        typical_s: how long it takes by what is known, on sixteen cores with cold caches.
        work: called with the run, the stage and how many seconds it may take.
        least_s: with less time than that it is not begun.
        always: in every call; nothing of it is kept in a record.
        makers: the rows of a stage of rows.
    """

    name: str
    budget_s: float
    typical_s: float
    work: Callable[[Run, Stage, float], Outcome]
    least_s: float = LEAST_S
    always: bool = False
    makers: Callable[[Run], Makers] | None = None


def is_finished(plan: Iterable[Stage], stages: dict[str, Any]) -> bool:
    return all(stage.always or stages.get(stage.name, {}).get("done") for stage in plan)


def go(plan: Iterable[Stage], run: Run, clock: Callable[[], float] = time.perf_counter) -> list[str]:
    """Run the stages that are not done; each has its budget and what those before it left, as far as the time goes.

    A stage that takes longer costs those after it nothing while there is time, and one that fails costs them nothing.

    Returns:
        What of ours failed.
    """
    failed, saved = [], 0.0
    for stage in plan:
        facts = run.stage(stage.name)
        if facts["done"] and not stage.always:
            continue
        began, lost = clock(), False
        budget = min(stage.budget_s * run.patience + saved, run.ends - began)
        if budget < (min(stage.least_s, LEAST_S) if run.tiny else stage.least_s):
            if not stage.always:
                run.record.skip(stage.name, [f"all of {stage.name}"], harness.NO_TIME_LEFT)
            say(f"{stage.name}: skipped, {harness.NO_TIME_LEFT}")
            continue
        run.record.data["skipped"] = [e for e in run.record.data["skipped"] if e["key"] != f"all of {stage.name}"]
        say(f"{stage.name}: {budget:.0f} s of {run.ends - began:.0f}")
        call: dict[str, Any] = {"date": machine.now(), "budget_s": budget, "left": "cut short"}
        facts["calls"].append(call)
        run.record.write()
        try:
            with watched(run, stage, budget):
                outcome = stage.work(run, stage, budget)
        except harness.DeviceLost as problem:
            outcome = Outcome([f"{stage.name}: {devices.first_line(problem)}"], "the device was lost")
            raise
        except Exception as problem:
            facts["traceback"] = traceback.format_exc()[-LOG_CHARACTERS:]
            outcome = Outcome([f"{stage.name}: {devices.first_line(problem)}"])
            lost = is_lost(str(problem))
        except BaseException:
            outcome = Outcome([], "interrupted")
            raise
        finally:
            call |= {"seconds": clock() - began, "left": outcome.left}
            facts["done"] = not outcome.left
            facts["failed"] += [line for line in outcome.failed if line not in facts["failed"]]
            run.record.write()
        failed += outcome.failed
        if lost:
            run.restart()
        saved = max(0.0, saved + stage.budget_s * run.patience - (clock() - began))
    return failed


@contextlib.contextmanager
def watched(run: Run, stage: Stage, budget_s: float) -> Iterator[None]:
    """Begin this process again if what is inside has no end: nothing else ends a kernel or a compiler that hangs."""

    def stuck() -> None:
        key, facts = run.record.running, run.stage(stage.name)
        why = f"no end after {budget_s + OVERRUN_S:.0f} s"
        facts["failed"].append(f"{stage.name}: {key or 'the stage'}: {why}")
        facts["calls"][-1]["left"] = why
        if key is None:
            facts["done"] = True
        else:
            run.record.data["lost"].setdefault(key, {})["*"] = why
        run.record.write()
        say(facts["failed"][-1])
        run.restart()

    timer = threading.Timer(min(budget_s + OVERRUN_S, threading.TIMEOUT_MAX), stuck)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def started(
    command: list[str], limit_s: float, run: Run, watch: Callable[[], Any] = lambda: None, **variables: str
) -> tuple[int | None, float, str]:
    """Exit status, None where the time was up, seconds, and what it printed.

    Args:
        watch: called about every second while the process runs, and once after it.
        variables: of its environment.
    """
    log = STATE / f".{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, **variables}, preexec_fn=ends_with_parent(),
        )  # fmt: skip
        status: int | None = None
        try:
            while status is None and (left := began + limit_s - time.perf_counter()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(min(1.0, left))
                watch()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            watch()
    text = log.read_text(errors="replace")
    log.unlink()
    return status, time.perf_counter() - began, text


@functools.cache
def ends_with_parent() -> Callable[[], None] | None:
    """For a child to call before it becomes its program: on Linux it is killed when this process is."""
    if not sys.platform.startswith("linux"):
        return None
    libc, set_death_signal = ctypes.CDLL(None), 1
    return lambda: libc.prctl(set_death_signal, signal.SIGKILL)


def same_keys() -> None:
    """For the process that compiles and the one that times: inductor's cache tells a precision that is the default from
    the same one that was set, as measuring ceilings does."""
    torch.set_float32_matmul_precision(torch.get_float32_matmul_precision())


def last_lines(text: str) -> str:
    return text.strip()[-LOG_CHARACTERS:] or "it printed nothing"


def say(text: str) -> None:
    print(text, flush=True)
