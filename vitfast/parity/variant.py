"""A model in its canonical form, a `ViT` in fp64 on stock operators, that substitutions are tried on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitfast.loading.load import load
from vitfast.model.vit import ViT
from vitfast.parity.adapters.own import vit
from vitfast.parity.chain import Chain, Stage, clone_in
from vitfast.weights.layouts import LAYOUTS
from vitfast.weights.resample import resample_pos_embed

# (stage's name, its own run) -> the run that takes its place
Wrapper = Callable[[str, Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Variant:
    """A model to change: the original stays, a change is made to a `copy`.

    Attributes:
        model: its modules are its own, its weights are shared until one is replaced.
        images: of which size its stages are made for.
        learned: positions before they were resampled to these images, with their grid; None where they were not.
        wrappers: what is done around stages.
    """

    model: ViT
    images: Tensor
    learned: tuple[Tensor, tuple[int, int], str] | None = None
    wrappers: tuple[Wrapper, ...] = ()

    def copy(self, blocks: Sequence[int] | None = None) -> Variant:
        """One whose modules may be changed; with `blocks` only these of its blocks."""
        shared = [] if blocks is None else [m for i, m in enumerate(self.model.blocks) if i not in blocks]
        return replace(self, model=_restructured(self.model, {id(module) for module in shared}))

    def wrapped(self, wrapper: Wrapper) -> Variant:
        return replace(self, wrappers=(*self.wrappers, wrapper))

    def span(self, start: str, stop: str, x: Tensor) -> Tensor | None:
        """The value of stage `stop` where that of `start` is `x`; None where it can't be computed."""
        stages = vit(self.model, self.images)
        for wrapper in self.wrappers:
            stages = tuple(Stage(s.name, s.source, wrapper(s.name, s.run)) for s in stages)
        try:
            return Chain("", stages, lambda _: {}).span(start, stop, x)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return None


def _restructured(module: Any, shared: set[int]) -> Any:
    """New modules around the same weights; `copy.deepcopy` takes 20 times as long."""
    if id(module) in shared:
        return module
    new = module.__class__.__new__(module.__class__)
    new.__dict__.update(vars(module))
    for table in ("_parameters", "_buffers"):
        new.__dict__[table] = dict(vars(module)[table])
    new.__dict__["_modules"] = {
        name: None if child is None else _restructured(child, shared) for name, child in module._modules.items()
    }
    return new


def around(stage: str, before: Callable[[Tensor], Tensor] | None, after: Callable[[Tensor], Tensor] | None) -> Wrapper:
    """What is done to the value that a stage takes, and to the one that it gives."""

    def wrapper(name: str, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        if name != stage:
            return run

        def changed(x: Tensor) -> Tensor:
            y = run(x if before is None else before(x))
            return y if after is None else after(y)

        return changed

    return wrapper


def canonical(exact: nn.Module, images: Tensor) -> Variant:
    """The `ViT` that computes what `exact` computes, as `vitfast.load` makes it.

    Args:
        exact: in fp64; of Hugging Face's classifiers that no ViT has the head of, the model inside is taken.

    Raises:
        ValueError, RuntimeError, NotImplementedError, TypeError: there is none; says why.
    """
    device, mode = images.device, "timm"
    if isinstance(exact, ViT):
        model = clone_in(exact, torch.float64, device, torch.float64)
    else:
        with warnings.catch_warnings():
            # of NaN, which the comparison tells
            warnings.simplefilter("ignore")
            model = _loaded(exact, device)
        mode = next(each.resampling for each in LAYOUTS if each.name == model.load_report.layout)
    model.eval().requires_grad_(False)
    model.exportable = True
    model.distilled_training = False
    size = tuple(images.shape[2:])
    if model.pos_embed is None or model.config.input_norm or size == model.patch_embed.img_size:
        return Variant(model, images)
    grid = model.patch_embed.dynamic_feat_size(size)
    variant = Variant(model, images, (model.pos_embed.detach(), model.patch_embed.grid_size, mode))
    place_positions(variant, grid, mode)
    return variant


def _loaded(exact: nn.Module, device: torch.device) -> ViT:
    try:
        return load(exact, dtype=torch.float64, device=device)
    except NotImplementedError:
        inner = next((getattr(exact, name) for name in INSIDE if name in exact._modules), None)
        if inner is None:
            raise
    return load(inner, dtype=torch.float64, device=device)


INSIDE = ("vit", "deit", "dinov2", "dinov2_with_registers")


def place_positions(variant: Variant, grid: tuple[int, int], mode: str) -> None:
    """Resample the learned positions to `grid`, so that images of this size are the model's own."""
    model = variant.model
    if variant.learned is None:
        return
    rows, old, _ = variant.learned
    rows = resample_pos_embed(rows, grid, old, model._positioned_prefix(), mode=mode)
    set_parameter(model, "pos_embed", rows)
    stem = model.patch_embed
    stem.img_size, stem.grid_size, stem.num_patches = tuple(variant.images.shape[2:]), grid, grid[0] * grid[1]


def set_parameter(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Put another weight in the place of a copy's, whose tensor may be shared."""
    module._parameters[name] = None if value is None else nn.Parameter(value, requires_grad=False)


class Rounded(TorchDispatchMode):
    """Products whose operands are rounded as TF32, bf16 or fp16 keep them, and summed up in fp64.

    results: round these too, as an operator in half precision does.
    """

    def __init__(self, to: str, results: bool = False):
        super().__init__()
        self.to, self.results = to, results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        # a bias is rounded where the result is
        first, last = (0, 3) if self.results else PRODUCTS[name]
        args = tuple(round_to(each, self.to) if first <= i < last else each for i, each in enumerate(args))
        out = func(*args, **(kwargs or {}))
        return round_to(out, self.to) if self.results else out


# op -> which of its arguments are multiplied
PRODUCTS = {
    "mm": (0, 2), "bmm": (0, 2), "addmm": (1, 3), "baddbmm": (1, 3), "convolution": (0, 2),
    "_scaled_dot_product_flash_attention_for_cpu": (0, 3), "_scaled_dot_product_efficient_attention": (0, 3),
}  # fmt: skip


def round_to(x: Any, to: str) -> Any:
    """A tensor with as many bits as `to` keeps, in its dtype."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    if to != "tf32":
        return x.to({"bf16": torch.bfloat16, "fp16": torch.float16}[to]).to(x.dtype)
    # 10 bits after the leading one, to nearest: what is added carries into the last bit that stays
    bits = x.float().contiguous().view(torch.int32)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return bits.view(torch.float32).to(x.dtype)


def kinds_between(variant: Variant, start: str, stop: str) -> list[tuple[str, int | None]]:
    """The stages from `start` to `stop`, each as its kind and the number of its block."""
    chain = Chain("", vit(variant.model, variant.images), lambda _: {})
    path = [stop, *chain.before(stop)]
    path = path[: path.index(start)]
    found: list[tuple[str, int | None]] = []
    for name in reversed(path):
        parts = name.split(".")
        found.append((parts[2], int(parts[1])) if len(parts) == 3 else (name, None))
    return found
