"""Where ops are slower than what a library does on a CPU, patched blocks run the library's forward."""

import pytest
import timm
import torch
from test_create import ops_called
from torch.utils.checkpoint import checkpoint
from vit_pytorch import ViT

import vitfast
from vitfast.ops import _on_cpu

pytestmark = pytest.mark.as_users


def of_timm():
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=10)


def of_vit_pytorch():
    return ViT(image_size=64, patch_size=16, num_classes=10, dim=192, depth=1, heads=3, mlp_dim=768)


@pytest.mark.parametrize("make", [of_timm, of_vit_pytorch])
def test_small_batch_trains_by_ops_or_infers_without(make, monkeypatch):
    """Sixteen images of 17 tokens are little to train on, and enough to infer by ops; 17 * 192 numbers each."""
    model, images = make(), torch.randn(16, 3, 64, 64)
    vitfast.patch(model).require("attention", "norm", "mlp")
    blocks = lambda: {op for op in ops_called(lambda: model(images))[1] if "patch_embed" not in op}  # noqa: E731
    assert blocks() == set()
    assert model.eval() and blocks()
    model.train()
    monkeypatch.setattr(_on_cpu, "TRAINING_BOUND", images.shape[0] * 17 * 192 - 1)
    assert blocks()
    notes = str(vitfast.explain(model))
    assert "run as they are: ops are no faster" in notes and "attention without SDPA" in notes


@pytest.mark.parametrize(
    ("make", "fused"), [(of_timm, True), (of_vit_pytorch, False), (lambda: unfused(of_timm()), False)]
)
def test_attention_that_makes_its_weights_is_trained_by_ops_in_half(make, fused, monkeypatch):
    monkeypatch.setattr(_on_cpu, "TRAINING_BOUND", 0)
    model, images = make().bfloat16(), torch.randn(16, 3, 64, 64).bfloat16()
    vitfast.patch(model)
    attends = lambda: any("attention" in op for op in ops_called(lambda: model(images))[1])  # noqa: E731
    assert attends() is fused
    assert model.eval() and attends()
    model.train()
    model.float()
    images = images.float()
    assert attends()


def test_pass_of_a_checkpoint_is_by_ops_and_the_other_is_not():
    """Reentrant checkpoints run without gradients first: a block inside then sees tokens that want none."""
    model, images = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2), torch.randn(16, 3, 64, 64)
    vitfast.patch(model)

    def step():
        tokens = model.patch_embed(images)
        checkpoint(model.blocks, tokens, use_reentrant=True).sum().backward()

    assert not any("patch_embed" not in op for op in ops_called(step)[1])


def unfused(model):
    for block in model.blocks:
        block.attn.fused_attn = False
    return model
