"""Patched models in exporters, tracers and transforms: stock operators, or what the unpatched model computes."""

import copy
import functools
import subprocess
import sys
import warnings

import onnxruntime
import pytest
import torch
from patched_families import (
    FAMILIES,
    Ops,
    Runs,
    blocks_of,
    build,
    every_family,
    exact,
    images,
    one_family,
    ops_of,
)  # fmt: skip
from test_compile import forget_compiled_code as forget_compiled_code
from test_compile import needs_compiler
from test_export import ELSEWHERE
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vitfast


def exported(model, strict=False):
    return torch.export.export(model, (images(),), strict=strict, dynamic_shapes=({0: torch.export.Dim("batch")},))


def operators(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


EXPORTERS = {
    "export": exported,
    "strict export": functools.partial(exported, strict=True),
    "draft_export": lambda model: torch.export.draft_export(model, (images(),)),
}


@every_family
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("how", EXPORTERS)
def test_exported_program_holds_ops_or_differs_from_unpatched(family, training, how):
    model = build(family, drop_path=0.2).train(training)
    other = copy.deepcopy(model)
    vitfast.patch(other)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        program = EXPORTERS[how](other)
    assert not any("vitfast" in str(each.message) for each in told)
    plain = EXPORTERS[how](model)
    assert operators(program.graph) == operators(plain.graph)
    assert program.state_dict.keys() == plain.state_dict.keys()
    if not training:
        assert torch.equal(program.module()(images()), model(images()))
    with Ops() as ran:
        other(images())
    assert ran.names == FAMILIES[family].all_ops(), "the export has left something behind"


@one_family
@pytest.mark.slow
def test_exported_files_need_vitfast(family, tmp_path):
    """In a process where it cannot be imported; an ONNX file in onnxruntime."""
    model = build(family).eval()
    with torch.no_grad():
        torch.save((images(), model(images())), tmp_path / "numbers.pt")
    vitfast.patch(model)
    torch.export.save(exported(model, strict=True), tmp_path / "program.pt2")
    command = [sys.executable, "-I", "-c", ELSEWHERE, "program", tmp_path / "program.pt2", tmp_path / "numbers.pt"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.stdout == "right\n", result.stderr


@one_family
@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [pytest.param(True, marks=pytest.mark.full), False], ids=["dynamo", "TorchScript"])
def test_onnx_file_has_ops_or_computes_something_else(family, dynamo, tmp_path):
    model = build(family).eval()
    expected = model(images()).detach()
    vitfast.patch(model)
    torch.onnx.export(model, (images(),), tmp_path / "vit.onnx", dynamo=dynamo, input_names=["x"], verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "vit.onnx", providers=["CPUExecutionProvider"])
    out = torch.from_numpy(session.run(None, {"x": images().numpy()})[0])
    assert (out - expected).norm() < 1e-4 * expected.norm()


@needs_compiler
@pytest.mark.slow
@pytest.mark.full
@one_family
def test_package_of_aot_inductor_needs_vitfast(family, tmp_path):
    model = build(family).eval()
    with torch.no_grad():
        torch.save((images(), model(images())), tmp_path / "numbers.pt")
    vitfast.patch(model)
    package = torch._inductor.aoti_compile_and_package(exported(model), package_path=str(tmp_path / "package.pt2"))
    command = [sys.executable, "-I", "-c", ELSEWHERE, "package", package, tmp_path / "numbers.pt"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.stdout == "right\n", result.stderr


@every_family
def test_torchscript_trace_holds_ops(family):
    model = build(family).eval()
    expected = model(images())
    vitfast.patch(model)
    # the check fails for torchvision's models, patched or not
    traced = torch.jit.trace(model, images(2), check_trace=False)
    assert "vitfast::" not in str(traced.inlined_graph)
    assert torch.equal(traced(images()), expected)


def test_script_fails_somewhere_inside():
    """timm's models can be scripted; after unpatch this one can again, and nothing of it was replaced."""
    model = build().eval()
    vitfast.patch(model)
    modules = list(model.modules())
    for part in (model, model.blocks[0], copy.deepcopy(model)):
        with pytest.raises(NotImplementedError, match=r"torch\.jit\.script.*vitfast\.unpatch"):
            torch.jit.script(part)
    vitfast.unpatch(model)
    assert torch.equal(torch.jit.script(model)(images()), model(images()))
    assert all(one is other for one, other in zip(modules, model.modules(), strict=True))


# the others' blocks cannot be traced, patched or not
@pytest.mark.parametrize("family", ["timm", "torchvision"])
def test_symbolic_trace_is_another_one(family):
    block = blocks_of(family, build(family))[0]
    plain = torch.fx.symbolic_trace(block)
    vitfast.patch(block)
    assert torch.fx.symbolic_trace(block).code == plain.code


@one_family
def test_switch_leaves_ops_or_is_not_explained(family):
    model = build(family).eval()
    expected = model(images())
    vitfast.patch(model)
    vitfast.set_exportable(True)
    try:
        with Ops() as ran:
            out = model(images())
        assert all(row.path == "its modules' own forward" for row in vitfast.explain(model).rows)
        graph = Runs()
        torch.compile(model, backend=graph, fullgraph=True)(images())
    finally:
        vitfast.set_exportable(False)
    assert torch.equal(out, expected) and not ran.names and not ops_of(graph.graphs[0])
    assert any(row.path.startswith("op ") for row in vitfast.explain(model).rows)


@one_family
def test_counted_flops_change(family):
    counts = []
    model = build(family)
    for patched in (False, True):
        if patched:
            vitfast.patch(model)
        with FlopCounterMode(display=False) as counter:
            model(images()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@every_family
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_fails_or_computes_something_else(family, mode):
    """Of a block's function of its weights, forward and backward."""
    block = blocks_of(family, exact(build(family)))[0]
    weights = {name: p.detach() for name, p in block.named_parameters()}
    tokens = torch.randn(3, 5, 64, dtype=torch.float64)

    def run(weights, tokens):
        weights = {name: p.requires_grad_() for name, p in weights.items()}
        out = functional_call(block, weights, (tokens,))
        return torch.autograd.grad(out.square().sum(), list(weights.values()))

    expected = run(weights, tokens)
    vitfast.patch(block)
    for found, grad_of in zip(make_fx(run, tracing_mode=mode)(weights, tokens)(weights, tokens), expected, strict=True):
        torch.testing.assert_close(found, grad_of)


def along(loss, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def twice(loss, x):
    (first,) = torch.autograd.grad(loss(x.requires_grad_()), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


TRANSFORMS = {
    "grad": lambda loss, x: grad(loss)(x),
    "vmap": lambda loss, x: vmap(lambda one: loss(one[None]))(x),
    "vmap of grad": lambda loss, x: vmap(grad(lambda one: loss(one[None])))(x),
    "jvp": lambda loss, x: jvp(loss, (x,), (torch.ones_like(x),))[1],
    "jvp of grad": lambda loss, x: jvp(grad(loss), (x,), (torch.ones_like(x),))[1],
    "grad of grad": lambda loss, x: grad(lambda x: grad(loss)(x).square().sum())(x),
    "forward mode": along,
    "double backward": twice,
}


@one_family
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform_fails_or_computes_something_else(family, transform):
    block = blocks_of(family, exact(build(family)))[0]
    tokens = torch.randn(3, 5, 64, dtype=torch.float64)
    results = []
    for patched in (False, True):
        if patched:
            vitfast.patch(block)
        # torch's other operators have no second and no forward derivative
        with sdpa_kernel(SDPBackend.MATH):
            results.append(TRANSFORMS[transform](lambda x: block(x).square().sum(), tokens.clone()).detach())
    torch.testing.assert_close(results[1], results[0])
