"""`vitfast.compare`: which stage differs, by how much, and of which models it can tell."""

import copy
import functools
import json
import math
import warnings

import hf_pair
import patch_others
import pytest
import timm
import timm_pair
import torch
import vit_pytorch
from parity_plants import base, planted
from test_parity_timm import products
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer as TorchVision
from vit_pytorch.simple_vit import SimpleViT

import vitfast
from vitfast.parity.chain import clone_in
from vitfast.parity.compare import worst_by_kind
from vitfast.parity.oracle import onnx_model

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
STAGES = ["patches", "patch_tokens", "blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp", "tokens",
          "pooled", "logits"]  # fmt: skip


def torchvision_model():
    model = TorchVision(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=128, mlp_dim=256, num_classes=10
    )
    images = torch.randn(3, 3, 32, 32).bfloat16().float()
    parts = [(block.ln_2, block.mlp[0], block.mlp[3]) for block in model.encoder.layers]
    return patch_others.make_trained_like(model, images, parts), images


def vit_pytorch_model(pool):
    model = vit_pytorch.ViT(
        image_size=32, patch_size=8, num_classes=10, dim=128, depth=2, heads=2, mlp_dim=256, pool=pool
    )
    images = torch.randn(3, 3, 32, 32).bfloat16().float()
    parts = [(mlp.net[0], mlp.net[1], mlp.net[4]) for _, mlp in model.transformer.layers]
    return patch_others.make_trained_like(model, images, parts), images


def timm_model(family):
    theirs, _, images = timm_pair.build_pair(family)
    return theirs, images


MODELS = {
    "torchvision": torchvision_model,
    "vit-pytorch": lambda: vit_pytorch_model("cls"),
    "vit-pytorch mean": lambda: vit_pytorch_model("mean"),
    "HF ViT": lambda: hf_pair.build("ViT"),
    "HF ViT eager": lambda: hf_pair.build("ViT eager"),
    "HF DeiT": lambda: hf_pair.build("DeiT"),
    **{f"timm {name}": lambda name=name: timm_model(name) for name in ("vit", "distilled", "dinov2_reg4", "test_vit3")},
}


@pytest.mark.parametrize("name", MODELS)
def test_equal_models_of_two_libraries_do_not_agree(name):
    """Each library's adapter against ours, with massive activations in the tokens, in fp32 and bf16."""
    torch.manual_seed(0)
    theirs, images = MODELS[name]()
    ours = vitfast.load(theirs)
    was_training, before = theirs.training, copy.deepcopy(theirs.state_dict())
    for dtype in (torch.float32, torch.bfloat16):
        with products(dtype):
            found = vitfast.compare(theirs, ours, images, dtype=dtype)
        assert found.ok, str(found)
        assert [row.stage for row in found.stages] == STAGES[:2] + [
            f"blocks.{i}.{half}" for i in range(ours.config.depth) for half in ("attn", "mlp")
        ] + STAGES[-3:]
        assert all(row.own is not None and row.formula < 1e-12 for row in found.stages)
    assert theirs.training is was_training
    assert all(torch.equal(value, before[key]) for key, value in theirs.state_dict().items())


def test_two_other_libraries_do_not_agree():
    """timm's and Hugging Face's, with the same weights through ours."""
    torch.manual_seed(0)
    theirs, images = hf_pair.build("ViT")
    ours = vitfast.load(theirs)
    twin = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, mlp_ratio=2, num_classes=10,
        norm_layer=functools.partial(nn.LayerNorm, eps=ours.config.norm_eps),
    )  # fmt: skip
    twin.load_state_dict(ours.state_dict())
    assert vitfast.compare(theirs, twin, images).ok
    assert vitfast.compare(twin, theirs, images, dtype=torch.bfloat16).ok


@pytest.mark.parametrize("name", ["DINOv2", "registers", "DINOv2 SwiGLU"])
def test_model_that_no_config_describes_cannot_be_compared(name):
    """Its classifier reads two things; up to the tokens it is one of ours."""
    torch.manual_seed(0)
    theirs, images = hf_pair.build(name)
    assert vitfast.compare(theirs, theirs, images).ok
    inner = next(child for key, child in theirs.named_children() if key.startswith("dinov2"))
    found = vitfast.compare(theirs, vitfast.load(inner), images)
    assert [row.stage for row in found.stages if not row.passed] == ["pooled", "logits"]
    assert found.first == "pooled" and "is [3, 128], not [3, 256]" in str(found)
    changed = copy.deepcopy(theirs)
    for module in changed.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    assert "eps" in vitfast.compare(theirs, changed, images).diagnosis.names


