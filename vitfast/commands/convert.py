"""The command `vitfast convert`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from vitfast.check.case import DTYPES
from vitfast.checkpoints.files import file_of
from vitfast.checkpoints.hub import hub_file, is_hub_name
from vitfast.checkpoints.progress import sha256_of
from vitfast.config import ViTConfig
from vitfast.loading.convert import convert
from vitfast.loading.report import LoadReport
from vitfast.loading.take import Taken, take
from vitfast.loading.write import WRITERS
from vitfast.weights.layouts import LAYOUTS
from vitfast.weights.resample import MODES

FIELDS = {field.name: field for field in dataclasses.fields(ViTConfig)}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where the source is broken or cannot be written so, 2 for wrong use."""
    parser = _parser()
    told = parser.parse_args(argv)
    if (told.out is None) != told.inspect:
        parser.error("give OUT, or --inspect without it")
    try:
        options = _options(told)
    except ValueError as problem:
        parser.error(str(problem))
    try:
        if told.inspect:
            taken = take(told.source, **options)
            print(_as_json(taken, told.source) if told.json else _as_text(taken, told.source))
            return 0
        dtype = DTYPES[told.dtype] if told.dtype else None
        report = convert(told.source, told.out, told.to, dtype=dtype, force=told.force, **options)
    except FileExistsError as problem:
        print(f"vitfast convert: {problem}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, RuntimeError, NotImplementedError, OSError, ImportError) as problem:
        print(f"vitfast convert: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vitfast convert: stopped; nothing was written", file=sys.stderr)
        return 130
    print(json.dumps(_told(report), indent=2) if told.json else f"{report}\nwritten to {told.out} for {told.to}")
    return 0


def _options(told: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `vitfast.load`.

    Raises:
        ValueError: a --field that is none.
    """
    names = ("num_classes", "image_size", "patch_size", "channels", "grid", "resampling", "as_", "key")
    options = {name: value for name in names if (value := getattr(told, name)) is not None}
    for name in ("image_size", "patch_size"):
        if name in options:
            sides = options[name]
            options[name] = sides[0] if len(sides) == 1 else tuple(sides)
    options |= {"grid": tuple(told.grid)} if told.grid else {}
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


def _as_json(taken: Taken, source: str) -> str:
    weights = {
        name: {"shape": list(w.shape), "dtype": str(w.dtype).removeprefix("torch.")} for name, w in taken.weights
    }
    return json.dumps(_told(taken.report) | {"sha256": _sha256(source), "weights": weights}, indent=2)


def _as_text(taken: Taken, source: str) -> str:
    fields = taken.report.config.to_dict()
    default = {name: field.default for name, field in FIELDS.items()}
    own = ", ".join(f"{name}={value}" for name, value in fields.items() if value != default[name])
    number, sizes = 0, dict[str, int]()
    for _, weight in taken.weights:
        number += weight.numel()
        dtype = str(weight.dtype).removeprefix("torch.")
        sizes[dtype] = sizes.get(dtype, 0) + weight.nbytes
    held = ", ".join(f"{size / 1e6:.1f} MB of {dtype}" for dtype, size in sizes.items())
    lines = [str(taken.report), f"  config: {own}", f"  {number:,} numbers, {held}"]
    lines += [f"  sha256 of {name}: {digest}" for name, digest in _sha256(source).items()]
    return "\n".join(lines)


def _sha256(source: str) -> dict[str, str]:
    path = file_of(hub_file(source) if is_hub_name(source) else source)
    return {path.name: sha256_of(path)}


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
    add("--num-classes", type=int, metavar="N", help="another classifier, zero; 0 for none")
    add(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="resample positions; one number, or height and width",
    )
    add("--patch-size", type=int, nargs="+", metavar="PIXELS", help="resample the projection")
    add("--channels", type=int, metavar="N", help="sum or repeat the projection's channels, as timm does")
    add("--grid", type=int, nargs=2, metavar="N", help="rows and columns of positions that are not square")
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
