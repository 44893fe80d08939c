"""What `create_model` takes and returns besides the architecture: timm's entries, wrappers and switches."""

import copy
import pickle
import sys

import numpy
import onnxruntime
import pytest
import timm
import torch
from test_timm_surface import close
from timm.models._features import FeatureGetterNet
from timm.utils.onnx import onnx_export
from timm_pair import pair_of
from torch import nn

import vitfast
from vitfast import create_model, list_models

TINY = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "depth": 4, "num_classes": 10}
OPS = ("linear", "mlp", "attention", "attention_qkv", "layer_norm", "patch_embed")


def without_notes(cfg):
    # a sentence of timm's, not a fact that a tool reads
    return {name: entry for name, entry in cfg.items() if name != "notes"}


def test_entry_of_the_weights_is_missing_or_another():
    """timm's tools take ImageNet's transforms, another classifier or no first convolution, without a word."""
    for name in list_models():
        found = create_model(name, device="meta", depth=1).pretrained_cfg
        assert found == without_notes(timm.get_pretrained_cfg(name).to_dict()), name
        assert list(map(type, found.values())) == [type(timm.get_pretrained_cfg(name).to_dict()[key]) for key in found]


def test_entry_names_modules_that_are_not_there():
    for name in ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"):
        model = create_model(name, device="meta", depth=1)
        cfg = model.default_cfg
        heads = (cfg["classifier"],) if isinstance(cfg["classifier"], str) else cfg["classifier"]
        assert all(isinstance(model.get_submodule(head), nn.Linear) for head in heads)
        assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
        assert cfg["input_size"] == (model.in_chans, *model.patch_embed.img_size) and cfg["pool_size"] is None


def test_change_of_one_models_entries_is_seen_by_the_next():
    create_model(TINY, device="meta", depth=1).pretrained_cfg["mean"] = (1, 2, 3)
    assert create_model(TINY, device="meta", depth=1).pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("keywords", [{}, {"img_size": 64}, {"in_chans": 1}, {"dynamic_img_size": True}], ids=str)
def test_timms_helpers_take_the_model_for_another(keywords):
    """The size of the entry in the place of the model's, and arguments that an export leaves out."""
    models = [build(TINY, depth=1, **keywords) for build in (timm.create_model, create_model)]
    for model in models:
        model.reset_classifier(7, "avg")
    for ask in (timm.data.resolve_model_data_config, timm.models.get_model_args, timm.models.get_model_traits):
        theirs, ours = map(ask, models)
        assert ours == theirs, ask
    for model in models:
        model.set_input_size((48, 96))
    theirs, ours = map(timm.models.get_model_args, models)
    assert ours == theirs


def test_config_that_timm_exports_describes_another_model(tmp_path):
    """timm's folder for a hub, read back with timm: the same function."""
    theirs, ours, x = pair_of(TINY, massive=False, **SMALL | {"init_values": 0.1})
    timm.models.save_for_hf(ours.eval(), tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x), ours(x), rtol=1e-4, atol=1e-4)


def test_entries_that_a_script_gives_are_dropped():
    """timm's scripts hand over what `resolve_model_input_args` found, classes, channels and size among it."""
    cfg = timm.get_pretrained_cfg(TINY).to_dict() | {"num_classes": 7, "input_size": (1, 64, 32)}
    for given in ({"pretrained_cfg": cfg}, {"pretrained_cfg_overlay": {"num_classes": 7, "input_size": (1, 64, 32)}}):
        theirs, ours = (build(TINY, depth=1, **given) for build in (timm.create_model, create_model))
        assert (ours.num_classes, ours.in_chans, ours.patch_embed.img_size) == (7, 1, (64, 32))
        assert (theirs.num_classes, theirs.in_chans, theirs.patch_embed.img_size) == (7, 1, (64, 32))
        assert ours.pretrained_cfg == theirs.pretrained_cfg
        assert create_model(TINY, depth=1, **given, num_classes=3).num_classes == 3
    args = timm.models.resolve_model_input_args(TINY, {"img_size": 64, "in_chans": 1}, depth=1)
    theirs, ours = timm.create_model(**args), create_model(**args)
    assert ours.pretrained_cfg == theirs.pretrained_cfg and ours.patch_embed.img_size == (64, 64)
    for given in ({"num_classes": 5}, {}, {"input_size": (1, 32, 32)}):
        theirs, ours = (build(TINY, depth=1, pretrained_cfg=given) for build in (timm.create_model, create_model))
        assert ours.pretrained_cfg == without_notes(theirs.pretrained_cfg)
        assert (ours.num_classes, ours.in_chans) == (theirs.num_classes, theirs.in_chans)
    assert create_model(TINY, depth=1, pretrained_cfg=timm.get_pretrained_cfg(TINY)).num_classes == 1000
    with pytest.raises(TypeError, match="pretrained_cfg_overlay has 'mena', which timm's entries have not"):
        create_model(TINY, pretrained_cfg_overlay={"mena": (0, 0, 0)})
    with pytest.raises(TypeError, match="pretrained_cfg must be a dict.*got 'augreg_in21k'"):
        create_model(TINY, pretrained_cfg="augreg_in21k")


