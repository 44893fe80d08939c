"""Hooks, adapters, parametrizations and replaced modules: what somebody changed must run, and `explain` must say so.

timm's model with the same change is what ours has to equal.
"""

import copy

import pytest
import torch
from pairwise import product
from peft import LoraConfig, get_peft_model
from timm_pair import pair_of, run
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations

import vitfast
from vitfast.model.layers import run_norm

MODELS = {
    "token": ("vit_tiny_patch16_224", {"img_size": 32, "qk_norm": True, "init_values": 0.1, "drop_path_rate": 0.0}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28}),
    "packed": ("vit_giant_patch14_dinov2", {"img_size": 28, "embed_dim": 192, "num_heads": 3}),
    "swiglu": ("aimv2_large_patch14_224", {"img_size": 28, "embed_dim": 192, "num_heads": 3}),
    "scale_norms": ("beit3_base_patch16_224", {"img_size": 32, "embed_dim": 192, "num_heads": 3}),
    "map": ("test_vit3", {"img_size": 32}),
    "pre_norm": ("vit_xsmall_patch16_clip_224", {"img_size": 32}),
}
PARTS = {
    "token": [
        "patch_embed", "patch_embed.proj", "pos_drop", "norm_pre", "blocks", "blocks.0", "blocks.2", "blocks.2.norm1",
        "blocks.2.attn", "blocks.2.attn.qkv", "blocks.2.attn.q_norm", "blocks.2.attn.k_norm", "blocks.2.attn.proj",
        "blocks.2.attn.proj_drop", "blocks.2.ls1", "blocks.2.drop_path1", "blocks.2.norm2", "blocks.2.mlp",
        "blocks.2.mlp.fc1", "blocks.2.mlp.act", "blocks.2.mlp.drop1", "blocks.2.mlp.fc2", "blocks.2.mlp.drop2",
        "blocks.2.ls2", "blocks.2.drop_path2", "blocks.0.attn.qkv", "blocks.0.mlp.fc2", "norm", "fc_norm",
        "head_drop", "head",
    ],
    "registers": ["blocks.1.ls1", "blocks.1.ls2", "norm"],
    "packed": ["blocks.2.mlp.fc1", "blocks.2.mlp.act", "blocks.2.mlp.norm"],
    "swiglu": ["blocks.2.mlp.fc1_g", "blocks.2.mlp.fc1_x", "blocks.2.mlp.act", "blocks.2.mlp.fc2"],
    "scale_norms": ["blocks.1.attn.norm", "blocks.1.mlp.norm"],
    "map": ["attn_pool", "attn_pool.q", "attn_pool.kv", "attn_pool.proj", "attn_pool.norm", "attn_pool.mlp",
            "attn_pool.mlp.fc1", "blocks.2.norm1", "norm"],
    "pre_norm": ["norm_pre", "patch_embed.proj"],
}  # fmt: skip
every_part = pytest.mark.parametrize(("model", "part"), [(m, part) for m in PARTS for part in PARTS[m]])


def pair(model):
    name, keywords = MODELS[model]
    # no massive activations: a rounding of theirs moves every gradient
    return pair_of(name, massive=False, **{"depth": 3, "num_classes": 10} | keywords)


def same(ours, theirs, images, unlike=None):
    """Output and gradients equal timm's, and differ from the unchanged model's."""
    (out, grads), (expected, their_grads) = run(ours, images), run(theirs, images)
    error = (out - expected).norm() / expected.norm()
    assert error < 1e-4, error
    if unlike is not None:
        assert (out - unlike).norm() > 20 * (out - expected).norm() + 1e-5 * unlike.norm()
    # what is below the rounding of the largest gradient is noise
    noise = 1e-7 * max(grad.norm() for grad in their_grads.values() if grad is not None)
    for name, grad in their_grads.items():
        found = grads[name]
        assert (grad is None) == (found is None), name
        if grad is not None and "k_norm.bias" not in name:
            assert (found - grad).norm() <= 2e-3 * grad.norm() + noise, name


def other(x):
    """Nothing that a norm or a softmax would take back."""
    return x * torch.linspace(-1, 2, x.shape[-1], dtype=x.dtype) + 0.25


