"""A covering leaves nothing out that `make test` promises: each value, and each two."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from pairwise import covering, product

FACTORS = {"a": (1, 2, 3), "b": ("x", "y"), "c": (None, 0.5, 7, 8), "d": (True, False)}


def allowed(case):
    return (case["a"], case["b"]) != (3, "y")


def test_two_values_that_may_meet_never_do():
    cases = list(covering(FACTORS, allowed))
    met = {two for case in cases for two in itertools.combinations(case.items(), 2)}
    every = {
        two
        for values in itertools.product(*FACTORS.values())
        if allowed(case := dict(zip(FACTORS, values, strict=True)))
        for two in itertools.combinations(case.items(), 2)
    }
    assert met == every and (("a", 3), ("b", "y")) not in met
    # twelve is what the two longest factors need
    assert 12 <= len(cases) <= 18 and all(map(allowed, cases))


def test_value_is_in_no_case():
    cases = list(covering(FACTORS, strength=1))
    assert all({case[name] for case in cases} == {*values} for name, values in FACTORS.items())
    assert len(cases) <= 6


def test_two_runs_have_other_cases():
    """xdist's workers must collect the same tests."""
    assert list(covering(FACTORS)) == list(covering(FACTORS))


def test_case_is_lost_or_none_is_left_for_later():
    marked = product(allowed, **FACTORS)
    names, parameters = marked.args
    assert names == "a, b, c, d" and len(parameters) == 3 * 2 * 4 * 2 - 8
    now = [dict(zip(FACTORS, each.values, strict=True)) for each in parameters if not each.marks]
    assert sorted(map(str, now)) == sorted({str(case) for case in covering(FACTORS, allowed)})


BITS = {name: (0, 1) for name in "abc"}


@product(**BITS)
def test_case_is_outside_of_its_factors(a, b, c):
    assert {a, b, c} <= {0, 1}


@pytest.mark.parametrize("options, runs", [([], len([*covering(BITS)])), (["--all"], 8)], ids=str)
def test_full_case_runs_unasked_or_not_at_all(options, runs):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-k", "outside_of_its_factors", __file__]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.stdout.count("outside_of_its_factors[") == runs and "deselected" in done.stdout, done.stdout
