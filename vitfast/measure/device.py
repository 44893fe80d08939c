"""What a benchmark asks of a device: its clock, CUDA graphs, cache and memory. Tests simulate one."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitfast.measure import nvml
from vitfast.measure.capture import NotCaptured, captured
from vitfast.measure.capture import first_line as first_line
from vitfast.measure.machine import peak_growth_mib
from vitfast.measure.timing import EventSampler, HostSampler, Repeated, Sampler, median

# issuing a call takes "as long as" the device needs for it from this share on: both vary by some percent
HOST_SHARE = 0.8
# what one replay should last, so that starting it doesn't count
REPLAY_MS = 1.0
WARM_UP_CALLS, WARM_UP_S = 3, 0.2
# how much work is issued before the device's state is read, so that it is read while the device works
LOAD_MS = 30.0
# of issuing calls back to back; short, because a host that is far ahead has to wait for room in the device's queue
BURST_S, MOST_IN_BURST = 5e-4, 32

Call = Callable[[], Any]


def device_named(name: str) -> torch.device:
    """The device that a command line names: auto (a GPU if there is one), cpu, cuda, cuda:1, ...

    Raises:
        ValueError: there is none of that name here, or it cannot be used; says why.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{name!r} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"must be auto, cpu or cuda, got {name!r}")
    return device


class Cpu:
    """Calls on a CPU return when their work is done, so that most of what a GPU needs is nothing here."""

    graphs = False
    most_sets = 4

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.clock = time.perf_counter

    def current(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def sampler(self) -> Sampler:
        return HostSampler(self.clock)

    def synchronize(self) -> None:
        pass

    def cache_bytes(self) -> int:
        """Size of the last-level cache; 32 MiB where the system does not tell."""
        sizes = [
            int(text[:-1]) * {"K": 2**10, "M": 2**20}.get(text[-1], 0)
            for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
            if (text := file.read_text().strip())[:-1].isdigit()
        ]
        return max(sizes, default=0) or 32 * 2**20

    def free_bytes(self) -> int:
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return 2**30

    def release(self) -> None:
        gc.collect()

    def warm_up(self, call: Call) -> None:
        pass

    def state(self) -> dict[str, Any] | None:
        return None

    def state_under(self, call: Call, ms: float) -> dict[str, Any] | None:
        return None

    def peak_mib(self, call: Call) -> dict[str, float]:
        """What the process grows by at its peak, of resident memory; {} where the system does not tell."""
        if not sys.platform.startswith("linux"):
            return {}
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            # what was freed before would serve this call and hide what it needs
            libc.malloc_trim(0)
        try:
            return {"peak_resident_mib": peak_growth_mib(call)}
        # where a process may not set its own peak back
        except OSError:
            return {}


class Cuda:
    """A CUDA device. Its calls are issued on the current stream; graphs are captured on a stream of their own."""

    graphs = True
    # more would only take longer to make: inputs that are this small are not what a row's time depends on
    most_sets = 512

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.clock = time.perf_counter
        self.stream: torch.cuda.Stream | None = None

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """This device, with cuDNN at its best setting, and TF32 for its convolutions only where products have it."""
        cudnn = torch.backends.cudnn
        before = cudnn.benchmark, cudnn.allow_tf32
        cudnn.benchmark, cudnn.allow_tf32 = True, torch.get_float32_matmul_precision() != "highest"
        try:
            with torch.cuda.device(self.device):
                yield
        finally:
            cudnn.benchmark, cudnn.allow_tf32 = before

    def warm_up(self, call: Call) -> None:
        """Work long enough that the clocks are those of work, not of the compilers' time before it."""
        began = self.clock()
        while self.clock() - began < WARM_UP_S:
            for _ in range(WARM_UP_CALLS):
                call()
            self.synchronize()

    def sampler(self) -> Sampler:
        return EventSampler(self.event, self.synchronize)

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def cache_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).L2_cache_size

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def release(self) -> None:
        """Give memory that nobody uses back to the device, so that no variant starts with another's leftovers."""
        gc.collect()
        torch.cuda.empty_cache()

    def state(self) -> dict[str, Any] | None:
        return nvml.state(self.device)

    def state_under(self, call: Call, ms: float) -> dict[str, Any] | None:
        """The device's state while it runs `call`, which takes it `ms`."""
        for _ in range(min(1000, max(1, int(LOAD_MS / max(ms, 1e-3))))):
            call()
        found = self.state()
        self.synchronize()
        return found

    def peak_mib(self, call: Call) -> dict[str, float]:
        """What one call needs at its peak beyond what was there before: allocated by tensors, reserved by torch."""
        call()
        self.synchronize()
        self.release()
        torch.cuda.reset_peak_memory_stats(self.device)
        allocated, reserved = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        call()
        self.synchronize()
        return {
            "peak_allocated_mib": (torch.cuda.max_memory_allocated(self.device) - allocated) / 2**20,
            "peak_reserved_mib": (torch.cuda.max_memory_reserved(self.device) - reserved) / 2**20,
        }

    def capture(self, call: Call, count: int) -> Call:
        """A callable that replays `count` calls from one CUDA graph.

        Raises:
            NotCaptured: `call` does what a graph cannot hold, or none of its work is in the graph.
        """
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)
        graph, results = captured(
            call, self.device, self.stream, torch.cuda.graph_pool_handle(), warm_ups=WARM_UP_CALLS, count=count,
            warming=_no_synchronisation,
        )  # fmt: skip

        def replay(graph: Any = graph, kept: Any = (call, results)) -> None:
            graph.replay()

        return replay


