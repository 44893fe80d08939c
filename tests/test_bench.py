"""The benchmarks run, and what is wrong or fails gets no time."""

import json
import subprocess
import sys
from pathlib import Path

import bench_cpu
import pytest
import torch
from shared import TOLERANCE

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script, *arguments):
    # one thread: several wait for each other, which takes forever on a busy machine
    command = [sys.executable, BENCHMARKS / script, "--quick", "--threads", "1", "--models", "test_vit", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "table, dtypes",
    [("patch", ["fp32", "bf16"]), ("growth", ["bf16"]), ("gelu", ["fp32", "bf16"])],
)
def test_a_table_of_bench_cpu_no_longer_runs_or_times_a_wrong_result(table, dtypes, tmp_path):
    run("bench_cpu.py", "--only", table, "--batches", "1", "--dtypes", *dtypes, "--out", str(tmp_path))
    (file,) = tmp_path.iterdir()
    rows = json.loads(file.read_text())[table]
    assert rows and {row["dtype"] for row in rows} == set(dtypes)
    for row in rows:
        for name, variant in row["variants"].items():
            assert variant["ms"] > 0, (name, variant)
            assert variant["error"] <= TOLERANCE[row["dtype"]], (name, variant)


def test_a_wrong_or_failing_variant_is_timed_or_stops_the_run():
    right = torch.ones(8)
    timed = []

    def fails():
        raise RuntimeError("first line\nsecond line")

    def counted(name, result):
        return lambda: lambda: (timed.append(name), result)[1]

    builders = {
        "timm": counted("timm", right),
        "right": counted("right", right),
        "wrong": counted("wrong", right * 1.001),
        "nan": counted("nan", right * torch.nan),
        "one of them": counted("one of them", right[:1]),
        "fails": fails,
    }
    row, result = bench_cpu.measure(builders, right, "fp32", 0.01)
    assert set(result.median_ms) == {"timm", "right"}
    assert timed.count("wrong") == timed.count("nan") == 1
    assert all("ms" not in row["variants"][name] for name in ("wrong", "nan", "one of them", "fails"))
    assert row["variants"]["fails"]["not_timed"] == "RuntimeError: first line"
    json.dumps(row)


def test_times_without_the_baseline():
    builders = {"timm": lambda: lambda: torch.zeros(8), "vitfast": lambda: lambda: torch.ones(8)}
    row, result = bench_cpu.measure(builders, torch.ones(8), "fp32", 0.01)
    assert result is None and "not_timed" in row["variants"]["timm"]
    assert list(bench_cpu.gelu_lines({"job": "MLP", "shape": [8]} | row))
