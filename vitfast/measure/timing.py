"""Comparing the speed of callables: interleaved rounds, ratios within a round, and the baseline against itself."""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOISE_LIMIT = 0.03
AGAIN = "the baseline again"


class Event(Protocol):
    """What `EventSampler` needs of torch.cuda.Event."""

    def record(self) -> None: ...

    def elapsed_time(self, end: Any) -> float: ...


class Sampler(Protocol):
    """Calls `call` `calls` times and returns the milliseconds that one of them took.

    `min_ms` is how long a sample has to last for its clock and its surroundings to matter little, `pause_s` how long
    it waits before each.
    """

    min_ms: float
    pause_s: float

    def __call__(self, call: Callable[[], Any], calls: int) -> float: ...


class HostSampler:
    """Times callables that return when their work is done."""

    min_ms = 20.0
    # OpenMP's threads were seen to spin for 16 ms after their last work, on the cores of whoever runs next
    pause_s = 0.025

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.clock, self.sleep = clock, sleep

    def __call__(self, call: Callable[[], Any], calls: int) -> float:
        self.sleep(self.pause_s)
        began = self.clock()
        for _ in range(calls):
            call()
        return (self.clock() - began) * 1e3 / calls


class EventSampler:
    """Times what callables make a device do, between two events on its current stream.

    Where issuing takes longer than the device needs, that is what this measures: see `vitfast.measure.device`.
    """

    min_ms = 10.0
    pause_s = 0.0

    def __init__(self, event: Callable[[], Event], synchronize: Callable[[], None]) -> None:
        self.event, self.synchronize = event, synchronize

    def __call__(self, call: Callable[[], Any], calls: int) -> float:
        start, end = self.event(), self.event()
        self.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        self.synchronize()
        return start.elapsed_time(end) / calls


def sampler_of(device: torch.device | str) -> HostSampler | EventSampler:
    device = torch.device(device)
    if device.type != "cuda":
        return HostSampler()
    return EventSampler(lambda: torch.cuda.Event(enable_timing=True), lambda: torch.cuda.synchronize(device))


@dataclass(frozen=True)
class Repeated:
    """A callable that computes `times` times in one call, as the replay of a CUDA graph may."""

    call: Callable[[], Any]
    times: int

    def __call__(self) -> Any:
        return self.call()


def rotating(
    function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], *, keep_results: bool = False
) -> Callable[[], Any]:
    """A callable that gives `function` the next of `sets` as its arguments at each call.

    With `keep_results` as many results as there are sets are kept alive: an allocator would give the memory of one that
    was dropped to the next call, and a GPU's cache would hold what that writes.
    """
    turn, kept = itertools.cycle(sets), collections.deque(maxlen=len(sets) if keep_results else 0)

    def call() -> Any:
        results = function(*next(turn))
        kept.append(results)
        return results

    return call


@dataclass(frozen=True)
class Comparison:
    """What `interleaved_medians` measured.

    Attributes:
        median_ms: time of one call of each variant, median over the rounds kept.
        ratio: median over these rounds of the baseline's time over the variant's; above 1 the variant is faster.
        spread: lower and upper quartile of that ratio.
        noise: median over these rounds of the baseline's time over its own second measurement.
        rounds: how many were kept; calls: of each variant, how many a measurement in a round averages.
        repeated: how many were measured again because the baseline differed too much from itself.
        noisy: how many of those kept are above the limit after all, because the repeats were used up.
        rounds_ms: what each round kept measured; `AGAIN` is the baseline's second measurement.
    """

    median_ms: dict[str, float]
    ratio: dict[str, float]
    spread: dict[str, tuple[float, float]]
    noise: float
    rounds: int
    calls: dict[str, int]
    repeated: int
    noisy: int
    rounds_ms: list[dict[str, float]]

    def quantiles_ms(self, name: str) -> tuple[float, float, float]:
        """Times of one call at which 20, 50 and 80 % of the rounds were as fast or faster."""
        values = [r[name] for r in self.rounds_ms]
        low, high = _quantiles(values, 5)
        return low, median(values), high

    def ratio_of(self, numerator: str, denominator: str) -> tuple[float, float, float]:
        """One variant's time over another's, taken within each round: lower quartile, median, upper quartile."""
        ratios = [r[numerator] / r[denominator] for r in self.rounds_ms]
        low, high = _quantiles(ratios, 4)
        return low, median(ratios), high

    def noise_spread(self) -> tuple[float, float]:
        """Lower and upper quartile of the baseline's ratio to itself, which is 1 but for what disturbs it.

        The two measurements of a round are interchangeable, so each round counts with its ratio both ways: else a
        few rounds that happened to lie on one side would call equal variants different.
        """
        first, second = next(iter(self.median_ms)), AGAIN
        ratios = [r[first] / r[second] for r in self.rounds_ms]
        return _quantiles([*ratios, *(1 / ratio for ratio in ratios)], 4)

    def within_noise(self, name: str) -> bool:
        """Whether a variant differs from the baseline no more than that from itself: their quartiles overlap."""
        low, high = self.spread[name]
        noise_low, noise_high = self.noise_spread()
        return low <= noise_high and noise_low <= high


