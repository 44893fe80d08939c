"""What holds of prepared models whose blocks defer biases, on any device: run by two files, with kernels and without.

The rule is that of whole models: as exact as the eager model in the same dtype, and as the other form of a block.
"""

import pytest
import torch
from prepared_cases import CONFIGS, DEEP, Forms, model_of, wide_of
from torch import nn

import vitfast
from vitfast.check.acceptance import NotAccepted, accept_model
from vitfast.choose import dispatch
from vitfast.inference import gpu_block
from vitfast.inference.gpu_block import FoldedBlock

IMAGES = 24


@pytest.fixture
def forms(monkeypatch):
    return Forms(monkeypatch)


def images_of(dtype, device, number=IMAGES):
    return torch.randn(number, 3, 24, 24, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def check(model, forms, device, call=lambda model, x: model(x), deferred=None, images=IMAGES):
    """Hold what `call` gives of a prepared model to the rule, by the eager model and by the other form."""
    dtype = next(model.parameters()).dtype
    images = images_of(dtype, device, images)
    prepared = vitfast.prepare(model)
    with torch.no_grad(), dispatch.backend("stock"):
        ref, low = call(wide_of(model), images.double().cpu()).to(device), call(model, images)
    # attention is the same in both, and has tests of its own
    with dispatch.backend("stock", op="attention"):
        with forms.off():
            other = call(prepared, images)
        forms.deferred = 0
        out = call(prepared, images)
    assert forms.deferred == (len(model.blocks) if deferred is None else deferred)
    accept_model(out, ref, low, what="by the model")
    accept_model(out, ref, other, what="by the five kernels")
    return prepared


def results(config, dtype, device, forms):
    """Logits, with a last block of the class token alone where that is all they read, and features of all tokens."""
    model = model_of(dtype, device, **CONFIGS[config])
    deferred = 0 if config == "norm inside of the MLP" else None
    check(model, forms, device, deferred=deferred)
    check(model, forms, device, lambda model, x: model.forward_features(x), deferred)


def masked(dtype, device, forms):
    mask = torch.ones(13, 13, dtype=torch.bool).tril(3).to(device)
    model = model_of(dtype, device, register_tokens=3)
    check(model, forms, device, lambda model, x: model(x, attn_mask=mask.to(x.device)))
    check(model, forms, device, lambda model, x: model.forward_features(x, is_causal=True))


def intermediates(dtype, device, forms):
    """Each block alone: only the first, to which nothing is pending, may defer, and returns whole tokens."""
    model = model_of(dtype, device)
    for norm in (False, True):
        for i in range(3):
            check(
                model, forms, device, lambda model, x, i=i, norm=norm: model.forward_intermediates(
                    x, indices=[i], norm=norm, intermediates_only=True, output_fmt="NLC",
                )[0], 1,
            )  # fmt: skip
    for name in ("blocks.0.attn", "blocks.1.mlp", "tokens", "logits"):
        check(model, forms, device, lambda model, x, name=name: model.intermediates(x)[name], 0)


def deep(dtype, device, forms):
    model = model_of(dtype, device, **DEEP)
    check(model, forms, device, lambda model, x: model.forward_features(x), images=3)


def mixed(dtype, device, forms):
    """A block that is not folded in the middle is given whole tokens, and what it returns is not written to."""
    model = model_of(dtype, device, depth=5)
    model.blocks[2].mlp.norm = nn.LayerNorm(128).to(device, dtype).eval()
    check(model, forms, device, deferred=4)
    # and blocks that take the other form, wherever
    forms.takes = lambda i: i % 2 == 0
    prepared = vitfast.prepare(model_of(dtype, device, depth=6, pool="mean"))
    images = images_of(dtype, device)
    forms.asked = forms.deferred = 0
    out = prepared(images)
    # behind one that did not defer the next ones are given whole tokens, where they would expect biases to be pending
    assert 1 <= forms.deferred < 6
    with forms.off():
        other = prepared(images)
    limit = {torch.float32: 1e-4, torch.float16: 2e-2}.get(dtype, 0.1)
    torch.testing.assert_close(out, other, rtol=0, atol=limit * other.abs().max().item())


def with_biases(dtype, device, forms, size, deferred=None):
    """All biases of proj and fc2 as large as that, and of one sign, so that they add up."""
    model = model_of(dtype, device, depth=6)
    with torch.no_grad():
        for block in model.blocks:
            for linear in (block.attn.proj, block.mlp.fc2):
                linear.bias.abs_().mul_(size / 0.3)
    return check(model, forms, device, deferred=deferred)


def aligned_biases(dtype, device, forms):
    """Small ones stay pending through all blocks; of larger ones the sum is written back before it is too much."""
    small = with_biases(dtype, device, forms, 0.02)
    assert [block.writes for block in small.blocks] == [(False, False)] * 6
    large = with_biases(dtype, device, forms, 0.9)
    writes = [write for block in large.blocks for write in block.writes]
    assert any(writes) and not all(writes)


def huge_biases(dtype, device, forms):
    """Of 1e3: no block defers such, whose product may take them away again."""
    prepared = with_biases(dtype, device, forms, 1e3, deferred=0)
    assert [block.too_large for block in prepared.blocks] == [["attn.proj", "mlp.fc2"]] * 6
    assert "never deferred: biases of attn.proj and mlp.fc2" in str(prepared)


def cancelled_biases(dtype, device, forms, monkeypatch):
    """fc2's biases of 1e3 that its product takes away: what the five kernels keep must not be lost."""
    model = model_of(dtype, device, depth=3, activation="gelu")
    with torch.no_grad():
        for block in model.blocks:
            fc1, fc2 = block.mlp.fc1, block.mlp.fc2
            # one hidden number is 64 in every row
            fc1.weight[0], fc1.bias[0] = 0, 64
            fc2.weight[:, 0], fc2.bias[:] = 16, -1024
    check(model, forms, device, deferred=0)
    monkeypatch.setattr(gpu_block, "_square", lambda t: 0.0)
    with pytest.raises(NotAccepted):
        check(model, forms, device)


def small_cancelled_biases(dtype, device, forms):
    """Of one channel, a third of fc2's size, and fc2 takes each away again: the sum is what rounding is of."""
    model = model_of(dtype, device, depth=24, dim=192, mlp_dim=768, heads=3)
    with torch.no_grad():
        for block in model.blocks:
            fc1, fc2 = block.mlp.fc1, block.mlp.fc2
            # most hidden numbers are near 0, one is 64 in every row
            fc1.bias -= 3
            fc1.weight[0], fc1.bias[0] = 0, 64
            size = fc2.weight.float().norm().item()
            fc2.weight[:, 0] = 0
            fc2.weight[0, 0] = 0.3 * size / 64
            fc2.bias.zero_()[0] = -64 * fc2.weight[0, 0]
    check(model, forms, device, lambda model, x: model.forward_features(x), images=8)


def hooked(dtype, device, forms):
    """Of a part, whichever form runs, or of all modules."""
    prepared, images = vitfast.prepare(model_of(dtype, device)), images_of(dtype, device)
    expected = prepared(images)
    names = [f"blocks.1{name}" for name in ("", ".qkv", ".proj", ".fc1", ".fc2")]
    for takes in (True, False):
        forms.takes = lambda i, takes=takes: takes
        for part in ("blocks", *names, "norm"):
            seen, forms.deferred = [], 0
            handle = prepared.get_submodule(part).register_forward_hook(lambda *_, seen=seen: seen.append(1))
            out = prepared(images)
            handle.remove()
            assert seen, part
            torch.testing.assert_close(out, expected, rtol=0, atol=0.05 * expected.abs().max().item())
        seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_, seen=seen: seen.append(module)
        )  # fmt: skip
        prepared(images)
        handle.remove()
        assert {prepared.get_submodule(name) for name in names} <= {*seen}


