"""CUDA graphs of a prepared model: captured where a kind of call first comes, replayed from then on.

A kind of call is its method, images' size, dtype and layout, and a number of images. Between the numbers that graphs
are captured for a batch is padded: what is in the other rows is no matter, for no part of the model reads two images at
once.

One lock a model is held from filling the images' memory until the result was copied out of the graph's, and the stream
of each call waits for the one before it. So all graphs share one pool of memory, and callers need no care with threads
and streams.
"""

from __future__ import annotations

import itertools
import operator
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vitfast.choose import dispatch
from vitfast.choose.exportable import stock_only
from vitfast.inference.cuda_graphs import CudaGraphs
from vitfast.inference.original import Places
from vitfast.measure.capture import NotCaptured, first_line
from vitfast.model.plain import FORWARDS, any_global_hook, why_changed

MOST_GRAPHS = 32
MOST_BYTES = 2 * 2**30
LARGEST_BATCH = 256
# of one kind of call: more would mean that limits are too low for the sizes that come, and a capture takes as long as
# several calls
MOST_CAPTURES = 2
# kinds of calls that are remembered when no graph is left of them
MOST_KINDS = 4096
# what a user calls, by the method that computes it
METHODS = {"_forward": "forward", "_features": "forward_features"}


def bucket(batch: int) -> int:
    """The smallest number of images, of those that graphs are captured for, that `batch` fits in.

    All up to 8, and four between each two powers of two from there: at most a fifth of the rows is padding.
    """
    step = max(1, (1 << (batch - 1).bit_length() - 1) >> 2) if batch > 1 else 1
    return -(-batch // step) * step


class Device(Protocol):
    """What graphs ask of a device; `CudaGraphs` says more."""

    def capturing(self) -> bool: ...
    def begin(self, static: Tensor) -> None: ...
    def end(self) -> None: ...
    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]: ...
    def pool_bytes(self) -> int: ...
    def renew(self) -> None: ...


def graphs_of(device: torch.device) -> Device | None:
    """What captures there, None where nothing does."""
    return CudaGraphs(device) if device.type == "cuda" else None


class NoGraph(RuntimeError):
    """A call that was to have a CUDA graph has none, with the reason."""


class Kind(NamedTuple):
    """What one graph is captured for."""

    method: str
    batch: int
    image: torch.Size  # [C, H, W]
    dtype: torch.dtype
    channels_last: bool
    # what else was decided when it was captured, and may be decided otherwise
    state: Hashable

    def __str__(self) -> str:
        layout = " channels_last" if self.channels_last else ""
        return f"{self.method} {[self.batch, *self.image]} {str(self.dtype)[6:]}{layout}"


@dataclass
class Graph:
    """One captured call.

    Attributes:
        static: images that it reads [batch, C, H, W]; other graphs may read the same memory.
        result: what each replay writes.
        kept: tensors that it reads and somebody else may drop.
    """

    static: Tensor
    result: Tensor
    replay: Callable[[], None]
    kept: Any
    replays: int = 0


class Report(NamedTuple):
    """What `PreparedViT.graph_report` returns; prints as lines.

    Attributes:
        graphs: how often each graph was replayed, by its kind of call; the least recently used first.
        refused: why there is no graph, by kind of call.
        eager: calls without a graph, by their reasons.
        bytes: what the graphs hold of the device's memory.
        limits: graphs, bytes, and images a call.
    """

    graphs: dict[str, int]
    refused: dict[str, str]
    eager: dict[str, int]
    bytes: int
    limits: tuple[int, int, int]

    def __str__(self) -> str:
        most, most_bytes, largest = self.limits
        lines = [
            f"CUDA graphs: {len(self.graphs)} of at most {most}, {self.bytes / 2**20:.1f} MiB of at most "
            f"{most_bytes / 2**20:.0f}, for up to {largest} images"
        ]
        lines += [f"CUDA graph of {kind}: {replays} replays" for kind, replays in self.graphs.items()]
        lines += [f"no CUDA graph of {kind}: {why}" for kind, why in self.refused.items()]
        lines += [f"without a CUDA graph, {calls} calls: {why}" for why, calls in self.eager.items()]
        return "\n".join(lines)


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    # hooks of the model itself run around its forward, and so around a replay
    return [(name, part) for name, part in model.named_modules() if part is not model]


def strange(model: nn.Module) -> str:
    """A part that may do other things than compute each image's result from that image; "" where there is none.

    A replay runs none of its Python, and a padded image may reach others through it.
    """
    for name, part in _parts(model):
        known = type(part).__module__.startswith("vitfast.") or type(part) in FORWARDS
        if not known or getattr(part, "dim", -1) != -1:
            return f"{name} is {type(part).__module__}.{type(part).__qualname__}"
        if why := why_changed(part):
            return f"{name} {why}"
    patched = [name for name in vars(model) if callable(getattr(type(model), name, None))]
    return f"the model has a patched {patched[0]}" if patched else ""


