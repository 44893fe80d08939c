"""What timm's own suite asks of a model, asked of ours, next to timm's: each kind of model under its timm name."""

import copy
import functools
import io
import itertools
import pickle

import numpy
import onnxruntime
import pytest
import timm
import torch
from test_timm_surface import close
from timm_pair import pair_of
from torch import nn

import vitfast
from vitfast import create_model

# of the real widths, at small depth on small images
MODELS = (
    "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_base_patch32_224",
    "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224",
    "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224",
    "vit_base_patch16_siglip_gap_224", "vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224",
    "vit_xsmall_patch16_clip_224", "vit_wee_patch16_reg1_gap_256", "vit_little_patch16_reg1_gap_256",
    "vit_medium_patch16_gap_240", "vit_so150m2_patch16_reg1_gap_256", "beit3_base_patch16_224",
    "aimv2_large_patch14_224", "test_vit", "test_vit2", "test_vit3", "test_vit4",
)  # fmt: skip
# of a width, a patch and parts that others have
LIKE_OTHERS = (
    "vit_small_patch16_224", "vit_base_patch16_224", "deit_tiny_patch16_224", "vit_small_patch14_dinov2",
    "vit_base_patch16_siglip_gap_224", "vit_base_patch16_clip_224", "vit_little_patch16_reg1_gap_256",
)  # fmt: skip
# to ONNX test_export.py has the rest
TO_ONNX = ("vit_base_patch16_siglip_224", "vit_medium_patch16_gap_240", "vit_wee_patch16_reg1_gap_256", "test_vit2")
DEPTH = 2


def size_of(name, rows=2, columns=3):
    (ph, pw) = vitfast.config_for(name).patch_size
    return rows * ph, columns * pw


def quickly(*names):
    return [pytest.param(name, marks=[pytest.mark.full] * (name not in names)) for name in MODELS]


@pytest.fixture(scope="module", params=quickly(*(name for name in MODELS if name not in LIKE_OTHERS)))
def name(request):
    """Of a model; all tests of one together, so that one pair is held at a time."""
    return request.param


@functools.lru_cache(maxsize=1)
def kept_pair(name):
    """timm's model and ours with the same weights, in eval mode, and images. To be copied before it is changed."""
    theirs, ours, images = pair_of(name, massive=False, depth=DEPTH, num_classes=7, img_size=size_of(name))
    return theirs.eval(), ours.eval(), images


def fresh_pair(name):
    theirs, ours, images = kept_pair(name)
    return copy.deepcopy(theirs), copy.deepcopy(ours), images


@torch.no_grad()
def test_forward_gives_another_shape_or_no_numbers(name):
    """As a user first sees it: the default size, fresh weights, both modes."""
    model = create_model(name, depth=1)
    images = torch.randn(1, *model.default_cfg["input_size"])
    for training in (False, True):
        out = model.train(training)(images)
        assert out.shape == (1, model.num_classes or model.num_features) and out.isfinite().all()
    theirs, ours, images = kept_pair(name)
    close(ours(images), theirs(images), 2e-4)


def test_gradient_does_not_reach_a_parameter(name):
    model = create_model(name, depth=DEPTH, num_classes=7, img_size=size_of(name), drop_path_rate=0.0)
    out = model.train()(torch.randn(2, 3, *size_of(name)))
    assert out.shape == (2, 7)
    out.square().mean().backward()
    reached = lambda p: p.grad is not None and p.grad.isfinite().all() and p.grad.any()  # noqa: E731
    assert [n for n, p in model.named_parameters() if not reached(p)] == []
    theirs = {n for n, _ in kept_pair(name)[0].named_parameters()}
    assert {n for n, _ in model.named_parameters()} == theirs


def test_default_entry_does_not_fit_the_model(name):
    model = create_model(name, depth=1, num_classes=7)
    cfg = model.default_cfg
    assert cfg == model.pretrained_cfg and cfg["architecture"] == name
    assert cfg["input_size"] == (3, *model.patch_embed.img_size) and cfg["fixed_input_size"]
    if not model.dynamic_img_size:
        with pytest.raises(ValueError, match="images must be"):
            model(torch.randn(1, 3, *(side + max(model.patch_embed.patch_size) for side in cfg["input_size"][1:])))
    classifiers = (cfg["classifier"],) if isinstance(cfg["classifier"], str) else cfg["classifier"]
    for classifier in classifiers:
        assert f"{classifier}.weight" in model.state_dict()
        assert model.get_submodule(classifier).out_features == 7
    model.reset_classifier(0)
    assert not any(key.startswith(f"{classifier}.") for key in model.state_dict() for classifier in classifiers)
    first = model.get_submodule(cfg["first_conv"])
    assert isinstance(first, nn.Conv2d) and first.in_channels == cfg["input_size"][0]
    # of models that pool maps of a fixed size
    assert cfg["pool_size"] is None
    assert len(cfg["mean"]) == len(cfg["std"]) == 3 and 0.5 < cfg["crop_pct"] <= 1


@torch.no_grad()
def test_model_without_classifier_or_pooling_gives_other_features(name):
    theirs, ours, images = kept_pair(name)
    features = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    for changes in ({"num_classes": 0}, {"num_classes": 0, "global_pool": ""}):
        distilled = name == "deit_tiny_distilled_patch16_224"
        if distilled and "global_pool" in changes:
            changes = {"num_classes": 0, "global_pool": "token"}
        built = [
            build(name, depth=DEPTH, img_size=size_of(name), **changes).eval()
            for build in (timm.create_model, create_model)
        ]
        states = [{k: v for k, v in ours.state_dict().items() if k in model.state_dict()} for model in built]
        # without pooling a norm that stood behind it stands before it
        for model, state in zip(built, states, strict=True):
            state |= {k.replace("fc_norm", "norm"): v for k, v in ours.state_dict().items() if "fc_norm" in k}
            model.load_state_dict({k: v for k, v in state.items() if k in model.state_dict()})
        close(built[1](images), built[0](images), 2e-4)
        if changes == {"num_classes": 0}:
            close(built[1](images), features, 2e-4)


