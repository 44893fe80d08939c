"""The rows of all records, by device, and what a table or picture asks of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.core import patched, record
from vitfast.timm_names.variants import VARIANTS

CNNS = ("resnet", "mobilenet", "efficientnet", "convnext", "regnet")
# what the README shows of all that was measured: these models, and of the others the one that people have
SUMMARY = tuple(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large"))
RIVAL = "timm"
# a replay that takes longer than its calls from the host ran other operators than these
SLOWER_REPLAYED = 1.2
OTHER_OPERATORS = "replayed from a graph it runs other operators than its calls do, and slower ones"

Row = dict[str, Any]


@dataclass(frozen=True)
class Device:
    """What was measured on one device (a CPU: with one number of threads and one choice of instruction set).

    Attributes:
        rows: of each key the newest with times. Beyond what a record has: "run", which measured it; "dtype" says how
            products were computed too; those of models have "model" without the group of rivals, with its image size.
        ceilings: the newest but of runs of patched models alone, with "run", "date" and "commit"; {} where none did.
    """

    name: str
    gpu: bool
    rows: list[Row]
    ceilings: Row

    def where(self, rows: Iterable[Row]) -> str:
        """Device, and commits and dates of these rows."""
        days: dict[str, set[str]] = {}
        for row in sorted(rows, key=lambda row: row["date"]):
            dirty = " with local changes" if row["run"].get("dirty") else ""
            days.setdefault(f"commit {row['commit'] or 'unknown'}{dirty}", set()).add(row["date"][:10])
        return "; ".join([self.name, *(f"{at}, {' to '.join(sorted({min(d), max(d)}))}" for at, d in days.items())])


def load(folder: Path) -> list[Device]:
    """All devices of the records in `folder`, GPUs first.

    Raises:
        ValueError: a file that is no record, or of an unknown schema; names it.
    """
    found: dict[tuple[bool, str], dict[Path, Row]] = {}
    for file in sorted(folder.glob("*.json")):
        # the sweep's record has other rows
        if not file.name.endswith("-tune.json"):
            is_parts = file.name.endswith("-parts.json")
            data = json.loads(file.read_text(encoding="utf-8")) if is_parts else record.read(file)
            run = data["run"]
            found.setdefault((run["device_type"] != "cuda", record.device_of(run)), {})[file] = data
    return [_device(name, not cpu, files) for (cpu, name), files in sorted(found.items(), key=lambda item: item[0])]


def _device(name: str, gpu: bool, files: dict[Path, Row]) -> Device:
    records = {file: data for file, data in files.items() if "schema" in data}
    in_order = sorted(records.values(), key=lambda data: data["run"]["date"])
    # beside what is shown under them: those of a run of patched models alone are of another hour of the clock
    shown = [data for data in in_order if {row["kind"] for row in data["rows"]} != {patched.KIND}]
    ceilings = [data["ceilings"] | _stamp(data["run"]) for data in shown or in_order if data["ceilings"]]
    runs = sorted((run for data in in_order for run in (*data["earlier"], data["run"])), key=lambda run: run["date"])
    rows = []
    for row in fair(record.merge(records)["rows"] if records else []):
        began = [run for run in runs if run.get("commit") == row["commit"] and run["date"] <= row["date"]]
        dtype = row["dtype"] + " autocast" * bool(row.get("autocast")) + " as TF32" * bool(row.get("tf32"))
        more = {"model": _model(row)} if row["kind"] == "model" else {}
        rows.append(row | more | {"dtype": dtype, "run": [{}, *began][-1]})
    # of the CPU benchmark whose rows are of kinds of their own
    for data in (data for data in files.values() if "schema" not in data):
        rows += [
            _of_part(row, kind) | _stamp(data["run"]) for kind in ("patch", "growth", "gelu") for row in data[kind]
        ]
    return Device(name, gpu, rows, [{}, *ceilings][-1])


def _stamp(run: Row) -> Row:
    return {"run": run, "date": run["date"], "commit": run.get("commit")}


def _of_part(row: Row, kind: str) -> Row:
    """A row as those of records are. That of patches names the fastest way of timm, which it is compared with."""
    variants = row["variants"]
    if kind == "patch":
        quartiles = {"vitfast": row.get("ratio"), "prepared": row.get("ratio of prepared")}
        ratios = {name: found[1] for name, found in quartiles.items() if found}
        variants = {name: variant | {"ratio": ratios.get(name)} for name, variant in variants.items()}
    more = {"noise_25": row.get("noise"), "baseline": row.get("against", row["baseline"]), "variants": variants}
    return row | more | {"kind": kind, "mode": kind, "name": kind}


def fair(rows: list[Row]) -> list[Row]:
    """The rows without times that may not be shown.

    These are of ours what was not accepted, and the graphs of a variant that a graph once made slower than its calls.
    """
    every = [(name, variant) for row in rows for name, variant in row["variants"].items()]
    unfair = {name for name, variant in every if _slower_replayed(variant)}

    def shown(name: str, variant: Row) -> Row:
        why = None
        if variant.get("ours") and not variant.get("accepted"):
            why = variant.get("not_timed") or variant.get("why_not_accepted") or "its result was not accepted"
        elif variant.get("graph") and name in unfair:
            why = OTHER_OPERATORS
        keep = why is None or "absent" in variant
        return variant if keep else {"ours": bool(variant.get("ours")), "not_timed": why}

    return [row | {"variants": {name: shown(name, each) for name, each in row["variants"].items()}} for row in rows]


def _slower_replayed(variant: Row) -> bool:
    ms, wall_ms = variant.get("ms"), variant.get("wall_ms")
    return bool(ms and wall_ms and variant.get("graph") and ms > SLOWER_REPLAYED * wall_ms)


def is_cnn(row: Row) -> bool:
    return row["name"].startswith(CNNS)


def _is_timms(row: Row) -> bool:
    """Whether the name tells the architecture."""
    return is_cnn(row) or (row.get("notes") or {}).get("model", row["name"]) in VARIANTS


def _model(row: Row) -> str:
    name, shape = (row.get("notes") or {}).get("model", row["name"]), row["shape"]
    size = "x".join(str(shape[side]) for side in ("size", "height", "width") if side in shape)
    name += "" if _is_timms(row) else f", dim {shape['dim']}"
    return name + ("" if size in name or (is_cnn(row) and size == "224") else f" at {size}")


def of_kind(kind: str, device: Device) -> list[Row]:
    return [row for row in device.rows if row["kind"] == kind]


def patched_models(device: Device) -> list[Row]:
    """Rows of other libraries' models and `vitfast.patch`, by library in the order of the record; those of the whole
    patch, not of its parts."""
    rows = [row for row in of_kind(patched.KIND, device) if row["notes"]["split"] == patched.SPLITS[0]]
    families = list(dict.fromkeys(row["notes"]["family"] for row in rows))
    return sorted(
        rows,
        key=lambda row: (families.index(row["notes"]["family"]), row["shape"]["dim"], row["mode"], row["batch"],
                         row["dtype"]),
    )  # fmt: skip


def models(device: Device, mode: str | None = None, main_dtype: bool = False) -> list[Row]:
    """Rows of models, of `mode`: one of those that differ only in the group of rivals, with these as "parts".

    Of a variant in several of them the first time counts. Ratios stay those to the baseline in the variant's own row.
    Where baselines are apart the machine was another on another day, and only the newest rows count.
    Sorted by model (of growing work), dtype and batch; of dtypes all, or the one that pictures show.
    """
    rows = [row for row in of_kind("model", device) if mode in (None, row["mode"])]
    found: dict[Any, Row] = {}
    # what is named as the model itself is of no group, or of the first; then a line is of one run, as far as that goes
    for row in sorted(
        _main_dtype(rows) if main_dtype else rows,
        key=lambda row: (not row["model"].startswith(row["name"]), -sum(map(timed, row["variants"].values()))),
    ):
        key = row["model"], row["mode"], row["batch"], row["dtype"]
        same = found.setdefault(key, row | {"parts": []})
        if _apart(same, row):
            if row["date"] <= same["date"]:
                continue
            same = found[key] = row | {"parts": []}
        same["parts"].append(row)
        known = same["variants"]
        new = {n: v for n, v in row["variants"].items() if n not in known or (timed(v) and not timed(known[n]))}
        same["variants"] = known | new
    dtypes = {"bf16": 0, "fp16": 1, "fp32": 3}
    return sorted(
        found.values(),
        key=lambda row: (is_cnn(row), not _is_timms(row), row["work"]["flops"] / row["batch"], row["model"],
                         dtypes.get(row["dtype"].split()[0], 2), row["dtype"], row["batch"]),
    )  # fmt: skip


def _apart(row: Row, other: Row) -> bool:
    """Whether the baseline of one takes 10 % longer than the other's: no time of one goes beside one of the other."""
    times = [each["variants"].get(each["baseline"], {}).get("ms") for each in (row, other)]
    return row["baseline"] == other["baseline"] and None not in times and max(times) > 1.1 * min(times)


