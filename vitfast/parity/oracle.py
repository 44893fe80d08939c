"""An ONNX file as a model to compare with, run by onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitfast.parity.chain import Outside

DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


def onnx_model(path: str | os.PathLike[str], taps: Mapping[str, str] | None = None) -> Outside:
    """The model of an ONNX file, on the CPU.

    Args:
        taps: stage -> name of the value of the graph that it is, for instance {'tokens': '/norm/Add_1_output_0'};
            'logits' is the first output where it is not among them.

    Raises:
        ModuleNotFoundError: onnxruntime is not there, or onnx where values inside are asked for.
        ValueError: a file that onnxruntime cannot read, a value that is not in the graph, or more than one input.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ModuleNotFoundError("an .onnx file needs onnxruntime: pip install onnxruntime") from error
    path, taps = os.fspath(path), dict(taps or {})
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    options = onnxruntime.SessionOptions()
    # what graph optimisations fuse is not there to be read, and their arithmetic is another matter
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        model = _with_outputs(path, [*taps.values()]) if taps else path
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except (ModuleNotFoundError, ValueError):
        raise
    except Exception as error:  # noqa: BLE001  onnxruntime and protobuf raise classes of their own
        raise ValueError(f"{path} must be an ONNX model: {str(error).splitlines()[0]}") from error
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in DTYPES:
        told = ", ".join(f"{each.name} {each.type}" for each in inputs)
        raise ValueError(f"{path} must take one tensor of images in fp32 or fp16, got {told}")
    first = session.get_outputs()[0].name
    names = taps if "logits" in taps else taps | {"logits": first}
    batch = inputs[0].shape[0]

    def read(images: Tensor) -> dict[str, Tensor]:
        parts = images.split(batch) if isinstance(batch, int) and batch != len(images) else [images]
        found: list[list[Any]] = [
            session.run([*names.values()], {inputs[0].name: part.cpu().numpy()}) for part in parts
        ]
        values = (torch.cat([torch.from_numpy(each) for each in same]) for same in zip(*found, strict=True))
        return {stage: value.to(images.device) for stage, value in zip(names, values, strict=True)}

    return Outside(f"{os.path.basename(path)} (onnxruntime)", read, DTYPES[inputs[0].type])


def _with_outputs(path: str, names: list[str]) -> bytes:
    """The file with values inside of its graph as outputs."""
    try:
        import onnx
    except ImportError as error:
        raise ModuleNotFoundError("values inside of an ONNX graph need onnx: pip install onnx") from error
    model = onnx.load(path)
    there = {name for node in model.graph.node for name in node.output}
    unknown = [name for name in names if name not in there]
    if unknown:
        raise ValueError(f"--tap must name values of the graph, got {', '.join(unknown)}; its last are {_last(model)}")
    shown = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in shown)
    return model.SerializeToString()


def _last(model: Any) -> str:
    return ", ".join(name for node in model.graph.node[-5:] for name in node.output)
