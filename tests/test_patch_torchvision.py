"""torchvision's `vit_*` after `vitfast.patch`: values, gradients and draws are those of before, to rounding."""

import copy
import io
import pickle
import re
from functools import partial

import peft
import pytest
import torch
from patch_others import Case, Counter, level_after_three_steps, make_trained_like, ops_in, patched_copy
from patch_pair import equal, near, state_of
from test_parity_timm import relative
from timm_pair import run
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.models.vision_transformer import (
    ConvStemConfig,
    EncoderBlock,
    VisionTransformer,
    interpolate_embeddings,
)

import vitfast
from vitfast.model.plain import FORWARDS

SIZES = dict(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=128, num_classes=10)
MODELS = {
    "as torchvision has it": {},
    "another eps": {"norm_layer": partial(nn.LayerNorm, eps=1e-3)},
    "RMS norms": {"norm_layer": partial(nn.RMSNorm, eps=1e-5)},
    "norms without bias": {"norm_layer": partial(nn.LayerNorm, bias=False)},
    "no biases in attention": {},
    "wide": {"hidden_dim": 96, "num_heads": 3, "image_size": 24, "representation_size": 32},
}
DROPS = {"dropout": 0.2, "attention_dropout": 0.3}
# of a block
OPS = ["linear", "attention_qkv", "linear", "mlp"]
KINDS = ("attention", "norm", "mlp")
every_model = pytest.mark.parametrize("name", MODELS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture
def masks_in_order(monkeypatch):
    """Masks drawn in the order of indices: torch draws in that of memory, where its attention gives [N, B, D]."""

    def dropout(x, p=0.5, training=True, inplace=False):
        return x * torch.empty(x.shape, dtype=x.dtype).bernoulli_(1 - p).div_(1 - p) if training and p else x

    monkeypatch.setattr(nn.functional, "dropout", dropout)


def blocks_of(model):
    return list(model.encoder.layers)


def ops_of_blocks(model, images):
    return [op for op in ops_in(model, images) if op != "patch_embed"]


def build(name="as torchvision has it", batch=3, massive=True, train=True, **changes):
    model = VisionTransformer(**SIZES | MODELS[name] | changes)
    for block in blocks_of(model) if name == "no biases in attention" else ():
        block.self_attention = nn.MultiheadAttention(64, 2, bias=False, batch_first=True)
    images = torch.randn(batch, 3, model.image_size, model.image_size).bfloat16().float()
    mlps = [(block.ln_2, block.mlp[0], block.mlp[3]) for block in blocks_of(model)]
    return make_trained_like(model, images, mlps, massive).train(train), images


@every_model
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_formula_is_another_one(name, train):
    """A wrong eps, scale, GELU or order; a gradient that is lost, as one of the packed projection would be."""
    Case(*build(name, train=train)).same_formula()


@every_model
@every_dtype
def test_output_or_gradient_is_less_exact_than_torchvisions(name, dtype):
    """A rounding too many, statistics in half precision, sums of gradients in half precision."""
    Case(*build(name, batch=32, massive=False)).as_exact_as_stock(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_has_another_dtype_or_is_less_exact(dtype):
    """Norms or residuals in half precision where torchvision keeps fp32."""
    Case(*build(batch=16)).as_exact_as_stock_in_autocast(dtype)


@every_dtype
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fast_path_of_torch_is_more_exact(mode, dtype):
    """In inference torch's MultiheadAttention runs a kernel of its own, which computes the same."""
    model, images = build(train=False)
    model, images = model.to(dtype), images.to(dtype)
    with mode():
        ref = copy.deepcopy(model).double()(images.double())
        low, out = model(images), patched_copy(model)(images)
    assert out.dtype == low.dtype and out.is_inference() == low.is_inference()
    assert relative(out, ref) <= 1.5 * relative(low, ref) + 1e-6


@every_model
def test_nothing_is_fused(name):
    """A report that says what does not run, in training or in inference; a part that runs as it was without a word."""
    model, images = build(name)
    for train in (True, False):
        report = vitfast.patch(model.train(train)).require(*KINDS, "patch_embed")
        assert not report.left
        parts = {part.name for part in report.fused}
        assert parts == {
            "conv_proj", *(f"encoder.layers.encoder_layer_{i}.{part}" for i in (0, 1) for part in
                           ("self_attention", "ln_1", "mlp", "ln_2"))
        }  # fmt: skip
        assert ops_of_blocks(model, images) == OPS * 2
    vitfast.unpatch(model)
    assert not ops_in(model, images)


@every_model
def test_unpatched_model_is_another_one(name):
    """A bit of a weight, of an output or of a gradient that a patch leaves behind, or an attribute."""
    model, images = build(name, **DROPS)
    before, results = state_of(model), run(model, images)
    vitfast.patch(model)
    equal(model.state_dict(), before[0])
    assert [name for name, *_ in state_of(model)[1]] == [name for name, *_ in before[1]]
    assert relative(run(model, images)[0], results[0].double()) < 2
    vitfast.unpatch(model)
    equal(state_of(model), before)
    equal(run(model, images), results)


@pytest.mark.parametrize("drops", [DROPS, {"dropout": 0.3}, {"attention_dropout": 0.3}], ids=str)
def test_other_numbers_are_dropped(drops, masks_in_order):
    """A dropout in another place, with another rate, left out, or one that draws before another one."""
    model, images = build(massive=False, **drops)
    patched = patched_copy(model)
    assert "linear" in ops_in(patched, images)
    (out, grads), (expected, expected_grads) = run(patched, images), run(model, images)
    near(out, expected)
    for at, ref in expected_grads.items():
        assert relative(grads[at], ref.double()) < 1e-3, at
    near(patched.eval()(images), model.eval()(images))


@pytest.mark.parametrize("where", ["dropout", "self_attention", "mlp.2", "mlp.4"])
def test_dropout_that_somebody_sets_is_not_drawn(where, masks_in_order):
    """The mode of one module, not of the block: as `model.eval()` with dropouts left on does it."""
    model, images = build(**DROPS)
    for block in blocks_of(model.eval()):
        block.get_submodule(where).train()
    expected = run(model, images)[0]
    near(run(patched_copy(model), images)[0], expected)
    assert relative(expected, model.eval()(images).double()) > 1e-2


def test_training_drifts_from_torchvisions():
    """Gradients that are slightly wrong in one direction, or that reach other parameters."""
    level_after_three_steps(*build(batch=8, massive=False))


def test_copy_or_saved_model_is_not_patched_or_runs_the_weights_of_the_original():
    model, images = build(train=False)
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
        model = VisionTransformer(**SIZES).eval()
    vitfast.patch(model).require(*KINDS)
    model.to_empty(device="cpu").load_state_dict(stock.state_dict())
    assert ops_in(model, images).count("mlp") == 2
    near(model(images), stock(images))


# the first block and what is in it -> the ops of that block where it has a hook
HOOKED = {
    "": OPS, "ln_1": OPS, "ln_2": [*OPS[:3], "linear", "linear"],
    **dict.fromkeys(("self_attention", "self_attention.out_proj", "dropout"), ["layer_norm", "mlp"]),
    **dict.fromkeys(("mlp", *(f"mlp.{i}" for i in range(5))), [*OPS[:3], "layer_norm"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
@pytest.mark.parametrize("part", HOOKED)
def test_hook_is_passed_over_or_run_twice_or_unfuses_the_other_half(part, kind):
    model, images = build()
    patched = patched_copy(model)
    counters = [Counter(m.encoder.layers[0].get_submodule(part), kind) for m in (model, patched)]
    (out, grads), (expected, expected_grads) = run(patched, images), run(model, images)
    near(out, expected)
    assert all(relative(grads[at], ref.double()) < 1e-3 for at, ref in expected_grads.items())
    assert counters[0].calls == counters[1].calls == (part != "self_attention.out_proj")
    assert ops_of_blocks(patched, images) == HOOKED[part] + OPS
    for counter in counters:
        counter.handle.remove()
    assert ops_of_blocks(patched, images) == OPS * 2


@pytest.mark.parametrize("target", ["mlp.0", "mlp.3", "self_attention"])
def test_adapter_is_ignored(target):
    """An op that reads the weight below a LoRA layer; an adapter that is taken off again and costs the op for good."""
    model, images = build(train=False)
    found = []
    for each in (model, patched_copy(model)):
        torch.manual_seed(0)
        config = peft.LoraConfig(init_lora_weights=False, target_modules=[target])
        each.adapted = peft.get_peft_model(each, config).eval()
        found.append(run(each.adapted, images)[0])
    near(*found)
    assert relative(found[0], model.adapted.get_base_model()(images).double()) < 1e-6
    with model.adapted.disable_adapter():
        assert relative(found[0], model(images).double()) > 1e-2


def test_graph_breaks_in_a_compiled_block():
    model, images = build()
    x, cotangent = torch.randn(2, 3, 17, 64)
    block = model.encoder.layers[0]
    compiled = torch.compile(patched_copy(block), fullgraph=True, backend="aot_eager")
    (out, grads), (expected, expected_grads) = run(compiled, x, cotangent), run(block, x, cotangent)
    near(out, expected)
    for found, ref in zip(grads.values(), expected_grads.values(), strict=True):
        assert relative(found, ref.double()) < 1e-4


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_features_of_a_tracer_are_other_ones(train):
    """torch.fx runs forwards on stand-ins for tensors, of which ops know nothing."""
    model, images = build(train=train)
    patched = patched_copy(model)
    assert get_graph_node_names(patched) == get_graph_node_names(model)
    nodes = ["encoder.layers.encoder_layer_0.add", "encoder.layers.encoder_layer_1.mlp", "encoder.ln"]
    extractors = [create_feature_extractor(each, nodes) for each in (model, patched)]
    found, expected = (extractor(images) for extractor in reversed(extractors))
    assert list(found) == nodes
    for node in nodes:
        near(found[node], expected[node])
    # the graph has no block any more
    assert vitfast.patch(extractors[1]).left


def test_checkpoint_of_another_size_or_age_does_not_load():
    """interpolate_embeddings on a patched model's weights; keys that torchvision renamed."""
    model, _ = build(train=False)
    state = interpolate_embeddings(48, 8, patched_copy(model).state_dict())
    larger = VisionTransformer(**SIZES | {"image_size": 48}).eval()
    stock = copy.deepcopy(larger)
    vitfast.patch(larger).require(*KINDS)
    old = {}
    for name, tensor in state.items():
        old[name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2.")] = tensor
    assert old.keys() != state.keys()
    for each in (larger, stock):
        each.load_state_dict(old)
    equal(larger.state_dict(), stock.state_dict())
    images = torch.randn(2, 3, 48, 48)
    near(larger(images), stock(images))


@pytest.mark.parametrize("shape", [(17, 64), (2, 3, 17, 64)], ids=str)
def test_error_of_torchvision_is_another_one(shape):
    model, _ = build()
    vitfast.patch(model)
    with pytest.raises(AssertionError, match=r"Expected \(batch_size, seq_length, hidden_dim\) got"):
        model.encoder.layers[0](torch.randn(shape))
    with pytest.raises(AssertionError, match="Wrong image height! Expected 32 but got 24!"):
        model(torch.randn(1, 3, 24, 32))


class OwnBlock(EncoderBlock):
    def forward(self, input):
        return 2 * super().forward(input)


def _attention(**how):
    def put(block):
        block.self_attention = nn.MultiheadAttention(64, 2, **{"batch_first": True} | how)

    return put


OTHERS = {
    "batch_first": (_attention(batch_first=False), "self_attention has batch_first off"),
    "bias_k": (_attention(add_bias_kv=True), "self_attention has projections of its own"),
    "add_zero_attn": (_attention(add_zero_attn=True), "self_attention has projections of its own"),
    "longer": (lambda block: block.mlp.append(nn.Tanh()), "mlp has 6 modules, not 5"),
    "shorter": (lambda block: block.mlp.pop(4), "mlp has 4 modules, not 5; mlp.4 is not there"),
    "activation": (lambda block: block.mlp.__setitem__(1, nn.ReLU()), "mlp.1 is torch.nn.modules.activation.ReLU"),
    "dropout": (lambda block: setattr(block, "dropout", nn.AlphaDropout(0.1)), "dropout is .*AlphaDropout"),
    "norm": (lambda block: setattr(block, "ln_1", nn.BatchNorm1d(17)), "ln_1 is .*BatchNorm1d"),
    "parametrized": (lambda block: nn.utils.parametrizations.weight_norm(block.mlp[0]), "mlp.0 is parametrized"),
    "half of a packed projection": (
        lambda block: nn.utils.parametrizations.weight_norm(block.self_attention, "in_proj_weight"),
        "self_attention is parametrized",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_module_that_was_put_there_is_fused_or_not_named(what, masks_in_order):
    """Attention that is not what an op computes, read as if it were."""
    put, reason = OTHERS[what]
    model, images = build(**DROPS)
    torch.manual_seed(2)
    put(model.encoder.layers[0])
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.05)
    patched = copy.deepcopy(model)
    report = vitfast.patch(patched)
    assert re.search(reason, "; ".join(part.reason for part in report.left)), report
    near(run(patched, images)[0], run(model, images)[0])


def test_block_with_a_forward_of_its_own_is_patched():
    model, images = build(train=False)
    block = model.encoder.layers[0]
    block.__class__ = OwnBlock
    patched = patched_copy(model)
    near(patched(images), model(images))
    report = vitfast.patch(patched)
    assert [part.name for part in report.left] == ["encoder.layers.encoder_layer_0"]
    assert "OwnBlock, which vitfast does not know" in report.left[0].reason


@pytest.mark.parametrize("kind", [EncoderBlock, nn.MultiheadAttention, nn.Sequential], ids=lambda kind: kind.__name__)
def test_class_that_somebody_patches_later_runs_as_before(kind, monkeypatch):
    model, images = build(train=False)
    patched = patched_copy(model)
    own, calls = kind.forward, []

    def watched(self, *args, **kwargs):
        calls.append(self)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", watched)
    counts = []
    for each in (model, patched):
        calls.clear()
        each(images)
        counts.append(len(calls))
    assert counts[0] == counts[1]
    assert FORWARDS[kind] is own


def test_stem_of_several_convolutions_is_taken_for_one():
    stem = [ConvStemConfig(8, 3, 4), ConvStemConfig(16, 3, 2)]
    model = VisionTransformer(**SIZES | {"conv_stem_configs": stem}).eval()
    images = torch.randn(2, 3, 32, 32)
    patched = copy.deepcopy(model)
    report = vitfast.patch(patched).require(*KINDS)
    assert [part.name for part in report.left] == ["conv_proj"]
    near(patched(images), model(images))
