"""One row of the sweep: what is right is timed, first everything briefly, then the best of it longer and in turns.

Results are held to `vitfast.check.acceptance` by the code that `vitfast.warmup` checks with: all numbers finite, and
right in the first and last rows or images and in some others.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.core.harness import DeviceLost
from benchmarks.gpu.sweep_rows import OURS, STOCK, Row, Variant
from vitfast.check.acceptance import NotAccepted
from vitfast.check.families import FAMILIES, Family, as_tuple
from vitfast.check.warmup import SEED, NoYardstick, check_part
from vitfast.choose import dispatch
from vitfast.measure import device as devices
from vitfast.measure.device import NotCaptured, Place, first_line
from vitfast.measure.timing import Repeated, interleaved_medians

Found = dict[str, Any]

# of what one sample repeats: calls that are captured at most, and how long the first samples are
MOST_CALLS, SAMPLE_MS = 50, 4.0
NOT_CHECKED = "not checked: "
FIGURES = ("ms", "lowest", "highest", "rounds", "graph")
# first everybody alone, in samples, then the best of ours and stock in rounds
SAMPLES, BEST, ROUNDS, ROUND_MS = 5, 3, 8, 20.0


class RowInMaking:
    """A row that is checked and timed.

    Args:
        failed: by variant, why it is not tried.

    Attributes:
        data: the row's part of the record, as far as it got.
        running: the variant that is called, or was last.
    """

    def __init__(self, row: Row, place: Place, failed: Mapping[str, str]) -> None:
        self.row, self.place = row, place
        self.found: dict[str, Found] = {
            name: {"role": variant.role, "config": variant.config}
            | ({"failed": failed[name]} if name in failed else {})
            for name, variant in row.variants.items()
        }
        self.data: dict[str, Any] = {"kernel": None, "shape": None, "variants": self.found}
        self.running = next(iter(row.variants))

    def run(self) -> None:
        """Check and time.

        Raises:
            DeviceLost: a variant has broken the device; it is named in `data`.
        """
        row, place, family = self.row, self.place, FAMILIES[self.row.call.op]
        with place.current(), torch.no_grad():
            args: Any = None
            try:
                args = self._check(family)
                if family.sums:
                    # times of gradients that are mostly 0 would be those of less power
                    args = family.draw(row.call, _generator(place))
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
        args, places = family.draw(call, generator), family.places(call, generator)
        args = family.quiet(call, args, places)
        # of all variants: they compute the same
        truth = _once(family.truth)
        for name in self._waiting():
            variant, found, self.running = self.row.variants[name], self.found[name], name
            try:
                with dispatch.watching() as seen:
                    outs = as_tuple(self._made(variant, args)())
                    place.synchronize()
                answers = [each for each in seen if each.kernel == family.kernel]
                if answers:
                    self.data |= {"kernel": family.kernel, "shape": list(answers[-1].shape)}
                if variant.role == OURS and not (answers and answers[-1].taken):
                    raise NotImplementedError(f"{call.op} runs no kernel of {family.kernel} on {place.device.type}")
                check_part(replace(variant.family, truth=truth), call, args, outs, places, place)
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
        kept: dict[str, Repeated] = {}
        for name in self._waiting():
            self.running = name
            try:
                kept[name] = self._arranged(self._made(self.row.variants[name], args))
                sampler = self.place.sampler()
                calls = max(1, round(SAMPLE_MS / max(sampler(kept[name], 1), 1e-4)))
                self._note(name, [sampler(kept[name], calls) / kept[name].times for _ in range(SAMPLES)])
            except Exception as problem:
                kept.pop(name, None)
                self._fail(name, problem)
            # graphs hold memory: only of those that may come last in the end
            ours = [each for each in kept if self.row.variants[each].role == OURS]
            for slower in sorted(ours, key=lambda each: self.found[each]["ms"])[BEST:]:
                del kept[slower]
        self._time_last(kept)

    def _arranged(self, call: Callable[[], Any]) -> Repeated:
        """The call as it is timed: as many as fill a sample in a graph, without what the host needs for each."""
        call()
        self.found[self.running]["graph"] = False
        if self.place.graphs:
            sampler = self.place.sampler()
            once_ms = min(sampler(call, 1) for _ in range(2))
            count = max(1, min(MOST_CALLS, int(SAMPLE_MS / max(once_ms, 1e-4))))
            try:
                repeated = Repeated(self.place.capture(call, count), count)
                self.found[self.running]["graph"] = True
                return repeated
            except NotCaptured as problem:
                self.found[self.running]["why_no_graph"] = str(problem)
        return Repeated(call, 1)

    def _time_last(self, kept: dict[str, Repeated]) -> None:
        """In turns, without those that fail."""
        sampler = self.place.sampler()
        sampler.min_ms = ROUND_MS

        def named(name: str, call: Callable[[], Any]) -> Any:
            self.running = name
            return call()

        while kept:
            calls = {name: Repeated(partial(named, name, each.call), each.times) for name, each in kept.items()}
            try:
                measured = interleaved_medians(calls, rounds=(ROUNDS, ROUNDS), sampler=sampler)
            except Exception as problem:
                del kept[self.running]
                for figure in FIGURES:
                    self.found[self.running].pop(figure, None)
                self._fail(self.running, problem)
            else:
                for name in kept:
                    self._note(name, [each[name] for each in measured.rounds_ms])
                return

    def _note(self, name: str, times: list[float]) -> None:
        figures = statistics.median(times), min(times), max(times), len(times)
        self.found[name] |= dict(zip(FIGURES, figures, strict=False))


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


def summary(name: str, found: Mapping[str, Found]) -> str:
    """A row in one line: who of each role was fastest, and how many were not timed."""
    timed = sorted((each for each in found if "ms" in found[each]), key=lambda each: found[each]["ms"])
    first = {role: next((each for each in timed if found[each]["role"] == role), None) for role in (STOCK, OURS)}
    told = [f"{each} {1e3 * found[each]['ms']:.1f} us" for each in first.values() if each is not None]
    wrong, failed = (sum(why in each for each in found.values()) for why in ("why_not_accepted", "failed"))
    return "; ".join([name, *told, f"{failed} failed, {wrong} not accepted, {len(timed)} timed"])
