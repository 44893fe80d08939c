"""The rows of all benchmark files, by device, and what a table or picture asks of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitfast.bench import record
from vitfast.timm_names.variants import VARIANTS

CNNS = ("resnet", "mobilenet", "efficientnet", "convnext", "regnet")

NAMES = {"cuda": "CUDA"}
PARTS = {"patch", "growth", "gelu"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Device:
    """What was measured on one device (a CPU: with one number of threads).

    Attributes:
        rows: of each key the newest with times.
        ceilings: the newest, with the run that measured them under "run"; {} where none did.
        runs: all that the rows may come from.
        parts: what bench_cpu.py wrote there, whose rows are of other kinds; {} where it did not run.
    """

    name: str
    gpu: bool
    rows: list[Row]
    ceilings: Row
    runs: list[Row]
    parts: Row = field(default_factory=dict)

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")

    def where(self, rows: Iterable[Row]) -> str:
        """Device, and commits and dates of these rows."""
        days: dict[str, set[str]] = {}
        for row in sorted(rows, key=lambda row: row["date"]):
            dirty = " with local changes" if self._run_of(row).get("dirty") else ""
            days.setdefault(f"commit {row['commit'] or 'unknown'}{dirty}", set()).add(row["date"][:10])
        parts = [f"{commit}, {' to '.join(sorted({min(d), max(d)}))}" for commit, d in days.items()]
        return "; ".join([self.name, *parts])

    def versions(self, rows: Iterable[Row], packages: Iterable[str]) -> str:
        """Versions of these packages in all runs of these rows; of a package with several, all of them."""
        found = [self._run_of(row) for row in rows]
        listed = []
        for package in packages:
            seen = sorted({run[package] for run in found if run.get(package)})
            listed += [f"{NAMES.get(package, package)} {' and '.join(seen)}"] if seen else []
        return ", ".join(listed)

    def _run_of(self, row: Row) -> Row:
        began = [run for run in self.runs if run.get("commit") == row["commit"] and run["date"] <= row["date"]]
        return max(began, key=lambda run: run["date"], default={})


def load(folder: Path) -> tuple[list[Device], list[str]]:
    """All devices in `folder`, GPUs first, and the names of files of the format before there was a schema.

    Of those only what bench_cpu.py writes is read, from the newest file of a device.

    Raises:
        ValueError: a file that is no JSON, or has an unknown schema.
    """
    ignored: list[str] = []
    parts: dict[tuple[bool, str], Row] = {}
    files: dict[tuple[bool, str], list[Path]] = {}
    for file in sorted(folder.glob("*.json")):
        # of the sweep, which has other rows
        if file.name.endswith("-tune.json"):
            continue
        if _has_no_schema(file):
            found = json.loads(file.read_text(encoding="utf-8"))
            if not PARTS & found.keys() or "device_type" not in found["run"]:
                ignored.append(file.name)
            elif found["run"]["date"] >= parts.get(_place(found["run"]), found)["run"]["date"]:
                parts[_place(found["run"])] = found
            continue
        files.setdefault(_place(record.read(file)["run"]), []).append(file)
    devices = []
    for gpu, name in sorted(files.keys() | parts.keys(), key=lambda found: (not found[0], found[1])):
        of_device = files.get((gpu, name), [])
        merged = record.merge(of_device) if of_device else {"rows": [], "earlier": [], "run": {}}
        runs = [*merged["earlier"], merged["run"]]
        devices.append(Device(name, gpu, fair(merged["rows"]), _ceilings(of_device), runs, parts.get((gpu, name), {})))
    return devices, ignored


def _place(run: Row) -> tuple[bool, str]:
    gpu = run["device_type"] == "cuda"
    return gpu, run["device"] if gpu else f"{run['device']}, {run['threads']} threads"


def _ceilings(files: Iterable[Path]) -> Row:
    records = sorted((record.read(file) for file in files), key=lambda data: data["run"]["date"])
    return next(({**data["ceilings"], "run": data["run"]} for data in reversed(records) if data["ceilings"]), {})


def _has_no_schema(file: Path) -> bool:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and "schema" not in found


def is_cnn(row: Row) -> bool:
    return row["name"].startswith(CNNS)


def model_of(row: Row) -> str:
    """The model's name without the group of rivals that the row is about, with its image size."""
    name, shape = (row.get("notes") or {}).get("model", row["name"]), row["shape"]
    size = str(shape["size"]) if "size" in shape else f"{shape['height']}x{shape['width']}"
    width = "" if _is_timms(row) else f", dim {shape['dim']}"
    return name + width + ("" if size in name or is_cnn(row) and size == "224" else f" at {size}")


def _is_timms(row: Row) -> bool:
    """Whether the name tells the architecture."""
    return is_cnn(row) or (row.get("notes") or {}).get("model", row["name"]) in VARIANTS


