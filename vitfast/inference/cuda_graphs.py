"""What `vitfast/inference/graphs.py` asks of a CUDA device. Tests have a device that only pretends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitfast.measure.capture import NotCaptured, captured

# compilers and libraries settle in the first calls
WARM_UPS = 2


def capturing(device: torch.device) -> bool:
    """Whether what is called now goes into a CUDA graph, whose memory holds nothing before it is replayed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class CudaGraphs:
    """Captures and replays on one device, for one model.

    All graphs have their memory from one pool, where a later one is given what an earlier one used in between. That is
    right as long as no two of them run at once: whoever replays does so between `begin` and `end`, and holds a lock.
    """

    def __init__(self, device: torch.device):
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        # made when they are needed: `prepare` alone starts nothing on the device
        self.warm_stream: torch.cuda.Stream | None = None
        self.stream: torch.cuda.Stream | None = None
        self.pool: Any = None
        self.done: torch.cuda.Event | None = None

    def capturing(self) -> bool:
        """Whether the caller captures its stream, so that what is called belongs into that graph."""
        return capturing(self.device)

    def begin(self, static: Tensor) -> None:
        """The caller's stream waits for whatever ran between `begin` and `end` before, on whichever stream.

        Args:
            static: what this stream will write to, so that its memory is not given away before that is done.
        """
        stream = torch.cuda.current_stream(self.device)
        if self.done is None:
            self.done = torch.cuda.Event()
        else:
            stream.wait_event(self.done)
        static.record_stream(stream)

    def end(self) -> None:
        """What the caller's stream was given since `begin` is what the next `begin` waits for."""
        if self.done is not None:
            self.done.record(torch.cuda.current_stream(self.device))

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What replays `call`, and what it returned, in memory that each replay writes.

        Raises:
            NotCaptured: with the reason; nothing of it is left.
        """
        if torch.cuda.get_allocator_backend() != "native":
            raise NotCaptured("torch's allocator is not its native one, whose pools tell what they hold")
        if self.warm_stream is None:
            self.warm_stream = torch.cuda.Stream(self.device)
        if self.pool is None or self.stream is None:
            # cuBLAS's workspace is kept for each stream. On one that nothing else ran on, it comes from the pool, and
            # stays there for these graphs when torch.compile, which clears all workspaces, lets go of it
            self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        with torch.cuda.device(self.device):
            graph, results = captured(
                call, self.device, self.stream, self.pool, warm_ups=WARM_UPS, warm_stream=self.warm_stream,
                mode="thread_local",
            )  # fmt: skip
        return graph.replay, results

    def pool_bytes(self) -> int:
        """Bytes that the graphs' pool has from the device."""
        if self.pool is None:
            return 0
        segments = torch.cuda.memory.memory_snapshot(self.pool, include_traces=False)
        return sum(segment["total_size"] for segment in segments)

    def renew(self) -> None:
        """A new pool for the next capture, and memory that nobody uses back to the device; all graphs were dropped."""
        self.pool = None
        torch.cuda.empty_cache()
