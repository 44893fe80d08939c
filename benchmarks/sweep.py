"""Time every configuration of every kernel beside stock operators, in minutes: what the built-in tables are made from.

    python benchmarks/sweep.py [SET ...] [--out FILE] [--limit SECONDS] [--compile SECONDS] [--workers N]

SET is one or more of the names in `sweep_rows.SETS`; all by default. First many processes compile: each takes calls
that nobody has taken, and runs them once; one whose device is lost starts again. Then this process, in which nothing is
compiled any more, captures each call in a CUDA graph that repeats it for some milliseconds, compares its results with
those of the row's first variant, and replays all graphs of a row in turn. Times are medians of such rounds.

Results are written to FILE after every row: what a variant's results differ by from the first one's (`rel`, the norm of
the difference by the norm, the largest of all results), milliseconds, lowest and highest; or why there are none. A name
in parentheses computes something else, for comparison. This is no judgement of results: `make gpu` has that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# a plain copy of the source tree is not installed
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from sweep_rows import SETS, Row, differentiated  # noqa: E402
from torch import Tensor  # noqa: E402

from vitfast.bench import machine  # noqa: E402
from vitfast.bench.record import write_json  # noqa: E402

SCHEMA = 1
ROUNDS = 7
# of what one graph repeats, at least and at most
SAMPLE_MS, MOST_CALLS = 4.0, 50
LOST = ("CUDA error", "CUDA_ERROR", "AcceleratorError")
Call = Callable[[], Any]


class Repeated:
    """`count` calls, from a graph where that is possible."""

    def __init__(self, call: Call, count: int):
        self.call, self.count, self.graph = call, count, None
        if differentiated(call):
            # autograd runs on the stream of the forward, which was not captured
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(count):
                call()

    def ms(self) -> float:
        """Of one call."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        if self.graph is not None:
            self.graph.replay()
        else:
            for _ in range(self.count):
                self.call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / self.count