def _main_dtype(rows: list[Row]) -> list[Row]:
    """Pure bf16 where there is any, else the first row's; nothing in int8, for a bar does not show its error."""
    dtypes = [row["dtype"] for row in rows]
    return [
        row | {"variants": {name: each for name, each in row["variants"].items() if not is_coarse(each)}}
        for row in rows
        if row["dtype"] == ("bf16" if "bf16" in dtypes else dtypes[0])
    ]


def largest_batch(rows: Iterable[Row]) -> list[Row]:
    """Of rows that differ in nothing else than the batch the one with the largest."""
    best: dict[Any, Row] = {}
    for row in rows:
        same = (row.get("model", row["name"]), row["mode"], tuple(row["shape"].items()), row["dtype"])
        if same not in best or row["batch"] > best[same]["batch"]:
            best[same] = row
    return list(best.values())


def largest_models(device: Device) -> list[Row]:
    return largest_batch(models(device, "inference", main_dtype=True))


def summary_models(device: Device) -> list[Row]:
    """Of these what the README shows, without rivals but timm."""
    return [
        row | {"variants": {name: v for name, v in row["variants"].items() if v.get("ours") or name == RIVAL}}
        for row in largest_models(device)
        if row["model"] in SUMMARY and row["baseline"] == RIVAL
    ]