def joined(rows: Iterable[Row]) -> list[Row]:
    """One row of the rows that differ only in the group of rivals; of a variant in several the first time counts.

    Ratios stay those to the baseline in the variant's own row. Sorted by model (of growing work), dtype and batch.
    """
    found: dict[Any, Row] = {}
    for row in sorted(rows, key=lambda row: row["name"] != (row.get("notes") or {}).get("model", row["name"])):
        same = (model_of(row), row["mode"], row["batch"], dtype(row))
        if same in found:
            variants = dict(found[same]["variants"])
            for name, variant in row["variants"].items():
                if name not in variants or (timed(variant) and not timed(variants[name])):
                    variants[name] = variant
            found[same] = found[same] | {"variants": variants, "parts": [*found[same]["parts"], row]}
        else:
            found[same] = row | {"name": model_of(row), "parts": [row]}
    first = {"bf16": 0, "fp16": 1, "fp32": 3}
    return sorted(
        found.values(),
        key=lambda row: (is_cnn(row), not _is_timms(row), row["work"]["flops"] / row["batch"], row["name"],
                         first.get(row["dtype"], 2), bool(row.get("autocast")), row["batch"]),
    )  # fmt: skip


def dtype(row: Row) -> str:
    return row["dtype"] + (" autocast" if row.get("autocast") else "") + (" as TF32" if row.get("tf32") else "")


def main_dtype(rows: Iterable[Row]) -> list[Row]:
    """The rows of the one dtype that pictures show: pure bf16 where there is any, else the first row's."""
    rows = list(rows)
    shown = "bf16" if any(dtype(row) == "bf16" for row in rows) else dtype(rows[0]) if rows else None
    return [row for row in rows if dtype(row) == shown]


def largest_batch(rows: Iterable[Row]) -> list[Row]:
    """Of rows that differ in nothing else than the batch the one with the largest."""
    best: dict[Any, Row] = {}
    for row in rows:
        same = (row["kind"], row["name"], row["mode"], tuple(row["shape"].items()), dtype(row))
        if same not in best or row["batch"] > best[same]["batch"]:
            best[same] = row
    return list(best.values())


def timed(variant: Row) -> bool:
    """Whether a variant has a time that may be shown: ours only where it was accepted."""
    return variant.get("ms") is not None and bool(variant.get("accepted") or not variant.get("ours"))


# a replay that takes longer than its calls from the host ran other operators than these
SLOWER_REPLAYED = 1.2
OTHER_OPERATORS = "replayed from a graph it runs other operators than its calls do, and slower ones"


def fair(rows: Iterable[Row]) -> list[Row]:
    """The rows, without times of graphs of any variant that a graph once made slower than its calls."""
    rows = list(rows)
    unfair = {name for row in rows for name, variant in row["variants"].items() if _slower_replayed(variant)}

    def shown(name: str, variant: Row) -> Row:
        if name not in unfair or not variant.get("graph"):
            return variant
        return {key: value for key, value in variant.items() if key != "ms"} | {"not_timed": OTHER_OPERATORS}

    return [row | {"variants": {name: shown(name, v) for name, v in row["variants"].items()}} for row in rows]


def _slower_replayed(variant: Row) -> bool:
    ms, wall_ms = variant.get("ms"), variant.get("wall_ms")
    return bool(ms and wall_ms and variant.get("graph") and ms > SLOWER_REPLAYED * wall_ms)


def ratio_text(variant: Row) -> str:
    """How many times as fast as the baseline; ≈ where the difference is within noise."""
    if variant.get("ratio") is None:
        return ""
    return "≈" if variant.get("within_noise") else f"{variant['ratio']:.2f}×"


def ours(row: Row) -> str | None:
    """The fastest of our variants with a time."""
    return _fastest(row, True)


def rival(row: Row) -> str | None:
    """The fastest of the others."""
    return _fastest(row, False)


def _fastest(row: Row, mine: bool) -> str | None:
    found = {
        name: v["ms"]
        for name, v in row["variants"].items()
        if timed(v) and bool(v.get("ours")) is mine and not v.get("part")
    }
    return min(found, key=found.get) if found else None


def images_per_s(row: Row, name: str) -> float:
    return row["batch"] * 1e3 / row["variants"][name]["ms"]


def variant_names(rows: Iterable[Row]) -> list[str]:
    """Names of all variants: ours, then baselines, then the rest, each in the order in which they come."""
    rows = list(rows)
    mine = {name: None for row in rows for name, v in row["variants"].items() if v.get("ours")}
    baselines = {row["baseline"]: None for row in rows}
    return list(mine | baselines | {name: None for row in rows for name in row["variants"]})
