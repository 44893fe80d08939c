"""What torch's tracers see of ops and models: opcheck, shape functions, torch.compile, torch.export."""

import io
import shutil
import sys

import pytest
import torch
from test_ops import LAYOUTS, Recorder, cotangents_of, op_of, outs_of, run
from test_reference import build, every_variant
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache
from torch._subclasses import FakeTensorMode

import vitfast
from vitfast.ops import _attention_stock as stock

# `vitfast.ops.attention` is the function
attention_module = sys.modules["vitfast.ops.attention"]
NO_COMPILER = not any(map(shutil.which, ("g++", "clang++", "c++")))


def recorded_calls(variant, layout):
    """(op, args) of vitfast's own ops in a forward and backward with tensors of this layout."""
    tensors = build(variant, (2, 6, 8))
    view = lambda t: LAYOUTS[layout](t) if layout != "contiguous" and t.dim() > 2 else t  # noqa: E731
    cotangents = [view(c) for c in cotangents_of(outs_of(op_of(variant)(**tensors)))]
    with Recorder() as recorder:
        run(op_of(variant), {name: view(t) for name, t in tensors.items()}, cotangents)
    assert {"backward" in str(func) for func, *_ in recorder.calls} == {True, False}
    return [(func, args) for func, args, _ in recorder.calls]


@every_variant
@pytest.mark.parametrize("layout", ["contiguous", "last dim outermost", "slice of packed"])
def test_opcheck_rejects_an_op(variant, layout):
    """Schema, shape function, autograd registration or tracing that tell another story than the op."""
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    for func, args in recorded_calls(variant, layout):
        forward = "backward" not in str(func)
        leaf = lambda t: t.detach().requires_grad_(forward and t.is_floating_point())  # noqa: E731,B023
        args = tuple(leaf(t) if isinstance(t, torch.Tensor) else t for t in args)
        torch.library.opcheck(func, args, test_utils=tests if forward and layout == "contiguous" else tests[:2])


@every_variant
@pytest.mark.parametrize("layout", ["contiguous", "last dim outermost", "slice of packed"])
def test_fake_tensors_have_other_strides(variant, layout):
    """Compiled code that reads a result with the strides of the shape function, where opcheck doesn't look."""
    for func, args in recorded_calls(variant, layout):
        with FakeTensorMode() as mode:
            fakes = func(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args))
        for i, (real, fake) in enumerate(zip(outs_of(func(*args)), outs_of(fakes), strict=True)):
            seen = [t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in (real, fake)]
            assert seen[0] == seen[1], f"output {i} of {func}: real {seen[0]}, fake {seen[1]}"


@every_variant
def test_exportable_mode_runs_ops_or_changes_results(variant):
    """An exporter that meets an op it doesn't know; a stock twin that computes something else."""
    tensors = build(variant, dtype=torch.float64)
    expected = run(op_of(variant), tensors)
    vitfast.set_exportable(True)
    try:
        with Recorder() as recorder:
            got = run(op_of(variant), tensors)
    finally:
        vitfast.set_exportable(False)
    assert not recorder.calls
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("D", [64, 72, 20])
@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_cuda_implementation_differs_from_the_shape_function(monkeypatch, dtype, D, backend):
    """Wrong arguments or layouts of the CUDA kernels, seen without a GPU: and the formula where they can't."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(stock, "cudnn_sdp_enabled", lambda: True)
    monkeypatch.setattr(stock, "_cudnn_agrees", lambda *key: True)
    with FakeTensorMode():
        q, kv = (torch.empty(2, n, parts, 3, D, device="cuda", dtype=dtype) for n, parts in ((5, 1), (9, 2)))
        q, k, v = q[:, :, 0], *kv.unbind(2)
        found = stock.attention_cuda(q, k, v, 0.3, backend=backend)
        found += stock.attention_backward_cuda(found[0], q, k, v, *found, 0.3, backend=backend)
        expected = attention_module._attention_fake(q, k, v, 0.3)
        expected += attention_module._attention_backward_fake(found[0], q, k, v, *expected, 0.3)
        described = [[(t.shape, t.stride(), t.dtype, t.device) for t in ts] for ts in (found, expected)]
    assert described[0] == described[1]


def test_flash_attention_gets_rows_that_do_not_begin_at_16_bytes():
    """A view by one number, rows with gaps: torch 2.11 hands the addresses on, and the kernel's loads fault."""
    with FakeTensorMode():
        packed = torch.empty(2, 5, 3, 3, 64, dtype=torch.bfloat16, device="cuda")
        shifted = torch.empty(packed.numel() + 1, dtype=torch.bfloat16, device="cuda")[1:].view(packed.shape)
        gaps = torch.empty(2, 5, 3, 3, 67, dtype=torch.bfloat16, device="cuda")[..., :64]
        columns = torch.empty(2, 5, 64, 3, dtype=torch.bfloat16, device="cuda").transpose(-1, -2)
        as_it_is = stock._rows_of_heads(packed[:, :, 1])
        assert as_it_is.stride() == packed[:, :, 1].transpose(1, 2).stride()
        for t in (shifted[:, :, 1], gaps[:, :, 0], columns):
            rows = stock._rows_of_heads(t)
            assert rows.shape == t.transpose(1, 2).shape and rows.stride(-1) == 1
            assert not any(n * 2 % 16 for n in (rows.storage_offset(), *rows.stride()[:-1]))


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def timm_model(depth=2, **options):
    torch.manual_seed(0)
    model = vitfast.create_model("vit_tiny_patch16_224", depth=depth, img_size=32, num_classes=10, **options)
    # at its initialisation the class token sees next to nothing of the image
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return model


