"""Exporters that know no custom op: under `set_exportable(True)` a model is stock operators, and computes the same."""

import io

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from timm_pair import build_pair

import vitfast

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


@every_flavour
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
