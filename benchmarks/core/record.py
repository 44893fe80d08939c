"""The file of a run: JSON of schema 1, written after every row so that a run cut short keeps what it finished.

    {"schema": 1,
     "run": {...},          what `vitfast.measure.machine.describe` says of machine, versions, commit and command
     "earlier": [{...}],    the same of the runs that this one resumed or was merged with
     "ceilings": {...},     what `benchmarks.core.ceilings.measure` found, {} where it was not asked
     "rows": [{...}],
     "skipped": [{"stage", "key", "why"}]}   cases that were not run

A row compares the variants of one case (see `vitfast.check.case`):

    key                     kind/name/mode/shape/batch/dtype[ autocast]: what merging and resuming go by
    kind, name, mode, shape {name: int}, batch, dtype, autocast, notes    the case
    tf32                    of fp32 rows on a GPU: whether matrix products may round to TF32; else null
    work                    {"flops", "bytes"}: the least the case must do
    baseline, yardstick     names of variants: whom ratios compare with, whose error is the measure of everybody's
    noise, noise_25, noise_75   the baseline's time over its own second measurement: median, and quartiles of it and
                            its inverse
    rounds, noisy           how many were kept; how many of those were noisy (see `vitfast.measure.timing`)
    sets                    sets of inputs that calls rotate over
    others                  share of the CPUs' time that other processes took; null on a GPU
    before, after           NVML's state (see `vitfast.measure.nvml`); null on a CPU
    stage, date, commit     of the run that measured the row; date in UTC
    seconds                 what the row took
    variants                {name: variant}

A variant has either `absent` (which packages it lacks, or why it cannot run here at all), or `not_timed` (why: a wrong
result of ours, an exception, no memory, no time left), or times. Of these only what was found out is there:

    ours                    vitfast's
    compile_s               building it and its first call
    accepted, error_ratio   by the acceptance rule; rms error over the yardstick's, the worst of the results; null where
                            it has no finite error, or the yardstick failed. A rival that is not accepted is timed all
                            the same and has `why_not_accepted`
    part                    true where it computes a part of the case only: not judged, and no rival
    tolerance, error, cosine   of what computes in fewer bits than the row's dtype (int8), which is no rival either: the
                            rms error that is accepted in place of the rule, and what it is, as shares of the results'
                            rms in fp64, the worst of the results; the lowest cosine of an image's results with fp64's
    ms, ms_20, ms_80        of one call: median, and what 20 and 80 % of the rounds stayed below
    ratio, ratio_25, ratio_75   the baseline's time over this one's, pair by pair: above 1 it is faster
    within_noise            the quartiles of ratio and noise overlap: no difference was measured
    graph                   replayed from a CUDA graph; `why_no_graph` where the row's others are and it is not
    host_bound              issuing a call takes as long as the device needs for it: `ms` is the host's time
    wall_ms, issue_ms       without a graph, on a GPU: of one call in a series, and what the host needs to issue it
    tflops, gbps            the case's work by `ms`
    percent, limit          of the time that the run's ceilings allow; "compute" or "memory" sets that time
    peak_allocated_mib, peak_reserved_mib   what one call needs at its peak beyond what was there before (training)
    peak_resident_mib       the same of the process on a CPU, of whole models in inference too
    apart, baseline_ms      timed in a process of its own, not in turns with the others, against the baseline there

Every number that is not finite is null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vitfast.measure import machine
from vitfast.measure.files import write_json

SCHEMA = 1

Row = dict[str, Any]


class Record:
    """A run's file. Every change is on disk when the call returns.

    Args:
        run: what `machine.describe` returned.

    Attributes:
        running, building: key of the row in the making and which variant is being built; they are not in the file.
    """

    running: str | None = None
    building: str | None = None

    def __init__(self, path: Path | str, run: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.data: dict[str, Any] = {
            "schema": SCHEMA, "run": dict(run), "earlier": [], "ceilings": {}, "rows": [], "skipped": [],
        }  # fmt: skip

    @property
    def rows(self) -> list[Row]:
        return self.data["rows"]

    def add(self, row: Row) -> None:
        """Write `row`, in place of one with the same key."""
        row = {**row, "date": machine.now(), "commit": self.data["run"].get("commit")}
        keys = [each["key"] for each in self.rows]
        if row["key"] in keys:
            self.rows[keys.index(row["key"])] = row
        else:
            self.rows.append(row)
        self.data["skipped"] = [each for each in self.data["skipped"] if each.get("key") != row["key"]]
        self.write()

    def skip(self, stage: str, keys: Iterable[str], why: str) -> None:
        """Note cases that were not run, or of which the reason is now another."""
        keys = list(keys)
        kept = [each for each in self.data["skipped"] if each.get("key") not in keys]
        self.data["skipped"] = kept + [{"stage": stage, "key": key, "why": why} for key in keys]
        self.write()

    def finished(self) -> set[str]:
        """Keys of the rows with a time in them."""
        return {row["key"] for row in self.rows if has_times(row)}

    def write(self) -> None:
        write_json(self.path, self.data)


def has_times(row: Mapping[str, Any]) -> bool:
    return any("ms" in variant for variant in row["variants"].values())


def read(path: Path | str) -> dict[str, Any]:
    """The record in `path`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole JSON, not a record, or of a schema this version does not know; names the file.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{path}: not a record of a benchmark, or cut short: {problem}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema", "none") if isinstance(data, dict) else "none"
        raise ValueError(f"{path}: schema {found!r} is not known, expected {SCHEMA}")
    missing = [name for name in ("run", "rows") if name not in data]
    if missing or not all(isinstance(row, dict) and {"key", "variants"} <= row.keys() for row in data["rows"]):
        lacks = ", ".join(missing) or "rows with key and variants"
        raise ValueError(f"{path}: not a whole record of schema {SCHEMA}: it lacks {lacks}")
    return {"earlier": [], "ceilings": {}, "skipped": []} | data


