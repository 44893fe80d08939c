"""Comparing speeds: the order of the variants, and ratios taken within a round."""

import itertools
import time
from collections import Counter

import pytest

from vitfast.timing import AGAIN, Comparison, _orders, interleaved_medians


@pytest.mark.parametrize("n", range(2, 9))
def test_a_variant_has_a_favourite_place_or_neighbour(n):
    orders = _orders(n)
    assert all(sorted(order) == list(range(n)) for order in orders)
    places = Counter(pair for order in orders for pair in enumerate(order))
    neighbours = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(places) == n * n and len(set(places.values())) == 1
    assert len(neighbours) == n * (n - 1) and len(set(neighbours.values())) == 1


def test_a_round_is_lost_or_counted_to_the_wrong_variant():
    variants = {"slow": lambda: time.sleep(0.04), "fast": lambda: time.sleep(0.02)}
    result = interleaved_medians(variants, budget_s=0.1, rounds=(3, 3))
    assert len(result.rounds_ms) == result.rounds == 3
    assert all(set(measured) == {"slow", "fast", AGAIN} for measured in result.rounds_ms)
    assert result.median_ms["slow"] > 1.2 * result.median_ms["fast"]


def test_ratio_of_two_variants_is_not_taken_within_rounds():
    # the ratio of the medians is 3, and over the whole time it is 2.05
    rounds = [{"a": 2.0, "b": 1.0}, {"a": 6.0, "b": 2.0}, {"a": 40.0, "b": 20.0}, {"a": 6.0, "b": 3.0}]
    result = Comparison({}, {}, {}, 1.0, 4, 1, 0, 0, rounds)
    assert result.ratio_of("a", "b") == (2.0, 2.0, 2.25)
    assert result.ratio_of("b", "a") == pytest.approx((11 / 24, 0.5, 0.5))
