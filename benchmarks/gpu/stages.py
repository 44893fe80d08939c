"""What plans are made of: a stage is a process with a budget, and what it finds is in its plan's record.

That is a record of `benchmarks.core.record` with three things more:

    stages   by name: "done", whether it need not be run again; "calls", of each "date", "budget_s", "seconds" and
             "left", why something is left to do, '' where nothing is; "failed", what of ours failed, a line each;
             "traceback" where the stage itself did; and what stages note of their own ("tests", "counters", "chosen",
             which is between tiles and stock operators on a CPU, ...)
    lost     by key of a row: variants that broke the device, or whose building had no end or ended its process, or "*"
             for a row of which it is not known which one did, and what was said then
    running, building   key of the row in the making, and its variant that is being built
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.core import harness, record
from vitfast.check.case import Case
from vitfast.measure import device as devices

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / "benchmarks" / "state"
# exit status of a process whose device answers no more: another one goes on
LOST = 3
LOG_CHARACTERS = 2000
# what a stage may take beyond its budget, for what cannot be interrupted, before it counts as stuck
OVERRUN_S = 45.0
# of a process's environment: who started it, and may be gone before it can ask
PARENT = "VITFAST_STARTED_BY"

Makers = Iterable[Callable[[], Case]]
# its name, and what it does
Task = tuple[str, Callable[[], Any]]


class Kept(record.Record):
    """A record with a copy in another folder after every change."""

    def __init__(self, path: Path, data: dict[str, Any], out: Path) -> None:
        self.path, self.data, self.out = path, {"stages": {}, "lost": {}, "running": None, "building": None} | data, out

    @property
    def running(self) -> str | None:
        return self.data["running"]

    @running.setter
    def running(self, key: str | None) -> None:
        self.data |= {"running": key, "building": None}
        self.write()

    @property
    def building(self) -> str | None:
        return self.data["building"]

    @building.setter
    def building(self, name: str | None) -> None:
        self.data["building"] = name
        self.write()

    def write(self) -> None:
        super().write()
        publish(self.path, self.out)


def publish(file: Path, folder: Path) -> None:
    """Copy `file` so that at any time `folder` has a whole one of that name, old or new."""
    if file.parent != folder:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{file.name}.tmp"
        shutil.copy2(file, temporary)
        os.replace(temporary, folder / file.name)


@dataclass
class Run:
    """What the stages of a plan share.

    Attributes:
        tiny: small sizes only, to see whether everything works.
        command: of this process, by which those that compile for it are started.
    """

    device: torch.device
    record: Kept
    tiny: bool = False
    command: Sequence[str] = ()

    @property
    def tuned(self) -> Path:
        """The sweep's record of this device."""
        return STATE / f"{name_of(self.record.data['run']['device'], 'tune', self.tiny)}.json"

    def note(self, what: str, value: Any) -> None:
        """Into the facts of this call."""
        self.record.data["run"][what] = value
        self.record.write()

    def stage(self, name: str) -> dict[str, Any]:
        return self.record.data["stages"].setdefault(name, {"done": False, "calls": [], "failed": []})


class Outcome(NamedTuple):
    """What of ours failed, a line each, and why something is left to do."""

    failed: Sequence[str] = ()
    left: str = ""


@dataclass(frozen=True)
class Stage:
    """A part of a plan.

    Attributes:
        budget_s: how long it may take.
        work: called in a process of its own with the run, the stage and how many seconds it may take.
        least_s: with less time than that it is not begun.
        always: in every call, whether or not it was done before.
        overrun_s: after so much more it has no end; 0 for what is cut off by its budget, and goes on in the next call.
        makers: the rows of a stage of rows.
        tasks: what many processes compile before it.
    """

    name: str
    budget_s: float
    work: Callable[[Run, Stage, float], Outcome]
    least_s: float = 2.0
    always: bool = False
    overrun_s: float = OVERRUN_S
    makers: Callable[[Run], Makers] | None = None
    tasks: Callable[[Run], Iterable[Task]] | None = None


def perform(run: Run, stage: Stage, budget_s: float) -> int:
    """Do a stage's work, which the last of its calls in the record is about; 0, or `LOST`."""
    facts, began, status = run.stage(stage.name), time.perf_counter(), 0
    outcome = Outcome((), "interrupted")
    try:
        outcome = stage.work(run, stage, budget_s)
    except Exception as problem:
        status = LOST if isinstance(problem, harness.DeviceLost) or is_lost(str(problem)) else 0
        facts["traceback"] = traceback.format_exc()[-LOG_CHARACTERS:]
        outcome = Outcome([f"{stage.name}: {devices.first_line(problem)}"], "the device was lost" if status else "")
    finally:
        facts["calls"][-1] |= {"seconds": time.perf_counter() - began, "left": outcome.left}
        facts["done"] = not outcome.left
        facts["failed"] += [line for line in outcome.failed if line not in facts["failed"]]
        run.record.running = None
    return status


BROKEN = re.compile(r"CUDA error|CUDA_ERROR|AcceleratorError|Triton Error \[CUDA\]|cudaError|DeviceLost")


def is_lost(text: str) -> bool:
    """Whether an error's text says that nothing later in this process can be right."""
    return bool(BROKEN.search(text)) and "out of memory" not in text


def begun(command: Sequence[str], log: Any = None, **variables: str) -> subprocess.Popen:
    """A process in a group of its own, that finds this source tree and that ends itself with this one."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, PARENT: str(os.getpid()), **variables},
        stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip


def end_with_parent() -> None:
    """Called by a process that `begun` made: where its parent is killed nobody else ends it and what it started."""

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, args=[int(os.environ[PARENT])], daemon=True).start()


def killed(process: subprocess.Popen) -> None:
    """End a process that `begun` made, with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # in the middle of a driver's call it may not end at once
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10.0)


def printed(command: Sequence[str], limit_s: float, **variables: str) -> tuple[int | None, str]:
    """Exit status of a command, None where the time was up, and what it printed."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            environment, status = {**os.environ, **variables}, None
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=limit_s
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            pass
        log.seek(0)
        return status, log.read().strip()


@contextlib.contextmanager
def compilations() -> Iterator[dict[str, int]]:
    """How many kernels of Triton and graphs of torch.compile this process compiled itself, having found no other's."""
    found = {"triton": 0, "graphs": 0}

    def listen(*, cache_hit: bool, **_: Any) -> None:
        found["triton"] += not cache_hit

    def graphs() -> int:
        utils = sys.modules.get("torch._dynamo.utils")
        return utils.counters["inductor"]["fxgraph_cache_miss"] if utils else 0

    before = graphs()
    # no Triton, no kernels to compile
    with contextlib.suppress(ImportError):
        from triton import knobs

        knobs.compilation.listener = listen
    try:
        yield found
    finally:
        found["graphs"] = graphs() - before


def same_keys() -> None:
    """For the process that compiles and the one that times: inductor's cache tells a precision that is the default from
    the same one that was set, as measuring ceilings does."""
    torch.set_float32_matmul_precision(torch.get_float32_matmul_precision())


def name_of(device: str, plan: str, tiny: bool) -> str:
    """Of a plan's record, without suffix. Small sizes have another: who goes on takes what is done for done."""
    return slug(f"{device} {'tiny ' * tiny}{plan}")


def slug(text: str) -> str:
    """`text` as a part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def say(text: str) -> None:
    print(text, flush=True)
