"""The main job: `vitfast demo` in a process of its own, as a user runs it."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import vitfast
from vitfast.commands import demo as demo_module

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One real run. One thread: beside another test worker two would spend their time waiting for each other."""
    output = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "vitfast", "demo", "--output", str(output), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=850)
    assert run.returncode == 0, run.stdout + run.stderr
    return output, run, json.loads((output / "summary.json").read_text())


def test_it_learns_too_little(demo):
    _, run, summary = demo
    assert summary["accuracy"] >= 0.95
    assert f"Held-out accuracy: {summary['accuracy']:.2%}" in run.stdout
    assert len(summary["loss_per_epoch"]) == summary["epochs"] == demo_module.EPOCHS
    assert summary["loss_per_epoch"][-1] < 0.5 * summary["loss_per_epoch"][0]
    assert summary["accuracy_per_epoch"][-1] == pytest.approx(summary["accuracy"])


def test_progress_is_not_shown(demo):
    assert "100%" in demo[1].stderr


def test_checkpoint_is_not_the_trained_model(demo):
    output, _, summary = demo
    path = output / "digits.safetensors"
    model = vitfast.load_checkpoint(vitfast.ViT.from_config(vitfast.read_config(path)), path).eval()
    data = demo_module.load_digits(torch.device("cpu"))
    with torch.inference_mode():
        accuracy = (model(data.test_images).argmax(1) == data.test_labels).double().mean().item()
    assert accuracy == pytest.approx(summary["accuracy"], abs=1e-9)


def test_held_out_images_are_trained_on(demo):
    """80/20, every class in both parts, no image in both."""
    data = demo_module.load_digits(torch.device("cpu"))
    assert len(data.train_labels) == 1437 and len(data.test_labels) == 360
    assert len(data.test_labels.unique()) == len(data.train_labels.unique()) == 10
    seen = {image.numpy().tobytes() for image in data.train_images}
    assert not any(image.numpy().tobytes() in seen for image in data.test_images)


def test_parity_table_misses_a_stage_or_hides_an_error(demo):
    _, run, summary = demo
    depth = demo_module.DIGITS_MODEL["depth"]
    stages = {"patches", "patch_tokens", "tokens", "pooled", "logits"}
    stages |= {f"blocks.{i}.{half}" for i in range(depth) for half in ("attn", "mlp")}
    for dtype in ("fp32", "bf16"):
        rows = [row for row in summary["parity"] if row["dtype"] == dtype and row["model"].startswith("digits")]
        assert {row["stage"] for row in rows} == stages
        for row in rows:
            assert row["passed"] and 0 <= row["rel_rms_err"] < 0.1 and row["rel_rms_err_fp64"] < 1e-9, row
            assert f"{row['max_abs_err']:>9.1e}" in run.stdout


def test_speed_table_is_empty(demo):
    _, run, summary = demo
    modes = ["inference", "prepared", "training step", "inference", "prepared"]
    assert [row["mode"] for row in summary["speed"]] == modes
    for row in summary["speed"]:
        assert row["vitfast_ms"] > 0 and row["timm_ms"] > 0
        assert f"{row['ratio']:.2f}" in run.stdout
        assert ("over_model" in row) == (row["mode"] == "prepared")
        if "over_model" in row:
            assert f"{row['over_model'][1]:.2f} x the model's speed" in run.stdout


def test_line_of_what_to_try_next_does_not_work(demo):
    """All of them, as they were printed, in one shell and one Python."""
    _, run, _ = demo
    commands, lines = run.stdout.partition("\nNext, in a shell:\n")[2].split("\nand in Python:\n")
    assert len(commands.splitlines()) >= 2 and "vitfast info" in commands and "vitfast.prepare" in lines
    script = f"set -e\n{commands}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options = dict(capture_output=True, text=True, timeout=300, env=environment)
    shell = subprocess.run(["bash", "-c", script], **options)
    assert shell.returncode == 0, shell.stdout + shell.stderr
    for said in (f"vitfast {vitfast.__version__}", "dinov2"):
        assert said in shell.stdout
    python = subprocess.run([sys.executable, "-c", textwrap.dedent(lines)], **options)
    assert python.returncode == 0, python.stderr
    assert "blocks.2: norm2 + mlp + residual" in python.stdout and "tensor([[" in python.stdout


@pytest.fixture
def small_pair():
    """The digits model, and timm's with its weights."""
    torch.manual_seed(0)
    model = vitfast.create_model(demo_module.DIGITS_NAME, **demo_module.DIGITS_MODEL)
    return model, demo_module._timm_twin(demo_module.DIGITS_NAME, model, **demo_module.DIGITS_MODEL)


