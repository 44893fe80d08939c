"""Where the kernels run: on a GPU, or in Triton's interpreter, which has to be on before Triton is imported.

TRITON_INTERPRET=1 pytest tests/kernels      on a CPU, fp32 and fp16 (the interpreter's bf16 is wrong)
pytest tests/kernels                         on a GPU, and bf16
"""

import contextlib
import dataclasses
import functools
import os

import numpy as np
import pytest
import torch
import triton
from textbook import Textbook
from triton.tools.tensor_descriptor import TensorDescriptor

from vitfast.choose import builtin
from vitfast.inference import arguments
from vitfast.kernels.operands import Norm
from vitfast.kernels.triton import launch
from vitfast.ops import _stock

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["*_gpu.py"] if INTERPRETED else []
if not INTERPRETED and not torch.cuda.is_available():
    raise pytest.UsageError("tests/kernels need a GPU, or TRITON_INTERPRET=1 in a process of their own")


@triton.jit
def _loop(n):
    """What all kernels fail in where the interpreter does not know the numpy that is there."""
    for _ in range(n):
        pass


def pytest_configure():
    """Triton's interpreter in a fifth of the time: without two kinds of work that change nothing."""
    if not INTERPRETED:
        return
    from triton import language
    from triton.runtime import interpreter

    try:
        _loop[(1,)](1)
    except Exception as problem:
        raise pytest.UsageError(
            f"the interpreter of Triton {triton.__version__} fails with numpy {np.__version__} ({problem}); "
            "constraints.txt and constraints-newest.txt have versions that go together"
        ) from None

    patch, builder = interpreter._patch_lang, interpreter.interpreter_builder

    def patch_once(fn):
        """The call of a kernel patched triton.language; each function called in it would go through all of that."""
        used = [module for module in (language, language.core) if module in fn.__globals__.values()]
        return patch(fn) if any(language.core.is_builtin(module.load) for module in used) else None

    interpreter._patch_lang = patch_once
    # computes in 64 bits whether sums overflow 32, for an assert that does nothing without `debug`
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def pytest_collection_modifyitems(items):
    if not INTERPRETED:
        for item in items:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def described(monkeypatch):
    """The tensors that descriptors are made of; their rows begin where bulk copies can, and none lies in another."""
    # what is compiled already gets by without
    monkeypatch.setattr(launch, "_compiled", {})
    made = []

    def checked(tensor, shape, strides, box):
        made.append(tensor)
        assert strides[0] >= shape[1] and strides[0] % 8 == tensor.data_ptr() % 16 == 0
        return TensorDescriptor(tensor, shape, strides, box)

    monkeypatch.setattr(launch, "TensorDescriptor", checked)
    return made


@pytest.fixture(autouse=True)
def stock_products():
    """On a CPU what kernels are measured by, and the stock operators beside them, have products of no machine."""
    with Textbook() if INTERPRETED else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch):
    """No op leaves its work to stock operators or cuBLAS where these are faster, as the tables of cards say."""
    monkeypatch.setattr(builtin, "EVERYWHERE", True)


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch):
    """Prepared models launch their kernels at every call; `test_graphs_gpu.py` has graphs."""
    monkeypatch.setattr(arguments, "graphs_of", lambda device: None)


@pytest.fixture
def stock_norms_of_a_gpu(monkeypatch):
    """On a CPU they add up weights' gradients in half precision, and keep statistics in it."""
    if not INTERPRETED:
        return
    forward, backward = _stock.norm_forward, _stock.norm_backward

    def wide(t):
        return t.float() if isinstance(t, torch.Tensor) and t.dtype == torch.float16 else t

    def norm_forward(x, norm, *rest):
        return forward(wide(x), Norm(*map(wide, norm)), *rest)

    def norm_backward(grad, x, norm, mean, rstd, *rest):
        found = backward(wide(grad), wide(x), Norm(*map(wide, norm)), wide(mean), wide(rstd), *rest)
        likes = (x, norm.weight, norm.bias)
        return tuple(None if t is None else t.to(like.dtype) for t, like in zip(found, likes, strict=True))

    monkeypatch.setattr(_stock, "norm_forward", norm_forward)
    monkeypatch.setattr(_stock, "norm_backward", norm_backward)


# tests have tensors with far apart rows, whose memory is never touched
POISONED = 1 << 30
# a device as a context remembers from its first use on which functions make tensors
with torch.device("cpu"):
    torch.empty(0)


def _poisoned(make):
    @functools.wraps(make)
    def call(*arguments, **how):
        t = make(*arguments, **how)
        # no others: of those that only stand for tensors torch.compile must not look at sizes
        if type(t) is torch.Tensor and t.is_floating_point() and (t.is_cuda or (t.is_cpu and t.nbytes < POISONED)):
            t.detach().fill_(float("nan"))
        return t

    return call


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What kernels are to write is NaN before: a part that none writes can't be right by luck.

    Their launchers are Python, so it is enough that Python sees these. `torch.utils.deterministic` fills memory with
    deterministic algorithms only, which are others than those under test.
    """
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
