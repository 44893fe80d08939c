"""`vitfast.convert`: a library's own model, written for it, is another; what a library cannot compute is written."""

import json

import hf_pair
import pytest
import timm
import timm_pair
import torch
import transformers
import vit_pytorch
from safetensors.torch import load_file
from test_convert import equal
from test_load import DINOV2, HUGGING_FACE, SMALL, assert_same, filled
from torchvision.models import VisionTransformer

import vitfast

transformers.utils.logging.disable_progress_bar()
TIMM = (
    "vit", "distilled", "deit3", "dinov2_reg4", "siglip_gap", "clip", "beit3", "reg4_gap", "eva_gap", "no_positions",
    "qk_norm", "test_vit", "test_vit2", "test_vit3", "test_vit4",
)  # fmt: skip
WIDE = {"eva_gap", "siglip_gap", "clip", "beit3"}


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
    assert equal(found.state_dict(), theirs.state_dict())
    assert torch.equal(found(images), theirs(images))
    again = vitfast.load(tmp_path / "m")
    assert equal(again.state_dict(), theirs.state_dict())
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
    told = {
        name: tuple(v) if isinstance(v, list) else v for name, v in timm.data.resolve_data_config(model=found).items()
    }
    assert told == expected and expected["mean"] == cfg["mean"]
    assert list(found.pretrained_cfg["label_names"]) == names
    vitfast.convert(tmp_path / "m", tmp_path / "hf", "hf", norm_eps=1e-12)
    told = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert [told.id2label[i] for i in range(10)] == names and told.label2id["class 3"] == 3
    images = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert tuple(images.image_mean) == cfg["mean"] and tuple(images.image_std) == cfg["std"] and images.resample == 2


def test_labels_of_another_classifier_are_written(tmp_path):
    """Of a model whose classifier is new, or was exchanged."""
    names = [f"class {i}" for i in range(10)]
    ours = vitfast.create_model("test_vit", num_classes=10, pretrained_cfg_overlay={"label_names": names})
    vitfast.save_as(ours, tmp_path / "m")
    assert list(vitfast.load(tmp_path / "m").load_report.labels.values()) == names
    vitfast.convert(tmp_path / "m", tmp_path / "new", num_classes=7)
    ours.reset_classifier(7)
    vitfast.save_as(ours, tmp_path / "reset")
    exchanged = timm.create_model(f"local-dir:{tmp_path / 'm'}", num_classes=7)
    vitfast.convert(exchanged, tmp_path / "timm")
    for name in ("new", "reset", "timm"):
        found = json.loads((tmp_path / name / "config.json").read_text())
        assert found["num_classes"] == 7 and "class 3" not in json.dumps(found), name


def test_model_that_timm_has_no_name_for_is_said_to_have_one(tmp_path):
    theirs, _ = hugging_faces("ViT", layer_norm_eps=1e-3)
    report = vitfast.convert(theirs, tmp_path / "m")
    assert "this model, with norm_eps=0.001 beside" in str(report) and "config.json is not written" in str(report)
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
    assert equal(vitfast.load(tmp_path / "m").state_dict(), vitfast.load(theirs).state_dict())


@pytest.mark.parametrize("name", ["ViT", "ViT gelu_new", "ViT quick_gelu", "ViT no biases", "DeiT"])
@torch.no_grad()
def test_classifier_of_hugging_face_is_another(name, tmp_path):
    """By the Auto class, from files that it saved, with massive activations."""
    theirs, images = hugging_faces(name)
    theirs.save_pretrained(tmp_path / "in")
    vitfast.convert(tmp_path / "in", tmp_path / "m", "hf")
    found = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "m")
    # one formula that they write in two ways
    images, double = images.double(), "gelu_new" in name
    expected, out = theirs.double()(images).logits, found.double()(images).logits
    assert (out - expected).norm() <= (1e-10 if double else 0) * expected.norm()
    assert equal(load_file(tmp_path / "m" / "model.safetensors"), load_file(tmp_path / "in" / "model.safetensors"))


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
    assert equal(found.state_dict(), theirs.state_dict())
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
    assert equal(found.state_dict(), theirs.state_dict())
    assert torch.equal(found(images), theirs(images))


@pytest.mark.parametrize("changes", [{}, {"pool": "mean"}, {"heads": 1, "dim_head": 96}], ids=str)
@torch.no_grad()
def test_vit_pytorch_reads_another_model(changes, tmp_path):
    theirs, images = vit_pytorchs(**changes)
    vitfast.convert(theirs, tmp_path / "m.pth", "vit_pytorch")
    found, _ = vit_pytorchs(**changes)
    found.load_state_dict(torch.load(tmp_path / "m.pth", weights_only=True))
    assert equal(found.state_dict(), theirs.state_dict())
    assert torch.equal(found(images), theirs(images))


