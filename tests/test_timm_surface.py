"""What training code written for timm's VisionTransformer calls and reads, against timm's."""

import copy
import itertools

import pytest
import timm
import torch
from pairwise import covering
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2
from timm_pair import build_pair, pair_of, run

import vitfast

# one model for each way of pooling and each kind of prefix token
SMALL = {
    "token": ("vit_tiny_patch16_224", {"img_size": (32, 48)}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 32}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": (28, 42)}),
    "mean": ("test_vit2", {"img_size": 64}),
    "map": ("test_vit3", {"img_size": (64, 48)}),
    "clip": ("vit_xsmall_patch16_clip_224", {"img_size": 32}),
    "no_prefix": ("vit_medium_patch16_gap_256", {"img_size": 48}),
    "no_final_norm": ("vit_tiny_patch16_224", {"img_size": 32, "final_norm": False}),
}
every_model = pytest.mark.parametrize("name", SMALL)


def pair(name, **changes):
    timm_name, keywords = SMALL[name]
    theirs, ours, images = pair_of(timm_name, massive=False, **{"depth": 3, "num_classes": 10} | keywords | changes)
    return theirs.eval(), ours.eval(), images


def close(found, expected, tolerance=2e-5):
    """Equal structure, and values equal up to fp32 rounding."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert (found - expected).norm() <= tolerance * expected.norm()
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        close(list(found.values()), list(expected.values()), tolerance)
    else:
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            close(one, other, tolerance)


@every_model
def test_attribute_or_parameter_order_is_another(name):
    """Optimizer states and EMA copies go by position; training scripts read these attributes."""
    theirs, ours, _ = pair(name)
    shapes = lambda named: [(key, tuple(value.shape), value.requires_grad) for key, value in named]  # noqa: E731
    assert shapes(ours.state_dict(keep_vars=True).items()) == shapes(theirs.state_dict(keep_vars=True).items())
    assert shapes(ours.named_parameters()) == shapes(theirs.named_parameters())
    assert shapes(ours.named_buffers()) == shapes(theirs.named_buffers()) == []
    for attribute in (
        "num_classes", "embed_dim", "num_features", "head_hidden_size", "in_chans", "global_pool", "num_prefix_tokens",
        "num_reg_tokens", "has_class_token", "no_embed_class", "pool_include_prefix", "dynamic_img_size",
        "grad_checkpointing", "feature_info", "training",
    ):  # fmt: skip
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    for attribute in ("grid_size", "patch_size", "img_size", "num_patches"):
        assert getattr(ours.patch_embed, attribute) == getattr(theirs.patch_embed, attribute), attribute
    for scalar in (True, False):
        assert ours.patch_embed.feat_ratio(scalar) == theirs.patch_embed.feat_ratio(scalar)
    assert len(ours.blocks) == 3
    for attribute in ("num_heads", "head_dim", "scale"):
        assert getattr(ours.blocks[0].attn, attribute) == getattr(theirs.blocks[0].attn, attribute)


@every_model
@torch.no_grad()
def test_features_or_pre_logits_are_another_tensor(name):
    theirs, ours, x = pair(name)
    tokens = theirs.forward_features(x)
    close(ours.forward_features(x), tokens)
    close(ours(x), theirs(x))
    for pre_logits in (False, True):
        close(ours.forward_head(tokens, pre_logits=pre_logits), theirs.forward_head(tokens, pre_logits=pre_logits))
    if name != "distilled":
        close(ours.pool(tokens), theirs.pool(tokens))
    if name not in ("distilled", "map", "no_prefix"):
        for pool_type in ("avg", "token", ""):
            close(ours.pool(tokens, pool_type), theirs.pool(tokens, pool_type))


def test_distilled_model_returns_one_output_to_its_loss():
    theirs, ours, x = pair("distilled")
    for training in (True, False):
        for model in (theirs, ours):
            model.train(training).set_distilled_training(True)
        close(ours(x), theirs(x))
    assert [type(m) for m in ours.get_classifier()] == [torch.nn.Linear] * 2
    ours.train()(x)[1].sum().backward()
    assert ours.head_dist.weight.grad.any() and ours.head.weight.grad is None


RESETS = [
    ("token", (7,)), ("token", (0,)), ("token", (7, "avg")), ("token", (7, "token")), ("registers", (0, "avg")),
    ("mean", (7, "avg")), ("mean", (3, "")), ("map", (7,)), ("map", (7, "avg")), ("map", (0, "")),
    ("no_prefix", (7, "avg")), ("no_prefix", (0, "")), ("no_final_norm", (7, "avg")), ("distilled", (7,)),
    ("distilled", (0,)), ("distilled", (7, "token")), ("clip", (0, "")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments"), RESETS, ids=str)
def test_reset_classifier_leaves_another_model(name, arguments):
    """The norm's place, the pooling, the parameters and their order after a change of head."""
    theirs, ours, x = pair(name)
    for model in (theirs, ours):
        model.train(name != "mean")
        model.reset_classifier(*arguments)
        assert model.head.training == model.training
    assert (ours.num_classes, ours.global_pool) == (theirs.num_classes, theirs.global_pool)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    close(ours(x), theirs(x))
    assert ours.config.num_classes == arguments[0]
    rebuilt = vitfast.ViT.from_config(ours.config)
    rebuilt.load_state_dict(ours.state_dict())
    assert torch.equal(rebuilt(x), ours(x))


