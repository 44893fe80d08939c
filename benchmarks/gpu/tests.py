"""Stages of tests: pytest in a process of its own, whose plugin `journal` tells of each test the moment it is known.

A stage's "tests" in the record has "collected", how many there are; "passed", ids; "failed", by id the message, phase
and traceback; "skipped", by id why; "running", ids of what had no end when the time was up; "not_run", how many.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from functools import partial
from typing import Any

from outcomes import Outcomes
from stages import ROOT, STATE, Outcome, Run, Stage, last_lines, say, started

from vitfast.bench import harness

# the files with tests that take every device, besides those of kernels; others may import what is not there
KERNELS, OF_DEVICES = ("tests/kernels",), ("tests/test_ops.py", "tests/test_devices.py")
SMOKE = ("tests/kernels/test_smoke_gpu.py",)
TINY = ("tests/test_numerics.py", "-k", "stock_op")
NO_TESTS = 5  # pytest's exit status
# of a stage's budget, after which one test has no end
SHARE = 0.9


def tests(
    run: Run, stage: Stage, budget_s: float, *, of: tuple[str, ...], marked: str = "gpu", workers: int = 0,
    each_s: float = 120.0,
) -> Outcome:  # fmt: skip
    """Run the tests of which nothing is known yet.

    Args:
        of: what pytest is to collect.
        marked: pytest's expression for marks.
        workers: processes; 0: for almost every core one.
        each_s: after which a test has no end; earlier where the stage's budget is less, or else one that hangs would
            take all of it in every call.
    """
    facts = run.stage(stage.name)
    journal, done = (STATE / f"{run.name}-{stage.name.replace(' ', '-')}.{end}" for end in ("jsonl", "done"))
    if "tests" not in facts:
        journal.unlink(missing_ok=True)
    outcomes = Outcomes(facts.get("tests")).read(journal)
    before = {*outcomes.failed}
    chosen = [*TINY] if run.tiny else [*of, "-m", marked]
    each_s = min(each_s, SHARE * max(budget_s, stage.budget_s))
    workers = workers or max(1, (os.cpu_count() or 2) - 2)
    if workers > 1 and not run.tiny and importlib.util.find_spec("xdist"):
        # in small portions, or else the last ones would wait for whoever has the longest
        chosen += ["-n", str(workers), "--dist", "load", "--maxschedchunk", "4", "--max-worker-restart", "1000"]
    command = [
        sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "journal", "--journal",
        str(journal), "--done", str(done), "--each", str(each_s), "--continue-on-collection-errors", *chosen,
    ]  # fmt: skip

    def merge() -> None:
        found = outcomes.read(journal).as_dict()
        if facts.get("tests") != found:
            facts["tests"] = found
            run.record.write()

    ends, status, known = time.perf_counter() + budget_s, None, -1
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
    # a process that gave up leaves tests to the next one
    while (left := ends - time.perf_counter()) > 0 and known < len(outcomes.done):
        merge()
        # what began there and has no end is not to be blamed for that of the next process
        journal.unlink(missing_ok=True)
        outcomes.running = set()
        known = len(outcomes.done)
        done.write_text("\n".join(outcomes.done))
        status, _, text = started(command, left, run, merge, PYTHONPATH=path)
        facts["last"] = last_lines(text)
        if status is not None:
            outcomes.died(f"its process ended with status {status}", facts["last"])
            merge()
        if status is None or not outcomes.left:
            break
    new = {name: each for name, each in outcomes.failed.items() if name not in before}
    say(
        f"{stage.name}: {len(outcomes.passed)} passed, {len(outcomes.failed)} failed, {len(outcomes.skipped)} skipped, "
        f"{outcomes.left} not run"
    )
    failed = [f"{name}: {each['message']}" for name, each in new.items()]
    if not outcomes.collected and status is not None:
        failed += [f"{stage.name}: no tests, pytest ended with status {status}: {facts['last'][-300:]}"]
    return Outcome(failed, harness.NO_TIME_LEFT if status is None else "")


def stage_of(name: str, budget_s: float, typical_s: float, **how: Any) -> Stage:
    return Stage(name, budget_s, typical_s, partial(tests, **how), least_s=30.0)
