"""Compile every kernel for four architectures with no GPU, and compare what comes out with benchmarks/aot.json.

    python -m benchmarks.aot [--arch 80 89 90 100] [--only NAME-PART] [--write]

Prints a line for each configuration of each Triton kernel and for each kernel of csrc/cuda: registers, stack, shared
memory, programs a multiprocessor, tensor core instructions, widths of loads, instructions behind the last product,
barriers in the loop around it, why it is refused; then what differs from the record. --write, which takes all
configurations, renews the record; the same versions write the same file.

A configuration is refused where it does not compile; spills and some shape runs it by default; needs more shared memory
than the card has; has no wgmma on sm_90, or no wide load, for its products; has TF32 where it promises IEEE products;
computes a row's offset in 32 bits; has its wgmma one after the other and some shape runs it by default; or may
overwrite what another warpgroup still multiplies.

Exit status: 0, differences from the record or not; 1 where one is refused; 2 for wrong use.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.aot.compiled import ARCHS, CUDA_ARCHS, Row, compilations, cuda_rows, kernel_row, nvcc_release
from vitfast.choose import tuning_cache
from vitfast.choose.tuning_cache import digest_of
from vitfast.measure import machine
from vitfast.measure.files import write_json

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "aot.json"
SCHEMA = 1
# each has `compilations(arch)`
KERNELS = ("attention", "layer_norm", "linear", "mlp")
KERNEL_MODULES: tuple[str, ...] = tuple(f"vitfast.kernels.triton.{name}" for name in KERNELS)
CUDA_SOURCES = tuple(sorted(str(path) for path in (ROOT / "csrc").rglob("*.cu")))
CRASHED = {"refused": ["does not compile: the compiler took its process down"]}


class Job(NamedTuple):
    """A call in another process that gives rows by key; `key` stands for them where it does not come back."""

    key: str
    work: Callable[..., dict[str, Row]]
    arguments: tuple[Any, ...]


def kernel_jobs(modules: Iterable[str], archs: Iterable[int]) -> list[Job]:
    """One for each configuration, by name and arch."""
    found = [
        (key.rpartition(" ")[0], arch, Job(key, kernel_row, (module, key, arch)))
        for module in modules
        for arch in archs
        for key in compilations(module, arch)
    ]
    return [job for *_, job in sorted(found)]


def cuda_jobs(sources: Iterable[str], archs: Iterable[int]) -> list[Job]:
    return [
        Job(key := f"{Path(source).relative_to(ROOT)} sm_{CUDA_ARCHS[arch]}", cuda_rows, (source, key, arch))
        for source in sources
        for arch in archs
        if arch in CUDA_ARCHS
    ]


def run(jobs: list[Job], workers: int) -> Iterator[tuple[str, Row]]:
    """Rows by key, in the order of `jobs`. Where a process is gone, whose it was shows one by one."""
    done = alone = 0
    while done < len(jobs):
        part = jobs[done : done + 1 if alone else None]
        # a fork of a process in which torch has threads may hang
        with ProcessPoolExecutor(1 if alone else workers, multiprocessing.get_context("spawn")) as pool:
            try:
                for made in [pool.submit(job.work, *job.arguments) for job in part]:
                    yield from made.result().items()
                    done += 1
            except BrokenProcessPool:
                if alone:
                    yield part[0].key, CRASHED
                    done += 1
                else:
                    alone = workers + 1
        alone = max(0, alone - 1)


# the record


def read(path: Path) -> dict[str, Any]:
    """The record in `path`; one without rows where there is no such file.

    Raises:
        ValueError: it is no whole JSON, or of another schema; names the file.
    """
    if not path.exists():
        return {"schema": SCHEMA, "rows": {}}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{path}: no whole JSON: {problem}") from None
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {data.get('schema')!r} is not known, expected {SCHEMA}")
    return data


def sources() -> str:
    """A digest of the kernels' source: a record with another one is of other kernels."""
    folders = [ROOT / "csrc" / name for name in ("cuda", "shared")]
    # bindings are compiled into no kernel
    of_cuda = [path for folder in folders for path in folder.rglob("*.*") if path.suffix != ".cpp"]
    return digest_of([*tuning_cache.sources(), *sorted(of_cuda)])


