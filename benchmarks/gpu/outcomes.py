"""What became of tests, as the lines say that the pytest plugin `journal` writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

LOST = re.compile(r"CUDA error|CUDA_ERROR|AcceleratorError|Triton Error \[CUDA\]|cudaError")


def is_lost(text: str) -> bool:
    """Whether an error's text says that nothing later in this process can be right."""
    return bool(LOST.search(text)) and "out of memory" not in text


class Outcomes:
    """What a journal says so far, going on with what earlier ones said.

    Attributes:
        failed: by id, "message", "phase" and "traceback".
        skipped: by id, why.
        passed, running: ids; the latter began and did not end.
        collected: how many tests there are; 0 before that is known.
    """

    def __init__(self, found: dict[str, Any] | None = None) -> None:
        found = found or {}
        self.failed: dict[str, dict[str, str]] = dict(found.get("failed", {}))
        self.skipped: dict[str, str] = dict(found.get("skipped", {}))
        self.passed: set[str] = set(found.get("passed", ()))
        self.running: set[str] = set()
        self.collected: int = found.get("collected", 0)

    def read(self, path: Path) -> Outcomes:
        for text in path.read_text().splitlines() if path.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:  # cut short by a kill
                continue
            if "collected" in line:
                self.collected = len(line["collected"])
                continue
            name, became = line.pop("id"), line.pop("is")
            self.running.discard(name)
            if became == "began" and name not in self.done:
                self.running.add(name)
            elif became == "failed":
                # of several reasons the first: what came later may follow from it
                self.failed.setdefault(name, line)
                self.passed.discard(name)
            elif became == "skipped":
                self.skipped[name] = line["why"]
            elif name not in self.failed and name not in self.skipped:
                self.passed.add(name)
        return self

    def died(self, why: str, text: str) -> None:
        """The process is gone: what has begun has no other end."""
        for name in self.running:
            self.failed[name] = {"phase": "call", "message": why, "traceback": text}
        self.running = set()

    @property
    def done(self) -> set[str]:
        return self.passed | self.skipped.keys() | self.failed.keys()

    @property
    def left(self) -> int:
        """How many have not been run."""
        collections = sum(each["phase"] == "collection" for each in self.failed.values())
        return max(self.collected + collections - len(self.done), 0)

    def as_dict(self) -> dict[str, Any]:
        return {
            "collected": self.collected, "passed": sorted(self.passed), "failed": self.failed,
            "skipped": self.skipped, "running": sorted(self.running), "not_run": self.left,
        }  # fmt: skip
