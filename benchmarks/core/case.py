"""Cases that another process can build again: what made them travels in their notes as plain values."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from vitfast.check.case import DTYPES, Case


def recorded(make: Callable[..., Case]) -> Callable[..., Case]:
    """Write into the case's notes which factory made it and with which arguments, which must be fit for JSON."""
    signature = inspect.signature(make)

    @functools.wraps(make)
    def factory(**given: Any) -> Case:
        bound = signature.bind(**given)
        bound.apply_defaults()
        case = make(**bound.arguments)
        origin = {"factory": f"{make.__module__}.{make.__qualname__}", "arguments": dict(bound.arguments)}
        return replace(case, notes={**case.notes, **origin})

    return factory


def rebuild(notes: Mapping[str, Any]) -> Case:
    """The case whose notes these are."""
    module, _, name = notes["factory"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**notes["arguments"])


def one_of(what: str, value: Any, allowed: Collection[Any]) -> Any:
    """`value`; raises ValueError where it is not among `allowed`."""
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    return value


def positive(**sizes: int) -> None:
    """Raise ValueError for a size that is no int of at least 1."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def dtype_of(name: str) -> Any:
    return DTYPES[one_of("dtype", name, DTYPES)]