def change(kind, module):
    if kind == "forward hook":
        module.register_forward_hook(lambda _, args, out: other(out))
    elif kind == "forward pre-hook":
        module.register_forward_pre_hook(lambda _, args: (other(args[0]), *args[1:]))
    elif kind == "patched forward":
        original = module.forward
        module.forward = lambda *args, **kwargs: other(original(*args, **kwargs))
    elif kind == "subclass":
        base = type(module)

        class Changed(base):
            def forward(self, *args, **kwargs):
                return other(super().forward(*args, **kwargs))

        module.__class__ = Changed


@product(
    part={f"{model}-{part}": (model, part) for model, parts in PARTS.items() for part in parts},
    kind=("forward hook", "forward pre-hook", "patched forward", "subclass"), strength=1,
)  # fmt: skip
def test_changed_part_is_skipped(part, kind):
    """An op that reads a module's weights and never calls the module."""
    model, part = part
    theirs, ours, images = pair(model)
    unchanged = run(ours, images)[0]
    for each in (theirs, ours):
        change(kind, each.get_submodule(part))
    same(ours, theirs, images, unchanged)
    rows = vitfast.explain(ours).rows
    if (part.startswith("blocks.") and part.count(".") > 1) or part in ("patch_embed.proj", "norm", "norm_pre"):
        assert any(row.path == "its modules' own forward" and part.rpartition(".")[2] in row.reason for row in rows)


@pytest.mark.parametrize("part", ["blocks.2", "blocks.2.attn.qkv", "blocks.2.mlp", "blocks.0.norm2", "patch_embed.proj",
                                  "norm", "head"])  # fmt: skip
@pytest.mark.parametrize("pre", [False, True], ids=["backward hook", "backward pre-hook"])
def test_backward_hook_is_skipped(part, pre):
    """Gradient clipping and monitoring inside the backward."""
    theirs, ours, images = pair("token")
    for each in (theirs, ours):
        module = each.get_submodule(part)
        if pre:
            module.register_full_backward_pre_hook(lambda _, grads: tuple(2 * g for g in grads))
        else:
            module.register_full_backward_hook(
                lambda _, ins, outs: tuple(None if g is None else 2 * g for g in ins)
            )  # fmt: skip
    same(ours, theirs, images)


def test_global_hook_misses_a_module():
    """FLOP counters and profilers register one hook for all modules: they see what they would see in timm's model."""
    theirs, ours, images = pair("token")
    seen = []
    for each in (theirs.eval(), ours.eval()):
        names = {module: name for name, module in each.named_modules()}
        called = set()
        handle = torch_module.register_module_forward_hook(
            lambda module, *_, called=called, names=names: called.add(names[module])
        )
        each(images)
        handle.remove()
        seen.append(called)
    # timm's container of blocks is called, ours is read; timm's patch dropout does not exist here
    assert seen[0] - {"blocks", "patch_drop"} <= seen[1]
    assert "a global module hook" not in str(vitfast.explain(ours))


def test_hook_sees_the_tokens_of_a_short_last_block():
    """A feature extractor on the last block or the final norm, which gets the class token only."""
    for part in ("blocks.2", "norm", "blocks.2.mlp", "blocks.2.attn.proj"):
        theirs, ours, images = pair("token")
        found = []
        for each in (theirs.eval(), ours.eval()):
            each.get_submodule(part).register_forward_hook(lambda _, args, out, found=found: found.append(out))
            each(images)
        assert found[1].shape == found[0].shape == (2, 5, 192)
        assert (found[1] - found[0]).norm() <= 1e-4 * found[0].norm()


@pytest.mark.parametrize("stage", ["forward_features", "forward_head", "pool", "embed"])
def test_overridden_stage_gets_the_class_token_only(stage):
    """A subclass, or a function put on the instance, that reads all tokens."""
    _, ours, images = pair("token")
    ours.eval()
    shapes = []

    def spy(original):
        def watched(*args, **kwargs):
            out = original(*args, **kwargs)
            shapes.append((tuple(args[0].shape), tuple(out.shape)))
            return out

        return watched

    expected = ours(images)
    setattr(ours, stage, spy(getattr(ours, stage)))
    assert torch.equal(ours(images), expected) or torch.allclose(ours(images), expected, rtol=1e-4, atol=1e-4)
    delattr(ours, stage)
    methods = {stage: lambda self, *args, **kw: spy(getattr(vitfast.ViT, stage).__get__(self))(*args, **kw)}
    ours.__class__ = type("Sub", (vitfast.ViT,), methods)
    ours(images)
    whole = (2, 5, 192)
    assert len(shapes) >= 2
    assert all(whole in shape for shape in shapes), shapes


