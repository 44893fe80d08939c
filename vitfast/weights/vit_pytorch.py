"""vit-pytorch's names for our parameters.

A model with `input_norm` keeps its parameters in vit-pytorch's shapes and order, so conversion is renaming, and an
optimizer state of vit-pytorch's `ViT` (release 1.16.1 or newer) fits as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitfast.config import ViTConfig
from vitfast.weights.names import rename_keys

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
        if isinstance(state.get(key), Tensor):
            state[key] = without_batch(state[key])
    return state


def without_batch(tokens: Tensor) -> Tensor:
    """[1, N, D] -> [N, D]; any other as it is."""
    return tokens.squeeze(0) if tokens.dim() == 3 and tokens.shape[0] == 1 else tokens


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
