"""Many processes that share a list of tasks, each task done by the first that claims it: compiling ahead of timing.

The parent calls `run_by_many` with a command; each process that it starts makes the same list of tasks and gives it to
`work`, most valuable first. A task's result is only whether it worked: what it compiled is in the compilers' caches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import outcomes

from vitfast.bench.harness import DeviceLost
from vitfast.measure.device import first_line

NOT_FINISHED = "not compiled in time"
FLAG = "--claims"
# of a worker's environment: which of them it is, from 0
NUMBER = "VITFAST_WORKER"
# and who started it, who may be gone before a worker can ask
PARENT = "VITFAST_WORKER_OF"
POLL_S = 0.05

Task = tuple[str, Callable[[], Any]]


def run_by_many(command: Sequence[str], workers: int, limit_s: float) -> dict[str, str]:
    """Let `workers` processes do the tasks of `command`, until all are done or the time is up.

    A process that ends in the middle of a task, which a compiler may do to it, is started again.

    Args:
        command: gets `--claims FOLDER` added, and calls `work` with that folder.
        limit_s: after this time all processes end, with all that they started.

    Returns:
        By task, why it failed, "" where it did not. What nobody has begun is not there.

    Raises:
        RuntimeError: processes ended and nothing was claimed; with the last that one printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        claims, ends = Path(folder), time.perf_counter() + limit_s
        command = [*command, FLAG, folder]
        running = [(_start(command, claims, number), number) for number in range(workers)]
        died: dict[int, int] = {}
        try:
            while running and time.perf_counter() < ends:
                time.sleep(POLL_S)
                for process, number in [each for each in running if each[0].poll() is not None]:
                    running.remove((process, number))
                    if process.returncode:
                        died[process.pid] = process.returncode
                        # one that got nowhere would get nowhere again
                        if any(pid == process.pid for _, pid in _claimed(claims)):
                            running.append((_start(command, claims, number), number))
        finally:
            for process, _ in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if died and not _claimed(claims):
            raise RuntimeError(f"no worker began anything: {_last_line(claims)}")
        done = dict(_results(claims))
        for task, pid in _claimed(claims):
            ended = f"its process ended with status {died[pid]}" if pid in died else NOT_FINISHED
            done.setdefault(task, ended)
        return done


def work(folder: Path, tasks: Iterable[Task]) -> None:
    """Do those of `tasks` that no other process has claimed. Starts this process again where its device is lost.

    Tasks that raise count as failed, with the message's first line.
    """
    threading.Thread(target=_end_with_parent, args=[int(os.environ.get(PARENT) or os.getppid())], daemon=True).start()
    for task, run in tasks:
        claim = folder / f"{hashlib.sha256(task.encode()).hexdigest()}.claim"
        try:
            with claim.open("x") as file:
                json.dump([task, os.getpid()], file)
        except FileExistsError:
            continue
        why = ""
        try:
            run()
        # compilers and kernels may fail in any way, and every way is a result
        except Exception as problem:
            why = first_line(problem)
        with (folder / "results").open("a") as file:
            file.write(json.dumps([task, why]) + "\n")
        if is_lost(why):
            os.execv(sys.executable, [sys.executable, *sys.argv])


def is_lost(why: str) -> bool:
    """Whether a message says that the device answers no more."""
    return DeviceLost.__name__ in why or outcomes.is_lost(why)


def number() -> int:
    """Which of the workers this process is, from 0."""
    return int(os.environ[NUMBER])


def _start(command: Sequence[str], folder: Path, number: int) -> subprocess.Popen:
    # each compiles by itself
    alone = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment = {**os.environ, **alone, NUMBER: str(number), PARENT: str(os.getpid())}
    with (folder / "log").open("a") as log:
        # a session of its own, so that the compilers it starts end with it
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _claimed(folder: Path) -> list[tuple[str, int]]:
    # a process may have ended between making the file and writing it
    texts = [file.read_text() for file in folder.glob("*.claim")]
    return [tuple(json.loads(text)) for text in texts if text.endswith("]")]


def _results(folder: Path) -> list[tuple[str, str]]:
    file = folder / "results"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [tuple(json.loads(line)) for line in lines if line.endswith("\n")]


def _last_line(folder: Path) -> str:
    return ((folder / "log").read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]


def _end_with_parent(parent: int) -> None:
    """A parent that is killed ends nobody."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)
