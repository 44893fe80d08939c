"""The model that a prepared one was made of, and whether it still is what it was."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator

from torch import Tensor, nn

_version = operator.attrgetter("_version")


class Places:
    """Every place in a model that holds a module or a tensor, and what was in it.

    Asked at every call, so that each of its questions is one call into C.

    Args:
        model: it; not kept.
        counts: whether `unwritten` and `change` will be asked, for which no tensor may be one of inference mode.
    """

    def __init__(self, model: nn.Module, counts: bool = True):
        held_by = [
            (held, name)
            for name, module in model.named_modules()
            for held in (module._modules, module._parameters, module._buffers)
            if held
        ]
        self.held, self.prefixes = [held for held, _ in held_by], [name for _, name in held_by]
        self.then = list(map(dict, self.held))
        tensors = [(t, name) for _, _, t, name in self._parts() if isinstance(t, Tensor)]
        self.tensors, self.names = [t for t, _ in tensors], [name for _, name in tensors]
        # two tensors of one number are equal or not, which takes a wait for the device, and would hide a new one
        self.single = [
            (held, name, value)
            for held, name, value, _ in self._parts()
            if isinstance(value, Tensor) and value.numel() == 1
        ]
        self.pointers = list(map(Tensor.data_ptr, self.tensors))
        self.versions = list(map(_version, self.tensors)) if counts else []

    def _parts(self) -> Iterator[tuple[dict, str, object, str]]:
        """(where, name, what was there, its full name)"""
        for held, then, prefix in zip(self.held, self.then, self.prefixes, strict=True):
            for name, value in then.items():
                yield held, name, value, f"{prefix}.{name}" if prefix else name

    def same(self) -> bool:
        """Whether every place holds what it held, and every tensor is where it was; what is in it is no matter."""
        try:
            # what is not the same object is compared
            alike = all(held.get(name) is value for held, name, value in self.single) and self.held == self.then
        # other tensors are neither equal nor not
        except RuntimeError:
            return False
        return alike and list(map(Tensor.data_ptr, self.tensors)) == self.pointers

    def unwritten(self) -> bool:
        """Whether nothing was written into a tensor, as far as torch counts."""
        return list(map(_version, self.tensors)) == self.versions

    def change(self) -> tuple[str, str] | None:
        """The first place that changed, and what happened to it; parameters and buffers may be added."""
        for held, name, value, full_name in self._parts():
            if held.get(name) is not value:
                return full_name, "was replaced"
        for held, then, prefix in zip(self.held, self.then, self.prefixes, strict=True):
            if len(held) != len(then) and any(isinstance(part, nn.Module) for part in held.values()):
                return prefix or "the model", "was given another part"
        for tensor, pointer, version, name in zip(self.tensors, self.pointers, self.versions, self.names, strict=True):
            if tensor._version != version:
                return name, "was written to"
            if tensor.data_ptr() != pointer:
                return name, "was moved"
        return None


class Source:
    """What the packed weights were made of, to notice when it is not that any more."""

    def __init__(self, model: nn.Module):
        self.places: Places | None = Places(model)
        # the original may be dropped; then nobody can change it
        this = weakref.ref(self)
        weakref.finalize(model, lambda: (source := this()) and source.forget()).atexit = False

    def forget(self) -> None:
        self.places = None

    def check(self) -> None:
        """Raise where the original has changed.

        Raises:
            RuntimeError: names the part, and what happened to it.
        """
        # another thread may forget them
        places = self.places
        if places is None or (places.same() and places.unwritten()):
            return
        if change := places.change():
            name, what = change
            raise RuntimeError(
                f"prepared model: {name} of the original {what} after vitfast.prepare, so the packed weights are "
                "stale; prepare it again"
            )
