"""`python -m benchmarks`: what it prints and keeps, its exit status, and that a user error is one line."""

import contextlib
import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from benchmarks.core import harness, models, ops, patched
from vitfast.check import acceptance
from vitfast.measure.machine import ROOT


def run_cli(capsys, kind, *arguments):
    status = program.main([kind, *arguments, "--device", "cpu"])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_command_prints_no_table_or_runs_again_what_is_there(tmp_path, capsys, monkeypatch):
    # so few numbers are nearer to the truth or further off by luck, and by the CPU; the rule has tests of its own
    monkeypatch.setattr(acceptance, "accept", lambda *_, **__: None)
    file = tmp_path / "rows.json"
    # the one op without a compiler among its rivals
    quick = ["ops", "attention", "--tiny", "--batches", "1", "--dtypes", "fp32", "--seconds", "0", "--ceilings", "0"]
    status, out, err = run_cli(capsys, *quick, "--out", str(file))
    assert status == 0, err
    said = [line for line in out.splitlines() if line.startswith("  ")]
    assert all(any(name in line for line in said) for name in ("SDPA packed", "vitfast", "flash-attn 3"))
    rows = json.loads(file.read_text())["rows"]
    assert [row["mode"] for row in rows] == list(ops.MODES)
    assert all(row["variants"]["vitfast"]["ms"] > 0 for row in rows)

    status, out, _ = run_cli(capsys, *quick, "--out", str(file))
    assert status == 0 and "SDPA packed" in out
    assert json.loads(file.read_text())["rows"] == rows


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("ops softmax", "softmax is not among attention"),
        ("ops patch_embed --tokens 5", "197"),
        ("ops mlp --device tpu", "tpu"),
        ("patch keras", "keras is not among timm, hugging-face, torchvision, vit-pytorch"),
        ("patch torchvision --image-size 30", "image_size"),
        ("models no_such_model", "no_such_model"),
        ("models vit_tiny_patch16_224 --image-size 30", "image_size"),
        ("models resnet50 --autocast --dtypes fp32", "--dtypes must name bf16 or fp16, got fp32 alone"),
        ("ops mlp --seconds nan", "--seconds must be at least 0 and finite, got nan"),
        ("ops mlp --budget -1", "--budget must be at least 0 and finite, got -1"),
        ("ops mlp --out rows.json", "rows.json: not a record"),
        ("ops attention --tiny --budget 0 --ceilings 0 --out rows.json/more", "rows.json"),
    ],
)
def test_wrong_use_of_the_command_is_not_explained(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text("no record")
    kind, *rest = arguments.split()
    status = program.main([kind, "--device", "cpu", *rest])
    out, err = capsys.readouterr()
    assert status == 2 and not out and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "wrong", ["", "bench", "ops --modes training", "models --dtypes fp8", "ops mlp --batches 0", "patch --sizes L"]
)
def test_unknown_word_is_taken(wrong, capsys):
    with pytest.raises(SystemExit) as exit_:
        program.main(wrong.split())
    assert exit_.value.code == 2 and "usage: python -m benchmarks" in capsys.readouterr().err


def test_help_leaves_out_an_op_or_a_program(capsys):
    for words, names in (
        (["ops", "-h"], ops.FACTORIES),
        (["models", "-h"], [models.VIT_PYTORCH]),
        (["patch", "-h"], patched.FAMILIES),
        (["-h"], program.PROGRAMS),
    ):
        with pytest.raises(SystemExit) as exit_:
            program.main(words)
        assert exit_.value.code == 0
        # argparse breaks lines at spaces and after hyphens
        said = "".join(capsys.readouterr().out.split())
        assert all(name in said for name in names)


WRONG = [
    ("benchmarks.gpu.run", ["quick"], "invalid choice: 'quick'"),
    ("benchmarks.gpu.run", ["profile", "--minutes", "nan"], "--minutes must be more than 0, got nan"),
    ("benchmarks.gpu.run", ["profile", "--minutes", "0"], "--minutes must be more than 0, got 0.0"),
    ("benchmarks.gpu.defaults", ["--dry"], "--dry"),
    ("benchmarks.gpu.profile", ["fc2"], "invalid choice: 'fc2'"),
    ("benchmarks.gpu.profile", [], "kernel"),
    ("benchmarks.roofline", ["--bach", "1"], "--bach"),
    ("benchmarks.host", ["--rounds", "0"], "--rounds must be at least 1, got 0"),
    ("benchmarks.aot", ["--only", "softmax"], "--only must be in the key of a configuration, got 'softmax'"),
    ("benchmarks.aot", ["--all"], "--all"),
]


@pytest.mark.parametrize("module, given, message", WRONG)
def test_wrong_argument_is_taken_or_usage_names_what_cannot_be_run(module, given, message, capsys):
    """Another kernel is profiled, nothing is compared and nothing differs; `run.py` for what only -m starts."""
    with contextlib.suppress(ModuleNotFoundError):
        module = importlib.import_module(f"{module}.__main__").__name__
    try:
        status = importlib.import_module(module).main(given)
    except SystemExit as exit_:
        status = exit_.code
    out, err = capsys.readouterr()
    assert status == 2 and not out and message in err
    assert "usage" not in err or f"usage: python -m {module.removesuffix('.__main__')} " in err


@pytest.mark.parametrize("given, status", [("-h", 0), ("gpu", 2)])
def test_asking_the_report_for_help_writes_the_pages(given, status, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", given])
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: pytest.fail("a page is written"))
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("benchmarks.report", run_name="__main__")
    said = capsys.readouterr()
    assert exit_.value.code == status and "usage: python -m benchmarks.report " in said.out + said.err


def test_a_cnn_without_timm_ends_in_a_traceback(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    status, _, err = run_cli(capsys, "models", "resnet50")
    assert status == 2 and "timm" in err and len(err.splitlines()) == 1


def test_a_checkout_cannot_run_it():
    run = subprocess.run([sys.executable, "-m", "benchmarks", "-h"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "ops" in run.stdout, run.stderr


ROW = {
    "key": "op/mlp/forward/tokens197 width768/batch 8/bf16", "baseline": "eager",
    "noise_25": 0.98, "noise_75": 1.02, "rounds": 8, "noisy": 3, "others": 0.2,
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


def test_a_row_hides_noise_a_wrong_result_or_a_reason():
    eager, ours, close, apart, broken, missing = (said for _, said in harness.of_variants(ROW))
    assert eager.startswith("2 ms (1.9-2.1), noise 0.98-1.02") and "[3 of 8 rounds noisy]" in eager
    assert "[20% of the CPUs used by others]" in eager
    assert ours == "1 ms (0.9-1.1), 2.00x (1.90-2.10), 56 % of memory, error 0.90 [graph]"
    assert ", ~1.01x (0.99-1.03)" in close and "[not accepted] [bound by the host] [ready after 40 s]" in close
    assert apart == "1.5 ms [not checked]"
    assert broken == "RuntimeError: a | b" and missing == "liger_kernel is not installed"
    assert harness.summary(ROW).count("; ") == 5
