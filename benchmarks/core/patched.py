"""Models of other libraries as they are and after `vitfast.patch`: inference, and the training step without optimizer.

Each library's own model is the baseline and the yardstick of its rows. Where `vitfast.patch` fuses nothing there is no
patched model to time, and the row says why.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

import vitfast
from benchmarks.core import models, rivals
from benchmarks.core.apart import recorded
from benchmarks.core.rivals import Network
from benchmarks.core.steps import MODES, Setting
from vitfast.check.case import Case, Function, Variant

KIND = "patched model"
PARTS = ("attention", "norm", "mlp", "patch_embed")
# besides all parts at once: each alone, or all but one
SPLITS = ("whole", "alone", "without")
SIZES = {"Ti": "vit_tiny_patch16_224", "S": "vit_small_patch16_224", "B": "vit_base_patch16_224"}
# the second of families that have `has_base`
USUAL = ("S", "B")
UNPATCHED, PATCHED = "unpatched", "patched"


class Family(NamedTuple):
    """A library: its package, its name in tables, and whether its ViT-B is among the usual rows."""

    package: str
    title: str
    has_base: bool = False


FAMILIES = {
    "timm": Family("timm", "timm", True),
    "hugging-face": Family("transformers", "Hugging Face", True),
    "torchvision": Family("torchvision", "torchvision"),
    "vit-pytorch": Family("vit_pytorch", "vit-pytorch"),
}


class Model(NamedTuple):
    """The ViT of a library, of a size of `SIZES` with patches of 16 pixels; image_size and depth where not its own."""

    family: str
    size: str
    image_size: int | None = None
    depth: int | None = None

    @property
    def options(self) -> dict[str, int]:
        given = {"img_size": self.image_size, "depth": self.depth}
        return {name: n for name, n in given.items() if n is not None}

    def meta(self) -> nn.Module:
        """A `vitfast.ViT` of its architecture, on no device."""
        with torch.device("meta"):
            ours = vitfast.create_model(SIZES[self.size], **self.options)
            if self.family == "vit-pytorch":
                same = ("image_size", "patch_size", "num_classes", "dim", "depth", "heads", "mlp_dim")
                ours = vitfast.ViT(**{name: getattr(ours.config, name) for name in same})
        return ours

    @property
    def key(self) -> tuple:
        """Libraries that have the same architecture have the same weights, and so the same truth."""
        return "patched", self.family == "vit-pytorch", self.size, *self.options.items()

    def network(self, empty: bool = False) -> Network:
        """With random weights, or with `empty` on no device."""
        meta = self.meta()
        weights = meta.state_dict() if empty else models.weights_of(self.key, meta)
        if self.family == "timm":
            return rivals.of_timm(SIZES[self.size], self.options, meta.config, weights)
        of = {
            "hugging-face": rivals.of_hugging_face, "torchvision": rivals.of_torchvision,
            "vit-pytorch": rivals.of_vit_pytorch,
        }  # fmt: skip
        return of[self.family](meta.config, weights)


@functools.cache
def found_in(model: Model) -> dict[str, dict[str, Any]]:
    """What `vitfast.patch` says of a model: what is "fused", by kind and number; what is "left", by kind and why."""
    report = vitfast.patch(model.network(empty=True).module)
    fused, left = dict[str, int](), dict[str, str]()
    for part in report.fused:
        fused[part.kind] = fused.get(part.kind, 0) + 1
    for part in report.left:
        left.setdefault(part.kind, part.reason)
    return {"fused": fused, "left": left}


@recorded
def patched(
    *, family: str, batch: int, size: str = "S", mode: str = "inference", dtype: str = "bf16", device: str = "cpu",
    split: str = "whole", image_size: int | None = None, depth: int | None = None,
) -> Case:  # fmt: skip
    """A library's ViT, unpatched and patched, with the same weights.

    Args:
        family, size, image_size, depth: as in `Model`.
        split: of `SPLITS`; all but 'whole' add a variant for each part.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    importlib.import_module(FAMILIES[family].package)
    setting = Setting(mode, dtype, False, torch.device(device), batch)
    model = Model(family, size, image_size, depth)
    ways = {PATCHED: dict.fromkeys(PARTS, True)}
    for part in PARTS if split != "whole" else ():
        name = f"{part} alone" if split == "alone" else f"without {part}"
        ways[name] = {each: (each == part) is (split == "alone") for each in PARTS}
    variants = {UNPATCHED: Variant(lambda: setting.eager(model.network()))}
    for name, parts in ways.items():
        variants[name] = Variant(lambda parts=parts: _patched(setting, model.network(), parts), ours=True)
    case = models.case_of_vit(
        # an own name for rows with parts, so that files of several runs keep both
        family if split == "whole" else f"{family} {split}", setting, "all", variants,
        models.truth_of(setting, model.key, model.network), model.meta(),
    )  # fmt: skip
    told = {"family": FAMILIES[family].title, "model": f"ViT-{size}/16", "split": split, **found_in(model)}
    return replace(case, kind=KIND, notes=case.notes | told)


def _patched(setting: Setting, network: Network, parts: dict[str, bool]) -> Function:
    """
    Raises:
        NotImplementedError: nothing is fused, so that it would be the unpatched model once more.
    """
    report = vitfast.patch(network.module, **parts)
    if not report.fused:
        why = "; ".join(dict.fromkeys(part.reason for part in report.left))
        raise NotImplementedError(f"nothing is fused: {why or 'it has no block that vitfast knows'}")
    return setting.eager(network)


def listed(
    names: Sequence[str] = (), *, device: str, dtypes: Sequence[str], batches: Sequence[int] = (1, 8),
    modes: Sequence[str] = MODES, sizes: Sequence[str] = (), split: str = "whole", image_size: int | None = None,
    depth: int | None = None,
) -> Iterator[Callable[[], Case]]:  # fmt: skip
    """Rows of these families, or of all; each is made when it is called.

    Args:
        sizes: of each family. By default S of all, and B of timm and Hugging Face, whose training takes one batch
            size only, for a step of eight images takes seconds.
    """
    # rows with the same truth one after the other
    for size, mode, batch in itertools.product(sizes or USUAL, modes, batches):
        if not sizes and size == "B" and mode == "training" and batch != min(batches):
            continue
        for family, dtype in itertools.product(names or FAMILIES, dtypes):
            if sizes or size == "S" or FAMILIES[family].has_base:
                yield partial(
                    patched, family=family, batch=batch, size=size, mode=mode, dtype=dtype, device=device, split=split,
                    image_size=image_size, depth=depth,
                )  # fmt: skip
