"""The table of what ran on which GPU, from the records of `make gpu`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from report_tables import table

NOTHING = "No kernel of this release has run on a GPU."


def records(folder: Path) -> str:
    """A line for each record of a GPU in `folder`, oldest first; one sentence where there is none."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        # a sweep calls its facts otherwise than the plans
        facts = data.get("run", data.get("machine", {})) if isinstance(data, dict) else {}
        if facts.get("device_type") == "cuda" and (what := _what(data)):
            dirty = " with local changes" if facts["dirty"] else ""
            stands = [facts["device"], facts["date"][:10], f"{facts['commit']}{dirty}", facts["torch"], facts["driver"]]
            lines.append([facts["date"], [*map(str, stands), what, f"`{path.name}`"]])
    if not lines:
        return NOTHING
    head = ("card", "date", "commit", "torch", "driver", "what", "record")
    return "\n".join(table(head, [cells for _, cells in sorted(lines)]))


def _what(data: Mapping[str, Any]) -> str:
    tests = [stage["tests"] for stage in data.get("stages", {}).values() if "tests" in stage]
    parts = []
    if tests:
        passed, failed = (sum(len(each[became]) for each in tests) for became in ("passed", "failed"))
        left = sum(each["not_run"] for each in tests)
        parts.append(f"tests: {passed:,} passed, {failed:,} failed" + (f", {left:,} not run" if left else ""))
    rows = data.get("rows", ())
    if isinstance(rows, Mapping):
        variants = sum(len(row["variants"]) for row in rows.values())
        parts.append(f"{len(rows):,} calls of ops, {variants:,} ways to run them in all")
    elif rows:
        kinds = {kind: sum(row["kind"] == kind for row in rows) for kind in ("model", "op")}
        parts.append(" and ".join(f"{count} rows of {kind}s" for kind, count in kinds.items() if count))
    return "; ".join(parts)
