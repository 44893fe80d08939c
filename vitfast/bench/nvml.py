"""Clocks, power, temperature and throttle reasons of a CUDA device, read only: from pynvml, else from nvidia-smi."""

from __future__ import annotations

import functools
import shutil
import subprocess
from typing import Any

import torch

# bits of nvmlClocksEventReasons
REASONS = {
    0x001: "idle",
    0x002: "application clocks",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clocks",
}
# name in a row: nvidia-smi's
QUERY = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "sm_max_mhz": "clocks.max.sm",
    "power_w": "power.draw",
    "power_limit_w": "enforced.power.limit",
    "temperature_c": "temperature.gpu",
}


def decode(bits: int) -> list[str]:
    """Throttle reasons in words."""
    words = [word for bit, word in REASONS.items() if bits & bit]
    unknown = bits & ~sum(REASONS)
    return words + ([f"unknown {unknown:#x}"] if unknown else [])


def state(device: torch.device) -> dict[str, Any] | None:
    """What `device` does now: `QUERY`'s values, each None where the driver does not tell, and "throttle" in words.

    None where neither pynvml nor nvidia-smi can be asked: `source` says why.
    """
    try:
        how, handle = _opened(_uuid(device))
        if how == "pynvml":
            return _from_pynvml(handle)
        return _from_smi(handle) if how == "nvidia-smi" else None
    # a driver that refuses one question must not cost the run
    except Exception:
        return None


def source(device: torch.device) -> dict[str, Any]:
    """Which of the two answers and the driver's version, or why none does."""
    try:
        how, handle = _opened(_uuid(device))
        if how == "pynvml":
            import pynvml

            driver = pynvml.nvmlSystemGetDriverVersion()
            return {"nvml": how, "driver": driver.decode() if isinstance(driver, bytes) else driver}
        if how == "nvidia-smi":
            return {"nvml": how, "driver": _smi(handle, ["driver_version"])[0]}
        return {"nvml": f"absent: {handle}", "driver": None}
    except Exception as problem:
        return {"nvml": f"absent: {problem}", "driver": None}


def _uuid(device: torch.device) -> str:
    # not the index, which CUDA_VISIBLE_DEVICES renumbers
    return "GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")


@functools.cache
def _opened(uuid: str) -> tuple[str, Any]:
    """("pynvml", handle), ("nvidia-smi", uuid) or ("", why neither)."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return "pynvml", handle
    except Exception as problem:
        why = f"pynvml: {problem}"
    if shutil.which("nvidia-smi") is None:
        return "", f"{why}; nvidia-smi: not found"
    try:
        _smi(uuid, ["clocks.sm"])
        return "nvidia-smi", uuid
    except (OSError, subprocess.SubprocessError) as problem:
        return "", f"{why}; nvidia-smi: {problem}"


def _from_pynvml(handle: Any) -> dict[str, Any]:
    import pynvml

    def ask(question: Any, *arguments: Any, scale: float = 1) -> float | None:
        try:
            return question(handle, *arguments) * scale
        except pynvml.NVMLError:
            return None

    # renamed in driver 535
    reasons = getattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    bits = ask(reasons or pynvml.nvmlDeviceGetCurrentClocksThrottleReasons)
    return {
        "sm_mhz": ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
        "memory_mhz": ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM),
        "sm_max_mhz": ask(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM),
        "power_w": ask(pynvml.nvmlDeviceGetPowerUsage, scale=1e-3),
        "power_limit_w": ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, scale=1e-3),
        "temperature_c": ask(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
        "throttle": None if bits is None else decode(int(bits)),
    }


def _from_smi(uuid: str) -> dict[str, Any]:
    found = {name: _number(text) for name, text in zip(QUERY, _smi(uuid, list(QUERY.values())), strict=True)}
    bits = None
    for query in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):
        try:
            bits = int(_smi(uuid, [query])[0], 16)
            break
        except (ValueError, subprocess.SubprocessError):
            continue
    return found | {"throttle": None if bits is None else decode(bits)}


def _smi(uuid: str, queries: list[str]) -> list[str]:
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(queries)}", "--format=csv,noheader,nounits"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return [text.strip() for text in found.stdout.strip().splitlines()[0].split(",")]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
