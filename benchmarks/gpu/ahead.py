"""Many processes that compile what a plan's rows need (`ahead_process`), before one that compiles nothing times
them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import workers
from stages import Run

PROCESS = Path(__file__).with_name("ahead_process.py")


def compiled(run: Run, plan: str, limit_s: float) -> tuple[float, dict[str, int], list[str]]:
    """Seconds; how many variants were compiled, failed, and were not ended in time; and what failed, a line each.

    Raises:
        RuntimeError: no process began anything.
    """
    began = time.perf_counter()
    command = [
        sys.executable, str(PROCESS), plan, "--record", str(run.record.path), "--device", str(run.device),
        *["--tiny"] * run.tiny,
    ]  # fmt: skip
    count = 2 if run.tiny else max(1, (os.cpu_count() or 2) - 2)
    done = workers.run_by_many(command, count, limit_s)
    late = sum(why == workers.NOT_FINISHED for why in done.values())
    problems = [f"{task}: {why}" for task, why in done.items() if why and why != workers.NOT_FINISHED]
    counts = {"compiled": len(done) - late - len(problems), "failed": len(problems), "not_ended": late}
    return time.perf_counter() - began, counts, problems
