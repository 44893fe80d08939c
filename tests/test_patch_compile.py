"""Patched models in torch.compile: graphs of ops, as few as before, and never one of another state of the model."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from patched_families import (
    DRAWS,
    FAMILIES,
    Ops,
    Runs,
    blocks_of,
    build,
    every_family,
    exact,
    images,
    level,
    one_family,
    step,
    the_same,
)  # fmt: skip
from test_compile import forget_compiled_code as forget_compiled_code
from test_compile import needs_compiler
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import vitfast


def compiled_model(model, backend):
    return torch.compile(model, backend=backend, fullgraph=True)


def compiles_itself(model, backend):
    model.compile(backend=backend, fullgraph=True)
    return model


def block_compiles_itself(model, backend, family="timm"):
    for block in blocks_of(family, model):
        block.compile(backend=backend, fullgraph=True)
    return model


def compiled_blocks(model, backend, family="timm"):
    blocks = blocks_of(family, model)
    for i, block in enumerate(blocks):
        blocks[i] = torch.compile(block, backend=backend, fullgraph=True)
    return model


WAYS = {
    "torch.compile(model)": compiled_model,
    "model.compile()": compiles_itself,
    "block.compile()": block_compiles_itself,
    "torch.compile(block)": compiled_blocks,
}
# the others differ in nothing that Dynamo sees
every_way = pytest.mark.parametrize("way", [
    pytest.param(way, marks=[pytest.mark.full] * ("(model)" not in way and way != "block.compile()")) for way in WAYS
])  # fmt: skip


@every_family
@pytest.mark.parametrize("rates", [{}, DRAWS], ids=["calm", "draws"])
def test_compiled_block_breaks_or_computes_something_else(family, rates):
    """A graph break, a mask that is drawn otherwise, a gradient that is lost: in fp64, where rounding hides nothing."""
    block = blocks_of(family, exact(build(family, **rates)))[-1]
    tokens = torch.randn(3, 5, 64, dtype=torch.float64, requires_grad=True)
    if rates and family == "torchvision":
        # its dropouts see transposed tensors, so that ops draw other masks
        vitfast.patch(block)
    expected = step(block, block, tokens)
    grad, tokens.grad = tokens.grad, None
    vitfast.patch(block)
    runs = Runs("aot_eager")
    found, ran = runs.during(lambda: step(torch.compile(block, backend=runs, fullgraph=True), block, tokens))
    the_same(found, expected)
    torch.testing.assert_close(tokens.grad, grad)
    if not rates:
        assert ran == list(FAMILIES[family].ops * (2 if family == "vit_pytorch" else 1) + FAMILIES[family].last)
    assert "linear" in ran


@one_family
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_model_is_less_exact_than_unpatched(family, dtype):
    """Output and gradients with stochastic depth, under autocast too."""
    # Dinov2's draws in the dtype of its tokens, and so otherwise in fp64
    model = build(family, drop_path=0.0 if family == "Hugging Face" else 0.2)
    double = exact(model)
    ref = step(double, double, images().double())
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        low = step(torch.compile(model, backend="aot_eager"), model, images())
        vitfast.patch(model)
        runs = Runs("aot_eager")
        call = torch.compile(model, backend=runs, fullgraph=True)
        found, ran = runs.during(lambda: step(call, model, images()))
    # in fp32 the convolution that cuts patches is faster, in training on a CPU
    expected = FAMILIES[family].all_ops(stem=dtype is not None)
    # transformers makes a mask of ones in a compiled model, and with a mask attention runs as its own module
    masked = ("attention", "linear") if family == "Hugging Face" else ()
    assert ran == [op for op in expected if op not in masked]
    level(found, low, ref)


@one_family
def test_graph_of_another_autocast_is_run(family):
    model = build(family).eval()
    vitfast.patch(model)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16, None, torch.bfloat16):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                found, expected = call(images()), model(images())
                # compiled, transformers' attention gets a mask, and rounds otherwise
                exact = family != "Hugging Face"
                assert found.dtype is expected.dtype
                assert torch.equal(found, expected) if exact else torch.allclose(found, expected, rtol=0.02, atol=0.02)


@every_way
def test_graph_of_another_state_of_the_model_is_run(way, family="timm"):
    """Patched, with other parts, and unpatched after it ran compiled; back and forth compiles nothing again."""
    model = build(family).eval()
    expected, runs = model(images()), Runs()
    call = WAYS[way](model, runs)
    fused = FAMILIES[family].all_ops()
    go = lambda: runs.during(lambda: call(images()))  # noqa: E731
    assert torch.equal(go()[0], expected)
    vitfast.patch(call).require("attention", "norm", "mlp")
    found, ran = go()
    assert ran == fused and not torch.equal(found, expected)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    vitfast.patch(call, mlp=False)
    assert go()[1] == ["linear", "attention_qkv", "linear", "layer_norm"] * 2
    vitfast.patch(call, attention=False, norm=False)
    assert go()[1] == ["linear", "linear"] * 2
    number = len(runs.graphs)
    for _ in range(6):
        vitfast.unpatch(call)
        out, ran = go()
        assert torch.equal(out, expected) and not ran
        with vitfast.patched(call):
            out, ran = go()
        assert torch.equal(out, found) and ran == fused
    assert len(runs.graphs) == number, "a state that was compiled before is compiled again"
    assert torch.equal(go()[0], expected)


@every_way
def test_model_that_is_compiled_when_patched_runs_no_ops(way):
    """The other order: patched first, then compiled."""
    model, runs = build().eval(), Runs()
    expected = model(images())
    vitfast.patch(model)
    found, ran = runs.during(lambda: WAYS[way](model, runs)(images()))
    assert ran == FAMILIES["timm"].all_ops()
    assert (found - expected).norm() < 1e-5 * expected.norm()


def wrapped(model, backend):
    """As torchtitan compiles: block by block, each in a wrapper that computes it again in the backward."""
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(checkpoint_wrapper(block), backend=backend, fullgraph=True)
    return model


def by_a_function(model, backend):
    run = torch.compile(lambda block, x: block(x), backend=backend, fullgraph=True)

    def call(x):
        x = model.patch_embed(x).contiguous()
        for block in model.blocks:
            x = run(block, x)
        return x

    return call


@pytest.mark.parametrize("way", [pytest.param(compiled_blocks, marks=pytest.mark.full), wrapped, by_a_function])
def test_each_block_has_a_graph_of_its_own(way):
    """Dynamo's limit is 8 graphs of one function: a model of 12 blocks would fail, or its last ones run uncompiled."""
    for patched in (False, True):
        torch._dynamo.reset()
        model, runs = build(depth=9), Runs("aot_eager")
        if patched:
            vitfast.patch(model)
        _, ran = runs.during(lambda: way(model, runs)(images()))  # noqa: B023
        assert len(runs.graphs) == 1
        assert ran == FAMILIES["timm"].all_ops(9) * patched