def open_for_resume(path: Path | str, run: Mapping[str, Any]) -> Record:
    """The record in `path`, to be continued by `run`; a new one where there is no such file.

    Rows with times stay, and `benchmarks.core.harness.run_cases` leaves their cases out. It runs the others again:
    those that failed, ran out of time or were skipped.

    Raises:
        ValueError: as `read`; or `run` is on another device than the record, a CPU with another number of threads or
            another VITFAST_CPU_ISA among them.
    """
    record = Record(path, run)
    if record.path.exists():
        data = read(path)
        _same_devices({str(path): data["run"], "this run": dict(run)})
        record.data = {**data, "run": dict(run), "earlier": [*data["earlier"], data["run"]]}
    return record


def set_aside(path: Path | str) -> Path | None:
    """Rename what is at `path`, so that a new record can take its place; the new name, None where there was nothing.

    One file is kept so: what was set aside before is lost.
    """
    path = Path(path)
    if not path.exists():
        return None
    return path.replace(path.with_name(f"{path.name}.before"))


def merge(paths: Iterable[Path | str]) -> dict[str, Any]:
    """One record of several. Of rows with the same key the newest with times stays.

    Run and ceilings are the newest that there are; the other runs are listed under "earlier".

    Raises:
        ValueError: as `read`; no path; or the files are from different devices.
    """
    found = {str(path): read(path) for path in paths}
    if not found:
        raise ValueError("merge: paths must name at least one file, got none")
    _same_devices({path: data["run"] for path, data in found.items()})
    in_order = sorted(found.values(), key=lambda data: data["run"].get("date", ""))
    rows: dict[str, Row] = {}
    for row in (row for data in in_order for row in data["rows"]):
        if row["key"] not in rows or _rank(row) >= _rank(rows[row["key"]]):
            rows[row["key"]] = row
    skipped = {each.get("key"): each for data in in_order for each in data["skipped"]}
    return {
        "schema": SCHEMA,
        "run": in_order[-1]["run"],
        "earlier": [run for data in in_order for run in data["earlier"]] + [data["run"] for data in in_order[:-1]],
        "ceilings": next((data["ceilings"] for data in reversed(in_order) if data["ceilings"]), {}),
        "rows": list(rows.values()),
        "skipped": [each for key, each in skipped.items() if key not in rows],
    }


def _rank(row: Row) -> tuple[bool, str]:
    return has_times(row), row.get("date", "")


def device_of(run: Mapping[str, Any]) -> str:
    """On what it ran, a CPU with its threads and the instruction set that was asked for: times go beside others of the
    same only."""
    if run.get("device_type") != "cpu":
        return str(run.get("device"))
    asked = run.get("cpu_isa")
    return f"{run['device']}, {run.get('threads')} threads" + (f", VITFAST_CPU_ISA={asked}" if asked else "")


def _same_devices(runs: Mapping[str, Mapping[str, Any]]) -> None:
    devices = {path: device_of(run) for path, run in runs.items()}
    if len(set(devices.values())) > 1:
        listed = "; ".join(f"{path}: {device}" for path, device in devices.items())
        raise ValueError(f"the runs must be on one device, got {listed}")
