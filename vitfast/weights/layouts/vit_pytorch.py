"""vit-pytorch's names: of its ViT since release 0.7.0, and of SimpleViT.

Its releases changed them five times: 0.10.0 (`fn.fn.` became `fn.`), 1.0.0 (norms around the patch projection), 1.4.0
(no `fn.`, and a final norm in the transformer), 1.16.0 (no class token for mean pooling), 1.16.1 (tokens and positions
without a batch dim).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitfast.config import ViTConfig
from vitfast.weights.layouts.layout import (
    HEAD_DIM,
    Facts,
    Known,
    Layout,
    Rule,
    View,
    alone,
    grid_of,
    grid_side,
    needs,
    one,
    same,
    zeros,
)
from vitfast.weights.vit_pytorch import NAMES, without_batch

BLOCK = "transformer.layers.0"
TEMPERATURE = 10000.0


def _recognises(view: View, facts: Facts) -> str | None:
    names = f"{BLOCK}.0.to_qkv.weight", f"{BLOCK}.1.net.4.weight", "transformer.norm.weight"
    return _if_there(view, *names) if _has_tokens(view) else None


def _recognises_old(view: View, facts: Facts) -> str | None:
    names = f"{BLOCK}.0.fn.to_qkv.weight", f"{BLOCK}.1.fn.net.3.weight"
    return _if_there(view, *names) if _has_tokens(view) else None


def _recognises_simple(view: View, facts: Facts) -> str | None:
    names = f"{BLOCK}.0.to_qkv.weight", f"{BLOCK}.0.to_out.weight", f"{BLOCK}.1.net.3.weight"
    return _if_there(view, *names) if not {"pos_embedding", "cls_token"} & view.keys() else None


def _has_tokens(view: View) -> bool:
    # models with another kind of class token have it without a dim for tokens
    return all(name in view and view[name].dim() in (2, 3) for name in ("pos_embedding", "cls_token"))


def _if_there(view: View, *names: str) -> str | None:
    return f"{', '.join(names)} are there" if all(name in view for name in names) else None


def _describe(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    known = _common(view, facts, given, f"{BLOCK}.0", f"{BLOCK}.1.net.1.weight")
    _pooled(known, view, facts, given)
    classes = view.shape("mlp_head.weight")[0] if "mlp_head.weight" in view else 0
    if not classes and not given.get("num_classes") and "pool" not in {**facts.fields, **given}:
        known.fields["pool"] = "none"
        known.assumed["pool"] = "all tokens, as of release 1.17.3 with num_classes=0; there is no mlp_head"
    return _with_facts(known, facts, num_classes=classes, norm_after_pool=False)


def _describe_old(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    known = _common(view, facts, given, f"{BLOCK}.0.fn", f"{BLOCK}.1.fn.net.0.weight")
    _pooled(known, view, facts, given)
    classes = view.shape("mlp_head.1.weight")[0] if "mlp_head.1.weight" in view else 0
    # of one token a norm before pooling is the norm after it
    return _with_facts(known, facts, num_classes=classes, norm_after_pool=known.fields["pool"] == "mean")


def _describe_simple(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    known = _common(view, facts, given, f"{BLOCK}.0", f"{BLOCK}.1.net.1.weight")
    size = given.get("image_size", facts.fields.get("image_size"))
    if size is None:
        raise needs("image_size", ["(height, width)"], "its positions are computed, and weights do not tell how many")
    head = "linear_head.1.weight" if "linear_head.1.weight" in view else "linear_head.weight"
    return _with_facts(
        known, facts, image_size=size, pool="mean", class_token=False, dynamic_image_size=False,
        norm_after_pool="transformer.norm.weight" not in view,
        num_classes=view.shape(head)[0] if head in view else 0,
    )  # fmt: skip


def _common(view: View, facts: Facts, given: Mapping[str, Any], attention: str, fc1: str) -> Known:
    asked, assumed = {**facts.fields, **given}, dict[str, str]()
    input_norm = "to_patch_embedding.3.weight" in view
    D, pixels = view.shape(f"to_patch_embedding.{2 if input_norm else 1}.weight")
    channels, patch, why = _patch_of(pixels, facts, given)
    assumed |= {"patch_size": why} if why else {}
    fields: dict[str, Any] = {
        "dim": D, "depth": view.blocks(r"transformer\.layers\.(\d+)\."), "channels": channels, "patch_size": patch,
        "mlp_dim": view.shape(fc1)[0], "norm_eps": 1e-5, "activation": "gelu", "qkv_bias": False,
        "input_norm": input_norm, "dynamic_image_size": input_norm,
        "out_proj": any(name.startswith(f"{attention}.to_out.") for name in view),
    }  # fmt: skip
    inner = view.shape(f"{attention}.to_qkv.weight")[0] // 3
    if not fields["out_proj"]:
        # left out where the one head is as wide as a token
        fields |= {"heads": 1, "head_dim": inner}
    elif "heads" in asked or "head_dim" in asked:
        heads = asked["heads"] if "heads" in asked else inner // asked["head_dim"]
        fields |= {"heads": heads, "head_dim": asked.get("head_dim", inner // heads)}
    elif inner % HEAD_DIM == 0:
        fields |= {"heads": inner // HEAD_DIM, "head_dim": HEAD_DIM}
        assumed["heads"] = f"dim_head={HEAD_DIM} is vit-pytorch's default; the shapes do not tell"
    else:
        raise needs("heads", ["..."], f"the shapes do not tell, and {inner} is no multiple of {HEAD_DIM}")
    return Known(fields, assumed)


def _patch_of(pixels: int, facts: Facts, given: Mapping[str, Any]) -> tuple[int, tuple[int, int], str]:
    """Channels and patch of a projection that reads so many pixels, and why where nobody said.

    What was given may be of the model to be made, so it counts only where it makes as many pixels.

    Raises:
        NeedsArgument: neither of three channels nor of one is there such a square patch.
    """
    if "patch_size" in facts.fields:
        rows, columns = facts.fields["patch_size"]
        return pixels // (rows * columns), (rows, columns), ""
    numbers = (*([given["channels"]] if "channels" in given else []), 3, 1)
    if "patch_size" in given:
        patch = given["patch_size"]
        rows, columns = (patch, patch) if isinstance(patch, int) else patch
        for channels in numbers:
            if channels * rows * columns == pixels:
                return channels, (rows, columns), ""
    for channels in numbers:
        side = grid_side(pixels // channels)
        if pixels % channels == 0 and side is not None:
            return channels, (side, side), f"square, of {channels} channels; the shapes tell {pixels} pixels"
    raise needs("patch_size", ["(height, width)"], f"{pixels} pixels are no square patch of 3 channels or of 1")


def _pooled(known: Known, view: View, facts: Facts, given: Mapping[str, Any]) -> None:
    """Class token, pooling and image size."""
    fields, token = known.fields, view.shape("cls_token")[-2] == 1
    asked = {**facts.fields, **given}
    pool = asked.get("pool", "token" if token else "mean")
    if token and view["cls_token"].dim() == 3 and "pool" not in asked:
        known.assumed["pool"] = "vit-pytorch's default; before release 1.16.0 these weights can be of pool='mean' too"
    grid = grid_of(view.shape("pos_embedding")[-2], int(token), given)
    # where there is a class token vit-pytorch's mean is over it too
    fields.update(class_token=token, pool=pool, pool_prefix=token and pool == "mean")
    fields["image_size"] = tuple(g * p for g, p in zip(grid, fields["patch_size"], strict=True))


def _with_facts(known: Known, facts: Facts, **fields: Any) -> Known:
    return known._replace(fields=known.fields | dict(facts.fields) | fields)


def _without_batch(tensors: Sequence[Tensor], _: ViTConfig, own: Tensor) -> Tensor:
    return without_batch(tensors[0]) if own.dim() == 2 else tensors[0]


def _with_batch(weight: Tensor, _: ViTConfig) -> tuple[Tensor]:
    return (weight[None] if weight.dim() == 2 else weight,)


def _rules(config: ViTConfig) -> tuple[Rule, ...]:
    modules = [(ours, theirs) for theirs, ours in NAMES if theirs.endswith(".")]
    return (
        *_tokens(alone),
        *(rule for ours, theirs in modules for rule in same(ours.rstrip("."), theirs.rstrip("."))),
    )


def _rules_old(config: ViTConfig) -> tuple[Rule, ...]:
    layer = "transformer.layers.{i}"
    return (
        *_tokens(_with_batch),
        *_stem(config),
        *same("blocks.{i}.norm1", f"{layer}.0.norm"),
        one("blocks.{i}.attn.qkv.weight", f"{layer}.0.fn.to_qkv.weight"),
        *same("blocks.{i}.attn.proj", f"{layer}.0.fn.to_out.0"),
        *same("blocks.{i}.norm2", f"{layer}.1.norm"),
        *same("blocks.{i}.mlp.fc1", f"{layer}.1.fn.net.0"),
        *same("blocks.{i}.mlp.fc2", f"{layer}.1.fn.net.3"),
        *same("fc_norm" if config.norm_after_pool else "norm", "mlp_head.0"),
        *same("head", "mlp_head.1"),
    )


def _rules_simple(config: ViTConfig) -> tuple[Rule, ...]:
    layer = "transformer.layers.{i}"
    norm, head = ("linear_head.0", "linear_head.1") if config.norm_after_pool else ("transformer.norm", "linear_head")
    return (
        Rule("cls_token", (), zeros, _all_zero),
        Rule("pos_embed", (), _sines, _computed),
        *_stem(config),
        *same("blocks.{i}.norm1", f"{layer}.0.norm"),
        one("blocks.{i}.attn.qkv.weight", f"{layer}.0.to_qkv.weight"),
        one("blocks.{i}.attn.proj.weight", f"{layer}.0.to_out.weight"),
        Rule("blocks.{i}.attn.proj.bias", (), zeros, _all_zero),
        *same("blocks.{i}.norm2", f"{layer}.1.net.0"),
        *same("blocks.{i}.mlp.fc1", f"{layer}.1.net.1"),
        *same("blocks.{i}.mlp.fc2", f"{layer}.1.net.3"),
        *same("fc_norm" if config.norm_after_pool else "norm", norm),
        *same("head", head),
    )


def _tokens(split: Any) -> tuple[Rule, Rule]:
    names = [(ours, theirs) for theirs, ours in NAMES if not theirs.endswith(".")]
    cls_token, pos_embed = (one(ours, theirs, _without_batch, split) for ours, theirs in names)
    return cls_token, pos_embed


def _stem(config: ViTConfig) -> tuple[Rule, ...]:
    if config.input_norm:
        names = ("input_norm", "proj", "norm")
        return tuple(
            rule for i, name in enumerate(names, 1) for rule in same(f"patch_embed.{name}", f"to_patch_embedding.{i}")
        )
    return (
        one("patch_embed.proj.weight", "to_patch_embedding.1.weight", _convolution, _rows),
        one("patch_embed.proj.bias", "to_patch_embedding.1.bias"),
    )


def _convolution(tensors: Sequence[Tensor], config: ViTConfig, _: Tensor) -> Tensor:
    """[D, (row, column, channel)] -> [D, C, rows, columns]."""
    rows, columns = config.patch_size  # type: ignore[misc]  # a pair
    return tensors[0].unflatten(1, (rows, columns, config.channels)).permute(0, 3, 1, 2)


def _rows(weight: Tensor, _: ViTConfig) -> tuple[Tensor]:
    return (weight.permute(0, 2, 3, 1).flatten(1),)


def _sines(_: Sequence[Tensor], config: ViTConfig, own: Tensor) -> Tensor:
    """Beyer et al., "Better plain ViT baselines for ImageNet-1k", 2022, as SimpleViT computes them in fp32."""
    quarter = config.dim // 4
    frequencies = 1.0 / TEMPERATURE ** (torch.arange(quarter, device="cpu") / (quarter - 1))
    rows, columns = (torch.arange(n, device="cpu")[:, None] * frequencies for n in config.grid_size)
    y, x = rows.repeat_interleave(len(columns), dim=0), columns.repeat(len(rows), 1)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).reshape(own.shape)


def _computed(weight: Tensor, config: ViTConfig) -> tuple[()]:
    if not torch.equal(weight, _sines((), config, weight).to(weight)):
        raise NotImplementedError("SimpleViT's positions are computed, these weights have others")
    return ()


def _all_zero(weight: Tensor, _: ViTConfig) -> tuple[()]:
    if weight.any():
        raise NotImplementedError("SimpleViT has no bias in attention's projection, these weights have one")
    return ()


ANCHOR = r"to_patch_embedding\.1\.weight"
# beside an encoder in MAE and SimMIM, a student in DINO and distillation
TRAINING = {
    r"//?(patch_to_emb|enc_to_dec|decoder|decoder_pos_emb|to_pixels)\.": "the decoder of masked pretraining",
    r"//?mask_token$": "the token that stands for hidden patches in pretraining",
    r"//?projector\.": "the projection head of DINO",
    r"//?(distillation_token$|distill_mlp\.|teacher\.)": "the teacher of distillation, its token and its head",
}
RENAME_OLD = ((r"(layers\.\d+\.[01])\.fn\.norm\.", r"\1.norm."), (r"\.fn\.fn\.", ".fn."))
LAYOUTS = (
    Layout(
        "vit-pytorch", "vit-pytorch's ViT", ANCHOR, _recognises, _describe, _rules, ignored=TRAINING,
    ),
    Layout(
        "vit-pytorch-1.2", "vit-pytorch's ViT before release 1.4", ANCHOR, _recognises_old, _describe_old, _rules_old,
        ignored=TRAINING, rename=RENAME_OLD,
    ),
    Layout(
        "vit-pytorch-simple", "vit-pytorch's SimpleViT", ANCHOR, _recognises_simple, _describe_simple, _rules_simple,
        ignored=TRAINING,
    ),
)  # fmt: skip
