"""Pickled files of weights, read without running anything that they name."""

from __future__ import annotations

import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._weights_only_unpickler import _get_allowed_globals, _get_user_allowed_globals

# no weights need them
REFUSED = ("os", "posix", "nt", "sys")
UNUSED = (pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4)
SUBCLASS = "torch._tensor._rebuild_from_type_v2"


class Unread(dict):
    """Stands in for an object that is neither a tensor nor plain data; keeps the items of a mapping, nothing else."""

    __hash__ = object.__hash__

    def __new__(cls, *args: Any, **kwargs: Any) -> Unread:
        return dict.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    append = extend


def load_pickled(path: Path) -> tuple[Any, bool]:
    """What the file holds, on the CPU, and whether stand-ins may be in it.

    None of the names in it is imported. The allow list of `torch.serialization.safe_globals` is the whole process's:
    with stand-ins there another thread's torch.load would read them too. So torch reads plain weights as it always
    does, and anything else by an unpickler that belongs to this one load.

    Raises:
        Exception: of any class; a damaged or hostile file can do that.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True), False
    except Exception as error:
        # these torch.load would hand on to torch.jit.load
        if "TorchScript" in str(error):
            raise ValueError("a TorchScript archive; save the state_dict() of torch.jit.load(path)") from None
    unread: set[str] = set()

    class Unpickler(Inert):
        stand_ins = unread

    module = SimpleNamespace(
        __name__="vitfast", Unpickler=Unpickler, load=lambda file, **how: Unpickler(file, **how).load()
    )
    content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=module)
    return content, bool(unread)


class Inert(pickle._Unpickler):
    """Calls what `torch.load(weights_only=True)` would, and for any other name an empty class of its own.

    The Python implementation, since that in C lets a file write into classes and call whatever was made before.
    """

    stand_ins: set[str]

    def __init__(self, file: Any, **how: Any):
        super().__init__(file, **how)
        allowed = _get_allowed_globals() | _get_user_allowed_globals()
        # only torch's own unpickler has their indices looked at
        self.allowed = {name: value for name, value in allowed.items() if "sparse" not in name} | {SUBCLASS: subclass}

    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if module.partition(".")[0] in REFUSED:
            raise pickle.UnpicklingError(f"it names {full}, which no weights need")
        if full not in self.allowed:
            self.stand_ins.add(full)
            self.allowed[full] = type(full, (Unread,), {})
        return self.allowed[full]

    def check(self, called: Any) -> None:
        if not any(called is value for value in self.allowed.values()):
            raise pickle.UnpicklingError(f"it calls or fills a {type(called).__name__}")

    def load_reduce(self) -> None:
        self.check(self.stack[-2])
        super().load_reduce()

    def load_newobj(self) -> None:
        self.check(self.stack[-2])
        super().load_newobj()

    def load_newobj_ex(self) -> None:
        self.check(self.stack[-3])
        super().load_newobj_ex()

    def load_build(self) -> None:
        self.check(type(self.stack[-2]))
        super().load_build()

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in UNUSED} | {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
    }


def subclass(rebuild: Callable, kind: type, args: tuple, state: Any) -> Any:
    """A tensor of a class of its own; of an unknown class nothing can be said."""
    if isinstance(kind, type) and issubclass(kind, Unread):
        return kind()
    return torch._tensor._rebuild_from_type_v2(rebuild, kind, args, state)
