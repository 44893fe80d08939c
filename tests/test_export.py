"""Exporters that know no custom op: under `set_exportable(True)` a model is stock operators, and computes the same."""

import io
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from timm_pair import build_pair

import vitfast
from vitfast.choose.exportable import say_needs_vitfast

FLAVOURS = [
    "vit", "distilled", "dinov2_reg4", "siglip_gap", "clip", "aimv2", "beit3", "qk_norm", "test_vit3", "vit_pytorch",
]  # fmt: skip
every_flavour = pytest.mark.parametrize("flavour", FLAVOURS)


def model_and_images(flavour):
    if flavour == "vit_pytorch":
        keywords = dict(image_size=32, patch_size=8, num_classes=10, dim=64, depth=2, heads=2, mlp_dim=128)
        return vitfast.ViT(**keywords).eval(), torch.randn(3, 3, 32, 32)
    _, ours, images = build_pair(flavour, batch=3)
    return ours.eval(), images


def close(found, expected):
    assert (found - expected).norm() <= 1e-4 * expected.norm()


# the others differ in nothing that an exporter sees
SEEN = ("vit", "distilled", "clip", "aimv2", "qk_norm", "vit_pytorch")


@pytest.mark.parametrize(
    "flavour", [pytest.param(name, marks=[pytest.mark.full] * (name not in SEEN)) for name in FLAVOURS]
)
def test_onnx_file_fails_or_computes_something_else(flavour, tmp_path):
    """Custom ops in the graph, and a batch size that is burnt in: the file runs on another batch in onnxruntime."""
    model, images = model_and_images(flavour)
    with torch.no_grad():
        expected = {n: model(images[:n]) for n in (3, 1)}
    vitfast.set_exportable(True)
    try:
        shapes = {"x": {0: torch.export.Dim("batch")}}
        torch.onnx.export(model, (images,), tmp_path / "vit.onnx", dynamic_shapes=shapes, dynamo=True, verbose=False)
    finally:
        vitfast.set_exportable(False)
    session = onnxruntime.InferenceSession(tmp_path / "vit.onnx", providers=["CPUExecutionProvider"])
    used = {node.domain for node in onnx.load(tmp_path / "vit.onnx", load_external_data=False).graph.node}
    assert used <= {"", "ai.onnx"}, used
    (name,) = (node.name for node in session.get_inputs())
    for n, logits in expected.items():
        (out,) = session.run(None, {name: images[:n].numpy()})
        assert out.dtype == np.float32
        close(torch.from_numpy(out), logits)


@every_flavour
def test_trace_fails_or_needs_vitfast_where_it_is_loaded(flavour):
    """TorchScript tracing, without any switch, saved and loaded, on another batch size."""
    model, images = model_and_images(flavour)
    with torch.no_grad():
        expected = model(images)
    traced = torch.jit.trace(model, images[:2])
    assert "vitfast::" not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    with torch.no_grad():
        close(torch.jit.load(file)(images), expected)


def test_switch_is_not_turned_back_or_not_reported():
    model, images = model_and_images("vit")
    expected = model(images)
    vitfast.set_exportable()
    try:
        assert all(row.path == "stock operators" for row in vitfast.explain(model).rows)
        exported = torch.export.export(model, (images,))
        assert not any("vitfast" in str(node.target) for node in exported.graph.nodes)
        out = model(images)
    finally:
        vitfast.set_exportable(False)
    close(out, expected)
    assert vitfast.explain(model).all_fused
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
def test_onnx_export_without_the_switch_fails(dynamo, tmp_path):
    """Who does not know the switch, and who uses the older exporter."""
    model, images = model_and_images("vit")
    shapes = {"dynamic_shapes": {"x": {0: torch.export.Dim("b")}}} if dynamo else {"dynamic_axes": {"x": {0: "b"}}}
    path = tmp_path / "vit.onnx"
    torch.onnx.export(model, (images,), path, dynamo=dynamo, input_names=["x"], verbose=False, **shapes)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        for n in (1, 3):
            close(torch.from_numpy(session.run(None, {"x": images[:n].numpy()})[0]), model(images[:n]))


# `None` in sys.modules makes `import vitfast` fail, wherever it is installed
ELSEWHERE = """
import sys
sys.modules["vitfast"] = None
import torch
kind, path, numbers = sys.argv[1:]
images, expected = torch.load(numbers, weights_only=True)
load = {"program": lambda: torch.export.load(path).module(), "package": lambda: torch._inductor.aoti_load_package(path)}
out = load[kind]()(images)
assert (out - expected).norm() <= 1e-4 * expected.norm()
print("right")
"""


def elsewhere(kind, path, numbers):
    """What the program does in a process that has no vitfast."""
    command = [sys.executable, "-I", "-c", ELSEWHERE, kind, str(path), str(numbers)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def exported(tmp_path, exportable, strict=False):
    """The program, the files with it and with what it gives, and what the exporter was told."""
    model, images = model_and_images("vit")
    say_needs_vitfast.cache_clear()
    vitfast.set_exportable(exportable)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            program = torch.export.export(model, (images,), strict=strict)
    finally:
        vitfast.set_exportable(False)
    torch.export.save(program, tmp_path / "model.pt2")
    with torch.no_grad():
        torch.save((images, model(images)), tmp_path / "numbers.pt")
    told = [str(each.message) for each in told if "vitfast" in str(each.message)]
    return program, tmp_path / "model.pt2", tmp_path / "numbers.pt", told


@pytest.mark.parametrize("strict", [False, True], ids=["loose", "strict"])
def test_program_that_needs_vitfast_does_not_say_so(strict, tmp_path):
    """Who loads it elsewhere reads that an op is missing, and nothing of how to do without."""
    program, file, numbers, told = exported(tmp_path, exportable=False, strict=strict)
    assert len(told) == 1 and "set_exportable(True)" in told[0]
    assert elsewhere("program", file, numbers).returncode != 0
    images, expected = torch.load(numbers)
    close(torch.export.load(file).module()(images), expected)


def test_exportable_program_needs_vitfast_or_says_that_it_does(tmp_path):
    _, file, numbers, told = exported(tmp_path, exportable=True)
    assert not told
    result = elsewhere("program", file, numbers)
    assert result.stdout == "right\n", result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    # test_compile.py has one of ops too
    "exportable", [pytest.param(False, marks=pytest.mark.full, id="ops"), pytest.param(True, id="exportable")]
)  # fmt: skip
def test_package_of_aot_inductor_needs_vitfast(exportable, tmp_path):
    program, _, numbers, told = exported(tmp_path, exportable)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    images, expected = torch.load(numbers)
    with torch.no_grad():
        close(torch._inductor.aoti_load_package(package)(images), expected)
    result = elsewhere("package", package, numbers)
    if exportable:
        assert result.stdout == "right\n" and not told, result.stderr
    else:
        assert result.returncode != 0 and "set_exportable(True)" in told[0]


def test_switch_is_not_explained_where_users_look():
    for text in (vitfast.set_exportable.__doc__, (Path(__file__).parent.parent / "docs/models.md").read_text()):
        assert all(word in text for word in ("torch.export", "AOTInductor", "set_exportable(True)"))