def test_simple_vit_has_no_stages():
    model = SimpleViT(image_size=32, patch_size=8, num_classes=10, dim=64, depth=2, heads=2, mlp_dim=128, dim_head=32)
    found = vitfast.compare(model, copy.deepcopy(model), torch.randn(2, 3, 32, 32))
    assert found.ok and [row.stage for row in found.stages] == STAGES


@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_positions_of_another_size_are_another_formula(size):
    """Hugging Face's model interpolates when it is asked to, timm's does at each call: both as ours."""
    torch.manual_seed(0)
    theirs, _ = hf_pair.build("ViT", massive=False)
    images = torch.randn(2, 3, *size)
    ours = vitfast.load(theirs, image_size=size)
    found = vitfast.compare(theirs, ours, images)
    assert found.ok, str(found)


def test_error_of_one_stage_is_seen_in_those_after_it():
    """Each stage starts from the first model's value, so that its own error is apart from what it inherited."""
    theirs, ours, images = base("token")
    changed = planted(theirs)
    with torch.no_grad():
        changed.blocks[0].mlp.fc1.weight[3] += 0.5
    found = vitfast.compare(ours, changed, images, diagnose=False)
    assert found.first == "blocks.0.mlp" and found.diagnosis is None
    rows = {row.stage: row for row in found.stages}
    assert rows["blocks.0.mlp"].own.units > 1e3
    for stage in STAGES[4:]:
        assert rows[stage].own.units < 2 and rows[stage].formula < 1e-9, stage
        assert rows[stage].inherited.units > 100 and not rows[stage].passed
    assert all(rows[stage].passed for stage in STAGES[:3])


def test_nan_is_not_seen():
    theirs, ours, images = base("token")
    changed = planted(theirs)
    with torch.no_grad():
        changed.blocks[1].attn.proj.bias[2] = math.nan
    found = vitfast.compare(ours, changed, images)
    assert found.first == "blocks.1.attn" and "NaN" in str(found)
    assert "blocks.1.attn.proj.bias" in str(found.diagnosis)
    json.loads(json.dumps(found.to_dict(), allow_nan=False))
    # of both it is no difference that can be seen, and no parity
    found = vitfast.compare(changed, copy.deepcopy(changed), images)
    assert not found.ok and "nothing is compared" in str(found)


def test_models_of_another_shape_are_compared_stage_by_stage():
    theirs, ours, images = base("token")
    deeper, _, _ = base("token", depth=3)
    found = vitfast.compare(ours, deeper, images)
    assert [row.stage for row in found.stages] == ["logits"] and not found.ok
    assert "2 blocks and b 3" in str(found)
    wider, _, _ = base("token", embed_dim=128)
    assert "64 channels and b of 128" in str(vitfast.compare(ours, wider, images))
    with pytest.raises(ValueError, match="stages in common.*64 channels"):
        vitfast.compare(ours, base("token", embed_dim=128, num_classes=3)[0], images)
    found = vitfast.compare(ours, planted(theirs, "no class token"), images, diagnose=False)
    assert found.first == "patch_tokens" and "is [2, 18, 64], not [2, 19, 64]" in str(found)


