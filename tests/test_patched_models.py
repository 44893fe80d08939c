"""What people put in the place of methods and parts of a model: asked as timm's is, or refused, never passed over."""

import types

import peft
import pytest
import timm
import torch
from test_code_for_timm import equal, pair
from test_create import ops_called
from test_timm_surface import close
from timm.layers import AttentionPoolLatent, SwiGLU
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import Block as TimmBlock
from timm_pair import run
from torch import nn

import vitfast
from vitfast.checkpoints.described import config_of
from vitfast.model.plain import METHODS

PATCHED = ["forward", "forward_features", "forward_head", "pool", "_pos_embed", "embed"]


def doubled(method):
    def patch(self, *args, **kwargs):
        return 2 * method(self, *args, **kwargs)

    return patch


@pytest.fixture
def patched_class(monkeypatch):
    return lambda kind, name: monkeypatch.setattr(kind, name, doubled(getattr(kind, name)))


@pytest.mark.parametrize("name", PATCHED)
def test_patch_of_the_class_is_ignored(name, patched_class):
    """`vitfast.ViT.forward_features = mine`, as is done to timm's class."""
    theirs, ours, images = pair("vit")
    before = ours(images)
    patched_class(vitfast.ViT, name)
    if name == "embed":
        assert not torch.allclose(ours(images), before, rtol=1e-3)
    else:
        patched_class(type(theirs), name)
        equal((theirs, ours), images)
    for refuse in (vitfast.prepare, config_of):
        with pytest.raises(NotImplementedError, match=name):
            refuse(ours.eval())


@pytest.mark.parametrize("name", PATCHED)
def test_patch_of_one_model_is_prepared_or_described(name):
    _, ours, images = pair("vit")
    setattr(ours, name, types.MethodType(doubled(getattr(vitfast.ViT, name)), ours))
    for refuse in (vitfast.prepare, config_of):
        with pytest.raises(NotImplementedError, match=name):
            refuse(ours.eval())


def test_method_is_not_watched():
    own = {n for kind in (vitfast.ViT, *vitfast.ViT.__mro__[1:2]) for n, m in vars(kind).items() if callable(m)}
    assert {name for name in own if not name.startswith("__")} <= METHODS.keys()


def test_prepared_model_calls_its_compiled_original():
    """`model.compile()` leaves a compiled call on the model, which is no part of a frozen copy."""
    _, ours, images = pair("vit")
    ours.eval().compile(backend="eager")
    expected = ours(images)
    prepared = vitfast.prepare(ours)
    with torch.no_grad():
        out = prepared(images)
        ours.head.weight.zero_()
    close(out, expected.detach(), 1e-3)
    assert not out.requires_grad
    with pytest.raises(RuntimeError, match="head.weight of the original was written to"):
        prepared(images)


def test_compiler_or_exception_switches_models_of_this_thread():
    """A hook that breaks the graph of an exportable model, or raises: the next model is what it was made as."""
    x = torch.randn(2, 3, 32, 32)
    small = {"img_size": 32, "depth": 2, "num_classes": 10}
    build = lambda exportable: vitfast.create_model(  # noqa: E731
        "vit_tiny_patch16_224", exportable=exportable, **small
    ).eval()

    def breaks(module, args, out):
        torch._dynamo.graph_break()

    def raises(module, args, out):
        raise KeyError("mine")

    for hook in (breaks, raises):
        model = build(True)
        model.blocks[0].register_forward_hook(hook)
        compiled = torch.compile(model, backend="eager")
        for call in (model, compiled):
            if hook is raises:
                with pytest.raises(KeyError, match="mine"):
                    call(x)
            else:
                assert ops_called(lambda call=call: call(x))[1] == set()
        assert ops_called(lambda: build(True)(x))[1] == set()
        assert ops_called(lambda: build(False)(x))[1]
        program = torch.export.export(build(True), (x,))
        assert not any("vitfast" in str(node.target) for node in program.graph.nodes)


