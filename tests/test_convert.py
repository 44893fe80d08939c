"""`vitfast.convert`: weights that another library reads otherwise, or that come back changed; files half written."""

import json

import pytest
import timm
import torch
import torchvision
import transformers
import vit_pytorch
from safetensors.torch import load_file
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
