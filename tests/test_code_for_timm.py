"""Code written for timm's modules, on ours: timm's own methods bound to them, and the attributes that people set.

timm's methods are the yardstick: whatever they read or call has to be there, and mean what it means in timm.
"""

import copy
import inspect
import types

import pytest
import timm
import torch
from test_timm_surface import close
from timm.layers import PatchDropout
from timm.models.vision_transformer import VisionTransformer
from timm_pair import build_pair, run
from torch import nn

import vitfast
from vitfast.model.attention_pool import AttentionPool
from vitfast.model.block import Attention, Block, Mlp
from vitfast.model.layers import DropPath, LayerScale, QuickGELU
from vitfast.model.patch_embed import PatchEmbed

OURS = (Attention, Mlp, Block, PatchEmbed, LayerScale, DropPath, QuickGELU, AttentionPool)
# one a kind of block, stem and pooling, of a width at which they are quick
CASES = {
    "vit": {"drop_path_rate": 0.3, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}, "distilled": {}, "deit3": {},
    "dinov2_reg4": {}, "dinov2_giant": {}, "siglip_map": {}, "clip": {}, "aimv2": {}, "beit3": {}, "no_positions": {},
    "qk_norm": {"scale_attn_norm": True, "drop_path_rate": 0.3}, "reg4_gap": {"dynamic_img_size": True},
    "test_vit": {"dynamic_img_size": True, "dynamic_img_pad": True},
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


def pair(case, **changes):
    small = {"embed_dim": 128, "num_heads": 2}
    return build_pair(case, massive=False, **small | CASES[case] | changes)


def equal(models, images, tolerance=2e-4):
    """The same output and gradients in training, from the same draws."""
    cotangent = torch.randn(2, 10)
    (expected, theirs), (found, ours) = (run(model, images, cotangent) for model in models)
    close(found, expected, tolerance)
    # some are zero but for rounding: that of the bias of a norm of keys, to which a softmax is blind
    floor = 1e-4 * max(grad.norm() for grad in theirs.values())
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() <= 10 * tolerance * theirs[name].norm() + floor, name


def timms_class_of(theirs, name):
    return type(theirs.get_submodule(name))


@every_case
@pytest.mark.parametrize("kind", OURS)
def test_forward_of_timms_module_misses_something_on_ours(case, kind):
    theirs, ours, images = pair(case)
    bound = 0
    for name, module in ours.named_modules():
        of_timm = type(module) is kind and timms_class_of(theirs, name).__module__.startswith("timm.")
        if of_timm:
            module.forward = types.MethodType(timms_class_of(theirs, name).forward, module)
            bound += 1
    if bound:
        equal((theirs, ours), images)
    else:
        # a kind that this model does not have, or has only where timm has a module of torch's
        assert kind in (LayerScale, DropPath, QuickGELU, AttentionPool)


METHODS = [
    name for name, member in vars(VisionTransformer).items() if inspect.isfunction(member) and not name.startswith("__")
]  # fmt: skip
# how timm draws fresh weights, and its reader of numpy files
NOT_HERE = {"fix_init_weight", "_init_weights", "load_pretrained"}


def test_method_of_timm_is_missing():
    assert {name for name in METHODS if not hasattr(vitfast.ViT, name)} == NOT_HERE


@every_case
@pytest.mark.parametrize(
    "methods", [["forward"], ["forward_features"], ["_pos_embed"], ["forward_head"], ["pool"], METHODS], ids=str
)
def test_method_of_timms_model_misses_something_on_ours(case, methods):
    theirs, ours, images = pair(case)
    for name in methods:
        if name not in NOT_HERE and name != "init_weights":
            setattr(ours, name, types.MethodType(getattr(type(theirs), name), ours))
    equal((theirs, ours), images)
    if methods is METHODS:
        close(ours.eval().forward_intermediates(images), theirs.eval().forward_intermediates(images), 2e-4)
        close(ours.get_intermediate_layers(images, 1), theirs.get_intermediate_layers(images, 1), 2e-4)


@every_case
def test_subclass_in_timms_style_is_not_asked(case):
    """A model of our class with timm's way through it written out."""

    class Mine(vitfast.ViT):
        def forward_features(self, x):
            x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

        def forward(self, x):
            return self.forward_head(self.forward_features(x))

    theirs, ours, images = pair(case)
    mine = Mine.from_config(ours.config)
    mine.load_state_dict(ours.state_dict())
    equal((theirs, mine), images)


@pytest.mark.parametrize("how", ["class", "instance"])
def test_replaced_positions_are_ignored(how):
    """`_pos_embed` of a subclass, or put there: the op that computes positions must not stand before it."""
    theirs, ours, images = pair("vit")

    def without(self, x):
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)

    theirs._pos_embed = types.MethodType(without, theirs)
    if how == "class":
        config, state = ours.config, ours.state_dict()
        ours = type("Mine", (vitfast.ViT,), {"_pos_embed": without}).from_config(config)
        ours.load_state_dict(state)
    else:
        ours._pos_embed = types.MethodType(without, ours)
        with pytest.raises(NotImplementedError, match="patched _pos_embed"):
            vitfast.prepare(copy.deepcopy(ours).eval())
    cotangent = torch.randn(2, 10)
    (expected, _), (found, grads) = (run(model, images, cotangent) for model in (theirs, ours))
    close(found, expected, 2e-4)
    assert grads["pos_embed"] is None


