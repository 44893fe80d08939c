"""Clocks, power, temperature and throttle reasons of a CUDA device, read only: from NVML, else from nvidia-smi."""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Callable
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
# name in a row: nvidia-smi's; NVML's function, its argument, and what a unit of its answer is
QUERIES = {
    "sm_mhz": ("clocks.sm", "nvmlDeviceGetClockInfo", 1, 1.0),
    "memory_mhz": ("clocks.mem", "nvmlDeviceGetClockInfo", 2, 1.0),
    "sm_max_mhz": ("clocks.max.sm", "nvmlDeviceGetMaxClockInfo", 1, 1.0),
    "power_w": ("power.draw", "nvmlDeviceGetPowerUsage", None, 1e-3),
    "power_limit_w": ("enforced.power.limit", "nvmlDeviceGetEnforcedPowerLimit", None, 1e-3),
    "temperature_c": ("temperature.gpu", "nvmlDeviceGetTemperature", 0, 1.0),
}
# the first is the newer name
SMI_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")

State = dict[str, Any]


def decode(bits: int) -> list[str]:
    """Throttle reasons in words."""
    words = [word for bit, word in REASONS.items() if bits & bit]
    unknown = bits & ~sum(REASONS)
    return words + ([f"unknown {unknown:#x}"] if unknown else [])


def state(device: torch.device) -> State | None:
    """What `device` does now: `QUERIES`, each None where the driver does not tell, and "throttle" in words.

    None where neither NVML nor nvidia-smi answers; `source` says why.
    """
    # a driver that refuses a question must not cost the run
    try:
        reader = _reader(_uuid(device))
        return reader.state() if isinstance(reader, (Library, Smi)) else None
    except Exception:
        return None


def source(device: torch.device) -> dict[str, Any]:
    """Which of the two answers and the driver's version, or why none does."""
    try:
        reader = _reader(_uuid(device))
        if isinstance(reader, (Library, Smi)):
            return {"nvml": reader.name, "driver": reader.driver()}
        return {"nvml": f"absent: {reader}", "driver": None}
    except Exception as problem:
        return {"nvml": f"absent: {problem}", "driver": None}


def _uuid(device: torch.device) -> str:
    # not the index, which CUDA_VISIBLE_DEVICES renumbers
    return "GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")


@functools.cache
def _reader(uuid: str) -> Library | Smi | str:
    """Who can be asked, or why nobody."""
    why = []
    for open_one in (lambda: Library(uuid, ctypes.CDLL("libnvidia-ml.so.1")), lambda: Smi(uuid)):
        try:
            reader = open_one()
            reader.state()
            return reader
        except Exception as problem:
            why.append(str(problem))
    return "; ".join(why)


class Library:
    """The driver's NVML.

    Raises:
        OSError: it knows no such device.
    """

    name = "NVML"

    def __init__(self, uuid: str, library: Any) -> None:
        self.library = library
        self.device = ctypes.c_void_p()
        for name, *arguments in (
            ("nvmlInit_v2",),
            ("nvmlDeviceGetHandleByUUID", ctypes.c_char_p(uuid.encode()), ctypes.byref(self.device)),
        ):
            status = getattr(library, name)(*arguments)
            if status:
                raise OSError(f"{name} returned {status}")

    def state(self) -> State:
        found: State = {}
        for name, (_, function, argument, unit) in QUERIES.items():
            answer = self._ask(function, ctypes.c_uint(), *([] if argument is None else [ctypes.c_uint(argument)]))
            found[name] = None if answer is None else answer * unit
        bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong())
        return found | {"throttle": None if bits is None else decode(bits)}

    def driver(self) -> str:
        text = ctypes.create_string_buffer(96)
        self.library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
        return text.value.decode()

    def _ask(self, function: str, answer: Any, *arguments: Any) -> int | None:
        ask: Callable[..., int] | None = getattr(self.library, function, None)
        if ask is None or ask(self.device, *arguments, ctypes.byref(answer)):
            return None
        return answer.value


class Smi:
    """nvidia-smi, which takes longer to answer.

    Raises:
        OSError, subprocess.SubprocessError: it is not there or knows no such device.
    """

    name = "nvidia-smi"

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        try:
            self.reasons = SMI_REASONS[0]
            self._ask(self.reasons)
        except subprocess.CalledProcessError:
            self.reasons = SMI_REASONS[1]

    def state(self) -> State:
        *numbers, bits = self._ask(*(query[0] for query in QUERIES.values()), self.reasons)
        found: State = {name: _number(text, float) for name, text in zip(QUERIES, numbers, strict=True)}
        bits = _number(bits, lambda text: int(text, 16))
        return found | {"throttle": None if bits is None else decode(bits)}

    def driver(self) -> str:
        return self._ask("driver_version")[0]

    def _ask(self, *queries: str) -> list[str]:
        options = f"--id={self.uuid}", f"--query-gpu={','.join(queries)}", "--format=csv,noheader,nounits"
        found = subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, check=True, timeout=20)
        return [text.strip() for text in found.stdout.strip().splitlines()[0].split(",")]


def _number(text: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(text)
    except ValueError:
        return None
