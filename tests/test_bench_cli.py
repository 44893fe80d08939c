"""`vitfast bench`: its table and files, its exit status, and that a user error is one line."""

import importlib.util
import json

import pytest

from benchmarks.core import cli, models, op_case, ops
from vitfast.check import acceptance


def run_cli(capsys, *arguments):
    status = cli.main([*arguments, "--device", "cpu"])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_command_prints_no_table_or_runs_again_what_is_there(tmp_path, capsys, monkeypatch):
    # so few numbers are nearer to the truth or further off by luck, and by the CPU; the rule has tests of its own
    monkeypatch.setattr(acceptance, "accept", lambda *_, **__: None)
    file = tmp_path / "rows.json"
    # the one op without a compiler among its rivals
    quick = ["--op", "attention", "--tiny", "--batches", "1", "--dtypes", "fp32"]
    quick += ["--seconds", "0", "--ceilings", "0"]
    status, out, err = run_cli(capsys, *quick, "--json", str(file), "--csv", str(tmp_path / "table.csv"))
    assert status == 0, err
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert all(any(name in line for line in table) for name in ("SDPA packed", "vitfast", "flash-attn 3"))
    rows = json.loads(file.read_text())["rows"]
    assert [row["mode"] for row in rows] == list(op_case.MODES)
    assert all(row["variants"]["vitfast"]["ms"] > 0 for row in rows)
    assert list(tmp_path.glob("table*.csv"))

    status, out, _ = run_cli(capsys, *quick, "--resume", str(file))
    assert status == 0 and "SDPA packed" in out
    assert json.loads(file.read_text())["rows"] == rows
    status, _, err = run_cli(capsys, *quick, "--json", str(file))
    assert status == 2 and "--resume" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "give --op"),
        ("--op softmax", "softmax is not among attention"),
        ("--op mlp --modes training", "training is not among forward"),
        ("--op mlp --dtypes fp8", "fp8 is not among fp32"),
        ("--op mlp --batches 0", "batch must be an int of at least 1, got 0"),
        ("--op patch_embed --tokens 5", "197"),
        ("--model no_such_model", "no_such_model"),
        ("--model vit_tiny_patch16_224 --image-size 30", "image_size"),
        ("--op mlp --resume no_folder/../rows.json --json rows.json", "only one"),
        ("--op mlp --seconds -1", "--seconds must be 0 or more"),
    ],
)
def test_wrong_use_of_the_command_is_not_explained(arguments, message, capsys):
    status, out, err = run_cli(capsys, *arguments.split())
    assert status == 2 and not out and message in err and len(err.splitlines()) == 1


def test_the_list_leaves_out_an_op_or_a_rival(capsys):
    status, out, _ = run_cli(capsys, "--list")
    assert status == 0
    assert all(name in out for name in (*ops.FACTORIES, *models.VITS, *models.CNNS, *cli.PACKAGES.values()))


def test_a_cnn_without_timm_ends_in_a_traceback(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else real(name))
    status, _, err = run_cli(capsys, "--model", "resnet50")
    assert status == 2 and "pip install timm" in err


ROW = {
    "name": "mlp", "mode": "forward", "shape": {"tokens": 197, "width": 768}, "batch": 8, "dtype": "bf16",
    "autocast": False, "baseline": "eager", "noise_25": 0.98, "noise_75": 1.02, "rounds": 8, "noisy": 3, "others": 0.2,
    "variants": {
        "eager": {"ms": 2.0, "ms_20": 1.9, "ms_80": 2.1, "accepted": True, "error_ratio": 1.0, "compile_s": 0.1},
        "vitfast": {
            "ms": 1.0, "ms_20": 0.9, "ms_80": 1.1, "ratio": 2.0, "ratio_25": 1.9, "ratio_75": 2.1, "graph": True,
            "accepted": True, "error_ratio": 0.9, "tflops": 12.0, "gbps": 34.0, "percent": 56.0, "limit": "memory",
        },
        "close": {
            "ms": 2.0, "ms_20": 1.9, "ms_80": 2.1, "ratio": 1.01, "ratio_25": 0.99, "ratio_75": 1.03,
            "within_noise": True, "accepted": False, "error_ratio": 4.0, "host_bound": True, "compile_s": 40.0,
        },
        "apart": {"ms": 1.5, "accepted": None, "error_ratio": None},
        "broken": {"not_timed": "RuntimeError: a | b"},
        "missing": {"absent": "liger_kernel is not installed"},
    },
}  # fmt: skip


def test_the_table_hides_noise_a_wrong_result_or_a_reason():
    table = list(cli.lines(ROW))
    assert {line.count("|") for line in table} == {cli.HEADER.count("|")}
    eager, ours, close, apart, broken, missing = table
    assert "1 (noise 0.98-1.02)" in eager and "3 of 8 rounds noisy" in eager and "20% of the CPUs" in eager
    assert "| 1 (0.9-1.1) | 2.00 (1.90-2.10) | 12 | 34 | 56 (memory) | 0.90 | graph |" in ours
    assert "~1.01 (0.99-1.03)" in close and "not accepted, bound by the host, ready after 40 s" in close
    assert "1.5" in apart and "not checked" in apart
    assert "RuntimeError: a / b" in broken and "liger_kernel is not installed" in missing