def test_positions_of_patches_without_a_grid_are_wrong_or_obscure():
    ours = pair("vit", dynamic_img_size=True)[1]
    with pytest.raises(ValueError, match=r"patches must be \[B, rows, columns, D\], got \[2, 6, 128\]"):
        ours._pos_embed(torch.randn(2, 6, 128))
    with pytest.raises(ValueError, match=r"patches must be \[B, N, D\], got \[2, 3, 2, 128\]"):
        pair("vit")[1]._pos_embed(torch.randn(2, 3, 2, 128))


@pytest.mark.parametrize("case", ["vit", "dinov2_reg4", "siglip_map"])
def test_patch_dropout_is_ignored(case):
    theirs, ours, images = pair(case)
    for model in (theirs, ours):
        model.patch_drop = PatchDropout(0.5, num_prefix_tokens=model.num_prefix_tokens)
    equal((theirs, ours), images)
    with torch.no_grad():
        close(vitfast.prepare(ours.eval())(images), theirs.eval()(images), 1e-3)
    with pytest.raises(NotImplementedError, match="patch_drop is timm"):
        vitfast.checkpoints.described.config_of(ours)


@pytest.mark.parametrize("case", ["vit", "qk_norm", "siglip_map"])
def test_weights_of_unfused_attention_do_not_exist(case):
    """`fused_attn = False`, then a hook on attn_drop, as notebooks do that show attention; the softmax has to run."""
    theirs, ours, images = pair(case)
    maps = []
    for model in (theirs, ours):
        seen = []
        for block in model.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(lambda *args, seen=seen: seen.append(args[1][0]))
        equal((theirs, model), images) if model is ours else run(theirs, images)
        maps.append([m for m in seen[-len(model.blocks) :]])
    close(maps[1], maps[0], 2e-4)


def test_unfused_attention_runs_as_the_fused_op():
    _, ours, images = pair("vit")
    for block in ours.blocks:
        block.attn.fused_attn = False
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        ours(images)
    called = {event.key for event in profile.key_averages()}
    assert not any("attention" in name for name in called) and "aten::softmax" in called
    # a way to compute, not another function
    assert vitfast.checkpoints.described.config_of(ours) == ours.config


@pytest.mark.parametrize("case", ["vit", "beit3", "dinov2_giant"])
def test_gate_of_attention_is_ignored(case):
    """timm's gated attention: a linear layer whose sigmoid multiplies what attention gives."""
    theirs, ours, images = pair(case)
    for block, other in zip(theirs.blocks, ours.blocks, strict=True):
        block.attn.gate = nn.Linear(theirs.embed_dim, block.attn.attn_dim)
        other.attn.gate = copy.deepcopy(block.attn.gate)
    equal((theirs, ours), images)
    assert "attn.gate is torch.nn.modules.linear.Linear" in str(vitfast.explain(ours))
    for refuse in (vitfast.prepare, vitfast.checkpoints.described.config_of):
        with pytest.raises(NotImplementedError, match="gate"):
            refuse(ours.eval())


