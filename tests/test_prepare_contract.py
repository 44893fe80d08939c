"""`vitfast.prepare`: frozen by contract, and what cannot be frozen refused with the reason."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from small_models import images_for, tiny
from torch import nn
from torch.nn.utils import parametrizations

import vitfast
from vitfast.inference import cpu_block, prepare
from vitfast.kernels import cpu as cpu_kernels

CHANGES = {
    "head.weight of the original was replaced": lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight + 1)),
    "blocks.1.attn.qkv of the original was replaced": lambda m: setattr(m.blocks[1].attn, "qkv", nn.Linear(192, 576)),
    "blocks.0.mlp.fc1.bias of the original was written to": lambda m: m.blocks[0].mlp.fc1.bias.add_(1),
    "pos_embed of the original was moved": lambda m: setattr(m.pos_embed, "data", m.pos_embed.data.clone()),
    "was written to": lambda m: m.load_state_dict(m.state_dict()),
    "head of the original was replaced": lambda m: m.reset_classifier(5),
}


@pytest.mark.parametrize("message", CHANGES)
def test_stale_weights_are_used(message):
    model = tiny()
    prepared, x = vitfast.prepare(model), images_for(model)
    prepared(x)
    with torch.no_grad():
        CHANGES[message](model)
    calls = (prepared, prepared.forward_features, prepared.intermediates, prepared.forward_intermediates)
    for call in calls:
        with pytest.raises(RuntimeError, match=message.replace(".", r"\.")):
            call(x)
    vitfast.prepare(model.eval())(x)


def test_optimizer_step_goes_unnoticed():
    model = tiny()
    prepared, x = vitfast.prepare(model), images_for(model)
    model(x).sum().backward()
    prepared(x)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="was written to"):
        prepared(x)


@torch.no_grad()
@pytest.mark.parametrize("change", [0.0, 1.0, float("nan")])
def test_replaced_tensor_of_one_number_goes_unnoticed(change):
    """Such a one compares as equal to another object, for which a call would wait for the device."""
    model = tiny(num_classes=1)
    prepared, x = vitfast.prepare(model), images_for(model)
    model.head.bias = nn.Parameter(model.head.bias + change)
    with pytest.raises(RuntimeError, match=r"head\.bias of the original was replaced"):
        prepared(x)


def test_original_is_kept_alive_or_changed():
    """The original runs, pickles and copies as before, and is freed when its user lets go of it."""
    model = tiny()
    before, keys = copy.deepcopy(model), set(vars(model))
    x = images_for(model)
    prepared = vitfast.prepare(model)
    expected = prepared(x)
    assert set(vars(model)) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert str(other) == str(before)
        states = other.state_dict(), before.state_dict()
        assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, states), strict=True))
        vitfast.prepare(other)
    there, parameter = weakref.ref(model), weakref.ref(model.blocks[0].attn.qkv.weight)
    del model
    gc.collect()
    assert there() is None and parameter() is None
    assert torch.equal(prepared(x), expected)


FROZEN = {
    "train": lambda m: m.train(), "requires_grad_": lambda m: m.requires_grad_(),
    "state_dict": lambda m: m.state_dict(), "load_state_dict": lambda m: m.load_state_dict({}),
    "to": lambda m: m.to(torch.float64), "half": lambda m: m.half(),
    "deepcopy": copy.deepcopy, "pickle": pickle.dumps, "reset_classifier": lambda m: m.reset_classifier(3),
    "set_input_size": lambda m: m.set_input_size(64), "init_weights": lambda m: m.init_weights(),
    "checkpointing": lambda m: m.set_grad_checkpointing(),
}  # fmt: skip


@pytest.mark.parametrize("what", FROZEN)
def test_prepared_model_pretends_to_change(what):
    prepared = vitfast.prepare(tiny())
    with pytest.raises(NotImplementedError, match="prepared"):
        FROZEN[what](prepared)
    assert prepared.eval() is prepared


PARTS = {"blocks": lambda m: m.blocks, "block": lambda m: m.blocks[0], "head": lambda m: m.head}


@pytest.mark.parametrize("part", PARTS)
def test_part_of_a_prepared_model_is_copied_or_moved(part, monkeypatch):
    """Kernels have addresses: a copy would read the original's memory, and a moved part memory that was given back."""
    # the head is packed where our products are chosen, which is not on every CPU
    for module in (prepare, cpu_block):
        monkeypatch.setattr(module, "own_product", lambda dtype, K: cpu_kernels.multiplies(dtype))
    prepared, x = vitfast.prepare(tiny()), torch.randn(2, 3, 32, 32)
    logits = prepared(x)
    for change in (copy.deepcopy, pickle.dumps, lambda m: m.half(), lambda m: nn.Sequential(m).to(torch.float64)):
        with pytest.raises(NotImplementedError, match="prepared|addresses"):
            change(PARTS[part](prepared))
    prepared.blocks[0].norm1.weight.data = torch.zeros(0)
    assert torch.equal(prepared(x), logits)


