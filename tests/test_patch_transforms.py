"""Patched models where PyTorch transforms what they do: torch.compile, torch.func, derivatives of derivatives."""

import pytest
import torch
from patch_pair import equal, near, patched_copy, small
from test_create import ops_called
from timm_pair import run
from torch import nn

import vitfast

KINDS = ("attention", "norm", "mlp")


def small_without_sdpa(**keywords):
    """PyTorch has no forward mode and no second derivative of its own on CPUs."""
    model, images = small(**keywords)
    for block in model.blocks:
        block.attn.fused_attn = False
    return model, images


def test_functional_calls_take_other_weights():
    """`torch.func`: weights that are given, derivatives, batches of models and of images."""
    model, images = small_without_sdpa()
    patched = patched_copy(model)
    names = dict(model.named_parameters())
    weights = {name: (1.1 * p).detach() for name, p in names.items()}
    results = []
    for each in (model, patched):
        call = lambda w, x, each=each: torch.func.functional_call(each, w, (x,))  # noqa: E731
        given = {name: w.clone().requires_grad_() for name, w in weights.items()}
        out = call(given, images)
        loss = lambda w, call=call: call(w, images).square().mean()  # noqa: E731
        single = torch.func.vmap(lambda x, call=call: call(weights, x[None])[0])(images)
        many = torch.func.vmap(call, in_dims=(0, None))(
            {n: torch.stack([w, 2 * w]) for n, w in weights.items()}, images
        )
        derivative = torch.func.grad(loss)(weights)
        tangent = torch.func.jvp(loss, (weights,), (names,))[1]
        by_backward = torch.autograd.grad(out.sum(), list(given.values()))
        results.append([out.detach(), single, many, tangent, *derivative.values(), *by_backward])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-6
    assert (results[1][0] - patched(images)).norm() > 1e-3


def test_second_derivative_is_another_one():
    model, images = small_without_sdpa(train=True)
    results = []
    for each in (model, patched_copy(model)):
        x = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
        results.append([slope.detach(), *torch.autograd.grad(slope.square().sum(), list(each.blocks.parameters()))])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-3 * expected.norm() + 1e-6


@pytest.mark.parametrize("way", ["hooks of saved tensors", "offload"])
def test_saved_tensors_are_not_seen(way):
    """`save_on_cpu` and other hooks get all that an op saves, once."""
    model, images = small(train=True)
    expected = run(patched_copy(model), images)
    vitfast.patch(model)
    if way == "offload":
        hooks = torch.autograd.graph.save_on_cpu()
    else:
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)
    with hooks:
        found = run(model, images)
    equal(found, expected)


@pytest.mark.parametrize("patch_first", [True, False])
def test_compiled_model_is_what_it_was_before(patch_first):
    """A graph that is kept though the model was patched, or unpatched, since."""
    model, images = small()
    expected = model(images)
    torch._dynamo.reset()
    if patch_first:
        vitfast.patch(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    near(compiled(images), expected)
    for wanted in (True, False, True):
        if wanted:
            vitfast.patch(compiled).require(*KINDS)
            near(compiled(images), expected)
        else:
            vitfast.unpatch(compiled)
            equal(compiled(images), expected)
        assert bool(ops_called(lambda: compiled(images))[1]) == wanted
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["instance", "class", "child"])
def test_compiled_model_runs_a_forward_that_was_replaced(kind, monkeypatch):
    """A graph that is kept though a module in it has another forward since: without a patch it is not."""
    model, images = small()
    torch._dynamo.reset()
    vitfast.patch(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(images)
    linear = model.blocks[1].mlp.fc2
    if kind == "instance":
        linear.forward = lambda x: 2 * nn.Linear.forward(linear, x)
    elif kind == "class":
        mlp, forward = type(model.blocks[0].mlp), type(model.blocks[0].mlp).forward
        monkeypatch.setattr(mlp, "forward", lambda self, x: 2 * forward(self, x))
    else:
        model.blocks[1].mlp.fc2 = nn.Linear(linear.in_features, linear.out_features)
    near(compiled(images), model(images))
    torch._dynamo.reset()


def test_exported_model_has_ops_or_other_bits():
    """What exporters and tracers get is the library's own forward, of a model that was called before."""
    model, images = small()
    with torch.no_grad():
        expected = model(images)
        vitfast.patch(model)
        near(model(images), expected)
        vitfast.set_exportable(True)
        try:
            equal(model(images), expected)
        finally:
            vitfast.set_exportable(False)
        program = torch.export.export(model, (images,))
        assert not [node for node in program.graph.nodes if "vitfast" in str(node.target)]
        equal(program.module()(images), expected)
        traced = torch.jit.trace(model, images)
        assert "vitfast" not in str(traced.inlined_graph).replace("vitfast/", "")
        equal(traced(images), expected)