@every_case
def test_causal_attention_sees_what_comes_after(case):
    theirs, ours, images = pair(case)
    if case == "siglip_map":
        theirs, ours = theirs.eval(), ours.eval()
    calls = {
        "forward": lambda m: m(images, is_causal=True), "positional": lambda m: m(images, None, True),
        "forward_features": lambda m: m.forward_features(images, is_causal=True),
        "forward_intermediates": lambda m: m.forward_intermediates(images, is_causal=True),
        "block": lambda m: m.blocks[0](torch.ones(2, 5, m.embed_dim), None, True),
        "attention": lambda m: m.blocks[0].attn(torch.ones(2, 5, m.embed_dim).cumsum(1), is_causal=True),
    }  # fmt: skip
    if case == "distilled":
        # timm's two-headed model takes the arguments of the plain one
        assert inspect.signature(type(theirs).forward).parameters.keys() >= {"is_causal"}
    with torch.no_grad():
        for name, call in calls.items():
            torch.manual_seed(2)
            expected = call(theirs.eval())
            torch.manual_seed(2)
            found = call(ours.eval())
            close(found, expected, 2e-4), name
        prepared = vitfast.prepare(ours)
        close(prepared(images, is_causal=True), theirs(images, is_causal=True), 1e-3)
        close(prepared.forward_features(images, is_causal=True), theirs.forward_features(images, is_causal=True), 1e-3)
    N = ours.embed(images).shape[1]
    for call in (ours, ours.forward_features, ours.forward_intermediates):
        with pytest.raises(ValueError, match="is_causal must be False where attn_mask is given, got True"):
            call(images, attn_mask=torch.ones(N, N, dtype=torch.bool), is_causal=True)


@pytest.mark.parametrize("fmt", ["NCHW", "NHWC", "NLC", "NCL"])
@pytest.mark.parametrize("path", ["op", "watched"])
def test_layout_of_patches_is_another(fmt, path):
    theirs, ours, images = pair("vit")
    for model in (theirs, ours):
        model.patch_embed.flatten, model.patch_embed.output_fmt = False, timm.layers.Format(fmt)
    if path == "watched":
        ours.patch_embed.proj.register_forward_hook(lambda *_: None)
    close(ours.patch_embed(images), theirs.patch_embed(images), 2e-5)
    ours.patch_embed.output_fmt = "HWC"
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', 'NHWC', 'NLC' or 'NCL', got 'HWC'"):
        ours.patch_embed(images)


def test_size_that_is_not_strict_is_refused():
    """The usual way to other sizes by hand: not strict, and positions of one's own."""
    theirs, ours, _ = pair("vit")
    images = torch.randn(2, 3, 64, 64)
    for model in (theirs, ours):
        model.patch_embed.strict_img_size = False
        torch.manual_seed(0)
        model.pos_embed = nn.Parameter(torch.randn(1, 17, 128))
    equal((theirs, ours), images)
    with pytest.raises(ValueError, match="multiples of the patch 16x16, got 65x64"):
        ours(torch.randn(1, 3, 65, 64))
    for model in (theirs, ours):
        model.dynamic_img_size, model.patch_embed.flatten = True, False
        model.patch_embed.output_fmt = "NHWC"
        model.patch_embed.grid_size = (4, 4)
    equal((theirs, ours), torch.randn(2, 3, 32, 48))


@pytest.mark.parametrize("subset", [None, 0.1])
def test_drop_path_scales_where_it_is_told_not_to(subset):
    theirs, ours, images = pair("vit", drop_path_rate=0.5, proj_drop_rate=0.0, attn_drop_rate=0.0)
    images = images.repeat(4, 1, 1, 1)
    for model in (theirs, ours):
        for module in model.modules():
            if type(module).__name__ == "DropPath":
                module.scale_by_keep = False
    ours.set_drop_path_subset(subset)
    cotangent = torch.randn(8, 10)
    (expected, _), (found, _) = (run(model, images, cotangent) for model in (theirs, ours))
    close(found, expected, 2e-4)


READ_ONLY = [("mlp", "gate_last", True), ("mlp", "chunk_dim", 1), ("ls1", "inplace", True)]


@pytest.mark.parametrize(("part", "name", "value"), READ_ONLY, ids=str)
def test_attribute_of_timm_changes_nothing_without_a_word(part, name, value):
    theirs, ours, _ = pair("dinov2_giant")
    module = getattr(ours.blocks[0], part)
    assert getattr(module, name) == getattr(getattr(theirs.blocks[0], part), name)
    with pytest.raises(AttributeError):
        setattr(module, name, value)


