"""Plans: what an op's implementation did for tensors of one layout, done again for others without asking anything.

How to launch a kernel costs the host some 40 us to find out: reasons, choices, tiles, strides, alignments. All of it
follows from the layouts of the tensors and from the other arguments. So the first call is watched: which tensors it
makes, which of torch's operators it calls, which kernels it starts on what. The plan is that list, and a call on
tensors of the same layout runs down the list.

Only what is sure to be the same every time is planned: fresh memory, views, copies, sums and products of torch, and
starts of Triton kernels. A call that does anything else, reads a number back, or uses a tensor that came from
elsewhere has no plan and runs as ever.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from vitfast.choose import dispatch

# memory that nobody has written to
FRESH = frozenset(("empty", "empty_strided", "empty_like", "new_empty"))
# operators of torch whose result follows from their arguments; below autograd composite ones arrive as they are
REPEATABLE = frozenset(
    ("zeros", "zeros_like", "new_zeros", "zero_", "fill_", "copy_", "clone", "contiguous", "to", "_to_copy", "view",
     "_unsafe_view", "reshape", "alias", "detach", "t", "numpy_T", "transpose", "permute", "select", "slice",
     "unsqueeze", "squeeze", "unbind", "chunk", "split", "unflatten", "flatten", "expand", "as_strided", "mm", "addmm",
     "matmul", "linear", "add_", "sum")
)  # fmt: skip


class Unplanned(Exception):
    """What a call did that a plan cannot do again."""


class Step(NamedTuple):
    """One thing to do.

    Attributes:
        run: an operator of torch, or a kernel's start.
        constants: its arguments, with None where tensors go.
        places: (position among the arguments, number of the tensor).
        named: its arguments by name, none of them a tensor; None for a kernel's start, which takes a list of tensors.
        first, results: numbers of the tensors that come out; none where it changes what is there.
    """

    run: Callable
    constants: tuple
    places: tuple[tuple[int, int], ...]
    named: dict[str, Any] | None
    first: int = -1
    results: int = 0

    def makes(self) -> range:
        return range(self.first, self.first + self.results)


class Layout(NamedTuple):
    """Of a tensor, which may be gone.

    Attributes:
        begin, storage: addresses of its first number and of its memory.
        root: the number of the tensor that it is a view of, where both begin at the same number; its own elsewhere.
        memory: the number of the tensor that its memory was made for.
    """

    begin: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    storage: int
    root: int
    memory: int


class _Thread(threading.local):
    recorder: Recorder | None = None


_thread = _Thread()


class Recorder(TorchDispatchMode):
    """Watches one call on `tensors`, which are numbered, and those that it makes after them.

    It keeps none of them alive: a call that is watched needs no more memory than another.

    Attributes:
        why: what keeps the call from being planned, "" where nothing does.
        layouts: by number of the tensor.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        # by id of a tensor as long as it is there
        self.numbers: dict[int, int] = {}
        self.alive: list[weakref.ref] = []
        self.layouts: list[Layout] = []
        self.steps: list[Step] = []
        self.drops: list[Callable[[], None]] = []
        self.why = ""
        for t in tensors:
            self.add(t, ())

    def add(self, t: Tensor, sources: Sequence[int]) -> None:
        """Number a tensor that was made of those with the numbers `sources`."""
        begin, storage, number = t.data_ptr(), t.untyped_storage().data_ptr(), len(self.layouts)
        own = [n for n in sources if self.layouts[n].storage == storage and t.numel()]
        same = [n for n in own if self.layouts[n][:2] == (begin, t.dtype)]
        root, memory = self.layouts[same[0]].root if same else number, self.layouts[own[0]].memory if own else number
        self.layouts.append(Layout(begin, t.dtype, t.shape, t.stride(), storage, root, memory))
        self.follow(t, number)

    def follow(self, t: Tensor, number: int) -> None:
        key, numbers = id(t), self.numbers
        numbers[key] = number
        self.alive.append(weakref.ref(t, lambda _: numbers.pop(key, None)))

    def number(self, t: Tensor) -> int:
        """
        Raises:
            Unplanned: it is none of the call's.
        """
        if id(t) not in self.numbers:
            raise Unplanned("it used a tensor that it did not make")
        return self.numbers[id(t)]

    def __enter__(self) -> Recorder:
        super().__enter__()
        self.before, _thread.recorder = _thread.recorder, self
        return self

    def __exit__(self, *problem: Any) -> None:
        _thread.recorder = self.before
        super().__exit__(*problem)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        made = func(*args, **named)
        try:
            self._note(func, args, named, made)
        except Unplanned as problem:
            self.why = self.why or str(problem)
        return made

    def _note(self, func, args, named, made):
        places = tuple((i, self.number(each)) for i, each in enumerate(args) if isinstance(each, Tensor))
        results = made if isinstance(made, (list, tuple)) else [made]
        nested = [each for each in args if isinstance(each, (list, tuple))]
        hidden = any(isinstance(each, Tensor) for each in (*named.values(), *itertools.chain(*nested)))
        if not places and not hidden and not any(isinstance(each, Tensor) for each in results):
            # a question about dtypes
            return
        name = func.overloadpacket.__name__
        if name in FRESH:
            self.make(made)
            return
        if name not in REPEATABLE or hidden:
            raise Unplanned(f"{func} need not do the same again")
        sources = [n for _, n in places]
        step = Step(func, tuple(None if isinstance(each, Tensor) else each for each in args), places, named)
        in_place = name.endswith("_")
        if in_place:
            self.steps.append(step)
        if results[0] is made and (same := [n for n in sources if self._is(n, made)]):
            # the same tensor, or another Python object for it
            self.follow(made, same[0])
            return
        if in_place:
            raise Unplanned(f"{func} returned something else than what it changed")
        self.steps.append(step._replace(first=len(self.layouts), results=len(results)))
        for each in results:
            self.add(each, sources)

    def make(self, t: Tensor) -> None:
        # the fastest of torch's ways to say so
        how = {"dtype": t.dtype, "device": t.device}
        step = Step(torch.empty_strided, (tuple(t.shape), t.stride()), (), how, len(self.layouts), 1)
        self.add(t, ())
        self.steps.append(step)

    def _is(self, number: int, t: Tensor) -> bool:
        layout = t.data_ptr(), t.dtype, t.shape, t.stride()
        return self.numbers.get(id(t)) == number or (t.numel() > 0 and self.layouts[number][:4] == layout)

    def supply(self, t: Tensor, again: Callable[[], Tensor], drop: Callable[[], None]) -> None:
        """`t` came from elsewhere, as in `supplied`."""
        self.drops.append(drop)
        self.steps.append(Step(again, (), (), {}, len(self.layouts), 1))
        self.add(t, ())

    def unwritten(self) -> bool:
        """Whether some memory was made that neither a kernel nor an operator got to write to: by whom was it then?"""
        written = set()
        for step in self.steps:
            if step.named is None:
                written.update(self.layouts[n].memory for _, n in step.places)
            elif step.places and not step.results:
                written.add(self.layouts[step.places[0][1]].memory)
        made = [step.first for step in self.steps if step.run is torch.empty_strided]
        return any(self.layouts[n].shape.numel() and n not in written for n in made)

    def started(self, run: Callable, tensors: Sequence[Tensor]) -> None:
        """A kernel was started: `run` of tensors of the same layouts will do it again."""
        try:
            numbers = [self.number(t) for t in tensors]
        except Unplanned as problem:
            self.why = self.why or str(problem)
            return
        self.steps.append(Step(run, (), tuple(enumerate(self.layouts[n].root for n in numbers)), None))