FEATURES = [(TINY, {}), (TINY, {"out_indices": (0, 2)}), (TINY, {"out_indices": [-1]}), (TINY, {"out_indices": 2}),
            ("deit_tiny_distilled_patch16_224", {}), ("test_vit3", {"img_size": 48, "out_indices": (1, 3)}),
            ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "out_indices": 1}),
            ("vit_base_patch16_clip_224", {"out_indices": (0,)}), ("vit_base_patch16_siglip_gap_224", {})]  # fmt: skip


@pytest.mark.parametrize(("name", "keywords"), FEATURES, ids=str)
def test_features_only_gives_other_maps_than_timm(name, keywords):
    keywords = {"img_size": 32, "depth": 4} | keywords
    theirs, ours = (build(name, features_only=True, **keywords).eval() for build in (timm.create_model, create_model))
    assert type(ours) is FeatureGetterNet and type(ours.model) is vitfast.ViT
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    with torch.no_grad():
        for p in theirs.parameters():  # fresh ones with LayerScale would hide another block
            p.add_(0.1 * torch.randn_like(p))
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, *ours.model.patch_embed.img_size)
    close(ours(images), theirs(images), 2e-4)
    for ask in ("channels", "reduction", "module_name", "get_dicts"):
        assert getattr(ours.feature_info, ask)() == getattr(theirs.feature_info, ask)(), ask
    assert ours.feature_info.out_indices == theirs.feature_info.out_indices
    assert ours.pretrained_cfg == without_notes(theirs.pretrained_cfg) and ours.default_cfg is ours.pretrained_cfg
    for ask in (timm.models.get_model_args, timm.models.get_model_traits, timm.data.resolve_model_data_config):
        assert ask(ours) == ask(theirs), ask
    sum(maps.square().mean() for maps in ours(images)).backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_features_of_blocks_or_by_ways_that_are_not_there():
    with pytest.raises(ValueError, match=r"indices must be between -4 and 3, got \[4\]"):
        create_model(TINY, features_only=True, out_indices=[4], **SMALL)
    with pytest.raises(NotImplementedError, match="feature_cls='hook' is not supported, only 'getter'"):
        create_model(TINY, features_only=True, feature_cls="hook", **SMALL)
    assert type(create_model(TINY, features_only=True, feature_cls=FeatureGetterNet, **SMALL)) is FeatureGetterNet


