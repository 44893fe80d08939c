"""`vitfast.inference.cuda_graphs` and `vitfast.measure.capture`: in which order they ask torch.cuda for what.

And what is around graphs: warm-up, the memory that docs tell.
"""

import contextlib
import threading
from pathlib import Path

import graph_memory
import pytest
import torch
from fake_graphs import Pair, on_cpu

from vitfast.check import warmup
from vitfast.inference.cuda_graphs import WARM_UPS, CudaGraphs
from vitfast.measure import capture
from vitfast.measure.capture import NotCaptured, captured

DOCS = Path(__file__).parent.parent / "docs/inference.md"


class Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def __repr__(self):
        return self.name

    def wait_stream(self, other):
        self.cuda.log.append(("wait", self.name, other.name))

    def wait_event(self, event):
        self.cuda.log.append(("wait", self.name, event.on))


class Event:
    def __init__(self, cuda):
        self.cuda, self.on = cuda, None

    def record(self, stream):
        self.on = stream.name


class Graph:
    def __init__(self, cuda):
        self.cuda, self.ended, self.result = cuda, False, None

    def pool(self):
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")

    def replay(self):
        self.cuda.log.append(("replay", str(self.cuda.current)))
        if self.result is not None:
            self.result.fill_(1)


class Cuda:
    """torch.cuda, as far as captures ask it; what a pool is lent to is counted."""

    def __init__(self, monkeypatch):
        self.log, self.pools, self.shares, self.recording = [], 0, {}, set()
        self.breaks_at_begin = self.breaks_at_end = False
        self.current = Stream(self, "main")
        self.made = 0
        fakes = {
            "current_device": lambda: 0, "current_stream": lambda device=None: self.current, "Stream": self.stream,
            "Event": lambda: Event(self), "CUDAGraph": lambda: Graph(self), "graph": self.graph, "stream": self.on,
            "graph_pool_handle": self.pool, "synchronize": lambda device: self.log.append("synchronize"),
            "set_stream": lambda stream: setattr(self, "current", stream), "empty_cache": lambda: None,
            "device": lambda device: contextlib.nullcontext(), "get_allocator_backend": lambda: "native",
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocations, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    def stream(self, device):
        self.made += 1
        return Stream(self, f"side{self.made}")

    def pool(self):
        self.pools += 1
        return (0, self.pools)

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def end_allocations(self, index, pool):
        if pool not in self.recording:
            raise RuntimeError("not recording")
        self.recording.discard(pool)

    def release(self, index, pool):
        self.shares[pool] -= 1
        # torch ends the process
        assert self.shares[pool] >= 0, "a share is given back twice"

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.recording.add(pool)
        self.shares[pool] = self.shares.get(pool, 0) + 1
        if self.breaks_at_begin:
            raise RuntimeError("CUDA error: cannot begin")
        before, self.current = self.current, stream
        self.log.append(("capture", stream.name, pool, capture_error_mode))
        yield
        if self.breaks_at_end:
            raise RuntimeError("CUDA error: cannot end")
        self.recording.discard(pool)
        graph.ended, self.current = True, before


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


class Static:
    def __init__(self):
        self.on = []

    def record_stream(self, stream):
        self.on.append(stream.name)


def test_stream_does_not_wait_for_the_one_before(cuda):
    device, static = CudaGraphs(torch.device("cuda", 0)), Static()
    assert cuda.log == [] and cuda.made == 0
    for name in ("a", "b", "b", "a"):
        cuda.current = Stream(cuda, name)
        device.begin(static)
        device.end()
    assert cuda.log == [("wait", "b", "a"), ("wait", "b", "b"), ("wait", "a", "b")] and static.on == list("abba")


def result_of(cuda):
    """A call whose result a replay writes."""
    out = torch.zeros(2)
    cuda.log.append(("call", str(cuda.current)))
    return out


def test_graphs_of_a_model_have_pools_or_streams_of_others(cuda, monkeypatch):
    monkeypatch.setattr(capture, "_computes", lambda *_: True)
    one, two = (CudaGraphs(torch.device("cuda", 0)) for _ in range(2))
    for device in (one, one, two):
        replay, result = device.capture(lambda: result_of(cuda))
        assert cuda.current.name == "main" and result.tolist() == [0, 0]
    one.renew()
    one.capture(lambda: result_of(cuda))
    found = [entry[1:] for entry in cuda.log if entry[0] == "capture"]
    local = "thread_local"
    # two for each model, and another one for another pool: what libraries keep for a stream is in its pool
    assert found == [("side2", (0, 1), local)] * 2 + [("side4", (0, 2), local), ("side5", (0, 3), local)]
    # warm on a side stream, which waits for the caller's, as that does for it; then nothing runs
    expected = [("wait", "side1", "main"), *[("call", "side1")] * WARM_UPS, ("wait", "main", "side1"), "synchronize"]
    assert cuda.log[: len(expected)] == expected


@pytest.mark.parametrize("breaks", ["warm-up", "begin", "body", "end"])
def test_failed_capture_gives_back_another_graphs_memory_or_not_its_own(cuda, breaks, monkeypatch):
    monkeypatch.setattr(capture, "_computes", lambda *_: True)
    device, calls = CudaGraphs(torch.device("cuda", 0)), []
    device.capture(lambda: result_of(cuda))
    assert cuda.shares == {(0, 1): 1}
    cuda.breaks_at_begin, cuda.breaks_at_end = breaks == "begin", breaks == "end"

    def call():
        calls.append(1)
        if len(calls) > {"warm-up": 0, "body": WARM_UPS}.get(breaks, 9):
            raise ValueError("the cause")
        return result_of(cuda)

    with pytest.raises(NotCaptured, match="the cause" if breaks in ("warm-up", "body") else f"cannot {breaks}"):
        device.capture(call)
    assert cuda.shares == {(0, 1): 1} and cuda.recording == set() and cuda.current.name == "main"
    cuda.breaks_at_begin = cuda.breaks_at_end = False
    device.capture(lambda: result_of(cuda))


def test_interruption_is_taken_for_a_reason(cuda):
    def call():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CudaGraphs(torch.device("cuda", 0)).capture(call)
    assert cuda.current.name == "main"


def test_other_allocator_is_not_refused(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    device = CudaGraphs(torch.device("cuda", 0))
    with pytest.raises(NotCaptured, match="allocator"):
        device.capture(lambda: result_of(cuda))
    assert device.pool_bytes() == 0 and cuda.log == []


def test_two_threads_capture_at_once(cuda, monkeypatch):
    monkeypatch.setattr(capture, "_computes", lambda *_: True)
    inside, most = [], []

    def call():
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.01)
        inside.pop()

    def work():
        captured(call, torch.device("cuda", 0), Stream(cuda, "x"), (0, 1), warm_ups=1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 6 and max(most) == 1


def test_warmup_captures_nothing_or_hides_why(monkeypatch):
    with on_cpu(monkeypatch):
        pair, said = Pair(), []
    pair.device.fails = RuntimeError("it waits")
    warmup.capture_graphs(pair.prepared, (2, 9), said.append)
    assert [line.split(": ", 1)[1] for line in said] == [
        "CUDA graph of 9 images: there is no CUDA graph of forward [10, 3, 32, 32] float32: RuntimeError: it waits",
        "CUDA graph of 2 images: captured",
    ]
    pair.check(pair.images(2))
    assert pair.device.count("capture") == 1
    with torch.no_grad():
        pair.model.norm.bias.add_(1)
    with pytest.raises(RuntimeError, match="was written to"):
        warmup.capture_graphs(pair.prepared, (2,), said.append)


def test_counted_memory_is_not_that_of_the_docs():
    assert f"<!-- graphs: as in tests/graph_memory.py -->\n\n{graph_memory.table()}\n" in DOCS.read_text()