def vit_pytorch_model(**options):
    torch.manual_seed(0)
    return vitfast.ViT(
        image_size=32, patch_size=16, num_classes=10, dim=48, depth=2, heads=2, mlp_dim=96, dim_head=24, **options
    )


MODELS = {
    "timm": timm_model,
    "timm, registers, LayerScale, mean pooling": lambda: timm_model(
        reg_tokens=2, init_values=0.5, global_pool="avg", class_token=True
    ),
    "timm, dropout, drop path": lambda: timm_model(
        drop_rate=0.1, pos_drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.5
    ),
    "vit-pytorch": vit_pytorch_model,
    "vit-pytorch, mean pooling, dropout": lambda: vit_pytorch_model(pool="mean", dropout=0.1, emb_dropout=0.1),
}


def images(batch=3):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def training_step(model, call, x):
    """Loss and gradients of one step, from a fixed random state."""
    torch.manual_seed(7)
    loss = call(x).float().square().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return {"loss": loss.detach()} | dict(zip(dict(model.named_parameters()), grads, strict=True))


@pytest.mark.parametrize(
    # the others have all that these two have
    "name",
    [pytest.param(name, marks=[pytest.mark.full] * (name in ("timm", "vit-pytorch"))) for name in MODELS],
)
def test_compiled_model_breaks_or_computes_something_else(name):
    """A graph break in forward or backward; a gradient, mask or dropout that tracing loses."""
    model = MODELS[name]()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(training_step(model, compiled, images()), training_step(model, model, images()))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), model(images()))


needs_compiler = pytest.mark.skipif(NO_COMPILER, reason="inductor needs a C++ compiler, and there is none here")


@needs_compiler
@pytest.mark.slow
def test_inductor_reads_results_with_other_strides():
    """Generated code that trusts a shape function; decompositions of the operators between the ops."""
    model = timm_model(depth=1)
    compiled = torch.compile(model, fullgraph=True)
    got, expected = (training_step(model, call, images()) for call in (compiled, model))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.slow
