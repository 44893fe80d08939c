"""What comes before the blocks, and may be done otherwise: pixels, patches, positions, prefix tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vitfast import reference
from vitfast.parity.substitutions.substitution import (
    Blocks,
    Substitution,
    eps,
    eps_of_norms,
    no_bias,
    on_model,
    removed,
)
from vitfast.parity.variant import Variant, around, place_positions, set_parameter
from vitfast.weights.resample import MODES

# mean and std by which images are prepared
STATISTICS = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "CLIP's": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "no": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def of_patches(variant: Variant) -> Iterator[Substitution]:
    model = variant.model
    if model.config.channels == 3:
        yield _images("channel order", "channels in the order blue, green, red", lambda x: x.flip(1))
        yield from _statistics()
    for factor, told in ((255.0, "times 255"), (1 / 255, "divided by 255")):
        yield _images("pixel scale", f"pixels {told}", lambda x, f=factor: x * f)
    yield from _pixels(variant)
    (rows, columns), patch = model.patch_embed.grid_size, model.patch_embed.patch_size
    if rows == columns and patch[0] == patch[1]:
        yield _images("transposed", "images transposed", lambda x: x.transpose(2, 3))

    def by_columns(x: Tensor) -> Tensor:
        return x.unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2)

    change = lambda v, _: v.wrapped(around("patches", None, by_columns))  # noqa: E731
    yield Substitution("patch order", "patches column by column", change)
    yield Substitution("bias", "without the bias of the patches", on_model(lambda m: no_bias(m.patch_embed.proj)))
    yield Substitution("norm", "without the norm of the patches", on_model(lambda m: removed(m.patch_embed, "norm")))
    yield from eps(variant)
    yield from eps_of_norms(variant, "patch_embed.norm", "patch_embed.input_norm")


def _images(name: str, what: str, change: Callable[[Tensor], Tensor]) -> Substitution:
    return Substitution(name, what, lambda variant, _: variant.wrapped(around("patches", change, None)))


def _statistics() -> Iterator[Substitution]:
    for (one, (mean, std)), (other, (new_mean, new_std)) in itertools.permutations(STATISTICS.items(), 2):

        def change(x: Tensor, mean=mean, std=std, new_mean=new_mean, new_std=new_std) -> Tensor:  # noqa: ANN001
            m, s, n, t = (torch.tensor(v, dtype=x.dtype, device=x.device).view(-1, 1, 1) for v in (
                mean, std, new_mean, new_std
            ))  # fmt: skip
            return (x * s + m - n) / t

        yield _images("mean and std", f"{other} mean and std of pixels in place of {one}", change)


def _pixels(variant: Variant) -> Iterator[Substitution]:
    """Pixels of a patch that the projection reads in another order."""
    patch = variant.model.patch_embed.patch_size
    own = "hwc" if variant.model.config.input_norm else "chw"
    sizes = {"c": variant.model.config.channels, "h": patch[0], "w": patch[1]}
    for order in map("".join, itertools.permutations("chw")):
        if order == own:
            continue

        # what is read as `own` was written in this order, or the other way round
        def change(x: Tensor, written: str, read: str) -> Tensor:
            rows = reference.patch_rows(x, patch)
            rows = rows.unflatten(2, [sizes[each] for each in "chw"])
            rows = rows.permute(0, 1, *("chw".index(each) + 2 for each in written)).flatten(2)
            rows = rows.unflatten(2, [sizes[each] for each in read])
            rows = rows.permute(0, 1, *(read.index(each) + 2 for each in "chw"))
            return _images_of(rows, x)

        told = ", ".join(order)
        yield _images("pixel order", f"pixels of a patch read as ({told})", lambda x, o=order: change(x, o, own))
        yield _images("pixel order", f"pixels of a patch written as ({told})", lambda x, o=order: change(x, own, o))


def _images_of(rows: Tensor, like: Tensor) -> Tensor:
    """Patches [B, N, C, h, w] -> images."""
    B, _, C, h, w = rows.shape
    grid = like.shape[2] // h, like.shape[3] // w
    return rows.unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).reshape(B, C, grid[0] * h, grid[1] * w)


def of_patch_tokens(variant: Variant) -> Iterator[Substitution]:
    yield from _resampling(variant)
    yield from _positions(variant)
    yield from _prefix(variant)
    yield Substitution(
        "norm", "without norm_pre", on_model(lambda m: hasattr(m, "norm_pre") and removed(m, "norm_pre"))
    )
    yield from eps(variant)
    yield from eps_of_norms(variant, "norm_pre")


def _resampling(variant: Variant) -> Iterator[Substitution]:
    if variant.learned is None:
        return
    grid = variant.model.patch_embed.grid_size
    for mode in MODES:
        if mode == variant.learned[2]:
            continue

        def change(variant: Variant, _: Blocks, mode: str = mode) -> Variant:
            place_positions(variant, grid, mode)
            return variant

        yield Substitution("resampling", f"positions resampled as {mode!r}, not {variant.learned[2]!r}", change)


def _positions(variant: Variant) -> Iterator[Substitution]:
    """Positions that are absent, or off by some rows."""
    model = variant.model
    if model.pos_embed is None:
        return
    held = model.pos_embed.dim()
    prefix = model.num_prefix_tokens if variant.model.config.pos_embed == "all" else 0
    grid = model.patch_embed.grid_size

    def on_rows(what: str, change: Callable[[Tensor], Tensor]) -> Substitution:
        def run(variant: Variant, _: Blocks) -> Variant:
            rows = variant.model.pos_embed.reshape(-1, variant.model.config.dim)
            changed = change(rows)
            set_parameter(variant.model, "pos_embed", changed[None] if held == 3 else changed)
            return variant

        return Substitution("positions", what, run)

    yield on_rows("no positions", torch.zeros_like)
    for shift in range(1, max(prefix, 1) + 1):
        yield on_rows(f"positions {shift} row(s) further on", lambda rows, n=shift: rows.roll(n, 0))
        yield on_rows(f"positions {shift} row(s) before", lambda rows, n=shift: rows.roll(-n, 0))
    if prefix:
        yield on_rows(
            "no positions of prefix tokens", lambda rows: torch.cat([torch.zeros_like(rows[:prefix]), rows[prefix:]])
        )
        yield on_rows(
            "no positions of patches", lambda rows: torch.cat([rows[:prefix], torch.zeros_like(rows[prefix:])])
        )
    if prefix > 1:
        for at in range(1, prefix):
            yield on_rows(
                f"positions of prefix tokens turned by {at}",
                lambda rows, n=at: torch.cat([rows[:prefix].roll(n, 0), rows[prefix:]]),
            )
    yield on_rows(
        "positions column by column",
        lambda rows: torch.cat(
            [rows[:prefix], rows[prefix:].unflatten(0, grid[::-1]).transpose(0, 1).flatten(0, 1)]
        ),
    )  # fmt: skip


def _prefix(variant: Variant) -> Iterator[Substitution]:
    """Prefix tokens that are zero, missing or elsewhere."""
    count = variant.model.num_prefix_tokens
    if not count:
        return
    named = {"cls_token": "class", "dist_token": "distillation", "reg_token": "register"}
    at = 0
    for name, told in named.items():
        token = getattr(variant.model, name, None)
        if token is None or not token.numel():
            continue
        rows = token.numel() // variant.model.config.dim
        zero = on_model(lambda m, n=name: set_parameter(m, n, torch.zeros_like(getattr(m, n))))
        yield Substitution("prefix", f"{told} tokens of zeros", zero)
        yield _tokens(f"without {told} tokens", lambda x, a=at, n=rows: torch.cat([x[:, :a], x[:, a + n :]], dim=1))
        at += rows
    yield _tokens("prefix tokens after the patches", lambda x: x.roll(-count, 1))
    for shift in range(1, count):
        turned = lambda x, n=shift: torch.cat([x[:, :count].roll(n, 1), x[:, count:]], dim=1)  # noqa: E731
        yield _tokens(f"prefix tokens turned by {shift}", turned)


def _tokens(what: str, change: Callable[[Tensor], Tensor]) -> Substitution:
    return Substitution("prefix", what, lambda variant, _: variant.wrapped(around("patch_tokens", None, change)))
