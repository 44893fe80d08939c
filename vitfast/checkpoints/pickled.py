"""Pickled files in which more than plain weights stands, read without running anything that they name."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import _weights_only_unpickler as weights_only
from torch import serialization

SUBCLASS = "torch._tensor._rebuild_from_type_v2"


class Unread(dict):
    """Stands in for an object that is neither a tensor nor plain data; keeps the items of a mapping, nothing else."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # a dict has none, and pickled sets hold such objects

    def __new__(cls, *args: Any, **kwargs: Any) -> Unread:
        return dict.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    append = extend


class StandIns(dict):
    """Every name that is asked for, with an inert class of its own; nothing is imported."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> type[Unread]:
        self[name] = type(name, (Unread,), {})
        return self[name]


def load_pickled(path: Path) -> tuple[Any, bool]:
    """What the file holds, on the CPU, and whether stand-ins may be in it.

    The unpickler is torch's for `weights_only=True`, and refuses what that refuses, but for its allow list:
    `torch.serialization.safe_globals` is the whole process's, and with stand-ins there another thread's torch.load
    would get them too. So the list is given to the code of this one unpickler. A torch in which it has another name
    refuses unknown names.

    Raises:
        Exception: of any class; a damaged or hostile file can do that.
    """
    known = weights_only._get_allowed_globals() | weights_only._get_user_allowed_globals() | {SUBCLASS: subclass}
    unknown = StandIns()
    names = {
        "_get_allowed_globals": lambda: known,
        "_get_user_allowed_globals": lambda: unknown,
        # torch fills exact lists only
        "type": lambda value: list if isinstance(value, Unread) else type(value),
    }
    # under a name that no file can hold, since those have a dot
    unknown[""] = list

    class Unpickler(weights_only.Unpickler):
        load = FunctionType(weights_only.Unpickler.load.__code__, vars(weights_only) | names)

        def _check_set_item_target(self, opcode: str) -> None:
            if not isinstance(self.stack[-1], Unread):
                super()._check_set_item_target(opcode)

        def _check_append_target(self, value: Any) -> None:
            # torch 2.14 asks this in place of type()
            if not isinstance(value, Unread):
                super()._check_append_target(value)  # type: ignore[misc]  # torch 2.11 has none

    module = SimpleNamespace(
        __name__="vitfast", Unpickler=Unpickler, load=lambda file, **how: Unpickler(file, **how).load()
    )
    with path.open("rb") as file:
        if serialization._is_zipfile(file):
            with serialization._open_zipfile_reader(file) as archive:
                content = serialization._load(archive, "cpu", module, encoding="utf-8")
        else:
            # from memory, since an open file may be a tar archive, which torch would unpack
            content = serialization._legacy_load(io.BytesIO(file.read()), "cpu", module, encoding="utf-8")
    return content, len(unknown) > 1


def subclass(rebuild: Callable, kind: type, args: tuple, state: Any) -> Any:
    """A tensor of a class of its own; of an unknown class nothing can be said."""
    if isinstance(kind, type) and issubclass(kind, Unread):
        return kind()
    return torch._tensor._rebuild_from_type_v2(rebuild, kind, args, state)
