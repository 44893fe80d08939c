"""The one switch of the whole package: run vitfast's ops, or nothing but stock PyTorch operators."""

from __future__ import annotations

import torch

_exportable = False


def set_exportable(enable: bool = True) -> None:
    """Lower models to stock PyTorch operators, for exporters that know no custom op, such as ONNX.

    The model keeps its weights and its results (to rounding). Applies to all models of the process until
    `set_exportable(False)`. While `torch.jit.trace` runs it is so anyway: its files are loaded without vitfast.
    """
    global _exportable
    _exportable = bool(enable)


def stock_only() -> bool:
    """Whether ops must run as stock PyTorch operators now."""
    return _exportable or torch.jit.is_tracing()
