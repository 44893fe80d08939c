"""Which file of a folder holds the weights, and of which kind a file is."""

from __future__ import annotations

import os
from pathlib import Path

INDEX = ".index.json"
# as transformers, accelerate and timm name them; where both are they are the same weights
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")


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
