"""The table of what ran on which GPU, from the records of `make gpu`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report.tables import table

NOTHING = "No kernel of this release has run on a GPU."


def records(folder: Path) -> str:
    """A line for each record of a GPU in `folder`, oldest first; one sentence where there is none."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        # a sweep calls its facts otherwise than the plans
        run = data.get("run", data.get("machine", {}))
        if run.get("device_type") == "cuda" and (what := _what(data)):
            commit = f"{run['commit']}{' with local changes' if run['dirty'] else ''}"
            line = {"card": run["device"], "date": run["date"][:10], "commit": commit, "torch": run["torch"]}
            line |= {"driver": run["driver"], "what": what, "record": f"`{path.name}`"}
            lines.append((run["date"], path.name, line))
    return table(line for *_, line in sorted(lines, key=lambda each: each[:2])) if lines else NOTHING


def _what(data: Mapping[str, Any]) -> str:
    tests = [stage["tests"] for stage in data.get("stages", {}).values() if "tests" in stage]
    parts = []
    if tests:
        passed, failed = (sum(len(each[became]) for each in tests) for became in ("passed", "failed"))
        left = sum(each["not_run"] for each in tests)
        parts.append(f"tests: {passed:,} passed, {failed:,} failed" + f", {left:,} not run" * bool(left))
    rows = data.get("rows", ())
    if isinstance(rows, Mapping):
        variants = sum(len(row["variants"]) for row in rows.values())
        parts.append(f"{len(rows):,} calls of ops, {variants:,} ways to run them in all")
    elif rows:
        kinds = {kind: sum(row["kind"] == kind for row in rows) for kind in ("model", "patched model", "op")}
        parts.append(" and ".join(f"{count} rows of {kind}s" for kind, count in kinds.items() if count))
    return "; ".join(parts)
