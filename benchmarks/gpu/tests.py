"""Stages of tests: pytest and its workers, of which the record tells what became of each test.

A stage's "tests" in the record has "collected", how many there are; "passed", ids; "failed", by id the message, phase
and traceback; "skipped", by id why; "running", ids of what had no end when the time was up; "not_run", how many.

This file is pytest's plugin too: in the stage's process, which hears from all workers, `Journal`; in each worker, which
ends after a failure that says the device is lost and after a test that has no end, `Worker`. Another one goes on.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.stages import LOG_CHARACTERS, STATE, Outcome, Run, Stage, is_lost, say

# the files with tests that take every device, besides those of kernels; others may import what is not there
KERNELS, OF_DEVICES = ("tests/kernels",), ("tests/test_ops.py", "tests/test_devices.py")
SMOKE = ("tests/kernels/test_smoke_gpu.py",)
TINY = ("tests/test_numerics.py", "-k", "stock_op")
# of a stage's budget, after which one test has no end
SHARE = 0.9
WRITE_S = 1.0
# the phase in which xdist reports a worker that is no more there
GONE = "???"


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
    workers = 1 if run.tiny else workers or max(1, (os.cpu_count() or 2) - 2)
    journal = Journal(facts, run.record.write, min(each_s, SHARE * max(budget_s, stage.budget_s)))
    # in small portions, or else the last ones would wait for whoever has the longest
    status = pytest.main([
        "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.tests", "--continue-on-collection-errors",
        "-n", str(workers), "--dist", "load", "--maxschedchunk", "4", "--max-worker-restart", "1000",
        *(TINY if run.tiny else [*of, "-m", marked]),
    ], plugins=[journal])  # fmt: skip
    journal.write()
    found = facts.get("tests", {})
    say(f"{stage.name}: {', '.join(f'{len(found.get(n, ()))} {n}' for n in ('passed', 'failed', 'skipped'))}")
    return Outcome([] if found else [f"{stage.name}: no tests, pytest ended with status {int(status)}"])


class Journal:
    """Has `facts` say what became of tests, going on with what they say; written every second."""

    def __init__(self, facts: dict[str, Any], write: Callable[[], None], each_s: float) -> None:
        self.facts, self.write_record, self.each_s = facts, write, each_s
        self.lock, self.changed = threading.RLock(), False
        before = facts.get("tests", {})
        self.failed, self.skipped = dict(before.get("failed", {})), dict(before.get("skipped", {}))
        self.passed, self.running, self.collected = set(before.get("passed", ())), set(), before.get("collected", 0)
        # the same for all workers, whenever they begin
        self.left_out = self.done()

    def done(self) -> set[str]:
        return self.passed | self.skipped.keys() | self.failed.keys()

    def write(self) -> None:
        with self.lock:
            if not self.changed:
                return
            # no tests, but files of which nobody knows what they have
            files = sum(why["phase"] == "collection" for why in self.failed.values())
            self.facts["tests"] = {
                "collected": self.collected, "passed": sorted(self.passed), "failed": self.failed,
                "skipped": self.skipped, "running": sorted(self.running),
                "not_run": max(self.collected + files - len(self.done()), 0),
            }  # fmt: skip
            self.write_record()
            self.changed = False

    def pytest_sessionstart(self) -> None:
        def always() -> None:
            while True:
                time.sleep(WRITE_S)
                self.write()

        threading.Thread(target=always, daemon=True).start()

    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput |= {
            "done": sorted(self.left_out), "each_s": self.each_s, "hung": str(hung_file(node.gateway.id))
        }  # fmt: skip

    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        with self.lock:
            earlier = {name for name in self.left_out if "::" in name}
            self.collected, self.changed = len(earlier.union(ids)), True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.fail(report, "collection", report.longreprtext)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        with self.lock:
            self.running.add(nodeid)
            self.changed = True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid
        with self.lock:
            if report.failed:
                self.fail(report, report.when, report.longreprtext)
            elif report.skipped:
                why = report.longrepr
                self.skipped[name] = why[2] if isinstance(why, tuple) else "expected to fail"
            elif report.when == "teardown" and name not in self.failed and name not in self.skipped:
                self.passed.add(name)
            if report.when in ("teardown", GONE):
                self.running.discard(name)
            self.changed = True

    def fail(self, report: Any, phase: str, text: str) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else (text.strip().splitlines() or ["no reason given"])[-1]
        if phase == GONE and (threads := hung_file(report.node.gateway.id).read_text().strip()):
            message, text = f"no end after {self.each_s:.0f} s", threads.split("\n\n")[-1]
        with self.lock:
            # of several reasons the first: what came later may follow from it
            if report.nodeid not in self.failed:
                why = {"phase": phase, "message": message[:300], "traceback": text[:LOG_CHARACTERS]}
                self.failed[report.nodeid] = why
                self.facts["failed"].append(f"{report.nodeid}: {why['message']}")
            self.passed.discard(report.nodeid)
            self.changed = True


def hung_file(worker: str) -> Path:
    """What a worker's test was in when its time was up."""
    return STATE / f".hung-{worker}"


class Worker:
    def __init__(self, config: pytest.Config) -> None:
        self.done, self.each_s = set(config.workerinput["done"]), config.workerinput["each_s"]
        self.hung = os.open(config.workerinput["hung"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.done]
        items.sort(key=lambda item: item.get_closest_marker("slow") is not None)

    def pytest_runtest_logstart(self) -> None:
        # needs none of Python's locks, and tells what the test was in
        faulthandler.dump_traceback_later(self.each_s, exit=True, file=self.hung)

    def pytest_runtest_logfinish(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and is_lost(report.longreprtext):
            os._exit(1)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Worker(config))


def stage_of(name: str, budget_s: float, **how: Any) -> Stage:
    return Stage(name, budget_s, partial(tests, **how), least_s=30.0, overrun_s=0.0)