def test_pooling_that_a_model_has_no_tokens_for_is_accepted():
    for name in ("mean", "map"):
        ours = pair(name)[1]
        with pytest.raises(ValueError, match="pool must be other than 'token' when class_token is False"):
            ours.reset_classifier(7, "token")
        assert ours.num_classes == 10


def test_new_head_has_another_dtype_or_is_not_zero():
    ours = pair("token")[1].bfloat16()
    ours.reset_classifier(4)
    assert ours.head.weight.dtype is torch.bfloat16 and ours.head.weight.any()
    for name in ("token", "distilled"):
        _, ours, x = pair(name)
        ours.reset_classifier(4, zero_init=True)
        out = ours(x)
        assert out.shape == (2, 4) and not out.any()
        out.sum().backward()
        assert ours.head.weight.grad.any()
    assert ours.get_classifier()[1] is ours.head_dist
    ours = pair("token", num_classes=0)[1]
    assert isinstance(ours.get_classifier(), torch.nn.Identity)


@every_model
def test_layer_decay_gives_another_rate_to_a_parameter(name):
    """Parameter groups of timm's optimizer factory: names, rates and weight decay; the coarse and fine grouping."""
    theirs, ours, _ = pair(name)
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    groups = []
    for model in (theirs, ours):
        names = {p: n for n, p in model.named_parameters()}
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
        groups.append([
            ({key: value for key, value in group.items() if key != "params"}, [names[p] for p in group["params"]])
            for group in optimizer.param_groups
        ])  # fmt: skip
        groups[-1].append([group_parameters(model, model.group_matcher(coarse)) for coarse in (True, False)])
    assert groups[1] == groups[0]


