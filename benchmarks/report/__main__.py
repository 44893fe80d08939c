"""Write the tables and pictures of README and docs from the records of benchmarks, and from nothing else.

Every `<!-- report: DEVICE TABLE -->` ... `<!-- end -->` in README.md and docs/*.md is filled anew, DEVICE being gpu or
cpu, `<!-- report: choices -->` with the built-in choices, and `<!-- report: records -->` with what ran on which GPU;
pictures are written next to the records as report_*.png. Where nothing was measured it says so; of GPUs only in the
last of these.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from benchmarks.report import rows
from benchmarks.report.choices import choices
from benchmarks.report.pictures import PICTURES, Picture
from benchmarks.report.records import records
from benchmarks.report.rows import Device
from benchmarks.report.tables import TABLES

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(<!-- report: (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
KINDS = {"gpu": True, "cpu": False}
NOT_MEASURED = "not measured"


def filled(root: Path, results: Path) -> tuple[dict[Path, str], dict[str, Picture]]:
    """README.md and docs/*.md below `root` with every block filled, and the pictures that they name, by file name.

    Raises:
        ValueError: a block that no table is for, a file that is no record. OSError: a file that cannot be read.
    """
    devices = rows.load(results)
    pages, drawn = {}, {}
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        folder = Path(os.path.relpath(results, page.parent)).as_posix()

        def block(found: re.Match, page: Path = page, folder: str = folder) -> str:
            begin, name, _, end = found.groups()
            kind, _, table = name.partition(" ")
            if name in ("choices", "records"):
                text = choices() if name == "choices" else records(results)
            elif kind in KINDS and table in TABLES:
                of_kind = [device for device in devices if device.gpu is KINDS[kind]]
                text = "\n\n".join(part for device in of_kind for part in _parts(table, device, folder, drawn))
                text = text or (NOT_MEASURED if of_kind or kind == "cpu" else "")
            else:
                known = ", ".join(["choices", "records", *(f"{kind} {table}" for kind in KINDS for table in TABLES)])
                raise ValueError(f"{page.relative_to(root)}: no report is named {name!r}, only {known}")
            return f"{begin}\n{text}\n\n{end}" if text else f"{begin}{end}"

        pages[page] = BLOCK.sub(block, page.read_text(encoding="utf-8"))
    return pages, drawn


def _parts(table: str, device: Device, folder: str, drawn: dict[str, Picture]) -> list[str]:
    """The table of this device, below its pictures; nothing where nothing of it was measured."""
    written = TABLES[table](device)
    if not written:
        return []
    parts = []
    for make in PICTURES.get(table, ()):
        if picture := make(device):
            slug = re.sub(r"[^a-z0-9]+", "_", device.name.lower()).strip("_")
            file = f"report_{slug}_{make.__name__}.png"
            drawn[file] = picture
            parts.append(f"![{device.name}: {picture.title}]({folder}/{file})")
    return [*parts, written]


def main(root: Path = ROOT, results: Path = ROOT / "benchmarks/results") -> int:
    try:
        pages, drawn = filled(root, results)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    for stale in {file.name for file in results.glob("report_*")} - drawn.keys():
        (results / stale).unlink()
    for name, picture in drawn.items():
        (results / name).write_bytes(picture.png())
    for page, text in pages.items():
        page.write_text(text, encoding="utf-8")
    print(f"{len(pages)} pages, {len(drawn)} pictures")
    return 0


if __name__ == "__main__":
    # takes nothing: who asks for help must not have pages written
    argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    sys.exit(main())
