"""Comparing speeds: the order of the variants, ratios taken within a round, and what counts as a difference."""

import itertools
import random
from collections import Counter

import pytest
from simulated_device import SimulatedDevice

from vitfast.measure.timing import AGAIN, Comparison, HostSampler, Repeated, _orders, interleaved_medians, rotating


class Clock:
    """Seconds pass only where a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def takes(self, ms, jitter=0.0):
        """A callable that takes about so long: every call a random share more."""
        return lambda: self.sleep(ms / 1e3 * (1 + jitter * random.random()))

    def compare(self, variants, **options):
        return interleaved_medians(variants, sampler=HostSampler(self, self.sleep), **options)


@pytest.mark.parametrize("n", range(2, 9))
def test_a_variant_has_a_favourite_place_or_neighbour(n):
    orders = _orders(n)
    assert all(sorted(order) == list(range(n)) for order in orders)
    places = Counter(pair for order in orders for pair in enumerate(order))
    neighbours = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(places) == n * n and len(set(places.values())) == 1
    assert len(neighbours) == n * (n - 1) and len(set(neighbours.values())) == 1


def test_a_round_is_lost_or_counted_to_the_wrong_variant():
    clock = Clock()
    result = clock.compare({"slow": clock.takes(40.0), "fast": clock.takes(20.0)}, budget_s=0.1, rounds=(3, 3))
    assert len(result.rounds_ms) == result.rounds == 3
    assert all(set(measured) == {"slow", "fast", AGAIN} for measured in result.rounds_ms)
    assert result.median_ms["slow"] > 1.2 * result.median_ms["fast"]


def test_ratio_of_two_variants_is_not_taken_within_rounds():
    # the ratio of the medians is 3, and over the whole time it is 2.05
    rounds = [{"a": 2.0, "b": 1.0}, {"a": 6.0, "b": 2.0}, {"a": 40.0, "b": 20.0}, {"a": 6.0, "b": 3.0}]
    result = Comparison({}, {}, {}, 1.0, 4, {}, 0, 0, rounds)
    assert result.ratio_of("a", "b") == (2.0, 2.0, 2.25)
    assert result.ratio_of("b", "a") == pytest.approx((11 / 24, 0.5, 0.5))


def test_a_slower_variant_is_not_ranked_last():
    clock = Clock()
    known_ms = {"baseline": 2.0, "slowest": 4.0, "slower": 2.5, "fastest": 0.5}
    result = clock.compare({name: clock.takes(ms, jitter=0.05) for name, ms in known_ms.items()})
    assert sorted(result.median_ms, key=result.median_ms.get) == ["fastest", "baseline", "slower", "slowest"]
    for name, ms in known_ms.items():
        assert result.median_ms[name] == pytest.approx(ms * 1.025, rel=0.02)
        if name != "baseline":
            assert result.ratio[name] == pytest.approx(2.0 / ms, rel=0.02) and not result.within_noise(name)


@pytest.mark.parametrize("seed", range(20))
def test_luck_is_called_a_difference_or_a_difference_luck(seed):
    """Three calls in a sample do not average the jitter away: both baseline and variants vary by some percent."""
    random.seed(seed)
    clock = Clock()
    times = {"baseline": 7.0, "same": 7.0, "slower by a tenth": 7.7, "faster by a tenth": 6.3}
    result = clock.compare({name: clock.takes(ms, jitter=0.06) for name, ms in times.items()})
    assert result.within_noise("same")
    assert not result.within_noise("slower by a tenth") and not result.within_noise("faster by a tenth")


def test_noise_that_leans_to_one_side_makes_equal_variants_different():
    rounds = [{"a": 1.00, AGAIN: 1.02, "b": 1.02}] * 6
    result = Comparison({"a": 1.0, "b": 1.02}, {"b": 0.99}, {"b": (0.985, 0.99)}, 0.98, 6, {}, 0, 0, rounds)
    low, high = result.noise_spread()
    assert low == pytest.approx(1 / 1.02) and high == pytest.approx(1.02)
    assert result.within_noise("b")


def test_a_disturbed_round_counts():
    clock = Clock()
    calls = itertools.count()

    def disturbed():
        # the machine does something else from time to time, for longer than all of a sample
        clock.sleep(0.03 + 0.5 * (next(calls) % 7 == 6))

    result = clock.compare({"a": disturbed, "b": clock.takes(30.0)}, rounds=(6, 6))
    assert result.repeated > 0 and result.noisy == 0 and result.noise == 1.0
    assert result.ratio["b"] == pytest.approx(1.0)


def test_quantiles_are_those_of_something_else():
    rounds = [{"a": float(i), AGAIN: 1.0} for i in range(1, 12)]
    assert Comparison({"a": 6.0}, {}, {}, 1.0, 11, {}, 0, 0, rounds).quantiles_ms("a") == (3.0, 6.0, 9.0)


def test_a_sample_is_too_short_for_its_clock():
    clock = Clock()
    result = clock.compare({"a": clock.takes(0.001), "b": clock.takes(100.0)})
    assert result.calls["a"] * 0.001 >= 0.9 * HostSampler.min_ms and result.calls["b"] == 1


def test_more_time_is_used_than_was_given():
    clock = Clock()
    clock.compare({"a": clock.takes(5.0), "b": clock.takes(3.0)}, budget_s=2.0, rounds=(1, 1000))
    assert 1.5 < clock.now < 3.0


def test_a_repeated_call_counts_as_one():
    clock = Clock()
    result = clock.compare({"once": clock.takes(3.0), "in a graph": Repeated(clock.takes(20.0), 10)})
    assert result.median_ms["in a graph"] == pytest.approx(2.0) and result.ratio["in a graph"] == pytest.approx(1.5)


def test_a_lone_variant_cannot_be_timed():
    clock = Clock()
    result = clock.compare({"alone": clock.takes(3.0)})
    assert result.median_ms == {"alone": pytest.approx(3.0)} and result.ratio == {}


@pytest.mark.parametrize("variants", [{}, {AGAIN: print}])
def test_variants_that_cannot_be_told_apart(variants):
    with pytest.raises(ValueError, match="one or more"):
        interleaved_medians(variants)


def test_inputs_are_not_rotated():
    seen = []
    call = rotating(lambda a, b: seen.append((a, b)), [(1, 2), (3, 4), (5, 6)])
    for _ in range(7):
        call()
    assert seen == [(1, 2), (3, 4), (5, 6)] * 2 + [(1, 2)]


def test_the_time_of_the_host_is_taken_for_the_device_s():
    """A host that is far ahead must not be what is measured; one that is behind must be."""
    place = SimulatedDevice()
    sampler = place.sampler()
    assert sampler(lambda: place.work(1e-6, 1e-3), 10) == pytest.approx(1.0, rel=0.01)
    assert sampler(lambda: place.work(1e-3, 1e-6), 10) == pytest.approx(1.0, rel=0.01)