def test_exportable_is_lost_where_methods_are_ones_own():
    class Mine(vitfast.ViT):
        def forward(self, x):
            return self.head(self.norm(self.blocks(self._pos_embed(self.patch_embed(x))))[:, 0])

    _, ours, images = pair("vit")
    mine = Mine.from_config(ours.config).eval()
    mine.load_state_dict(ours.state_dict())
    expected, some = ops_called(lambda: mine(images))
    assert some
    mine.exportable = True
    found, none = ops_called(lambda: mine(images))
    assert none == set() == ops_called(lambda: mine.blocks[0](torch.ones(1, 4, 128)))[1]
    close(found, expected, 1e-4)
    getter = vitfast.create_model("test_vit2", img_size=64, features_only=True, out_indices=1, exportable=True)
    assert ops_called(lambda: getter(torch.randn(1, 3, 64, 64)))[1] == set()
    mine.exportable = False
    assert ops_called(lambda: mine(images))[1]


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_pooling_that_was_put_there_is_ignored(pool):
    theirs, ours, images = pair("vit", global_pool=pool)
    for model in (theirs, ours):
        torch.manual_seed(0)
        model.attn_pool = AttentionPoolLatent(128, num_heads=2)
    equal((theirs, ours), images)
    with torch.no_grad():
        close(vitfast.prepare(ours.eval())(images), theirs.eval()(images), 1e-3)
    with pytest.raises(NotImplementedError, match="attn_pool is no part of a ViT like this"):
        config_of(ours)


def test_map_pooling_gives_way_to_another_name():
    """timm pools by attention wherever there is a module for it, whatever is asked for."""
    theirs, ours, images = pair("siglip_map")
    tokens = theirs.forward_features(images)
    for name in ("avg", "", "map"):
        close(ours.pool(tokens, name), theirs.pool(tokens, name), 2e-5)
    for model in (theirs, ours):
        model.global_pool = "avg"
    equal((theirs, ours), images)


class Causal(nn.Module):
    """An attention of somebody's own, which looks at what it is told."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return x.flip(-1) if is_causal else x


class Keywords(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, **keywords):
        return self.block(x, **keywords)


def of_timm(theirs, block):
    block.forward = types.MethodType(TimmBlock.forward, block)
    return block


PUT = {
    "attention": lambda theirs, ours: (Causal(), Causal()),
    "wrapper": lambda theirs, ours: (Keywords(theirs), Keywords(ours)),
    "timm's block": lambda theirs, ours: (theirs, theirs),
    "timm's forward": lambda theirs, ours: (theirs, of_timm(theirs, ours)),
}


@pytest.mark.parametrize("what", PUT)
@pytest.mark.parametrize("how", ["is_causal", "attn_mask", "nothing"])
def test_part_that_was_put_there_is_not_told(what, how):
    theirs, ours, images = pair("vit")
    put = PUT[what](theirs.blocks[1], ours.blocks[1])
    for model, part in zip((theirs, ours), put, strict=True):
        if what == "attention":
            model.blocks[1].attn = part
        else:
            model.blocks[1] = part
    N = 7
    given = {"is_causal": {"is_causal": True}, "nothing": {},
             "attn_mask": {"attn_mask": torch.ones(N, N, dtype=torch.bool).tril(2)}}[how]  # fmt: skip
    for model in (theirs, ours):
        model.eval()
    for call in ("forward", "forward_features", "forward_intermediates"):
        found, expected = (getattr(model, call)(images, **given) for model in (ours, theirs))
        close(found, expected, 2e-4)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_override_that_takes_keywords_only_is_called_otherwise(checkpointing):
    class Mine(vitfast.ViT):
        def forward_features(self, x, **keywords):
            return 2 * super().forward_features(x, **keywords)

    theirs, ours, images = pair("vit")
    theirs.forward_features = types.MethodType(doubled(type(theirs).forward_features), theirs)
    mine = Mine.from_config(ours.config)
    mine.load_state_dict(ours.state_dict())
    for model in (theirs, mine):
        model.set_grad_checkpointing(checkpointing)
    equal((theirs, mine), images)
    close(mine.eval()(images, is_causal=True), theirs.eval()(images, is_causal=True), 2e-4)


MODES = {
    "dropouts only": lambda model: [m.train() for m in model.eval().modules() if isinstance(m, nn.Dropout)],
    "all but dropouts": lambda model: [m.eval() for m in model.train().modules() if isinstance(m, nn.Dropout)],
}


@pytest.mark.parametrize("mode", MODES)
def test_dropout_of_attention_is_on_in_another_mode(mode):
    """timm's attention asks for its own mode, not for that of its dropout; Monte-Carlo dropout shows it."""
    theirs, ours, images = pair("vit", attn_drop_rate=0.5, drop_path_rate=0.0, proj_drop_rate=0.0)
    for model in (theirs, ours):
        MODES[mode](model)
    equal((theirs, ours), images)


