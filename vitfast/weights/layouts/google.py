"""Google's ViTs as their npz files have them: vision_transformer, AugReg, big_vision and the vision tower of SigLIP.

Names are those of flax's modules. What differs between releases (numbers of modules, where the positions stand, blocks
stacked by a scan) is told by the names; eps and GELU are flax's defaults, which all of Google's code takes.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitfast.config import ViTConfig
from vitfast.weights.layouts.layout import HALF, Facts, Known, Layout, Part, Rule, View, grid_of, grid_side, one

BLOCK, SCANNED = "Transformer/encoderblock_{i}", "Transformer/encoderblock/"
ATTENTION, MLP, POOL = "MultiHeadDotProductAttention_0", "MlpBlock_0", "MAPHead_0"
SIDE = 224  # of the images of all of big_vision's models with fixed positions
# Google's input pipelines resize to the square; those of ImageNet from scratch crop, which weights do not tell
IMAGES = HALF | {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}


def _recognises(view: View, facts: Facts, scan: bool, learned: bool) -> str | None:
    if any(re.match(r"//(params|opt/target)/(img/)?embedding/kernel$", name) for name in view):
        return None  # an optimizer's averages, which have the names of the weights
    block = SCANNED if scan else BLOCK.format(i=0) + "/"
    if f"{block}{ATTENTION}/query/kernel" not in view or ("pos_embedding" in view) != learned:
        return None
    if view["embedding/kernel"].dim() == 2:
        raise NotImplementedError(
            "these are weights of SigLIP2's NaFlex (a linear embedding/kernel), which reads patches of any shape"
        )
    return f"embedding/kernel and {block.rstrip('/')}{' of all blocks' * scan} are there"


def _describe(view: View, facts: Facts, given: Mapping[str, Any], scan: bool, learned: bool) -> Known:
    height, width, channels, D = view.shape("embedding/kernel")
    block = SCANNED if scan else BLOCK.format(i=0) + "/"
    # the leading axis is that of the blocks
    of_block = lambda name: view.shape(block + name)[int(scan) :]  # noqa: E731
    query = of_block(f"{ATTENTION}/query/kernel")
    depth = view.shape(f"{SCANNED}LayerNorm_0/scale")[0] if scan else view.blocks(r"Transformer/encoderblock_(\d+)/")
    fields: dict[str, Any] = {
        "dim": D, "depth": depth, "heads": query[1], "head_dim": query[2], "channels": channels,
        "mlp_dim": of_block(f"{MLP}/Dense_0/kernel")[1], "patch_size": (height, width), "activation": "gelu_tanh",
        "norm_eps": 1e-6, "class_token": "cls" in view, "norm_after_pool": False,
        "num_classes": _classes(view, given),
    }  # fmt: skip
    assumed = {
        "activation": "flax's nn.gelu is the tanh form, and Google's code has no other; timm reads these with erf",
        "norm_eps": "flax's default, which Google's code takes",
        "preprocessing": "as Google's code resizes to the model's size; weights do not tell",
    }
    if f"{POOL}/probe" in view:
        fields["pool"] = "map"
    elif "cls" in view:
        fields["pool"] = "token"
    elif any(name.startswith("/llm/") for name in view):
        fields["pool"], assumed["pool"] = "none", "as PaliGemma, whose language model reads all tokens"
    else:
        fields["pool"], assumed["pool"] = "mean", "there is neither cls nor MAPHead_0: big_vision's 'gap'"
    if learned:
        fields["pos_embed"], grid = _positions(view, given)
    else:
        size = given.get("image_size", SIDE)
        size = (size, size) if isinstance(size, int) else size
        grid = given.get("grid", (size[0] // height, size[1] // width))
        fields["pos_embed"] = "patches" if "cls" in view else "all"
        assumed["pos_embed"] = "there are none: big_vision's fixed ones, sincos2d"
        if "image_size" not in given and "grid" not in given:
            assumed["image_size"] = "as all of big_vision's with fixed positions; the weights do not tell"
    fields["image_size"] = (grid[0] * height, grid[1] * width)
    return Known(fields, assumed, IMAGES)


def _classes(view: View, given: Mapping[str, Any]) -> int:
    """Of the classifier, if ours can hold it.

    Raises:
        NotImplementedError: it reads a representation layer, and the user did not ask for another.
    """
    classes = view.shape("head/kernel")[1] if "head/kernel" in view else 0
    if "pre_logits/kernel" not in view:
        return classes
    asked = given.get("num_classes")
    if asked is None or asked == classes != 0:
        raise NotImplementedError(
            "there is a representation layer (pre_logits, linear and tanh) before the classifier, which ViTConfig does "
            "not have: num_classes=0 takes the backbone alone, another number puts a new classifier on it"
        )
    return 0


def _positions(view: View, given: Mapping[str, Any]) -> tuple[str, tuple[int, int]]:
    """The field pos_embed and the grid: releases before 2022 have a position for the class token."""
    rows = view.shape("pos_embedding")[1]
    patches = math.prod(given["grid"]) if "grid" in given else None
    for_all = rows - 1 == patches if patches is not None else grid_side(rows) is None
    if "cls" not in view:
        return "all", grid_of(rows, 0, given)
    if for_all:
        return "all", grid_of(rows, 1, given)
    return "patches", grid_of(rows, 0, given)


# between flax's axes (input first, heads apart) and ours


def _swapped(tensors: Sequence[Tensor], *_: Any) -> Tensor:
    return tensors[0].transpose(0, 1)


def _with_heads(tensor: Tensor, dim: int, config: ViTConfig) -> Tensor:
    """Checked, since without their own axis heads of another number would fit."""
    if tensor.shape[dim] != config.heads:
        raise ValueError(f"heads must be {tensor.shape[dim]}, as the weights have them, got {config.heads}")
    return tensor


def _projections(tensors: Sequence[Tensor], config: ViTConfig, _: Tensor) -> Tensor:
    return torch.cat([_with_heads(t, 1, config).flatten(1).transpose(0, 1) for t in tensors])


def _biases(tensors: Sequence[Tensor], config: ViTConfig, _: Tensor) -> Tensor:
    return torch.cat([_with_heads(t, 0, config).flatten() for t in tensors])


def _attention(ours: dict[str, tuple[str, ...]], proj: str, theirs: str) -> tuple[Rule, ...]:
    """Attention whose projections are joined: our name -> theirs."""
    rules: list[Rule] = []
    for name, parts in ours.items():
        count, at = len(parts), [f"{theirs}/{part}" for part in parts]
        weight = lambda w, config, n=count: [p.T.unflatten(1, (config.heads, -1)) for p in w.chunk(n)]  # noqa: E731
        bias = lambda b, config, n=count: [p.unflatten(0, (config.heads, -1)) for p in b.chunk(n)]  # noqa: E731
        rules.append(Rule(f"{name}.weight", tuple(f"{part}/kernel" for part in at), _projections, weight))
        rules.append(Rule(f"{name}.bias", tuple(f"{part}/bias" for part in at), _biases, bias))
    out = one(
        f"{proj}.weight", f"{theirs}/out/kernel",
        lambda tensors, config, _: _with_heads(tensors[0], 0, config).flatten(0, 1).transpose(0, 1),
        lambda weight, config: (weight.T.unflatten(0, (config.heads, -1)),),
    )  # fmt: skip
    return (*rules, out, one(f"{proj}.bias", f"{theirs}/out/bias"))


def _dense(ours: str, theirs: str) -> tuple[Rule, Rule]:
    weight = one(f"{ours}.weight", f"{theirs}/kernel", _swapped, lambda weight, _: (weight.T,))
    return weight, one(f"{ours}.bias", f"{theirs}/bias")


def _norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return one(f"{ours}.weight", f"{theirs}/scale"), one(f"{ours}.bias", f"{theirs}/bias")


def _mlp(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (*_dense(f"{ours}.fc1", f"{theirs}/Dense_0"), *_dense(f"{ours}.fc2", f"{theirs}/Dense_1"))


def _sincos(config: ViTConfig) -> Tensor:
    """Fixed positions [1, N, D] as MoCo v3's: sine and cosine of the column, then of the row."""
    rows, columns = config.grid_size
    frequencies = 10_000 ** -torch.linspace(0, 1, config.dim // 4, dtype=torch.float64, device="cpu")
    y, x = torch.meshgrid(*(torch.arange(n, device="cpu") for n in (rows, columns)), indexing="ij")
    x, y = (place.flatten()[:, None] * frequencies for place in (x, y))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None]


