"""CPU kernels touch nothing but what is theirs: guarded_cpu.py in a process of its own, on memory whose ends fault."""

from pathlib import Path

import pytest
from guarded_memory import run_guarded


@pytest.mark.slow
def test_cpu_kernel_touches_what_is_not_its_own(tmp_path_factory):
    """Reads and writes past either end of any tensor, also those of no consequence, and results that nobody wrote."""
    wrong = run_guarded(tmp_path_factory, Path(__file__).parent / "guarded_cpu.py", "--all")
    assert wrong is None, wrong
