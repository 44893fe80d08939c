"""What people do to the modules of a model before or after `vitfast.patch`: it counts, as in the model without."""

import copy
import functools

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from patch_pair import near, ops_in, ops_of, own_forward, patched_copy, results_of, same, small
from timm.layers import SwiGLUPacked
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import vitfast

ALL_OPS = {"linear", "attention_qkv", "mlp"}
BLOCK = "blocks.1"


class Doubling(nn.Module):
    def forward(self, weight):
        return 2 * weight


def at(path):
    return lambda model: model.get_submodule(f"{BLOCK}.{path}")


def parametrized(linear):
    parametrize.register_parametrization(linear, "weight", Doubling())
    return lambda: parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)


def weight_norm(linear):
    parametrizations.weight_norm(linear)
    return lambda: parametrize.remove_parametrizations(linear, "weight")


def old_weight_norm(linear):
    nn.utils.weight_norm(linear)
    return lambda: nn.utils.remove_weight_norm(linear)


def old_spectral_norm(linear):
    nn.utils.spectral_norm(linear)
    return lambda: nn.utils.remove_spectral_norm(linear)


def spectral_norm(linear):
    parametrizations.spectral_norm(linear)
    return lambda: parametrize.remove_parametrizations(linear, "weight")


def pruned(linear):
    prune.l1_unstructured(linear, "weight", amount=0.5)
    return lambda: prune.remove(linear, "weight")


