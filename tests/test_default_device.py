"""Defaults that a process sets after a model was made change nothing: every tensor names its device and dtype."""

import contextlib

import pytest
import torch
from timm_pair import build_pair

import vitfast
from vitfast import ops
from vitfast.model.layers import DropPath
from vitfast.weights.resample import MODES, _interpolate_by_products

FLAVOURS = ["vit", "distilled", "dinov2_reg4", "siglip_map", "clip", "aimv2", "beit3_giant", "qk_norm", "vit_pytorch"]


@contextlib.contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "device meta": lambda: default_device("meta"),
    "inside a device": lambda: torch.device("meta"),
    "dtype float64": lambda: default_dtype(torch.float64),
    "dtype bfloat16": lambda: default_dtype(torch.bfloat16),
}
every_default = pytest.mark.parametrize("default", DEFAULTS)


def model_and_images(flavour):
    """In train mode, with everything on that draws numbers."""
    if flavour == "vit_pytorch":
        keywords = dict(image_size=32, patch_size=8, num_classes=10, dim=64, depth=2, heads=2, mlp_dim=128)
        return vitfast.ViT(**keywords, dropout=0.1, emb_dropout=0.1), torch.randn(4, 3, 16, 32)
    _, ours, images = build_pair(flavour, batch=4)
    ours.train()
    for module in ours.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.3
    return ours, images


def step(model, images):
    """Everything that one step gives, from the same draws."""
    torch.manual_seed(5)
    model.zero_grad()
    out = model(images)
    out.float().square().mean().backward()
    return [out, *(p.grad for p in model.parameters())]


def same(found, expected, what=""):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None), what
        if a is not None:
            assert a.device == b.device and a.dtype == b.dtype and torch.equal(a, b), what


@pytest.mark.slow
@pytest.mark.parametrize(
    # wide ones take the longest, and are no other code
    "flavour",
    [pytest.param(name, marks=[pytest.mark.full] * (name == "beit3_giant")) for name in FLAVOURS],
)
def test_default_changes_a_training_step(flavour):
    model, images = model_and_images(flavour)
    for how in ("plain", "subset", "checkpointing", "autocast", "exportable"):
        model.set_drop_path_subset(0.1 if how == "subset" else None)
        model.set_grad_checkpointing(how == "checkpointing")
        vitfast.set_exportable(how == "exportable")
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                expected = step(model, images)
                for default, enter in DEFAULTS.items():
                    with enter():
                        found = step(model, images)
                    same(found, expected, f"{how}, {default}")
        finally:
            vitfast.set_exportable(False)


@every_default
def test_default_changes_what_else_a_model_does(default):
    """Positions for other sizes, intermediates, a new classifier, masks, and inference on packed weights."""
    model = vitfast.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, dynamic_img_size=True)
    images, pixels = torch.randn(2, 3, 48, 32), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    mask = torch.ones(7, 7, dtype=torch.bool)
    model.eval()

    def everything():
        with torch.no_grad():
            prepared = vitfast.prepare(model, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), threads=None)
            tokens, maps = model.forward_intermediates(images, norm=True)
            taps = list(model.intermediates(images).values())
            masked = model(images, attn_mask=mask)
            return [model(images), tokens, *maps, *taps, masked, prepared(images), prepared(pixels)]

    expected = everything()
    with DEFAULTS[default]():
        same(everything(), expected)
        model.reset_classifier(3)
        model.set_input_size(48)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.float32)}


@every_default
def test_default_changes_the_classifier_of_a_model_without_blocks(default):
    model = vitfast.create_model("vit_tiny_patch16_224", img_size=32, depth=0, num_classes=5)
    with DEFAULTS[default]():
        model.reset_classifier(3)
    assert (model.head.weight.device.type, model.head.weight.dtype) == ("cpu", torch.float32)


@every_default
def test_default_changes_an_op(default):
    """Those that no model calls."""
    sizes, stem = ((32, 32), (16, 48)), torch.randn(8, 3, 16, 16)
    images, prefix = [torch.randn(3, *size) for size in sizes], torch.randn(1, 8)
    rows, kept = torch.randn(7, 2, 8), torch.randn(2, 3, 4, 16)
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)

    def everything():
        tokens, ends = ops.patch_embed_packed(images, stem, prefix=prefix)
        torch.manual_seed(1)
        return [
            tokens, ends, ops.attention_varlen(rows, rows, rows, starts),
            ops.attention_varlen(rows, rows, rows, starts, dropout_p=0.3),
            ops.attention(kept, kept, kept, dropout_p=0.3),
            ops.attention(kept, kept, kept, lengths=torch.tensor([2, 3], device="cpu")),
            ops.attention_weights(kept, kept), *ops.add_layer_norm(rows, rows, None, None, 1e-6),
            _interpolate_by_products(kept, (5, 3), MODES["timm"]),
        ]  # fmt: skip

    expected = everything()
    with DEFAULTS[default]():
        same(everything(), expected)


@every_default
def test_default_changes_a_checkpoint_that_is_read(default, tmp_path):
    model = vitfast.ViT(image_size=32, patch_size=8, num_classes=10, dim=64, depth=1, heads=2, mlp_dim=128)
    vitfast.save_checkpoint(model, tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for file in ("model.safetensors", "model.pt"):
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        with DEFAULTS[default]():
            vitfast.load_checkpoint(model, tmp_path / file, allow_pickle=True)
        same(model.state_dict().values(), before.values())


def test_draws_of_dropped_images_are_not_the_cpu_generators():
    """`set_drop_path_subset` says that it draws on the CPU, whatever the default device is."""
    drop, x = DropPath(0.5), torch.randn(64, 3)
    torch.manual_seed(2)
    expected = torch.empty(64).bernoulli_(0.5).nonzero()[:, 0]
    for enter in DEFAULTS.values():
        torch.manual_seed(2)
        with enter():
            assert torch.equal(drop.kept(x), expected)