@every_case
def test_attribute_of_timms_module_is_missing_or_another(case):
    """All that is plain: numbers, texts, sizes."""
    theirs, ours, _ = pair(case)
    of_timm = dict(theirs.named_modules())
    compared = 0
    for name, module in ours.named_modules():
        other = of_timm[name]
        if type(module) is vitfast.ViT or type(module) not in OURS or isinstance(other, nn.Identity):
            continue
        for attribute, value in vars(other).items():
            if attribute.startswith("_") or isinstance(value, nn.Module):
                continue
            assert hasattr(module, attribute), f"{name}.{attribute}"
            # a rate of stochastic depth was rounded to fp32 in timm
            expected = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            assert getattr(module, attribute) == expected, f"{name}.{attribute}"
            compared += 1
    assert compared > 10
    for attribute, value in vars(theirs).items():
        # how timm draws fresh weights
        if attribute.startswith("_") or attribute in ("weight_init_mode", "fix_init", "pretrained_model_args"):
            continue
        found = getattr(ours, attribute)
        if attribute in ("pretrained_cfg", "default_cfg"):
            value = {key: entry for key, entry in value.items() if key != "notes"}
        assert found == value, attribute


PRUNED = [(1, False, True), (1, True, True), ([0], True, False), ([0, -1], False, True)]


@pytest.mark.parametrize("case", ["vit", "distilled", "dinov2_reg4", "siglip_map", "reg4_gap", "aimv2"])
@pytest.mark.parametrize(("indices", "prune_norm", "prune_head"), PRUNED, ids=str)
def test_pruned_model_is_another(case, indices, prune_norm, prune_head):
    theirs, ours, images = pair(case, depth=3)
    kept = [model.prune_intermediate_layers(indices, prune_norm, prune_head) for model in (theirs, ours)]
    assert kept[0] == kept[1] and ours.config.depth == len(ours.blocks) == len(theirs.blocks)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs, ours = theirs.eval(), ours.eval()
    close(ours.forward_intermediates(images, kept[0]), theirs.forward_intermediates(images, kept[0]), 2e-4)
    close(ours(images), theirs(images), 2e-4)
    assert (ours.num_classes, ours.global_pool) == (theirs.num_classes, theirs.global_pool)
    rebuilt = vitfast.ViT.from_config(vitfast.checkpoints.described.config_of(ours)).eval()
    rebuilt.load_state_dict(ours.state_dict())
    assert torch.equal(rebuilt(images), ours(images))


@pytest.mark.parametrize("case", ["vit", "dinov2_reg4", "clip", "reg4_gap"])
@pytest.mark.parametrize(("patch", "size"), [(8, None), (32, (64, 96)), ((8, 12), (48, 48)), (20, (60, 40))], ids=str)
def test_other_patch_gives_other_weights(case, patch, size):
    theirs, ours, _ = pair(case)
    if size is None:
        size = ours.patch_embed.img_size
        if any(n % 8 for n in size):
            size = (56, 56)
    for model in (theirs, ours):
        (model.patch_embed.proj.weight if case == "clip" else model.patch_embed.proj.bias).requires_grad_(False)
        model.eval().set_input_size(size, patch)
        assert not model.patch_embed.proj.training
    assert ours.feature_info == [info | {"reduction": ours.patch_embed.feat_ratio()} for info in theirs.feature_info]
    assert ours._model_args["patch_size"] == theirs._model_args["patch_size"] == patch
    close(ours.patch_embed.proj.weight.detach(), theirs.patch_embed.proj.weight.detach(), 1e-4)
    for name in ("patch_size", "img_size", "grid_size", "num_patches"):
        assert getattr(ours.patch_embed, name) == getattr(theirs.patch_embed, name), name
    grads = [[p.requires_grad for p in model.patch_embed.parameters()] for model in (theirs, ours)]
    assert grads[0] == grads[1]
    images = torch.randn(2, 3, *size)
    close(ours.eval()(images), theirs.eval()(images), 1e-3)
    maps = lambda m: m.forward_intermediates(images, intermediates_only=True)  # noqa: E731
    close(maps(ours), maps(theirs), 1e-3)
    rebuilt = vitfast.ViT.from_config(ours.config).eval()
    rebuilt.load_state_dict(ours.state_dict())
    assert torch.equal(rebuilt(images), ours(images))


def test_patch_of_another_stem_is_resampled_or_half_changed():
    ours = pair("vit")[1]
    ours.patch_embed.proj = nn.Sequential(nn.Conv2d(3, 128, 16, 16))
    before = ours.config
    with pytest.raises(NotImplementedError, match="patch_size must stay.*proj is a Sequential"):
        ours.set_input_size(patch_size=8)
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size"):
        pair("vit")[1].set_input_size(50)
    assert ours.config == before and ours.patch_embed.patch_size == (16, 16)
