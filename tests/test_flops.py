"""FLOP counters on our models and ops: what stock operators count, forward and backward."""

import subprocess
import sys

import pytest
import torch
import vit_pytorch
from test_reference import VARIANTS, build, every_variant, reference_of
from timm_pair import build_pair
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import vitfast
from vitfast import ops
from vitfast.ops import _register

aten = torch.ops.aten
# torch counts attention on GPUs only
ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}  # fmt: skip


def count(run):
    """Of the forward, and with the backward."""
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        out = run()
        forward = counter.get_total_flops()
        sum(o.sum() for o in (out if isinstance(out, tuple) else (out,))).backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("family", ["vit", "distilled", "dinov2_giant", "aimv2", "qk_norm", "test_vit", "test_vit3"])
def test_model_counts_other_operations_than_timms(family):
    """Attention for nothing, or twice: as an op and as the products inside."""
    theirs, ours, images = build_pair(family, massive=False)
    expected = count(lambda: theirs(images))
    assert expected[1] > expected[0] > 0
    assert count(lambda: ours(images)) == expected


def test_model_counts_other_operations_than_vit_pytorchs():
    keywords = dict(image_size=16, patch_size=8, num_classes=10, dim=32, depth=2, heads=2, mlp_dim=64, dim_head=16)
    images = torch.randn(2, 3, 16, 16)
    theirs, ours = vit_pytorch.ViT(**keywords), vitfast.ViT(**keywords)
    expected = count(lambda: theirs(images))
    assert count(lambda: ours(images)) == expected and expected[0] > 0


@every_variant
def test_op_counts_other_operations_than_stock(variant):
    name, _, options = VARIANTS[variant]
    tensors = {key: t.requires_grad_(key != "row_scale") for key, t in build(variant).items()}
    stock, own = reference_of(variant), lambda **t: getattr(ops, name)(**t, **options)
    assert count(lambda: own(**tensors)) == count(lambda: stock(**tensors))


@pytest.mark.parametrize("recompute", ["none", "act", "fc1"])
def test_product_that_is_computed_again_is_not_counted(recompute):
    x, w1, w2 = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 4), (8, 4), (4, 8)))
    forward, both = count(lambda: ops.mlp(x, None, None, w1, None, w2, None, recompute=recompute))
    once = 2 * 6 * 32
    assert (forward, both) == (2 * once, 6 * once + once * (recompute == "fc1"))


def test_packed_sequences_count_pairs_of_tokens_of_different_images():
    starts, q = torch.tensor([0, 2, 7], dtype=torch.int32), torch.randn(7, 2, 4, requires_grad=True)
    pairs = 2 * 4 * (2 * 2 + 5 * 5)
    assert count(lambda: ops.attention_varlen(q, q, q, starts)) == (2 * 2 * pairs, 7 * 2 * pairs)
    weight = torch.randn(8, 3, 2, 2, requires_grad=True)
    images = [torch.randn(3, 4, 6), torch.randn(3, 2, 2)]
    products = 2 * (6 + 1) * weight.numel()
    assert count(lambda: ops.patch_embed_packed(images, weight)[0]) == (products, 2 * products)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_gradient_that_nobody_wants_is_counted(frozen):
    tensors = {"x": torch.randn(2, 3, 4), "weight": torch.randn(5, 4)}
    for name, t in tensors.items():
        t.requires_grad_(name != frozen)
    assert count(lambda: ops.linear(**tensors)) == count(lambda: torch.nn.functional.linear(*tensors.values()))


def test_op_is_left_out():
    """An op that a counter does not know counts as nothing."""
    without = {"layer_norm", "layer_norm_backward", "add_layer_norm", "add_layer_norm_backward", "image_rows"}
    known = {op._qualified_op_name.removeprefix("vitfast::") for op in flop_registry if "vitfast" in str(op)}
    assert known | without == {name.removeprefix("vitfast::") for name in torch._C._dispatch_get_all_op_names()
                               if name.startswith("vitfast::")}  # fmt: skip
    assert not known & without and set(_register.IMPLEMENTATIONS) <= known | without


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "vitfast"])
def test_counter_that_is_imported_first_or_last_knows_no_op(first):
    """And vitfast alone imports neither it nor triton, whose import takes longer."""
    second = "vitfast" if first != "vitfast" else "torch.utils.flop_counter"
    code = f"""
import sys, {first}
print("triton" in sys.modules)
import {second}
from torch.utils.flop_counter import flop_registry
print(sum("vitfast" in str(op) for op in flop_registry))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(first != "vitfast"), "17"]


BEFORE = ["importlib.util.find_spec(name)", "importlib.reload(importlib.import_module(name))"]


@pytest.mark.parametrize("before", BEFORE)
def test_counter_that_was_asked_for_or_loaded_again_knows_no_op(before):
    code = f"""
import importlib, importlib.util, vitfast
name = "torch.utils.flop_counter"
{before}
from torch.utils.flop_counter import flop_registry
print(sum("vitfast" in str(op) for op in flop_registry))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["17"]


@pytest.mark.parametrize("family", ["vit", "test_vit3", "dinov2_reg4"])
def test_checkpointing_counts_other_operations_than_timms(family):
    """All blocks as one segment in the place of one each, which computes and keeps more."""
    theirs, ours, images = build_pair(family, massive=False)
    for model in (theirs, ours):
        model.set_grad_checkpointing()
    assert count(lambda: ours(images)) == count(lambda: theirs(images))
