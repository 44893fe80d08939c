"""vit-pytorch's `ViT` and `SimpleViT` after `vitfast.patch`: values, gradients and draws are those of before."""

import copy
import io
import pickle
import re

import peft
import pytest
import torch
import vit_pytorch
from patch_others import Case, Counter, level_after_three_steps, make_trained_like, ops_in, patched_copy
from patch_pair import equal, near, state_of
from test_parity_timm import relative
from test_vit_pytorch_readme import WRAPPERS, step
from timm_pair import run
from torch import nn
from vit_pytorch import (
    simple_vit,
    simple_vit_1d,
    simple_vit_3d,
    simple_vit_with_fft,
    simple_vit_with_patch_dropout,
    simple_vit_with_register_tokens,
    vit_1d,
    vit_3d,
    vit_with_patch_dropout,
)
from vit_pytorch.deepvit import DeepViT
from vit_pytorch.extractor import Extractor
from vit_pytorch.recorder import Recorder
from vit_pytorch.simple_vit_with_qk_norm import SimpleViT as QKNorm
from vit_pytorch.vit import Attention, FeedForward

import vitfast

SIZES = dict(num_classes=10, dim=64, depth=2, heads=2, mlp_dim=128)
IMAGE = dict(image_size=32, patch_size=8)
SEQUENCE = dict(seq_len=32, patch_size=4)
VIDEO = dict(image_size=16, image_patch_size=8, frames=4, frame_patch_size=2)
MODELS = {
    "ViT": (vit_pytorch.ViT, IMAGE | {"dim_head": 32}),
    "ViT, mean": (vit_pytorch.ViT, IMAGE | {"pool": "mean"}),
    "ViT, one head": (vit_pytorch.ViT, IMAGE | {"heads": 1, "dim_head": 32}),
    "ViT, no classes": (vit_pytorch.ViT, IMAGE | {"num_classes": 0}),
    "SimpleViT": (simple_vit.SimpleViT, IMAGE | {"dim_head": 32}),
    "SimpleViT, wide heads": (simple_vit.SimpleViT, IMAGE),
    "patch dropout": (vit_with_patch_dropout.ViT, IMAGE),
    "1D": (vit_1d.ViT, SEQUENCE),
    "3D": (vit_3d.ViT, VIDEO),
    "Simple, patch dropout": (simple_vit_with_patch_dropout.SimpleViT, IMAGE),
    "registers": (simple_vit_with_register_tokens.SimpleViT, IMAGE),
    "Fourier": (simple_vit_with_fft.SimpleViT, IMAGE | {"freq_patch_size": 8}),
    "Simple, 1D": (simple_vit_1d.SimpleViT, SEQUENCE),
    "Simple, 3D": (simple_vit_3d.SimpleViT, VIDEO),
}
MAIN = ("ViT", "ViT, mean", "ViT, one head", "SimpleViT", "SimpleViT, wide heads")
DROPS = {"dropout": 0.3, "emb_dropout": 0.1}
KINDS = ("attention", "norm", "mlp")
# of a block
OPS = ["linear", "attention_qkv", "linear", "mlp"]
every_model = pytest.mark.parametrize("name", MODELS)
main_models = pytest.mark.parametrize("name", MAIN)
both = pytest.mark.parametrize("name", ["ViT", "SimpleViT"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def build(name="ViT", batch=3, massive=True, train=True, **changes):
    kind, sizes = MODELS[name]
    model = kind(**SIZES | sizes | changes)
    shape = {"seq_len": (3, 32), "frames": (3, 4, 16, 16)}.get(next(iter({"seq_len", "frames"} & sizes.keys()), ""))
    images = torch.randn(batch, *shape or (3, 32, 32)).bfloat16().float()
    nets = [ff.net for _, ff in model.transformer.layers]
    mlps = [(net[0], net[1], net[4] if len(net) == 6 else net[3]) for net in nets]
    return make_trained_like(model, images, mlps, massive).train(train), images


@every_model
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_formula_is_another_one(name, train):
    """A wrong eps, scale, GELU or order; a norm at the end that is left out; a gradient that is lost."""
    Case(*build(name, train=train)).same_formula()


@main_models
@every_dtype
def test_output_or_gradient_is_less_exact_than_vit_pytorchs(name, dtype):
    """A rounding too many, statistics in half precision, sums of gradients in half precision."""
    Case(*build(name, batch=32, massive=False)).as_exact_as_stock(dtype)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_has_another_dtype_or_is_less_exact(name, dtype):
    Case(*build(name, batch=64)).as_exact_as_stock_in_autocast(dtype)


@every_model
def test_nothing_is_fused(name):
    """A report that says what does not run, in training or in inference; names that are not those of the model."""
    model, images = build(name)
    for train in (True, False):
        report = vitfast.patch(model.train(train)).require(*KINDS)
        # the patches are cut by norms and a product
        assert {part.kind for part in report.left} <= {"patch_embed"}
        modules = dict(model.named_modules())
        assert (
            {part.name for part in report.fused}
            == {f"transformer.layers.{i}.{part}" for i in (0, 1) for part in ("0", "0.norm", "1", "1.net.0")}
            <= modules.keys()
        )
        ops = ops_in(model, images)
        assert ops[: 2 * len(OPS)] == OPS * 2
        assert ops[2 * len(OPS) :] == ["layer_norm"] * hasattr(model.transformer, "norm")
    vitfast.unpatch(model)
    assert not ops_in(model, images)


@main_models
def test_unpatched_model_is_another_one(name):
    """A bit of a weight, of an output or of a gradient that a patch leaves behind, or an attribute."""
    model, images = build(name, **DROPS if name.startswith("ViT") else {})
    before, results = state_of(model), run(model, images)
    vitfast.patch(model)
    equal(model.state_dict(), before[0])
    assert [name for name, *_ in state_of(model)[1]] == [name for name, *_ in before[1]]
    near(run(model, images)[0], results[0], 1e-4)
    vitfast.unpatch(model)
    equal(state_of(model), before)
    equal(run(model, images), results)


@pytest.mark.parametrize("name", ["ViT", "ViT, one head", "patch dropout", "1D", "3D"])
def test_other_numbers_are_dropped(name):
    """A dropout in another place, with another rate, left out, or one that draws before another one."""
    model, images = build(name, massive=False, **DROPS)
    patched = patched_copy(model)
    assert "linear" in ops_in(patched, images)
    (out, grads), (expected, expected_grads) = run(patched, images), run(model, images)
    near(out, expected)
    for at, ref in expected_grads.items():
        assert relative(grads[at], ref.double()) < 1e-3, at
    near(patched.eval()(images), model.eval()(images))


@pytest.mark.parametrize("where", ["0.dropout", "0.to_out.1", "1.net.3", "1.net.5"])
@pytest.mark.parametrize("alone", [False, True], ids=["in a block", "alone"])
def test_dropout_that_somebody_sets_is_not_drawn(where, alone):
    """The mode of one module: as `model.eval()` with dropouts left on does it."""
    model, images = build(**DROPS)
    for layer in model.eval().transformer.layers:
        layer.get_submodule(where).train()
    expected = run(model, images)[0]
    patched = patched_copy(model)
    for part in patched.transformer.layers[0] if alone else ():
        part.register_forward_hook(lambda *args: None)
    near(run(patched, images)[0], expected)
    assert relative(expected, model.eval()(images).double()) > 1e-2


@both
def test_training_drifts_from_vit_pytorchs(name):
    """Gradients that are slightly wrong in one direction, or that reach other parameters."""
    level_after_three_steps(*build(name, batch=8, massive=False))


@both
def test_copy_or_saved_model_is_not_patched_or_runs_the_weights_of_the_original(name):
    model, images = build(name, train=False)
    vitfast.patch(model)
    expected, file = model(images), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for p in model.parameters():
        p.data.zero_()
    for copied in copies:
        assert ops_in(copied, images).count("mlp") == 2
        equal(copied(images), expected)
        vitfast.unpatch(copied)
        assert not ops_in(copied, images)
        near(copied(images), expected)


def test_weights_made_on_meta_are_not_read():
    stock, images = build(train=False)
    with torch.device("meta"):
        model = vit_pytorch.ViT(**SIZES | IMAGE | {"dim_head": 32}).eval()
    vitfast.patch(model).require(*KINDS)
    model.to_empty(device="cpu").load_state_dict(stock.state_dict())
    assert ops_in(model, images).count("mlp") == 2
    near(model(images), stock(images))


# of the first block -> its ops where the module has a hook; a part that is called runs ops of its own
ALONE_ATTENTION, ALONE_MLP = OPS, [*OPS[:3], "linear", "linear"]
IN_ATTENTION, IN_MLP = ["mlp"], OPS[:3]
HOOKED = {
    "": OPS, "0": ALONE_ATTENTION, "1": ALONE_MLP,
    **dict.fromkeys(("0.norm", "0.attend", "0.dropout", "0.to_qkv", "0.to_out", "0.to_out.0", "0.to_out.1"),
                    IN_ATTENTION),
    **dict.fromkeys(("1.net", *(f"1.net.{i}" for i in range(6))), IN_MLP),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
@pytest.mark.parametrize("part", HOOKED)
@both
def test_hook_is_passed_over_or_run_twice_or_unfuses_the_other_half(name, part, kind):
    model, images = build(name)
    patched = patched_copy(model)
    try:
        counters = [Counter(m.transformer.layers[0].get_submodule(part), kind) for m in (model, patched)]
    except AttributeError:
        pytest.skip("SimpleViT has less")
    (out, grads), (expected, expected_grads) = run(patched, images), run(model, images)
    near(out, expected)
    assert all(relative(grads[at], ref.double()) < 1e-3 for at, ref in expected_grads.items())
    # a list is never called
    assert counters[0].calls == counters[1].calls == (part != "")
    assert ops_in(patched, images) == [*HOOKED[part], *OPS, "layer_norm"]
    report = vitfast.patch(patched)
    fused = {part.name.removeprefix("transformer.layers.0.") for part in report.fused}
    assert fused >= {"transformer.layers.1.0", "transformer.layers.1.0.norm", "transformer.layers.1.1"}
    assert ("0" in fused) == (HOOKED[part][:1] == ["linear"]) and ("1" in fused) == (HOOKED[part] != IN_MLP)
    # the norm in a part that runs as it was runs as it was
    assert ("0.norm" in fused) == ("0" in fused) and ("1.net.0" in fused) == ("1" in fused)
    for counter in counters:
        counter.handle.remove()
    assert ops_in(patched, images) == [*OPS * 2, "layer_norm"]


@pytest.mark.parametrize("at", ["transformer", "transformer.norm", "transformer.layers"])
def test_hook_on_all_blocks_is_passed_over(at):
    model, images = build()
    patched = patched_copy(model)
    counters = [Counter(m.get_submodule(at), "forward") for m in (model, patched)]
    near(run(patched, images)[0], run(model, images)[0])
    assert counters[0].calls == counters[1].calls == (at != "transformer.layers")
    assert ops_in(patched, images) == OPS * 2 + ["layer_norm"] * (at != "transformer.norm")


@pytest.mark.parametrize("parts", [{"attention": False}, {"norm": False}, {"mlp": False}], ids=str)
@both
def test_part_that_was_not_asked_for_is_fused_or_reported(name, parts):
    """A norm inside an attention that runs as it was, of which the report says that an op runs it."""
    model, images = build(name)
    patched = copy.deepcopy(model)
    report = vitfast.patch(patched, **parts)
    near(run(patched, images)[0], run(model, images)[0])
    kinds = {part.kind for part in report.fused}
    assert kinds == set(KINDS) - parts.keys()
    ops = ops_in(patched, images)
    if "norm" in parts:
        assert "layer_norm" not in ops and ops.count("attention_qkv") == 2
    else:
        of_norms = ops.count("mlp") if "attention" in parts else ops.count("attention_qkv")
        assert [part.kind for part in report.fused].count("norm") == of_norms == 2
        assert "which runs its own modules" in str(report)


def test_recorder_records_other_attention():
    model, images = build(train=False)
    patched = patched_copy(model)
    recorders = [Recorder(each) for each in (model, patched)]
    (out, maps), (expected, expected_maps) = (recorder(images) for recorder in reversed(recorders))
    near(out, expected)
    assert maps.shape == (3, 2, 2, 17, 17)
    near(maps, expected_maps)
    assert "attention" not in str(vitfast.patch(patched).fused)
    recorders[1].eject()
    vitfast.patch(patched).require(*KINDS)
    assert ops_in(patched, images) == [*OPS * 2, "layer_norm"]


@both
@pytest.mark.parametrize("layer", [None, "1", "0.0", "0.1"])
def test_extractor_extracts_other_embeddings(name, layer):
    model, images = build(name, train=False)
    patched = patched_copy(model)
    found, expected = (
        Extractor(each, layer=layer and each.transformer.layers.get_submodule(layer))(images)
        if layer != "1"
        else Extractor(each, layer_name="to_latent", layer_save_input=True)(images)
        for each in (patched, model)
    )
    for value, ref in zip(found, expected, strict=True):
        for one, other in zip(*((each,) if torch.is_tensor(each) else each for each in (value, ref)), strict=True):
            near(one, other)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper_fails_or_trains_by_another_loss_or_gradient(name, pool):
    """MAE, Dino, SimMIM and the rest of vit-pytorch's README, around a patched encoder."""
    model = vit_pytorch.ViT(**SIZES | IMAGE | {"dim_head": 32, "pool": pool, "num_classes": 12})
    found, expected = (step(each, *WRAPPERS[name]) for each in (patched_copy(model), model))
    if isinstance(expected[0], type):
        assert found == expected
        return
    near(found[0], expected[0])
    for grads, refs in zip(found[1:], expected[1:], strict=True):
        for grad, ref in zip(grads, refs, strict=True):
            assert (grad is None) == (ref is None)
            if ref is not None:
                assert (grad - ref).norm() <= 1e-4 * ref.norm() + 1e-6


@pytest.mark.parametrize("target", ["to_qkv", "to_out.0", "net.1", "net.4"])
def test_adapter_is_ignored(target):
    """An op that reads the weight below a LoRA layer."""
    model, images = build(train=False)
    found = []
    for each in (model, patched_copy(model)):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(each, peft.LoraConfig(init_lora_weights=False, target_modules=[target]))
        found.append((run(adapted.eval(), images), adapted))
    near(found[1][0][0], found[0][0][0])
    for at, ref in found[0][0][1].items():
        grad = found[1][0][1][at]
        assert (grad is None) == (ref is None) and (ref is None or relative(grad, ref.double()) < 1e-3), at
    with found[1][1].disable_adapter():
        assert relative(found[0][0][0], found[1][1](images).double()) > 1e-2
    merged = found[1][1].merge_and_unload()
    near(merged(images), found[0][0][0], 1e-4)
    assert ops_in(merged, images) == [*OPS * 2, "layer_norm"]


@both
def test_graph_breaks_in_a_compiled_model(name):
    model, images = build(name)
    cotangent = torch.randn(3, 10)
    compiled = torch.compile(patched_copy(model), fullgraph=True, backend="aot_eager")
    (out, grads), (expected, expected_grads) = run(compiled, images, cotangent), run(model, images, cotangent)
    near(out, expected)
    for grad, ref in zip(grads.values(), expected_grads.values(), strict=True):
        assert relative(grad, ref.double()) < 1e-3


@pytest.mark.parametrize("at", ["transformer", "transformer.layers.0.0"])
@pytest.mark.parametrize("shape", [(17, 64), (2, 3, 17, 64)], ids=str)
def test_error_of_vit_pytorch_is_another_one(shape, at):
    model, _ = build()
    vitfast.patch(model)
    with pytest.raises(Exception, match=r"(?s)rearrange-reduction pattern .*b n \(h d\) -> b h n d"):
        model.get_submodule(at)(torch.randn(shape))


def test_mlp_alone_takes_other_shapes():
    model, _ = build()
    patched = patched_copy(model)
    for shape in ((64,), (17, 64), (2, 3, 17, 64)):
        x = torch.randn(shape)
        near(*(each.transformer.layers[0][1](x) for each in (patched, model)))


OTHERS = {
    "softmax": (lambda layer: setattr(layer[0], "attend", nn.Softmax(dim=-2)), "0.attend has dim -2, not -1"),
    "other softmax": (lambda layer: setattr(layer[0], "attend", nn.Softmin(dim=-1)), "0.attend is .*Softmin"),
    "no projection": (lambda layer: setattr(layer[0], "to_out", nn.Identity()), "0 has no projection"),
    "longer projection": (lambda layer: layer[0].to_out.append(nn.Tanh()), "0 has 3 modules in to_out, not 2"),
    "longer net": (lambda layer: layer[1].net.append(nn.Tanh()), "1 has 7 modules in net, not 6"),
    "activation": (lambda layer: layer[1].net.__setitem__(2, nn.ReLU()), "1.net.2 is .*ReLU"),
    "parametrized": (lambda layer: nn.utils.parametrizations.weight_norm(layer[0].to_qkv), "0.to_qkv is parametrized"),
    "attention": (lambda layer: layer.__setitem__(0, nn.Linear(64, 64)), "0 is Linear, not attention"),
    "MLP": (lambda layer: layer.__setitem__(1, nn.Linear(64, 64)), "1 is Linear, not mlp"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_module_that_was_put_there_is_fused_or_not_named(what):
    """Attention over another dim, a module at the end that is left out."""
    put, reason = OTHERS[what]
    model, images = build(massive=False)
    torch.manual_seed(2)
    put(model.transformer.layers[0])
    patched = copy.deepcopy(model)
    report = vitfast.patch(patched)
    assert re.search(reason, "; ".join(part.reason for part in report.left)), report
    near(run(patched, images)[0], run(model, images)[0])
    # put there after the patch
    later, _ = build(massive=False)
    vitfast.patch(later)
    later(images)
    torch.manual_seed(2)
    put(later.transformer.layers[0])
    stock = copy.deepcopy(later)
    vitfast.unpatch(stock)
    near(run(later, images)[0], run(stock, images)[0])


@pytest.mark.parametrize("kind", [DeepViT, QKNorm], ids=["DeepViT", "qk-norm"])
def test_model_that_is_not_known_is_patched_or_not_named(kind):
    model = kind(**SIZES | IMAGE).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    report = vitfast.patch(model)
    equal(model(images), expected)
    with pytest.raises(RuntimeError, match=r"vit_pytorch\.\w+\.Attention, which vitfast does not know"):
        report.require("attention")


def test_attention_in_a_block_of_ones_own_runs_ops_unsaid():
    """Its forward is another without the Transformer around it, and the report has to say so."""
    mine = nn.Sequential(Attention(64, heads=2, dim_head=32), FeedForward(64, 128)).eval()
    tokens = torch.randn(2, 5, 64)
    expected = mine(tokens)
    report = vitfast.patch(mine).require("attention", "mlp")
    assert [(part.name, part.kind) for part in report.fused] == [("0", "attention"), ("1", "mlp")]
    torch.testing.assert_close(mine(tokens), expected)
    left = vitfast.patch(mine, mlp=False).left
    assert [(part.name, part.reason) for part in left] == [("1", "mlp=False was asked for")]