def interleaved_medians(
    variants: Mapping[str, Callable[[], Any]],
    *,
    device: torch.device | str = "cpu",
    budget_s: float = 10.0,
    rounds: tuple[int, int] = (6, 30),
    noise_limit: float = NOISE_LIMIT,
    sampler: Sampler | None = None,
) -> Comparison:
    """Time `variants` against the first of them, in rounds that measure each once and the first twice.

    The order changes from round to round. A round whose two measurements of the first variant differ by more than
    `noise_limit` is repeated, as often as there are rounds; if that is not enough the quietest rounds count.

    Args:
        variants: a `Repeated` counts as often as it computes.
        device: where the callables work.
        budget_s: aimed-at time for all rounds without repeats.
        rounds: fewest and most.
        sampler: in place of the one that fits `device`.

    Raises:
        ValueError: no variant, or one with the name kept for the baseline's second measurement.
    """
    if not variants or AGAIN in variants:
        raise ValueError(
            f"interleaved_medians: variants must be one or more, none named {AGAIN!r}, got {list(variants)}"
        )
    sampler = sampler or sampler_of(device)
    baseline = next(iter(variants))
    entries = [*variants.items(), (AGAIN, variants[baseline])]
    times = {name: call.times if isinstance(call, Repeated) else 1 for name, call in entries}
    for call in variants.values():
        sampler(call, 1)
    once_ms = {name: _estimate_ms(call, sampler) for name, call in variants.items()}
    once_ms[AGAIN] = once_ms[baseline]
    calls = {name: max(1, round(sampler.min_ms / max(ms, 1e-4))) for name, ms in once_ms.items()}
    round_s = sum(calls[name] * once_ms[name] / 1e3 + sampler.pause_s for name, _ in entries)
    wanted = min(max(rounds[0], int(budget_s / round_s)), rounds[1])

    orders = _orders(len(entries))
    measured: list[dict[str, float]] = []
    while sum(_noise(r, baseline) <= noise_limit for r in measured) < wanted and len(measured) < 2 * wanted:
        order = [entries[i] for i in orders[len(measured) % len(orders)]]
        measured.append({name: sampler(call, calls[name]) / times[name] for name, call in order})
    kept = sorted(measured, key=lambda r: _noise(r, baseline))[:wanted]

    ratios = {
        # the mean of both measurements of the baseline, so that all of the round's information is used
        name: [(r[baseline] + r[AGAIN]) / 2 / r[name] for r in kept]
        for name in variants
        if name != baseline
    }
    return Comparison(
        median_ms={name: median(r[name] for r in kept) for name in variants},
        ratio={name: median(values) for name, values in ratios.items()},
        spread={name: _quantiles(values, 4) for name, values in ratios.items()},
        noise=median(r[baseline] / r[AGAIN] for r in kept),
        rounds=wanted,
        calls={name: calls[name] * times[name] for name in variants},
        repeated=len(measured) - wanted,
        noisy=sum(_noise(r, baseline) > noise_limit for r in kept),
        rounds_ms=kept,
    )


def _estimate_ms(call: Callable[[], Any], sampler: Sampler) -> float:
    """About how long one call takes, from a sample long enough that neither clock nor launch dominates it."""
    calls = 1
    while True:
        ms = sampler(call, calls)
        if ms * calls >= sampler.min_ms / 4 or calls >= 4096:
            return ms
        calls *= 4


def _orders(n: int) -> list[list[int]]:
    """Orders of n things in which each stands in every place, and right after every other, equally often.

    What runs just after a variant finds the caches as that one left them, so neighbours count as well as places.
    Source: Williams, "Experimental Designs Balanced for the Estimation of Residual Effects of Treatments" (1949).
    """
    zigzag = [(i + 1) // 2 if i % 2 else n - i // 2 for i in range(n)]
    orders = [[(place + shift) % n for place in zigzag] for shift in range(n)]
    return orders if n % 2 == 0 else orders + [order[::-1] for order in orders]


def _noise(round_ms: Mapping[str, float], baseline: str) -> float:
    first, second = round_ms[baseline], round_ms[AGAIN]
    return max(first, second) / min(first, second) - 1


def median(values: Iterable[float]) -> float:
    # decimal and fractions come with it: not where vitfast is imported and nothing is measured
    import statistics

    return statistics.median(values)


def _quantiles(values: Sequence[float], n: int) -> tuple[float, float]:
    """The lowest and the highest of the points that cut `values` into n equal shares."""
    if len(values) < 2:
        return values[0], values[0]
    import statistics

    points = statistics.quantiles(values, n=n, method="inclusive")
    return points[0], points[-1]


def inference(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """One forward in eval mode that records nothing for autograd."""

    def call() -> Tensor:
        with torch.inference_mode():
            return model(images)

    model.eval()
    return call


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Forward, cross-entropy, backward, gradients dropped. No optimizer: it is the same code for every model."""

    def call() -> None:
        F.cross_entropy(model(images).float(), labels).backward()
        model.zero_grad(set_to_none=True)

    model.train()
    return call
