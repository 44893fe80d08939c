"""What takes seconds says how far it is, where somebody looks."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path
from types import TracebackType

# bytes of a file that takes a while
LARGE = 1_000_000_000
SECONDS = 0.2
PART = 1 << 20


class Progress:
    """`name: 45 %` in one line on stderr; nothing where that is no terminal, or little is to be done.

    Args:
        what: what is being done.
        total: bytes.
    """

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done, self.last = what, total, 0, 0.0
        self.shown = total >= LARGE and sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def add(self, count: int) -> None:
        self.done += count
        if self.shown and time.monotonic() - self.last > SECONDS:
            self.last = time.monotonic()
            print(f"\r{self.what}: {100 * self.done // self.total} %", end="", file=sys.stderr, flush=True)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.shown and self.last:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file in hexadecimal digits, read part by part."""
    path, digest = Path(path), hashlib.sha256()
    with path.open("rb") as file, Progress(f"sha256 of {path.name}", path.stat().st_size) as progress:
        while part := file.read(PART):
            digest.update(part)
            progress.add(len(part))
    return digest.hexdigest()
