"""Arrays of numpy as JAX's ViTs are published: an npz file, read without pickle."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from vitfast.checkpoints.files import is_zip
from vitfast.checkpoints.progress import Progress
from vitfast.checkpoints.zipped import opened

PART = 1 << 20
# bytes of a shape and a dtype in words
HEADER = 10_000
# numpy has no bfloat16: of what JAX writes it knows the size alone
BFLOAT16 = "V2"
KINDS = ("f2", "f4", "f8", BFLOAT16, "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1", "c8", "c16")
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class Declared(NamedTuple):
    """What the header of an array says, and how many bytes it has itself."""

    shape: tuple[int, ...]
    reversed: bool  # in Fortran's order
    dtype: np.dtype
    length: int


def is_npz(path: Path) -> bool:
    """By what is in it, as files are renamed."""
    if not is_zip(path):
        return False
    try:
        with opened(path) as (_, members):
            return bool(members) and all(name.endswith(".npy") for name in members)
    except Exception:  # damaged, which can raise anything: who reads it says so
        return False


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of an npz file by their names, as tensors of the same dtype.

    The header of each is compared with the size that the archive has for it before memory is asked for.

    Raises:
        ValueError, zipfile.BadZipFile: objects that would have to be unpickled, a dtype that no weights have, a header
            that does not fit what follows it, an archive as `zipped.opened` refuses it.
    """
    with opened(path) as (archive, members):
        declared = {name: _declared(archive, info) for name, info in members.items()}
        arrays = {}
        with Progress(f"reading {path.name}", sum(info.file_size for info in members.values())) as progress:
            for name, info in members.items():
                arrays[name.removesuffix(".npy")] = _read(archive, info, declared[name])
                progress.add(info.file_size)
        return arrays


def _declared(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Declared:
    if not info.filename.endswith(".npy"):
        raise ValueError(f"member {info.filename!r} is no array (.npy)")
    with archive.open(info) as file:
        version = npy.read_magic(file)
        if version not in HEADERS:
            raise ValueError(f"array {info.filename!r} has a header of version {version}, not of {[*HEADERS]}")
        # numpy's stub lacks the argument
        shape, in_reverse, dtype = HEADERS[version](file, max_header_size=HEADER)  # type: ignore[call-arg]
        length = file.tell()
    if dtype.hasobject:
        raise ValueError(f"array {info.filename!r} holds objects, which only pickle reads")
    if dtype.str[1:] not in KINDS:
        raise ValueError(f"array {info.filename!r} is of {dtype}, which is no dtype of weights")
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"array {info.filename!r} has shape {shape}")
    needs = length + math.prod(shape) * dtype.itemsize
    if needs != info.file_size:
        raise ValueError(
            f"array {info.filename!r} {list(shape)} of {dtype} needs {needs} bytes with its header, and has "
            f"{info.file_size}"
        )
    return Declared(shape, in_reverse, dtype, length)


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, declared: Declared) -> Tensor:
    is_bfloat16 = declared.dtype.str[1:] == BFLOAT16
    in_file = np.dtype(np.int16) if is_bfloat16 else declared.dtype
    array = np.empty(math.prod(declared.shape), in_file)
    filled = array.view(np.uint8)
    with archive.open(info) as file:
        file.read(declared.length)
        for start in range(0, filled.size, PART):
            part = filled[start : start + PART]
            read = file.read(part.size)
            if len(read) < part.size:
                raise ValueError(f"array {info.filename!r} ends before its {filled.size} bytes")
            part[:] = np.frombuffer(read, np.uint8)
    if not in_file.isnative:
        array = array.byteswap(inplace=True).view(in_file.newbyteorder())
    tensor = torch.from_numpy(array)
    if is_bfloat16:
        tensor = tensor.view(torch.bfloat16)
    if declared.reversed:
        return tensor.view(declared.shape[::-1]).permute(*reversed(range(len(declared.shape))))
    return tensor.view(declared.shape)