def _fixed(positions: Tensor, config: ViTConfig) -> tuple[Tensor, ...]:
    if not torch.equal(positions, _sincos(config).to(positions.dtype)):
        raise NotImplementedError("big_vision's sincos2d has no place for pos_embed, which is another")
    return ()


def _of_block(rule: Rule, block: int) -> Rule:
    """A rule of block {i} for one of the blocks that a scan stacked."""

    def join(tensors: Sequence[Tensor], config: ViTConfig, own: Tensor) -> Tensor:
        for tensor in tensors:
            if tensor.shape[0] != config.depth:
                raise ValueError(f"there must be {config.depth} blocks, got {tensor.shape[0]}")
        return rule.join([tensor[block] for tensor in tensors], config, own)

    split = lambda weight, config: [Part(block, made[None]) for made in rule.split(weight, config)]  # type: ignore[misc]  # noqa: E731
    theirs = tuple(name.replace("_{i}", "") for name in rule.theirs)
    return Rule(rule.ours.replace("{i}", str(block)), theirs, join, split)


def _rules(config: ViTConfig, scan: bool, learned: bool) -> tuple[Rule, ...]:
    blocks = (
        *_norm("blocks.{i}.norm1", f"{BLOCK}/LayerNorm_0"),
        *_attention({"blocks.{i}.attn.qkv": ("query", "key", "value")}, "blocks.{i}.attn.proj", f"{BLOCK}/{ATTENTION}"),
        *_norm("blocks.{i}.norm2", f"{BLOCK}/LayerNorm_1"),
        *_mlp("blocks.{i}.mlp", f"{BLOCK}/{MLP}"),
    )
    if scan:
        blocks = tuple(_of_block(rule, block) for block in range(config.depth) for rule in blocks)
    return (
        one("cls_token", "cls"),
        one("pos_embed", "pos_embedding")
        if learned
        else Rule("pos_embed", (), lambda _, config, own: _sincos(config).to(own.dtype), _fixed),
        one(
            "patch_embed.proj.weight", "embedding/kernel",
            lambda tensors, *_: tensors[0].permute(3, 2, 0, 1), lambda weight, _: (weight.permute(2, 3, 1, 0),),
        ),
        one("patch_embed.proj.bias", "embedding/bias"),
        *blocks,
        *_norm("norm", "Transformer/encoder_norm"),
        one("attn_pool.latent", f"{POOL}/probe"),
        *_attention(
            {"attn_pool.q": ("query",), "attn_pool.kv": ("key", "value")}, "attn_pool.proj", f"{POOL}/{ATTENTION}"
        ),
        *_norm("attn_pool.norm", f"{POOL}/LayerNorm_0"),
        *_mlp("attn_pool.mlp", f"{POOL}/{MLP}"),
        *_dense("head", "head"),
    )  # fmt: skip