class Kept(nn.Module):
    """A stem that keeps what it gave."""

    def __init__(self, stem):
        super().__init__()
        self.stem, self.gave = stem, []

    def forward(self, x):
        self.gave.append(self.stem(x))
        return self.gave[-1]


def foreign_tensors(dtype, device, forms):
    """Bits of all that somebody else may hold are compared with those before: tokens, results, intermediates."""
    images, others = images_of(dtype, device, 3), images_of(dtype, device, 3).flip(0)
    for config in ("plain", "no biases"):
        prepared = vitfast.prepare(model_of(dtype, device, **CONFIGS[config]))
        tokens = prepared.embed(images)
        held = [images, tokens, *(t for t in prepared.buffers())]
        held += [prepared(images), prepared.forward_features(images), *prepared.intermediates(images).values()]
        features, maps = prepared.forward_intermediates(images, output_fmt="NLC", norm=False)
        held += [features, *maps, prepared.blocks[0](tokens)]
        before = [t.clone() for t in held]
        forms.deferred = 0
        for x in (others, images, others):
            prepared(x), prepared.forward_features(x), prepared.intermediates(x)
            prepared.forward_intermediates(x)
        prepared._transform(tokens)
        prepared._transform(tokens.mT.contiguous().mT)
        prepared.blocks[0](tokens)
        assert forms.deferred >= 9
        for t, expected in zip(held, before, strict=True):
            assert torch.equal(t, expected)
        # the same bits again
        assert torch.equal(prepared(images), held[2 + len(list(prepared.buffers()))])


def replaced_stem(dtype, device, forms):
    """What a stem keeps of its own stays as it was."""
    model = model_of(dtype, device, pos_embed="none", class_token=False, pool="mean")
    kept = model.patch_embed = Kept(model.patch_embed).eval()
    prepared = vitfast.prepare(model)
    images = images_of(dtype, device, 2)
    first = prepared(images)
    inside = prepared.patch_embed
    before = inside.gave[-1].clone()
    assert torch.equal(prepared(images), first) and len(inside.gave) >= 2
    assert torch.equal(inside.gave[0], inside.gave[1]) and torch.equal(inside.gave[0], before)
    assert forms.deferred == 6 and not kept.gave


def strange_calls(dtype, device, forms):
    """No images; tokens in another dtype than the weights; a last block that was left out."""
    prepared = vitfast.prepare(model_of(dtype, device))
    assert prepared(images_of(dtype, device, 2)[:0]).shape == (0, 7)
    assert forms.deferred == 0
    block = prepared.blocks[0]
    assert isinstance(block, FoldedBlock)
    one = block(torch.randn(1, 1, 64, device=device).to(dtype))
    assert one.shape == (1, 1, 64) and forms.deferred == 1
