"""`vitfast.convert`: weights that another library reads otherwise, or that come back changed; files half written."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
import transformers
import vit_pytorch
from safetensors.torch import load_file, save_file
from test_load import DINOV2, SMALL, assert_same, filled, logits, timms, tokens

import vitfast
from vitfast.loading.convert import convert, save_as

transformers.utils.logging.disable_progress_bar()


def equal(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )


# how a model of timm is written for Hugging Face's class, and what both are asked
TO_HUGGING_FACE = {
    "ViTForImageClassification": ("vit_tiny_patch16_224", {"num_classes": 5}, logits),
    "ViTModel": ("vit_tiny_patch16_224", {"num_classes": 0, "act_layer": "gelu_tanh"}, tokens),
    "DeiTForImageClassificationWithTeacher": ("deit_tiny_distilled_patch16_224", {"num_classes": 5}, logits),
    "Dinov2Model": ("vit_small_patch14_dinov2", {}, tokens),
    "Dinov2WithRegistersModel": ("vit_small_patch14_reg4_dinov2", {}, tokens),
    "CLIPVisionModel": (
        "vit_base_patch32_clip_quickgelu_224",
        {"num_classes": 0},
        ((lambda out: out.last_hidden_state[:, 0]), None),
    ),
    "SiglipVisionModel": ("vit_base_patch16_siglip_224", {}, ((lambda out: out.pooler_output), None)),
}


@pytest.mark.parametrize("kind", TO_HUGGING_FACE)
def test_hugging_face_computes_something_else(kind, tmp_path):
    name, keywords, (theirs_gives, _) = TO_HUGGING_FACE[kind]
    source = timms(name, depth=2, img_size=56 if "14" in name else 64, **keywords)
    convert(source, tmp_path / "out", "hf")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [kind]
    theirs, info = getattr(transformers, kind).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {name for name in info["missing_keys"] if not name.startswith("pooler.")} == set()
    assert not info["unexpected_keys"]
    ours = vitfast.load(source)
    images = torch.randn(2, 3, *ours.config.image_size)
    gives = None
    if kind == "CLIPVisionModel":
        # its tokens are those before the last norm
        model = ours.double()
        model.norm = torch.nn.Identity()
        gives = lambda m, x: m.forward_features(x)[:, 0]  # noqa: E731
    elif theirs_gives is tokens[0]:
        gives = tokens[1]
    assert_same(ours, theirs.eval(), images, theirs_gives, gives)
    assert equal(vitfast.load(tmp_path / "out").state_dict(), vitfast.load(source).state_dict())


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "test_vit4", "beit3_base_patch16_224", "eva_large_patch14_196"]
)
def test_timm_builds_something_else(name, tmp_path):
    """timm's own factory, offline, from the folder alone."""
    source = timms(name, depth=2, img_size=64 if "16" in name or "test" in name else 56, num_classes=5)
    convert(source, tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert equal(theirs.state_dict(), source.state_dict())
    images = torch.randn(2, 3, *source.patch_embed.img_size)
    assert_same(vitfast.load(tmp_path / "out"), theirs, images)
    assert_same(source, theirs, images)
    assert vitfast.load(tmp_path / "out").config == vitfast.load(source).config


def test_hugging_face_to_timm_and_back_changes_a_bit(tmp_path):
    """Names, bits, classes, how images are prepared."""
    theirs = filled(transformers.ViTForImageClassification(transformers.ViTConfig(
        **SMALL, num_labels=3, id2label={0: "cat", 1: "dog", 2: "hen"}, layer_norm_eps=1e-6,
    )))  # fmt: skip
    theirs.save_pretrained(tmp_path / "a")
    processor = dict(do_normalize=True, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=3)
    (tmp_path / "a" / "preprocessor_config.json").write_text(
        json.dumps(processor | {"size": {"height": 32, "width": 32}})
    )
    convert(tmp_path / "a", tmp_path / "b", "timm")
    convert(tmp_path / "b", tmp_path / "c", "hf")
    a, c = (load_file(tmp_path / each / "model.safetensors") for each in "ac")
    assert equal(a, c)
    told = json.loads((tmp_path / "c" / "config.json").read_text())
    assert told["id2label"] == {"0": "cat", "1": "dog", "2": "hen"} and told["layer_norm_eps"] == 1e-6
    images = json.loads((tmp_path / "c" / "preprocessor_config.json").read_text())
    assert (images["image_mean"], images["image_std"], images["resample"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 3)
    assert images["size"] == {"height": 32, "width": 32}


def test_torchvision_computes_something_else(tmp_path):
    source = timms("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5)
    convert(source, tmp_path / "out.pth", "torchvision")
    theirs = torchvision.models.VisionTransformer(32, 16, 2, 3, 192, 768, num_classes=5).eval()
    theirs.load_state_dict(torch.load(tmp_path / "out.pth"))
    assert_same(vitfast.load(source), theirs, torch.randn(2, 3, 32, 32))
    assert equal(vitfast.load(tmp_path / "out.pth", allow_pickle=True).state_dict(), source.float().state_dict())


def test_vit_pytorch_computes_something_else(tmp_path):
    how = dict(image_size=32, patch_size=8, num_classes=5, dim=64, depth=2, heads=4, dim_head=32, mlp_dim=96)
    source = filled(vit_pytorch.ViT(**how))
    convert(source, tmp_path / "out.safetensors", "vit_pytorch")
    assert equal(load_file(tmp_path / "out.safetensors"), source.state_dict())
    convert(source, tmp_path / "own.safetensors", "vitfast")
    ours = vitfast.load(tmp_path / "own.safetensors")
    assert_same(ours, source, torch.randn(2, 3, 32, 32))
    with pytest.raises(NotImplementedError, match="input_norm"):
        convert(tmp_path / "own.safetensors", tmp_path / "t.safetensors", "timm")


REFUSED = {
    "mean pooling": ("hf", dict(global_pool="avg", class_token=False), "timm|norm|pool|name"),
    "norm of queries": ("hf", dict(qk_norm=True), r"has no name for blocks\.0\.attn\.q_norm"),
    "LayerScale": ("torchvision", dict(init_values=1e-5), r"has no name for blocks\.0\.ls1"),
    "GELU": ("torchvision", dict(act_layer="gelu_tanh"), "activation='gelu', this model has 'gelu_tanh'"),
    "a bias": ("vit_pytorch", {}, "no bias of queries"),
    "registers": ("hf", dict(reg_tokens=3), r"reg_token|register_tokens"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_library_does_not_compute_is_written(what, tmp_path):
    to, keywords, said = REFUSED[what]
    source = timms("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5, **keywords)
    with pytest.raises(NotImplementedError, match=said):
        convert(source, tmp_path / ("out" if to == "hf" else "out.safetensors"), to)
    assert not [*tmp_path.iterdir()]


def test_dtype_of_a_weight_is_lost(tmp_path):
    """Norms in fp32 beside products in bf16, as mixed training saves them; and the dtype that was asked for."""
    state = {
        name: value.bfloat16() if value.dim() > 1 else value
        for name, value in timms("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).state_dict().items()
    }
    save_file(state, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert equal(load_file(tmp_path / "out.safetensors"), state)
    convert(tmp_path / "in.safetensors", tmp_path / "half.safetensors", dtype=torch.float16)
    assert {value.dtype for value in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}


def test_model_is_written_as_it_was_built(tmp_path):
    """Not as it has come to be: another eps, an activation, a hook that no library has."""
    model = vitfast.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-3
    save_as(model, tmp_path / "out", "hf")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_norm_eps"] == 1e-3
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert_same(model, theirs, torch.randn(2, 3, 32, 32), logits[0])
    model.float().blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="hook"):
        save_as(model, tmp_path / "other", "hf")
    with pytest.raises(TypeError, match="must be a vitfast.ViT, got Linear"):
        save_as(torch.nn.Linear(2, 2), tmp_path / "other")


@pytest.mark.parametrize("out", ["out", "out.safetensors", "out.pth"])
def test_what_is_there_is_replaced_unasked_or_left_in_pieces(out, tmp_path, monkeypatch):
    source = timms("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5)
    convert(source, tmp_path / out)
    content = lambda: {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}  # noqa: E731
    before = content()
    with pytest.raises(FileExistsError, match="is there; force=True"):
        convert(source, tmp_path / out)

    def fails(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("vitfast.loading.convert._write_weights", fails)
        with pytest.raises(OSError, match="disk full"):
            convert(source, tmp_path / out, force=True)
    assert content() == before and not [*tmp_path.glob(".*")]
    with torch.no_grad():
        source.cls_token.add_(1)
    convert(source, tmp_path / out, force=True)
    after = content()
    assert after.keys() == before.keys() and after != before and not [*tmp_path.glob(".*")]


RUN = "import sys, vitfast; vitfast.convert(sys.argv[1], sys.argv[2], sys.argv[3], force=True)"


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_two_processes_leave_a_mixture(out, tmp_path):
    for name in "ab":
        source = timms("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5)
        save_file(source.state_dict(), tmp_path / f"{name}.safetensors")
    args = [sys.executable, "-c", RUN]
    runs = [
        subprocess.Popen(
            [*args, tmp_path / f"{n}.safetensors", tmp_path / out, "timm"], stderr=subprocess.PIPE, text=True
        )
        for n in "ab"
    ]
    said = [run.communicate()[1] for run in runs]
    assert any(run.returncode == 0 for run in runs), said
    # of two who want the same folder one may be told so
    assert all(run.returncode == 0 or "was made meanwhile" in text for run, text in zip(runs, said, strict=True)), said
    written = tmp_path / out / "model.safetensors" if out == "out" else tmp_path / out
    found = load_file(written)
    assert any(equal(found, load_file(tmp_path / f"{name}.safetensors")) for name in "ab")
    assert sorted(os.listdir(tmp_path)) == sorted(["a.safetensors", "b.safetensors", out])


def test_wrong_use_is_not_told(tmp_path):
    source = timms("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5)
    for out, to, said in (
        ("a.safetensors", "hf", "must be a folder for to='hf'"),
        ("a", "torchvision", "must end in"),
        ("a.pth", "vitfast", "must end in .safetensors"),
        ("a", "keras", "to must be one of vitfast, timm"),
    ):
        with pytest.raises(ValueError, match=said):
            convert(source, tmp_path / out, to)
    with pytest.raises(FileNotFoundError, match="no folder"):
        convert(source, tmp_path / "none" / "a.pth")
    assert not [*tmp_path.iterdir()]


def test_dinov2_of_hugging_face_comes_back_changed(tmp_path):
    """What was folded into the class token stands there, and its position is zero: the same function, the same bits."""
    theirs = filled(transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**DINOV2)))
    convert(theirs, tmp_path / "out", "hf")
    again = transformers.Dinov2WithRegistersModel.from_pretrained(tmp_path / "out").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(again(images).last_hidden_state, theirs(images).last_hidden_state, atol=1e-5)
    convert(tmp_path / "out", tmp_path / "twice", "hf")
    one, two = (load_file(tmp_path / each / "model.safetensors") for each in ("out", "twice"))
    assert equal(one, two)
