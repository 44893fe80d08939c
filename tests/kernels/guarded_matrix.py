"""More on guarded memory than an ordinary run has time for; named so that pytest does not collect it by itself.

    make matrix

The cases of guarded_kernels.py and guarded_cpu.py in all their combinations, and the other tests here as they are.
"""

from pathlib import Path

import pytest
import test_guarded
from guarded_memory import PLACEMENTS, run_guarded

# a test here waits for thousands
pytestmark = pytest.mark.timeout(4 * 3600)
FILES = [path for path in sorted(Path(__file__).parent.glob("test_*.py")) if "gpu" not in path.name]
FILES.remove(Path(test_guarded.__file__))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("group", test_guarded.GROUPS)
def test_combination_touches_what_is_not_its_own(group, placement, tmp_path_factory):
    """Reads and writes past either end that no pair of things leads to."""
    wrong = run_guarded(tmp_path_factory, test_guarded.CASES, "-k", f"test_{group} and {placement}]", EVERY_CASE="1")
    assert wrong is None, wrong


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_other_test_touches_what_is_not_its_own(file, placement, tmp_path_factory):
    """Reads and writes past either end where numbers come out right."""
    wrong = run_guarded(tmp_path_factory, file, "--all", VITFAST_GUARDED_MEMORY=placement)
    assert wrong is None, wrong


def test_combination_on_a_cpu_touches_what_is_not_its_own(tmp_path_factory):
    cases = Path(__file__).parents[1] / "guarded_cpu.py"
    wrong = run_guarded(tmp_path_factory, cases, EVERY_CASE="1", TRITON_INTERPRET="0")
    assert wrong is None, wrong