def recorder() -> Recorder | None:
    """Who watches this thread's call."""
    return _thread.recorder


def supplied(get: Callable[[], Tensor], drop: Callable[[], None]) -> Tensor:
    """What `get` returns, a tensor that is kept between calls: a plan asks anew each time.

    A plan that fails calls `drop`, since nobody knows what is in the tensor then.
    """
    with unwatched():
        t = get()
    if _thread.recorder is not None:
        _thread.recorder.supply(t, get, drop)
    return t


def unwatched() -> contextlib.AbstractContextManager[Any]:
    """A context in which operators of torch are none of the call's."""
    return contextlib.nullcontext() if _thread.recorder is None else _disable_current_modes()


class Plan:
    """What a `Recorder` saw, for other tensors of the same layouts.

    Raises:
        Unplanned: the call is none that a plan can do again.
    """

    def __init__(self, seen: Recorder, given: int, result: Any):
        if seen.why:
            raise Unplanned(seen.why)
        self.single = isinstance(result, Tensor)
        results = [result] if self.single else result
        self.results = [None if t is None else seen.number(t) for t in results]
        self.more = len(seen.layouts) - given
        if seen.unwritten():
            raise Unplanned("nobody was seen to write to memory that it made")
        self.steps, self.drops = self._needed_steps(seen), seen.drops
        last = {}
        for i, step in enumerate(self.steps):
            for n in (*(n for _, n in step.places), *step.makes()):
                last[n] = i
        kept = {*range(given), *self.results}
        # memory is free again where a call of the implementation would have freed it at the latest
        self.dead = [tuple(n for n, at in last.items() if at == i and n not in kept) for i in range(len(self.steps))]

    def _needed_steps(self, seen: Recorder) -> list[Step]:
        """The steps without what no other reads, as views that are for kernels, which were told where memory begins.

        Memory whose only view is the result is made in the layout of that.
        """
        layouts, roots = seen.layouts, [each.root for each in seen.layouts]
        is_view = lambda step: step.results > 0 and all(roots[n] != n for n in step.makes())  # noqa: E731
        used = {n for n in self.results if n is not None}
        for step in seen.steps:
            if step.named is not None and not is_view(step):
                used.update(n for _, n in step.places)
        instead = {}
        for step in seen.steps:
            if step.run is torch.empty_strided and step.first not in used:
                views = [n for n in used if roots[n] == step.first]
                if len(views) == 1 and layouts[views[0]].shape.numel() == layouts[step.first].shape.numel():
                    instead[step.first] = views[0]
        replaced, steps = set(instead.values()), []
        live = {n for n in self.results if n is not None}
        for step in reversed(seen.steps):
            if is_view(step) and replaced.issuperset(step.makes()):
                continue
            if step.first in instead:
                n = instead[step.first]
                step = step._replace(constants=(tuple(layouts[n].shape), layouts[n].stride), first=n)
            if step.results and live.isdisjoint(step.makes()):
                continue
            step = step._replace(places=tuple((i, instead.get(n, n)) for i, n in step.places))
            live.update(n for _, n in step.places)
            steps.append(step)
        return steps[::-1]

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        at = [*tensors, *[None] * self.more]
        for (run, constants, places, named, first, results), dead in zip(self.steps, self.dead, strict=True):
            if named is None:
                run([at[n] for _, n in places])
            elif not places and results == 1:
                at[first] = run(*constants, **named)
            else:
                if places:
                    constants = list(constants)
                    for i, n in places:
                        constants[i] = at[n]
                made = run(*constants, **named)
                if results:
                    at[first : first + results] = made if isinstance(made, (list, tuple)) else [made]
                # it may be dead by the time that the next one is made
                made = None
            for n in dead:
                at[n] = None
        if self.single:
            return at[self.results[0]]
        return tuple(None if n is None else at[n] for n in self.results)


