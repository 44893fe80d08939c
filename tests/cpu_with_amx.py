"""A CPU with AMX, or without it: what torch, the extension and the environment say of the one that this is."""

import contextlib
import sys

import pytest
import torch

from vitfast.kernels import cpu as cpu_kernels
from vitfast.kernels import extension
from vitfast.kernels.cpu import choice


class PassedOff:
    """Kernels of plain tiles by the name of those of AMX."""

    name = "amx_bf16"

    def __init__(self, kernels):
        self.kernels = kernels

    def __getattr__(self, name):
        return getattr(self.kernels, name)


@contextlib.contextmanager
def cpu(monkeypatch, amx, tiles, why_no_tiles="", **environment):
    """A CPU of which torch says that it has AMX, or has not, and which kernels of tiles use or not; and why the system
    refuses tiles, as it may on the one that this is."""
    module = extension.load()[0]
    if module is None and tiles:
        pytest.skip("no extension")
    with monkeypatch.context() as patch:
        capabilities = dict(torch.cpu.get_capabilities()) | {"amx_bf16": amx, "amx_fp16": amx}
        patch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        patch.delenv("VITFAST_CPU_ISA", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        if module is not None:
            known = [each for each in module.usable_kernels() if each.name != "amx_bf16"]
            usable = [*known, PassedOff(known[0])] if tiles else known
            patch.setattr(module, "usable_kernels", lambda: usable)
            patch.setattr(module, "why_no_tiles", lambda: why_no_tiles)
        patch.setattr(choice, "_timed", {})
        forget()
        try:
            yield
        finally:
            forget()


def forget():
    """What is asked of a CPU once a process."""
    cpu_kernels.kernels.cache_clear()
    cpu_kernels.arguments._refuses_tiles.cache_clear()


def counted(monkeypatch):
    """Which C++ kernels for whole parts of a block were called."""
    seen = []
    for name in ("_attention", "linear", "linear_unpacked", "mlp", "block", "embed"):
        # the one function behind both of attention's
        place = sys.modules["vitfast.kernels.cpu.attention"] if name == "_attention" else cpu_kernels
        function = getattr(place, name)
        noted = lambda *args, name=name, function=function, **kwargs: seen.append(name) or function(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(place, name, noted)
    return seen


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(shape).to(dtype)
