"""A pytest plugin: what became of each test is in a file the moment it is known, whatever ends the process later.

    pytest -p journal --journal FILE [--done FILE] [--each SECONDS]

A line of FILE is a JSON object, appended at once by the process that ran the test: {"collected": [ids]} once, and of a
test {"id", "is"} with "is" one of began, passed, skipped (with "why") and failed (with "phase", "message" and the first
2,000 characters of the "traceback"). Tests named in --done, a line each, are left out; those marked slow come last.

After a failure that says the device is lost, and after a test that has no end in --each seconds, the process exits:
nothing later in it could be right. xdist starts another; without xdist whoever started pytest has to.
"""

from __future__ import annotations

import faulthandler
import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from outcomes import is_lost

TRACEBACK = 2000
# for the timer, which needs Python's lock, before what needs none ends the process
LOCKED_S = 5.0
# of a process that gave up; xdist says so of a worker
GAVE_UP = 70


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("journal")
    group.addoption("--journal", help="append what became of each test to this file")
    group.addoption("--done", help="file with ids of tests to leave out")
    group.addoption("--each", type=float, default=0.0, help="seconds after which a test has no end; 0: any time")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("journal"):
        config.pluginmanager.register(Journal(config))


class Journal:
    def __init__(self, config: pytest.Config) -> None:
        self.path = Path(config.getoption("journal"))
        done = config.getoption("done")
        self.done = set(Path(done).read_text().splitlines()) if done else set()
        self.each = config.getoption("each")
        worker = getattr(config, "workerinput", {"workerid": "alone"})["workerid"]
        # with workers this process only hears of what they have written themselves
        self.only_hears = worker == "alone" and bool(getattr(config.option, "numprocesses", None))
        self.first = worker in ("alone", "gw0")
        self.timer: threading.Timer | None = None

    def write(self, **line: Any) -> None:
        # one write to a file opened for appending: lines of several processes do not mix
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, (json.dumps(line) + "\n").encode())
        finally:
            os.close(handle)

    def failed(self, nodeid: str, phase: str, message: str, traceback: str) -> None:
        self.write(id=nodeid, **{"is": "failed"}, phase=phase, message=message[:300], traceback=traceback[:TRACEBACK])

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.first:
            self.write(collected=[item.nodeid for item in items])
        items[:] = [item for item in items if item.nodeid not in self.done]
        items.sort(key=lambda item: item.get_closest_marker("slow") is not None)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.first:
            text = report.longreprtext
            self.failed(report.nodeid, "collection", text.strip().splitlines()[-1] if text.strip() else "", text)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.only_hears:
            return
        self.write(id=nodeid, **{"is": "began"})
        if self.each:
            self.timer = threading.Timer(self.each, self.no_end, [nodeid])
            self.timer.daemon = True
            self.timer.start()
            faulthandler.dump_traceback_later(self.each + LOCKED_S, exit=True, file=2)

    def pytest_runtest_logfinish(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            faulthandler.cancel_dump_traceback_later()

    def no_end(self, nodeid: str) -> None:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            # the last calls of the thread that hangs come first there
            threads = file.read().split("\n\n")
        self.failed(nodeid, "call", f"no end after {self.each:.0f} s", threads[-1])
        os._exit(GAVE_UP)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # xdist's own word for a worker that died; when that has written why, its line came first
        if self.only_hears and report.when in ("setup", "call", "teardown"):
            return
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = report.longreprtext
            message = crash.message if crash else text.strip().splitlines()[-1] if text.strip() else "no reason given"
            self.failed(report.nodeid, report.when, message, text)
            if is_lost(text):
                os._exit(GAVE_UP)
        elif report.skipped:
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            self.write(id=report.nodeid, **{"is": "skipped"}, why=why)
        elif report.when == "teardown":
            self.write(id=report.nodeid, **{"is": "passed"})
