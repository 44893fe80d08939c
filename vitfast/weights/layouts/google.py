"""Google's names, in npz files of JAX arrays: ViT and AugReg, big_vision's ViT, SigLIP's vision tower.

Sources:
  github.com/google-research/vision_transformer: vit_jax/models_vit.py, vit_jax/checkpoint.py
  github.com/google-research/big_vision: big_vision/models/vit.py (its `fix_old_checkpoints` and `scan_to_pyloop` too)
Kernels are [in, out], of attention [D, H, head_dim] and [H, head_dim, D], of the patch projection [h, w, C, D].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitfast.config import ViTConfig
from vitfast.weights.layouts.layout import (
    HALF,
    Facts,
    Known,
    Layout,
    Rule,
    View,
    grid_of,
    grid_side,
    one,
)

BLOCK = "Transformer/encoderblock_{i}"
TANH = "flax's nn.gelu, as in the original's code; timm takes erf for these weights"


def _recognises(view: View, facts: Facts) -> str | None:
    first = BLOCK.format(i=0)
    return f"embedding/kernel and {first} are there" if f"{first}/LayerNorm_0/scale" in view else None


def _describe(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    *patch, channels, D = view.shape("embedding/kernel")
    _, heads, head_dim = view.shape(f"{BLOCK.format(i=0)}/attention/query/kernel")
    if "pre_logits/kernel" in view and "num_classes" not in given:
        raise NotImplementedError(
            "pre_logits is a layer with tanh before the classifier, which ViTConfig does not have; num_classes=0 "
            "loads the model without both, num_classes=N with a new classifier"
        )
    classes = view.shape("head/kernel")[1] if "head/kernel" in view and "pre_logits/kernel" not in view else 0
    token, pooled = "cls" in view, "MAPHead_0/probe" in view
    pool = "map" if pooled else "token" if token else "mean"
    rows = view.shape("pos_embedding")[1]
    # later code of Google's adds positions before it puts the class token there
    of_patches = token and grid_side(rows) is not None
    grid = grid_of(rows, int(token and not of_patches), given)
    fields = {
        "dim": D, "channels": channels, "patch_size": tuple(patch), "heads": heads, "head_dim": head_dim,
        "depth": view.blocks(r"Transformer/encoderblock_(\d+)/"), "norm_eps": 1e-6, "activation": "gelu_tanh",
        "mlp_dim": view.shape(f"{BLOCK.format(i=0)}/mlp/Dense_0/kernel")[1], "num_classes": classes,
        "class_token": token, "pool": pool, "norm_after_pool": False,
        "pos_embed": "patches" if of_patches else "all",
        "image_size": tuple(g * p for g, p in zip(grid, patch, strict=True)),
    }  # fmt: skip
    assumed = {"activation": TANH, "preprocessing": "as the original's code prepares them; weights do not tell"}
    return Known(fields | dict(facts.fields), assumed, HALF | {"interpolation": "bilinear", "crop_pct": 1.0})


def _transposed(tensors: Sequence[Tensor], *_: Any) -> Tensor:
    return tensors[0].T


def _of_heads(kernel: Tensor) -> Tensor:
    """[D, H, head_dim] -> [H * head_dim, D], and a bias [H, head_dim] -> [H * head_dim]."""
    return kernel.flatten(1).T if kernel.dim() == 3 else kernel.flatten()


def _joined(ours: str, *theirs: str) -> tuple[Rule, Rule]:
    """Weight and bias of a projection to the heads of several of theirs."""

    def join(tensors: Sequence[Tensor], *_: Any) -> Tensor:
        return torch.cat([_of_heads(each) for each in tensors])

    def split_weight(weight: Tensor, config: ViTConfig) -> list[Tensor]:
        return [each.T.unflatten(1, (config.heads, -1)) for each in weight.chunk(len(theirs))]

    def split_bias(bias: Tensor, config: ViTConfig) -> list[Tensor]:
        return [each.unflatten(0, (config.heads, -1)) for each in bias.chunk(len(theirs))]

    kernels, biases = (tuple(f"{name}/{kind}" for name in theirs) for kind in ("kernel", "bias"))
    return Rule(f"{ours}.weight", kernels, join, split_weight), Rule(f"{ours}.bias", biases, join, split_bias)


def _dense(ours: str, theirs: str) -> tuple[Rule, Rule]:
    weight = one(f"{ours}.weight", f"{theirs}/kernel", _transposed, lambda weight, _: (weight.T,))
    return weight, one(f"{ours}.bias", f"{theirs}/bias")


def _out(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """The projection of the heads: [H, head_dim, D] -> [D, H * head_dim]."""
    weight = one(
        f"{ours}.weight", f"{theirs}/kernel", lambda tensors, *_: tensors[0].flatten(0, 1).T,
        lambda weight, config: (weight.T.unflatten(0, (config.heads, -1)),),
    )  # fmt: skip
    return weight, one(f"{ours}.bias", f"{theirs}/bias")


def _norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return one(f"{ours}.weight", f"{theirs}/scale"), one(f"{ours}.bias", f"{theirs}/bias")


def _rules(config: ViTConfig) -> tuple[Rule, ...]:
    attention, head = f"{BLOCK}/attention", "MAPHead_0"
    return (
        one("cls_token", "cls"),
        one("pos_embed", "pos_embedding"),
        one(
            "patch_embed.proj.weight", "embedding/kernel", lambda tensors, *_: tensors[0].permute(3, 2, 0, 1),
            lambda weight, _: (weight.permute(2, 3, 1, 0),),
        ),
        one("patch_embed.proj.bias", "embedding/bias"),
        *_norm("blocks.{i}.norm1", f"{BLOCK}/LayerNorm_0"),
        *_joined("blocks.{i}.attn.qkv", *(f"{attention}/{name}" for name in ("query", "key", "value"))),
        *_out("blocks.{i}.attn.proj", f"{attention}/out"),
        *_norm("blocks.{i}.norm2", f"{BLOCK}/LayerNorm_1"),
        *_dense("blocks.{i}.mlp.fc1", f"{BLOCK}/mlp/Dense_0"),
        *_dense("blocks.{i}.mlp.fc2", f"{BLOCK}/mlp/Dense_1"),
        *_norm("norm", "Transformer/encoder_norm"),
        one("attn_pool.latent", f"{head}/probe"),
        *_joined("attn_pool.q", f"{head}/attention/query"),
        *_joined("attn_pool.kv", *(f"{head}/attention/{name}" for name in ("key", "value"))),
        *_out("attn_pool.proj", f"{head}/attention/out"),
        *_norm("attn_pool.norm", f"{head}/LayerNorm_0"),
        *_dense("attn_pool.mlp.fc1", f"{head}/mlp/Dense_0"),
        *_dense("attn_pool.mlp.fc2", f"{head}/mlp/Dense_1"),
        *_dense("head", "head"),
    )  # fmt: skip


# flax numbers modules of a class, or of all classes in its first version, by their order
RENAME = (
    (r"(^|/)MultiHeadDotProductAttention_[01]/", r"\1attention/"),
    (r"(^|/)MlpBlock_[03]/", r"\1mlp/"),
    (r"(encoderblock(?:_\d+)?)/LayerNorm_2/", r"\1/LayerNorm_1/"),
    (r"(^|/)Transformer/(?:posembed_input/)?pos_embedding$", r"\1pos_embedding"),
    # the pooling's parts without its name, as while ViT-G was developed
    (r"^(probe|LayerNorm_0/\w+|attention/\w+/\w+|mlp/\w+/\w+)$", r"MAPHead_0/\1"),
)
IGNORED = {
    r"(pre_logits|head)/": "a classifier of two layers",
    r"/(txt/|[tb]$)": "the text tower, with scale and shift of the similarity",
    r"/+(state/|step$|opt/|chrono|loss)": "what training keeps beside the weights",
}
LAYOUTS = (
    Layout(
        "google", "Google's ViT in JAX", r"embedding/kernel", _recognises, _describe, _rules,
        ("img/", "target/", "params/", ""), IGNORED, "google", RENAME, stacked="Transformer/encoderblock",
    ),
)  # fmt: skip
