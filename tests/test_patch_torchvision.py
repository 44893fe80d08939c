"""torchvision's `vit_*` after `vitfast.patch`: values, gradients, draws, hooks and errors are those of before.

fp64 shows a wrong formula, whatever its size. fp32 and half precision show roundings that are worse than torchvision's.
"""

import copy
import pickle
from functools import partial

import peft
import pytest
import torch
from patch_cases import (
    KINDS,
    Case,
    draws_of,
    drifts,
    equal_gradients,
    hooks_run_once,
    is_undone,
    make_trained_like,
    ops_in,
    patched_copy,
    quietly,
    same_result,
)
from patch_pair import near
from test_parity_timm import RATIO, gradients_not_worse, relative
from textbook import Textbook
from timm_pair import MASSIVE, run
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.models.vision_transformer import (
    ConvStemConfig,
    EncoderBlock,
    VisionTransformer,
    interpolate_embeddings,
)

import vitfast

SMALL = dict(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=128, num_classes=10)
MODELS = {
    "vit": {},
    "wide heads": dict(num_heads=1),
    "odd": dict(num_heads=3, hidden_dim=72, mlp_dim=100),
    "eps": dict(norm_layer=partial(nn.LayerNorm, eps=1e-2)),
    "RMS norms": dict(norm_layer=nn.RMSNorm),
    "conv stem": dict(conv_stem_configs=[ConvStemConfig(16, 3, 2), ConvStemConfig(16, 3, 2), ConvStemConfig(16, 3, 2)]),
    "representation": dict(representation_size=24),
}
every_model = pytest.mark.parametrize("name", MODELS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
every_mode = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


def images_of(size=32, batch=3):
    return torch.randn(batch, 3, size, size).bfloat16().float()


def build(name="vit", massive=False, batch=3, **changes):
    model = VisionTransformer(**SMALL | MODELS[name] | changes)
    images = images_of(model.image_size, batch)
    mlps = [(block.mlp[0], block.mlp[3]) for block in model.encoder.layers] if massive else ()
    return make_trained_like(model, images, mlps), images


@every_model
@every_mode
def test_formula_is_another_one(name, train):
    """A wrong eps, scale, order of norm and residual; queries taken for keys; a gradient that is lost or partly so."""
    model, images = build(name, massive=True)
    Case(model.train(train), images).is_the_same_formula()


@every_model
@every_dtype
def test_output_or_gradient_is_less_exact_than_torchvisions(name, dtype):
    """A rounding too many, statistics in half precision, sums of gradients in half precision."""
    model, images = build(name)
    # running statistics are another formula in half precision, and no part of a block
    Case(model.train("stem" not in name), images).as_exact_as_stock(dtype)


def test_weights_do_not_resemble_trained_ones():
    model, images = build(massive=True)
    tokens = model.encoder.layers(torch.randn(3, 17, 64))
    model.encoder.register_forward_pre_hook(lambda _, args: tokens.data.copy_(model.encoder.layers(args[0])))
    model(images)
    assert tokens[..., MASSIVE].abs().max() > 500 > 10 * tokens[..., :MASSIVE].abs().median()
    assert model.encoder.layers[0].ln_1.weight.max() >= 10


@every_model
def test_nothing_is_fused(name):
    """A report that says what does not run, in training or in inference; a stem that is left without a word."""
    model, images = build(name)
    for train in (True, False):
        report = vitfast.patch(model.train(train)).require(*KINDS)
        left = [(part.name, part.kind) for part in report.left]
        assert left == ([("conv_proj", "patch_embed")] if name == "conv stem" else [])
        assert {"linear", "attention_qkv", "mlp"} <= ops_in(model, images)
    assert ("Sequential, not Conv2d" in str(report)) == (name == "conv stem")
    with torch.no_grad():
        assert ("patch_embed" in ops_in(model, images)) == (name != "conv stem")


@every_model
def test_unpatched_model_is_another_one(name):
    """A bit of a weight, of an output or of a gradient that a patch leaves behind, or an attribute."""
    model, images = build(name, massive=True, dropout=0.1, attention_dropout=0.1)
    # a run in training changes the statistics of the stem
    is_undone(model.train("stem" not in name), images)


@every_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_has_another_dtype_or_is_less_exact(dtype, train):
    """Norms or residuals in half precision where torchvision keeps fp32; the other way round in the fast path."""
    model, images = build(batch=16)
    case = Case(model.train(train), images)
    x = torch.randn(2, 17, 64)
    with torch.autocast("cpu", dtype), Textbook():
        low, grads_low = run(case.stock, images, case.cotangent)
        out, grads = run(case.patched, images, case.cotangent)
        for given in (x, x.to(dtype)):
            found, expected = (m.encoder.layers[1](given) for m in (case.patched, case.stock))
            assert found.dtype == expected.dtype
            with torch.no_grad():
                found, expected = (m.encoder.layers[1](given) for m in (case.patched, case.stock))
            assert found.dtype == expected.dtype
    assert out.dtype == low.dtype
    ours_off, theirs_off = ((value - case.out).norm(dim=1) for value in (out, low))
    assert (ours_off / theirs_off).log().mean().exp() <= RATIO[dtype]
    gradients_not_worse(grads, case.grads, grads_low, 2.0)


def test_fast_path_of_inference_is_something_else():
    """`nn.MultiheadAttention` runs a kernel of its own in eval without gradients, for even numbers of heads."""
    for heads in (1, 2):
        model, images = build(num_heads=heads)
        ref = copy.deepcopy(model.eval()).double()
        patched, _ = patched_copy(model)
        with torch.no_grad():
            near(patched(images), model(images))
            expected = ref(images.double())
            low, out = (m.bfloat16()(images.bfloat16()) for m in (model, patched))
        assert relative(out, expected) <= 2 * relative(low, expected) + 1e-7


@pytest.mark.parametrize("where", ["weights", "hidden", "branch", "all"])
def test_other_numbers_are_dropped(where):
    """A dropout in another place, with another rate, left out, or drawn before another one."""
    rates = {"attention_dropout": 0.4} if where in ("weights", "all") else {}
    model, images = build(**rates)
    if where in ("hidden", "all"):
        for block in model.encoder.layers:
            block.mlp[2].p, block.mlp[4].p = 0.4, 0.3
    if where in ("weights", "hidden", "all"):
        same_result(model, images)
    if where == "branch":
        # drawn in the order of memory, which is another one there: tokens, then images
        block = model.encoder.layers[0]
        block.dropout.p = 0.4
        x = torch.randn(5, 64)
        patched, _ = patched_copy(model)
        (mean, std), (mean_stock, std_stock) = (draws_of(m.encoder.layers[0], x) for m in (patched, model))
        assert relative(std, std_stock.double()) < 0.1
        assert (mean - mean_stock).norm() < 0.15 * std_stock.norm()
    near(patched_copy(model.eval())[0](images), model(images))


def test_training_drifts_from_torchvisions():
    """Gradients that are slightly wrong in one direction, or that reach other parameters."""
    model, images = build(batch=8, attention_dropout=0.1)
    assert drifts(model, images) < 1e-3


def each(change):
    """The change of a block, for all blocks."""
    return lambda model: [change(block) for block in model.encoder.layers]


def in_attention(**values):
    return each(lambda block: [setattr(block.self_attention, name, value) for name, value in values.items()])


def attention_of(**keywords):
    return each(lambda block: setattr(block, "self_attention", nn.MultiheadAttention(64, 2, **keywords)))


def keys():
    return nn.Parameter(torch.randn(1, 1, 64))


# what somebody does to a model -> kinds of which nothing runs as an op any more
CHANGES = {
    "more heads": (in_attention(num_heads=4), set()),
    "batch first off": (in_attention(batch_first=False), {"attention"}),
    "keys added": (each(lambda b: [setattr(b.self_attention, n, keys()) for n in ("bias_k", "bias_v")]), {"attention"}),
    "zeros added": (in_attention(add_zero_attn=True), {"attention"}),
    "no biases": (attention_of(bias=False, batch_first=True), set()),
    "other batch order": (attention_of(), {"attention"}),
    "dropout set": (in_attention(dropout=0.4), set()),
    "dims of keys": (lambda m: [_with_kdim(block) for block in m.encoder.layers], {"attention"}),
    "packed weight normalised": (
        each(lambda b: parametrizations.weight_norm(b.self_attention, "in_proj_weight")), {"attention"}),
    "projection of spectral norm": (
        each(lambda b: parametrizations.spectral_norm(b.self_attention.out_proj)), {"attention"}),
    "packed weight pruned": (
        each(lambda b: prune.ln_structured(b.self_attention, "in_proj_weight", 0.5, 2, 0)), {"attention"}),
    "projection pruned": (
        each(lambda b: prune.ln_structured(b.self_attention.out_proj, "weight", 0.5, 2, 0)), {"attention"}),
    "plain projection": (each(lambda b: setattr(b.self_attention, "out_proj", nn.Linear(64, 64))), set()),
    "seventh module": (each(lambda b: b.mlp.append(nn.Tanh())), {"mlp"}),
    "module between": (each(lambda b: b.mlp.insert(2, nn.Tanh())), {"mlp"}),
    "no last dropout": (each(lambda b: b.mlp.__delitem__(4)), {"mlp"}),
    "other activation": (each(lambda b: b.mlp.__setitem__(1, nn.ReLU())), {"mlp"}),
    "tanh": (each(lambda b: setattr(b.mlp[1], "approximate", "tanh")), set()),
    "eps": (each(lambda b: setattr(b.ln_1, "eps", 0.5)), set()),
    "no gains": (each(lambda b: setattr(b, "ln_1", nn.LayerNorm(64, elementwise_affine=False))), set()),
    "no norm": (each(lambda b: setattr(b, "ln_2", nn.Identity())), set()),
    "something for a dropout": (each(lambda b: setattr(b, "dropout", nn.Tanh())), {"attention"}),
    "Identity for a dropout": (each(lambda b: setattr(b, "dropout", nn.Identity())), set()),
    "weights assigned": (
        lambda m: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}, assign=True), set()),
}  # fmt: skip


