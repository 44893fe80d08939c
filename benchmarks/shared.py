"""What the benchmarks share: names of files, what a run was, and when a result is right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

from vitfast.bench.record import set_aside  # noqa: F401
from vitfast.measure.files import write_json  # noqa: F401

# what bench_cpu.py takes from here
from vitfast.measure.machine import OtherProcesses, describe, peak_growth_mib  # noqa: F401

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# relative error of a result above which it is not timed
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}


def slug(text: str) -> str:
    """`text` as a part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def heading(run: dict[str, Any], packages: tuple[str, ...] = ()) -> str:
    dirty = " with local changes" if run["dirty"] else ""
    versions = ", ".join(f"{package} {run[package] or 'absent'}" for package in ("torch", *packages))
    return (
        f"`{run['command']}`: {run['device']} ({run['cpu_capability']}), {run['threads']} threads,\n"
        f"{versions}, commit {run['commit']}{dirty}, {run['date']}."
    )


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`."""
    if result.shape != expected.shape:
        return float("inf")
    result, expected = result.double(), expected.double()
    return ((result - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


def wrong(error: float, dtype: str) -> str | None:
    """Why something with this error must not be timed, None where it may."""
    # written so that a NaN is wrong
    if error <= TOLERANCE[dtype]:
        return None
    return f"differs from timm's result by {error:.1e} of its size, allowed {TOLERANCE[dtype]:.0e}"


def in_own_process(file: str, *arguments: Any) -> Any:
    """What the script `file` prints as JSON."""
    command = [sys.executable, file, *map(str, arguments)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
