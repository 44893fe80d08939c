"""The compiled half of the package, `vitfast._C`: is it there, and if not, why.

setup.py leaves `_build.json` beside it, which says what was built and what kept the rest from it.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

BUILD_REPORT = Path(__file__).parents[1] / "_build.json"
# the oldest driver for each major version of the CUDA runtime (CUDA's release notes, "CUDA Toolkit and Minimum Required
# Driver Version for CUDA Minor Version Compatibility")
OLDEST_DRIVER = {12: "525", 13: "580"}


class DoesNotFit(ValueError):
    """A tensor whose memory the compiled half would read past: nothing that stock operators could do instead."""


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The extension and '', or None and why there is none."""
    try:
        return importlib.import_module("vitfast._C"), ""
    except ModuleNotFoundError:
        return None, build_report()["why_no_extension"] or "its file is gone; install vitfast again"
    except ImportError as error:
        return None, f"it is there and does not load: {error}"


def build_report() -> dict[str, Any]:
    """What setup.py noted when this copy was built."""
    if not BUILD_REPORT.exists():
        why = "vitfast runs from its sources and was not installed (pip install . builds it)"
        return {"extension": False, "cuda": False, "why_no_extension": why, "why_no_cuda": "no extension"}
    return json.loads(BUILD_REPORT.read_text())


def require() -> ModuleType:
    """The extension.

    Raises:
        NotImplementedError: it is not part of this installation; says why, and what to do.
    """
    module, why = load()
    if module is None:
        raise NotImplementedError(f"vitfast's compiled extension is not available: {why}")
    return module


def cuda_status() -> dict[str, Any]:
    """Whether the extension's CUDA part can be used here, and if not, why.

    Asks the CUDA runtime, so it takes a moment where there is a device. Returns keys `usable`, `why`, `devices`.
    """
    module, why = load()
    if module is None:
        return {"usable": False, "why": f"no extension: {why}", "devices": []}
    if not hasattr(module, "probe_cuda"):
        return {"usable": False, "why": f"no CUDA part: {build_report()['why_no_cuda']}", "devices": []}
    probe = module.probe_cuda()
    why = why_no_device(**{name: probe[name] for name in ("driver_version", "runtime_version", "error", "error_text")})
    return {"usable": not why, "why": why, "devices": probe["devices"]}


NO_DEVICE, INSUFFICIENT_DRIVER = 100, 35  # cudaErrorNoDevice, cudaErrorInsufficientDriver


def why_no_device(driver_version: int, runtime_version: int, error: int, error_text: str) -> str:
    """In plain words, '' where there is a device. The runtime gives error 35 both for no driver and for an old one."""
    if driver_version == 0:
        return "no NVIDIA driver is installed, or it is not visible in here (containers need --gpus all)"
    runtime, driver = dotted(runtime_version), dotted(driver_version)
    if error == INSUFFICIENT_DRIVER:
        oldest = OLDEST_DRIVER.get(runtime_version // 1000)
        update = f"driver {oldest} or newer is needed" if oldest else "a newer driver is needed"
        return f"the NVIDIA driver is too old: it supports CUDA {driver}, vitfast was built with {runtime}; {update}"
    if error == NO_DEVICE:
        return f"the NVIDIA driver (CUDA {driver}) is there, but no device is visible (CUDA_VISIBLE_DEVICES?)"
    return f"CUDA error {error}: {error_text}" if error else ""


def dotted(version: int) -> str:
    """13000 -> '13.0'"""
    return f"{version // 1000}.{version % 1000 // 10}"
