"""The main job: `vitfast demo` in a process of its own, as a user runs it."""

import json
import os
import subprocess
import sys

import pytest
import torch

import vitfast
from vitfast.demo import MODEL


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One real run. One thread: beside another test worker two would spend their time waiting for each other."""
    output = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "vitfast.cli", "demo", "--output", str(output), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr
    return output, run, json.loads((output / "summary.json").read_text())


def test_it_learns_too_little_or_takes_too_long(demo):
    _, run, summary = demo
    assert summary["accuracy"] >= 0.95
    assert f"{100 * summary['accuracy']:.2f} %" in run.stdout
    assert len(summary["curve"]) == summary["epochs"]
    assert summary["curve"][-1]["loss"] < 0.5 * summary["curve"][0]["loss"]


def test_progress_is_not_shown(demo):
    _, run, _ = demo
    assert "training: 100%" in run.stderr


def test_checkpoint_is_not_the_trained_model(demo):
    output, _, summary = demo
    model = vitfast.create_model("vit_tiny_patch16_224", **MODEL).eval()
    vitfast.load_checkpoint(model, output / "digits.safetensors")
    from vitfast.demo import load_digits

    data = load_digits(0, "cpu")
    with torch.inference_mode():
        accuracy = (model(data["test_x"]).argmax(1) == data["test_y"]).float().mean().item()
    assert accuracy == pytest.approx(summary["accuracy"], abs=1e-6)


def test_parity_table_misses_a_stage_or_hides_an_error(demo):
    _, run, summary = demo
    stages = {"patch_tokens", "tokens", "pooled", "logits"}
    stages |= {f"blocks.{i}.{half}" for i in range(MODEL["depth"]) for half in ("attn", "mlp")}
    for dtype, eps in (("float32", 2**-23), ("bfloat16", 2**-7)):
        rows = {row["stage"]: row for row in summary["parity"] if row["dtype"] == dtype}
        assert set(rows) == stages
        for row in rows.values():
            assert row["rel_rms"] <= 1.25 * row["timm_rel_rms"] + 0.1 * eps, row
            assert f"{row['max_abs']:.1e}" in run.stdout


def test_speed_table_is_empty(demo):
    _, run, summary = demo
    assert len(summary["speed"]) == 3
    for row in summary["speed"]:
        assert row["vitfast_ms"] > 0 and row["timm_ms"] > 0
        assert f"{row['ratio']:.3f}" in run.stdout


def test_picture_is_missing_or_blank(demo):
    from matplotlib import image

    output, _, _ = demo
    picture = image.imread(output / "digits.png")
    assert picture.shape[0] > 400 and picture.shape[1] > 1000
    assert picture[..., :3].std() > 0.05
    assert sorted(p.name for p in output.iterdir()) == ["digits.png", "digits.safetensors", "summary.json"]


def test_missing_extra_is_a_traceback(tmp_path):
    code = (
        "import importlib.util as u, sys; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('sklearn', 'timm') else real(name, *a)\n"
        "from vitfast import demo; sys.exit(demo.main(['--output', sys.argv[1]]))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert run.returncode == 2
    assert "scikit-learn, timm: pip install 'vitfast[demo]'" in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()
