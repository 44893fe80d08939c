"""What timm, and people who have timm's models, do with a patched one; and models of timm of which parts are left."""

import copy
import warnings
from functools import partial

import pytest
import timm
import timm.layers
import timm.models.vision_transformer as vision_transformer
import timm.optim
import timm.utils
import torch
from patch_pair import build, equal, near, ops_of
from timm.layers import Attention, set_fast_norm
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import Block, VisionTransformer
from timm.utils.attention_extract import AttentionExtract
from timm_pair import run
from torch import nn

import vitfast

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}


def pair(name="vit", train=False, **changes):
    """A model and its patched copy."""
    model, images = build(name, massive=False, train=train, **changes)
    patched = copy.deepcopy(model)
    vitfast.patch(patched).require("attention", "norm", "mlp")
    return model, patched, images


def allowed(count, n):
    """A mask of which every row has something left."""
    mask = torch.rand(count, 1, n, n) < 0.6
    return mask | torch.eye(n, dtype=torch.bool)


CALLS = {
    "forward_features": lambda model, x: model.forward_features(x),
    "forward_head": lambda model, x: model.forward_head(model.forward_features(x), pre_logits=True),
    "forward_intermediates": lambda model, x: model.forward_intermediates(x, indices=2, norm=True, output_fmt="NLC"),
    "prefix tokens": lambda model, x: model.forward_intermediates(
        x, indices=[0], return_prefix_tokens=True, stop_early=True, intermediates_only=True
    )[0],
    "get_intermediate_layers": lambda model, x: model.get_intermediate_layers(
        x, n=2, reshape=True, return_prefix_tokens=True, norm=True
    ),
    "boolean mask": lambda model, x: model(x, attn_mask=allowed(len(x), 5)),
    "added mask": lambda model, x: model(x, attn_mask=torch.randn(len(x), 1, 5, 5)),
    "causal": lambda model, x: model(x, is_causal=True),
    "block": lambda model, x: model.blocks[0](x=torch.ones(3, 5, 128).cumsum(1).cos()),
    "block, one token": lambda model, x: model.blocks[0](torch.ones(1, 1, 128).cumsum(2).cos()),
    "block, transposed": lambda model, x: model.blocks[0](torch.ones(3, 128, 7).cumsum(1).cos().transpose(1, 2)),
    "block, expanded": lambda model, x: model.blocks[0](torch.ones(1, 7, 128).cumsum(2).cos().expand(3, -1, -1)),
    "other size": lambda model, x: (model.set_input_size(img_size=(48, 64)), model(torch.ones(2, 3, 48, 64)))[1],
    "other classes": lambda model, x: (model.reset_classifier(3, "avg"), model.head.weight.data.cos_(), model(x))[2],
    "no classes": lambda model, x: (model.reset_classifier(0), model(x))[1],
    "pruned": lambda model, x: (model.prune_intermediate_layers([0]), model(x))[1],
}  # fmt: skip


def flat(outs):
    return [outs] if isinstance(outs, torch.Tensor) else [t for out in outs for t in flat(out)]


@pytest.mark.parametrize("fused", [True, False], ids=["SDPA", "weights"])
@pytest.mark.parametrize("call", CALLS)
def test_call_gives_something_else(call, fused):
    """A mask, a size or an index that a patched block ignores."""
    model, patched, images = pair(img_size=32)
    for block in (*model.blocks, *patched.blocks):
        block.attn.fused_attn = fused
    results, ops = [], None
    for each in (model, patched):
        torch.manual_seed(1)
        out, ops = ops_of(lambda each=each: CALLS[call](each, images))
        results.append(flat(out))
    assert {"mlp"} <= ops and ("attention_qkv" in ops) == (call not in ("boolean mask", "added mask", "causal"))
    for one, other in zip(*results, strict=True):
        near(one, other)


