"""What a file or a folder of weights holds. Nothing that a pickle names is ever imported or called."""

from __future__ import annotations

import json
import pickletools
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

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


def content_of(path: Path, allow_pickle: bool) -> tuple[Any, bool]:
    """What the file holds, on the CPU, and whether any of it is `Unread`.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a pickled file without `allow_pickle`, a damaged one, or one of another kind.
    """
    if path.name.endswith(INDEX):
        return _shards(path, allow_pickle)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, False  # noqa: SIM118  (not a dict)
        except SafetensorError as error:
            raise ValueError(f"read_checkpoint: {str(path)!r} is not a whole safetensors file: {error}") from error
    if path.suffix in (".npz", ".npy"):
        raise ValueError(
            f"read_checkpoint: {str(path)!r} holds numpy arrays, as JAX's ViTs do. timm reads them: "
            "model.load_state_dict(timm.create_model(name, checkpoint_path=path).state_dict())"
        )
    if not allow_pickle:
        raise ValueError(
            f"read_checkpoint: path must be a .safetensors file, got {str(path)!r}; a pickled file can be read with "
            "load_checkpoint(model, path, allow_pickle=True) if you trust where it comes from"
        )
    stand_ins = [(type(name, (Unread,), {}), name) for name in set(_unknown_globals(path))]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True), bool(stand_ins)
    except Exception as error:  # a damaged or hostile file can raise anything
        # torch's advice to read it without weights_only is not ours
        reason = re.sub(r"In PyTorch 2\.6, .*?trusted source\.|Check the documentation.*", "", str(error), flags=re.S)
        raise ValueError(
            f"read_checkpoint: {str(path)!r} is not a whole file of plain weights: {' '.join(reason.split())}"
        ) from error


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


def _shards(path: Path, allow_pickle: bool) -> tuple[dict[str, Any], bool]:
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        files = [path.parent / name for name in names]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"read_checkpoint: {str(path)!r} is no index of shards: {error!r}") from error
    state: dict[str, Any] = {}
    unread = False
    for name, file in zip(names, files, strict=True):
        if Path(name).name != name:
            raise ValueError(f"read_checkpoint: {str(path)!r} names a file outside its folder, {name!r}")
        if not file.is_file():
            raise FileNotFoundError(f"read_checkpoint: no file {str(file)!r}, which {path.name} names")
        shard, partly = content_of(file, allow_pickle)
        if not isinstance(shard, Mapping):
            raise ValueError(f"read_checkpoint: {str(file)!r} must map names to tensors, got {type(shard).__name__}")
        state, unread = state | shard, unread or partly
    return state, unread
