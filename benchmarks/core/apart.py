"""Run one variant of a case in a process of its own, with a limit on its time: for compilers that may take minutes.

The process makes the case again from what `recorded` wrote into its notes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vitfast.check.case import Case
from vitfast.check.compare import compare
from vitfast.measure.files import write_json
from vitfast.measure.machine import ROOT


def recorded(make: Callable[..., Case]) -> Callable[..., Case]:
    """Write into the case's notes the dotted name of the function that made it, and the arguments, fit for JSON."""

    @functools.wraps(make)
    def factory(**given: Any) -> Case:
        case = make(**given)
        origin = {"factory": f"{make.__module__}.{make.__qualname__}", "arguments": given}
        return dataclasses.replace(case, notes={**case.notes, **origin})

    return factory


def rebuild(notes: Mapping[str, Any]) -> Case:
    """The case whose notes these are."""
    module, _, name = notes["factory"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**notes["arguments"])


def run(case: Case, name: str, seconds: float, limit_s: float) -> dict[str, Any]:
    """What a row says of variant `name`, which is timed in that process in turns with the baseline alone.

    Args:
        seconds: aimed-at time for the interleaved rounds.
        limit_s: after this time the process ends, with all that it started.
    """
    told = {
        "variant": name, "seconds": seconds, "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        **{what: case.notes.get(what) for what in ("factory", "arguments")},
    }  # fmt: skip
    nothing = {"ours": case.variants[name].ours}
    if not told["factory"]:
        return nothing | {"not_timed": "nothing in the case's notes says how another process can make it"}
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "row.json", Path(folder) / "log"
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("w") as out:
            # a session of its own, so that the compilers it starts can be ended with it. A file and no pipe: they
            # would keep that open
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.core.apart", json.dumps(told), str(file)], stdin=subprocess.DEVNULL,
                stdout=out, stderr=out, start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )  # fmt: skip
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                return nothing | {"not_timed": f"time limit: not ready after {limit_s:.0f} s"}
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status or not file.exists():
            last = (log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
            return nothing | {"not_timed": f"its process ended with status {status}: {last}"[:300]}
        variants = json.loads(file.read_text())["variants"]
    found = variants[name] | {"apart": True}
    return found | ({"baseline_ms": variants[case.baseline].get("ms")} if "ms" in found else {})


def main(told: dict[str, Any], file: Path) -> None:
    threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()
    torch.set_num_threads(told["threads"])
    torch.set_float32_matmul_precision(told["precision"])
    case = rebuild(told)
    kept = dict.fromkeys([case.baseline, case.yardstick, told["variant"]])
    variants = {name: case.variants[name] for name in kept}
    write_json(file, compare(dataclasses.replace(case, variants=variants), seconds=told["seconds"]))


def _end_with_parent(parent: int) -> None:
    """A parent that is killed ends nobody."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