class Around(nn.Module):
    """A class that nobody knows."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


class Normalising(Around):
    def forward(self, x):
        mean, std = (
            torch.tensor(v, dtype=x.dtype).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        return self.model((x * std + mean - 0.5) / 0.5)


def test_unknown_class_is_passed_over():
    """Its values are read by hooks, that is said, and a diagnosis goes on from its own values."""
    theirs, ours, images = base("token")
    for a, b in ((ours, Around(theirs)), (Around(theirs), ours)):
        found = vitfast.compare(a, b, images)
        assert found.ok and "read by hooks" in " ".join(found.notes)
        assert [row.stage for row in found.stages] == ["patch_tokens", "blocks.0.mlp", "blocks.1.mlp", "logits"]
    found = vitfast.compare(Around(ours), Around(theirs), images)
    assert found.ok and all(row.own is None and row.formula < 1e-12 for row in found.stages)
    found = vitfast.compare(Around(ours), Around(planted(theirs, "eps 1e-12")), images, dtype=torch.bfloat16)
    assert found.first == "blocks.0.mlp" and not found.diagnosis.findings
    found = vitfast.compare(ours, Normalising(theirs), images)
    assert found.first == "patch_tokens" and found.diagnosis.names == ("mean and std",)
    found = vitfast.compare(ours, Around(planted(theirs, "gelu tanh")), images)
    assert found.first == "blocks.0.mlp" and found.diagnosis.names == ("gelu",)


def test_stages_that_are_not_those_of_the_forward_are_believed():
    """A model with a forward of its own, or hooks on a block, which the stages would pass by."""
    theirs, ours, images = base("token")
    changed = copy.deepcopy(theirs)
    changed.__class__ = type("Twice", (type(theirs),), {"forward": lambda self, x: 2 * type(theirs).forward(self, x)})
    found = vitfast.compare(ours, changed, images, diagnose=False)
    assert not found.ok and "other values than its forward" in " ".join(found.notes)
    changed = copy.deepcopy(theirs)
    changed.blocks[1].register_forward_hook(lambda _, __, out: 1.5 * out)
    found = vitfast.compare(ours, changed, images, diagnose=False)
    assert found.first == "blocks.1.mlp" and "hooks" in " ".join(found.notes)


def test_model_without_fp64_cannot_be_compared():
    """Its forward holds on to a module of another dtype."""
    theirs, ours, images = base("token")
    for factor, ok in ((1, True), (2, False)):
        changed, kept = copy.deepcopy(theirs), copy.deepcopy(theirs)
        changed.forward = lambda x, factor=factor, kept=kept: factor * kept(x)
        for a, b in ((ours, changed), (changed, ours)):
            found = vitfast.compare(a, b, images, diagnose=False)
            assert found.ok is ok and "can't be run in fp64" in " ".join(found.notes), str(found)
    with pytest.raises(ValueError, match="of which only values can be read"):
        vitfast.compare(changed, changed, images)


def test_patched_and_prepared_models_are_other_ones():
    theirs, ours, images = base("mean")
    patched = copy.deepcopy(theirs)
    vitfast.patch(patched)
    assert vitfast.compare(theirs, patched, images).ok
    assert vitfast.compare(theirs, patched, images, dtype=torch.bfloat16).ok
    prepared = vitfast.prepare(ours)
    found = vitfast.compare(theirs, prepared, images)
    assert found.ok and all(row.formula is None for row in found.stages) and "no fp64" in " ".join(found.notes)
    assert not vitfast.compare(planted(theirs, "gelu quick"), prepared, images, diagnose=False).ok


def test_preparation_of_images_is_not_told():
    theirs, ours, images = base("token")
    theirs.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": [0.5, 0.5, 0.5]}
    ours.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.5, 0.5, 0.5)}
    found = vitfast.compare(theirs, ours, images)
    assert found.ok and len(found.preprocessing) == 1 and "mean: a has (0.5, 0.5, 0.5)" in str(found).splitlines()[2]


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"dtype": torch.int8}, ValueError, "dtype must be one of"),
        ({"images": torch.zeros(3, 32, 32)}, TypeError, r"\[B, C, H, W\]"),
        ({"images": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, TypeError, "uint8"),
        ({"b": "timm:vit"}, TypeError, "b must be a model, got str"),
        ({"images": torch.zeros(1, 3, 40, 40)}, ValueError, "40"),
    ],
)
def test_wrong_argument_is_not_named(wrong, error, says):
    theirs, ours, images = base("token")
    given = {"a": theirs, "b": ours, "images": images} | wrong
    with pytest.raises(error, match=says):
        vitfast.compare(**given)


def test_result_cannot_be_written_or_read():
    theirs, ours, images = base("token")
    found = vitfast.compare(ours, planted(theirs, "eps 1e-5"), images)
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["ok"] is False and told["first"] == "blocks.0.attn" and told["diagnosis"]["names"] == ["eps"]
    assert [row["stage"] for row in told["stages"]] == STAGES
    assert told["stages"][2]["own"].keys() == {"max", "mean", "relative", "cosine", "units"}
    lines = str(found).splitlines()
    assert all(any(line.startswith(stage) for line in lines) for stage in STAGES)
    assert lines[-1].startswith("diagnosis: a with norms with an eps of 1e-05")
    kinds = [row.stage for row in worst_by_kind(found.stages)]
    assert len(kinds) == 7 and sum(stage.startswith("blocks.") for stage in kinds) == 2


def test_weights_are_held_three_times():
    """A model's clone in its own dtype shares its weights."""
    _, ours, images = base("token")
    same = clone_in(ours, torch.float32, images.device, torch.float32)
    assert same.blocks[0].attn.qkv.weight.data_ptr() == ours.blocks[0].attn.qkv.weight.data_ptr()
    wide = clone_in(ours, torch.float64, images.device, torch.bfloat16)
    assert wide.head.weight.dtype is torch.float64 and torch.equal(
        wide.head.weight, ours.head.weight.bfloat16().double()
    )
    assert ours.head.weight.dtype is torch.float32