@pytest.mark.parametrize("patch_first", [True, False])
def test_features_only_loses_the_patch(patch_first):
    """`features_only=True`, whose wrapper cuts blocks off."""
    model, patched, images = pair(depth=3)
    expected = FeatureGetterNet(model, out_indices=[0, 1])(images)
    if not patch_first:
        vitfast.unpatch(patched)
    wrapped = FeatureGetterNet(patched, out_indices=[0, 1])
    if not patch_first:
        vitfast.patch(wrapped).require("attention", "norm", "mlp")
    found, ops = ops_of(lambda: wrapped(images))
    assert "mlp" in ops and len(wrapped.model.blocks) == 2
    for one, other in zip(found, expected, strict=True):
        near(one, other)


def test_checkpoint_draws_another_mask():
    """Blocks that are computed again in the backward pass, with their dropouts."""
    rates = {"proj_drop_rate": 0.3, "attn_drop_rate": 0.4, "drop_path_rate": 0.5}
    model, patched, images = pair(train=True, batch=8, **rates)
    expected = run(patched, images)
    for reentrant in (False, True):
        timm.layers.config.set_reentrant_ckpt(reentrant)
        try:
            for each in (model, patched):
                each.set_grad_checkpointing(True)
            (out, grads), (_, stock) = run(patched, images), run(model, images)
        finally:
            timm.layers.config.set_reentrant_ckpt(False)
        equal(out, expected[0])
        for name, grad in grads.items():
            near(grad, expected[1][name], 1e-5)
            near(grad, stock[name], 1e-4)


def test_average_of_weights_is_another_model():
    """timm's ModelEmaV3: a copy of the patched model, which stays patched and follows its weights, not its own."""
    model, patched, images = pair()
    averaged = timm.utils.ModelEmaV3(patched, decay=0.5)
    with torch.no_grad():
        for each in (model, patched):
            for p in each.parameters():
                p.mul_(1.1)
    averaged.update(patched)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5 * (1 / 1.1 + 1))
    found, ops = ops_of(lambda: averaged(images))
    assert "mlp" in ops
    near(found, model(images), 1e-4)
    assert (patched(images) - found).norm() > 1e-2 * found.norm()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_optimizer_has_other_groups(optimizer):
    """timm's groups with layer decay are made by names, and state is kept by index."""
    model, patched, images = pair("deit3", train=True)
    steps = []
    for each in (model, patched):
        made = timm.optim.create_optimizer_v2(each, opt=optimizer, lr=1e-3, weight_decay=0.05, layer_decay=0.75)
        run(each, images)
        made.step()
        names = {p: name for name, p in each.named_parameters()}
        groups = [([names[p] for p in g["params"]], g["lr_scale"], g["weight_decay"]) for g in made.param_groups]
        steps.append((groups, each.state_dict()))
        made.load_state_dict(made.state_dict())
    equal(steps[1][0], steps[0][0])
    # steps of a whole lr whatever the gradient's size, so that where it is 0 rounding decides
    atol = 0 if optimizer == "sgd" else 3e-3
    for name, t in steps[0][1].items():
        assert (steps[1][1][name] - t).abs().max() <= 1e-5 * t.abs().max() + atol, name


def test_frozen_parts_get_gradients_or_others_none():
    """`timm.utils.freeze`: the frozen half of an op's weights, and no gradient for its input."""
    model, patched, images = pair(train=True)
    for each in (model, patched):
        timm.utils.freeze(each, ["patch_embed", "blocks.0", "blocks.1.attn.qkv", "blocks.1.mlp.fc2", "blocks.1.norm2"])
        each.cls_token.requires_grad_(False)
        each.pos_embed.requires_grad_(False)
    (_, grads), (_, expected) = run(patched, images), run(model, images)
    assert {name for name, g in grads.items() if g is None} == {name for name, g in expected.items() if g is None}
    assert sum(g is None for g in grads.values()) > 15
    for name, grad in expected.items():
        if grad is not None:
            near(grads[name], grad, 1e-4)