@pytest.mark.parametrize("dynamic", [False, True])
def test_foreign_stem_has_no_features(dynamic):
    theirs, ours, images = pair("vit", dynamic_img_size=dynamic)
    ours.patch_embed = theirs.patch_embed
    theirs, ours = theirs.eval(), ours.eval()
    close(ours.forward_intermediates(images), theirs.forward_intermediates(images), 2e-4)
    close(ours.get_intermediate_layers(images), theirs.get_intermediate_layers(images), 2e-4)
    close(FeatureGetterNet(ours, [0, 1])(images), FeatureGetterNet(theirs, [0, 1])(images), 2e-4)


@pytest.mark.parametrize("case", ["vit", "dinov2_reg4", "distilled"])
def test_prepared_model_misses_a_token_that_was_taken_off(case):
    theirs, ours, images = pair(case)
    for model in (theirs, ours):
        model.pos_embed = None
    if case != "distilled":  # timm's fails there
        close(ours.eval()(images), theirs.eval()(images), 2e-4)
    with torch.no_grad():
        close(vitfast.prepare(ours.eval())(images), ours(images), 1e-3)


def test_stochastic_depth_that_was_taken_out_costs_the_fused_block():
    theirs, ours, images = pair("vit", drop_path_rate=0.3, attn_drop_rate=0.0, proj_drop_rate=0.0)
    for model in (theirs, ours):
        model.blocks[1].drop_path1 = nn.Identity()
    ours.set_drop_path_subset(0.1)
    close(run(ours, images)[0], run(theirs, images)[0], 2e-4)
    assert vitfast.explain(ours).all_fused
    close(vitfast.prepare(ours.eval())(images), theirs.eval()(images).detach(), 1e-3)


def test_fresh_weights_of_a_foreign_mlp_fail():
    _, ours, images = pair("vit")
    ours.blocks[0].mlp = SwiGLU(128, 256, 128)
    ours.init_weights()
    # its own way: a gate that is open
    assert (ours.blocks[0].mlp.fc1_g.bias == 1).all() and (ours.blocks[1].mlp.fc1.bias == 0).all()
    assert ours(images).isfinite().all()


@pytest.mark.parametrize("lora", [{"target_parameters": ["attn.qkv.weight"]}, {"target_modules": ["qkv"]}], ids=str)
def test_adapter_is_refused_or_fails_for_want_of_a_config(lora):
    theirs, ours, images = pair("vit")
    found = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **lora))
        found.append(run(adapted.eval(), images)[0])
    close(found[1], found[0], 2e-4)
    for model in (timm.create_model("test_vit"), vitfast.create_model("test_vit")):
        with pytest.raises(ValueError, match="target_modules"):
            peft.get_peft_model(model, peft.LoraConfig())
