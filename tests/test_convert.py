"""`vitfast.convert` and `save_as`: files that their library does not read, or reads as another model; half of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hf_pair
import pytest
import timm
import timm_pair
import torch
import transformers
import vit_pytorch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_load import DINOV2, HUGGING_FACE, SMALL, filled
from torchvision.models import VisionTransformer

import vitfast
from vitfast.loading import convert as module

transformers.utils.logging.disable_progress_bar()
TIMM = (
    "vit", "distilled", "deit3", "dinov2_reg4", "siglip_gap", "clip", "beit3", "reg4_gap", "eva_gap", "no_positions",
    "qk_norm", "test_vit", "test_vit2", "test_vit3", "test_vit4",
)  # fmt: skip
WIDE = {"eva_gap", "siglip_gap", "clip", "beit3"}


def equal(one, other):
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def timms(family="vit", **changes):
    name, keywords = timm_pair.names_of(family, **changes)
    model = timm.create_model(name, **keywords)
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    return timm_pair.make_trained_like(model, images).eval(), images


def torchvisions(**changes):
    sizes = dict(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=96, num_classes=10)
    return filled(VisionTransformer(**sizes | changes), 0.3), torch.randn(2, 3, 32, 32)


def vit_pytorchs(**changes):
    sizes = dict(image_size=32, patch_size=8, num_classes=10, dim=96, depth=2, heads=3, mlp_dim=160, dim_head=32)
    return filled(vit_pytorch.ViT(**sizes | changes), 0.3), torch.randn(2, 3, 32, 32)


def hugging_faces(name="ViT", **changes):
    return hf_pair.build(name, train=False, **changes)


def marked(names, wide):
    return [pytest.param(name, marks=[pytest.mark.full] * (name in wide)) for name in names]


@pytest.mark.parametrize("family", marked(TIMM, WIDE))
@torch.no_grad()
def test_timm_reads_another_model(family, tmp_path):
    theirs, images = timms(family)
    vitfast.convert(theirs, tmp_path / "m")
    found = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    equal(found.state_dict(), theirs.state_dict())
    assert torch.equal(found(images), theirs(images))
    again = vitfast.load(tmp_path / "m")
    equal(again.state_dict(), theirs.state_dict())
    rates = dict.fromkeys(
        ("emb_dropout", "attn_dropout", "proj_dropout", "mlp_dropout", "head_dropout", "drop_path"), 0.0
    )
    assert again.config.replace(**rates, layer_scale=None) == vitfast.load(theirs).config.replace(
        **rates, layer_scale=None
    )


def test_timms_preprocessing_or_labels_are_lost(tmp_path):
    names = [f"class {i}" for i in range(10)]
    cfg = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), interpolation="bilinear", crop_pct=0.95, label_names=names)
    theirs = timm.create_model("test_vit", num_classes=10, pretrained_cfg_overlay=cfg)
    vitfast.convert(theirs, tmp_path / "m")
    found = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    expected = timm.data.resolve_data_config(model=theirs)
    assert timm.data.resolve_data_config(model=found) == expected and expected["mean"] == cfg["mean"]
    assert list(found.pretrained_cfg["label_names"]) == names
    vitfast.convert(tmp_path / "m", tmp_path / "hf", "hf", norm_eps=1e-12)
    told = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert [told.id2label[i] for i in range(10)] == names and told.label2id["class 3"] == 3
    images = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert tuple(images.image_mean) == cfg["mean"] and tuple(images.image_std) == cfg["std"] and images.resample == 2


def test_model_that_timm_has_no_name_for_is_said_to_have_one(tmp_path):
    theirs, _ = hugging_faces("ViT", layer_norm_eps=1e-3)
    report = vitfast.convert(theirs, tmp_path / "m")
    assert "config.json is not written" in str(report)
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("family", HUGGING_FACE)
@torch.no_grad()
def test_hugging_face_reads_another_model(family, tmp_path):
    build, (theirs_gives, _) = HUGGING_FACE[family]
    theirs = filled(build(), 0.3)
    vitfast.convert(theirs, tmp_path / "m", "hf")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    kind = getattr(transformers, written["architectures"][0])
    found, info = kind.from_pretrained(tmp_path / "m", output_loading_info=True)
    # of ViTModel's pooler, which its tokens do not go through, nothing is kept
    assert {name for name in info["missing_keys"] if not name.startswith("pooler.")} == set()
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(theirs_gives(found.eval()(images)), theirs_gives(theirs(images)))
    equal(vitfast.load(tmp_path / "m").state_dict(), vitfast.load(theirs).state_dict())


@pytest.mark.parametrize("name", ["ViT", "ViT gelu_new", "ViT quick_gelu", "ViT no biases", "DeiT"])
@torch.no_grad()
def test_classifier_of_hugging_face_is_another(name, tmp_path):
    """By the Auto class, from files that it saved, with massive activations."""
    theirs, images = hugging_faces(name)
    theirs.save_pretrained(tmp_path / "in")
    vitfast.convert(tmp_path / "in", tmp_path / "m", "hf")
    found = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "m")
    assert torch.equal(found(images).logits, theirs(images).logits)
    equal(load_file(tmp_path / "m" / "model.safetensors"), load_file(tmp_path / "in" / "model.safetensors"))


def test_backbone_of_a_classifier_of_dinov2_is_another(tmp_path):
    theirs, images = hugging_faces("registers")
    with pytest.raises(NotImplementedError, match="num_classes=0"):
        vitfast.convert(theirs, tmp_path / "m", "hf")
    vitfast.convert(theirs, tmp_path / "m", "hf", num_classes=0)
    found = transformers.AutoModel.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        expected = theirs.dinov2_with_registers(images).last_hidden_state
        out = found(images).last_hidden_state
    # its class token's position is added beforehand, so that one sum of two numbers is rounded elsewhere
    assert (out - expected).norm() <= 1e-6 * expected.norm()


CLIP = {name: value for name, value in SMALL.items()} | {"projection_dim": 12}
TOWERS = {
    "CLIP": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP)),
    "CLIP projected": lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**CLIP)),
    "SigLIP": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL)),
}


@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_tower_is_read_as_another(tower, tmp_path):
    theirs = filled(TOWERS[tower](), 0.3)
    vitfast.convert(theirs, tmp_path / "m", "hf")
    found, info = type(theirs).from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    equal(found.state_dict(), theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    (one, other) = (model.eval()(images) for model in (found, theirs))
    assert all(torch.equal(one[name], other[name]) for name in other if isinstance(other[name], torch.Tensor))


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@torch.no_grad()
def test_torchvision_reads_another_model(ending, tmp_path):
    theirs, images = torchvisions()
    file = tmp_path / f"m{ending}"
    vitfast.convert(theirs, file, "torchvision")
    state = torch.load(file, weights_only=True) if ending == ".pth" else load_file(file)
    found, _ = torchvisions()
    found.load_state_dict(state)
    equal(found.state_dict(), theirs.state_dict())
    assert torch.equal(found(images), theirs(images))


@pytest.mark.parametrize("changes", [{}, {"pool": "mean"}, {"heads": 1, "dim_head": 96}], ids=str)
@torch.no_grad()
def test_vit_pytorch_reads_another_model(changes, tmp_path):
    theirs, images = vit_pytorchs(**changes)
    vitfast.convert(theirs, tmp_path / "m.pth", "vit_pytorch")
    found, _ = vit_pytorchs(**changes)
    found.load_state_dict(torch.load(tmp_path / "m.pth", weights_only=True))
    equal(found.state_dict(), theirs.state_dict())
    assert torch.equal(found(images), theirs(images))


@torch.no_grad()
def test_weights_that_cross_libraries_compute_something_else(tmp_path):
    """timm to Hugging Face and torchvision, and back: the same bits, and logits as near as fp64 has them."""
    theirs, images = timms(img_size=48)
    vitfast.convert(theirs, tmp_path / "hf", "hf")
    found = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf").double()
    vitfast.convert(theirs, tmp_path / "tv.pth", "torchvision")
    torchvision = VisionTransformer(48, 16, 2, 3, 192, 768, num_classes=10).double().eval()
    torchvision.load_state_dict(torch.load(tmp_path / "tv.pth", weights_only=True))
    images, expected = images.double(), timms_logits(theirs, images)
    for out in (found(images).logits, torchvision(images)):
        assert (out - expected).norm() <= 1e-10 * expected.norm()
    vitfast.convert(tmp_path / "hf", tmp_path / "back.safetensors")
    equal(load_file(tmp_path / "back.safetensors"), {name: w.float() for name, w in theirs.state_dict().items()})
    vitfast.convert(tmp_path / "tv.pth", tmp_path / "back2.safetensors", allow_pickle=True)
    equal(load_file(tmp_path / "back2.safetensors"), load_file(tmp_path / "back.safetensors"))


def timms_logits(model, images):
    return model.double()(images.double())


def fields(**changes):
    return vitfast.ViTConfig(
        **dict(image_size=32, patch_size=8, num_classes=5, dim=64, depth=1, heads=2, mlp_dim=96, norm_eps=1e-6)
        | changes
    )


REFUSED = [
    ("hf", dict(pool="mean"), r"has pool='token', this model has 'mean'"),
    ("hf", dict(qk_norm=True), r"no name for blocks\.0\.attn\.q_norm\.weight"),
    ("hf", dict(register_tokens=4), "no name for reg_token"),
    ("hf", dict(layer_scale=1.0), "no classifier"),
    ("hf", dict(layer_scale=1.0, num_classes=0, mlp_dim=96), "no mlp_ratio for an MLP of 96 beside 64"),
    ("hf", dict(mlp="swiglu_packed", activation="silu"), "has"),
    ("hf", dict(norm="rms"), "no name|has norm"),
    ("hf", dict(final_norm=False), "missing|has final_norm"),
    ("hf", dict(head_dim=16), "head_dim"),
    ("torchvision", dict(norm_eps=1e-5), r"norm_eps=1e-06, this model has 1e-05"),
    ("torchvision", dict(pool="mean"), "pool='token'"),
    ("torchvision", dict(layer_scale=1.0), r"no name for blocks\.0\.ls1\.gamma"),
    ("torchvision", dict(activation="quick_gelu"), "activation='gelu'"),
    ("torchvision", dict(qkv_bias=False), "bias"),
    ("torchvision", dict(image_size=(32, 16)), "image_size|square"),
    ("torchvision", dict(class_token=False, pool="mean"), "class_token|missing|no "),
    ("vit_pytorch", dict(), "norm_eps=1e-05, this model has 1e-06"),
    ("vit_pytorch", dict(norm_eps=1e-5), "."),
    ("vit_pytorch", dict(norm_eps=1e-5, activation="gelu_tanh"), "activation='gelu'"),
]


@pytest.mark.parametrize(("to", "changes", "said"), REFUSED, ids=str)
def test_model_that_the_library_cannot_compute_is_written(to, changes, said, tmp_path):
    model = filled(vitfast.ViT.from_config(fields(**changes)))
    out = tmp_path / ("m" if to == "hf" else "m.pth")
    with pytest.raises(NotImplementedError, match=said):
        vitfast.convert(model, out, to)
    with pytest.raises(NotImplementedError, match=said):
        vitfast.save_as(model, out, to)
    assert not [*tmp_path.iterdir()]


def test_vit_pytorchs_architecture_is_written_for_timm(tmp_path):
    with pytest.raises(NotImplementedError, match="input_norm"):
        vitfast.convert(vit_pytorchs()[0], tmp_path / "m")
    assert not [*tmp_path.iterdir()]


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
        equal(found, state)
        assert all(w.view(torch.uint8).equal(state[key].view(torch.uint8)) for key, w in found.items())


def test_dtype_that_was_asked_for_is_not_taken(tmp_path):
    theirs, _ = timms(img_size=32)
    vitfast.convert(theirs, tmp_path / "m.safetensors", dtype=torch.bfloat16)
    equal(load_file(tmp_path / "m.safetensors"), {k: w.bfloat16() for k, w in theirs.state_dict().items()})


def test_changes_that_were_asked_for_are_not_written(tmp_path):
    theirs, _ = timms(img_size=32)
    report = vitfast.convert(theirs, tmp_path / "m", num_classes=7, image_size=48, channels=1)
    ours = vitfast.load(theirs, num_classes=7, image_size=48, channels=1)
    equal(load_file(tmp_path / "m" / "model.safetensors"), ours.state_dict())
    assert "classifier: a new one" in str(report) and "channels 1 in place of 3" in str(report)
    found = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    equal(found.state_dict(), ours.state_dict())


def test_model_is_saved_as_it_was_before_it_was_changed(tmp_path):
    model = vitfast.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5)
    model.reset_classifier(3)
    vitfast.save_as(filled(model).bfloat16(), tmp_path / "m", "hf")
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert found["classifier.weight"].shape == (3, 192) and found["classifier.weight"].dtype == torch.bfloat16
    assert torch.equal(found["classifier.weight"], model.head.weight)
    with pytest.raises(TypeError, match="model must be a vitfast.ViT, got Linear"):
        vitfast.save_as(torch.nn.Linear(2, 2), tmp_path / "x")
    vitfast.prepare(model)
    model.blocks[0].attn.register_forward_hook(lambda *_: None)


def test_config_in_our_own_file_is_lost(tmp_path):
    model = filled(vitfast.ViT.from_config(fields(norm_eps=1e-4, pool="mean", activation="quick_gelu")))
    vitfast.convert(model, tmp_path / "m.safetensors", "vitfast")
    assert vitfast.read_config(tmp_path / "m.safetensors") == model.config
    equal(vitfast.load(tmp_path / "m.safetensors").state_dict(), model.state_dict())


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
    equal(vitfast.load(tmp_path / out, heads=2, allow_pickle=True).state_dict(), other.state_dict())
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
        monkeypatch.setattr(module.os, "replace", fails)
        monkeypatch.setattr(module.os, "rename", fails)
    else:
        to_out = lambda a, b: fails() if Path(b).name == out and ".tmp" in str(a) else real(a, b)  # noqa: E731
        monkeypatch.setattr(module.os, "rename", to_out)
        monkeypatch.setattr(module.os, "replace", fails)
    with pytest.raises(OSError):
        vitfast.save_as(other, tmp_path / out, force=force)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == [out] * force


TWICE = """
import sys, torch, vitfast
from vitfast.loading import convert as module
out, value, force = sys.argv[1], float(sys.argv[2]), sys.argv[3] == "True"
model = vitfast.ViT.from_config(vitfast.ViTConfig(image_size=32, patch_size=8, num_classes=5, dim=64, depth=3, heads=2))
torch.nn.utils.vector_to_parameters(torch.full((sum(p.numel() for p in model.parameters()),), value), model.parameters())
print("ready", flush=True)
sys.stdin.readline()
for _ in range(40 if force else 1):
    try:
        vitfast.save_as(model, out, force=force)
        print("wrote", flush=True)
    except FileExistsError:
        print("refused", flush=True)
