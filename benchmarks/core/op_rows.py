"""Which rows of ops a benchmark has by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from vitfast.bench.case import Case
from vitfast.bench.op_case import MODES
from vitfast.bench.ops import FACTORIES, LINEARS

# tokens of an image with one class token: its size and patch
IMAGES = {197: (224, 16), 257: (224, 14), 577: (384, 16), 1025: (512, 16), 1370: (518, 14)}
# head dim: heads of a ViT that has it
HEADS = {64: 12, 72: 16, 80: 16}
WIDTHS = (768, 384, 1024, 192, 1280)
# as a block has them
PROJECTIONS = ("norm qkv", "proj", "norm fc1", "fc2")


def listed(
    names: Sequence[str] = tuple(FACTORIES), *, device: str, dtypes: Sequence[str], batches: Sequence[int],
    modes: Sequence[str] = MODES, tokens: Sequence[int] = tuple(IMAGES), widths: Sequence[int] | None = None,
    heads: Mapping[int, int] = HEADS,
) -> Iterator[Callable[[], Case]]:  # fmt: skip
    """The rows of the ops named, shorter sequences first; each is made when it is called.

    Args:
        widths: of all but attention; by default `WIDTHS`, of sequences longer than 257 the first, since these are only
            more rows to them; of patches of 518 x 518 images also DINOv2's.
        heads: of attention, {head dim: heads}.

    Raises:
        ValueError: patch_embed with a number of tokens that is not in `IMAGES`.
    """
    unknown = [n for n in tokens if n not in IMAGES]
    if "patch_embed" in names and unknown:
        raise ValueError(f"tokens of patch_embed must be among {', '.join(map(str, IMAGES))}, got {unknown[0]}")
    for n, dtype, batch, mode in ((n, d, b, m) for n in tokens for d in dtypes for b in batches for m in modes):
        for name in names:
            # DINOv2's large model is the one with such images
            usual = WIDTHS if n <= 257 else (768, 1024) if (name, n) == ("patch_embed", 1370) else WIDTHS[:1]
            for shape in _shapes(name, n, widths or usual, heads):
                yield partial(FACTORIES[name], **shape, batch=batch, mode=mode, dtype=dtype, device=device)


def tiny(
    names: Sequence[str] = tuple(FACTORIES), *, device: str, dtypes: Sequence[str], batches: Sequence[int],
    modes: Sequence[str] = MODES,
) -> Iterator[Callable[[], Case]]:  # fmt: skip
    """One small shape of each op named, and of each kind of it, to see whether all runs."""
    for dtype, batch, mode in ((d, b, m) for d in dtypes for b in batches for m in modes):
        for name in names:
            for shape in _tiny_shapes(name):
                yield partial(FACTORIES[name], **shape, batch=batch, mode=mode, dtype=dtype, device=device)


def _shapes(name: str, tokens: int, widths: Sequence[int], heads: Mapping[int, int]) -> Iterator[dict[str, Any]]:
    if name == "attention":
        yield from ({"tokens": tokens, "heads": count, "head_dim": dim} for dim, count in heads.items())
        return
    for width in widths:
        if name == "linear":
            yield from ({"tokens": tokens, "width": width, "kind": kind} for kind in PROJECTIONS)
        elif name == "patch_embed":
            size, patch = IMAGES[tokens]
            yield from ({"size": size, "patch": patch, "width": width, "images": i} for i in ("float", "uint8"))
        else:
            yield {"tokens": tokens, "width": width}


def _tiny_shapes(name: str) -> Iterator[dict[str, Any]]:
    if name == "attention":
        yield {"tokens": 17, "heads": 2, "head_dim": 8}
    elif name == "linear":
        yield from ({"tokens": 17, "width": 32, "kind": kind} for kind in LINEARS)
    elif name == "patch_embed":
        yield from ({"size": 32, "patch": 8, "width": 32, "images": i} for i in ("float", "uint8"))
    else:
        yield {"tokens": 17, "width": 32}
