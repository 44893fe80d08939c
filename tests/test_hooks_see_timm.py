"""What a hook on any module sees: the inputs and outputs that timm's module of that name has, in timm's layout."""

import functools
import re

import pytest
import torch
from test_vit_pytorch import pair as vit_pytorch_pair
from timm_pair import FAMILIES, build_pair
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import vitfast

# the same modules in other sizes
SAME = ("deit3", "siglip_gap", "beit3_giant", "huge", "eva_gap", "dinov2_giant")
CHANGES = {family: {} for family in FAMILIES if family not in SAME} | {
    "dynamic": {"dynamic_img_size": True}, "dynamic, padded": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "test_vit, dynamic": {"dynamic_img_size": True}, "drops": {"proj_drop_rate": 0.1, "drop_path_rate": 0.1},
    "LayerScale": {"init_values": 0.1}, "qk_norm, attention norm": {"scale_attn_norm": True},
}  # fmt: skip
FAMILY_OF = {"test_vit, dynamic": "test_vit", "qk_norm, attention norm": "qk_norm"}
every_case = pytest.mark.parametrize("case", CHANGES)


def pair(case):
    family = FAMILY_OF.get(case, case if case in FAMILIES else "vit")
    theirs, ours, images = build_pair(family, massive=False, **CHANGES[case])
    return theirs.eval(), ours.eval(), images


def seen(model, images, how="each module"):
    """By name of module: its tensors, those that come in and what goes out."""
    found, names = {}, {module: name for name, module in model.named_modules()}
    if how == "each module":
        note = functools.partial(functools.partial, _note, found)
        handles = [module.register_forward_hook(note(name)) for module, name in names.items()]
    else:
        note = lambda module, *given: _note(found, names.get(module, "inside"), module, *given)  # noqa: E731
        handles = [register_module_forward_hook(note)]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def _note(found, name, module, args, out):
    found.setdefault(name, []).extend(t for t in (*args, out) if isinstance(t, torch.Tensor))


def differences(found, expected):
    wrong = [f"{name} is not there" for name in expected.keys() - found.keys()]
    for name in found.keys() & expected.keys():
        one, other = found[name], expected[name]
        if [t.shape for t in one] != [t.shape for t in other]:
            wrong.append(f"{name}: {[list(t.shape) for t in one]}, timm's {[list(t.shape) for t in other]}")
        elif any((a - b).norm() > 1e-4 * b.norm() for a, b in zip(one, other, strict=True)):
            wrong.append(f"{name}: other values")
    return wrong


@every_case
@pytest.mark.parametrize("how", ["each module", "all at once"])
def test_hook_sees_another_layout_or_other_values(case, how):
    """Maps of H x H in the place of N x N from q_norm's output, patches without their grid."""
    theirs, ours, images = pair(case)
    if how == "each module":
        # the way on which its attention weights exist
        for block in theirs.blocks:
            block.attn.fused_attn = False
    assert differences(seen(ours, images, how), seen(theirs, images)) == []


@pytest.mark.parametrize("how", ["each module", "all at once"])
@pytest.mark.parametrize("changes", [{}, {"heads": 1, "dim_head": 64}, {"pool": "mean"}], ids=str)
def test_hook_sees_another_layout_than_in_vit_pytorch(how, changes):
    theirs, ours = (model.eval() for model in vit_pytorch_pair(**changes))
    images = torch.randn(2, 3, 32, 32)
    by_our_name = {}
    for name, tensors in seen(theirs, images).items():
        for theirs_, ours_ in NAMES_OF_VIT_PYTORCH:
            if re.fullmatch(theirs_, name):
                by_our_name[re.sub(theirs_, ours_, name)] = tensors
    assert len(by_our_name) >= 25
    assert differences(seen(ours, images, how), by_our_name) == []


LAYER = r"transformer\.layers\.(\d+)\."
NAMES_OF_VIT_PYTORCH = [
    (r"to_patch_embedding", "patch_embed"), (r"to_patch_embedding\.1", "patch_embed.input_norm"),
    (r"to_patch_embedding\.2", "patch_embed.proj"), (r"to_patch_embedding\.3", "patch_embed.norm"),
    (r"dropout", "pos_drop"), (r"transformer\.norm", "norm"), (r"mlp_head", "head"),
    (LAYER + r"0\.norm", r"blocks.\1.norm1"), (LAYER + r"0\.to_qkv", r"blocks.\1.attn.qkv"),
    (LAYER + r"0\.dropout", r"blocks.\1.attn.attn_drop"), (LAYER + r"0\.to_out\.0", r"blocks.\1.attn.proj"),
    (LAYER + r"0\.to_out\.1", r"blocks.\1.attn.proj_drop"), (LAYER + r"1\.net\.0", r"blocks.\1.norm2"),
    (LAYER + r"1\.net\.1", r"blocks.\1.mlp.fc1"), (LAYER + r"1\.net\.2", r"blocks.\1.mlp.act"),
    (LAYER + r"1\.net\.3", r"blocks.\1.mlp.drop1"), (LAYER + r"1\.net\.4", r"blocks.\1.mlp.fc2"),
    (LAYER + r"1\.net\.5", r"blocks.\1.mlp.drop2"),
]  # fmt: skip


class Rows(nn.Module):
    """A stem that gives tokens without their grid, as ours did."""

    def __init__(self, stem):
        super().__init__()
        self.stem, self.grid_of, self.grid_size = stem, stem.grid_of, stem.grid_size

    def forward(self, images):
        return self.stem(images).flatten(1, 2)


@pytest.mark.parametrize("case", ["dynamic", "dynamic, padded"])
@pytest.mark.parametrize("size", [(48, 32), (64, 80)], ids=str)
def test_patches_of_a_dynamic_size_lose_their_grid(case, size):
    """A direct call, timm's own stem in the place of ours, one without a grid; prepared models of each."""
    theirs, ours, _ = pair(case)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, tokens = theirs(images), theirs.patch_embed(images)
        torch.testing.assert_close(ours.patch_embed(images), tokens, rtol=1e-4, atol=1e-4)
        own = ours.patch_embed
        for stem in (own, theirs.patch_embed, Rows(own).eval()):
            ours.patch_embed = stem
            torch.testing.assert_close(ours(images), expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(vitfast.prepare(ours)(images), expected, rtol=1e-3, atol=1e-3)


def test_dropout_is_on_where_timm_has_none():
    """Without positions timm leaves pos_drop out."""
    theirs, ours, images = build_pair("no_positions", massive=False, pos_drop_rate=0.9)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-3, atol=1e-3)