"""


@pytest.mark.parametrize("out", ["m", "m.safetensors"])
@pytest.mark.parametrize("force", [False, True])
def test_two_processes_leave_a_mixture(out, force, tmp_path):
    values = (1.0, 2.0)
    arguments = [[sys.executable, "-c", TWICE, str(tmp_path / out), str(value), str(force)] for value in values]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen(given, **pipes) for given in arguments]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    said = [line for text, _ in told for line in text.split()]
    assert set(said) <= {"wrote", "refused"} and "wrote" in said
    assert force or sorted(said) == ["refused", "wrote"]
    assert [path.name for path in tmp_path.iterdir()] == [out]
    state = vitfast.load(tmp_path / out, heads=1).state_dict()
    assert any(all((w == value).all() for w in state.values()) for value in values)


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
    equal(vitfast.load(tmp_path / "m").state_dict(), before)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_what_is_written_says_where_it_was_made(tmp_path):
    theirs, _ = timms(img_size=32)
    vitfast.convert(theirs, tmp_path / "m", "hf")
    for path in (tmp_path / "m").iterdir():
        assert not re.search(re.escape(str(tmp_path)).encode(), path.read_bytes()[:10_000])


def test_registers_of_dinov2_are_written_apart(tmp_path):
    theirs = filled(transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**DINOV2)), 0.3)
    theirs.save_pretrained(tmp_path / "in")
    vitfast.convert(tmp_path / "in", tmp_path / "m", "hf")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "m"))
    assert one.keys() == other.keys()
    # the position of the class token is added to it, and what nobody reads is zero
    differ = {name for name in one if not torch.equal(one[name], other[name])}
    assert differ == {"embeddings.cls_token", "embeddings.position_embeddings", "embeddings.mask_token"}
    equal(vitfast.load(tmp_path / "in").state_dict(), vitfast.load(tmp_path / "m").state_dict())
