"""What else transformers makes of a patched model: hidden states and attentions, checkpoints, other implementations."""

import copy
import functools
import pickle

import pytest
import torch
from hf_pair import KINDS, build, layers_of, ops_in, pair, run, same_gradients
from patch_pair import near
from test_ops import Recorder
from test_parity_timm import RATIO, products
from torch import distributed as dist
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.vit import modeling_vit

import vitfast
from vitfast.check.acceptance import accept_stages

DROPS = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "drop_path_rate": 0.5}
NAMES = ("ViT", "ViT eager", "DeiT", "DINOv2", "DINOv2 eager", "registers SwiGLU", "registers eager")
OPS = ("attention", "layer_norm", "mlp", "linear")


def counts(model, images, **keywords):
    ran = ops_in(model, images, **keywords)
    return [ran.count(op) for op in OPS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_hidden_states_or_attentions_are_not_what_the_model_computes(name, train):
    """Before, during and after a call that captures: transformers leaves its hooks on layers and attentions."""
    stock, patched, images = pair(name, massive=False, train=train)
    eager, swiglu = "eager" in name, "SwiGLU" in name
    fused = counts(patched, images)
    assert fused[:2] == [2, 2]
    before = patched(images)
    wanted = {"output_hidden_states": True} | ({"output_attentions": True} if eager else {})
    for keywords in (wanted, {}, {"output_hidden_states": True}, {"output_hidden_states": [0, -1]}):
        found, expected = patched(images, **keywords), stock(images, **keywords)
        assert list(found) == list(expected)
        near(found.logits, expected.logits)
        near(before.logits, expected.logits)
        for key in ("hidden_states", "attentions"):
            values, refs = found.get(key), expected.get(key)
            assert (values is None) == (refs is None) and len(values or ()) == len(refs or ())
            for value, ref in zip(values or (), refs or (), strict=True):
                assert (value is None) == (ref is None)
                if ref is not None:
                    near(value, ref)
    # with the hooks that are left: attention is called, and has weights to give where it is eager
    report = vitfast.patch(patched).require("norm", "mlp")
    assert counts(patched, images)[:3] == [0 if eager else 2, 2, fused[2]]
    assert counts(patched, images)[3] == (8 if swiglu else 0 if eager else 2)
    if eager:
        assert {part.kind for part in report.left} == {"attention"} and "weights" in str(report)
    else:
        assert not report.require(*KINDS).left
    (out, grads), (expected, expected_grads) = run(patched, images), run(stock, images)
    near(out, expected)
    same_gradients(grads, expected_grads)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_hidden_state_is_less_exact_than_theirs(name, dtype):
    """With massive activations; what is captured runs attention by itself, and has one rounding less or more."""
    stock, patched, images = pair(name, train=False)
    wanted = {"output_hidden_states": True, "output_attentions": "eager" in name}

    def taps(model, dtype):
        with torch.no_grad(), products(dtype):
            out = model.to(dtype)(images.to(dtype), **wanted)
        values = {f"hidden {i}": t for i, t in enumerate(out.hidden_states)}
        values |= {f"weights {i}": t for i, t in enumerate(out.attentions if wanted["output_attentions"] else ())}
        return values | {"logits": out.logits}

    ref, low = taps(copy.deepcopy(stock), torch.float64), taps(stock, dtype)
    accept_stages(taps(patched, dtype), ref, low, typical=RATIO[dtype])


@pytest.mark.parametrize("name", ["ViT", "ViT eager", "DINOv2 eager"])
def test_outputs_that_the_config_asks_for_are_lost(name):
    """`config.output_hidden_states`, `config.output_attentions`, tuples in the place of a ModelOutput."""
    stock, patched, images = pair(name, massive=False, train=False)
    for model in (stock, patched):
        model.config.output_hidden_states = True
        model.config.output_attentions = "eager" in name
    found, expected = patched(images), stock(images)
    assert list(found) == list(expected) and len(found.hidden_states) == 3
    assert len(found.get("attentions") or ()) == (2 if "eager" in name else 0)
    found, expected = patched(images, return_dict=False), stock(images, return_dict=False)
    assert isinstance(found, tuple) and len(found) == len(expected)
    for ours, theirs in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        near(ours, theirs)


@pytest.mark.parametrize("name", ["ViT", "DINOv2", "ViT eager"])
def test_hook_sees_another_call(name):
    """Arguments by position or keyword, and what a hook gives back in their place."""
    seen = []
    *models, images = pair(name, massive=False)
    for model in models:
        calls = []
        for layer in layers_of(model):
            for module in (layer, layer.attention):
                module.register_forward_pre_hook(
                    lambda module, args, kwargs, calls=calls: calls.append((len(args), sorted(kwargs))),
                    with_kwargs=True,
                )
        model(images, output_hidden_states=True)
        seen.append(calls)
    assert seen[0] == seen[1] and len(seen[0]) == 4


@pytest.mark.parametrize("name", ["ViT", "DINOv2", "ViT eager"])
def test_mask_is_passed_over(name):
    stock, patched, _ = pair(name, massive=False, train=False)
    x, mask = torch.randn(3, 9, 128), torch.zeros(3, 1, 9, 9)
    mask[..., -4:] = float("-inf")
    for ours, theirs in zip(layers_of(patched), layers_of(stock), strict=True):
        near(ours(x, mask), theirs(x, mask))
        near(ours(hidden_states=x, attention_mask=mask), theirs(x, mask))
        assert not torch.allclose(theirs(x, mask), theirs(x), rtol=1e-2)
        near(ours.attention(x, mask)[0], theirs.attention(x, mask)[0])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", ["ViT", "DINOv2", "ViT eager", "registers SwiGLU"])
@pytest.mark.parametrize("captured", [False, True], ids=["", "captured"])
def test_checkpointing_is_lost_or_replays_another_mask(name, reentrant, captured):
    """transformers checkpoints inside the forward of a layer's class, which a patch takes the place of."""
    stock, patched, images = pair(name, massive=False, **DROPS)
    if captured:
        patched(images, output_hidden_states=True)
    expected, ours = run(stock, images), run(patched, images)
    saved, recorded = [], []
    for checkpoints in (False, True):
        if checkpoints:
            patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
        numbers = []
        with Recorder() as recorder, torch.autograd.graph.saved_tensors_hooks(
            lambda t, numbers=numbers: numbers.append(t.numel()) or t, lambda t: t
        ):  # fmt: skip
            found = run(patched, images)
        saved.append(sum(numbers))
        recorded.append([str(func).split(".")[1] for func, *_ in recorder.calls])
        near(found[0], ours[0])
        same_gradients(found[1], ours[1], 1e-5)
        near(found[0], expected[0])
        same_gradients(found[1], expected[1])
    for op in {"layer_norm", "attention", "linear"} & set(recorded[0]):
        assert recorded[1].count(op) == 2 * recorded[0].count(op), op
    # in inference there is nothing to recompute
    patched.eval().requires_grad_(False)
    assert ops_in(patched, images).count("layer_norm") == 2


def test_patch_that_is_taken_back_before_the_backward_recomputes_otherwise():
    stock, patched, images = pair("ViT", massive=False, **DROPS)
    patched.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    loss = patched(images).logits.square().sum()
    vitfast.unpatch(patched)
    loss.backward()
    torch.manual_seed(1)
    stock(images).logits.square().sum().backward()
    grads = lambda model: {name: p.grad for name, p in model.named_parameters() if p.grad is not None}  # noqa: E731
    same_gradients(grads(patched), grads(stock))


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_sharded_layer_is_not_fused_or_not_checkpointed(before, reentrant, one_process):
    """`fully_shard` makes a class of each layer's, in which transformers wraps the forward once more."""
    stock, images = build("ViT", massive=False, hidden_dropout_prob=0.2)
    expected = run(stock, images)
    patched = copy.deepcopy(stock)
    if before:
        vitfast.patch(patched)
    for module in (*layers_of(patched), patched):
        dist.fsdp.fully_shard(module, mesh=dist.init_device_mesh("cpu", (1,)))
    if not before:
        vitfast.patch(patched).require(*KINDS)
    patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with Recorder() as recorder:
        out, grads = run(patched, images)
    near(out, expected[0])
    same_gradients({name: grad.full_tensor() for name, grad in grads.items()}, expected[1])
    ran = [str(func).split(".")[1] for func, *_ in recorder.calls]
    assert ran.count("attention") == 4


def doubled(module, *args, **kwargs):
    out, weights = sdpa_attention_forward(module, *args, **kwargs)
    return 2 * out, weights


@functools.wraps(sdpa_attention_forward)
def wrapped(*args, **kwargs):
    return doubled(*args, **kwargs)


def eager(module, *args, **kwargs):
    return doubled(module, *args, **kwargs)[0], None


SWAPS = {
    "another name": lambda m: m.setitem(AttentionInterface._global_mapping, "mine", doubled),
    "sdpa registered": lambda m: m.setitem(AttentionInterface._global_mapping, "sdpa", doubled),
    "sdpa wrapped": lambda m: m.setitem(AttentionInterface._global_mapping, "sdpa", wrapped),
    "eager registered": lambda m: m.setitem(AttentionInterface._global_mapping, "eager", eager),
    "eager replaced": lambda m: m.setattr(modeling_vit, "eager_attention_forward", eager),
}


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("captured", [False, True], ids=["", "captured"])
def test_attention_function_of_somebody_is_passed_over(swap, captured, monkeypatch):
    stock, patched, images = pair("ViT", massive=False, train=False)
    before = stock(images).logits
    if captured:
        patched(images, output_hidden_states=True)
    SWAPS[swap](monkeypatch)
    name = {"another name": "mine"}.get(swap, swap.split(" ")[0])
    for model in (stock, patched):
        model.set_attn_implementation(name)
    near(patched(images).logits, stock(images).logits)
    assert (before - stock(images).logits).norm() > 0.01 * before.norm()
    left = [part for part in vitfast.patch(patched).left if part.kind == "attention"]
    assert len(left) == 2 and (name in left[0].reason or (captured and "has forward hooks" in left[0].reason))


def test_implementation_is_another_one_than_the_model_was_told(monkeypatch):
    """`set_attn_implementation` after a patch."""
    stock, patched, images = pair("ViT", massive=False, train=False)
    monkeypatch.setitem(AttentionInterface._global_mapping, "mine", doubled)
    for name in ("eager", "mine", "sdpa"):
        for model in (stock, patched):
            model.set_attn_implementation(name)
        near(patched(images).logits, stock(images).logits)
        assert ops_in(patched, images).count("attention") == (0 if name == "mine" else 2)
        left = vitfast.patch(patched).left
        assert bool(left) == (name == "mine") and (not left or "'mine'" in left[0].reason)


def test_attention_that_is_called_alone_gives_something_else():
    """The weights of eager attention, None of SDPA; keywords that change what SDPA computes."""
    for name in ("ViT", "DINOv2", "ViT eager", "DINOv2 eager"):
        stock, patched, _ = pair(name, massive=False, train=False)
        ours, theirs = layers_of(patched)[0].attention, layers_of(stock)[0].attention
        x = torch.randn(2, 9, 128)
        for keywords in ({}, {"is_causal": True}, {"position_bias": torch.randn(1, 2, 9, 9)}, {"is_causal": False}):
            (out, weights), (expected, expected_weights) = ours(x, **keywords), theirs(x, **keywords)
            near(out, expected)
            assert (weights is None) == (expected_weights is None)
            if weights is not None:
                near(weights, expected_weights)
            near(layers_of(patched)[0](x, **keywords), layers_of(stock)[0](x, **keywords))


def test_copies_of_a_patched_model_are_others():
    for name in ("ViT", "ViT gelu_python", "ViT gelu_pytorch_tanh", "registers SwiGLU"):
        stock, patched, images = pair(name, massive=False, train=False)
        for copied in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
            assert not vitfast.patch(copied).left
            counted = counts(copied, images)
            assert counted == counts(patched, images)
            with torch.no_grad():
                copied.classifier.weight.zero_()
                layers_of(copied)[0].attention.q_proj.weight.zero_()
            near(patched(images).logits, stock(images).logits)
