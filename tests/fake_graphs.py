"""A device that captures and replays on a CPU, in place of `vitfast.inference.cuda_graphs.CudaGraphs`.

A capture notes which operators run on which memory; a replay runs these, and no Python of the model. What a graph has
between its images and its result is NaN between two replays, as if another graph had been given that memory.
"""

import contextlib
import threading
import time
import weakref

import torch
from small_models import images_for, tiny
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

import vitfast
from vitfast.inference import arguments, prepare
from vitfast.inference.graphs import bucket
from vitfast.measure.capture import NotCaptured, first_line

WARM_UPS = 2
# for which the host waits for the device
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique_dim", "masked_select"}


def tensors(tree):
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def memory(t):
    return t.untyped_storage().data_ptr()


def poison(t):
    t.fill_(torch.nan if t.is_floating_point() else 77)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        # (operator, arguments, results that are memory of their own)
        self.launches = []
        self.own = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name.split("::")[1] in WAITS:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and memory(given) not in self.own:
                raise AssertionError(f"{func} writes to memory outside of the pool in a capture")
        found = func(*args, **kwargs)
        given = {memory(t) for t in tensors((args, kwargs))}
        made = [t for t in tensors(found) if memory(t) not in given]
        self.own |= {memory(t) for t in made}
        self.launches.append((func, args, kwargs, made))
        return found


class Address:
    """A tensor as a launch has it: where it is. Whoever made it has to keep it."""

    def __init__(self, t):
        self.storage = StorageWeakRef(t.untyped_storage())
        self.dtype, self.place = t.dtype, (t.storage_offset(), t.shape, t.stride())

    def tensor(self):
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "a graph reads memory that was given back"
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class Replay:
    def __init__(self, device, recorder, result):
        self.device, self.result = device, result
        addressed = lambda t: t if memory(t) in recorder.own else Address(t)  # noqa: E731
        launches = recorder.launches
        self.launches = [(f, *(tree_map_only(torch.Tensor, addressed, each) for each in given), made)
                         for f, *given, made in launches]  # fmt: skip
        self.between = [t for _, _, _, made in launches for t in made if memory(t) != memory(result)]

    def __call__(self):
        assert self.device.owner == threading.get_ident(), "a replay outside of begin and end"
        self.device.log.append("replay")
        self.device.poison_all()
        poison(self.result)
        for func, *given, made in self.launches:
            args, kwargs = (tree_map_only(Address, Address.tensor, each) for each in given)
            found = [t for t in tensors(func(*args, **kwargs)) if memory(t) not in {memory(u) for u in tensors(args)}]
            for kept, new in zip(made, found, strict=True):
                kept.copy_(new)
            # another thread's turn
            time.sleep(0)
        self.device.poison_all()

    def __del__(self):
        # the next graph's memory
        poison(self.result)


class FakeGraphs:
    """Attributes that tests set: `fails`, raised in the next capture; `captured_by_caller`."""

    def __init__(self):
        self.log, self.owner, self.fails, self.captured_by_caller = [], None, None, False
        self.replays = weakref.WeakSet()
        self.pool_size = 0

    def capturing(self):
        return self.captured_by_caller

    def begin(self, static):
        if self.owner is not None:
            raise AssertionError("two calls at once")
        self.owner = threading.get_ident()
        self.log.append("begin")

    def end(self):
        assert self.owner == threading.get_ident()
        self.owner = None
        self.log.append("end")

    def poison_all(self):
        for replay in list(self.replays):
            for t in replay.between:
                poison(t)

    def capture(self, call):
        assert self.owner is not None and not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        try:
            for _ in range(WARM_UPS):
                call()
            with Recorder() as recorder:
                result = call()
                if self.fails is not None:
                    raise self._failure()
        except Exception as problem:
            # as long as nobody renews the pool
            self.pool_size += 1 if isinstance(problem, torch.OutOfMemoryError) else 0
            self.log.append("failed")
            raise NotCaptured(first_line(problem)) from None
        replay = Replay(self, recorder, result)
        self.replays.add(replay)
        self.log.append("capture")
        self.poison_all()
        return replay, result

    def _failure(self):
        fails, self.fails = self.fails, None
        return fails

    def pool_bytes(self):
        live = list(self.replays)
        between = max((sum(t.nbytes for t in replay.between) for replay in live), default=0)
        self.pool_size = max(self.pool_size, between + sum(replay.result.nbytes for replay in live))
        return self.pool_size

    def renew(self):
        assert not self.replays, "a graph is left"
        self.pool_size = 0
        self.log.append("renew")

    def count(self, what):
        return self.log.count(what)


@contextlib.contextmanager
def on_cpu(monkeypatch):
    """Models on CPUs are prepared as on a GPU; gives the list of their devices."""
    made = []
    with monkeypatch.context() as patch:
        for module in (arguments, prepare):
            patch.setattr(module, "folds", lambda device: True)
        patch.setattr(arguments, "graphs_of", lambda device: made.append(FakeGraphs()) or made[-1])
        yield made


class Pair:
    """A prepared model with graphs, and the same one without, whose results at the graph's batch are the truth."""

    def __init__(self, model=None, **how):
        self.model = tiny() if model is None else model
        self.eager = vitfast.prepare(self.model, graphs=False, **{k: v for k, v in how.items() if k in ("mean", "std")})
        self.prepared = vitfast.prepare(self.model, **how)
        self.device = self.prepared.graphs.device
        self.held = []

    def expected(self, x, method="forward", padded=True):
        rows = x.new_zeros(bucket(len(x)) if padded else len(x), *x.shape[1:]).contiguous(memory_format=layout_of(x))
        rows[: len(x)] = x
        return getattr(self.eager, method)(rows)[: len(x)].clone()

    def check(self, x, method="forward", padded=True):
        result = getattr(self.prepared, method)(x)
        expected = self.expected(x, method, padded)
        assert torch.equal(result, expected)
        self.held.append((result, expected))
        # what earlier calls returned is the caller's
        assert all(torch.equal(*each) for each in self.held)

    def images(self, batch=2, size=None):
        return images_for(self.model, batch, size)


def layout_of(x):
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
