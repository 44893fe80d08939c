"""One row of `sweep.py`: what is right is timed, first everything briefly, then the best of it longer and in turns.

Results are held to `vitfast.check.acceptance` by the code that `vitfast.warmup` checks with: all numbers finite, and
right in the first and last rows or images and in some others.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from sweep_rows import OTHER, OURS, STOCK, Row, Variant

from vitfast.bench.harness import DeviceLost
from vitfast.check.acceptance import NotAccepted
from vitfast.check.families import FAMILIES, Family, as_tuple
from vitfast.check.warmup import SEED, NoYardstick, check_part
from vitfast.choose import dispatch
from vitfast.measure import device as devices
from vitfast.measure.device import NotCaptured, first_line
from vitfast.measure.timing import Repeated

Place = devices.Cpu | devices.Cuda
Found = dict[str, Any]

# of what one sample repeats: calls that are captured at most, and how long the first samples are
MOST_CALLS, SAMPLE_MS = 50, 4.0
NOT_CHECKED = "not checked: "
FIGURES = ("ms", "lowest", "highest", "rounds", "graph")


@dataclass(frozen=True)
class Phases:
    """How long to time: `first_ms` everybody alone, then `last_ms` the `best` of ours and stock in `rounds`."""

    first_ms: float = 20.0
    last_ms: float = 200.0
    rounds: int = 10
    best: int = 3


@dataclass(frozen=True)
class _Timed:
    """A call, and how often a sample of `ms` calls it."""

    call: Callable[[], Any]
    once_ms: float
    graph: bool

    def sample(self, place: Place, ms: float) -> float:
        """Milliseconds of one call."""
        times = self.call.times if isinstance(self.call, Repeated) else 1
        calls = max(1, round(ms / max(self.once_ms * times, 1e-4)))
        return place.sampler()(self.call, calls) / times


class RowInMaking:
    """A row that is checked and timed.

    Args:
        failed: by variant, why it is not tried.

    Attributes:
        data: the row's part of the record, as far as it got.
        running: the variant that is called, or was last.
    """

    def __init__(self, row: Row, place: Place, failed: Mapping[str, str], phases: Phases) -> None:
        self.row, self.place, self.phases = row, place, phases
        self.found: dict[str, Found] = {
            name: {"role": variant.role, "config": variant.config} for name, variant in row.variants.items()
        }
        for name, why in failed.items():
            self.found[name]["failed"] = why
        self.data: dict[str, Any] = {"kernel": None, "shape": None, "variants": self.found}
        self.running = next(iter(row.variants))

    def run(self) -> None:
        """Check and time.

        Raises:
            DeviceLost: a variant has broken the device; it is named in `data`.
        """
        row, place = self.row, self.place
        with place.current(), contextlib.nullcontext() if row.grad else torch.no_grad():
            args = None
            try:
                if row.call is not None:
                    args = self._check(FAMILIES[row.call.op])
                if args is None or FAMILIES[row.call.op].sums:
                    # times of gradients that are mostly 0 would be those of less power
                    args = row.draw(_generator(place))
            except Exception as problem:
                for name in self._waiting():
                    self._fail(name, problem)
            self._time(args)
        del args
        try:
            place.release()
        except Exception as lost:
            raise DeviceLost(f"{row.name}: {first_line(lost)}") from lost

    def _waiting(self) -> list[str]:
        """Variants that are to be tried, or were and are right."""
        return [name for name, found in self.found.items() if "failed" not in found and found.get("accepted", True)]

    def _fail(self, name: str, problem: Exception) -> None:
        """Note it. Raises `DeviceLost` where the device does not answer any more."""
        text = first_line(problem)
        self.found[name]["failed"] = text
        # tracebacks hold tensors
        chained: BaseException | None = problem
        while chained is not None:
            chained.__traceback__, chained = None, chained.__context__
        try:
            self.place.synchronize()
            if dispatch.out_of_memory(problem):
                self.place.release()
        except Exception as lost:
            raise DeviceLost(f"{self.row.name}, after {name}: {text}; {first_line(lost)}") from problem

    def _check(self, family: Family) -> tuple[Any, ...]:
        """Hold stock operators and ours to the rule; returns the arguments. Notes what the op asks `dispatch`."""
        call, place = self.row.call, self.place
        generator = _generator(place)
        args, places = self.row.draw(generator), family.places(call, generator)
        args = family.quiet(call, args, places)
        # of all variants: they compute the same
        truth = _once(family.truth)
        for name in self._waiting():
            variant, found, self.running = self.row.variants[name], self.found[name], name
            if variant.family is None:
                continue
            judged = replace(variant.family, truth=truth)
            try:
                with dispatch.watching() as seen:
                    outs = as_tuple(self._made(variant, args)())
                    place.synchronize()
                answers = [each for each in seen if each.kernel == family.kernel]
                if answers:
                    self.data |= {"kernel": family.kernel, "shape": list(answers[-1].shape)}
                if variant.role == OURS and not (answers and answers[-1].taken):
                    raise NotImplementedError(f"{call.op} runs no kernel of {family.kernel} on {place.device.type}")
                check_part(judged, call, args, outs, places, place)
                found["accepted"] = True
            except NotAccepted as fault:
                found |= {"accepted": False, "why_not_accepted": " ".join(str(fault).split())[:1000]}
            except NoYardstick as fault:
                found |= {"accepted": False, "why_not_accepted": NOT_CHECKED + first_line(fault)}
            except Exception as problem:
                self._fail(name, problem)
            outs = None
        return args

    def _made(self, variant: Variant, args: Any) -> Callable[[], Any]:
        with _on_capture_stream(self.place):
            call = variant.make(args)
        self.place.synchronize()
        return call

    def _time(self, args: Any) -> None:
        phases, roles = self.phases, {name: variant.role for name, variant in self.row.variants.items()}
        kept: dict[str, _Timed] = {}
        decides = {STOCK, OURS} & set(roles.values())
        for name in self._waiting():
            self.running = name
            try:
                timed = self._arranged(self._made(self.row.variants[name], args))
                samples = max(1, round(phases.first_ms / SAMPLE_MS))
                self._note(name, timed, [timed.sample(self.place, SAMPLE_MS) for _ in range(samples)])
            except Exception as problem:
                self._fail(name, problem)
                continue
            if decides and roles[name] == OTHER:
                continue
            kept[name] = timed
            # graphs hold memory: only of those that may come last in the end
            ours = sorted((each for each in kept if roles[each] == OURS), key=lambda each: self.found[each]["ms"])
            for slower in ours[phases.best :]:
                del kept[slower]
        self._time_last(kept)

    def _time_last(self, kept: Mapping[str, _Timed]) -> None:
        """In rounds, every other one backwards, so that nobody always follows the same."""
        times: dict[str, list[float]] = {name: [] for name in kept}
        for round_ in range(self.phases.rounds):
            for name in list(times) if round_ % 2 == 0 else list(reversed(times)):
                self.running = name
                try:
                    times[name].append(kept[name].sample(self.place, self.phases.last_ms / self.phases.rounds))
                except Exception as problem:
                    del times[name]
                    for figure in FIGURES:
                        self.found[name].pop(figure, None)
                    self._fail(name, problem)
        for name in times:
            self._note(name, kept[name], times[name])

    def _arranged(self, call: Callable[[], Any]) -> _Timed:
        place, sampler = self.place, self.place.sampler()
        call()
        once_ms = min(sampler(call, 1) for _ in range(2))
        if not place.graphs:
            return _Timed(call, once_ms, False)
        count = max(1, min(MOST_CALLS, int(SAMPLE_MS / max(once_ms, 1e-4))))
        try:
            repeated = Repeated(place.capture(call, count), count)
        except NotCaptured:
            return _Timed(call, once_ms, False)
        # without what the host needs for each call
        return _Timed(repeated, sampler(repeated, 1) / count, True)

    def _note(self, name: str, timed: _Timed, times: list[float]) -> None:
        figures = statistics.median(times), min(times), max(times), len(times), timed.graph
        self.found[name] |= dict(zip(FIGURES, figures, strict=True))


def _generator(place: Place) -> torch.Generator:
    return torch.Generator(place.device).manual_seed(SEED)


def _once(truth: Callable[..., Any]) -> Callable[..., Any]:
    known: list[Any] = []

    def found(*args: Any) -> Any:
        if not known:
            known.append(truth(*args))
        return known[0]

    return found


@contextlib.contextmanager
def _on_capture_stream(place: Place) -> Iterator[None]:
    """Autograd runs a backward on its forward's stream: one that is to be captured begins on the stream of captures."""
    if not isinstance(place, devices.Cuda):
        yield
        return
    if place.stream is None:
        place.stream = torch.cuda.Stream(place.device)
    place.stream.wait_stream(torch.cuda.current_stream(place.device))
    with torch.cuda.stream(place.stream):
        yield


class CountedCompilations:
    """How many kernels Triton compiled in this process since this was made, without those its cache had.

    In the process that times there should be none: a compiler on other cores slows the host down, and takes the time
    that all is to be over in.
    """

    def __init__(self) -> None:
        self.compiled = 0
        # no Triton, no kernels to compile
        with contextlib.suppress(ImportError):
            from triton import knobs

            knobs.compilation.listener = self

    def __call__(self, *, cache_hit: bool, **told: Any) -> None:
        self.compiled += not cache_hit


def summary(name: str, found: Mapping[str, Found]) -> str:
    """A row in one line: who of each role was fastest, and how many were not timed."""
    timed = [variant for variant in sorted(found, key=lambda each: found[each].get("ms", 0)) if "ms" in found[variant]]
    roles = [found[variant]["role"] for variant in timed]
    first = [timed[roles.index(role)] for role in (STOCK, OURS, OTHER) if role in roles]
    told = [f"{variant} {1e3 * found[variant]['ms']:.1f} us" for variant in first]
    wrong = sum("why_not_accepted" in each for each in found.values())
    failed = sum("failed" in each for each in found.values())
    return "; ".join([name, *told, f"{failed} failed, {wrong} not accepted, {len(timed)} timed"])
