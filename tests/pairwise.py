"""Few cases of many factors: each two values meet in one of them. The whole product is for `make test-all`."""

import itertools
import random

import pytest


def drawn(chance, factors, allowed, fixed, at_most):
    """So many allowed cases with what is fixed: fewer, or none, where luck finds no more."""
    draws = ({name: chance.choice(factors[name]) for name in factors} | fixed for _ in range(500))
    return list(itertools.islice(filter(allowed, draws), at_most))


def covering(factors, allowed=lambda case: True, strength=2):
    """Cases in which each `strength` values meet that are allowed to: the best of some drawn ones in turn.

    Args:
        factors: by name, the values, which are hashable.
        allowed: whether a whole case, a dict by name, makes sense.
        strength: 1: each value is in some case; 2: each two are.
    """
    chance = random.Random(0)
    values = [[(name, value) for value in factors[name]] for name in factors]
    missing = dict.fromkeys(itertools.chain(*(itertools.product(*k) for k in itertools.combinations(values, strength))))
    while missing:
        wanted = next(iter(missing))
        some = drawn(chance, factors, allowed, dict(wanted), 20)
        new = [[k for k in itertools.combinations(case.items(), strength) if k in missing] for case in some]
        # without any these are never allowed
        most = max(new, key=len, default=[wanted])
        for met in most:
            del missing[met]
        if some:
            yield some[new.index(most)]


def product(allowed=lambda case: True, strength=2, **factors):
    """Parameters of a test: every allowed case, of which those outside of a covering are marked `full`.

    Args:
        factors: by name, the values, or by their names, which are then what `allowed` is given.
    """
    values = [each if isinstance(each, dict) else dict(zip(each, each, strict=True)) for each in factors.values()]
    chosen = list(covering({name: tuple(each) for name, each in zip(factors, values, strict=True)}, allowed, strength))
    parameters = []
    for names in itertools.product(*values):
        case = dict(zip(factors, names, strict=True))
        if allowed(case):
            given = (each[key] for each, key in zip(values, names, strict=True))
            marks = () if case in chosen else pytest.mark.full
            parameters.append(pytest.param(*given, marks=marks, id="-".join(map(str, names))))
    return pytest.mark.parametrize(", ".join(factors), parameters)