class Careless(torch.autograd.Function):
    """GELU with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return nn.functional.gelu(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_gradient_is_another_one_and_nobody_sees():
    theirs, ours, images = base("token")
    for dtype in (torch.float32, torch.bfloat16):
        found = vitfast.compare(theirs, ours, images, dtype=dtype, gradients=True)
        assert found.ok and [row.stage for row in found.gradients] == STAGES, str(found)
        assert all(row.formula < 1e-9 and row.own is not None for row in found.gradients)
    changed = copy.deepcopy(theirs)
    changed.blocks[1].mlp.act.forward = Careless.apply
    assert vitfast.compare(ours, changed, images).ok
    found = vitfast.compare(ours, changed, images, gradients=True)
    assert not found.ok and found.first == "blocks.1.mlp" and "another gradient" in str(found)
    assert [row.stage for row in found.gradients if not row.passed] == ["blocks.1.mlp"]
    with pytest.raises(ValueError, match="gradients=True"):
        vitfast.compare(ours, Around(theirs), images, gradients=True)


@pytest.fixture(scope="module")
def onnx_files(tmp_path_factory):
    """timm's model with and without a difference, as onnx files."""
    folder = tmp_path_factory.mktemp("onnx")
    theirs, _, images = base("token")
    files = {}
    for name in ("", "gelu tanh", "mean of patches"):
        model = planted(theirs, *([name] if name else []))
        for block in model.blocks:
            block.attn.fused_attn = False
        files[name] = folder / f"{name or 'same'}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (images,), str(files[name]), dynamo=False, opset_version=17)
    return files


def test_onnx_file_is_another_model(onnx_files):
    _, ours, images = base("token")
    for a, b in ((ours, onnx_model(onnx_files[""])), (onnx_model(onnx_files[""]), ours)):
        found = vitfast.compare(a, b, images)
        assert found.ok and [row.stage for row in found.stages] == ["logits"], str(found)
    for name, kind in (("gelu tanh", "gelu"), ("mean of patches", "pooling")):
        found = vitfast.compare(ours, onnx_model(onnx_files[name]), images)
        assert not found.ok and found.diagnosis.names == (kind,), str(found)


def test_value_inside_of_an_onnx_file_is_not_read(onnx_files):
    import onnx

    graph = onnx.load(onnx_files["gelu tanh"]).graph
    # what the first block's MLP gives: the second sum of residuals
    sums = [node.output[0] for node in graph.node if node.op_type == "Add" and "/blocks/blocks.0/Add" in node.output[0]]
    tap = {"blocks.0.attn": sums[0], "blocks.0.mlp": sums[1]}
    _, ours, images = base("token")
    found = vitfast.compare(ours, onnx_model(onnx_files["gelu tanh"], tap), images)
    assert found.first == "blocks.0.mlp" and found.diagnosis.names == ("gelu",)
    assert found.stages[0].passed
    with pytest.raises(ValueError, match="--tap must name values of the graph, got nothing_there"):
        onnx_model(onnx_files[""], {"tokens": "nothing_there"})
    with pytest.raises(ValueError, match="must be an ONNX model"):
        onnx_model(__file__)
    with pytest.raises(FileNotFoundError):
        onnx_model("not_there.onnx")
