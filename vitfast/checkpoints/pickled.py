"""Files of torch.save, in its two formats: what is in them, compared with the size of the file on the way."""

from __future__ import annotations

import mmap
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from vitfast.checkpoints.files import is_zip
from vitfast.checkpoints.unpickler import Kind, Storage, Unpickler
from vitfast.checkpoints.zipped import LONGEST, most_of, opened, start_of

# torch's files before 1.6 begin with these two
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
PART = 1 << 20


def load_pickled(path: Path, *, mapped: bool = False) -> tuple[Any, bool]:
    """What the file holds, on the CPU, and whether stand-ins may be in it.

    Args:
        mapped: tensors are views of the file where that can be, not of memory. They are right as long as nobody writes
            into the file.

    Raises:
        Exception: of any class; a damaged or hostile file can do that.
    """
    if is_zip(path):
        return _zipped(path, mapped)
    return _before_1_6(path)


def _zipped(path: Path, mapped: bool) -> tuple[Any, bool]:
    size = path.stat().st_size
    with opened(path) as (_, members):
        pass
    root = {name.partition("/")[0] for name in members}
    if len(root) != 1 or f"{min(root)}/data.pkl" not in members:
        raise ValueError("a zip archive, but none of torch.save")
    records = {name.partition("/")[2]: info for name, info in members.items()}
    if "constants.pkl" in records:
        raise ValueError("a TorchScript archive; save the state_dict() of torch.jit.load(path)")
    compressed = [name for name, info in records.items() if info.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise ValueError(f"{compressed[0]!r} is compressed, which torch.save never does")
    if records["data.pkl"].file_size > LONGEST:
        raise ValueError(f"it has a pickle of more than {LONGEST} bytes")
    loaded: dict[str, Storage] = {}
    whole = torch.UntypedStorage.from_file(str(path), False, size)
    with path.open("rb") as file:

        def content(name: str) -> bytes:
            file.seek(start_of(file, records[name], size))
            return file.read(records[name].file_size)

        order = content("byteorder").decode() if "byteorder" in records else "little"
        if order not in ("little", "big"):
            raise ValueError(f"its byte order is {order!r}")

        def storage(saved: Any) -> Storage:
            dtype, key, count = claim(saved, 5)
            if key not in loaded:
                info = records.get(f"data/{key}")
                if info is None:
                    raise ValueError(f"there is no storage {key!r}")
                claimed = count * dtype.itemsize
                if claimed > info.file_size:
                    raise ValueError(f"storage {key!r} claims {claimed} bytes and has {info.file_size}")
                start = start_of(file, info, size)
                data = whole[start : start + claimed]
                if not mapped or start % dtype.itemsize or order != sys.byteorder:
                    data = data.clone()
                if order != sys.byteorder:
                    data.byteswap(dtype)
                loaded[key] = Storage(data, dtype)
            return loaded[key]

        unpickler = Unpickler(content("data.pkl"), storage, most_of(size))
        return unpickler.load(), bool(unpickler.unknown)


def _before_1_6(path: Path) -> tuple[Any, bool]:
    size = path.stat().st_size
    left = size
    loaded: dict[str, Storage] = {}

    def storage(saved: Any) -> Storage:
        nonlocal left
        dtype, key, count = claim(saved, 6)
        if key not in loaded:
            left -= count * dtype.itemsize
            if left < 0:
                raise ValueError(f"storage {key!r} claims {count * dtype.itemsize} bytes in a file of {size}")
            loaded[key] = Storage(torch.UntypedStorage(count * dtype.itemsize), dtype)
        if saved[5] is None:
            return loaded[key]
        _, offset, elements = saved[5]
        if any(type(n) is not int or n < 0 for n in (offset, elements)):
            raise ValueError(f"a view of storage {key!r} begins at {offset} and has {elements} elements")
        start = offset * dtype.itemsize
        return Storage(loaded[key].data[start : start + elements * dtype.itemsize], dtype)

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        unpickler = Unpickler(data, storage, most_of(size))
        if unpickler.load() != MAGIC or unpickler.load() != PROTOCOL:
            raise ValueError("it is no file of torch.save")
        unpickler.load()  # of the machine
        content, keys = unpickler.load(), unpickler.load()
        if sorted(keys) != sorted(loaded):
            raise ValueError("it has other storages than it lists")
        for key in keys:
            memory, dtype = loaded[key]
            if unpickler.number("<q") * dtype.itemsize != memory.nbytes():
                raise ValueError(f"storage {key!r} has another size than its tensors say")
            filled = torch.empty(0, dtype=torch.uint8, device="cpu").set_(memory)
            for start in range(0, memory.nbytes(), PART):
                part = filled[start : start + PART]
                part.copy_(torch.frombuffer(bytearray(unpickler.read(part.numel())), dtype=torch.uint8))
    return content, bool(unpickler.unknown)


def claim(saved: Any, parts: int) -> tuple[torch.dtype, str, int]:
    """Dtype, key and number of elements of a storage, by its id in a pickle.

    Raises:
        ValueError: it is no such id.
    """
    if type(saved) is not tuple or len(saved) != parts or saved[0] != "storage":
        raise ValueError("it names a storage as torch.save does not")
    _, kind, key, _, count = saved[:5]
    if not isinstance(kind, Kind) or kind.dtype is None or type(key) is not str or type(count) is not int or count < 0:
        raise ValueError("it names a storage as torch.save does not")
    return kind.dtype, key, count
