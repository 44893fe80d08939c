"""What `vitfast tune` and `vitfast.warmup` measured on a card: one JSON file for each device and set of versions.

    $VITFAST_CACHE_DIR/tuning/<device>-<hash>.json     (~/.cache/vitfast where the variable is not set)

    {"schema": 1,
     "key": {"device", "driver", "torch", "triton", "vitfast", "kernels"},   for which it holds, and for nothing else
     "choices": [{"kernel", "shape", "use": "kernel" | "stock", "config", "kernel_ms", "stock_ms", "stock"}]}

Reading happens in the middle of somebody's training step, so a file that cannot be used is no error: it is as if there
were none, with one warning. Writing replaces the whole file at once. Of two processes that tune at the same time the
later one's choices may be all that is kept; no reader ever sees half a file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitfast.measure import nvml
from vitfast.measure.files import write_json
from vitfast.measure.machine import version
from vitfast.version import __version__

SCHEMA = 1
PACKAGE = Path(__file__).parents[1]
CONFIGS = "choose/config_tables.py"


class Choice(NamedTuple):
    """What runs a shape: the kernel with `config` (None: its built-in one), or stock operators. Times in ms.

    `stock` says which of these, where others than the built-in ones were faster, as `dispatch.stock_config` does.
    """

    kernel: bool
    config: Mapping[str, int | str] | None = None
    kernel_ms: float | None = None
    stock_ms: float | None = None
    stock: Mapping[str, int | str] | None = None


# by name of the kernel and its key of the shape
Table = dict[tuple[str, tuple[Hashable, ...]], Choice]

_warned: set[str] = set()


def folder() -> Path:
    """Where the files are."""
    return Path(os.path.expanduser(os.environ.get("VITFAST_CACHE_DIR") or "~/.cache/vitfast")) / "tuning"


def key_of(device: Hashable) -> dict[str, str]:
    """What a measurement on this CUDA device holds for: the card, its driver, and who compiles and runs the kernels."""
    return {
        "device": torch.cuda.get_device_properties(device).name,
        "driver": nvml.source(torch.device("cuda", device))["driver"] or "unknown",
        "torch": torch.__version__,
        "triton": version("triton") or "none",
        "vitfast": __version__,
        "kernels": kernels(),
    }


@functools.cache
def kernels() -> str:
    """A digest of what runs on a card, built-in configurations among it: versions stay the same between commits."""
    of_choices = ("choose/builtin.py", "choose/measured_sm*.json")
    found = [*sources(), *(path for name in ("_C.*", *of_choices) for path in sorted(PACKAGE.glob(name)))]
    return digest_of(found)


def sources() -> list[Path]:
    """The Python files of what runs on a card, with the tables of its configurations, in one order."""
    found = [*PACKAGE.glob("kernels/triton/*.py"), *PACKAGE.glob("kernels/cuda/*.py"), PACKAGE / CONFIGS]
    return sorted(path for path in found if path.exists())


def digest_of(paths: Iterable[Path]) -> str:
    """A digest of what is in these files, in this order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def path_of(key: Mapping[str, str]) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", key["device"].lower()).strip("-")
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return folder() / f"{name}-{digest}.json"


def load(device: Hashable) -> Table:
    """The choices for this device; empty where there is no file, or with a warning where it cannot be used."""
    path = folder()
    try:
        # nobody tuned here: then neither the device nor the driver need be asked
        if not path.is_dir():
            return {}
        key = key_of(device)
        path = path_of(key)
        return _parsed(path.read_bytes(), key)
    except FileNotFoundError:
        return {}
    # an op is waiting for the answer, and has one without any file
    except Exception as problem:
        if str(path) not in _warned:
            _warned.add(str(path))
            warnings.warn(
                f"vitfast: the tuning file {path} cannot be used and is left out: {type(problem).__name__}: {problem}. "
                "Ops run by the built-in table; `vitfast tune` writes the file anew",
                RuntimeWarning,
                stacklevel=2,
            )
        return {}


def store(device: Hashable, choices: Table) -> Path:
    """Add `choices` to the file of this device, in place of those with the same kernel and shape.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
        TypeError: a shape with something else than strings and ints, which would not be found again.
    """
    for kernel, shape in choices:
        if not all(isinstance(part, (str, int)) for part in shape):
            raise TypeError(f"{kernel}: the key of a shape must be strings and ints, got {shape}")
    key = key_of(device)
    path = path_of(key)
    merged = {**load(device), **choices}
    write_json(path, {"schema": SCHEMA, "key": key, "choices": [_line(*item) for item in merged.items()]})
    return path


def _line(name: tuple[str, tuple[Hashable, ...]], choice: Choice) -> dict[str, Any]:
    kernel, shape = name
    return {
        "kernel": kernel,
        "shape": list(shape),
        "use": "kernel" if choice.kernel else "stock",
        "config": None if choice.config is None else dict(choice.config),
        "kernel_ms": choice.kernel_ms,
        "stock_ms": choice.stock_ms,
        "stock": None if choice.stock is None else dict(choice.stock),
    }


def _parsed(text: bytes, key: Mapping[str, str]) -> Table:
    """The table in a file.

    Raises:
        ValueError: it is no such file, not whole, or of another device or version.
    """
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"it is not of schema {SCHEMA}")
    if data.get("key") != key:
        raise ValueError(f"it is for {data.get('key')}, and this is {dict(key)}")
    return dict(_choice(line) for line in data["choices"])


def _choice(line: Any) -> tuple[tuple[str, tuple[Hashable, ...]], Choice]:
    plain = (str, int)
    configs = line["config"], line.get("stock")
    whole = (
        isinstance(line["kernel"], str)
        and all(isinstance(part, plain) for part in line["shape"])
        and line["use"] in ("kernel", "stock")
        and all(
            config is None or (isinstance(config, dict) and all(isinstance(v, plain) for v in config.values()))
            for config in configs
        )
    )
    if not whole:
        raise ValueError(f"this line of it is not understood: {line}")
    choice = Choice(line["use"] == "kernel", configs[0], line.get("kernel_ms"), line.get("stock_ms"), configs[1])
    return (line["kernel"], tuple(line["shape"])), choice
