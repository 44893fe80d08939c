"""What the benchmarks share: names of files."""

from __future__ import annotations

import re


def slug(text: str) -> str:
    """`text` as a part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
