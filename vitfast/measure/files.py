"""Files that are whole at any time, and JSON of measurements."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path | str, data: Mapping[str, Any]) -> None:
    """Write `data` so that at any time `path` holds either all that it held before or all of `data`."""
    write_text(path, json.dumps(plain(data), indent=1, allow_nan=False))


def write_text(path: Path | str, text: str) -> None:
    """Write `text` so that at any time `path` holds either all that it held before or all of `text`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, because only within one file system a rename is atomic
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def by_lines(head: Mapping[str, Any], rows: Iterable[str], named: bool) -> str:
    """JSON of `head` and after it "rows", a line for each text of `rows`: of an object where they are named."""
    opening, closing = "{}" if named else "[]"
    lines = ",\n".join(f"  {row}" for row in rows)
    return f'{json.dumps(plain(head), indent=1)[:-2]},\n "rows": {opening}\n{lines}\n {closing}\n}}\n'


def plain(value: Any) -> Any:
    """What JSON can hold: numbers that are not finite become None, unknown things their text."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