class Other(vitfast.ViT):
    pass


class Subclassed(nn.Parameter):
    pass


def inference_parameter(model):
    with torch.inference_mode():
        model.norm.bias = nn.Parameter(torch.zeros(192))


def patched(model):
    model.forward_features = lambda x: x


REFUSED = {
    "blocks.0.attn.qkv has forward hooks": lambda m: m.blocks[0].attn.qkv.register_forward_hook(lambda *_: None),
    "blocks.1 has forward pre hooks": lambda m: m.blocks[1].register_forward_pre_hook(lambda *_: None),
    "blocks.1.attn.proj is parametrized": lambda m: parametrizations.weight_norm(m.blocks[1].attn.proj),
    "blocks.1.mlp.act is torch.nn.*ReLU": lambda m: setattr(m.blocks[1].mlp, "act", nn.ReLU()),
    "blocks.0.mlp is torch.nn.*Identity": lambda m: setattr(m.blocks[0], "mlp", nn.Identity()),
    "blocks is torch.nn.*Linear": lambda m: setattr(m, "blocks", nn.Linear(2, 2)),
    "blocks.1 is torch.nn.*Sequential": lambda m: m.blocks.__setitem__(1, nn.Sequential()),
    "patched forward_features": patched,
    "the model has forward hooks": lambda m: m.register_forward_hook(lambda *_: None),
    "norm.bias was made in inference mode": inference_parameter,
    "cls_token is a Subclassed": lambda m: setattr(m, "cls_token", Subclassed(m.cls_token.data)),
    "norm.weight is on meta": lambda m: m.norm.to("meta"),
    "head.weight is float64": lambda m: m.head.double(),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_model_that_cannot_be_frozen_is_not_refused_with_the_reason(reason):
    model = tiny()
    REFUSED[reason](model)
    with pytest.raises(NotImplementedError, match=reason):
        vitfast.prepare(model)


def test_subclass_or_stranger_is_taken_for_a_vit():
    with pytest.raises(NotImplementedError, match="it is a Other"):
        vitfast.prepare(Other(image_size=32, patch_size=8, num_classes=2, dim=32, depth=1, heads=2, mlp_dim=64))
    with pytest.raises(TypeError, match="must be a vitfast.ViT, got Linear"):
        vitfast.prepare(nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="PreparedViT"):
        vitfast.prepare(vitfast.prepare(tiny()))


@pytest.mark.parametrize("error, keywords", [
    (TypeError, {"dtype": "bf16"}), (NotImplementedError, {"dtype": torch.float16}),
    (TypeError, {"mean": "red", "std": (1, 1, 1)}), (TypeError, {"mean": (0, 0, 0)}),
    (ValueError, {"mean": (0, 0), "std": (1, 1)}), (ValueError, {"mean": (0, 0, 0), "std": (1, 0, 1)}),
    (TypeError, {"threads": 1.5}), (TypeError, {"threads": True}), (ValueError, {"threads": 0}),
])  # fmt: skip
def test_bad_argument_is_taken(error, keywords):
    with pytest.raises(error, match="prepare: "):
        vitfast.prepare(tiny(), **keywords)


STEMS = {
    "vit-pytorch": lambda: vitfast.ViT(
        image_size=32, patch_size=8, num_classes=10, dim=64, depth=1, heads=2, mlp_dim=64, dim_head=32
    ),
    "packed": tiny,
    "norm before the blocks": lambda: tiny("vit_base_patch16_clip_224", embed_dim=64, num_heads=2),
    "watched": lambda: _watched(tiny()),
    "replaced": lambda: _replaced(tiny()),
}
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint16, torch.bool, torch.complex64]


def _watched(model):
    model.patch_embed.register_forward_hook(lambda *_: None)
    return model