@pytest.mark.parametrize("part", ["blocks.2.attn.qkv", "blocks.0.attn.proj", "blocks.2.mlp.fc1", "blocks.0.mlp.fc2",
                                  "patch_embed.proj", "head"])  # fmt: skip
def test_parametrized_weight_is_read_once_or_not_at_all(part):
    """weight_norm and spectral norm: the weight is computed at each call, and its originals get the gradients."""
    theirs, ours, images = pair("token")
    for each in (theirs, ours):
        module = parametrizations.weight_norm(each.get_submodule(part))
        with torch.no_grad():
            module.parametrizations.weight.original0.mul_(1.5)
    same(ours, theirs, images)
    if part.startswith("blocks"):
        assert "is parametrized" in str(vitfast.explain(ours))


class Halved(torch.Tensor):
    """A weight that computes something else than its data, as quantised weights do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.nn.functional.linear, torch.conv2d, torch.nn.functional.conv2d):
            plain = lambda t: t.as_subclass(torch.Tensor) * 0.5 if isinstance(t, cls) else t  # noqa: E731
            return func(*map(plain, args), **{k: plain(v) for k, v in (kwargs or {}).items()})
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    "part",
    ["blocks.2.attn.qkv", "head", *(pytest.param(name, marks=pytest.mark.full)
                                    for name in ("blocks.0.mlp.fc2", "blocks.2.attn.proj"))],
)  # fmt: skip
def test_weight_of_another_class_is_read_as_plain_data(part):
    """torchao and bitsandbytes put tensor subclasses in the place of weights."""
    theirs, ours, images = pair("token")
    unchanged = ours.eval()(images)
    for each in (theirs.eval(), ours.eval()):
        module = each.get_submodule(part)
        module.weight = nn.Parameter(module.weight.detach().as_subclass(Halved), requires_grad=False)
    with torch.no_grad():
        out, expected = ours(images), theirs(images)
    assert (out - expected).norm() <= 1e-4 * expected.norm()
    assert (out - unchanged).norm() > 1e-2 * unchanged.norm()
    # where `torch.compiler.is_exporting` is True although nobody exports
    with torch.no_grad():
        compiled = torch.compile(ours, backend="eager")(images)
    assert (compiled - expected).norm() <= 1e-4 * expected.norm()
    if part.startswith("blocks"):
        assert "weight of class Halved" in str(vitfast.explain(ours))


def test_weights_outside_of_the_parameters_are_not_found():
    """FSDP with flat parameters leaves plain views of one tensor in their place."""
    theirs, ours, images = pair("token")
    ours.eval()
    with torch.no_grad():
        for module in ours.modules():
            for name in list(module._parameters) if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Conv2d)) else ():
                value = module._parameters.pop(name)
                setattr(module, name, None if value is None else value.detach().clone())
        expected = theirs.eval()(images)
        assert (ours(images) - expected).norm() <= 1e-4 * expected.norm()


def test_functional_call_uses_the_modules_own_weights():
    """Meta-learning and ensembles call the model with other weights."""
    theirs, ours, images = pair("token")
    other = {name: p.detach() * 1.1 for name, p in theirs.named_parameters()}
    expected = torch.func.functional_call(theirs.eval(), other, images)
    out = torch.func.functional_call(ours.eval(), other, images)
    assert (out - expected).norm() <= 1e-4 * expected.norm()


def test_torch_func_does_not_work():
    """Per-sample gradients and ensembles: the transforms get stock operators, which have rules for them."""
    _, ours, images = pair("token")
    ours.eval()
    params = dict(ours.named_parameters())
    loss = lambda p, x: torch.func.functional_call(ours, p, x[None]).sum()  # noqa: E731
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, images)
    ours(images).sum().backward()
    for name, p in ours.named_parameters():
        if "k_norm.bias" not in name:
            assert (found[name].sum(0) - p.grad).norm() <= 2e-3 * p.grad.norm(), name
    with torch.no_grad():
        out = torch.func.vmap(lambda x: ours(x[None])[0])(images)
        assert (out - ours(images)).norm() <= 1e-4 * out.norm()


PATCH_CONVOLUTIONS = {
    "stride": dict(kernel_size=16, stride=8, padding=4), "padding": dict(kernel_size=20, stride=16, padding=2),
    "dilation": dict(kernel_size=8, stride=16, dilation=2), "no overlap": dict(kernel_size=12, stride=16),
}  # fmt: skip


@pytest.mark.parametrize("name", PATCH_CONVOLUTIONS)
def test_patch_convolution_with_other_settings_is_cut_as_patches(name):
    """Denser tokens by a smaller stride, overlapping patches: the op knows kernel = stride = patch only."""
    name, keywords = "vit_tiny_patch16_224", PATCH_CONVOLUTIONS[name]
    theirs, ours, images = pair_of(name, depth=2, num_classes=10, img_size=32, dynamic_img_size=True)
    unchanged = ours(images).detach()
    proj = nn.Conv2d(3, 192, **keywords)
    for each in (theirs, ours):
        each.patch_embed.proj = copy.deepcopy(proj)
    same(ours, theirs, images, unchanged)
    assert "patch_embed" in [row.part for row in vitfast.explain(ours).rows if row.path == "its modules' own forward"]


def test_patch_convolution_for_other_channels_is_refused():
    theirs, ours, _ = pair("token")
    for each in (theirs, ours):
        torch.manual_seed(0)
        each.patch_embed.proj = nn.Conv2d(5, 192, 16, 16)
    same(ours, theirs, torch.randn(2, 5, 32, 32))


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d, nn.GELU])
def test_class_whose_forward_was_patched_is_skipped(kind, monkeypatch):
    """Tools that replace `nn.Linear.forward` for all layers at once."""
    theirs, ours, images = pair("token")
    unchanged = run(ours, images)[0]
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: other(original(self, x)))
    same(ours, theirs, images, unchanged)
    assert "whose forward was patched" in str(vitfast.explain(ours))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_norm_without_an_eps_fails_or_takes_another(dtype):
    """torch's RMSNorm has eps=None unless told otherwise, and takes the eps of the dtype it computes in."""
    theirs, ours, images = pair("token")
    for each in (theirs, ours):
        each.blocks[0].norm1, each.blocks[1].norm2, each.norm = (nn.RMSNorm(192) for _ in range(3))
    same(ours, theirs, images)
    norm, small = ours.norm.to(dtype), (1e-3 * torch.randn(2, 5, 192)).to(dtype)
    torch.testing.assert_close(run_norm(norm, small), norm(small))