class Graphs:
    """The graphs of one prepared model.

    Args:
        model: it; not kept.
        device: what captures.
        floats: dtype in which the model takes images of floats.
        views: return the graph's own memory, which a later call overwrites.
        insist: capture a model with `strange` parts as well, for each number of images its own.

    Attributes:
        most_graphs, most_bytes, largest_batch: limits, which may be set; of graphs, of the memory that they hold, and
            of images in one call, above which the device has enough to do without.
    """

    def __init__(self, model: nn.Module, device: Device, floats: torch.dtype, views: bool, insist: bool):
        self.device, self.floats, self.views, self.insist = device, floats, views, insist
        self.most_graphs, self.most_bytes, self.largest_batch = MOST_GRAPHS, MOST_BYTES, LARGEST_BATCH
        # what is captured may call the model again
        self._lock = threading.RLock()
        self._graphs: OrderedDict[Kind, Graph] = OrderedDict()
        self._refused: dict[Kind, str] = {}
        self._captured: Counter[Kind] = Counter()
        self._eager: Counter[str] = Counter()
        self._look_at(model)

    def _look_at(self, model: nn.Module) -> None:
        # made in inference mode where `prepare` was called there
        places = Places(model, counts=False)
        self._hooks = [hooks for _, m in _parts(model) for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        # who insists has those captured that were patched before
        self._own = [own for _, m in _parts(model) for own in [vars(m)] if "forward" not in own]
        self._strange = strange(model)
        # last: who finds these the same takes no lock and reads the others
        self._places = places

    def run(self, model: nn.Module, call: Callable[..., Any], x: Tensor, **how: Any) -> Any:
        """`call(x, **how)`, from a graph where there can be one.

        Args:
            model: as `__init__` had it; graphs of parts that were replaced since are dropped.
            call: a method of it.
        """
        if why := self._why_eager(x, how):
            return self._without(why, call, x, **how)
        if not self._places.same():
            with self._lock:
                # another thread may have looked meanwhile, and captured
                if not self._places.same():
                    self.drop()
                    self._look_at(model)
        if self._strange and not self.insist:
            return self._without(self._strange, call, x)
        kind = self._kind(model, call, x)
        with self._lock:
            if graph := self._graphs.get(kind):
                return self._replay(kind, graph, x)
            why = self._refused.get(kind, "")
        if why:
            return self._without(why, call, x)
        # says what is wrong with the images, and compiles
        result = call(x)
        with self._lock:
            graph = self._graphs.get(kind) or self._capture(model, kind, call, x)
            return result if graph is None else self._replay(kind, graph, x)

    def _without(self, why: str, call: Callable[..., Any], x: Any, **how: Any) -> Any:
        with self._lock:
            self._eager[why] += 1
        return call(x, **how)

    def _why_eager(self, x: Any, how: dict[str, Any]) -> str:
        """Why this call cannot be one of a graph, whatever the model is; "" where it can."""
        if how:
            return "attn_mask or is_causal"
        if not isinstance(x, Tensor) or x.layout is not torch.strided or x.dim() != 4 or not x.numel():
            return "no images, or not as a tensor [B, C, H, W]"
        if not (x.is_floating_point() or x.dtype is torch.uint8):
            return "pixels that are neither floats nor uint8"
        if self.most_graphs < 1:
            return f"at most {self.most_graphs} graphs are allowed"
        if len(x) > self.largest_batch:
            return f"more than {self.largest_batch} images"
        if any(self._hooks) or any_global_hook():
            return "parts of the model have hooks"
        # as accelerate's hooks do
        if any(map(operator.contains, self._own, itertools.repeat("forward"))):
            return "a part of the model has a patched forward"
        if torch._C._len_torch_dispatch_stack() or dispatch.observed() or stock_only():
            return "somebody watches which operators run"
        if self.device.capturing():
            return "the stream is being captured by the caller"
        return ""

    def _kind(self, model: Any, call: Callable[..., Any], x: Tensor) -> Kind:
        last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        batch = len(x) if self._strange else bucket(len(x))
        dtype = x.dtype if x.dtype is torch.uint8 else self.floats
        return Kind(METHODS[call.__name__], batch, x.shape[1:], dtype, last, (
            dispatch.decided(), id(model.config), id(model.normalisation), torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(), model.exportable,
        ))  # fmt: skip

    def _replay(self, kind: Kind, graph: Graph, x: Tensor) -> Tensor:
        batch, static = len(x), graph.static
        self._graphs.move_to_end(kind)
        graph.replays += 1
        self.device.begin(static)
        try:
            if not _is_in(static, x):
                if _share(static, x):
                    # other rows of the same memory
                    x = x.clone()
                (static if batch == kind.batch else static[:batch]).copy_(x, non_blocking=True)
            graph.replay()
            result = graph.result if batch == kind.batch else graph.result[:batch]
            return result if self.views else result.clone()
        finally:
            self.device.end()

    def _capture(self, model: nn.Module, kind: Kind, call: Callable[[Tensor], Any], x: Tensor) -> Graph | None:
        """A new graph, or None, and then `_refused` says why."""
        if kind not in self._captured and len(self._captured) >= MOST_KINDS:
            # not remembered, for there is no end to them
            self._eager[f"{MOST_KINDS} other kinds of calls came before"] += 1
            return None
        self._captured[kind] += 1
        if self._captured[kind] > MOST_CAPTURES:
            self._refused[kind] = "it was captured before and dropped, for limits that are low for the sizes that come"
            return None
        before = self.device.pool_bytes()
        try:
            graph = self._one_more(model, kind, call, x)
            if graph is None:
                # what the dropped ones had is in pieces that it could not use
                self._release()
                graph = self._one_more(model, kind, call, x)
            why = f"alone it takes more than {self.most_bytes / 2**20:.0f} MiB"
        # memory may be full before the capture begins
        except Exception as problem:
            graph, why = None, str(problem) if isinstance(problem, NotCaptured) else first_line(problem)
        if graph is None:
            self._refused[kind] = why
            # whoever caught the problem held the call's memory until here
            if not self._graphs or self.device.pool_bytes() > before:
                self._captured.subtract(list(self._graphs))
                self._release()
        return graph

    def _one_more(self, model: nn.Module, kind: Kind, call: Callable[[Tensor], Any], x: Tensor) -> Graph | None:
        """A new graph in the place of the least recently used ones, None where it does not fit though it is alone."""
        graph = self._captured_now(model, kind, call, x)
        self._graphs[kind] = graph
        while len(self._graphs) > self.most_graphs or (len(self._graphs) > 1 and self.bytes() > self.most_bytes):
            self._graphs.popitem(last=False)
        if self.bytes() <= self.most_bytes:
            return graph
        self._graphs.clear()
        return None

    def _release(self) -> None:
        self._graphs.clear()
        self.device.renew()

    def _captured_now(self, model: Any, kind: Kind, call: Callable[[Tensor], Any], x: Tensor) -> Graph:
        # what is made here outlives the caller's contexts
        with torch.inference_mode(False), torch.no_grad():
            static = self._static(kind, x)
            self.device.begin(static)
            try:
                static.zero_()
                kept: list[Any] = []

                def once() -> Any:
                    # before the last call, which is the captured one, all of these were there
                    kept[:] = model._positions_of.values()
                    return call(static)

                replay, result = self.device.capture(once)
            finally:
                self.device.end()
        if self._kind(model, call, x) != kind:
            raise NotCaptured("who computes was decided otherwise meanwhile")
        if not isinstance(result, Tensor) or result.dim() < 1 or len(result) != kind.batch:
            raise NotCaptured("it does not return a tensor with a row for each image")
        # `id`s are of what is there
        return Graph(static, result, replay, (*kept, model.config, model.normalisation))

    def _static(self, kind: Kind, x: Tensor) -> Tensor:
        """Memory for images; calls take turns, so that graphs of the same images but for their number can share it.

        Not what the caller's images are in: it is written to before they are read.
        """
        for other, graph in self._graphs.items():
            alike = other[2:5] == kind[2:5] and len(graph.static) >= kind.batch
            if alike and not _share(graph.static, x):
                return graph.static[: kind.batch]
        layout = torch.channels_last if kind.channels_last else torch.contiguous_format
        shape = kind.batch, *kind.image
        return torch.empty(shape, dtype=kind.dtype, device=self._where(), memory_format=layout)

    def _where(self) -> torch.device:
        return self._places.tensors[0].device

    def static(self, model: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        """Where the graph of calls like this one, which was made before, reads its images.

        Raises:
            NoGraph: says why.
        """
        why = self._why_eager(x, {}) or (not self.insist and self._strange)
        with self._lock:
            kind = self._kind(model, call, x)
            if not why and kind in self._graphs:
                return self._graphs[kind].static[: len(x)]
            why = why or self._refused.get(kind, "dropped for others that came since, or one kind of too many")
        raise NoGraph(f"there is no CUDA graph of {kind}: {why}")

    def count(self) -> int:
        return len(self._graphs)

    def bytes(self) -> int:
        """What the graphs hold of the device's memory: their pool, and images."""
        with self._lock:
            storages = {s.data_ptr(): s.nbytes() for g in self._graphs.values() for s in [g.static.untyped_storage()]}
            return self.device.pool_bytes() + sum(storages.values())

    def drop(self) -> None:
        """Drop all graphs, give their memory back, and forget what could not be captured."""
        with self._lock:
            self._refused.clear()
            self._captured.clear()
            self._release()

    def report(self) -> Report:
        with self._lock:
            replays: Counter[str] = Counter()
            for kind, graph in self._graphs.items():
                # of two that differ in what was decided as well
                replays[str(kind)] += graph.replays
            return Report(
                dict(replays),
                {str(kind): why for kind, why in self._refused.items()},
                dict(self._eager), self.bytes(), (self.most_graphs, self.most_bytes, self.largest_batch),
            )  # fmt: skip


def _share(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _is_in(static: Tensor, x: Tensor) -> bool:
    """Whether x is the first rows of `static` itself."""
    return x.data_ptr() == static.data_ptr() and x.dtype is static.dtype and x.stride() == static.stride()