def accelerated(module):
    class Hook(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    add_hook_to_module(module, Hook())
    return lambda: remove_hook_from_module(module)


class Weight(nn.Parameter):
    """As quantised ones do: it computes the product itself."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            return 3 * out if func in (torch.nn.functional.linear, torch.conv2d) else out


def own_weight(linear):
    stock = linear.weight
    linear.weight = Weight(stock.detach())
    return lambda: setattr(linear, "weight", stock)


def replaced(module):
    """A class that vitfast does not know in the place of a child."""
    parent, name, found = module
    setattr(parent, name, nn.Sequential(found, nn.Tanh()))
    return lambda: setattr(parent, name, found)


def child_of(path):
    holder, _, name = f"{BLOCK}.{path}".strip(".").rpartition(".")

    def find(model):
        parent = model.get_submodule(holder)
        return parent, name, getattr(parent, name)

    return find


# (which module, what is done to it, what the report says of it where that comes after the patch)
CHANGES = {
    "parametrized qkv": (at("attn.qkv"), parametrized, "attn.qkv is parametrized"),
    "parametrized norm": (at("norm2"), parametrized, "norm2 is parametrized"),
    "weight_norm": (at("mlp.fc1"), weight_norm, "mlp.fc1 is parametrized"),
    "old weight_norm": (at("mlp.fc2"), old_weight_norm, "mlp.fc2 has forward pre hooks"),
    "spectral_norm": (at("attn.proj"), spectral_norm, "attn.proj is parametrized"),
    "old spectral_norm": (at("attn.proj"), old_spectral_norm, "attn.proj has forward pre hooks"),
    "pruned": (at("attn.qkv"), pruned, "attn.qkv has forward pre hooks"),
    "own forward of a linear": (at("mlp.fc2"), own_forward, "mlp.fc2 has a patched forward"),
    "own forward of a norm": (at("norm1"), own_forward, "norm1 has a patched forward"),
    "own forward of a scale": (at("ls1"), own_forward, "ls1 has a patched forward"),
    "own forward of attention": (at("attn"), own_forward, "attn has a patched forward"),
    "own forward of an MLP": (at("mlp"), own_forward, "mlp has a patched forward"),
    "accelerate": (at("attn.proj"), accelerated, "attn.proj has a patched forward"),
    "own weight": (at("attn.qkv"), own_weight, "attn.qkv has a weight of class Weight"),
    "own norm": (child_of("norm1"), replaced, "norm1 is Sequential, not norm"),
    "own linear": (child_of("mlp.fc1"), replaced, "mlp.fc1 is Sequential, not linear"),
    "own activation": (child_of("mlp.act"), replaced, "mlp.act is Sequential, not activation"),
    "own scale": (child_of("ls2"), replaced, "ls2 is Sequential, not scale or identity"),
    "own dropout": (child_of("attn.proj_drop"), replaced, "attn.proj_drop is Sequential, not dropout or identity"),
}


def scaled_weight(linear):
    stock = linear.weight
    linear.weight = nn.Parameter(2 * stock.detach())
    return lambda: setattr(linear, "weight", stock)


def bias_as_buffer(linear):
    stock = linear.bias
    del linear.bias
    linear.register_buffer("bias", 2 * stock.detach())

    def undo():
        del linear.bias
        linear.bias = stock

    return undo


def set_to(**values):
    def change(module):
        stock = {name: getattr(module, name) for name in values}
        module.__dict__.update(values)
        return lambda: module.__dict__.update(stock)

    return change


def other_of_its_class(found):
    parent, name, stock = found
    other = copy.deepcopy(stock)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    setattr(parent, name, other)
    return lambda: setattr(parent, name, stock)


def taken_out(found):
    parent, name, stock = found
    setattr(parent, name, nn.Identity())
    return lambda: setattr(parent, name, stock)


def over_tokens(found):
    parent, name, stock = found
    setattr(parent, name, nn.LayerNorm((5, 64)))
    return lambda: setattr(parent, name, stock)


def as_function(found):
    parent, name, stock = found
    delattr(parent, name)
    setattr(parent, name, lambda x: 3 * x)

    def undo():
        delattr(parent, name)
        parent.add_module(name, stock)

    return undo


# (which module, what is done to it, what the report says: nothing where ops do the same)
VALUES = {
    "weight": (at("mlp.fc1"), scaled_weight, ""),
    "bias as buffer": (at("attn.qkv"), bias_as_buffer, ""),
    "eps": (at("norm2"), set_to(eps=0.5), ""),
    "activation": (at("mlp.act"), set_to(approximate="tanh"), ""),
    "heads": (at("attn"), set_to(num_heads=4, head_dim=16), ""),
    "scale": (at("attn"), set_to(scale=0.7, fused_attn=False), ""),
    "scale that SDPA ignores": (at("attn"), set_to(scale=0.7, fused_attn=True), ""),
    "rate": (at("mlp.drop1"), set_to(p=0.5), ""),
    "rate of attention": (at("attn.attn_drop"), set_to(p=0.5), ""),
    "function as gate": (at("attn"), set_to(gate=lambda x: x), "attn.gate is builtins.function"),
    "other linear": (child_of("mlp.fc2"), other_of_its_class, ""),
    "other attention": (child_of("attn"), other_of_its_class, ""),
    "other norm": (child_of("norm1"), other_of_its_class, ""),
    "other block": (child_of(""), other_of_its_class, ""),
    "norm of tokens too": (child_of("norm1"), over_tokens, "norm1 normalizes over 2 dims, not 1"),
    "no scale": (child_of("ls1"), taken_out, ""),
    "no norm": (child_of("norm2"), taken_out, "norm2 is Identity, not norm"),
    "no projection": (child_of("attn.proj"), taken_out, ""),
    "function as scale": (child_of("ls2"), as_function, "ls2 is builtins.function"),
    "function as norm": (child_of("norm1"), as_function, "norm1 is builtins.function"),
    "function as activation": (child_of("mlp.act"), as_function, "mlp.act is builtins.function"),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("change", VALUES)
def test_value_is_of_an_earlier_call(change, train):
    """What was decided or read at one call, and has changed since, as by a script between two epochs."""
    find, do, words = VALUES[change]
    model, images = small(train=train)
    patched = patched_copy(model)
    plain = results_of(model, images)
    same(results_of(patched, images), plain)
    undos, results = [], []
    for each in (model, patched):
        undos.append(do(find(each)))
        results.append(results_of(each, images))
    same(results[1], results[0])
    if change not in ("scale that SDPA ignores",) and not (not train and "rate" in change) and change != "activation":
        assert (results[0]["out"] - plain["out"]).norm() > 1e-4 * plain["out"].norm()
    assert words in str(vitfast.explain(patched).rows)
    for undo in undos:
        undo()
    same(results_of(patched, images), plain)


def test_gate_is_where_it_was_at_an_earlier_call():
    """What is asked of a module itself: here which half of its first product is the gate."""
    model, images = small(mlp_layer=SwiGLUPacked)
    patched = patched_copy(model)
    plain = model(images)
    near(patched(images), plain)
    for each in (model, patched):
        each.blocks[1].mlp.gate_last = True
    near(patched(images), model(images))
    assert (model(images) - plain).norm() > 1e-2 * plain.norm()
    assert "mlp has its gate last" in str(vitfast.explain(patched).rows)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_change_of_a_module_is_passed_over(change, when):
    """Or stays when it is taken back; the other block runs ops all the while."""
    find, do, words = CHANGES[change]
    model, images = small(train=True)
    patched = copy.deepcopy(model)
    if when == "after":
        vitfast.patch(patched).require("attention", "norm", "mlp")
        results_of(patched, images)
    plain, results, undo = results_of(model, images), [], None
    for each in (model, patched):
        torch.manual_seed(2)
        undo = do(find(each))
        if each is patched and when == "before":
            vitfast.patch(patched)
        results.append(results_of(each, images))
    same(results[1], results[0])
    assert (results[0]["out"] - plain["out"]).norm() > 1e-3 * plain["out"].norm() or "weight_norm" in change
    report = vitfast.patch(patched)
    assert words in str(report)
    assert all(part.name.startswith(BLOCK) for part in report.left) and 1 <= len(report.left) <= 2
    undo()
    assert not vitfast.patch(patched).left
    assert ops_in(patched.blocks[1], torch.randn(1, 5, 64)) == ALL_OPS


STEM_CHANGES = [parametrized, weight_norm, old_weight_norm, pruned, own_forward, accelerated, scaled_weight, own_weight]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", STEM_CHANGES, ids=lambda change: change.__name__)
def test_change_of_the_stem_is_passed_over(change, when):
    """In the convolution that cuts the patches, where it runs as an op: without gradients, or in half precision."""
    model, images = small()
    patched = copy.deepcopy(model)
    if when == "after":
        vitfast.patch(patched).require("patch_embed")
    with torch.no_grad():
        plain, undos = model(images), []
        near(patched(images), plain)
        for each in (model, patched):
            undos.append(change(each.patch_embed.proj))
        if when == "before":
            vitfast.patch(patched)
        near(patched(images), model(images))
        for undo in undos:
            undo()
        assert not vitfast.patch(patched).left
        found, ops = ops_of(lambda: patched(images))
        near(found, model(images))
    assert "patch_embed" in ops


def test_stem_is_called_in_another_way(monkeypatch):
    """By keyword, with one image, with another class's forward: as `nn.Conv2d` is."""
    model, images = small()
    patched = patched_copy(model)
    with torch.no_grad():
        near(patched.patch_embed.proj(input=images), model.patch_embed.proj(images))
        near(patched.patch_embed.proj(images[0]), model.patch_embed.proj(images[0]))
        for message in ("channels", "same"):
            wrong = images[:, :2] if message == "channels" else images.double()
            with pytest.raises(RuntimeError, match=message):
                patched.patch_embed.proj(wrong)
        stock = nn.Conv2d.forward
        monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: 2 * stock(self, x))
        near(patched(images), model(images))
        assert "is a Conv2d, whose forward was patched" in str(vitfast.patch(patched).left)


