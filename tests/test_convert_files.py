"""`vitfast.convert` and `save_as`: files with other bits, half written, mixed, or in place of others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_convert import equal
from test_convert_same import fields, timms
from test_load import filled

import vitfast
from vitfast.loading import convert as module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, "mixed"], ids=str)
def test_dtype_or_bits_of_a_weight_change(dtype, tmp_path):
    state = timms(img_size=32)[0].double().state_dict()
    draw = lambda name: torch.bfloat16 if "mlp" in name else torch.float32  # noqa: E731
    state = {name: w.to(draw(name) if dtype == "mixed" else dtype) for name, w in state.items()}
    # not what other numbers become
    state["norm.bias"][:3] = torch.tensor([-0.0, float("inf"), 1e-7])
    save_file(state, tmp_path / "in.safetensors")
    options = dict(heads=3, activation="gelu", norm_eps=1e-6)
    with pytest.warns(UserWarning, match="norm.bias"):
        for step, (source, to) in enumerate([("in.safetensors", "hf"), ("0", "timm"), ("1", "hf")]):
            vitfast.convert(tmp_path / source, tmp_path / str(step), to, **options)
        vitfast.convert(tmp_path / "2", tmp_path / "out.safetensors", **options)
        as_ = vitfast.convert(tmp_path / "2", tmp_path / "v.safetensors", "vitfast", **options)
    assert as_.not_finite == ("norm.bias",)
    for name in ("out.safetensors", "v.safetensors"):
        found = load_file(tmp_path / name)
        assert equal(found, state)
        assert all(w.view(torch.uint8).equal(state[key].view(torch.uint8)) for key, w in found.items())


def test_dtype_that_was_asked_for_is_not_taken(tmp_path):
    theirs, _ = timms(img_size=32)
    vitfast.convert(theirs, tmp_path / "m.safetensors", dtype=torch.bfloat16)
    assert equal(load_file(tmp_path / "m.safetensors"), {k: w.bfloat16() for k, w in theirs.state_dict().items()})


def test_changes_that_were_asked_for_are_not_written(tmp_path):
    theirs, _ = timms(img_size=32)
    report = vitfast.convert(theirs, tmp_path / "m", num_classes=7, image_size=48, channels=1)
    ours = vitfast.load(theirs, num_classes=7, image_size=48, channels=1)
    assert equal(load_file(tmp_path / "m" / "model.safetensors"), ours.state_dict())
    assert "classifier: a new one" in str(report) and "channels 1 in place of 3" in str(report)
    found = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    assert equal(found.state_dict(), ours.state_dict())


def test_model_is_saved_as_it_was_before_it_was_changed(tmp_path):
    model = vitfast.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5)
    model.reset_classifier(3)
    vitfast.save_as(filled(model).bfloat16(), tmp_path / "m", "hf")
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert found["classifier.weight"].shape == (3, 192) and found["classifier.weight"].dtype == torch.bfloat16
    assert torch.equal(found["classifier.weight"], model.head.weight)
    with pytest.raises(TypeError, match="model must be a vitfast.ViT, got Linear"):
        vitfast.save_as(torch.nn.Linear(2, 2), tmp_path / "x")


def test_config_in_our_own_file_is_lost(tmp_path):
    model = filled(vitfast.ViT.from_config(fields(norm_eps=1e-4, pool="mean", activation="quick_gelu")))
    vitfast.convert(model, tmp_path / "m.safetensors", "vitfast")
    assert vitfast.read_config(tmp_path / "m.safetensors") == model.config
    assert equal(vitfast.load(tmp_path / "m.safetensors").state_dict(), model.state_dict())


WRONG = [
    (
        dict(out="m", to="keras"),
        ValueError,
        "to must be one of vitfast, timm, hf, vit_pytorch, torchvision, got 'keras'",
    ),
    (dict(out="m.pth", to="hf"), ValueError, "out must be a folder for to='hf', got .*m.pth"),
    (dict(out="m", to="torchvision"), ValueError, r"out must end in \.safetensors.* for to='torchvision', got .*m'"),
    (dict(out="m.pth", to="vitfast"), ValueError, r"out must end in \.safetensors for to='vitfast'"),
    (dict(out="no/m", to="timm"), FileNotFoundError, "no folder .*no'"),
    (dict(out="there.pth", to="timm"), FileExistsError, "there.pth' is there; force=True"),
    (dict(out="folder", to="timm"), FileExistsError, "folder' is there; force=True"),
    (dict(out="folder.pth", to="timm", force=True), ValueError, "out must be a file, got the folder"),
    (dict(out="file", to="timm", force=True), ValueError, "out must be a folder, got the file"),
]


@pytest.mark.parametrize(("given", "kind", "said"), WRONG, ids=str)
def test_wrong_use_is_accepted_or_leaves_something(given, kind, said, tmp_path):
    (tmp_path / "there.pth").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.pth").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=said):
        vitfast.convert(vitfast.ViT.from_config(fields()), **given | {"out": tmp_path / given["out"]})
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "there.pth").read_text() == "mine"


@pytest.mark.parametrize("out", ["m", "m.safetensors", "m.pth"])
def test_force_mixes_old_and_new_or_leaves_something(out, tmp_path):
    one, other = (filled(vitfast.ViT.from_config(fields(depth=depth))) for depth in (1, 2))
    vitfast.save_as(one, tmp_path / out)
    if out == "m":
        (tmp_path / out / "pytorch_model.bin.index.json").write_text("{}")
    vitfast.save_as(other, tmp_path / out, force=True)
    assert equal(vitfast.load(tmp_path / out, heads=2, allow_pickle=True).state_dict(), other.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == [out]
    if out == "m":
        assert {path.name for path in (tmp_path / out).iterdir()} <= {"model.safetensors", "config.json"}


def fails(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("out", ["m", "m.safetensors", "m.pth"])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("where", ["save", "replace", "rename"])
def test_failure_leaves_half_of_it_or_takes_what_was_there(out, force, where, tmp_path, monkeypatch):
    one, other = (filled(vitfast.ViT.from_config(fields(depth=depth))) for depth in (1, 2))
    if force:
        vitfast.save_as(one, tmp_path / out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    real = os.rename
    if where == "save":
        # after a part of it
        half = lambda *a, **k: (Path(a[1]).write_bytes(b"half"), fails())  # noqa: E731
        monkeypatch.setattr(module, "save_file", half)
        monkeypatch.setattr(module.torch, "save", half)
    elif where == "replace":
        # as on a file system without links
        monkeypatch.setattr(module.os, "link", fails)
        monkeypatch.setattr(module.os, "replace", fails)
        monkeypatch.setattr(module.os, "rename", fails)
    else:
        to_out = lambda a, b: fails() if Path(b).name == out and ".tmp" in str(a) else real(a, b)  # noqa: E731
        monkeypatch.setattr(module.os, "rename", to_out)
        # as on a file system without links
        monkeypatch.setattr(module.os, "link", fails)
        monkeypatch.setattr(module.os, "replace", fails)
    with pytest.raises(OSError):
        vitfast.save_as(other, tmp_path / out, force=force)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == [out] * force


TWICE = """
import sys, torch, vitfast
value = float(sys.argv[2])
model = vitfast.ViT.from_config(vitfast.ViTConfig(image_size=32, patch_size=8, num_classes=5, dim=64, depth=3, heads=2))
for parameter in model.parameters():
    parameter.data.fill_(value)
