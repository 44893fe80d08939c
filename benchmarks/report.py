"""What the benchmarks share: what a run was, when a result is right, peak memory, and the file of raw numbers."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vitfast
from vitfast.info import cpu_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# relative error of a result above which it is not timed
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}


def describe(device: str = "cpu", packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """What has to stand next to the times of a run; a package that is not installed has version None."""

    def git(*command: str) -> str:
        found = subprocess.run(["git", *command], capture_output=True, text=True, cwd=Path(__file__).parent)
        return found.stdout.strip()

    return {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.date.today().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__, "vitfast": vitfast.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }  # fmt: skip


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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


class OtherProcesses:
    """Who else used the CPUs since this was made."""

    def __init__(self) -> None:
        self.began = self._now()

    def share(self) -> float | None:
        """Of all CPUs' time, what other processes and other machines on this host took; None where not Linux."""
        if self.began is None:
            return None
        wall, others = (now - began for now, began in zip(self._now(), self.began, strict=True))
        return max(0.0, others / wall / os.cpu_count())

    @staticmethod
    def _now() -> tuple[float, float] | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split(None, 9)[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy - time.process_time()


def write_json(path: Path, record: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=2))
    os.replace(temporary, path)


def in_own_process(file: str, *arguments: Any) -> Any:
    """What the script `file` prints as JSON."""
    command = [sys.executable, file, *map(str, arguments)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def peak_growth_mib(call: Callable[[], Any]) -> float:
    """MiB by which this process grows at its peak over two calls. Linux only."""
    # sets the peak back to what is resident now; getrusage's would be that of building the model
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mib("VmHWM")
    for _ in range(2):
        call()
    return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    """A field of Linux's /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024
