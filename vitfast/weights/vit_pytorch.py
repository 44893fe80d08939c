"""vit-pytorch's names for our parameters, and the attributes of its ViT that wrappers read.

A model with `input_norm` keeps its parameters in vit-pytorch's shapes and order, so conversion is renaming, and an
optimizer state of vit-pytorch's `ViT` (release 1.16.1 or newer) fits as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vitfast import reference
from vitfast.config import ViTConfig
from vitfast.weights.state_dict import rename_keys

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


def is_layout(state_dict: Mapping[str, Any]) -> bool:
    """Whether the keys are those of a vit-pytorch ViT."""
    theirs = ("to_patch_embedding.", "transformer.layers.", "transformer.norm.")  # CLIP's text is a `transformer` too
    return any(key.startswith(theirs) for key in state_dict)


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
        ValueError: the model is not of vit-pytorch's architecture, or the weights come from a release before 1.4,
            whose blocks have other modules.
    """
    if not config.input_norm:
        raise ValueError(
            "load_state_dict: these are vit-pytorch weights; build the model with vitfast.ViT(image_size=..., ...), "
            "this one has another architecture (ViTConfig.input_norm is False)"
        )
    if "transformer.norm.weight" not in state_dict:
        raise ValueError(
            "load_state_dict: these vit-pytorch weights have no transformer.norm: they come from a release before 1.4, "
            "whose architecture differs"
        )
    state = rename_keys(state_dict, lambda key: _rename(key, 0))
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


class Patchify(nn.Module):
    """Images -> patch rows with pixels in (row, column, channel) order, as vit-pytorch's Rearrange."""

    def __init__(self, patch_size: tuple[int, int]):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        return reference.patch_rows(images, self.patch_size, "hwc")


class View(nn.Module):
    """Modules of a ViT under vit-pytorch's name, made anew at every look. The model's own forward does not call it, so
    what would be silent elsewhere is refused: hooks, and assignments into it.
    """

    instead = ""

    def register_forward_hook(self, *args, **kwargs):
        raise NotImplementedError(f"a hook on this view would never fire; {self.instead}")

    register_forward_pre_hook = register_full_backward_hook = register_forward_hook
    register_full_backward_pre_hook = register_forward_hook

    def __setattr__(self, name: str, value: Any) -> None:
        refused = isinstance(value, nn.Module) or name in self._modules or name == "forward"
        if self.__dict__.get("complete") and refused:
            raise AttributeError(f"assigning {name!r} to this view would have no effect; {self.instead}")
        super().__setattr__(name, value)


class PatchEmbeddingView(View, nn.Sequential):
    """vit-pytorch's `to_patch_embedding`: cut, LayerNorm, Linear, LayerNorm."""

    instead = "use `model.patch_embed` and its `input_norm`, `proj` and `norm`"

    def __setitem__(self, *args) -> None:
        raise TypeError(f"changing this view would have no effect; {self.instead}")

    __delitem__ = append = insert = extend = pop = __setitem__


class TransformerView(View):
    """vit-pytorch's `transformer`: the blocks and the final norm."""

    instead = (
        "use `model.blocks[i]` with its `norm1`, `attn`, `norm2` and `mlp`, and `model.norm`, whose output is what "
        "vit-pytorch's `transformer` returns (`model.forward_intermediates` gives tokens of any block)"
    )

    def __init__(self, model: ViT):
        super().__init__()
        self.blocks, self.norm = model.blocks, model.norm
        self.complete = True

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x))

    def modules(self):
        # vit-pytorch's Recorder looks here for modules of vit-pytorch's own classes, and would find none
        raise NotImplementedError(
            "transformer.modules(): there is no module that computes attention weights, and none of vit-pytorch's "
            f"classes; {self.instead}"
        )

    @property
    def layers(self):
        raise NotImplementedError(f"transformer.layers: {self.instead}")


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
        view = PatchEmbeddingView(Patchify(embed.patch_size), embed.input_norm, embed.proj, embed.norm)
        view.complete = True
        return view
    if name == "transformer":
        return TransformerView(model)
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
