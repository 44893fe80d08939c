"""Time every configuration of every kernel beside stock operators, in minutes: what the built-in tables are made from.

Rows come in order of value. First many processes compile, each what no other has taken. Then this process, in which
nothing is compiled any more (counted, and recorded), takes row after row: it holds what stock operators and ours return
to `vitfast.check.acceptance`, times all that is right for 20 ms, and then the best three of ours and all of stock for
0.16 s each, in turns. A call is repeated in a CUDA graph where that is possible, with inputs that stay in the cache
where they fit. All is in the record after every row, and goes on from there:

    {"schema": 2, "command", "machine": {...},
     "runs": [{"command", "date", "compile_s", "compiled", "failed_to_compile", "compiled_while_timing", "seconds"}],
     "skipped": [names of rows that were not reached],
     "rows": {name: {"kernel", "shape",       what the op asks `dispatch` for; null where it asks for nothing
                     "variants": {name: {
         "role",                              "stock"; "ours"; in older records "other", which is no choice
         "config",                            ours: null for the kernel's own choice; stock: null or {"backend"} of SDPA
         "accepted", "why_not_accepted",      of stock and ours; what is not accepted is not timed
         "ms", "lowest", "highest", "rounds", of one call: the median of so many samples
         "graph", "why_no_graph",             whether a graph repeated it: else the host's time counts as well
         "failed", "tries"}}}}}               why there are no times; how often a compiler did not get ready in time

On 16 cores of an H200 2,400 variants compiled in 43 s and took 120 s to time: all 290 rows take two calls.
"""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.core import harness
from benchmarks.core.record import set_aside
from benchmarks.gpu import workers
from benchmarks.gpu.defaults import SCHEMA, read
from benchmarks.gpu.rows import place_of
from benchmarks.gpu.stages import LOST, ROOT, Kept, Outcome, Run, Stage, Task, compilations, publish, say
from benchmarks.gpu.sweep_rows import OURS, Row, Variant, rows
from benchmarks.gpu.sweep_time import NOT_CHECKED, RowInMaking, summary
from vitfast.check.calls import SEED
from vitfast.choose import dispatch, tuning_cache
from vitfast.measure import device as devices
from vitfast.measure.device import Place
from vitfast.measure.files import by_lines, plain, write_text

# of a variant that is not ready when the time for compiling is up, one call after the other
MOST_TRIES = 2
# what has to agree for rows of several calls to be in one file
SAME = ("device", "driver", "torch", "triton", "kernels")
# of a row of which everything is compiled, which takes two; whatever takes longer hangs
ROW_S = 60.0
# of the time, at most, for compiling
COMPILE_S = 150.0


class Sweep:
    """A record, and what is done to it.

    Args:
        kept: the plan's record.
        facts: of this machine and these kernels.
        wanted: all rows.
    """

    def __init__(self, path: Path, kept: Kept, facts: Mapping[str, Any], wanted: Sequence[Row], place: Place) -> None:
        self.path, self.kept, self.rows, self.place = path, kept, wanted, place
        try:
            self.data = read(path)
            differ = [name for name in SAME if self.data["machine"].get(name) != facts.get(name)]
            if differ:
                raise ValueError(f"{path} is of another {', '.join(differ)}")
        except (ValueError, FileNotFoundError) as problem:
            for before in filter(None, map(set_aside, {path, kept.out / path.name})):
                say(f"{problem}; it is now {before}")
            command = facts.get("command")
            self.data = {
                "schema": SCHEMA, "command": command, "machine": dict(facts), "runs": [], "skipped": [], "rows": {},
            }  # fmt: skip
        self.run = {
            "command": facts.get("command"), "date": facts.get("date"), "compile_s": 0.0, "compiled": 0,
            "failed_to_compile": 0, "compiled_while_timing": 0, "seconds": 0.0,
        }  # fmt: skip
        self.data["runs"].append(self.run)
        # of rows as they are written: the device waits meanwhile
        self.texts: dict[str, str] = {}

    def open(self) -> list[Row]:
        """Rows that are not finished, most valuable first."""
        return [row for row in self.rows if not finished(row, self.data["rows"].get(row.name))]

    def write(self) -> None:
        self.data["skipped"] = [row.name for row in self.open() if row.name not in self.data["rows"]]
        head = {name: value for name, value in self.data.items() if name != "rows"}
        for name in self.data["rows"].keys() - self.texts.keys():
            self.texts[name] = f"{json.dumps(name)}: {json.dumps(plain(self.data['rows'][name]))}"
        write_text(self.path, by_lines(head, map(self.texts.get, self.data["rows"]), named=True))
        publish(self.path, self.kept.out)

    def keep(self, row: Row, making: RowInMaking) -> None:
        self.data["rows"][row.name] = making.data
        self.texts.pop(row.name, None)
        self.write()

    def compile(self, command: Sequence[str], limit_s: float, count: int) -> dict[str, str] | None:
        """By task why it failed, "" where it did not; None where this process has to compile."""
        began, done = time.perf_counter(), None
        # workers read there what is finished
        self.write()
        if self.open():
            try:
                done = workers.run_by_many(command, limit_s, count)
            except RuntimeError as problem:
                say(f"sweep: nothing was compiled in advance: {problem}")
        failed = [why for why in (done or {}).values() if why]
        self.run |= {
            "compile_s": time.perf_counter() - began, "compiled": len(done or {}) - len(failed),
            "failed_to_compile": sum(why != workers.NOT_FINISHED and not _of_memory(why) for why in failed),
        }  # fmt: skip
        self.write()
        say(f"sweep: {self.run['compiled']} compiled in {self.run['compile_s']:.0f} s")
        return done

    def time(self, done: Mapping[str, str] | None, ends: float) -> None:
        """Run the rows that are not finished until `ends`, by time.perf_counter; `done` as `compile` returned it.

        Raises:
            DeviceLost: with the row as far as it got in the record.
        """
        began, took = time.perf_counter(), [0.0]
        for row in self.open():
            reached = done is None or all(task_of(row, name) in done for name in of_ours(row))
            row_began = time.perf_counter()
            if not reached or row_began + max(took[-3:]) > ends:
                continue
            failed, tries = not_to_try(row, self.data["rows"].get(row.name, {"variants": {}})["variants"], done or {})
            # it ended its process, and nobody knows which of them
            if why := self.kept.data["lost"].get(row.name, {}).get("*"):
                failed = dict.fromkeys(of_ours(row), why)
            self.kept.running = row.name
            making = RowInMaking(row, self.place, failed)
            for name, count in tries.items():
                making.found[name]["tries"] = count
            # nothing else ends a kernel that hangs, and can name it
            timer = threading.Timer(ROW_S if done is not None else threading.TIMEOUT_MAX, self.no_end, [row, making])
            timer.daemon = True
            timer.start()
            try:
                with compilations() as counted:
                    making.run()
            finally:
                timer.cancel()
                took.append(time.perf_counter() - row_began)
                self.run["compiled_while_timing"] += counted["triton"]
                self.run["seconds"] = self.run["compile_s"] + time.perf_counter() - began
                self.keep(row, making)
            say(summary(row.name, making.found))

    def no_end(self, row: Row, making: RowInMaking) -> None:
        """Name who hangs, so that the next process does without it, and end this one."""
        making.found[making.running]["failed"] = f"no end after {ROW_S:.0f} s"
        self.keep(row, making)
        say(f"sweep: {row.name}: {making.running} has no end")
        os._exit(LOST)

    def wrong(self) -> list[str]:
        return [
            f"sweep: {name}: {variant}: {found['why_not_accepted']}"
            for name, row in self.data["rows"].items()
            for variant, found in row["variants"].items()
            if found["role"] == OURS and not found.get("why_not_accepted", NOT_CHECKED).startswith(NOT_CHECKED)
        ]