@pytest.mark.parametrize("wrong", ["intermediates", "forward"])
def test_prepared_model_that_is_wrong_is_timed(small_pair, wrong, monkeypatch):
    """In one stage, or only in what a call returns."""
    images = torch.randn(4, 1, 8, 8)
    assert demo_module.prepare_and_judge(*small_pair, images) is not None
    kind = type(vitfast.prepare(small_pair[0], threads=None))
    right = getattr(kind, wrong)
    spoilt = {
        "intermediates": lambda self, x: (taps := right(self, x)) | {"blocks.1.mlp": taps["blocks.1.mlp"] * 1.001},
        "forward": lambda self, x: right(self, x) * 1.001,
    }
    monkeypatch.setattr(kind, wrong, spoilt[wrong])
    with pytest.raises(demo_module.DemoError, match="the prepared model is less exact than timm's"):
        demo_module.prepare_and_judge(*small_pair, images)


def test_reason_why_nothing_was_prepared_is_not_told(small_pair, capsys):
    model, theirs = small_pair
    model.blocks[0].register_forward_hook(lambda *arguments: None)
    assert demo_module.prepare_and_judge(model, theirs, torch.randn(4, 1, 8, 8)) is None
    assert "not prepared: prepare: this model cannot be frozen: blocks.0 has" in capsys.readouterr().out


def test_picture_is_missing_or_half_of_it_is_blank_or_something_is_left_behind(demo):
    from matplotlib import image

    output, _, _ = demo
    picture = image.imread(output / "digits.png")[..., :3]
    height, width, _ = picture.shape
    assert height > 400 and width > 800
    # below the titles; of the digits nearly a third is ink, of axes without any nothing
    for half, ink in ((picture[height // 8 :, : width // 2], 0.01), (picture[height // 8 :, width // 2 :], 0.1)):
        assert (half.min(axis=2) < 0.5).mean() > ink
    assert sorted(p.name for p in output.iterdir()) == ["digits.png", "digits.safetensors", "summary.json"]


def test_digit_is_drawn_beside_what_was_predicted_of_another(tmp_path, monkeypatch):
    """Every cell's picture, title and colour; wrong predictions first, right ones after them."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (drawn.append(figure), open(path, "w").close()))
    data = demo_module.load_digits(torch.device("cpu"))
    predictions = data.test_labels.clone()
    wrong = [5, 9, 300]
    predictions[wrong] = (predictions[wrong] + 1) % 10
    demo_module.draw(tmp_path / "digits.png", demo_module.Training([1.0], [0.9], 1.0), data, predictions, 0.9)
    assert all(tick == int(tick) for tick in drawn[0].subfigs[0].axes[0].get_xticks()), "half an epoch"
    cells = drawn[0].subfigs[1].axes
    rows, columns = demo_module.SAMPLES
    assert len(cells) == rows * columns
    correct = [i for i in range(360) if i not in wrong]
    for cell, i in zip(cells, wrong + correct, strict=False):
        (picture,) = cell.images
        assert (picture.get_array() == data.test_images[i, 0].numpy()).all()
        hit = i not in wrong
        assert cell.get_title() == f"{predictions[i]} ({data.test_labels[i]})" + ("" if hit else " wrong")
        assert cell.title.get_color() == ("black" if hit else "red")


@pytest.mark.parametrize("enough", [False, True])
def test_shorter_training_fails_or_accuracy_of_the_default_one_is_not_judged(enough, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_module, "EPOCHS", 1 if enough else 2)
    for slow in ("compare_with_timm", "time_against_timm"):
        monkeypatch.setattr(demo_module, slow, lambda *arguments: [])
    assert demo_module.main(["--epochs", "1", "--device", "cpu", "--output", str(tmp_path)]) == enough
    out, err = capsys.readouterr()
    assert ("; at least 95% expected)" if enough else "; nothing expected of fewer than 2 epochs)") in out
    assert ("at least 95% was expected" in err) == enough


def test_missing_extra_is_a_traceback(tmp_path):
    code = (
        "import sys; sys.modules['sklearn'] = sys.modules['timm'] = None\n"
        "from vitfast.commands import demo; sys.exit(demo.main(['--output', sys.argv[1]]))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert run.returncode == 2
    assert "scikit-learn" in run.stderr and "timm" in run.stderr and "pip install 'vitfast[demo]'" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [["--epochs", "0"], ["--device", "abacus"], ["--output", __file__]])
def test_wrong_use_is_a_traceback(wrong, capsys):
    assert demo_module.main(wrong) == 2
    assert wrong[0] in capsys.readouterr().err
