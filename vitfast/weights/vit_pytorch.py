"""vit-pytorch's names for our parameters, and the attributes of its ViT that wrappers read.

A model with `input_norm` keeps its parameters in vit-pytorch's shapes and order, so conversion is renaming, and an
optimizer state of vit-pytorch's `ViT` (release 1.16.1 or newer) fits as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vitfast.config import ViTConfig
from vitfast.weights.names import rename_keys
from vitfast.weights.views import PatchEmbeddingView, Patchify, TransformerView

if TYPE_CHECKING:
    from vitfast.vit import ViT

ATTRIBUTES = ("to_patch_embedding", "transformer", "pos_embedding", "mlp_head", "dropout", "pool")

# (vit-pytorch, vitfast); {i} is the block
NAMES = (
    ("cls_token", "cls_token"),
    ("pos_embedding", "pos_embed"),
    ("to_patch_embedding.1.", "patch_embed.input_norm."),
    ("to_patch_embedding.2.", "patch_embed.proj."),
    ("to_patch_embedding.3.", "patch_embed.norm."),
    ("transformer.norm.", "norm."),
    ("transformer.layers.{i}.0.norm.", "blocks.{i}.norm1."),
    ("transformer.layers.{i}.0.to_qkv.", "blocks.{i}.attn.qkv."),
    ("transformer.layers.{i}.0.to_out.0.", "blocks.{i}.attn.proj."),
    ("transformer.layers.{i}.1.net.0.", "blocks.{i}.norm2."),
    ("transformer.layers.{i}.1.net.1.", "blocks.{i}.mlp.fc1."),
    ("transformer.layers.{i}.1.net.4.", "blocks.{i}.mlp.fc2."),
    ("mlp_head.", "head."),
)


# what each of its models has, and no other library
OWN_BLOCKS = r"(to_patch_embedding\.|transformer\.layers\.\d+\.[01]\.)"


def is_layout(state_dict: Mapping[str, Any], config: ViTConfig) -> bool:
    """Whether there are names of vit-pytorch; of single ones only a model of its architecture can tell."""
    if config.input_norm:
        return any(ours(key) != key for key in state_dict)
    return any(re.match(OWN_BLOCKS, key) for key in state_dict)


def ours(key: str) -> str:
    """Our name for vit-pytorch's; any other name as it is."""
    return _rename(key, 0)


def _rename(key: str, source: int) -> str:
    block = re.match(r"(?:transformer\.layers|blocks)\.(\d+)\.", key)
    for names in NAMES:
        old, new = (n.format(i=block[1]) if block else n for n in (names[source], names[1 - source]))
        if key == old or (old.endswith(".") and key.startswith(old)):
            return new + key[len(old) :]
    return key


def to_vitfast(state_dict: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """vit-pytorch's state dict under our names.

    Releases 1.4 to 1.16.0 kept tokens and positions with a batch dim of 1 (and a class token even for mean pooling);
    the batch dim is dropped here.

    Raises:
        ValueError: the model is not of vit-pytorch's architecture.
    """
    if not config.input_norm:
        raise ValueError(
            "load_state_dict: these are vit-pytorch weights; build the model with vitfast.ViT(image_size=..., ...), "
            "this one has another architecture (ViTConfig.input_norm is False)"
        )
    state = rename_keys(state_dict, ours)
    for key in ("cls_token", "pos_embed"):
        if isinstance(state.get(key), Tensor) and state[key].dim() == 3 and state[key].shape[0] == 1:
            state[key] = state[key].squeeze(0)
    return state


def from_vitfast(state_dict: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Our state dict under the names of vit-pytorch's current release, in its order.

    Raises:
        ValueError: the model is not of vit-pytorch's architecture, or not any more: names the weights.
    """
    if not config.input_norm:
        raise ValueError(
            "state_dict: layout='vit_pytorch' needs a model of vit-pytorch's architecture (ViTConfig.input_norm), "
            "got one of timm's"
        )
    # blocks compiled one by one
    state_dict = {key.replace("._orig_mod.", "."): value for key, value in state_dict.items()}
    renamed = {_rename(key, 1): value for key, value in state_dict.items()}
    wrong = [key for key in renamed if key in state_dict and key != "cls_token"]
    if "norm.weight" not in state_dict:
        wrong.append("no final norm")
    if wrong:
        raise ValueError(f"state_dict: layout='vit_pytorch' must have vit-pytorch's weights only, got {wrong}")
    return renamed


def attribute(model: ViT, name: str) -> Any:
    """What vit-pytorch calls `name`, for wrappers that read it.

    Raises:
        AttributeError: the model is of timm's architecture; the message says what to use.
    """
    instead = {
        "to_patch_embedding": "patch_embed",
        "transformer": "blocks and norm",
        "pos_embedding": "pos_embed",
        "mlp_head": "head",
        "dropout": "pos_drop",
        "pool": "config.pool",
    }[name]
    if "config" not in model.__dict__ or not model.config.input_norm:
        raise AttributeError(
            f"ViT has {name!r} only in vit-pytorch's architecture (vitfast.ViT(image_size=..., ...)); "
            f"here use {instead!r}"
        )
    if name == "to_patch_embedding":
        embed = model.patch_embed
        return PatchEmbeddingView(Patchify(embed.patch_size), embed.input_norm, embed.proj, embed.norm).of(model)
    if name == "transformer":
        return TransformerView(model).of(model)
    if name == "pos_embedding":
        return model.pos_embed
    if name == "dropout":
        return model.pos_drop
    return None if isinstance(model.head, nn.Identity) else model.head


def assigned(model: ViT, name: str, value: Any) -> tuple[str, Any]:
    """Our name and value for what a user assigns under vit-pytorch's name; the config follows.

    Raises:
        AttributeError: assigning it would have no effect, or the model is of timm's architecture; says what to assign.
        ValueError: a pooling that vit-pytorch does not have, or that this model has no token for.
    """
    config = model.__dict__["config"]
    if not config.input_norm:
        if name in ("pool", "dropout"):
            return name, value
        attribute(model, name)
    if name == "pool":
        if value not in ("cls", "mean") or (value == "cls" and not config.class_token):
            allowed = "'cls' or 'mean'" if config.class_token else "'mean' (there is no class token)"
            raise ValueError(f"ViT.pool must be {allowed}, got {value!r}")
        if config.pool != "none":
            model.config = _pooled(config, value)
    elif name == "mlp_head" and value is None:
        # vit-pytorch's way of asking for tokens
        model.config, value = config.replace(num_classes=0, pool="none"), nn.Identity()
    elif name == "mlp_head":
        model.config = _pooled(config, model.__dict__["pool"])
    ours = {"mlp_head": "head", "pos_embedding": "pos_embed", "dropout": "pos_drop", "pool": "pool"}.get(name)
    if ours is None:
        raise AttributeError(
            f"ViT.{name} is a view and cannot be replaced; assign to the modules under `patch_embed`, `blocks` or "
            "`norm` instead"
        )
    return ours, value


def _pooled(config: ViTConfig, pool: str) -> ViTConfig:
    """With pooling by vit-pytorch's name; its mean is that of all tokens."""
    return config.replace(pool={"cls": "token", "mean": "mean"}[pool], pool_prefix=pool == "mean")