def test_compile_cache_returns_code_of_another_autocast_dtype():
    """bf16, fp16, and bf16 from the cache on disk, in one process."""
    model = timm_model(depth=1).eval()
    with fresh_cache(), torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
            torch._dynamo.reset()
            with torch.autocast("cpu", dtype):
                got, eager = torch.compile(model, fullgraph=True)(images()), model(images())
            assert got.dtype == eager.dtype == dtype
            torch.testing.assert_close(got, eager, rtol=0.02, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("build_model", "training"),
    [pytest.param(timm_model, False, marks=pytest.mark.full), (timm_model, True), (vit_pytorch_model, True)],
)
def test_each_batch_size_compiles_again(build_model, training):
    """A batch size burnt into the graph by a check or a reshape."""
    model = build_model().train(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (3, 4, 7):
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(compiled(images(batch)), model(images(batch)))
    # the first size, then any size
    assert counter.frame_count == 2


@pytest.mark.parametrize("build_model", [timm_model, vit_pytorch_model])
def test_exported_model_keeps_the_batch_size_of_the_example(build_model):
    """A size burnt into the exported program; an op that does not survive saving."""
    model = build_model().eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model, (images(3),), dynamic_shapes=({0: batch},))
    assert any("vitfast" in str(node.target) for node in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for size in (1, 2, 7):
        torch.testing.assert_close(exported(images(size)), model(images(size)))


def test_compiled_code_of_another_autocast_dtype_is_used():
    """bf16, then fp16, then none in one process: a cached graph or cached casts of the one before."""
    model = timm_model().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    reference = model(images())
    for dtype in (torch.bfloat16, torch.float16, None, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype is not None), torch.no_grad():
            got, eager = compiled(images()), model(images())
        assert got.dtype == eager.dtype == (dtype or torch.float32)
        torch.testing.assert_close(got, eager)
        error = (got.double() - reference.double()).abs().max() / reference.abs().max()
        low, high = {torch.bfloat16: (2e-4, 3e-2), torch.float16: (2e-5, 4e-3), None: (0, 1e-5)}[dtype]
        assert low <= error <= high, f"{dtype}: {error}"


def test_training_under_autocast_differs_when_compiled():
    """A backward traced in another dtype than the forward; gradients of fp32 weights in half precision."""
    model = timm_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (training_step(model, call, images()) for call in (compiled, model))
    assert {g.dtype for g in got.values()} == {torch.float32}
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("build_model", [timm_model, vit_pytorch_model])
def test_graph_has_breaks_or_stock_operators_instead_of_ops(build_model):
    """A part of the model that silently left its op, so that no kernel can ever run there."""
    model = build_model().eval()
    explanation = torch._dynamo.explain(model)(images())
    assert explanation.graph_count == 1 and explanation.graph_break_count == 0, explanation.break_reasons
    targets = [str(node.target) for graph in explanation.graphs for node in graph.graph.nodes]
    used = [t.split(".")[1] for t in targets if t.startswith("vitfast.")]
    # the last block computes only the class token, so that its queries are projected apart
    expected = ["linear", "attention_qkv", "linear", "mlp", "linear", "linear", "attention", "linear", "mlp"]
    first = ["patch_embed"] if build_model is timm_model else ["image_rows", "linear", "layer_norm"]
    assert used == [*first, *expected, "layer_norm"]
    assert not [t for t in targets if "softmax" in t or "scaled_dot" in t or "gelu" in t]


@needs_compiler
@pytest.mark.slow
def test_training_on_several_image_sizes_does_not_compile():
    """The second size makes height and width symbolic, and with them the resampling of positions."""
    model = timm_model(depth=1, dynamic_img_size=True)
    compiled = torch.compile(model)
    for size in ((32, 32), (48, 64), (64, 16)):
        x = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
        got, expected = (training_step(model, call, x) for call in (compiled, model))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("example", [(32, 32), (48, 64)])
def test_exported_model_serves_the_size_of_the_example_only(example):
    model = timm_model(dynamic_img_size=True).eval()
    rows, columns = torch.export.Dim("h", min=2, max=8), torch.export.Dim("w", min=2, max=8)
    shapes = ({0: torch.export.Dim("b"), 2: 16 * rows, 3: 16 * columns},)
    exported = torch.export.export(model, (torch.randn(2, 3, *example),), dynamic_shapes=shapes, strict=False).module()
    with torch.no_grad():
        for size in ((32, 32), (48, 64), (128, 32)):
            x = torch.randn(3, 3, *size)
            torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.slow
def test_ahead_of_time_compiled_model_fails(tmp_path):
    model = timm_model(depth=1).eval()
    with torch.no_grad():
        exported = torch.export.export(model, (images(),))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "vit.pt2"))
        out = torch._inductor.aoti_load_package(package)(images())
        torch.testing.assert_close(out, model(images()), rtol=1e-4, atol=1e-4)


def test_second_model_of_another_size_does_not_compile():
    """Sizes become symbols once Dynamo has seen two: positions that fit looked as if they did not."""
    torch._dynamo.reset()
    for batch, size, patch, dim in ((2, 32, 16, 192), (4, 16, 4, 32), (3, 48, 8, 64)):
        config = vitfast.ViTConfig(
            image_size=size, patch_size=patch, dim=dim, depth=1, heads=2, mlp_dim=2 * dim, num_classes=5
        )
        model, images = vitfast.ViT.from_config(config).eval(), torch.randn(batch, 3, size, size)
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
        torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-5)