def _with_kdim(block):
    block.self_attention = nn.MultiheadAttention(64, 2, kdim=64, batch_first=True)
    block.self_attention = nn.MultiheadAttention(64, 2, kdim=32, vdim=64, batch_first=True)
    block.self_attention.kdim, block.self_attention.k_proj_weight = 64, nn.Parameter(torch.randn(64, 64) / 8)


@pytest.mark.parametrize("name", CHANGES)
@every_mode
def test_change_after_a_call_is_passed_over(name, train):
    """What was decided of a block at its last call, and holds no more; an op that reads what the module has not."""
    change, left = CHANGES[name]
    model, images = build()
    _, patched = same_result(model, images, change, train)
    report = vitfast.patch(patched)
    assert {part.kind for part in report.left} - {"norm"} == left
    ran = ops_in(patched, images)
    # with dropout of weights attention is stock on a CPU, and without a norm two products stand for the MLP
    assert ran and not ran & {{"mlp": "mlp", "attention": "attention_qkv"}[kind] for kind in left}


def test_hook_on_a_child_is_not_run_or_run_twice():
    """And the report says what it costs: a hook on the norm that of the norm, nothing that of another block."""
    model, images = build()
    left = hooks_run_once(model.eval(), images, lambda m: m.encoder.layers[0])
    assert left == {
        "": set(),
        "ln_1": {"norm"}, "ln_2": {"norm"}, "dropout": {"attention"}, "mlp": {"mlp"},
        "self_attention": {"attention"}, "self_attention.out_proj": {"attention"},
        **{f"mlp.{i}": {"mlp"} for i in range(5)},
    }  # fmt: skip