@pytest.mark.parametrize("method", ["hook", "fx"])
def test_attention_maps_are_not_there(method):
    """timm's AttentionExtract, by hooks on dropouts that ops skip, or by a graph that has no ops."""
    model, patched, images = pair()
    for each in (model, patched):
        for block in each.blocks:
            block.attn.fused_attn = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, found = (AttentionExtract(each, method=method)(images) for each in (model, patched))
    assert found.keys() == expected.keys() and len(found) == 2
    for name, t in expected.items():
        assert t.shape == (len(images), 2, 7, 7)
        near(found[name], t)


def test_attention_of_one_block_is_watched():
    """The other blocks lose their ops, or this one its maps: what is decided for a model and not for a module."""
    model, patched, images = pair()
    seen = []
    patched.blocks[1].attn.attn_drop.register_forward_hook(lambda *given: seen.append(given[2]))
    patched.blocks[1].attn.fused_attn = False
    near(patched(images), model(images))
    assert len(seen) == 1
    left = vitfast.patch(patched).left
    assert [(part.name, part.kind) for part in left] == [("blocks.1.attn", "attention")]
    assert "attn.attn_drop has forward hooks" in left[0].reason


def vit(**keywords):
    return VisionTransformer(**SMALL | keywords)


def gated():
    model = vit()
    for block in model.blocks:
        block.attn = Attention(64, 2, qkv_bias=True, gated=True)
    return model


def fast_norms():
    set_fast_norm(True)
    try:
        return vit(qk_norm=True)
    finally:
        set_fast_norm(False)


class Doubled(Block):
    def forward(self, x, **how):
        return 2 * super().forward(x, **how)


class Renamed(Block):
    pass


class NoisyLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def noisy():
    model = vit()
    model.blocks[0].attn.qkv, model.blocks[1].mlp.fc2 = NoisyLinear(64, 192), NoisyLinear(256, 64)
    return model


def named(name, **keywords):
    return partial(timm.create_model, name, num_classes=5, **keywords)