def record_of(rows: dict[str, Row], before: dict[str, Any]) -> dict[str, Any]:
    """What --write writes. Where there is no nvcc, the rows of csrc stay as they were."""
    release, kept = nvcc_release(), {}
    if release is None:
        rows = {key: row for key, row in rows.items() if not key.startswith("csrc/")}
        kept = {key: row for key, row in before["rows"].items() if key.startswith("csrc/")}
    versions = {"triton": machine.version("triton"), "torch": machine.version("torch"), "sources": sources()}
    versions["nvcc"] = release or before.get("nvcc")
    return {"schema": SCHEMA, **versions, "rows": rows | kept}


def differences(before: dict[str, Row], after: dict[str, Row], *, gone: bool = True) -> list[str]:
    """What changed from one set of rows to another, a line for each configuration.

    Args:
        gone: name those that are only in `before`; not where `after` is a selection.
    """
    lines = [f"new      {line_of(key, row)}" for key, row in after.items() if key not in before]
    lines += [f"gone     {line_of(key, row)}" for key, row in before.items() if gone and key not in after]
    for key, row in after.items():
        if key in before and (changes := _changes(before[key], row)):
            lines.append(f"changed  {key}: {'; '.join(changes)}")
    return lines


def _changes(before: Row, after: Row) -> list[str]:
    changes = []
    for name in before | after:
        old, new = before.get(name), after.get(name)
        if old != new:
            lost = "lost wgmma: " if name == "mma" and "wgmma" in str(old) and "wgmma" not in str(new) else ""
            by = f" ({new - old:+})" if type(old) is type(new) is int else ""
            changes.append(f"{lost}{name} {old} -> {new}{by}")
    return changes


def line_of(key: str, row: Row) -> str:
    numbers = ", ".join(f"{name} {value}" for name, value in row.items() if name != "refused")
    return f"{key:56} {numbers}" + "".join(f"\n    REFUSED {why}" for why in row.get("refused", ()))


def main(argv: list[str] | None = None) -> int:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=list(ARCHS), metavar="80|89|90|100")
    parser.add_argument("--only", default="", help="configurations with this in the line they begin with")
    parser.add_argument("--write", action="store_true", help=f"renew {RECORD.relative_to(ROOT)}")
    told = parser.parse_args(argv)
    everything = not told.only and set(told.arch) == set(ARCHS)
    try:
        if told.write and not everything:
            raise ValueError("--write takes all configurations, not with --arch or --only")
        before = read(RECORD)
    except ValueError as problem:
        print(f"aot: {problem}", file=sys.stderr)
        return 2
    jobs = kernel_jobs(KERNEL_MODULES, told.arch) + cuda_jobs(CUDA_SOURCES, told.arch)
    jobs = [job for job in jobs if told.only in job.key]
    if not jobs:
        print(f"aot: --only must be in the key of a configuration, got {told.only!r}", file=sys.stderr)
        return 2
    rows: dict[str, Row] = {}
    for key, row in run(jobs, os.cpu_count() or 1):
        rows[key] = row
        print(line_of(key, row), flush=True)
    after = record_of(rows, before)
    print(f"\ncompared with {RECORD.name}:")
    for name in ("triton", "torch", "nvcc"):
        if name in before and before[name] != after[name]:
            print(f"{name} {before[name]} -> {after[name]}")
    print("\n".join(differences(before["rows"], after["rows"], gone=everything)) or "no difference")
    if told.write:
        write_json(RECORD, after)
    refused, skipped = (sum(name in row for row in rows.values()) for name in ("refused", "skipped"))
    print(f"{len(rows)} rows, {refused} refused, {skipped} skipped, {time.perf_counter() - began:.0f} s")
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())