print("ready", flush=True)
for line in sys.stdin:
    name, force, times = line.split()
    for _ in range(int(times)):
        try:
            vitfast.save_as(model, f"{sys.argv[1]}/{name}", force=bool(int(force)))
            print("wrote", end=" ")
        except FileExistsError:
            print("refused", end=" ")
    print(flush=True)
"""
# name, whether by force, how often
RACES = [
    ("m", 0, 1),
    ("m.safetensors", 0, 1),
    ("m.pth", 0, 1),
    ("m.safetensors", 0, 1),
    ("m", 1, 15),
    ("m.safetensors", 1, 15),
    ("m.pth", 1, 15),
]


def test_two_processes_leave_a_mixture(tmp_path):
    values = (1.0, 2.0)
    arguments = [[sys.executable, "-c", TWICE, str(tmp_path), str(value)] for value in values]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen(given, **pipes) for given in arguments]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for name, force, times in RACES * 2:
        for process in both:
            process.stdin.write(f"{name} {force} {times}\n")
            process.stdin.flush()
        said = [process.stdout.readline().split() for process in both]
        assert all(len(each) == times for each in said), [process.communicate()[1] for process in both]
        assert [path.name for path in tmp_path.iterdir()] == [name], (name, force)
        # of two who write the same folder by force one may be told that the other was faster
        assert force or sorted([*said[0], *said[1]]) == ["refused", "wrote"]
        assert {*said[0], *said[1]} <= ({"wrote", "refused"} if name == "m" or not force else {"wrote"})
        state = vitfast.load(tmp_path / name, heads=2, allow_pickle=True).state_dict()
        assert any(all((w == value).all() for w in state.values()) for value in values)
        shutil.rmtree(tmp_path / name) if name == "m" else (tmp_path / name).unlink()
    assert [process.communicate() for process in both] == [("", "")] * 2


def test_file_system_without_links_has_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module.os, "link", fails)
    model = filled(vitfast.ViT.from_config(fields()))
    vitfast.save_as(model, tmp_path / "m.pth")
    assert torch.equal(torch.load(tmp_path / "m.pth", weights_only=True)["cls_token"], model.cls_token)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pth"]


def test_file_has_another_mode_than_a_new_one_or_no_format(tmp_path):
    (tmp_path / "new").touch()
    model = vitfast.ViT.from_config(fields())
    for out, to in (("m", "hf"), ("m.safetensors", "timm"), ("v.safetensors", "vitfast"), ("m.pth", "timm")):
        vitfast.save_as(model, tmp_path / out, to)
        file = tmp_path / out / "model.safetensors" if out == "m" else tmp_path / out
        assert file.stat().st_mode == (tmp_path / "new").stat().st_mode, out
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                # transformers reads no file without it
                assert opened.metadata()["format"] == "pt"


@pytest.mark.parametrize("to", ["timm", "hf"])
def test_source_is_read_from_where_it_is_written(to, tmp_path):
    """With force onto itself: its tensors are views of the file."""
    theirs, _ = timms(img_size=32)
    vitfast.convert(theirs, tmp_path / "m", "timm")
    before = vitfast.load(tmp_path / "m").state_dict()
    vitfast.convert(tmp_path / "m", tmp_path / "m", to, force=True)
    assert equal(vitfast.load(tmp_path / "m").state_dict(), before)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