class Stem(nn.Module):
    """Patches by another way, as a convolutional stem or a frozen tokenizer makes them."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(16)
        self.widen = nn.Conv2d(3, 192, 1)

    def forward(self, images):
        return self.widen(self.pool(images)).flatten(2).transpose(1, 2)


def test_replaced_stem_or_pooling_breaks_the_model_or_explain():
    theirs, ours, images = pair("token")
    stem = Stem()
    for each in (theirs, ours):
        each.patch_embed = copy.deepcopy(stem)
    same(ours, theirs, images)
    assert "Stem, not PatchEmbed" in str(vitfast.explain(ours))
    ours = pair("map")[1]
    ours.attn_pool = nn.Identity()
    assert "Identity, not AttentionPool" in str(vitfast.explain(ours))


def test_watched_container_of_blocks_turns_checkpointing_off():
    """The container's hook has to run, and activations must still be recomputed."""
    _, ours, images = pair("token")
    expected, grads = run(ours, images)
    calls = {"container": 0, "block": 0}
    ours.blocks.register_forward_hook(lambda *_: calls.update(container=calls["container"] + 1))
    ours.blocks[0].register_forward_pre_hook(lambda *_: calls.update(block=calls["block"] + 1))
    ours.set_grad_checkpointing()
    found, again = run(ours, images)
    assert calls["container"] >= 1 and calls["block"] == 2
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert all((again[n] - g).norm() <= 2e-3 * g.norm() + 1e-3 for n, g in grads.items() if "k_norm.bias" not in n)


def test_replaced_or_compiled_containers_break_the_model_or_explain():
    theirs, ours, images = pair("token")

    class Mean(nn.Module):
        def forward(self, x, **kwargs):
            return x.mean(1, keepdim=True).expand_as(x)

    for each in (theirs, ours):
        each.blocks[0].attn = Mean()
        each.blocks[1].mlp = nn.Linear(192, 192)
        nn.init.eye_(each.blocks[1].mlp.weight)
        nn.init.zeros_(each.blocks[1].mlp.bias)
    same(ours, theirs, images)
    said = str(vitfast.explain(ours))
    assert "Mean, not Attention" in said and "torch.nn.modules.linear.Linear, not Mlp" in said
    expected = ours.eval()(images)
    ours.blocks = torch.compile(ours.blocks, backend="eager")
    assert (ours(images) - expected).norm() <= 1e-4 * expected.norm()
    ours.blocks = nn.Identity()
    assert ours(images).shape == (2, 10)