def difference(found: Any, expected: Any) -> float:
    """The largest of ‖a - b‖ / ‖b‖ over the results; NaN where one is."""
    worst = 0.0
    for a, b in zip(_tuple(found), _tuple(expected), strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point():
            a, b = a.float(), b.float().reshape(a.shape)
            each = ((a - b).norm() / b.norm().clamp_min(1e-20)).item()
            worst = each if each != each else max(worst, each)
            if worst != worst:
                break
    return worst


def _tuple(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def named(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"[:300]


def time_row(row: Row, failed: dict[str, str]) -> dict[str, Any]:
    """Facts of each variant, by name; those in `failed` are not tried again."""
    found: dict[str, Any] = {}
    repeated: dict[str, Repeated] = {}
    expected = None
    with contextlib.nullcontext() if row.grad else torch.no_grad():
        variants = row.variants(row.inputs())
        for name, make in variants.items():
            if name in failed:
                found[name] = {"failed": failed[name]}
                continue
            try:
                call = make()
                results = call()
                torch.cuda.synchronize()
                found[name] = {} if expected is None else {"rel": difference(results, expected)}
                expected = results if expected is None else expected
                first = Repeated(call, 1)
                ms = min(first.ms() for _ in range(2))
                count = max(1, min(MOST_CALLS, int(SAMPLE_MS / max(ms, 1e-3))))
                repeated[name] = first if count == 1 else Repeated(call, count)
            except Exception as problem:
                found[name] = {"failed": named(problem)}
                if any(word in found[name]["failed"] for word in LOST):
                    raise
        times: dict[str, list[float]] = {name: [] for name in repeated}
        for each in repeated.values():
            each.ms()
        for _ in range(ROUNDS):
            for name, each in repeated.items():
                times[name].append(each.ms())
    for name, ms in times.items():
        found[name] |= {"ms": statistics.median(ms), "lowest": min(ms), "highest": max(ms)}
    return found


def rows_of(sets: list[str]) -> list[Row]:
    return [row for name in sets for row in SETS[name]()]


def compile_some(sets: list[str], claims: Path, log: Path) -> None:
    """Run variants that no other process has claimed, once each."""
    for i, row in enumerate(rows_of(sets)):
        variants = None
        for j, name in enumerate(row.names()):
            try:
                (claims / f"{i}-{j}").touch(exist_ok=False)
            except FileExistsError:
                continue
            why = ""
            try:
                with contextlib.nullcontext() if row.grad else torch.no_grad():
                    variants = variants or row.variants(row.inputs())
                    variants[name]()()
                    torch.cuda.synchronize()
            except Exception as problem:
                why = named(problem)
            with log.open("a") as file:
                file.write(json.dumps([row.name, name, why]) + "\n")
            if any(word in why for word in LOST):
                os.execv(sys.executable, [sys.executable, *sys.argv])
        del variants
        torch.cuda.empty_cache()


def compiled_by_many(sets: list[str], workers: int, limit_s: float) -> dict[str, dict[str, str]]:
    """What failed or was not compiled in time, by row and variant, and why."""
    with tempfile.TemporaryDirectory() as folder:
        claims, log = Path(folder) / "claims", Path(folder) / "log"
        claims.mkdir()
        log.touch()
        command = [sys.executable, __file__, *sets, "--claims", str(claims), "--log", str(log)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ends = time.perf_counter() + limit_s
        started = [
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for _ in range(workers)
        ]
        for process in started:
            try:
                process.wait(max(0.0, ends - time.perf_counter()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        done = {(row, name): why for row, name, why in map(json.loads, log.read_text().splitlines())}
    failed: dict[str, dict[str, str]] = {}
    for row in rows_of(sets):
        for name in row.names():
            if why := done.get((row.name, name), "not compiled in time"):
                failed.setdefault(row.name, {})[name] = why
    return failed


def table(name: str, found: dict[str, Any]) -> str:
    """A row for whoever watches, fastest first."""
    first = next((each["ms"] for each in found.values() if "ms" in each), None)
    lines = [name]
    for variant, each in sorted(found.items(), key=lambda item: item[1].get("ms", float("inf"))):
        if "ms" in each:
            rel = f"{each['rel']:.0e}" if "rel" in each else "     "
            lines.append(f"  {1e3 * each['ms']:9.1f} us  {first / each['ms']:5.2f} x  {rel}  {variant}")
        else:
            lines.append(f"  {each['failed'][:60]:>26}  {variant}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", choices=[*SETS, []], metavar="SET", help=f"of {', '.join(SETS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sweeps" / "sweep.json")
    parser.add_argument("--limit", type=float, default=500.0, help="seconds for all")
    parser.add_argument("--compile", type=float, default=120.0, help="seconds of that for compiling")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args(argv)
    sets = told.sets or list(SETS)
    if not torch.cuda.is_available():
        print("sweep: torch finds no GPU here, `vitfast info` says why", file=sys.stderr)
        return 2
    if told.claims is not None:
        compile_some(sets, told.claims, told.log)
        return 0
    failed = compiled_by_many(sets, told.workers, told.compile)
    took = time.perf_counter() - began
    print(f"compiled in {took:.0f} s, {sum(map(len, failed.values()))} failed", flush=True)
    given = sys.argv[1:] if argv is None else argv
    data = {
        "schema": SCHEMA, "command": " ".join(["python", "benchmarks/sweep.py", *given]),
        "machine": machine.describe(torch.device("cuda"), ("timm",)), "compile_s": took, "skipped": [], "rows": {},
    }  # fmt: skip
    told.out.parent.mkdir(parents=True, exist_ok=True)
    for row in rows_of(sets):
        if time.perf_counter() - began > told.limit:
            data["skipped"].append(row.name)
            continue
        try:
            data["rows"][row.name] = time_row(row, failed.get(row.name, {}))
        finally:
            write_json(told.out, data)
        print(table(row.name, data["rows"][row.name]), flush=True)
        torch.cuda.empty_cache()
    write_json(told.out, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
