"""`vitfast parity A B`: two models stage by stage, for a person and for CI."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitfast
from vitfast.check.case import DTYPES
from vitfast.config import ViTConfig
from vitfast.parity.chain import Outside
from vitfast.parity.compare import compare
from vitfast.parity.pictures import image_of
from vitfast.parity.sources import FORMS, is_name, model_of, same_weights, size_of, statistics_of

FIELDS = {field.name for field in dataclasses.fields(ViTConfig)} | {"grid", "key", "resampling"}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 for parity, 1 for none, 2 for wrong use."""
    parser = argparse.ArgumentParser(
        prog="vitfast parity",
        description="Compare two models stage by stage on the same images, and say where they differ first and why.",
        epilog=f"A and B: {FORMS}. A name alone has random weights; B of vitfast or timm then takes those of A.",
    )
    parser.add_argument("a", metavar="A", help="a model; its rounding is the yardstick")
    parser.add_argument("b", metavar="B", nargs="?", help="the model that is judged")
    parser.add_argument("--kernels", action="store_true", help="A on stock operators against A on vitfast's ops")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; random pixels else")
    parser.add_argument("--size", type=_size, help="of the images: 224 or 224x448 (default: A's)")
    parser.add_argument("--dtype", choices=DTYPES, help="to compare arithmetic in (default: A's)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of random pixels and weights (default: 0)")
    parser.add_argument("--as", dest="as_", metavar="LAYOUT", help="the layout of a file of weights")
    parser.add_argument("--field", action="append", default=[], type=_field, metavar="NAME=VALUE",
                        help="a field of ViTConfig that a file of weights does not tell")  # fmt: skip
    parser.add_argument("--tap", action="append", default=[], type=_tap, metavar="STAGE=VALUE",
                        help="a value inside of an ONNX file")  # fmt: skip
    parser.add_argument("--pretrained", action="store_true", help="timm's own weights for a name of timm")
    parser.add_argument("--gradients", action="store_true", help="what each stage hands back, too")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--plot", metavar="FILE", help="a picture of error by depth")
    arguments = parser.parse_args(argv)
    if (arguments.b is None) != arguments.kernels:
        parser.error("B is required, or --kernels in its place")
    if arguments.tap and not any(str(text).endswith(".onnx") for text in (arguments.a, arguments.b)):
        parser.error("--tap names values of an ONNX file, and neither A nor B is one")
    unknown = [name for name, _ in arguments.field if name not in FIELDS]
    if unknown:
        parser.error(f"--field must name a field of ViTConfig, got {', '.join(unknown)}")
    if arguments.plot and not Path(arguments.plot).absolute().parent.is_dir():
        parser.error(f"--plot: no folder {str(Path(arguments.plot).parent)!r}")
    try:
        a, b, images = _read(arguments)
        dtype = DTYPES[arguments.dtype] if arguments.dtype else None
        found = compare(a, b, images, dtype=dtype, gradients=arguments.gradients)
        if arguments.plot:
            from vitfast.parity.plot import draw

            draw(found, Path(arguments.plot))
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError, RuntimeError) as error:
        print(f"vitfast parity: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
    return 0 if found.ok else 1


def _read(arguments: argparse.Namespace) -> tuple[Any, Any, Tensor]:
    models: list[Any] = []
    for text in (arguments.a, arguments.b) if arguments.b is not None else (arguments.a,):
        fields = {"as_": arguments.as_, "taps": dict(arguments.tap), "seed": arguments.seed}
        try:
            models.append(model_of(text, pretrained=arguments.pretrained, **fields, **dict(arguments.field)))
        except (ValueError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{text}: {error}") from error
    if arguments.kernels:
        models = [*_on_stock_and_on_ops(_module(models[0], arguments.a), torch.device(arguments.device))]
    a, b = models
    named = [text is not None and not arguments.pretrained and is_name(text) for text in (arguments.a, arguments.b)]
    if named[1]:
        same_weights(b, _module(a, arguments.a))
    elif named[0] and not arguments.kernels:
        same_weights(a, _module(b, arguments.b))
    known = a if isinstance(a, nn.Module) else b
    channels, *size = size_of(known)
    height, width = arguments.size or size
    if arguments.image:
        statistics = statistics_of(known)
        images = torch.stack([image_of(path, (channels, height, width), *statistics) for path in arguments.image])
    else:
        generator = torch.Generator().manual_seed(arguments.seed)
        images = torch.randn(2, channels, height, width, generator=generator)
    return a, b, images.to(arguments.device)


def _on_stock_and_on_ops(model: nn.Module, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The model on PyTorch's operators and on vitfast's: ours lowered or as it is, another one as it is or patched."""
    model, other = model.to(device).eval(), copy.deepcopy(model).to(device).eval()
    if isinstance(model, vitfast.ViT):
        model.exportable = True
    else:
        vitfast.patch(other)
    return model, other


def _module(model: Any, text: str) -> nn.Module:
    if isinstance(model, Outside):
        raise ValueError(f"{text} has no weights that the other model could take: give that one's file")
    return model


def _size(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if not 1 <= len(parts) <= 2 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"must be a number or ROWSxCOLUMNS, got {text!r}")
    return int(parts[0]), int(parts[-1])


def _tap(text: str) -> tuple[str, str]:
    stage, _, value = text.partition("=")
    if not stage or not value:
        raise argparse.ArgumentTypeError(f"must be STAGE=VALUE, got {text!r}")
    return stage, value


def _field(text: str) -> tuple[str, Any]:
    name, value = _tap(text)
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
