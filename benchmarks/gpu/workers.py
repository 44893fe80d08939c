"""Many processes that share a list of tasks, each task done by the first that claims it: compiling ahead of timing.

Each process makes the same list of tasks and gives it to `work`, most valuable first. A task's result is only whether
it worked: what it compiled is in the compilers' caches.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.gpu.stages import Task, begun, end_with_parent, is_lost, killed
from vitfast.measure.device import first_line

NOT_FINISHED = "not compiled in time"
FLAG = "--claims"
# of a worker's environment: which of them it is, from 0
NUMBER = "VITFAST_WORKER"
POLL_S = 0.05


def run_by_many(command: Sequence[str], limit_s: float, workers: int = 0) -> dict[str, str]:
    """Let processes do the tasks of `command`, until all are done or the time is up.

    A process that ends in the middle of a task, which a compiler may do to it, is started again.

    Args:
        command: gets `--claims FOLDER` added, and calls `work` with that folder.
        limit_s: after this time all processes end, with all that they started.
        workers: how many; 0: one for almost every core.

    Returns:
        By task, why it failed, "" where it did not. What nobody has begun is not there.

    Raises:
        RuntimeError: processes ended and nothing was claimed; with the last that one printed.
    """
    with tempfile.TemporaryDirectory() as name, open(f"{name}/log", "a") as log:
        folder, ends, died = Path(name), time.perf_counter() + limit_s, {}

        def start(number: int):
            # each compiles by itself
            alone = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", NUMBER: str(number)}
            return begun([*command, FLAG, name], log, **alone)

        running = {number: start(number) for number in range(workers or max(1, (os.cpu_count() or 2) - 2))}
        try:
            while running and time.perf_counter() < ends:
                time.sleep(POLL_S)
                for number, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[number]
                    if process.returncode:
                        died[process.pid] = process.returncode
                        # one that got nowhere would get nowhere again
                        if process.pid in _claimed(folder).values():
                            running[number] = start(number)
        finally:
            for process in running.values():
                killed(process)
        claimed = _claimed(folder)
        if died and not claimed:
            lines = (folder / "log").read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
            raise RuntimeError(f"no worker began anything: {lines[-1]}")
        results = folder / "results"
        texts = results.read_text().splitlines(keepends=True) if results.exists() else []
        done = dict(json.loads(text) for text in texts if text.endswith("\n"))
        ended = {pid: f"its process ended with status {status}" for pid, status in died.items()}
        return {task: ended.get(pid, NOT_FINISHED) for task, pid in claimed.items()} | done


def work(folder: Path, tasks: Iterable[Task]) -> None:
    """Do those of `tasks` that no other process has claimed. Starts this process again where its device is lost.

    Tasks that raise count as failed, with the message's first line.
    """
    end_with_parent()
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
            os.execv(sys.executable, sys.orig_argv)


def _claimed(folder: Path) -> dict[str, int]:
    # a process may have ended between making the file and writing it
    texts = [file.read_text() for file in folder.glob("*.claim")]
    return dict(json.loads(text) for text in texts if text.endswith("]"))
