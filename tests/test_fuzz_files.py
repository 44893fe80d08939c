"""Files of weights with changes by chance: an error of another kind, memory by a claim, or weights out of nothing.

`tests/fuzz_files.py` says what is changed and what may come of it, and goes on for as long as one likes.
"""

import resource
import sys

import pytest
from fuzz_files import TARGETS, limited, mutated, outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")


@pytest.fixture
def limit():
    limits = limited()
    yield
    resource.setrlimit(resource.RLIMIT_DATA, limits)


@pytest.mark.parametrize("target", TARGETS)
@settings(
    max_examples=400, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_changed_file_ends_in_another_error_or_takes_memory(target, limit, tmp_path, data):
    content, wrap = TARGETS[target]
    changed = wrap(mutated(content, lambda below: data.draw(st.integers(0, max(below - 1, 0)))))
    outcome(target, changed, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
def test_file_is_refused_before_it_is_changed(target, tmp_path):
    content, wrap = TARGETS[target]
    assert outcome(target, wrap(content), tmp_path) == "read"