@contextlib.contextmanager
def _no_synchronisation() -> Iterator[None]:
    """Raise where torch waits for the device: in a capture that would be an error that is hard to recover from."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


Place = Cpu | Cuda


def of(device: torch.device | str) -> Cpu | Cuda:
    device = torch.device(device)
    return _cuda(device) if device.type == "cuda" else Cpu()


@functools.cache
def _cuda(device: torch.device) -> Cuda:
    # one for all rows: torch keeps a workspace for every stream that cuBLAS was called on
    return Cuda(device)


@dataclass(frozen=True)
class Issue:
    """How a call without a graph keeps the device busy; all in milliseconds a call.

    Attributes:
        issue_ms: what the host needs to issue it, when nothing holds the host up.
        device_ms: time between events around many.
        wall_ms: time from issuing the first of many until the device has finished.
    """

    issue_ms: float
    device_ms: float
    wall_ms: float

    @property
    def host_bound(self) -> bool:
        return self.issue_ms >= HOST_SHARE * self.device_ms


def issue(call: Call, place: Cuda, min_ms: float = 5.0) -> Issue:
    def burst(calls: int) -> float:
        place.synchronize()
        began = place.clock()
        for _ in range(calls):
            call()
        took = place.clock() - began
        place.synchronize()
        return took / calls

    call()
    calls = max(1, min(MOST_IN_BURST, int(BURST_S / max(burst(1), 1e-9))))
    issue_s = median(burst(calls) for _ in range(5))
    calls = 1
    while True:
        start, end = place.event(), place.event()
        place.synchronize()
        began = place.clock()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        place.synchronize()
        wall_s, device_ms = place.clock() - began, start.elapsed_time(end)
        if device_ms >= min_ms or calls >= 4096:
            return Issue(issue_s * 1e3, device_ms / calls, wall_s * 1e3 / calls)
        calls *= 4


@dataclass(frozen=True)
class Arranged:
    """A call as it will be timed, and what the row says about that."""

    call: Call
    facts: dict[str, Any]


def arrange(calls: Mapping[str, Call], graph: Mapping[str, bool], place: Cpu | Cuda, sets: int) -> dict[str, Arranged]:
    """Decide which calls of one row are replayed from CUDA graphs.

    As soon as one of them is bound by the host all of them are, where that is fair, so that no variant looks faster
    only for having been captured. A replay goes through all input sets.

    Args:
        graph: whether replaying a call from a graph is fair.
        sets: how many input sets each call rotates over.
    """
    if not place.graphs:
        return {
            name: Arranged(call, {"graph": False, "host_bound": False, "wall_ms": None}) for name, call in calls.items()
        }
    issues = {name: issue(call, place) for name, call in calls.items()}
    any_bound = any(found.host_bound for found in issues.values())
    arranged = {}
    for name, call in calls.items():
        found = issues[name]
        facts = {"graph": False, "host_bound": found.host_bound, "wall_ms": found.wall_ms, "issue_ms": found.issue_ms}
        if any_bound and not graph[name]:
            facts["why_no_graph"] = "brings its own"
        elif any_bound:
            count = sets * math.ceil(REPLAY_MS / max(found.device_ms * sets, 1e-3))
            try:
                call = Repeated(place.capture(call, count), count)
                facts |= {"graph": True, "host_bound": False}
            except NotCaptured as problem:
                facts["why_no_graph"] = str(problem)
        arranged[name] = Arranged(call, facts)
    return arranged


def input_sets(place: Cpu | Cuda, one_set_bytes: int, call_bytes: int) -> int:
    """How many sets of inputs to rotate over, so that none is still in the cache when its turn comes again.

    Args:
        one_set_bytes: what one set takes in memory.
        call_bytes: the least that one call reads and writes; 0 where that isn't known.
    """
    moved = call_bytes or max(one_set_bytes, 1)
    wanted = math.ceil(2 * place.cache_bytes() / moved)
    affordable = int(min(place.free_bytes() / 8, 4 * 2**30) // max(one_set_bytes, 1))
    return max(1, min(wanted, place.most_sets, affordable))