# of one implementation; whoever has more layouts makes each anew
MOST = 1024
_made: weakref.WeakSet[Plans] = weakref.WeakSet()


class Plans:
    """An implementation of an op, `run`, that is called by plan where there is one.

    A plan holds for the layouts of the tensors, the other arguments, and what was chosen for this process
    (`dispatch.decided`); where one call is tried or watched (`dispatch.observed`) there is none.
    """

    def __init__(self, run: Callable):
        self.run = run
        self.plans: dict[tuple, Plan | None] = {}
        _made.add(self)

    def __call__(self, *args: Any) -> Any:
        if dispatch.observed():
            return self.run(*args)
        tensors, key, wide = [], [dispatch.decided()], False
        for each in args:
            if isinstance(each, Tensor):
                tensors.append(each)
                dtype = each.dtype
                # weights may be wider than the first of them
                wide = wide or dtype is torch.float32
                key += (each.shape, each.stride(), dtype, each.data_ptr() & 15)
            else:
                key.append(tuple(each) if type(each) is list else each)
        where = tensors[0]
        kind = where.device.type
        key += (where.get_device(), torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind))
        if wide:
            key.append(torch.backends.cuda.matmul.fp32_precision)
        at = tuple(key)
        plan = self.plans.get(at, self)
        if plan is self:
            return self._first(at, args)
        if plan is None:
            return self.run(*args)
        try:
            return plan(tensors)
        # memory is full, or a kernel does not start any more: the implementation knows what to do about it
        except Exception:
            self.plans.pop(at, None)
            for drop in plan.drops:
                drop()
        # outside, where the problem no longer holds what the plan has made
        return self.run(*args)

    def _first(self, at: tuple, args: tuple) -> Any:
        if torch._C._len_torch_dispatch_stack():
            # somebody else watches
            return self.run(*args)
        # one tensor given twice is two the next time
        own = [torch.ops.aten.alias(each) if isinstance(each, Tensor) else each for each in args]
        given = [each for each in own if isinstance(each, Tensor)]
        with Recorder(given) as seen:
            result = self.run(*own)
        try:
            plan = Plan(seen, len(given), result)
        except Unplanned:
            plan = None
        # what the plan is kept under
        if dispatch.decided() == at[0]:
            if len(self.plans) >= MOST:
                self.plans.clear()
            self.plans[at] = plan
        return result


def forget() -> None:
    """Forget all plans: tests replace what implementations ask."""
    for each in _made:
        each.plans.clear()