@one_family
def test_each_batch_size_compiles_again(family):
    """More often than with the unpatched model, whose second graph serves every batch."""
    numbers = []
    for patched in (False, True):
        model, runs = build(family), Runs("aot_eager")
        if patched:
            vitfast.patch(model)
        call = torch.compile(model, backend=runs, fullgraph=True)
        for batch in (3, 4, 7):
            torch.testing.assert_close(call(images(batch)), model(images(batch)), rtol=1e-5, atol=1e-5)
        numbers.append(len(runs.graphs))
    assert numbers[1] <= numbers[0] <= 2


@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
def test_hook_that_is_put_on_a_compiled_model_is_not_run():
    """By default Dynamo looks at no hooks, of any model; with this setting the patched one runs them too."""
    model = build().eval()
    vitfast.patch(model)
    runs = Runs()
    call = torch.compile(model, backend=runs, fullgraph=True)
    plain = call(images())
    handle = model.blocks[1].mlp.fc1.register_forward_hook(lambda module, args, out: 2 * out)
    hooked, ran = runs.during(lambda: call(images()))
    assert torch.equal(hooked, model(images())) and not torch.equal(hooked, plain)
    assert ran == ["linear", "attention_qkv", "linear", "mlp", "linear", "attention_qkv", "linear", "layer_norm"]
    handle.remove()
    found, ran = runs.during(lambda: call(images()))
    assert torch.equal(found, plain) and ran == FAMILIES["timm"].all_ops()


@needs_compiler
@pytest.mark.slow
@one_family
def test_inductor_reads_what_ops_give_with_other_strides(family):
    model = build(family)
    tokens, block = torch.randn(3, 5, 64).bfloat16().float(), blocks_of(family, model)[-1]
    double = exact(block)
    ref, low = step(double, double, tokens.double()), step(block, block, tokens)
    vitfast.patch(model)
    level(step(torch.compile(block, fullgraph=True), block, tokens), low, ref)


COPIES = {
    "deepcopy": copy.deepcopy,
    "twice": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle, protocol 2": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "to another process": lambda model: pickle.loads(ForkingPickler.dumps(model)),
}


@every_family
@pytest.mark.parametrize("how", COPIES)
def test_copy_is_not_patched_or_runs_the_originals_weights(family, how):
    """A method is looked up by its name in the class where it is pickled: the copy would run the library's."""
    model = build(family).eval()
    vitfast.patch(model)
    expected = model(images())
    other = COPIES[how](model)
    with Ops() as ran:
        out = other(images())
    assert torch.equal(out, expected) and ran.names == FAMILIES[family].all_ops()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not other(images()).any()
    vitfast.unpatch(other)
    names = {name for module in other.modules() for name in vars(module)}
    assert names == {name for module in build(family).modules() for name in vars(module)}
    with Ops() as ran:
        other(images())
    assert not ran.names
