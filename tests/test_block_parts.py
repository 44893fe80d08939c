"""A part that is new to blocks is one entry in `STEPS`: fusing, explaining and preparing then know it."""

import pytest
import torch
from torch import nn

import vitfast
from vitfast.model.block import ABSENT, STEPS, Attention, Block, Part
from vitfast.model.plain import FORWARDS


class Temper(nn.Module):
    def forward(self, x):
        return x / 2


def tempered(self, x, attn_mask=None, is_causal=False):
    """What `Attention.forward` would be with a made-up part `temper` in front of its projection."""
    out = self.attend_packed(self.split(self.qkv(x), 3), attn_mask)
    return self.proj_drop(self.proj(out if self.temper is None else self.temper(out)))


@pytest.fixture
def model(monkeypatch):
    """A model whose attention may have `temper`, absent or an Identity as built, by one entry."""
    entry = Part("attn", "temper", (nn.Identity, ABSENT))
    step = STEPS["attn"]
    monkeypatch.setitem(STEPS, "attn", step._replace(parts=(*step.parts, entry)))
    monkeypatch.setattr(Attention, "forward", tempered)
    monkeypatch.setitem(FORWARDS, Attention, tempered)
    config = vitfast.ViTConfig(image_size=32, patch_size=8, dim=64, depth=2, heads=2, mlp_dim=128, num_classes=5)
    model = vitfast.ViT.from_config(config).eval()
    for block in model.blocks:
        block.attn.temper = None
    return model


def by_modules(block, x):
    """The block's two equations, module by module."""
    x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


@pytest.mark.parametrize("part", [None, nn.Identity()], ids=["absent", "identity"])
def test_part_as_built_stops_ops(model, part):
    for block in model.blocks:
        block.attn.temper = part
    model.eval()
    assert vitfast.explain(model).all_fused and model.blocks[0].untouched()
    vitfast.prepare(model)


def test_changed_part_is_skipped_by_ops(model):
    block, x = model.blocks[0], torch.randn(2, 17, 64)
    plain = block(x)
    block.attn.temper = Temper().eval()
    with torch.no_grad():
        torch.testing.assert_close(block(x), by_modules(block, x), rtol=0, atol=1e-5)
    assert (block(x) - plain).abs().max() > 1e-3


def test_changed_part_is_not_explained_or_prepared(model):
    model.blocks[1].attn.temper = Temper().eval()
    rows = {row.part: row for row in vitfast.explain(model).rows}
    for step in ("norm1 + attn.qkv", "attn.proj + residual"):
        assert "attn.temper is" in rows[f"blocks.1: {step}"].reason and not rows[f"blocks.0: {step}"].reason
    with pytest.raises(NotImplementedError, match=r"blocks\.1\.attn\.temper is .*Temper"):
        vitfast.prepare(model)
    assert not model.blocks[1].untouched()


def test_module_of_a_block_is_in_no_step():
    """Every module that a block builds is a part of some step, so that a new one can't be forgotten by an op."""
    config = vitfast.ViTConfig(
        image_size=32, patch_size=8, dim=64, depth=1, heads=2, mlp_dim=128, num_classes=5, qk_norm=True,
        attn_norm=True, mlp_norm=True, layer_scale=1e-5,
    )  # fmt: skip
    listed = {part.path for step in STEPS.values() for part in step.parts}
    for mlp in ("mlp", "swiglu", "swiglu_packed"):
        block = Block(config.replace(mlp=mlp), 0.1)
        names = [name for name, _ in block.named_modules() if name]
        assert names and not set(names) - listed


@pytest.mark.parametrize("path", ["attn.gate", "mlp.fc1"])
def test_container_with_nothing_in_it_is_taken_for_an_absent_part(path):
    """An empty `nn.Sequential` counts as false; as a gate it is the sigmoid of the tokens, as fc1 the tokens."""
    config = vitfast.ViTConfig(image_size=32, patch_size=8, dim=64, depth=1, heads=2, mlp_dim=64, num_classes=5)
    block, x = vitfast.ViT.from_config(config).eval().blocks[0], torch.randn(2, 17, 64)
    holder, _, name = path.partition(".")
    setattr(getattr(block, holder), name, nn.Sequential())
    torch.testing.assert_close(block(x), by_modules(block, x), rtol=0, atol=1e-5)
    assert not block.untouched()
