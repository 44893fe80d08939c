"""Write the tables and pictures of README and docs from the JSON files of benchmarks, and from nothing else.

    python benchmarks/make_report.py [--check]

Every `<!-- report: DEVICE TABLE -->` ... `<!-- end -->` in README.md and docs/*.md is filled anew, DEVICE being gpu or
cpu, `<!-- report: choices -->` with the built-in choices, and `<!-- report: records -->` with what ran on which GPU;
pictures are written next to the JSON files as report_*.svg. Where nothing was measured it says so; of GPUs only in the
last of these. Files of the format before there was a schema are named and not read.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import report_choices
import report_parts
import report_pictures
import report_records
import report_rows
import report_tables
from report_rows import Device

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- report: (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
KINDS = {"gpu": True, "cpu": False}
# devices, and names of files of the format before there was a schema
Loaded = tuple[list[Device], list[str]]
# each with the pictures above it, in words for who cannot see them
TABLES = {
    "summary": (report_tables.summary, {"summary": "times timm's images a second"}),
    "host": (report_tables.host, {}),
    "throughput": (report_tables.throughput, {"throughput": "images a second by batch", "rivals": "images a second"}),
    "latency": (report_tables.latency, {"latency": "milliseconds of one image"}),
    "training": (report_tables.training, {}),
    "memory": (report_tables.memory, {"memory": "memory of a training step"}),
    "ops": (report_tables.ops, {"ops": "percent of the roofline by op"}),
    "all ops": (report_tables.all_ops, {}),
    "flops": (report_tables.flops, {"flops": "images a second by FLOPs of an image, ViTs and CNNs"}),
    "ceilings": (report_tables.ceilings, {}),
    "patch": (report_parts.patch, {}),
    "growth": (report_parts.growth, {}),
    "gelu": (report_parts.gelu, {}),
}


def fill(
    page: str, devices: list[Device], folder: str, others: Mapping[str, str] = MappingProxyType({})
) -> tuple[str, dict[str, bytes]]:
    """The page with every block filled, and the pictures that it names, by file name.

    Args:
        folder: where pictures will be, as the page has to name it.
        others: what stands in blocks of no one device, by name.

    Raises:
        ValueError: a block that no table is for.
    """
    pictures: dict[str, bytes] = {}

    def block(found: re.Match) -> str:
        begin, name, _, end = found.groups()
        if name in others:
            return f"{begin}\n{others[name]}\n\n{end}"
        kind, _, table = name.partition(" ")
        if kind not in KINDS or table not in TABLES:
            known = ", ".join([*others, *(f"{kind} {table}" for kind in KINDS for table in TABLES)])
            raise ValueError(f"no report is named {name!r}, only {known}")
        of_kind = [d for d in devices if d.gpu is KINDS[kind]]
        if KINDS[kind] and not of_kind:
            return f"{begin}{end}"
        return f"{begin}\n{_contents(table, of_kind, folder, pictures)}\n\n{end}"

    return BLOCK.sub(block, page), pictures


def fill_all(root: Path, results: Path) -> tuple[dict[Path, str], dict[str, bytes], Loaded]:
    """README.md and docs/*.md below `root` with every block filled, the pictures that they name, and what was read.

    Raises:
        ValueError: a block that no table is for, a file that is no record. OSError: a file that cannot be read.
    """
    devices, ignored = report_rows.load(results)
    others = {"choices": report_choices.choices(), "records": report_records.records(results)}
    filled, pictures = {}, {}
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        folder = Path(os.path.relpath(results, path.parent)).as_posix()
        try:
            filled[path], drawn = fill(path.read_text(encoding="utf-8"), devices, folder, others)
        except ValueError as error:
            raise ValueError(f"{path.relative_to(root)}: {error}") from None
        pictures |= drawn
    return filled, pictures, (devices, ignored)


def _contents(table: str, devices: list[Device], folder: str, pictures: dict[str, bytes]) -> str:
    make, of_table = TABLES[table]
    parts = []
    for device in devices:
        written = make(device)
        if not written:
            continue
        for name, words in of_table.items():
            drawn = report_pictures.draw(report_pictures.PICTURES[name], device)
            if drawn is not None:
                file = f"report_{device.slug}_{name}.svg"
                pictures[file] = drawn
                parts.append(f"![{device.name}: {words}]({folder}/{file})")
        parts.append(written)
    return "\n\n".join(parts) or report_tables.NOT_MEASURED


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs are")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something would change")
    args = parser.parse_args(arguments)
    try:
        filled, pictures, (devices, ignored) = fill_all(args.root, args.results)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    changed = [path for path, after in filled.items() if path.read_text(encoding="utf-8") != after]
    for name in ignored:
        print(f"{name} has no schema: it is of an older benchmark and not read; measure again")
    there = {file.name: file.read_bytes() for file in args.results.glob("report_*.svg")}
    if args.check:
        names = [str(path.relative_to(args.root)) for path in changed]
        names += sorted(name for name in there | pictures if there.get(name) != pictures.get(name))
        print(f"make report would change {', '.join(names)}" if names else "the report is up to date")
        return 1 if names else 0
    for name in there.keys() - pictures.keys():
        (args.results / name).unlink()
    for name, drawn in pictures.items():
        (args.results / name).write_bytes(drawn)
    for path in changed:
        path.write_text(filled[path], encoding="utf-8")
    rows = sum(len(device.rows) for device in devices)
    print(f"{rows} rows of {len(devices)} devices, {len(pictures)} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
