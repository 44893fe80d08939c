"""Parity on weights that were trained, and on photographs: against timm and against onnxruntime."""

import contextlib
import copy

import pytest
import timm
import torch
from dinov2_weights import DEPTH, TIMM_NAME, run_graph, state_of_timm
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from textbook import Textbook
from timm_pair import run, taps_of

import vitfast
from vitfast.check.acceptance import accept_model
from vitfast.weights.layouts import LAYOUTS
from vitfast.weights.layouts.layout import written


@pytest.fixture(scope="module")
def images():
    """Two photographs, 224 x 224, normalised as DINOv2 was trained; exact in bf16."""
    photos = [Image.fromarray(photo).resize((224, 224)) for photo in load_sample_images().images]
    pixels = torch.stack([timm.data.transforms.ToTensor()(photo) for photo in photos]).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((pixels - mean) / std).bfloat16().float()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """timm's model and ours from one file, positions resampled from 37 x 37 to 16 x 16 on the way in."""
    file = tmp_path_factory.mktemp("weights") / "dinov2.safetensors"
    save_file(state_of_timm(), file)
    keywords = dict(img_size=224, num_classes=0)
    theirs = timm.create_model(TIMM_NAME, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **keywords)
    return theirs, vitfast.create_model(TIMM_NAME, checkpoint_path=str(file), **keywords)


def relative(value, ref):
    return ((value - ref).norm() / ref.norm()).item()


def test_file_is_loaded_otherwise_than_by_timm(pair):
    """Resampled positions, names, LayerScale."""
    theirs, ours = (model.state_dict() for model in pair)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sum(value.numel() for value in state_of_timm().values()) == 22_056_192


@torch.no_grad()
def test_onnxruntime_computes_other_tokens(pair, images):
    """A formula that timm and we have in common and that is wrong: another exporter's graph on another runtime."""
    ours = copy.deepcopy(pair[1]).eval()
    values = run_graph(images.numpy())
    assert len(values) == 2 + 2 * DEPTH
    # the graph resamples its positions with another filter than timm, so the comparison starts after them
    ours.embed = lambda _: values["patch_tokens"]
    taps = ours.intermediates(images)
    for name, value in values.items():
        assert relative(taps[name], value) < 1e-5, name


@torch.no_grad()
def test_positions_are_resampled_otherwise_than_by_their_library(images, tmp_path):
    """From pixels on, under Hugging Face's names: the graph resamples as Hugging Face does, with its own operators."""
    layout = next(layout for layout in LAYOUTS if layout.name == "hf-dinov2")
    state = written(layout, state_of_timm(), vitfast.config_for(TIMM_NAME))
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    values = run_graph(images.numpy())
    taps = vitfast.load(tmp_path, image_size=224).intermediates(images)
    for name, value in values.items():
        assert relative(taps[name], value) < 1e-5, name
    other = vitfast.load(tmp_path, image_size=224, resampling="timm").intermediates(images)
    assert relative(other["patch_tokens"], values["patch_tokens"]) > 1e-3


def test_trained_weights_show_an_error_that_random_ones_hide(pair, images):
    """Every stage and every gradient, fp64 for the formula, fp32 and bf16 for the rounding."""
    theirs, ours = (copy.deepcopy(model).eval() for model in pair)
    for model in (theirs, ours):
        for p in model.parameters():
            p.data = p.data.bfloat16().float()
    ref = copy.deepcopy(theirs).double()
    cotangent = torch.randn(2, 384).bfloat16()
    expected, grads_ref = run(ref, images.double(), cotangent)
    found, grads = run(copy.deepcopy(ours).double(), images.double(), cotangent)
    assert relative(found, expected) < 1e-12
    assert all(relative(grads[name], grad) < 1e-9 for name, grad in grads_ref.items())
    stages = taps_of(ref, images.double())
    for dtype in (torch.float32, torch.bfloat16):
        low, own = (copy.deepcopy(model).to(dtype) for model in (theirs, ours))
        _, low_grads = run(low, images.to(dtype), cotangent)
        own_out, own_grads = run(own, images.to(dtype), cotangent)
        with torch.no_grad():
            own_stages = own.intermediates(images.to(dtype))
            with Textbook() if dtype is torch.float32 else contextlib.nullcontext():
                low_stages = taps_of(low, images.to(dtype))
        assert own_stages.keys() == stages.keys()
        triples = {"output": (own_out, expected, low_stages["logits"])}
        triples |= {name: (own_stages[name], stages[name], low_stages[name]) for name in stages}
        for name, (value, exact, stock) in triples.items():
            if dtype is torch.bfloat16:
                accept_model(value, exact, stock, what=name)
            else:
                assert relative(value, exact) <= 2 * relative(stock, exact) + 1e-7, name
        ratios = torch.tensor([
            relative(own_grads[name], exact) / (relative(low_grads[name], exact) + 1e-9)
            for name, exact in grads_ref.items()
        ])  # fmt: skip
        assert ratios.log().mean().exp() < 1.25, f"gradients in {dtype}: {ratios.log().mean().exp():.2f} x timm's error"


@torch.no_grad()
@pytest.mark.full
def test_photographs_at_another_size_differ(pair, images):
    """518 pixels, the size of training (positions as stored), and a wide image through set_input_size."""
    theirs, ours = (copy.deepcopy(model).eval() for model in pair)
    for size in ((518, 518), (112, 280)):
        for model in (theirs, ours):
            model.set_input_size(size)
        x = torch.nn.functional.interpolate(images[:1], size=size, mode="bicubic", antialias=True)
        assert relative(ours(x), theirs(x)) < 1e-5
        assert relative(ours.forward_features(x), theirs.forward_features(x)) < 1e-5
