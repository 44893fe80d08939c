"""Which file of a folder holds the weights, and what stands in for what a pickled file holds beside them."""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

INDEX = ".index.json"
# as transformers, accelerate and timm name them; where both are they are the same weights
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")


class Unread:
    """Stands in for an object of a pickled file that is neither a tensor nor plain data, and keeps nothing of it."""

    def __new__(cls, *args: Any) -> Any:
        # torch's unpickler fills exact dicts and lists only
        if cls.__name__.lower().endswith("dict"):
            return OrderedDict()
        return [] if cls.__name__ == "collections.deque" else super().__new__(cls)

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def file_of(path: str | Path) -> Path:
    """The file of the weights: `path` itself, or the one in a folder of transformers, accelerate or timm.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder of something else, or of several models; says of what.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"read_checkpoint: no file {str(path)!r}")
    if (path / ".metadata").is_file():
        raise ValueError(
            f"read_checkpoint: {str(path)!r} is a folder of torch.distributed.checkpoint; make a file of it with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save(folder, file)"
        )
    for name in FOLDER_FILES:
        stem, _, suffix = name.rpartition(".")
        found = [path / n for n in (name, name + INDEX) if (path / n).is_file()]
        # accelerate numbers the models that it saves after the first
        found += sorted(path.glob(f"{stem}_[0-9]*.{suffix}"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"read_checkpoint: {str(path)!r} holds several models, {names}: pass one file")
        if found:
            return found[0]
    raise ValueError(
        f"read_checkpoint: path must be a file, or a folder with {' or '.join(FOLDER_FILES)}, got the folder "
        f"{str(path)!r}"
    )


def stand_ins(path: Path) -> list[tuple[type, str]]:
    """For `torch.serialization.safe_globals`: an inert class for every name in the file that torch does not know.

    None of those names is imported.
    """
    return [(type(name, (Unread,), {}), name) for name in set(_unknown_globals(path))]


def _unknown_globals(path: Path) -> Iterator[str]:
    """Classes and functions that a pickled file names and torch does not take for safe.

    Of a damaged file those before the damage: loading it says what is wrong.
    """
    try:
        yield from torch.serialization.get_unsafe_globals_in_checkpoint(path)
        return
    except Exception:
        pass
    try:
        with path.open("rb") as file:
            # torch's format before 1.6: the object is the fourth of several pickles
            for _ in range(4):
                for opcode, name, _ in pickletools.genops(file):
                    if opcode.name == "GLOBAL":
                        module, _, name = name.partition(" ")
                        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
                        yield f"{module}.{name}"
    except Exception:
        return