def test_weights_of_attention_cannot_be_asked_for():
    """The usual way to see them: a hook that changes `need_weights` in the call, and one that reads them."""
    model, images = build()
    patched, _ = patched_copy(model)
    seen = ([], [])
    for one, found in zip((model, patched), seen, strict=True):
        one(images)
        for block in one.encoder.layers:
            ask = lambda _, args, kwargs: (args, kwargs | {"need_weights": True})  # noqa: E731
            block.self_attention.register_forward_pre_hook(ask, with_kwargs=True)
            block.self_attention.register_forward_hook(lambda _, args, out, found=found: found.append(out[1]))
        one(images)
    assert len(seen[0]) == 2
    for found, expected in zip(*reversed(seen), strict=True):
        near(found, expected)


def test_error_or_keyword_is_another_one():
    """Shapes that torchvision refuses in its own words, and its name for the tokens."""
    model, _ = build()
    patched, _ = patched_copy(model)
    blocks = [m.encoder.layers[0] for m in (model, patched)]
    for shape in ((17, 64), (1, 2, 17, 64)):
        for block in blocks:
            with pytest.raises(AssertionError, match=r"Expected \(batch_size, seq_length, hidden_dim\) got"):
                block(torch.randn(shape))
    x = torch.randn(2, 17, 64)
    near(blocks[1](input=x), blocks[0](input=x))


def test_old_or_interpolated_checkpoint_is_refused():
    """Keys of before torchvision 0.12, `mlp.linear_1`; positions of another size, read from a patched model."""
    model, images = build()
    old = {k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v
           for k, v in model.state_dict().items()}  # fmt: skip
    assert any("linear_1" in key for key in old)
    other = VisionTransformer(**SMALL)
    vitfast.patch(other)
    other.load_state_dict(old)
    near(other.eval()(images), model.eval()(images))
    results = []
    for source in (model, other):
        larger = VisionTransformer(**SMALL | {"image_size": 48})
        larger.load_state_dict(interpolate_embeddings(48, 8, source.state_dict()))
        vitfast.patch(larger)
        results.append(larger.eval()(torch.ones(1, 3, 48, 48)))
    assert torch.equal(*results)


