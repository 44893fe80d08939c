"""Where the programs of a split sum count who has arrived: int32 zeros, which every product leaves as it found them.

Products of one stream follow each other and share a buffer. A CUDA graph may run beside its own stream and beside other
graphs, so each product that a capture records has counters that nobody else ever gets, zeroed before the capture; where
those have run out, new ones, whose zeroing is recorded with the product.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# for the products of all graphs of a device: of some hundred graphs
FOR_GRAPHS = 1 << 18

# by device and stream
_shared: dict[tuple[torch.device, int], Tensor] = {}
# by device, with how many of them are taken
_for_graphs: dict[torch.device, tuple[Tensor, int]] = {}
_lock = threading.Lock()


def counters(device: torch.device, tiles: int) -> Tensor:
    """At least `tiles` zeros, for one product on the device's current stream."""
    stream, capturing = _stream(device)
    with _lock:
        if capturing:
            buffer, taken = _for_graphs.get(device, (None, 0))
            if buffer is None or taken + tiles > buffer.numel():
                return torch.zeros(tiles, dtype=torch.int32, device=device)
            _for_graphs[device] = buffer, taken + tiles
            return buffer[taken : taken + tiles]
        found = _shared.get((device, stream))
        if found is None or found.numel() < tiles:
            found = _shared[device, stream] = torch.zeros(max(tiles, 256), dtype=torch.int32, device=device)
            if device.type == "cuda" and device not in _for_graphs:
                buffer = torch.zeros(FOR_GRAPHS, dtype=torch.int32, device=device)
                # whichever stream a graph runs on
                torch.cuda.current_stream(device).synchronize()
                _for_graphs[device] = buffer, 0
        return found


def forget(device: torch.device) -> None:
    """Those of the current stream: a product that did not end may have left anything in them."""
    with _lock:
        _shared.pop((device, _stream(device)[0]), None)


def _stream(device: torch.device) -> tuple[int, bool]:
    """The device's current stream, and whether a graph is captured from it."""
    if device.type != "cuda":
        return 0, False
    with torch.cuda.device(device):
        return torch.cuda.current_stream().cuda_stream, torch.cuda.is_current_stream_capturing()
