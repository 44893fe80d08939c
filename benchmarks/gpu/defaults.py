"""Write the tables of built-in choices (`vitfast.choose.builtin`) from the records of the sweep, and from nothing else.

    python -m benchmarks.gpu.defaults [--from FILE ...] [--write]

Reads benchmarks/results/*-tune.json, and the files after --from beside them or, where the name is the same, in their
place. Of several records of a card a shape counts in the newest that has it. Prints which choices change; --write
writes the tables, all of them or none.

The rule: the kernel runs a shape where one of its configurations was faster than every stock operator that could take
its place, beyond the noise, in every record that has the shape: of cards that disagree none may lose. Beyond the noise
is: the median is below every round of the other, and every round below the other's median. What was not accepted, or
computes something else for comparison, counts for nothing. Among configurations that won, those within 2 % of the best
count as equal, and of them the one that is so in most rows is taken: fewer configurations take less time to compile.
In a prepared model a product with a residual may leave the statistics of its rows, with which the next one norms them:
what that saves there, by the same record, is added to the time of whatever leaves none.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vitfast.choose import builtin, config_tables
from vitfast.measure.files import by_lines, write_text

RESULTS, OF_SWEEPS = Path(__file__).resolve().parents[1] / "results", "*-tune.json"
# of the sweep's records
SCHEMA = 2
# times that count as equal
EQUAL = 1.02
# of a ratio that is a win only with what is saved elsewhere
NARROW = 0.05
# what an op can call in a kernel's place, of the stock operators that a row has beside the usual one
REACHABLE = {"attention": ("flash", "cudnn"), "attention_backward": ("flash", "cudnn")}
STANDS = ("device", "driver", "torch", "triton", "commit", "date")

Key = tuple[str, tuple[Any, ...]]
Variant = Mapping[str, Any]


class Evidence(NamedTuple):
    """One row of a record: who ran a shape on a card, and how fast; configurations are JSON, "" the usual one."""

    card: str
    date: str
    record: str
    stock: Mapping[str, Variant]
    ours: Mapping[str, Variant]
    beyond_reach: Mapping[str, Variant]


def read(path: Path) -> dict[str, Any]:
    """A record of the sweep.

    Raises:
        ValueError: it is no whole JSON, or of another schema; names the file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{path}: no whole JSON: {problem}") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema {schema!r} is not known, expected {SCHEMA}")
    return data


def named(config: Mapping[str, Any] | None) -> str:
    """The same for the same, whether or not a record is from before there was a field."""
    return "" if config is None else json.dumps(config, sort_keys=True)


def config_of(name: str) -> dict[str, Any] | None:
    return json.loads(name) if name else None


def arch_of(record: Mapping[str, Any]) -> int:
    major, minor = record["machine"]["capability"].split(".")
    return config_tables.architecture_of((int(major), int(minor)))


