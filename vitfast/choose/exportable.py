"""The one switch of the whole package: run vitfast's ops, or nothing but stock PyTorch operators."""

from __future__ import annotations

import functools
import threading
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Proxy

_exportable = False


class _Thread(threading.local):
    # calls of ops that this thread is in, and that are to be stock operators
    lowered = 0


_thread = _Thread()


def set_exportable(enable: bool = True) -> None:
    """Lower models to stock PyTorch operators, for exporters that know no custom op, such as ONNX.

    The model keeps its weights and its results (to rounding). Applies to all models of the process until
    `set_exportable(False)`; for one model set its attribute `exportable` (an argument of `create_model`). Inside
    `torch.onnx.export`, `torch.jit.trace`, `torch.export.draft_export`, the transforms of `torch.func` and forward-mode
    differentiation it is so anyway.

    As long as this is off a program of `torch.export.export`, saved or compiled by AOTInductor, holds vitfast's ops,
    and runs where vitfast was imported before it is loaded. For a process without vitfast, or in C++, export it under
    `set_exportable(True)`.
    """
    global _exportable
    _exportable = bool(enable)


class stock_operators:  # noqa: N801  (used as a function)
    """Context in which `set_exportable(True)` holds, for this thread."""

    def __enter__(self) -> None:
        _thread.lowered += 1

    def __exit__(self, *_: Any) -> None:
        _thread.lowered -= 1


def exporting() -> bool:
    """Whether torch.export traces the model now. Dynamo folds `is_exporting` to True for torch.compile too (2.11)."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def inside_export() -> bool:
    """Whether torch.export traces the model now, by way of Dynamo (`strict=True`) too."""
    # Dynamo folds `is_exporting`, and not the flag behind it (torch 2.11)
    return torch.compiler._is_exporting_flag


def stock_only() -> bool:
    """Whether ops must run as stock PyTorch operators now."""
    switched = _exportable or _thread.lowered > 0
    if switched or torch.compiler.is_compiling():
        return switched or (exporting() and (torch.onnx.is_in_onnx_export() or _drafting()))
    # jit.trace knows no ops of ours; vmap, grad and jvp of torch.func want rules that stock operators have
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    return transformed or torch.jit.is_tracing()


@functools.cache
def say_needs_vitfast() -> None:
    """Once a process: who loads the program elsewhere is told no more than that an op is missing."""
    warnings.warn(
        "torch.export: this program holds vitfast's ops and runs only where vitfast is imported before it is loaded; "
        "for processes without vitfast, and AOTInductor's in C++, export it under vitfast.set_exportable(True)",
        stacklevel=2,
    )


def _drafting() -> bool:
    # it takes an optional tensor that is None for one that the op has written to, whatever the op (torch 2.11)
    return torch._functorch.config.fake_tensor_propagate_real_tensors


def refuse_proxy(t: Any) -> None:
    """Raise where torch.fx traces symbolically: nothing is known of a proxy, and ops are chosen by what is known.

    Raises:
        NotImplementedError: says what to use.
    """
    if isinstance(t, Proxy):
        raise NotImplementedError(
            "torch.fx cannot trace a vitfast model symbolically (torch.fx.symbolic_trace, torchvision's "
            "create_feature_extractor, timm's FeatureGraphNet): which part runs as which op depends on its tensors. "
            "For features take model.forward_intermediates or hooks on its modules, for a graph torch.export.export; "
            "a module around the model can be traced with the model as a leaf (leaf_modules, Tracer.is_leaf_module)"
        )


def forward_mode() -> bool:
    """Whether tangents may be carried along: inside `torch.autograd.forward_ad.dual_level` or `torch.func.jvp`."""
    return forward_ad._current_level >= 0


def differentiated_again(*tensors: Tensor) -> bool:
    """Whether torch.func or forward mode may want more of these tensors than one derivative in reverse mode."""
    if torch.compiler.is_compiling():
        return False
    return forward_mode() or any(_levels(t) > 1 for t in tensors)


def _levels(t: Tensor) -> int:
    """How many levels of reverse mode record what is done to `t`: those of torch.func, and autograd below them."""
    levels = int(t.requires_grad)
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
        levels += t.requires_grad
    return levels