def test_features_without_timm_fail_somewhere_inside(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models._features", None)
    with pytest.raises(ModuleNotFoundError, match="features_only=True returns.*pip install timm"):
        create_model(TINY, features_only=True, **SMALL)


def test_features_are_of_fresh_weights(tmp_path):
    saved = create_model(TINY, **SMALL).eval()
    vitfast.save_checkpoint(saved, tmp_path / "weights.safetensors")
    features = create_model(
        TINY, features_only=True, out_indices=[1], checkpoint_path=tmp_path / "weights.safetensors", **SMALL
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    (expected,) = saved.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert torch.equal(features(x)[0], expected)
    # a file of the getter itself, timm's
    theirs = timm.create_model(TINY, features_only=True, out_indices=[1], **SMALL).eval()
    torch.save(theirs.state_dict(), tmp_path / "getter.pth")
    features = create_model(
        TINY, features_only=True, out_indices=[1], checkpoint_path=tmp_path / "getter.pth", **SMALL
    ).eval()
    torch.testing.assert_close(features(x)[0], theirs(x)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="checkpoint_path lacks blocks.2.attn.proj.bias"):
        create_model(TINY, features_only=True, out_indices=[2], checkpoint_path=tmp_path / "getter.pth", **SMALL)


def test_backbone_of_transformers_does_not_take_our_model(monkeypatch):
    """`TimmBackbone` calls timm's factory; with ours in its place it gives the same maps."""
    from transformers import TimmBackbone, TimmBackboneConfig

    config = TimmBackboneConfig(backbone=TINY, out_indices=[1, 3], use_pretrained_backbone=False)
    theirs = TimmBackbone(config, img_size=32, depth=4).eval()
    monkeypatch.setattr(timm, "create_model", create_model)
    ours = TimmBackbone(config, img_size=32, depth=4).eval()
    assert isinstance(ours._backbone.model, vitfast.ViT)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    found, expected = ours(x), theirs(x)
    assert ours.channels == theirs.channels and ours.stage_names == theirs.stage_names
    for one, other in zip(found.feature_maps, expected.feature_maps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option", ["scriptable", "no_jit", "cache_dir"])
def test_option_of_timms_scripts_is_refused(option):
    for value in (None, True) if option != "cache_dir" else (None, "/tmp/none"):
        assert not create_model(TINY, depth=1, device="meta", **{option: value}).exportable


def ops_called(function):
    """Names of vitfast's ops that ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function()
    return result, {event.key for event in profile.key_averages() if event.key.startswith("vitfast::")}


CALLS = {
    "forward": lambda model, x: model(x), "forward_features": lambda model, x: model.forward_features(x),
    "forward_intermediates": lambda model, x: model.forward_intermediates(x)[0],
    "intermediates": lambda model, x: model.intermediates(x)["logits"], "embed": lambda model, x: model.embed(x),
    "forward_head": lambda model, x: model.forward_head(torch.ones(2, 5, model.embed_dim)),
    "get_intermediate_layers": lambda model, x: model.get_intermediate_layers(x, 1)[0],
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", [TINY, "test_vit3"])
def test_exportable_model_calls_our_ops(call, name):
    """And makes the model beside it slow, or does not come back."""
    exported = create_model(name, exportable=True, **SMALL).eval()
    plain = create_model(name, **SMALL).eval()
    plain.load_state_dict(exported.state_dict())
    x = torch.randn(2, 3, 32, 32)
    found, none = ops_called(lambda: CALLS[call](exported, x))
    expected, some = ops_called(lambda: CALLS[call](plain, x))
    assert none == set()
    assert some or call == "forward_head"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "stock operators  its exportable is True" in str(vitfast.explain(exported))
    assert "its exportable" not in str(vitfast.explain(plain))
    with pytest.raises(TypeError, match="images must be a floating point"):
        exported(x.int())
    assert ops_called(lambda: plain(x))[1]


def test_exportable_model_trains_on_our_ops():
    """Also where blocks are computed again, outside of the call; and then fails for want of the same tensors."""
    model = create_model(TINY, exportable=True, **SMALL).train()
    model.set_grad_checkpointing()
    assert ops_called(lambda: model(torch.randn(2, 3, 32, 32)).sum().backward())[1] == set()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("strict", [True, False])
def test_program_of_an_exportable_model_has_our_ops(strict):
    x = torch.randn(2, 3, 32, 32)
    for exportable in (True, False):
        model = create_model(TINY, exportable=exportable, **SMALL).eval()
        program = torch.export.export(model, (x,), strict=strict)
        ours = {str(node.target) for node in program.graph.nodes if "vitfast" in str(node.target)}
        assert bool(ours) != exportable
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(create_model(TINY, exportable=True, **SMALL).eval(), backend="eager", fullgraph=True)
    assert ops_called(lambda: compiled(x))[1] == set()


@pytest.mark.slow
def test_exportable_model_has_no_onnx_file(tmp_path):
    """timm's onnx_export.py: exportable=True, then timm's helper."""
    model = create_model(TINY, exportable=True, **SMALL | {"depth": 2})
    file = str(tmp_path / "model.onnx")
    onnx_export(model, file, input_size=(3, 32, 32), batch_size=2)
    x = torch.randn(2, 3, 32, 32)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    numpy.testing.assert_allclose(found, model.eval()(x).detach().numpy(), rtol=1e-3, atol=1e-4)


def test_switch_of_one_model_is_lost_or_saved():
    model = create_model(TINY, exportable=True, **SMALL)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.exportable and again.blocks[0].attn.exportable
    rebuilt = vitfast.checkpoints.described.config_of(model)
    assert rebuilt == model.config