def sweep(run: Run, stage: Stage, budget_s: float) -> Outcome:
    ends = time.perf_counter() + budget_s
    if run.device.type == "cpu":
        # more would wait for each other longer than they compute
        torch.set_num_threads(1)
    facts = {**run.record.data["run"], "kernels": kernels_digest()}
    found = Sweep(run.tuned, run.record, facts, rows(run.device, run.tiny), place_of(run))
    # what imports made is not to be looked through after every row
    gc.freeze()
    done = found.compile(run.command, min(COMPILE_S, budget_s / 3), 2 if run.tiny else 0)
    found.time(done, ends)
    return Outcome(found.wrong(), harness.NO_TIME_LEFT if found.open() else "")


def to_compile(run: Run) -> Iterator[Task]:
    """What there is to compile, row by row. Stock operators are not compiled."""
    place, known = devices.of(run.device), read(run.tuned)["rows"]
    for row in rows(run.device, run.tiny):
        if finished(row, known.get(row.name)):
            continue
        given: list[Any] = []
        for name in of_ours(row):
            yield task_of(row, name), partial(_once, row, row.variants[name], given, place)
        given.clear()
        place.release()


def _once(row: Row, variant: Variant, given: list[Any], place: Place) -> None:
    with place.current(), torch.no_grad():
        if not given:
            given.append(variant.family.draw(row.call, torch.Generator(place.device).manual_seed(SEED)))
        variant.make(given[0])()
        place.synchronize()


def of_ours(row: Row) -> list[str]:
    return [name for name, variant in row.variants.items() if variant.role == OURS]


def task_of(row: Row, variant: str) -> str:
    return f"{row.name}: {variant}"


def finished(row: Row, data: Mapping[str, Any] | None) -> bool:
    """Whether there is a time of every variant, or a reason why there never will be."""

    def settled(found: Mapping[str, Any]) -> bool:
        if found.get("failed") == workers.NOT_FINISHED:
            return found["tries"] >= MOST_TRIES
        return bool({"ms", "failed", "why_not_accepted"} & found.keys())

    return data is not None and all(settled(data["variants"].get(name, {})) for name in row.variants)


def not_to_try(
    row: Row, earlier: Mapping[str, Mapping[str, Any]], done: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, int]]:
    """Variants that are not to be tried, and why; and of those that were not compiled in time, how often not."""
    failed, tries = {}, {}
    for name in row.variants:
        before, why = earlier.get(name, {}), done.get(task_of(row, name), "")
        if why == workers.NOT_FINISHED:
            tries[name] = before.get("tries", 0) + 1
        elif before.get("failed", workers.NOT_FINISHED) != workers.NOT_FINISHED:
            # it may have been what ended the process before this one
            why = before["failed"]
        if why and not _of_memory(why):
            failed[name] = why
    return failed, tries


def _of_memory(why: str) -> bool:
    """Processes that compile have little memory each, which says nothing about a variant."""
    return any(text in why for text in (*dispatch.FULL, "OutOfMemoryError"))


def kernels_digest() -> str:
    """Changes with the source of any kernel, or of what launches it."""
    return tuning_cache.digest_of([*tuning_cache.sources(), *sorted((ROOT / "csrc").rglob("*.*"))])