@pytest.mark.parametrize("size", [{"image_size": (48, 32)}, {"patch_size": (8, 16)}], ids=str)
@pytest.mark.parametrize("changes", [{}, {"distillation_token": True}, {"class_token": False, "pool": "mean"}], ids=str)
@torch.no_grad()
def test_images_or_patches_that_are_not_square_are_read_as_others(size, changes, tmp_path):
    ours = filled(vitfast.ViT.from_config(fields(norm_after_pool=False, **changes | size)), 0.3)
    vitfast.save_as(ours, tmp_path / "m", "hf")
    kind = json.loads((tmp_path / "m" / "config.json").read_text())["architectures"][0]
    found = getattr(transformers, kind).from_pretrained(tmp_path / "m").double().eval()
    images = torch.randn(2, 3, *ours.config.image_size).double()
    assert_same(ours, found, images, lambda out: out.logits)


def fields(**changes):
    return vitfast.ViTConfig(
        **dict(image_size=32, patch_size=8, num_classes=5, dim=64, depth=1, heads=2, mlp_dim=96, norm_eps=1e-6)
        | changes
    )


REFUSED = [
    ("hf", dict(pool="mean"), "no name for fc_norm.*this model has norm_after_pool=True"),
    ("hf", dict(pool="mean", norm_after_pool=False), "has pool='token', this model has 'mean'"),
    ("hf", dict(pool="mean", class_token=False), "no name for fc_norm"),
    ("hf", dict(layer_scale=1.0, num_classes=0, mlp_dim=128, image_size=(48, 32)), "positions for those of a square"),
    ("hf", dict(pool="map", num_classes=0, class_token=False, image_size=(48, 32)), "square images and patches only"),
    ("hf", dict(pre_norm=True, num_classes=0, patch_size=(8, 16)), "square images and patches only"),
    ("hf", dict(qk_norm=True), r"no name for blocks\.0\.attn\.q_norm\.weight"),
    ("hf", dict(register_tokens=4), "no name for reg_token"),
    ("hf", dict(layer_scale=1.0), "no classifier"),
    ("hf", dict(layer_scale=1.0, num_classes=0, mlp_dim=96), "no mlp_ratio for an MLP of 96 beside 64"),
    ("hf", dict(mlp="swiglu_packed", activation="silu"), "has"),
    ("hf", dict(norm="rms"), "no name|has norm"),
    ("hf", dict(final_norm=False), "missing|has final_norm"),
    ("hf", dict(head_dim=16), "head_dim"),
    ("torchvision", dict(norm_eps=1e-5), r"norm_eps=1e-06, this model has 1e-05"),
    ("torchvision", dict(pool="mean"), "no name for fc_norm.*this model has norm_after_pool=True"),
    ("torchvision", dict(pool="mean", norm_after_pool=False), "pool='token', this model has 'mean'"),
    ("torchvision", dict(layer_scale=1.0), r"no name for blocks\.0\.ls1\.gamma"),
    ("torchvision", dict(activation="quick_gelu"), "activation='gelu'"),
    ("torchvision", dict(qkv_bias=False), "bias"),
    ("torchvision", dict(image_size=(32, 16)), "image_size|square"),
    ("torchvision", dict(class_token=False, pool="mean"), "class_token|missing|no "),
    ("vit_pytorch", dict(), "norms on both sides of its patch projection and no bias of queries"),
    ("vit_pytorch", dict(input_norm=True), "norm_eps=1e-05, this model has 1e-06"),
    ("vit_pytorch", dict(input_norm=True, norm_eps=1e-5, activation="gelu_tanh"), "activation='gelu'"),
    ("timm", dict(input_norm=True), "timm has no norm of the pixels of a patch"),
]


@pytest.mark.parametrize(("to", "changes", "said"), REFUSED, ids=str)
def test_model_that_the_library_cannot_compute_is_written(to, changes, said, tmp_path):
    model = filled(vitfast.ViT.from_config(fields(**changes)))
    out = tmp_path / ("m.pth" if to in ("torchvision", "vit_pytorch") else "m")
    with pytest.raises(NotImplementedError, match=said):
        vitfast.convert(model, out, to)
    with pytest.raises(NotImplementedError, match=said):
        vitfast.save_as(model, out, to)
    assert not [*tmp_path.iterdir()]


def test_registers_of_dinov2_are_written_apart(tmp_path):
    theirs = filled(transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**DINOV2)), 0.3)
    theirs.save_pretrained(tmp_path / "in")
    vitfast.convert(tmp_path / "in", tmp_path / "m", "hf")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "m"))
    assert one.keys() == other.keys()
    # the position of the class token is added to it, and what nobody reads is zero
    differ = {name for name in one if not torch.equal(one[name], other[name])}
    assert differ == {"embeddings.cls_token", "embeddings.position_embeddings", "embeddings.mask_token"}
    assert equal(vitfast.load(tmp_path / "in").state_dict(), vitfast.load(tmp_path / "m").state_dict())
