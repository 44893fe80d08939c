"""Zip archives as numpy and torch write them: what is in them, checked before any of it is read or given memory."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# Of weights little can be compressed, and blocks that share theirs are 12 or 24 at most: what a file may claim for each
# of its bytes. The rest is for small files, of which a name or a header is the larger part.
FACTOR, REST = 24, 1 << 20
# of names, shapes and other text, in bytes; safetensors has the same limit
LONGEST = 100_000_000
# more members than weights, averages and an optimizer's state of any model have
MOST = 50_000


def most_of(size: int) -> int:
    """How many bytes of tensors a file of that size can hold."""
    return FACTOR * size + REST


@contextmanager
def opened(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """The archive, and its members by their names.

    Raises:
        ValueError, zipfile.BadZipFile: what is listed is not what torch or numpy write, or cannot be in a file of
            this size.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # before a list of millions is made
        if end and end[zipfile._ECD_ENTRIES_TOTAL] > MOST:  # type: ignore[attr-defined]  # as above
            raise ValueError(f"its list names {end[4]} members, more than {MOST}")
        with zipfile.ZipFile(file) as archive:
            members: dict[str, zipfile.ZipInfo] = {}
            for info in archive.infolist():
                if info.filename in members:
                    raise ValueError(f"two members are called {info.filename!r}")
                why = _why_not(info, size)
                if why:
                    raise ValueError(f"member {info.filename!r} {why}")
                members[info.filename] = info
            claimed = sum(info.file_size for info in members.values())
            if claimed > most_of(size):
                raise ValueError(
                    f"its members claim {claimed} bytes, which weights in a file of {size} bytes cannot be: more than "
                    f"{FACTOR} for each"
                )
            yield archive, members


def _why_not(info: zipfile.ZipInfo, size: int) -> str | None:
    parts = info.filename.split("/")
    if info.filename.startswith("/") or ".." in parts or "\\" in info.filename:
        return "is a path out of the archive"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a symbolic link"
    if info.flag_bits & 1:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed by method {info.compress_type}, not stored or deflated"
    if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        return f"is stored in {info.compress_size} bytes and claims {info.file_size}"
    if info.header_offset < 0 or info.header_offset + info.compress_size > size:
        return f"ends after the file, which has {size} bytes"
    return None


def start_of(file: BinaryIO, info: zipfile.ZipInfo, size: int) -> int:
    """Where the bytes of a stored member begin in the file.

    Raises:
        ValueError: they are not there.
    """
    file.seek(info.header_offset)
    head = file.read(30)
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise ValueError(f"member {info.filename!r} does not begin where the list says")
    start = info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    if start + info.file_size > size:
        raise ValueError(f"member {info.filename!r} ends after the file, which has {size} bytes")
    return start