def test_optimizer_state_of_timm_lands_on_other_parameters():
    """A run that is resumed with vitfast: the next step is timm's."""
    theirs, ours, x = pair("registers")
    optimizers = [
        create_optimizer_v2(model.train(), opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.9)
        for model in (theirs, ours)
    ]  # fmt: skip
    for _ in range(2):
        run(theirs, x)
        optimizers[0].step()
    ours.load_state_dict(theirs.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    _, grads = run(theirs, x)
    for name, p in ours.named_parameters():
        p.grad = grads[name].clone()
    for optimizer in optimizers:
        optimizer.step()
    for (name, found), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(found, expected), name


SWITCHES = ("return_prefix_tokens", "norm", "stop_early", "intermediates_only", "output_dict")
INTERMEDIATES = {
    "indices": (None, 1, 2, (0, -1), (1,), (2, 0)), "output_fmt": ("NCHW", "NLC"), "as_list": (False, True),
    **dict.fromkeys(SWITCHES, (False, True)),
}  # fmt: skip
PAIRS = list(covering(INTERMEDIATES))
EVERY = [dict(zip(INTERMEDIATES, case, strict=True)) for case in itertools.product(*INTERMEDIATES.values())]


@pytest.mark.parametrize("options", [PAIRS, pytest.param(EVERY, marks=pytest.mark.full)], ids=["pairs", "all"])
@pytest.mark.parametrize("name", ["token", "registers", "mean", "no_prefix", "no_final_norm", "distilled"])
@torch.no_grad()
def test_intermediates_are_of_other_blocks_or_another_shape(name, options):
    """Every combination of options, against timm's values, shapes and containers."""
    theirs, ours, x = pair(name)
    for how in options:
        how = dict(how)
        if how.pop("as_list") and isinstance(how["indices"], tuple):
            how["indices"] = list(how["indices"])
        close(ours.forward_intermediates(x, **how), theirs.forward_intermediates(x, **how))
        if how["output_fmt"] == "NCHW":
            maps = ours.forward_intermediates(x, how["indices"], intermediates_only=True)
            assert all(m.is_contiguous() for m in maps)


@pytest.mark.parametrize("name", ["token", "registers", "no_prefix"])
@torch.no_grad()
def test_dino_interface_returns_other_layers(name):
    theirs, ours, x = pair(name)
    for n, (reshape, prefix, norm) in itertools.product((1, 2, [0, 2]), itertools.product((False, True), repeat=3)):
        options = dict(n=n, reshape=reshape, return_prefix_tokens=prefix, norm=norm)
        close(ours.get_intermediate_layers(x, **options), theirs.get_intermediate_layers(x, **options))


def mask_of(kind, tokens, batch=2):
    keys = torch.rand(batch, 1, 1, tokens) > 0.3
    keys[..., 0] = True
    return {
        "bool": keys, "bool over queries": torch.rand(tokens, tokens).fill_diagonal_(1) > 0.5,
        "float": torch.zeros(keys.shape).masked_fill(~keys, float("-inf")),
        "bias": torch.randn(batch, 1, tokens, tokens),
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["bool", "bool over queries", "float", "bias"])
@pytest.mark.parametrize("name", ["token", "map"])
def test_mask_is_ignored_or_silent(name, kind):
    """A mask that the fused attention would not see; users learn that it runs the stock path."""
    theirs, ours, x = pair(name)
    mask = mask_of(kind, 6 + 1 if name == "token" else 12 + 1)
    with pytest.warns(UserWarning, match="attn_mask.*scaled_dot_product_attention"):
        out = ours(x, attn_mask=mask)
    expected = theirs(x, attn_mask=mask)
    close(out, expected)
    assert not torch.allclose(out, ours(x), rtol=1e-3)
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    expected.backward(cotangent)
    for (key, p), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        close(p.grad, other.grad, 1e-3), key
    with pytest.warns(UserWarning, match="attn_mask"):
        close(ours.forward_features(x, mask), theirs.forward_features(x, mask))
    with pytest.warns(UserWarning, match="attn_mask"):
        found = ours.forward_intermediates(x, attn_mask=mask, intermediates_only=True)
    close(found, theirs.forward_intermediates(x, attn_mask=mask, intermediates_only=True))


GRIDS = [((2, 8), (4, 4)), ((4, 4), (2, 8)), ((3, 3), (5, 2)), ((2, 2), (1, 1)), ((3, 5), (3, 5)), ((1, 1), (4, 2))]
POSITIONS = {
    "all": {}, "patches": {"no_embed_class": True, "reg_tokens": 2}, "none": {"pos_embed": "none"},
}  # fmt: skip
every_grid = pytest.mark.parametrize(("old", "new"), GRIDS, ids=str)


def pixels(grid, patch=16):
    return grid[0] * patch, grid[1] * patch


@pytest.mark.parametrize("path", ["fused", "watched"])
def test_mask_of_another_shape_fails_somewhere_inside(path):
    _, ours, x = pair("token")
    if path == "watched":
        ours.blocks[0].attn.attn_drop.register_forward_hook(lambda *_: None)
    for mask, error, said in (
        (torch.ones(2, 1, 1, 6, dtype=torch.bool), ValueError, r"mask must be.*\[2, 3, 7, 7\], got \[2, 1, 1, 6\]"),
        (torch.ones(2, 7), ValueError, r"mask must be.*\[2, 3, 7, 7\], got \[2, 7\]"),
        (torch.ones(7, 7, dtype=torch.int64), TypeError, "mask must be bool or float.*got int64"),
        (torch.ones(7, 7, dtype=torch.float64), TypeError, "mask must be bool or float.*got float64"),
    ):
        with pytest.warns(UserWarning, match="attn_mask"), pytest.raises(error, match=said):
            ours(x, attn_mask=mask)


@every_grid
@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_of_another_grid_are_not_timms(old, new, positions):
    """2 x 8 taken for 4 x 4, which has as many patches; rows taken for columns; a prefix that is resampled."""
    theirs, ours, _ = pair("token", img_size=pixels(old), dynamic_img_size=True, **POSITIONS[positions])
    x = torch.randn(2, 3, *pixels(new))
    cotangent = torch.randn(2, 10)
    out, grads = run(ours, x, cotangent)
    expected, their_grads = run(theirs, x, cotangent)
    close(out, expected)
    for name in grads:
        close(grads[name], their_grads[name], 1e-3)
    close(ours.forward_intermediates(x), theirs.forward_intermediates(x))


@every_grid
@pytest.mark.parametrize("positions", POSITIONS)
def test_set_input_size_resamples_otherwise(old, new, positions):
    theirs, ours, _ = pair("token", img_size=pixels(old), **POSITIONS[positions])
    x = torch.randn(2, 3, *pixels(new))
    for model in (theirs, ours):
        if positions != "none":
            model.pos_embed.requires_grad_(False)
        model.set_input_size(pixels(new))
    close(ours(x), theirs(x))
    if positions != "none":
        assert torch.equal(ours.pos_embed, theirs.pos_embed)
        assert isinstance(ours.pos_embed, torch.nn.Parameter) and not ours.pos_embed.requires_grad
    for attribute in ("img_size", "grid_size", "num_patches"):
        assert getattr(ours.patch_embed, attribute) == getattr(theirs.patch_embed, attribute)
    assert ours.config.image_size == pixels(new)
    ours.set_input_size()
    ours.set_input_size(patch_size=16)
    assert ours.config.image_size == pixels(new)


@pytest.mark.parametrize("size", [(47, 33), (32, 48), (1, 50), (64, 64)], ids=str)
def test_padded_images_are_not_timms(size):
    theirs, ours, _ = pair("token", img_size=(32, 48), dynamic_img_size=True, dynamic_img_pad=True)
    x = torch.randn(2, 3, *size)
    close(ours(x), theirs(x))
    close(ours.forward_intermediates(x), theirs.forward_intermediates(x))


@pytest.mark.parametrize("name", ["token", "registers", "mean"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_checkpointed_gradients_differ(name, train):
    """A block that is recomputed with other draws of dropout and drop path, or not recomputed at all."""
    rates = {"drop_path_rate": 0.4, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "pos_drop_rate": 0.1}
    _, ours, x = pair(name, **rates)
    ours.train(train)
    x, cotangent = x.repeat(3, 1, 1, 1), torch.randn(6, 10)
    expected, grads = run(ours, x, cotangent)
    calls = []
    handle = ours.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    ours.set_grad_checkpointing()
    out, again = run(ours, x, cotangent)
    handle.remove()
    assert len(calls) == 2
    out, again = run(ours, x, cotangent)
    assert ours.grad_checkpointing and torch.equal(out, expected)
    for key in grads:
        assert torch.equal(again[key], grads[key]), key
    ours.set_grad_checkpointing(False)
    assert not ours.grad_checkpointing


def test_timms_tools_do_not_find_our_parameters():
    """timm's averaging, freezing and input conversion on our model."""
    _, ours, x = build_pair("test_vit")
    ema = timm.utils.ModelEmaV3(ours, decay=0.5)
    before = ours.head.weight.detach().clone()
    with torch.no_grad():
        ours.head.weight.add_(1)
    ema.update(ours)
    close(ema.module.head.weight.detach(), before + 0.5)
    assert isinstance(ema.module, vitfast.ViT) and ema.module(x).shape == (2, 10)
    timm.utils.freeze(ours, ["patch_embed", "blocks.0"])
    frozen = {name.split(".")[0] for name, p in ours.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed", "blocks"}
    adapted = timm.models.adapt_input_conv(1, ours.patch_embed.proj.weight)
    assert adapted.shape == (64, 1, 16, 16)


def test_head_replaced_by_hand_is_not_followed():
    """`model.head = nn.Linear(...); model.num_classes = ...`, as fine-tuning scripts do."""
    theirs, ours, x = pair("token")
    for model in (theirs, ours):
        torch.manual_seed(0)
        model.head = torch.nn.Linear(192, 4)
        model.num_classes = 4
        model.global_pool = "avg"
    close(ours(x), theirs(x))
    assert (ours.config.num_classes, ours.global_pool) == (4, "avg")
    with pytest.raises(ValueError, match="'map' needs a model built with it"):
        ours.global_pool = "map"
    assert ours.attn_pool is None and pair("map")[1].attn_pool is not None


@pytest.mark.parametrize("name", ["token", "registers", "map", "clip"])
def test_weights_after_meta_stay_uninitialised(name):
    """FSDP2: build on meta, shard, `to_empty`, `init_weights`."""
    timm_name, keywords = SMALL[name]
    build = lambda **more: vitfast.create_model(timm_name, depth=2, num_classes=10, **keywords, **more)  # noqa: E731
    model = build(device="meta").to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(float("nan"))
    model.init_weights()
    for (key, p), fresh in zip(model.named_parameters(), build().parameters(), strict=True):
        assert p.isfinite().all(), key
        assert abs(p.std(correction=0) - fresh.std(correction=0)) <= 0.2 * fresh.std(correction=0) + 1e-3, key
    with pytest.raises(NotImplementedError, match="mode must be ''.*got 'jax'"):
        model.init_weights("jax")


@pytest.mark.parametrize("rate", ["proj_drop_rate", "attn_drop_rate"])
def test_seed_drops_other_numbers_than_timms(rate):
    theirs, ours, x = pair("token", **{rate: 0.3})
    close(run(ours.train(), x)[0], run(theirs.train(), x)[0])


def test_drop_path_scales_by_another_number_under_autocast():
    """1 / 0.9 rounded to bf16, where timm multiplies by it in fp32 behind a LayerScale."""
    _, ours, x = pair("registers", drop_path_rate=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        drop = ours.train().blocks[2].drop_path1
        scale = drop.row_scale(torch.zeros(1000, 1, 384), ours.blocks[2].ls1.gamma)
    assert scale.dtype is torch.float32 and scale.max() == torch.tensor(1.0) / torch.tensor(0.9)
