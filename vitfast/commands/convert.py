"""The command `vitfast convert`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitfast.check.case import DTYPES
from vitfast.checkpoints.files import INDEX, file_of, shards_of
from vitfast.checkpoints.hub import hub_file, is_hub_name
from vitfast.checkpoints.not_finite import not_finite
from vitfast.checkpoints.progress import sha256_of
from vitfast.config import ViTConfig
from vitfast.loading.convert import checked, convert
from vitfast.loading.report import LoadReport
from vitfast.loading.take import take
from vitfast.loading.write import WRITERS
from vitfast.weights.layouts import LAYOUTS
from vitfast.weights.layouts.layout import NeedsArgument
from vitfast.weights.resample import MODES

FIELDS = {field.name for field in dataclasses.fields(ViTConfig)}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where the source is broken or cannot be written so, 2 for wrong use."""
    parser = _parser()
    told = parser.parse_args(argv)
    if (told.out is None) != told.inspect:
        parser.error("give OUT, or --inspect without it")
    try:
        options = _options(told)
        if not told.inspect:
            checked(told.out, told.to, told.force)
    except (ValueError, OSError) as problem:
        return _failed(2, problem)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            text = _inspected(told, options) if told.inspect else _written(told, options)
    except NeedsArgument as problem:
        return _failed(2, f"{problem} (--field NAME=VALUE, or the option of that name)")
    except (ValueError, TypeError, RuntimeError, NotImplementedError, OSError, ImportError) as problem:
        return _failed(1, problem)
    except KeyboardInterrupt:
        print("vitfast convert: stopped; nothing was written", file=sys.stderr)
        return 130
    for warning in caught:
        print(f"vitfast convert: {warning.message}", file=sys.stderr)
    print(text)
    return 0


def _failed(status: int, problem: Exception | str) -> int:
    print(f"vitfast convert: {problem}", file=sys.stderr)
    return status


def _written(told: argparse.Namespace, options: dict[str, Any]) -> str:
    dtype = DTYPES[told.dtype] if told.dtype else None
    report = convert(told.source, told.out, told.to, dtype=dtype, force=told.force, **options)
    if told.json:
        return json.dumps(_told(report) | {"out": told.out, "to": told.to}, indent=2)
    return f"{report}\nwritten to {told.out} under the names of {told.to}"


def _inspected(told: argparse.Namespace, options: dict[str, Any]) -> str:
    """What was recognised; each weight is freed once it was looked at."""
    taken = take(told.source, **options)
    parameters, sizes, bad = 0, dict[str, int](), list[str]()
    for name, weight in taken.weights:
        parameters += weight.numel()
        dtype = str(weight.dtype).removeprefix("torch.")
        sizes[dtype] = sizes.get(dtype, 0) + weight.nbytes
        bad += not_finite({name: weight})
    report = dataclasses.replace(taken.report, not_finite=tuple(bad))
    files = [
        {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in _files(told.source)
    ]
    if told.json:
        return json.dumps(_told(report) | {"parameters": parameters, "bytes": sizes, "files": files}, indent=2)
    usual = ViTConfig().to_dict()
    own = ", ".join(f"{name}={value}" for name, value in report.config.to_dict().items() if value != usual[name])
    held = ", ".join(f"{size / 1e6:.1f} MB of {dtype}" for dtype, size in sizes.items())
    lines = [str(report), f"  config: {own}", f"  {parameters:,} numbers, {held}"]
    lines += [f"  {each['file']}: {each['bytes']:,} bytes, sha256 {each['sha256']}" for each in files]
    return "\n".join(lines)


def _files(source: str) -> list[Path]:
    path = file_of(hub_file(source) if is_hub_name(source) else source)
    return [path, *shards_of(path)] if path.name.endswith(INDEX) else [path]


def _options(told: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `vitfast.load`.

    Raises:
        ValueError: a --field that is none.
    """
    names = ("num_classes", "image_size", "patch_size", "channels", "grid", "resampling", "as_", "key")
    options = {name: value for name in names if (value := getattr(told, name)) is not None}
    for text in told.field:
        name, equals, value = text.partition("=")
        if not equals or name not in FIELDS:
            raise ValueError(f"--field must be NAME=VALUE with a field of ViTConfig, got {text!r}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return options | ({"allow_pickle": True} if told.allow_pickle else {})


def _told(report: LoadReport) -> dict[str, Any]:
    return dataclasses.asdict(report) | {"config": report.config.to_dict()}


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return int(text)


def _sides(text: str) -> tuple[int, int]:
    height, times, width = text.partition("x")
    sides = _number(height), _number(width if times else height)
    if 0 in sides:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text!r}")
    return sides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitfast convert",
        description="Read the weights of a ViT, whoever wrote them, and write them under another library's names, each "
        "with its dtype and its bits. What the other library's models do not compute is refused.",
    )
    add = parser.add_argument
    add("source", metavar="IN", help="a file, a folder, or hf-hub:owner/name")
    add("out", metavar="OUT", nargs="?", help="a file (.safetensors, .pth), or a folder with config files too")
    add("--to", choices=WRITERS, default="timm", help="whose names (default: %(default)s)")
    add("--inspect", action="store_true", help="say what was recognised and why, and write nothing")
    add(
        "--as",
        dest="as_",
        choices=[layout.name for layout in LAYOUTS],
        metavar="LAYOUT",
        help="in place of recognising",
    )
    add("--key", help="of a file with several models, the one to take: teacher, state_dict ...")
    add("--allow-pickle", action="store_true", help="read pickled files too (nothing that they name is run)")
    add("--num-classes", type=_number, metavar="N", help="another classifier, zero; 0 for none")
    add("--image-size", type=_sides, metavar="PIXELS", help="resample positions: 384, or height and width, 384x512")
    add("--patch-size", type=_sides, metavar="PIXELS", help="resample the projection")
    add("--channels", type=_number, metavar="N", help="sum or repeat the projection's channels, as timm does")
    add("--grid", type=_sides, metavar="ROWSxCOLUMNS", help="of positions that are not square")
    add("--resampling", choices=MODES, help="how (default: as the library of the weights)")
    add(
        "--field",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of ViTConfig: activation=quick_gelu, heads=12",
    )
    add("--dtype", choices=DTYPES, help="of all weights (default: their own)")
    add("--force", action="store_true", help="replace OUT, once all is written")
    add("--json", action="store_true", help="machine-readable")
    return parser
