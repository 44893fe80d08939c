"""Which file of a folder holds the weights, and of which kind a file is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

INDEX = ".index.json"
# that of the largest language model has 5 MB
LONGEST_JSON = 1 << 24
# as transformers, accelerate and timm name them, and as open_clip does; where several are they are the same weights
FOLDER_FILES = (
    "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip


def file_of(path: str | os.PathLike) -> Path:
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


def is_safetensors(path: Path) -> bool:
    """By its ending or, as files are renamed, by how it begins: the length of a JSON object, and that."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and 8 + int.from_bytes(start[:8], "little") <= path.stat().st_size


def is_zip(path: Path) -> bool:
    """By how it begins: torch and numpy write such archives."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it is none, is longer than such files are, or says a name twice.
    """
    size = path.stat().st_size
    if size > LONGEST_JSON:
        raise ValueError(f"{str(path)!r} has {size} bytes, more than {LONGEST_JSON}, which no such file has")
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {type(content).__name__}")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} stands there twice")
    return content


def shard_names(index: Path) -> list[str]:
    """The names of files in an index of shards.

    Raises:
        ValueError: it is no index, or names what cannot be a shard beside it.
    """
    where = f"read_checkpoint: {str(index)!r}"
    try:
        weight_map = read_json(index)["weight_map"]
        named = [*weight_map.values()]
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{where} is no index of shards: {error!r}") from error
    strange = [name for name in named if not isinstance(name, str)]
    if strange or not named:
        raise ValueError(
            f"{where} is no index of shards: a shard is {strange[0]!r}" if strange else f"{where} is empty"
        )
    names = sorted({*named})
    for name in names:
        if Path(name).name != name or "\\" in name or "\0" in name:
            raise ValueError(f"{where} names a file outside its folder, {name!r}")
        if name.endswith(INDEX):
            raise ValueError(f"{where} names {name!r}, an index, in place of a shard")
    return names


def shards_of(index: Path) -> list[Path]:
    """The files that an index of shards names.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: it is no index, or names what is no shard beside it.
    """
    files = [index.parent / name for name in shard_names(index)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"read_checkpoint: no file {str(file)!r}, which {index.name} names")
        if not _is_inside(file, index):
            raise ValueError(
                f"read_checkpoint: {str(index)!r} names {file.name!r}, a link to a file outside its folder, "
                f"{str(file.resolve())!r}"
            )
    return files


def _is_inside(file: Path, index: Path) -> bool:
    """Whether a file stands beside the index, or where the cache of the hub has all files of a snapshot."""
    folders = [index.parent.resolve(), index.resolve().parent]
    if index.parent.parent.name == "snapshots":
        folders.append((index.parent.parent.parent / "blobs").resolve())
    return file.resolve().parent in folders