def _replaced(model):
    model.patch_embed = nn.Sequential(nn.Conv2d(3, 192, 16, 16), nn.Flatten(2), nn.Softmax(-1))
    model.patch_embed.append(_Transposed())
    return model


class _Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


@pytest.mark.parametrize("stem", STEMS)
def test_numbers_that_are_no_pixels_are_read(stem):
    """Labels in the place of images, or pixels that nobody normalised: TypeError, as the eager model says."""
    model = STEMS[stem]().eval()
    prepared = vitfast.prepare(model)
    x = torch.ones(1, 3, *model.config.image_size)
    prepared(x)
    calls = [prepared, prepared.forward_features, prepared.intermediates]
    # asks a stem of ours for the grid
    calls += [prepared.forward_intermediates] if stem != "replaced" else []
    for call in calls:
        for dtype in WHOLE:
            with pytest.raises(TypeError, match="images must be a floating point tensor"):
                call(x.to(dtype))
        with pytest.raises(TypeError, match="images must be a floating point tensor"):
            call(x.numpy())
    if stem != "replaced":
        with pytest.raises(TypeError, match="images must be a floating point tensor"):
            model(x.long())


class AlwaysDrops(nn.Module):
    """Dropout that eval mode does not switch off."""

    def forward(self, x):
        torch.manual_seed(5)
        return nn.functional.dropout(x, 0.5, training=True)


OUTSIDE = {
    "hook": lambda m, name: getattr(m, name).register_forward_hook(lambda module, given, out: out * 2),
    "norm": lambda m, name: setattr(m, name, nn.LayerNorm(192).eval()),
    "projection": lambda m, name: setattr(m, name, nn.Sequential(nn.Linear(192, 192)).eval()),
    "Monte-Carlo dropout": lambda m, name: setattr(m, name, AlwaysDrops().eval()),
}


@pytest.mark.parametrize("change", OUTSIDE)
@pytest.mark.parametrize("name", ["pos_drop", "head_drop"])
def test_part_outside_of_the_blocks_is_left_out(name, change):
    """What stands in the place of a dropout, or watches it."""
    model = tiny()
    plain, x = model(images_for(model)).detach(), images_for(model)
    OUTSIDE[change](model, name)
    expected = model(x).detach()
    assert not torch.allclose(expected, plain)
    torch.testing.assert_close(vitfast.prepare(model)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["blocks.0", "blocks.0.attn", "blocks.0.mlp"])
def test_patched_method_of_a_part_is_ignored(part):
    model = tiny()
    for name in ("attend_packed", "attend", "attention_branch", "mlp_branch", "untouched", "split"):
        module = model.get_submodule(part)
        if callable(getattr(type(module), name, None)):
            setattr(module, name, getattr(module, name))
            with pytest.raises(NotImplementedError, match=f"{part} has a patched {name}"):
                vitfast.prepare(model)
            delattr(module, name)
    vitfast.prepare(model)


def test_added_block_goes_unnoticed():
    model = tiny()
    prepared, x = vitfast.prepare(model), images_for(model)
    model.blocks.append(copy.deepcopy(model.blocks[0]))
    with pytest.raises(RuntimeError, match="blocks of the original was given another part"):
        prepared(x)
    vitfast.prepare(model)(x)
    model.pretrained_cfg = None
    vitfast.prepare(model)(x)


def test_global_hook_breaks_a_prepared_model():
    """FLOP counters and profilers; a hook on the container of its blocks too."""
    model = tiny()
    prepared, x = vitfast.prepare(model), images_for(model)
    expected, seen = prepared(x), []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1) and None)
    try:
        found = [prepared(x), prepared.forward_head(prepared.forward_features(x))]
    finally:
        handle.remove()
    assert seen
    handle = prepared.blocks.register_forward_hook(lambda *_: seen.clear())
    found.append(prepared(x))
    handle.remove()
    assert not seen
    for each in found:
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-5)


def test_method_takes_no_uint8_images():
    """All that take images."""
    model = tiny()
    prepared = vitfast.prepare(model, mean=(0.5,) * 3, std=(0.5,) * 3)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    floats = (images / 255 - 0.5) / 0.5
    for name, options in (("forward_intermediates", {}), ("get_intermediate_layers", {"n": 2}), ("intermediates", {})):
        found, expected = (getattr(prepared, name)(given, **options) for given in (images, floats))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