def must_be_of(kernel: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError for what the kernel's launcher would not take: an older kernel's, or another's."""
    makers = {"attention": config_tables.Config, "patch_embed": dict}
    try:
        makers.get(kernel.removesuffix("_backward"), config_tables.Product)(**config)
    except TypeError as problem:
        raise ValueError(f"{kernel} has no such configuration: {config}: {problem}") from None


def of_record(name: str, record: Mapping[str, Any]) -> dict[Key, list[Evidence]]:
    """Its rows that decide something."""
    found, machine = defaultdict(list), record["machine"]
    for row in record["rows"].values():
        kernel = row["kernel"]
        timed = {v: each for v, each in row["variants"].items() if "ms" in each and each.get("accepted", True)}
        stock: dict[str, Variant] = {}
        beyond: dict[str, Variant] = {}
        for variant, each in timed.items():
            backend = (each["config"] or {}).get("backend")
            if each["role"] == "stock" and (backend is None or backend in REACHABLE.get(kernel, ())):
                # flash attention is the usual one, called by us or by SDPA
                by = named(None if backend == "flash" else each["config"])
                stock[by] = min(stock.get(by, each), each, key=lambda one: one["ms"])
            elif each["role"] == "stock":
                beyond[variant] = each
        ours = {named(each["config"]): each for each in timed.values() if each["role"] == "ours"}
        for config in filter(None, map(config_of, ours)):
            must_be_of(kernel, config)
        if len(ours) > 1:
            # what the launcher chose on that day, which is among them by name
            ours.pop("", None)
        if kernel is not None and stock and ours:
            one = Evidence(machine["device"], machine["date"], name, stock, ours, beyond)
            found[kernel, tuple(row["shape"])].append(one)
    return {key: [credited(key, one, saved_by_statistics(key, found)) for one in rows] for key, rows in found.items()}


def saved_by_statistics(key: Key, own: Mapping[Key, Sequence[Evidence]]) -> float:
    """Milliseconds that the product after this one saves where it is given statistics of its rows."""
    kernel, shape = key
    if kernel != "added_linear":
        return 0.0
    width, depth = shape[3:5]
    for (other, given), rows in own.items():
        # after the attention's projection fc1, with an activation, and after fc2 the next block's qkv
        words = str(given[-1]).split()
        follows = other == "folded_linear" and given[:3] == shape[:3] and given[4] == width and words[-1] == "pieces"
        if follows and (words[1] == "none") == (depth != width):
            timed = [
                each
                for row in own.get((other, (*given[:-1], " ".join(words[:-1]))), ())
                for each in (*row.stock.values(), *row.ours.values())
            ]
            # neither stock operators nor cuBLAS with a norm before it read them
            timed += [
                each for row in rows for name, each in (*row.stock.items(), *row.ours.items())
                if name == "" or json.loads(name)["kernel"] == "blas"
            ]  # fmt: skip
            best = [each["ms"] for row in rows for each in row.ours.values()]
            return max(0.0, min((each["ms"] for each in timed), default=0.0) - min(best))
    return 0.0


def credited(key: Key, one: Evidence, saved: float) -> Evidence:
    """The row, with what statistics save the next product added to what leaves none."""
    if not saved:
        return one

    def more(each: Variant) -> Variant:
        return {**each, **{figure: each[figure] + saved for figure in ("ms", "lowest", "highest")}, "added": saved}

    def leaves_them(config: Mapping[str, Any]) -> bool:
        return config["kernel"] == "tiles" and key[1][3] % (config["block_n"] // config["parts"]) == 0

    ours = {c: each if leaves_them(json.loads(c)) else more(each) for c, each in one.ours.items()}
    return one._replace(ours=ours, stock={c: more(each) for c, each in one.stock.items()})


def faster(a: Variant, b: Variant) -> bool:
    """Whether a was faster than b beyond the noise."""
    return a["ms"] < b["lowest"] and a["highest"] < b["ms"]


def winners(rows: Sequence[Evidence]) -> dict[str, float]:
    """The configurations that beat all stock operators in all of these rows, and how far each is behind the best."""
    everywhere = set.intersection(*(set(row.ours) for row in rows))
    won = [c for c in everywhere if all(faster(row.ours[c], stock) for row in rows for stock in row.stock.values())]
    times = {c: sum(math.log(row.ours[c]["ms"]) for row in rows) / len(rows) for c in won}
    best = min(times.values(), default=0.0)
    return {c: math.exp(time - best) for c, time in times.items()}


def ratios(rows: Sequence[Evidence], config: str | None) -> dict[str, float]:
    """The fastest stock operator's time by that of the configuration, None: of the fastest; the lowest by card."""

    def alone(each: Variant) -> float:
        return each["ms"] - each.get("added", 0.0)

    found: dict[str, float] = {}
    for row in rows:
        ours = min(map(alone, row.ours.values())) if config is None else alone(row.ours[config])
        found[row.card] = min(found.get(row.card, math.inf), min(map(alone, row.stock.values())) / ours)
    return {card: round(ratio, 3) for card, ratio in sorted(found.items())}


def best_stock(rows: Sequence[Evidence]) -> str:
    """The stock operator that beats the usual one in all of these rows, if one does."""
    others = set.intersection(*(set(row.stock) for row in rows)) - {""}
    better = [c for c in others if all("" in row.stock and faster(row.stock[c], row.stock[""]) for row in rows)]
    return min(better, key=lambda c: sum(row.stock[c]["ms"] for row in rows), default="")


def table(shapes: Mapping[Key, Sequence[Evidence]]) -> list[dict[str, Any]]:
    """The rows of an architecture's table."""
    won = {key: winners(rows) for key, rows in shapes.items()}
    often = Counter((key[0], c) for key, each in won.items() for c, behind in each.items() if behind <= EQUAL)
    lines = []
    for (kernel, shape), rows in sorted(shapes.items(), key=lambda item: (item[0][0], str(item[0][1]))):
        each = won[kernel, shape]
        equal = [c for c, behind in each.items() if behind <= EQUAL]
        chosen = min(equal, key=lambda c: (-often[kernel, c], each[c], c)) if equal else best_stock(rows)
        line: dict[str, Any] = {
            "kernel": kernel, "shape": list(shape), "use": "kernel" if equal else "stock", "config": config_of(chosen),
            "ratio": ratios(rows, chosen if equal else None), "records": sorted({row.record for row in rows}),
        }  # fmt: skip
        if note := _note(rows, line):
            line["note"] = note
        if any(each.get("graph") is False for one in rows for each in one.stock.values()):
            line["host"] = True
        lines.append(line)
    return lines


def _note(rows: Sequence[Evidence], line: Mapping[str, Any]) -> str:
    """What was faster than the choice and is no choice, in words."""
    by, ours = set(), line["use"] == "kernel"
    for row in rows:
        # the usual stock operators may have failed where others did not
        usual = min(row.stock.values(), key=lambda one: one["ms"])
        taken = (row.ours if ours else row.stock).get(named(line["config"]), usual)
        by |= {name for name, each in row.beyond_reach.items() if faster(each, taken)}
    notes = [f"{', '.join(sorted(by))} faster, which the op can't call"] if by else []
    saved = max(each.get("added", 0.0) for row in rows for each in row.stock.values())
    if ours and saved and min(line["ratio"].values()) < 1 + NARROW:
        notes.append(f"its statistics save the next product {1e3 * saved:.1f} us")
    return "; ".join(notes)


def tables(records: Mapping[str, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """What to write, by architecture; `records` by the name that rows' sources are to have."""
    made = {}
    for arch in sorted({arch_of(record) for record in records.values()}):
        of_arch = {name: record for name, record in records.items() if arch_of(record) == arch}
        shapes: dict[Key, list[Evidence]] = defaultdict(list)
        for name, record in of_arch.items():
            for key, rows in of_record(name, record).items():
                shapes[key] += rows
        for key, rows in shapes.items():
            # of each card only what its newest record says
            dates = {card: max(row.date for row in rows if row.card == card) for card in {row.card for row in rows}}
            shapes[key] = [row for row in rows if row.date == dates[row.card]]
        stands = [{"record": name} | {k: data["machine"][k] for k in STANDS} for name, data in of_arch.items()]
        if shapes:
            made[arch] = {"schema": builtin.SCHEMA, "arch": arch, "records": stands, "rows": table(shapes)}
    return made


def text_of(data: Mapping[str, Any]) -> str:
    """A table's file, with a line for each row."""
    head = {name: value for name, value in data.items() if name != "rows"}
    return by_lines(head, map(json.dumps, data["rows"]), named=False)


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Choices that are others, a line for each."""

    def choices(table: Mapping[str, Any]) -> dict[str, str]:
        return {f"{row['kernel']} {row['shape']}": f"{row['use']} {named(row['config'])}" for row in table["rows"]}

    old, new = choices(before), choices(after)
    names = dict.fromkeys([*old, *new])
    return [f"{n}: {old.get(n, 'none')} -> {new.get(n, 'none')}" for n in names if old.get(n) != new.get(n)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.defaults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="more", nargs="*", type=Path, default=[], metavar="FILE", help="more records")
    parser.add_argument("--write", action="store_true", help="write the tables")
    parser.add_argument("--into", type=Path, default=builtin.FOLDER, help=argparse.SUPPRESS)
    told = parser.parse_args(argv)
    try:
        records = {path.name: read(path) for path in (*sorted(RESULTS.glob(OF_SWEEPS)), *told.more)}
        for name in [name for name, data in records.items() if data["machine"]["device_type"] != "cuda"]:
            print(f"{name} is of no GPU, and decides nothing")
            del records[name]
        made = tables(records)
    except (OSError, ValueError, KeyError) as problem:
        print(f"defaults: {type(problem).__name__}: {problem}", file=sys.stderr)
        return 1
    for arch, data in made.items():
        path = told.into / builtin.path_of(arch).name
        lines = changes(json.loads(path.read_text()) if path.exists() else {"rows": []}, data)
        ours = sum(row["use"] == "kernel" for row in data["rows"])
        print("\n".join([*lines, f"sm_{arch}: {len(data['rows'])} shapes, {ours} by kernels, {len(lines)} changed"]))
        if told.write:
            write_text(path, text_of(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