@torch.no_grad()
def test_reset_classifier_gives_another_model(name):
    for arguments in ((0,), (5,), (0, ""), (4, "avg")):
        if name == "deit_tiny_distilled_patch16_224" and len(arguments) > 1:
            arguments = (arguments[0], "token")
        theirs, ours, images = fresh_pair(name)
        for model in (theirs, ours):
            model.reset_classifier(*arguments)
        ours.load_state_dict(theirs.state_dict())
        close(ours(images), theirs(images), 2e-4)
        assert ours.num_classes == theirs.num_classes == arguments[0] and ours.global_pool == theirs.global_pool


@torch.no_grad()
def test_features_only_gives_other_maps(name):
    for out_indices in (2, (0, 1), [-2]):
        keywords = dict(depth=DEPTH, img_size=size_of(name), features_only=True, out_indices=out_indices)
        theirs, ours = (build(name, **keywords).eval() for build in (timm.create_model, create_model))
        # fresh weights with LayerScale would hide another block
        trained = kept_pair(name)[0].state_dict()
        theirs.load_state_dict({key: trained[key.removeprefix("model.")] for key in theirs.state_dict()})
        ours.load_state_dict(theirs.state_dict())
        images = kept_pair(name)[2]
        found, expected = ours(images), theirs(images)
        close(found, expected, 2e-4)
        for maps, channels, reduction in zip(
            found, ours.feature_info.channels(), ours.feature_info.reduction(), strict=True
        ):
            assert maps.shape == (2, channels, *(side // reduction for side in images.shape[2:]))
        assert ours.feature_info.get_dicts() == theirs.feature_info.get_dicts()
    # the getter wired by hand
    by_hand = timm.models._features.FeatureGetterNet(fresh_pair(name)[1], out_indices=[-2])
    close(by_hand(images), timm.models._features.FeatureGetterNet(fresh_pair(name)[0], [-2])(images), 2e-4)


@torch.no_grad()
def test_intermediates_are_others(name):
    theirs, ours, images = kept_pair(name)
    options = ("return_prefix_tokens", "norm", "stop_early", "intermediates_only", "output_dict")
    indices = itertools.cycle((None, 1, [0, -1]))
    for output_fmt, on in itertools.product(("NCHW", "NLC"), [(), *((option,) for option in options), options]):
        how = {"indices": next(indices), "output_fmt": output_fmt} | dict.fromkeys(on, True)
        close(ours.forward_intermediates(images, **how), theirs.forward_intermediates(images, **how), 2e-4)


@torch.no_grad()
def test_other_sizes_give_other_values(name):
    theirs, ours, _ = fresh_pair(name)
    sizes = [size_of(name, *grid) for grid in ((2, 2), (4, 1), (3, 5))]
    for size in sizes:
        for model in (theirs, ours):
            model.set_input_size(size)
        images = torch.randn(2, 3, *size)
        close(ours(images), theirs(images), 2e-4)
    keywords = dict(depth=DEPTH, num_classes=7, img_size=size_of(name), dynamic_img_size=True)
    theirs, ours, _ = pair_of(name, massive=False, **keywords)
    for size in sizes:
        images = torch.randn(2, 3, *size)
        close(ours.eval()(images), theirs.eval()(images), 2e-4)


@torch.no_grad()
def test_copy_of_the_model_is_another(name, tmp_path):
    """Pickles, deep copies, and every way of timm's to write and read weights."""
    theirs, ours, images = kept_pair(name)
    expected = ours(images)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        assert torch.equal(again(images), expected)
        assert again.pretrained_cfg == ours.pretrained_cfg
    getter = timm.models._features.FeatureGetterNet(copy.deepcopy(ours), [0])
    assert torch.equal(pickle.loads(pickle.dumps(getter))(images)[0], getter(images)[0])
    keywords = dict(depth=DEPTH, num_classes=7, img_size=size_of(name))
    torch.save(ours.state_dict(), tmp_path / "weights.pth")
    from_ours = timm.create_model(name, checkpoint_path=tmp_path / "weights.pth", **keywords).eval()
    close(from_ours(images), theirs(images), 1e-6)
    vitfast.save_checkpoint(ours, tmp_path / "weights.safetensors")
    for file in ("weights.pth", "weights.safetensors"):
        again = create_model(name, **keywords).eval()
        vitfast.load_checkpoint(again, tmp_path / file, allow_pickle=True)
        assert torch.equal(again(images), expected)
        timm.models.load_checkpoint(again, str(tmp_path / file))
        assert torch.equal(again(images), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", quickly(*TO_ONNX))
@torch.no_grad()
def test_onnx_file_computes_something_else(name, tmp_path):
    model = create_model(name, depth=1, num_classes=7, img_size=size_of(name)).eval()
    model.load_state_dict({k: v for k, v in kept_pair(name)[1].state_dict().items() if k in model.state_dict()})
    images = kept_pair(name)[2]
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    expected = model(images).numpy()
    assert numpy.linalg.norm(found - expected) <= 2e-4 * numpy.linalg.norm(expected)
