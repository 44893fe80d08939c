"""`convert`: weights of any source as files of another library, exactly, and whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vitfast.checkpoints.not_finite import warn_not_finite
from vitfast.loading.report import LoadReport
from vitfast.loading.take import take
from vitfast.loading.write import WRITERS, Files
from vitfast.model.vit import ViT

WEIGHTS = "model.safetensors"
FILES = (".safetensors", ".pth", ".pt", ".bin")


def convert(
    source: str | os.PathLike[str] | nn.Module,
    out: str | os.PathLike[str],
    to: str = "timm",
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    **options: Any,
) -> LoadReport:
    """Write weights of any source under the names of a library. Each keeps its dtype and its bits.

    Args:
        source, options: as `vitfast.load`, without its dtype and device.
        out: a file, .safetensors, .pth, .pt or .bin, or a folder with the config files that the library reads.
        to: 'timm', 'hf' (a folder), 'torchvision', 'vit_pytorch' or 'vitfast' (safetensors with the config inside).
        dtype: of all weights; their own when None.
        force: replace what is there, when everything new is written.

    Returns:
        What was recognised, assumed, passed over and changed; its `changed` ends with what the reader has to know.

    Raises:
        NotImplementedError: the library's models do not compute what these weights are of; names the fields.
        FileExistsError: `out` is there.
        ValueError: another library, or a file where a folder is needed.
        And as `vitfast.load`. Nothing is written then.
    """
    path = checked(out, to, force)
    taken = take(source, **options)
    state = dict(taken.weights)
    bad = warn_not_finite(state, f"convert: {taken.report.source}", stacklevel=2)
    files = _files(state, taken.config, taken.report, to, dtype)
    _write(files, path, force)
    return replace(taken.report, changed=(*taken.report.changed, *files.notes), not_finite=tuple(bad))


def save_as(model: ViT, out: str | os.PathLike[str], to: str = "timm", *, force: bool = False) -> LoadReport:
    """`convert` of a model that is here, as it is now: with what was exchanged in it, and in its dtype.

    Args:
        model: of which `save_checkpoint` can say the config. out, to, force: as `convert`.

    Raises:
        As `convert`, and as `vitfast.save_checkpoint`.
    """
    if not isinstance(model, ViT):
        raise TypeError(f"save_as: model must be a vitfast.ViT, got {type(model).__name__}")
    return convert(model, out, to, force=force)


def checked(out: str | os.PathLike[str], to: str, force: bool) -> Path:
    """`out` as a path, if `convert` can write to it.

    Raises:
        As `convert`, of what is wrong with `out` and `to`.
    """
    path = Path(out)
    if to not in WRITERS:
        raise ValueError(f"convert: to must be one of {', '.join(WRITERS)}, got {to!r}")
    if path.suffix in FILES and to == "hf":
        raise ValueError(f"convert: out must be a folder for to='hf', got {str(path)!r}")
    if path.suffix not in FILES and to not in ("hf", "timm"):
        raise ValueError(f"convert: out must end in {', '.join(FILES)} for to={to!r}, got {str(path)!r}")
    if path.suffix != ".safetensors" and to == "vitfast":
        raise ValueError(f"convert: out must end in .safetensors for to='vitfast', got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"convert: no folder {str(path.parent)!r}")
    if path.exists() and not force:
        raise FileExistsError(f"convert: {str(path)!r} is there; force=True (--force) replaces it")
    if path.is_dir() and path.suffix in FILES:
        raise ValueError(f"convert: out must be a file, got the folder {str(path)!r}")
    if path.is_file() and path.suffix not in FILES:
        raise ValueError(f"convert: out must be a folder, got the file {str(path)!r}")
    return path


def _files(state: dict[str, Tensor], config: Any, report: LoadReport, to: str, dtype: torch.dtype | None) -> Files:
    try:
        files = WRITERS[to](state, config, report)
    except NotImplementedError as error:
        raise NotImplementedError(f"convert: {report.source} as {to}: {error}") from error
    cast = {
        name: value.detach().to(dtype if dtype and value.is_floating_point() else value.dtype).contiguous()
        for name, value in files.state.items()
    }
    return files._replace(state=cast)


def _write(files: Files, path: Path, force: bool) -> None:
    """Beside `path` first, and there by a rename."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if path.suffix in FILES:
            _write_weights(files, temporary, path.suffix)
            _put_file(temporary, path, force)
            return
        temporary.mkdir()
        _write_weights(files, temporary / WEIGHTS, ".safetensors")
        for name, content in files.beside.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
        _put_folder(temporary, path, force)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _write_weights(files: Files, path: Path, suffix: str) -> None:
    if suffix != ".safetensors":
        torch.save(files.state, path)
        return
    # safetensors makes files that only their owner can read; this one gets the mode that any new file has
    path.touch()
    mode = path.stat().st_mode
    save_file(files.state, path, metadata={"format": "pt"} | files.metadata)
    path.chmod(mode)


def _put_file(temporary: Path, path: Path, force: bool) -> None:
    if not force:
        meanwhile = f"convert: {str(path)!r} was made meanwhile; force=True (--force) replaces it"
        try:
            # a rename would replace what another process has put there since `checked`
            os.link(temporary, path)
            return
        except FileExistsError as error:
            raise FileExistsError(meanwhile) from error
        except OSError as error:
            # a file system without links
            if path.exists():
                raise FileExistsError(meanwhile) from error
    os.replace(temporary, path)


def _put_folder(temporary: Path, path: Path, force: bool) -> None:
    """A folder cannot be renamed onto one that has files: the old one goes aside first, and comes back on failure."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    if force:
        # another process may have put it aside just now
        with suppress(FileNotFoundError):
            os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except OSError as error:
        if not path.exists():
            raise
        raise FileExistsError(f"convert: {str(path)!r} was made meanwhile") from error
    finally:
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        elif aside.exists():
            shutil.rmtree(aside)
