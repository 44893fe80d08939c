"""Which substitution makes two models agree: every difference that is planted has to be named, and nothing else."""

import pytest
import timm
import torch
from parity_plants import BASES, PAIRS, SINGLES, base, each, planted
from torch import nn

import vitfast
from vitfast.check.acceptance import FORMULA, apart


@pytest.fixture(autouse=True)
def one_thread():
    """Hundreds of products of a few rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def diagnosed(*names, dtype=None):
    theirs, ours, images = base(SINGLES[names[0]][0])
    found = vitfast.compare(ours, planted(theirs, *names), images, dtype=dtype)
    assert not found.ok, names
    return found.diagnosis


@pytest.mark.parametrize("name", SINGLES)
def test_a_planted_difference_is_not_named(name):
    """Or another one is, or a stage is left that nothing explains."""
    found = diagnosed(name)
    assert found.names == (SINGLES[name][2],), str(found)
    assert not found.unexplained
    (finding,) = found.findings
    assert finding.after < 1e-5 * finding.before or finding.after < 1e-9


@pytest.mark.parametrize("names", PAIRS, ids=" + ".join)
def test_a_planted_pair_is_not_named(names):
    found = diagnosed(*names)
    assert set(found.names) == {SINGLES[name][2] for name in names}, str(found)
    assert not found.unexplained


def test_fewer_than_twenty_pairs_are_planted():
    assert len(set(PAIRS)) >= 20
    assert {SINGLES[name][2] for name in SINGLES} >= {
        "eps", "gelu", "qkv order", "head split", "pooling", "norm and pooling", "layer scale", "resampling", "prefix",
        "channel order", "pixel order", "mean and std", "precision", "heads", "positions", "bias",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["eps 1e-5", "gelu tanh", "eps 1e-12"])
def test_bf16_hides_a_formula(name):
    """eps, and erf against tanh, are less than a rounding there: fp64 has to tell them, and the table has to say so."""
    theirs, ours, images = base("token")
    found = vitfast.compare(ours, planted(theirs, name), images, dtype=torch.bfloat16)
    assert not found.ok and found.diagnosis.names == (SINGLES[name][2],)
    assert any("fp64 that tells" in note for note in found.notes)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_models_get_a_diagnosis(name, dtype):
    theirs, ours, images = base(name)
    for a, b in ((theirs, ours), (ours, theirs)):
        found = vitfast.compare(a, b, images, dtype=dtype)
        assert found.ok and found.first is None and found.diagnosis is None, str(found)


def test_difference_of_one_block_is_taken_for_one_of_all():
    theirs, ours, images = base("token")
    changed = planted(theirs)
    changed.blocks[1].ls1 = changed.blocks[1].ls2 = nn.Identity()
    found = vitfast.compare(ours, changed, images).diagnosis
    assert found.names == ("layer scale",) and "blocks.1 only" in str(found)


def test_rounding_of_a_sum_is_taken_for_a_formula():
    """A branch of a new model, scaled by 1e-5, is hardly more than what the residual rounds off; eps is more."""
    exact = torch.randn(1000, dtype=torch.float64)
    base_of_it, rounded = exact * (1 - 1e-9), torch.nextafter(exact, torch.full_like(exact, 9))
    assert apart(rounded, exact, base_of_it) <= FORMULA < apart(exact * (1 + 1e-14), exact, base_of_it)
    theirs = timm.create_model("deit3_small_patch16_224", depth=2, img_size=48, num_classes=5).eval()
    ours, images = vitfast.load(theirs), torch.randn(2, 3, 48, 48)
    found = vitfast.compare(theirs, ours, images, gradients=True)
    assert found.ok, str(found)
    found = vitfast.compare(theirs, planted(theirs, "eps 1e-5"), images)
    assert found.first == "blocks.0.attn" and found.diagnosis.names == ("eps",)


def test_what_a_lacks_is_not_found():
    """LayerScale, and a class token, that the second model has: it is the second one that has to be varied."""
    theirs, ours, images = base("token")
    for name in ("no LayerScale", "no bias of fc1"):
        found = vitfast.compare(planted(theirs, name), ours, images).diagnosis
        assert found.names == (SINGLES[name][2],), str(found)
        assert {step.model for finding in found.findings for steps in finding.alternatives for step in steps} == {"b"}


def test_changed_weight_is_not_named():
    theirs, ours, images = base("token")
    changed = planted(theirs)
    with torch.no_grad():
        changed.blocks[1].mlp.fc1.weight[3, 5] += 1
    found = vitfast.compare(ours, changed, images).diagnosis
    assert found.names == ("weights",) and "blocks.1.mlp.fc1.weight" in str(found)


def test_what_cannot_be_told_apart_is_hidden():
    """With three heads, rows by head are an order that is its own inverse: both readings have to be listed."""
    theirs, ours, images = base("token", embed_dim=48, num_heads=3)
    changed = planted(theirs, "rows by head")
    (finding,) = vitfast.compare(ours, changed, images).diagnosis.findings
    assert len(finding.alternatives) == 2 and "can't be told" in str(finding)


def test_arithmetic_is_not_told_from_a_formula():
    """Of a model that computes a stage in bf16, whatever its weights are in: in fp64 it is the same."""

    class InHalf(nn.Linear):
        def forward(self, x):
            if x.dtype == torch.float64:
                return super().forward(x)
            return nn.functional.linear(*(t.bfloat16() for t in (x, self.weight, self.bias))).to(x.dtype)

    theirs, ours, images = base("token")
    changed = planted(theirs)
    each(changed.blocks[1].mlp, nn.Linear, lambda linear: setattr(linear, "__class__", InHalf))
    found = vitfast.compare(ours, changed, images)
    assert found.first == "blocks.1.mlp" and all(row.formula < 1e-9 for row in found.stages)
    assert found.diagnosis.names == ("precision",) and "bf16" in str(found.diagnosis)