def test_pooling_is_missing_from_explain():
    _, ours, _ = pair("map")
    assert vitfast.explain(ours).all_fused
    ours.attn_pool.q.register_forward_hook(lambda *_: None)
    assert [row.part for row in vitfast.explain(ours).rows if not row.path.startswith("op")] == ["attn_pool.q"]


def test_intermediates_leave_out_what_a_hook_does():
    _, ours, images = pair("token")
    ours.blocks[1].register_forward_hook(lambda _, args, out: 2 * out)
    with pytest.raises(NotImplementedError, match="blocks.1 has forward hooks; use forward_intermediates"):
        ours.intermediates(images)


def test_hook_cannot_change_its_output_in_place():
    theirs, ours, images = pair("token")
    for each in (theirs, ours):
        each.blocks[0].register_forward_hook(lambda _, args, out: out.mul_(2))
        each.blocks[1].attn.proj.register_forward_hook(lambda _, args, out: out.add_(1))
    same(ours, theirs, images)


def test_replaced_module_is_skipped():
    """Another activation, an Identity in the place of a norm, a wider block, a block removed."""
    theirs, ours, images = pair("token")
    for each in (theirs, ours):
        each.blocks[0].mlp.act = nn.ReLU()
        each.blocks[1].norm2 = nn.Identity()
        each.blocks[2].ls1 = nn.Identity()
        each.norm = nn.Identity()
    same(ours, theirs, images)
    for each in (theirs, ours):
        each.blocks = each.blocks[:2]
    same(ours, theirs, images)
    for each in (theirs, ours):
        each.blocks[1] = nn.Identity()
    with torch.no_grad():
        assert (ours.eval()(images) - theirs.eval()(images)).norm() < 1e-4 * theirs(images).norm()
    assert "Identity, not Block" in str(vitfast.explain(ours))


def test_watched_attention_weights_do_not_exist():
    """timm users set fused_attn=False and hook attn_drop for attention maps."""
    theirs, ours, images = pair("token")
    maps = []
    for each in (theirs.eval(), ours.eval()):
        for block in each.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(lambda _, args, out: maps.append(out.detach()))
    same(ours, theirs, images)
    assert len(maps) == 6
    for expected, found in zip(maps[:3], maps[3:], strict=True):
        assert found.shape == (2, 3, 5, 5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "attn_drop has forward hooks" in str(vitfast.explain(ours))


def lora_of(model, **kwargs):
    config = LoraConfig(target_modules=["qkv", "fc1", "fc2", "attn.proj"], r=4, init_lora_weights=False, **kwargs)
    return get_peft_model(model, config)


def test_lora_adapter_is_ignored():
    """peft wraps `qkv` in a layer that adds to it: without its own forward the adapter has no effect."""
    theirs, ours, images = pair("token")
    unchanged = run(ours, images)[0]
    torch.manual_seed(3)
    adapted = lora_of(copy.deepcopy(ours))
    their_adapted = lora_of(copy.deepcopy(theirs))
    their_adapted.load_state_dict(adapted.state_dict())
    same(adapted, their_adapted, images, unchanged)
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in adapted.named_parameters() if "lora_" in name}
    merged = copy.deepcopy(adapted).merge_and_unload()
    out = adapted.eval()(images)
    assert isinstance(merged, vitfast.ViT)
    assert (merged.eval()(images) - out).norm() <= 1e-4 * out.norm()
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted.train()(images), unchanged)


def test_lora_is_not_reported():
    _, ours, images = pair("token")
    assert vitfast.explain(ours).all_fused
    found = vitfast.explain(get_peft_model(ours, LoraConfig(target_modules=["qkv"])))
    bad = [row for row in found.rows if row.path == "its modules' own forward"]
    assert len(bad) == 3 and all("attn.qkv is peft.tuners.lora.layer.Linear, not Linear" in row.reason for row in bad)
    assert all(row.part.startswith("base_model.model.blocks.") for row in bad)
