"""A call captured in a CUDA graph, and torch brought back to order where that fails."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch

# torch captures one graph at a time in a process; a warm-up may call what captures itself
_one_at_a_time = threading.RLock()


class NotCaptured(RuntimeError):
    """A call that cannot be made a CUDA graph, with the reason."""


def first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0]}"[:300] if lines else type(problem).__name__


def captured(
    call: Callable[[], Any],
    device: torch.device,
    stream: torch.cuda.Stream,
    pool: Any,
    *,
    warm_ups: int,
    count: int = 1,
    warm_stream: torch.cuda.Stream | None = None,
    mode: str = "global",
    warming: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `count` calls, and what the last of them returned, whose memory every replay writes anew.

    Threads take turns. What captures otherwise meanwhile may fail: torch waits for the device before a capture.

    Args:
        device: with its index.
        stream: what to capture on; no stream that anything else runs on.
        pool: `torch.cuda.graph_pool_handle()`, or that of graphs that never run at the same time as this one.
        warm_ups: calls before the capture.
        warm_stream: what these run on; by default `stream`.
        mode: torch's `capture_error_mode`: whose forbidden calls end the capture, every thread's or this one's.
        warming: a context for them.

    Raises:
        NotCaptured: `call` does what a graph cannot hold, or none of its work is in the graph.
    """
    with _one_at_a_time:
        return _captured(call, device, stream, pool, warm_ups, count, warm_stream or stream, mode, warming)


def _captured(
    call: Callable[[], Any], device: torch.device, stream: torch.cuda.Stream, pool: Any, warm_ups: int, count: int,
    warm_stream: torch.cuda.Stream, mode: str, warming: Callable[[], contextlib.AbstractContextManager[Any]],
) -> tuple[torch.cuda.CUDAGraph, Any]:  # fmt: skip
    before, results, begun = torch.cuda.current_stream(device), None, False
    graph = torch.cuda.CUDAGraph()
    try:
        # compilers and libraries begin with what must not happen during the capture
        warm_stream.wait_stream(before)
        with torch.cuda.stream(warm_stream), warming():
            for _ in range(warm_ups):
                call()
        before.wait_stream(warm_stream)
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
            begun = True
            for _ in range(count):
                results = call()
        computes = _computes(graph, results, device)
    except BaseException as problem:
        results = None
        _undo(graph, device, before, pool, begun)
        if not isinstance(problem, Exception):
            raise
        while problem.__context__ is not None:
            problem = problem.__context__
        raise NotCaptured(first_line(problem)) from None
    if not computes:
        raise NotCaptured("replaying the graph computes nothing: its work went to another stream")
    return graph, results


def _undo(graph: torch.cuda.CUDAGraph, device: torch.device, stream: torch.cuda.Stream, pool: Any, begun: bool) -> None:
    """Undo what torch leaves behind where ending the capture failed as well.

    Then the capture's stream is still the current one, allocations still go to the graph's pool, which nobody will
    give back, and the generator believes that it is being captured.
    """
    torch.cuda.set_stream(stream)
    try:
        # a graph that was ended has its pool, and gives it back itself
        graph.pool()
    except RuntimeError:
        begins = begun
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
            begins = True
        # a capture that never began holds no share in the pool, and what it would give back is another graph's
        if begins:
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_releasePool(device.index, pool)
        with contextlib.suppress(Exception):
            generator = torch.cuda.default_generators[device.index]
            generator.graphsafe_set_state(generator.clone_state())
    torch.cuda.synchronize(device)


def _computes(graph: Any, results: Any, device: torch.device) -> bool:
    """Whether a replay writes the results of the last call."""
    tensors = results if isinstance(results, (tuple, list)) else (results,)
    seen = next((t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()), None)
    with torch.inference_mode():
        if seen is not None:
            seen.detach().fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize(device)
        return seen is None or not seen.isnan().all().item()
