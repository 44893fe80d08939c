"""What has to stand next to the times of a run: the machine, versions, commit, and who else used the CPUs."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vitfast.measure import nvml
from vitfast.version import __version__

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "benchmarks/results"
PACKAGES = ("triton", "timm", "transformers", "vit-pytorch")


def describe(device: torch.device | str = "cpu", packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """A run's description, as plain values. A package that is not installed has version None.

    Args:
        packages: whose versions to add to those of torch, vitfast and `PACKAGES`.
    """
    device = torch.device(device)
    return {
        "command": command_of([*_program(), *sys.argv[1:]]),
        "date": now(),
        **commit(),
        **(_cuda(device) if device.type == "cuda" else {"device": cpu_name()}),
        "device_type": device.type,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_isa": os.environ.get("VITFAST_CPU_ISA") or None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "tf32": {"matmul": torch.get_float32_matmul_precision() != "highest", "cudnn": torch.backends.cudnn.allow_tf32},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "vitfast": __version__,
        **{package: version(package) for package in (*PACKAGES, *packages)},
    }


def cpu_name() -> str:
    """The CPU's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _program() -> list[str]:
    """How python was told what to run: the module after -m, as which alone a file of a package runs, or a file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return sys.argv[:1] if spec is None else ["-m", spec.name.removesuffix(".__main__")]


def command_of(arguments: Sequence[str]) -> str:
    """The command line for a record: paths from the repository's root on, and of others their last part only."""

    def short(text: str) -> str:
        path = Path(text)
        if not path.is_absolute():
            return text
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

    parts = (argument.rpartition("=") for argument in arguments)
    return shlex.join(["python", *(before + sign + short(value) for before, sign, value in parts)])


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit(root: Path = ROOT) -> dict[str, Any]:
    """Commit of the source tree and whether it has local changes, or None for both with the reason.

    From git where `root` is a repository of its own; else from the environment's VITFAST_COMMIT, else from a file
    `COMMIT` in `root`: either holds what `git describe --always --dirty` prints. Results of benchmarks do not count:
    a run puts away the committed ones before it writes its own.
    """

    def git(*command: str) -> str:
        found = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True)
        return found.stdout.strip()

    try:
        # an installed package, or a copy, may lie inside somebody else's repository
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root.resolve():
            return {
                "commit": git("rev-parse", "--short", "HEAD"),
                "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", ".", f":(exclude){RESULTS}")),
            }
    except (OSError, subprocess.CalledProcessError):
        pass
    file = root / "COMMIT"
    told = os.environ.get("VITFAST_COMMIT") or (file.read_text() if file.is_file() else "")
    if told.strip():
        name = told.strip().removesuffix("-dirty")
        return {"commit": name, "dirty": told.strip() != name}
    why = "no git repository, VITFAST_COMMIT is not set and there is no file COMMIT"
    return {"commit": None, "dirty": None, "why_no_commit": why}


def _cuda(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size / 2**20,
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") or os.environ.get("PYTORCH_ALLOC_CONF", ""),
        "cudnn": torch.backends.cudnn.version(),
        **nvml.source(device),
    }


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