IGNORED = {
    r"/txt/": "the text tower",
    r"/llm/": "the language model",
    r"/[tb]$": "scale and shift of the similarity of images and texts",
    r"//(opt|chrono)/": "the state of training",
    r"pre_logits/": "the representation layer, with the classifier that reads it",
    r"head/": "the classifier that reads the representation layer",
}
# names before flax counted modules by their class, and where positions and pooling stood before
OLDER = (
    (r"(encoderblock(?:_\d+)?/)LayerNorm_2/", r"\1LayerNorm_1/"),
    (r"(encoderblock(?:_\d+)?/)MultiHeadDotProductAttention_1/", rf"\1{ATTENTION}/"),
    (r"(encoderblock(?:_\d+)?/)MlpBlock_3/", rf"\1{MLP}/"),
    (r"^Transformer/(?:posembed_input/)?pos_embedding$", "pos_embedding"),
    (r"^(probe$|(?:MlpBlock|MultiHeadDotProductAttention|LayerNorm)_0/)", rf"{POOL}/\1"),
)


def _layout(scan: bool, learned: bool) -> Layout:
    bound = lambda function: functools.partial(function, scan=scan, learned=learned)  # noqa: E731
    return Layout(
        "google" + "-scan" * scan + "-sincos2d" * (not learned),
        f"Google's ViT{', its blocks stacked' * scan}{', its positions fixed' * (not learned)}",
        "embedding/kernel", bound(_recognises), bound(_describe), bound(_rules), ("img/", ""), IGNORED, "google", OLDER,
    )  # fmt: skip


LAYOUTS = tuple(_layout(scan, learned) for learned in (True, False) for scan in (False, True))
