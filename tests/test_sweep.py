"""`benchmarks/sweep.py`: rows that can be told apart, differences that NaN does not hide, and no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sweep
import sweep_rows
import torch

from vitfast.kernels import linear, mlp

ROOT = Path(sweep.__file__).parents[1]


def test_without_a_gpu_it_does_not_say_so(tmp_path):
    out = tmp_path / "sweep.json"
    command = [sys.executable, ROOT / "benchmarks" / "sweep.py", "models", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and "no GPU" in done.stderr and not out.exists()


@pytest.mark.parametrize("name", sweep_rows.SETS)
def test_rows_or_variants_have_the_same_name(name, monkeypatch):
    for module in (linear, mlp):
        monkeypatch.setattr(module, "architecture", lambda device: 90)
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(sweep_rows, "DEVICE", torch.device("cpu"))
    rows = sweep_rows.SETS[name]()
    assert len({row.name for row in rows}) == len(rows) and all(len(row.names()) > 1 for row in rows)


@pytest.mark.parametrize(
    "found, difference",
    [((0.0, 0.0), 0.0), ((0.0, 3.0), 1.0), ((float("nan"), 0.0), float("nan")), ((0.0, float("nan")), float("nan"))],
)
def test_a_difference_is_lost_among_others(found, difference):
    expected = torch.tensor([3.0]), torch.tensor([3.0])
    results = tuple(e + f for e, f in zip(expected, found, strict=True))
    assert sweep.difference(results, expected) == pytest.approx(difference, nan_ok=True)


def test_a_row_of_the_record_has_neither_time_nor_reason():
    for path in (ROOT / "benchmarks" / "results" / "sweeps").glob("*.json"):
        data = json.loads(path.read_text())
        assert data["schema"] == sweep.SCHEMA and data["machine"]["commit"] and data["rows"]
        for name, variants in data["rows"].items():
            assert all("ms" in each or "failed" in each for each in variants.values()), name
            assert "ms" in next(iter(variants.values())), name
