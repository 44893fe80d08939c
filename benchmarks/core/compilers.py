"""Ahead of other people's code: torch.compile, ONNX Runtime and OpenVINO, as they are fastest."""

from __future__ import annotations

import contextlib
import io
import logging
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

# NNCF takes 300 by default, of photographs; images of random numbers are all alike
CALIBRATION_IMAGES, CALIBRATION_SEED = 64, 1


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


def frozen(model: nn.Module, example: Tensor, autotuned: bool = False) -> Callable[[Tensor], Tensor]:
    """torch.compile with the weights as constants, which on a CPU packs them for oneDNN.

    Args:
        autotuned: times products of its own C++ templates against oneDNN's, and calls all from C++.
    """
    import torch._inductor.config

    def call(images: Tensor) -> Tensor:
        return model(images)

    fast = compiled(call)

    def run(images: Tensor) -> Tensor:
        # freezing needs no_grad, and does not see inference_mode
        with torch.no_grad():
            return fast(images)

    # it compiles at its first call, and reads the settings then
    settings = {"max_autotune": True, "cpp_wrapper": True} if autotuned else {}
    with (
        torch._inductor.config.patch(freezing=True, **settings),
        warnings.catch_warnings(action="ignore"),
        # where it tells what it times
        contextlib.redirect_stderr(io.StringIO()) if autotuned else contextlib.nullcontext(),
    ):
        run(example)
    return run


def onnx_runtime(model: nn.Module, example: Tensor, int8: bool = False) -> Callable[[Tensor], Tensor]:
    """ONNX Runtime's session of `model`, both in fp32, as results are.

    Args:
        int8: products in int8 as ONNX Runtime's own tool makes them for transformers: weights by channel, and
            activations by the range that they have in this call.
    """
    import onnxruntime

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(sys.stderr),
        warnings.catch_warnings(action="ignore"),
    ):
        file = Path(folder) / "model.onnx"
        torch.onnx.export(model, (example,), file, dynamo=True, verbose=False)
        if int8:
            file = _in_int8(file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # its threads may spin during a call, but not into the next variant's
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name, wide = session.get_inputs()[0].name, _Wide(lambda array: array)
    return lambda images: torch.from_numpy(session.run(None, {name: wide(images)})[0])


def _in_int8(file: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain, quantised = file.with_name("plain.onnx"), file.with_name("int8.onnx")
    # the tool asks for it
    quant_pre_process(file, plain)
    # convolutions in int8 are slower than in fp32 there, and without VNNI sums of 8 by 8 bits overflow
    quantize_dynamic(
        plain, quantised, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8,
        reduce_range=not torch.cpu.get_capabilities().get("avx512_vnni"),
    )  # fmt: skip
    return quantised


def openvino(model: nn.Module, example: Tensor, dtype: str, int8: bool = False) -> Callable[[Tensor], Tensor]:
    """OpenVINO's compilation of `model`, which is fp32, computing in `dtype`; results are fp32.

    Args:
        int8: products in int8 as NNCF makes them for transformers: weights by channel, activations by the ranges that
            some images have; the rest in `dtype`.
    """
    # a benchmark sends nobody usage statistics; without the package OpenVINO has a stub for it
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino

    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        converted = openvino.convert_model(model, example_input=example, input=[tuple(example.shape)])
        if int8:
            converted = _calibrated(converted, example)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}[dtype],
    }
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
    wide = _Wide(lambda array: openvino.Tensor(array, shared_memory=True))

    def run(images: Tensor) -> Tensor:
        request.set_input_tensor(wide(images))
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data).clone()

    return run


def _calibrated(converted: Any, example: Tensor) -> Any:
    import nncf

    nncf.set_log_level(logging.ERROR)
    generator, calls = torch.Generator().manual_seed(CALIBRATION_SEED), -(-CALIBRATION_IMAGES // len(example))
    images = [torch.randn(example.shape, generator=generator).numpy() for _ in range(calls)]
    return nncf.quantize(converted, nncf.Dataset(images), model_type=nncf.ModelType.TRANSFORMER, subset_size=calls)


class _Wide:
    """Images as somebody has them for a runtime that reads numpy, which has no bf16: in fp32.

    Making them is not timed: it is done once for each set of images.
    """

    def __init__(self, of: Callable[[Any], Any]) -> None:
        self.of = of
        self.known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __call__(self, images: Tensor) -> Any:
        found = self.known.get(images)
        if found is None:
            found = self.known[images] = self.of(images.float().numpy())
        return found