NARROW = {"embed_dim": 64, "num_heads": 2, "depth": 2}
# what is not known: (the model, what its report says of it, the kinds that are fused beside it)
LEFT = {
    "post-norm": (partial(vit, block_fn=vision_transformer.ResPostBlock), "ResPostBlock", ""),
    "parallel": (partial(vit, block_fn=vision_transformer.ParallelScalingBlock), "ParallelScalingBlock", ""),
    "three things": (partial(vit, block_fn=vision_transformer.ParallelThingsBlock), "ParallelThingsBlock", ""),
    "parallel, differential": (partial(vit, block_fn=vision_transformer.DiffParallelScalingBlock), "DiffParallel", ""),
    "differential": (partial(vit, attn_layer="diff"), "attn is timm.layers.diff_attention.DiffAttention", "norm mlp"),
    "gated": (gated, "attn.gate is Linear, not nothing", "norm mlp"),
    "gate last": (partial(vit, mlp_layer=timm.layers.GluMlp), "mlp has its gate last", "attention norm"),
    "fast norms": (fast_norms, "norm1 has timm's fast norm on", "mlp"),
    "own block": (partial(vit, block_fn=Doubled), "test_patch_timm_tools.Doubled, which", ""),
    "own name": (partial(vit, block_fn=Renamed), "test_patch_timm_tools.Renamed", ""),
    "pooled": (partial(vit, block_fn=Doubled, global_pool="map", class_token=False), "blocks.* (2)", ""),
    "own linear": (noisy, "test_patch_timm_tools.NoisyLinear, which", "attention norm mlp"),
    "Eva": (named("eva02_tiny_patch14_224", img_size=28, **NARROW), "EvaBlock", ""),
    "DINOv3": (named("vit_small_patch16_dinov3", img_size=32, **NARROW), "EvaBlock", ""),
    "Swin": (named("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), embed_dim=24), "SwinTransformer", ""),
    "BEiT": (named("beit_base_patch16_224", img_size=32, **NARROW), "timm.models.beit.Block", ""),
    "relative positions": (named("vit_relpos_small_patch16_224", img_size=32, **NARROW), "RelPosBlock", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_unknown_block_is_guessed_or_not_named(name, train):
    """A block that resembles one that is known: bit for bit what it was, and the report says which class it is."""
    make, words, fused = LEFT[name]
    model = make().train(train)
    images = torch.randn(2, 3, *[getattr(model, "img_size", None) or model.patch_embed.img_size[0]] * 2)
    expected = run(model, images)
    report = vitfast.patch(model)
    assert words in str(report)
    assert {part.kind for part in report.fused} - {"patch_embed"} == set(fused.split())
    found = run(model, images)
    if not fused:
        equal(found, expected)
        with pytest.raises(RuntimeError, match="nothing of kind 'mlp' is fused: .*which vitfast does not know"):
            report.require("mlp")
    near(found[0], expected[0], 1e-4)
    vitfast.unpatch(model)
    equal(run(model, images), expected)


@pytest.mark.parametrize("name", ["vit_base_r26_s32_224", "naflexvit_base_patch16_gap"])
def test_blocks_around_which_all_is_other_are_other_blocks(name):
    """A CNN stem, and tokens of images of all sizes with a mask: the blocks are VisionTransformer's own."""
    size = {} if "naflex" in name else {"img_size": 64}
    model = timm.create_model(name, num_classes=5, **size, **NARROW).train()
    images = torch.randn(4, 3, 64, 64)
    inputs = [images]
    if "naflex" in name:
        valid = torch.arange(6).expand(4, 6) < torch.tensor([[6], [5], [3], [1]])
        places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij"), -1).reshape(1, 6, 2)
        inputs.append(
            {"patches": torch.randn(4, 6, 768), "patch_coord": places.expand(4, -1, -1), "patch_valid": valid}
        )
    expected = [run(model, each) for each in inputs]
    vitfast.patch(model).require("attention", "norm", "mlp")
    for each, (out, grads) in zip(inputs, expected, strict=True):
        (found, found_grads), ops = ops_of(lambda each=each: run(model, each))
        near(found, out, 1e-4)
        assert "mlp" in ops
        for at, grad in grads.items():
            if grad is not None:
                assert (found_grads[at] - grad).norm() <= 1e-3 * grad.norm() + 1e-6, at


@pytest.mark.parametrize("when", ["before", "after"])
def test_patch_of_the_class_is_passed_over(when, monkeypatch):
    """`Block.forward = mine`, as people do it, before or after `vitfast.patch`; put back, ops run again."""
    model, images = build("vit", massive=False, train=False)
    tokens = torch.randn(2, 5, 128)
    expected = model(images)
    if when == "after":
        vitfast.patch(model).require("mlp")
    with monkeypatch.context() as changes:
        stock = Block.forward
        changes.setattr(Block, "forward", lambda self, x, **how: 2 * stock(self, x, **how))
        doubled, doubled_tokens = model(images), model.blocks(tokens)
        report = vitfast.patch(model)
        near(model(images), doubled)
        equal(model.blocks(tokens), doubled_tokens)
        assert {part.kind for part in report.fused} <= {"patch_embed"} and "patched" in str(report.left)
        assert "patched" in str(vitfast.patch(model))
    assert (doubled - expected).norm() > 1e-2 * expected.norm()
    report = vitfast.patch(model).require("attention", "norm", "mlp")
    assert "mlp" in ops_of(lambda: near(model(images), expected))[1]


@pytest.mark.parametrize("kind", [Attention, timm.layers.Mlp, timm.layers.LayerNorm, timm.layers.LayerScale, nn.GELU])
def test_patch_of_an_inner_class_is_passed_over(kind, monkeypatch):
    model, patched, images = pair(init_values=0.1)
    before = patched(images)
    stock = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *given, **how: 2 * stock(self, *given, **how))
    near(patched(images), model(images))
    assert (patched(images) - before).norm() > 1e-3 * before.norm()
    assert f"is a {kind.__name__}, whose forward was patched" in str(vitfast.patch(patched).left)
