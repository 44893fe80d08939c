"""Comparing the speed of callables: interleaved rounds, ratios within a round, and the baseline against itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOISE_LIMIT = 0.03
MIN_SAMPLE_MS = 20.0
# OpenMP's threads were seen to spin for 16 ms after their last work, on the cores of whoever runs next
SETTLE_S = 0.025
AGAIN = "the baseline again"


@dataclass(frozen=True)
class Comparison:
    """What `interleaved_medians` measured.

    Attributes:
        median_ms: time of one call of each variant, median over the rounds kept.
        ratio: median over these rounds of the baseline's time over the variant's; above 1 the variant is faster.
        spread: lower and upper quartile of that ratio.
        noise: median over these rounds of the baseline's time over its own second measurement.
        rounds: how many were kept; calls: how many calls a measurement in a round averages.
        repeated: how many were measured again because the baseline differed too much from itself.
        noisy: how many of those kept are above the limit after all, because the repeats were used up.
        rounds_ms: what each round kept measured; `AGAIN` is the baseline's second measurement.
    """

    median_ms: dict[str, float]
    ratio: dict[str, float]
    spread: dict[str, tuple[float, float]]
    noise: float
    rounds: int
    calls: int
    repeated: int
    noisy: int
    rounds_ms: list[dict[str, float]]

    def ratio_of(self, numerator: str, denominator: str) -> tuple[float, float, float]:
        """One variant's time over another's, taken within each round: lower quartile, median, upper quartile."""
        ratios = [r[numerator] / r[denominator] for r in self.rounds_ms]
        low, high = _quartiles(ratios)
        return low, statistics.median(ratios), high


def interleaved_medians(
    variants: Mapping[str, Callable[[], Any]],
    *,
    device: torch.device | str = "cpu",
    budget_s: float = 10.0,
    rounds: tuple[int, int] = (6, 30),
    noise_limit: float = NOISE_LIMIT,
) -> Comparison:
    """Time `variants` against the first of them, in rounds that measure each once and the first twice.

    The order changes from round to round. A round whose two measurements of the first variant differ by more than
    `noise_limit` is repeated, as often as there are rounds; if that is not enough the quietest rounds count.

    Args:
        device: where the callables work.
        budget_s: aimed-at time for all rounds without repeats.
        rounds: fewest and most.

    Raises:
        ValueError: fewer than two variants, or one with the name kept for the baseline's second measurement.
    """
    if len(variants) < 2 or AGAIN in variants:
        raise ValueError(
            f"interleaved_medians: variants must be two or more, none named {AGAIN!r}, got {list(variants)}"
        )
    device = torch.device(device)
    baseline = next(iter(variants))
    entries = [*variants.items(), (AGAIN, variants[baseline])]
    for call in variants.values():
        _sample_ms(call, 1, device)
    once_ms = {name: _sample_ms(call, 1, device) for name, call in variants.items()}
    calls = max(1, round(MIN_SAMPLE_MS / max(min(once_ms.values()), 1e-3)))
    round_s = calls * (sum(once_ms.values()) + once_ms[baseline]) / 1e3
    wanted = min(max(rounds[0], int(budget_s / round_s)), rounds[1])

    orders = _orders(len(entries))
    measured: list[dict[str, float]] = []
    while sum(_noise(r, baseline) <= noise_limit for r in measured) < wanted and len(measured) < 2 * wanted:
        order = [entries[i] for i in orders[len(measured) % len(orders)]]
        measured.append({name: _sample_ms(call, calls, device) for name, call in order})
    kept = sorted(measured, key=lambda r: _noise(r, baseline))[:wanted]

    ratios = {
        # the mean of both measurements of the baseline, so that all of the round's information is used
        name: [(r[baseline] + r[AGAIN]) / 2 / r[name] for r in kept]
        for name in variants
        if name != baseline
    }
    return Comparison(
        median_ms={name: statistics.median(r[name] for r in kept) for name in variants},
        ratio={name: statistics.median(values) for name, values in ratios.items()},
        spread={name: _quartiles(values) for name, values in ratios.items()},
        noise=statistics.median(r[baseline] / r[AGAIN] for r in kept),
        rounds=wanted,
        calls=calls,
        repeated=len(measured) - wanted,
        noisy=sum(_noise(r, baseline) > noise_limit for r in kept),
        rounds_ms=kept,
    )


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


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _sample_ms(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Milliseconds that one of `calls` calls takes."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / calls
    time.sleep(SETTLE_S)
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) * 1e3 / calls


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


def conditions(device: torch.device | str) -> dict[str, Any]:
    """What has to stand next to a time: device, threads, versions."""
    from vitfast import info

    device = torch.device(device)
    facts = info.collect()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else facts["device"]["cpu"]
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": facts["packages"]["timm"],
        "vitfast": facts["vitfast"],
    }