def base_ops(device: Device, main_dtype: bool = False) -> list[Row]:
    """Rows of ops in the shapes of a ViT-B, each at its largest batch."""
    base = {"width": 768, "head_dim": 64}.items()
    rows = largest_batch(
        row for row in of_kind("op", device) if all(row["shape"].get(name, size) == size for name, size in base)
    )
    return _main_dtype(rows) if main_dtype else rows


def timed(variant: Row) -> bool:
    return variant.get("ms") is not None


def is_coarse(variant: Row) -> bool:
    """Whether it computes in fewer bits than the row's dtype, as int8 does, with an error of its own."""
    return variant.get("tolerance") is not None


def peaks(variant: Row) -> tuple[float, ...]:
    """Peak memory, allocated and reserved, MiB; () where it was not measured."""
    found = (variant.get("peak_allocated_mib"), variant.get("peak_reserved_mib"))
    return found if timed(variant) and None not in found else ()


def ratio_text(variant: Row) -> str:
    """How many times as fast as the baseline; ≈ where the difference is within noise."""
    if variant.get("ratio") is None:
        return ""
    return "≈" if variant.get("within_noise") else f"{variant['ratio']:.2f}×"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def ours(row: Row) -> str | None:
    """The fastest of our variants with a time."""
    return _fastest(row, True)


def rival(row: Row) -> str | None:
    """The fastest of the others that are as exact."""
    return _fastest(row, False)


def _fastest(row: Row, mine: bool) -> str | None:
    found = {name: v["ms"] for name, v in row["variants"].items()
             if timed(v) and bool(v.get("ours")) is mine and not v.get("part") and not is_coarse(v)}  # fmt: skip
    return min(found, key=found.get) if found else None


def images_per_s(row: Row, name: str) -> float:
    return row["batch"] * 1e3 / row["variants"][name]["ms"]


def variant_names(rows: Iterable[Row]) -> list[str]:
    """Names of all variants: ours, then baselines, then the rest, each in the order in which they come."""
    rows = list(rows)
    mine = {name: None for row in rows for name, v in row["variants"].items() if v.get("ours")}
    return list(
        mine | {row["baseline"]: None for row in rows} | {name: None for row in rows for name in row["variants"]}
    )
