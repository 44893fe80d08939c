"""benchmarks/launches.py: what starting kernels costs the host, on a driver that is made up."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import launches

ROOT = Path(__file__).parents[1]


def test_a_call_by_plan_starts_less_or_costs_the_host_as_much():
    command = [sys.executable, "-m", "benchmarks.launches", "--tokens", "5", "--dim", "64"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {line[:18].strip(): line[18:].split() for line in done.stdout.splitlines()[1:]}
    started = {name: int(row[0]) for name, row in rows.items()}
    expected = {"layer_norm": 1, "linear, norm": 3, "linear, residual": 1, "mlp": 4, "attention_qkv": 1}
    assert started == expected | {"folded_linear": 1, "added_linear": 1}
    for name, (_, planned, alone, _) in rows.items():
        assert float(planned) < 0.8 * float(alone), (name, planned, alone)


@pytest.mark.parametrize("given", (["--tokens", "0"], ["--dim", "100"]))
def test_sizes_that_no_model_has_are_measured(given, capsys):
    with pytest.raises(SystemExit):
        launches.main(given)
    assert "a multiple of 64, got" in capsys.readouterr().err
