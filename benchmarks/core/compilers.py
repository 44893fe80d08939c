"""Ahead of other people's code: torch.compile, ONNX Runtime and OpenVINO, as they are fastest."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """`torch.compile` for the one shape of a row; `mode` as there.

    Every call has a compilation of its own. torch keeps what it compiled with the code of a function, and after eight
    shapes of the same code it silently runs that uncompiled.
    """
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    own.__kwdefaults__ = function.__kwdefaults__
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(own, dynamic=False, mode=mode)


def frozen(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """torch.compile with the weights as constants, which on a CPU packs them for oneDNN."""
    import torch._inductor.config

    def call(images: Tensor) -> Tensor:
        return model(images)

    fast = compiled(call)

    def run(images: Tensor) -> Tensor:
        # freezing needs no_grad, and does not see inference_mode
        with torch.no_grad():
            return fast(images)

    # it compiles at its first call, and reads the setting then
    with torch._inductor.config.patch(freezing=True), warnings.catch_warnings(action="ignore"):
        run(example)
    return run


def onnx_runtime(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """ONNX Runtime's session of `model`, both in fp32."""
    import onnxruntime

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(sys.stderr),
        warnings.catch_warnings(action="ignore"),
    ):
        file = Path(folder) / "model.onnx"
        torch.onnx.export(model, (example,), file, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # its threads may spin during a call, but not into the next variant's
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def openvino(model: nn.Module, example: Tensor, dtype: str) -> Callable[[Tensor], Tensor]:
    """OpenVINO's compilation of `model`, which is fp32, computing in `dtype`; results are fp32."""
    # a benchmark sends nobody usage statistics; without the package OpenVINO has a stub for it
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino

    with warnings.catch_warnings(action="ignore"):
        converted = openvino.convert_model(model, example_input=example, input=[tuple(example.shape)])
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}[dtype],
    }
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
    # it reads numpy, which has no bf16; images that somebody has for it are fp32, so making them is not timed
    wide: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def run(images: Tensor) -> Tensor:
        tensor = wide.get(images)
        if tensor is None:
            array = images.float().numpy()
            tensor = wide[images] = openvino.Tensor(array, shared_memory=True)
        request.set_input_tensor(tensor)
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data).clone()

    return run
