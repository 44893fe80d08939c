"""Run one variant of a case in a process of its own (`apart_process`), with a limit on its time.

For compilers that may take minutes, or hang. The process makes the case again from what `Case.notes` says: `factory`,
the dotted name of a function, and `arguments`, a dict of plain values that it is called with.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from vitfast.bench.case import Case
from vitfast.measure.machine import ROOT


def run(case: Case, name: str, seconds: float, limit_s: float) -> dict[str, Any]:
    """What a row says of variant `name`: as `vitfast.bench.harness.run_case` found it in a process of its own.

    There it is timed in turns with the baseline alone.

    Args:
        seconds: aimed-at time for the interleaved rounds.
        limit_s: after this time the process ends, with all that it started.
    """
    if not {"factory", "arguments"} <= case.notes.keys():
        return {"not_timed": "nothing in the case's notes says how another process can make it"}
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "row.json", Path(folder) / "log"
        command = [
            sys.executable, "-m", "vitfast.bench.apart_process", "--factory", case.notes["factory"],
            "--arguments", json.dumps(case.notes["arguments"]), "--variant", name, "--seconds", str(seconds),
            "--threads", str(torch.get_num_threads()), "--precision", torch.get_float32_matmul_precision(),
            "--json", str(file),
        ]  # fmt: skip
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("w") as out:
            # a session of its own, so that the compilers it starts can be ended with it. A file and no pipe: they
            # would keep that open
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )  # fmt: skip
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                return {"not_timed": f"time limit: not ready after {limit_s:.0f} s"}
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status or not file.exists():
            last = (log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
            return {"not_timed": f"its process ended with status {status}: {last}"[:300]}
        row = json.loads(file.read_text())
    found = row["variants"][name] | {"apart": True}
    if "ms" in found:
        found["baseline_ms"] = row["variants"][row["baseline"]].get("ms")
    return found
