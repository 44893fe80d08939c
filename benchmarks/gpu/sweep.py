"""Time every configuration of every kernel beside stock operators, in minutes: what the built-in tables are made from.

    python benchmarks/sweep.py [SET ...] [--out FILE] [--resume] [--limit SECONDS] [--compile SECONDS] [--workers N]
                               [--tiny] [--device DEVICE]

SET is one or more of the names in `sweep_rows.SETS`; all by default. Rows come in order of value. First many processes
compile, each what no other has taken. Then this process, in which nothing is compiled any more (counted, and recorded),
takes row after row: it holds what stock operators and ours return to `vitfast.check.acceptance`, times all that is
right for 20 ms, and then the best three of ours and all of stock for 0.2 s each, in turns. A call is repeated in a CUDA
graph where that is possible, with inputs that stay in the cache where they fit.

All is in FILE after every row, and --resume goes on with it: rows that are finished are neither compiled nor run again.
Without it an earlier file gets the suffix .before.

    {"schema": 2, "command", "machine": {...},
     "runs": [{"command", "date", "compile_s", "compiled", "failed_to_compile", "compiled_while_timing", "seconds"}],
     "skipped": [names of rows that were not reached],
     "rows": {name: {"kernel", "shape",       what the op asks `dispatch` for; null where it asks for nothing
                     "variants": {name: {
         "role",                              "stock"; "ours"; "other": whole models, and in parentheses comparisons
         "config",                            ours: null for the kernel's own choice; stock: null or {"backend"} of SDPA
         "accepted", "why_not_accepted",      of stock and ours; what is not accepted is not timed
         "ms", "lowest", "highest", "rounds", of one call: the median of so many samples
         "graph",                             whether a graph repeated it: else the host's time counts as well
         "failed", "tries"}}}}}               why there are no times; how often a compiler did not get ready in time

Seconds on 16 cores, from 2,400 variants that an H200 compiled in 43 s in 14 processes and timed in 120 s, 7 samples of
4 ms each: 4,100 variants of 290 rows compile in 72 s, take 55 ms each to check and time briefly and 0.9 s a row for the
best: 72 + 225 + 260 s. Those of the base and the small model at 256, 64 and 1 images, which come first, are 1,600
variants of 117 rows: 30 + 90 + 105 s.

Exit status: 0 where all is done; 1 where a result of ours was wrong, after everything else ran; 2 for wrong use; 3
where the device was lost, or a kernel had no end; 4 where the time was up before the last row.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# a plain copy of the source tree is not installed
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import sweep_rows  # noqa: E402
import torch  # noqa: E402
import workers  # noqa: E402
from sweep_rows import OURS, SETS, STOCK, Row  # noqa: E402
from sweep_time import NOT_CHECKED, CountedCompilations, Phases, RowInMaking, summary  # noqa: E402

from vitfast.bench.harness import DeviceLost  # noqa: E402
from vitfast.bench.record import set_aside  # noqa: E402
from vitfast.choose import dispatch, tuning_cache  # noqa: E402
from vitfast.measure import device as devices  # noqa: E402
from vitfast.measure import machine  # noqa: E402
from vitfast.measure.files import by_lines, plain, write_text  # noqa: E402

SCHEMA = 2
DONE, WRONG, MISUSED, LOST, TIME_UP = range(5)
# of a variant that is not ready when the time for compiling is up, one call after the other
MOST_TRIES = 2
# what has to agree for rows of several calls to be in one file
SAME = ("device", "driver", "torch", "triton", "kernels")
# of a row of which everything is compiled, which takes two; whatever takes longer hangs
ROW_S = 60.0
TINY = Phases(first_ms=1.0, last_ms=4.0, rounds=2)


class Sweep:
    """A record, and what is done to it.

    Args:
        rows: all that are wanted.
        data: of an earlier call, or as `new` made it.
        phases: how long to time.
    """

    def __init__(self, path: Path, data: dict[str, Any], rows: Sequence[Row], place: Any, phases: Phases) -> None:
        self.path, self.data, self.rows, self.place, self.phases = path, data, rows, place, phases
        # of rows as they are written: the device waits meanwhile
        self.texts: dict[str, str] = {}

    def open(self) -> list[Row]:
        """Rows that are not finished, most valuable first."""
        return [row for row in self.rows if not finished(row, self.data["rows"].get(row.name))]

    def write(self) -> None:
        head = {name: value for name, value in self.data.items() if name != "rows"}
        for name in self.data["rows"].keys() - self.texts.keys():
            self.texts[name] = f"{json.dumps(name)}: {json.dumps(plain(self.data['rows'][name]))}"
        write_text(self.path, by_lines(head, map(self.texts.get, self.data["rows"]), named=True))

    def keep(self, row: Row, making: RowInMaking) -> None:
        self.data["rows"][row.name] = making.data
        self.texts.pop(row.name, None)

    def compile(self, command: Sequence[str], count: int, limit_s: float) -> dict[str, str] | None:
        """By task why it failed, "" where it did not; None where this process has to compile."""
        began, run = time.perf_counter(), self.data["runs"][-1]
        self.data["skipped"] = [row.name for row in self.open()]
        # workers read there what is finished
        self.write()
        done = None
        if count and self.open():
            try:
                done = workers.run_by_many(command, count, limit_s)
            except RuntimeError as problem:
                print(f"sweep: nothing was compiled in advance: {problem}", file=sys.stderr)
        failed = [why for why in (done or {}).values() if why]
        run |= {
            "compile_s": time.perf_counter() - began, "compiled": len(done or {}) - len(failed),
            "failed_to_compile": sum(why != workers.NOT_FINISHED and not _of_memory(why) for why in failed),
        }  # fmt: skip
        self.write()
        return done

    def time(self, done: Mapping[str, str] | None, ends: float) -> None:
        """Run the rows that are not finished until `ends`, by time.perf_counter; `done` as `compile` returned it.

        Raises:
            DeviceLost: with the row as far as it got in the record.
        """
        counted, run = CountedCompilations(), self.data["runs"][-1]
        began, took = time.perf_counter(), [0.0]
        for row in self.open():
            wanted = [name for name, variant in row.variants.items() if variant.role != STOCK]
            reached = done is None or all(task_of(row, name) in done for name in wanted)
            row_began = time.perf_counter()
            if not reached or row_began + max(took[-3:]) > ends:
                continue
            earlier = self.data["rows"].get(row.name, {}).get("variants", {})
            failed, tries = not_to_try(row, earlier, done or {})
            making = RowInMaking(row, self.place, failed, self.phases)
            for name, count in tries.items():
                making.found[name]["tries"] = count
            # nothing else ends a kernel that hangs
            timer = threading.Timer(ROW_S if done is not None else threading.TIMEOUT_MAX, self.no_end, [row, making])
            timer.daemon = True
            timer.start()
            try:
                making.run()
            finally:
                timer.cancel()
                self.keep(row, making)
                self.data["skipped"] = [name for name in self.data["skipped"] if name != row.name]
                now = time.perf_counter()
                took.append(now - row_began)
                run |= {"compiled_while_timing": counted.compiled, "seconds": run["compile_s"] + now - began}
                self.write()
            print(summary(row.name, making.found), flush=True)

    def no_end(self, row: Row, making: RowInMaking) -> None:
        """Name who hangs, so that the next call does without it, and end this process."""
        making.found[making.running]["failed"] = f"no end after {ROW_S:.0f} s"
        self.keep(row, making)
        self.write()
        print(f"sweep: {row.name}: {making.running} has no end", file=sys.stderr, flush=True)
        os._exit(LOST)

    def status(self) -> int:
        wrong = [
            f"{name}: {variant}: {found['why_not_accepted']}"
            for name, row in self.data["rows"].items()
            for variant, found in row["variants"].items()
            if found["role"] == OURS and not found.get("why_not_accepted", NOT_CHECKED).startswith(NOT_CHECKED)
        ]
        for line in wrong:
            print(f"sweep: {line}", file=sys.stderr)
        return TIME_UP if self.open() else WRONG if wrong else DONE


def finished(row: Row, data: Mapping[str, Any] | None) -> bool:
    """Whether there is a time of every variant, or a reason why there never will be."""
    if data is None:
        return False
    found = [data["variants"].get(name) for name in row.variants]
    return all(each is not None and _settled(each) for each in found)


def _settled(found: Mapping[str, Any]) -> bool:
    if found.get("failed") == workers.NOT_FINISHED:
        return found["tries"] >= MOST_TRIES
    return bool({"ms", "failed", "why_not_accepted"} & found.keys())


def not_to_try(
    row: Row, earlier: Mapping[str, Mapping[str, Any]], done: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, int]]:
    """Variants that are not to be tried, and why; and of those that were not compiled in time, how often not."""
    failed, tries = {}, {}
    for name in row.variants:
        before, why = earlier.get(name, {}), done.get(task_of(row, name), "")
        if why == workers.NOT_FINISHED:
            tries[name] = before.get("tries", 0) + 1
        elif "failed" in before and before["failed"] != workers.NOT_FINISHED:
            # it may have been what ended the call before this one
            why = before["failed"]
        if why and not _of_memory(why):
            failed[name] = why
    return failed, tries


def _of_memory(why: str) -> bool:
    """Processes that compile have little memory each, which says nothing about a variant."""
    return any(text in why for text in (*dispatch.FULL, "OutOfMemoryError"))


def task_of(row: Row, variant: str) -> str:
    return f"{row.name}: {variant}"


def tasks(rows: Sequence[Row], place: Any) -> Iterator[workers.Task]:
    """What there is to compile, row by row. Stock operators are not compiled."""
    for row in rows:
        given: list[Any] = []
        for name, variant in row.variants.items():
            if variant.role != STOCK:
                yield task_of(row, name), partial(_once, row, variant, given, place)
        given.clear()
        place.release()


def _once(row: Row, variant: sweep_rows.Variant, given: list[Any], place: Any) -> None:
    with place.current(), torch.set_grad_enabled(row.grad):
        if not given:
            given.append(row.draw(torch.Generator(place.device).manual_seed(0)))
        variant.make(given[0])()
        place.synchronize()


def new(command: str, facts: dict[str, Any]) -> dict[str, Any]:
    return {"schema": SCHEMA, "command": command, "machine": facts, "runs": [], "skipped": [], "rows": {}}


def read(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The record in `path`, to be continued on a machine with these facts.

    Raises:
        ValueError: it is no record of this schema, or of another machine or other kernels; says which.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{path}: not a record of a sweep, or cut short: {problem}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema", "none") if isinstance(data, dict) else "none"
        raise ValueError(f"{path}: schema {found!r} is not known, expected {SCHEMA}")
    differ = [
        f"{name} {data['machine'].get(name)!r}, here {facts.get(name)!r}"
        for name in SAME
        if data["machine"].get(name) != facts.get(name)
    ]
    if differ:
        raise ValueError(f"{path} cannot be continued: it has {'; '.join(differ)}")
    return data


def kernels_digest() -> str:
    """Changes with the source of any kernel, or of what launches it."""
    return tuning_cache.digest_of([*tuning_cache.sources(), *sorted((ROOT / "csrc").rglob("*.*"))])


def main(argv: list[str] | None = None) -> int:
    began = time.perf_counter()
    given = sys.argv[1:] if argv is None else argv
    told = _parser().parse_args(given)
    cuda = torch.cuda.is_available()
    device = torch.device(told.device or ("cpu" if told.tiny and not cuda else "cuda"))
    if device.type == "cuda" and not cuda:
        print("sweep: torch finds no GPU here, `vitfast info` says why; --tiny tries it without", file=sys.stderr)
        return MISUSED
    if device.type == "cpu" and not told.tiny:
        print("sweep: no kernel runs on a CPU, where only --tiny says anything", file=sys.stderr)
        return MISUSED
    if device.type == "cpu":
        # more would wait for each other longer than they compute
        torch.set_num_threads(1)
    place = devices.of(device)
    rows = sweep_rows.rows(device, told.sets or SETS, told.tiny)
    # what imports made is not to be looked through after every row
    gc.freeze()
    if told.claims is not None:
        data = json.loads(told.out.read_text(encoding="utf-8"))
        waiting = [row for row in rows if not finished(row, data["rows"].get(row.name))]
        workers.work(told.claims, tasks(waiting, place))
        return DONE
    command = machine.command_of(["benchmarks/sweep.py", *given])
    facts = {**machine.describe(device, ("timm",)), "kernels": kernels_digest()}
    data = new(command, facts)
    try:
        if told.resume and told.out.exists():
            data = read(told.out, facts)
        elif before := set_aside(told.out):
            print(f"an earlier record is now {before}", flush=True)
    except ValueError as problem:
        print(f"sweep: {problem}", file=sys.stderr)
        return MISUSED
    unknown = {"compile_s": 0.0, "compiled": 0, "failed_to_compile": 0, "compiled_while_timing": 0, "seconds": 0.0}
    data["runs"].append({"command": command, "date": facts["date"], **unknown})
    sweep = Sweep(told.out, data, rows, place, TINY if told.tiny else Phases())
    workers_command = [sys.executable, str(Path(__file__).resolve()), *given]
    done = sweep.compile(workers_command, told.workers, min(told.compile, told.limit))
    print(f"{data['runs'][-1]['compiled']} compiled in {data['runs'][-1]['compile_s']:.0f} s", flush=True)
    try:
        sweep.time(done, began + told.limit)
    except DeviceLost as lost:
        print(f"sweep: the device was lost in {lost}", file=sys.stderr)
        return LOST
    finally:
        data["runs"][-1]["seconds"] = time.perf_counter() - began
        sweep.write()
    print(f"{told.out}: {len(data['rows'])} rows, {len(data['skipped'])} skipped", flush=True)
    return sweep.status()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", choices=[*SETS, []], metavar="SET", help=f"of {', '.join(SETS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sweep-tune.json")
    parser.add_argument("--resume", action="store_true", help="go on with the file that is there")
    parser.add_argument("--limit", type=float, default=530.0, help="seconds for all (default: %(default).0f)")
    parser.add_argument("--compile", type=float, default=120.0, help="seconds of that for compiling")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="0: compile when timing")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see whether everything works")
    parser.add_argument("--device", help="(default: cuda; with --tiny where there is none: cpu)")
    parser.add_argument(workers.FLAG, type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