def test_tracers_see_ops_or_another_graph():
    """torch.fx by torchvision's feature extractor, and torch.export: programs that need no vitfast."""
    model, images = build()
    patched, _ = patched_copy(model.eval())
    assert get_graph_node_names(patched) == get_graph_node_names(model)
    layers = ["encoder.layers.encoder_layer_0.mlp", "encoder.layers.encoder_layer_1.ln_1", "heads"]
    found, expected = (create_feature_extractor(m, layers)(images) for m in (patched, model))
    assert [near(found[name], expected[name]) for name in layers]
    program = quietly(torch.export.export, patched, (images,))
    assert not any("vitfast" in str(node.target) for node in program.graph.nodes)


def test_copy_is_not_patched_or_shares_weights():
    model, images = build()
    vitfast.patch(model.eval())
    expected = model(images)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(images), expected) and "mlp" in ops_in(again, images)
        with torch.no_grad():
            again.encoder.layers[0].ln_1.weight.mul_(2)
        assert relative(again(images), expected.double()) > 1e-3
    assert torch.equal(model(images), expected)


def test_patch_on_meta_is_lost():
    model, images = build()
    with torch.device("meta"):
        other = VisionTransformer(**SMALL)
    vitfast.patch(other).require(*KINDS)
    assert other(images.to("meta")).shape == (3, 10)
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    near(other.eval()(images), model.eval()(images))
    assert "mlp" in ops_in(other, images)


def test_block_breaks_the_graph():
    model, _ = build()
    patched, _ = patched_copy(model)
    x = torch.randn(2, 17, 64)
    blocks = [torch.compile(patched.encoder.layers[0], backend="aot_eager", fullgraph=True), model.encoder.layers[0]]
    # torchvision's tokens lie in another order in memory, in which numbers like them would be drawn
    cotangent = torch.randn(2, 17, 64)
    (out, grads), (expected, expected_grads) = (run(block, x, cotangent) for block in blocks)
    near(out, expected)
    equal_gradients({at.removeprefix("_orig_mod."): grad for at, grad in grads.items()}, expected_grads, 1e-3)


@pytest.mark.parametrize("target", ["out_proj", "self_attention", "mlp.0", "mlp.3"])
@pytest.mark.parametrize("first", [True, False], ids=["patch, peft", "peft, patch"])
def test_adapter_is_ignored(target, first):
    """LoRA on one layer, whose base weight is still where the op would read it; merged, ops run again."""
    model, images = build()
    models = []
    for patched in (False, True):
        one = copy.deepcopy(model)
        if patched and first:
            vitfast.patch(one)
            one(images)
        torch.manual_seed(0)
        one = peft.get_peft_model(one, peft.LoraConfig(init_lora_weights=False, target_modules=[target])).eval()
        if patched and not first:
            vitfast.patch(one)
        models.append(one)
    near(models[1](images), models[0](images))
    # torch's attention reads the weight of its projection, so an adapter there does nothing in any case
    if target != "out_proj":
        assert relative(models[0](images), model.eval()(images).double()) > 1e-2
    kind = "mlp" if "mlp" in target else "attention"
    assert {part.kind for part in vitfast.patch(models[1]).left} == {kind}
    merged = [one.merge_and_unload() for one in models]
    near(merged[1](images), merged[0](images))
    assert not vitfast.patch(merged[1]).left


def test_quantised_layer_is_read_as_if_it_were_not():
    model, images = build()
    patched, _ = patched_copy(model.eval())
    patched(images)
    both = [quietly(torch.ao.quantization.quantize_dynamic, m, {nn.Linear}) for m in (model, patched)]
    near(both[1](images), both[0](images), 0.02)
    assert {part.kind for part in vitfast.patch(both[1]).left} >= {"mlp"}
    assert "mlp" not in ops_in(both[1], images)


def test_block_of_somebody_elses_is_taken_for_torchvisions():
    """A subclass with another forward, and a module of the same name."""

    class Mine(EncoderBlock):
        def forward(self, input):
            return super().forward(input) * 2

    model, images = build()
    mine = Mine(2, 64, 128, 0.0, 0.0)
    model.encoder.layers.encoder_layer_1 = mine
    _, patched = same_result(model, images)
    assert [part.name for part in vitfast.patch(patched).left] == ["encoder.layers.encoder_layer_1"]
