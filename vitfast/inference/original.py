"""The model that a prepared one was made of, and whether it still is what it was."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn


class Source:
    """What the packed weights were made of, to notice when it is not that any more."""

    def __init__(self, model: nn.Module):
        # every place in a module that holds a module or a tensor, and what was in it
        self.places: list[tuple[dict, str, Any, str]] = []
        self.tensors: list[tuple[Tensor, int, int, str]] = []
        self.sizes = [(module._modules, len(module._modules), name) for name, module in model.named_modules()
                      if module._modules]  # fmt: skip
        for prefix, module in model.named_modules():
            for held in (module._modules, module._parameters, module._buffers):
                for name, value in held.items():
                    self.places.append((held, name, value, f"{prefix}.{name}" if prefix else name))
        for _, _, value, name in self.places:
            if isinstance(value, Tensor):
                self.tensors.append((value, value.data_ptr(), value._version, name))
        # the original may be dropped; then nobody can change it
        this = weakref.ref(self)
        weakref.finalize(model, lambda: (source := this()) and source.forget()).atexit = False

    def forget(self) -> None:
        self.places, self.tensors, self.sizes = [], [], []

    def check(self) -> None:
        """Raise where the original has changed.

        Raises:
            RuntimeError: names the part, and what happened to it.
        """
        for held, name, value, full_name in self.places:
            if held.get(name) is not value:
                self._fail(full_name, "was replaced")
        for held, size, name in self.sizes:
            if len(held) != size:
                self._fail(name or "the model", "was given another part")
        for tensor, pointer, version, name in self.tensors:
            if tensor._version != version:
                self._fail(name, "was written to")
            if tensor.data_ptr() != pointer:
                self._fail(name, "was moved")

    @staticmethod
    def _fail(name: str, what: str) -> None:
        raise RuntimeError(
            f"prepared model: {name} of the original {what} after vitfast.prepare, so the packed weights are stale; "
            "prepare it again"
        )