LORA = {"r": 4, "target_modules": ["qkv", "fc1"], "init_lora_weights": False}
ADAPTERS = {
    "LoRA": functools.partial(peft.LoraConfig, **LORA),
    "DoRA": functools.partial(peft.LoraConfig, use_dora=True, **LORA),
    "IA3": functools.partial(peft.IA3Config, target_modules=["qkv", "fc2"], feedforward_modules=["fc2"],
                             init_ia3_weights=False),
    "norms": functools.partial(peft.LNTuningConfig, target_modules=["norm1", "norm2"]),
    "saved modules": functools.partial(peft.LoraConfig, modules_to_save=["norm1"], **LORA),
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_is_passed_over(adapter, when):
    """peft's: trained, switched off, merged into the weights, taken out."""
    model, images = small(train=True)
    plain = model(images).detach()
    pair = []
    for patched in (False, True):
        each = copy.deepcopy(model)
        if patched and when == "before":
            vitfast.patch(each)
        torch.manual_seed(2)
        each = peft.get_peft_model(each, ADAPTERS[adapter]())
        with torch.no_grad():
            for p in each.parameters():
                if p.requires_grad:
                    p.add_(0.3 * torch.randn_like(p))
        if patched and when == "after":
            vitfast.patch(each)
        pair.append(each)
    with_adapter = results_of(pair[0], images)
    assert (with_adapter["out"] - plain).norm() > 1e-2 * plain.norm()
    same(results_of(pair[1], images), with_adapter, 1e-3)
    with pair[0].disable_adapter(), pair[1].disable_adapter():
        near(pair[1](images), plain)
    if adapter != "norms":
        for each in pair:
            each.merge_adapter()
        same({"out": pair[1](images), "again": pair[1](images)}, {"out": pair[0](images), "again": with_adapter["out"]})
        for each in pair:
            each.unmerge_adapter()
    report = vitfast.patch(pair[1])
    assert "peft" in str(report.left)
    restored = pair[1].merge_and_unload()
    near(restored(images), with_adapter["out"], 1e-4)
    if adapter != "saved modules":
        assert not vitfast.patch(restored).left
        assert "mlp" in ops_in(restored, images)


def test_int8_weight_is_read_as_floats():
    """torchao's, in one linear of one block."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model, images = small()
    patched = patched_copy(model)
    with torch.no_grad():
        near(patched(images), model(images))
    for each in (model, patched):
        torchao.quantize_(each.blocks[1].mlp, torchao.Int8WeightOnlyConfig())
    with torch.no_grad():
        near(patched(images), model(images))
    report = vitfast.patch(patched)
    assert [part.name for part in report.left] == ["blocks.1.mlp"]
    assert "mlp.fc1 has a weight of class Int8Tensor; mlp.fc2 has a weight of class" in report.left[0].reason
