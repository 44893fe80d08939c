"""Images that stochastic depth drops, left out of a block's work: the results of dropping afterwards."""

import pytest
import torch

import vitfast
from vitfast.model.layers import DropPath


def model_of(rate=0.5, **config):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "dim": 32, "depth": 3, "heads": 2, "mlp_dim": 64, "num_classes": 5}
    model = vitfast.ViT.from_config(vitfast.ViTConfig(drop_path=rate, **sizes, **config)).train()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def step(model, images, dtype=None):
    torch.manual_seed(7)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        out = model(images)
    out.float().square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "config", [{}, {"layer_scale": 0.3, "register_tokens": 2}, {"pool": "mean", "mlp": "swiglu"}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_leaving_images_out_changes_results(config, dtype):
    """Another image's branch, another scale, a gradient that is lost: all numbers as when dropped afterwards."""
    model, images = model_of(**config), torch.randn(7, 3, 16, 16)
    expected, grads = step(model, images, dtype)
    model.set_drop_path_subset(0.2)
    found, found_grads = step(model, images, dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-1}
    torch.testing.assert_close(found, expected, **tolerance)
    for name, grad in grads.items():
        atol = tolerance["atol"] * max(1.0, grad.abs().max().item())
        torch.testing.assert_close(found_grads[name], grad, rtol=tolerance["rtol"], atol=atol)


def test_dropped_images_are_computed_all_the_same(monkeypatch):
    """Nothing would be saved. The first block, whose rate is 0, has all images."""
    model, images = model_of(), torch.randn(64, 3, 16, 16)
    model.set_drop_path_subset(0.2)
    rows = []
    mlp = vitfast.ops.mlp
    monkeypatch.setattr("vitfast.ops.mlp", lambda x, *args, **how: rows.append(len(x)) or mlp(x, *args, **how))
    model(images)
    assert rows[0] == 64 and all(10 < n < 54 for n in rows[2:])
    rows.clear()
    model.eval()(images)
    assert rows == [64, 64, 64]


def test_no_image_keeps_the_branch():
    model, images = model_of(), torch.randn(2, 3, 16, 16)
    model.blocks[2].drop_path1.drop_prob = model.blocks[2].drop_path2.drop_prob = 1.0
    model.set_drop_path_subset(0.0)
    out, grads = step(model, images)
    assert torch.isfinite(out).all() and all(torch.isfinite(grad).all() for grad in grads.values())
    assert not grads["blocks.2.mlp.fc1.weight"].any()


def test_checkpointing_draws_other_images_in_the_backward():
    model, images = model_of(), torch.randn(7, 3, 16, 16)
    model.set_drop_path_subset(0.2)
    _, expected = step(model, images)
    model.set_grad_checkpointing()
    _, found = step(model, images)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-5 * max(1.0, grad.abs().max().item()))


def test_compiled_model_breaks_at_the_subset():
    model, images = model_of(), torch.randn(4, 3, 16, 16)
    model.set_drop_path_subset(0.2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert compiled(images).shape == (4, 5)


def test_rate_that_is_none_is_taken():
    model = model_of()
    for rate in (-0.1, 1.5):
        with pytest.raises(ValueError, match="rate_from must be from 0 to 1"):
            model.set_drop_path_subset(rate)
    model.set_drop_path_subset(None)
    assert all(m.subset_from is None for m in model.modules() if isinstance(m, DropPath))


def test_recomputing_the_mlp_changes_results_or_keeps_as_much():
    model, images = model_of(rate=0.0), torch.randn(3, 3, 16, 16)
    found, kept = {}, {}
    for mode in ("none", "act", "fc1"):
        model.set_mlp_recompute(mode)
        sizes = {}

        def note(t, sizes=sizes):
            sizes[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = model(images)
        model.zero_grad()
        out.square().sum().backward()
        found[mode], kept[mode] = {n: p.grad.clone() for n, p in model.named_parameters()}, sum(sizes.values())
    assert kept["none"] > kept["act"] > kept["fc1"]
    for mode in ("none", "fc1"):
        for name, grad in found["act"].items():
            atol = 1e-6 * max(1.0, grad.abs().max().item())
            torch.testing.assert_close(found[mode][name], grad, rtol=1e-5, atol=atol)
    with pytest.raises(ValueError, match="set_mlp_recompute: mode must be one of"):
        model.set_mlp_recompute("all")


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_part_in_the_place_of_stochastic_depth_breaks_the_block(mode):
    """Fine-tuning code puts nn.Identity there, or a drop path of another library."""
    model, images = model_of(), torch.randn(2, 3, 16, 16)
    model.set_drop_path_subset(0.0)
    model.blocks[0].drop_path1 = torch.nn.Identity()
    model.blocks[2].drop_path2 = torch.nn.Identity()
    assert getattr(model, mode)()(images).shape == (2, 5)


def test_prepared_model_takes_settings_that_do_nothing():
    prepared = vitfast.prepare(model_of().eval())
    for name, value in (("set_mlp_recompute", "fc1"), ("set_drop_path_subset", 0.2)):
        with pytest.raises(NotImplementedError, match=name):
            getattr(prepared, name)(value)
