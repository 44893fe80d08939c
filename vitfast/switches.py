"""The one switch of the whole package: run vitfast's ops, or nothing but stock PyTorch operators."""

from __future__ import annotations

import torch

_exportable = False


def set_exportable(enable: bool = True) -> None:
    """Lower models to stock PyTorch operators, for exporters that know no custom op, such as ONNX.

    The model keeps its weights and its results (to rounding). Applies to all models of the process until
    `set_exportable(False)`. Inside `torch.onnx.export`, `torch.jit.trace` and the transforms of `torch.func` it is so
    anyway.
    """
    global _exportable
    _exportable = bool(enable)


def exporting() -> bool:
    """Whether torch.export traces the model now. Dynamo folds `is_exporting` to True for torch.compile too (2.11)."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def stock_only() -> bool:
    """Whether ops must run as stock PyTorch operators now."""
    if torch.compiler.is_compiling() or _exportable:
        return _exportable or (exporting() and torch.onnx.is_in_onnx_export())
    # jit.trace knows no ops of ours; vmap, grad and jvp of torch.func want rules that stock operators have
    return torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None
