"""The attributes of vit-pytorch's ViT that wrappers read and assign, with views where we have no such module."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from vitfast import reference
from vitfast.config import ViTConfig
from vitfast.model.block import Attention
from vitfast.model.plain import watched_view

ATTRIBUTES = frozenset(("to_patch_embedding", "transformer", "pos_embedding", "mlp_head", "dropout", "pool"))


def _watches(register: Callable) -> Callable:
    """`register` of hooks, by which the model learns that it has to call the view."""

    @functools.wraps(register)
    def method(self: View, *args: Any, **kwargs: Any) -> Any:
        if self.model is None or not self.model.CALLS_VIEWS:
            raise NotImplementedError(f"a hook on this view would never fire; {self.instead}")
        handle = register(self, *args, **kwargs)
        self.model.__dict__.setdefault("_views", {})[self.name] = self
        return handle

    return method


class View(nn.Module):
    """Modules of a ViT under vit-pytorch's name, made anew at every look.

    The model calls its parts, and this in their place while it has hooks. What would be silent elsewhere is refused:
    hooks on a view that no model calls, and assignments into it.
    """

    instead = ""
    # of the attribute that it is
    name = ""
    model: nn.Module | None = None

    register_forward_hook = _watches(nn.Module.register_forward_hook)
    register_forward_pre_hook = _watches(nn.Module.register_forward_pre_hook)
    register_backward_hook = _watches(nn.Module.register_backward_hook)
    register_full_backward_hook = _watches(nn.Module.register_full_backward_hook)
    register_full_backward_pre_hook = _watches(nn.Module.register_full_backward_pre_hook)

    def of(self, model: nn.Module) -> View:
        """This view as an attribute of `model`, with the hooks that it was given there before."""
        earlier = model.__dict__.get("_views", {}).get(self.name)
        if earlier is not None:
            # the same dicts: a handle removes from these
            self.__dict__.update({name: held for name, held in vars(earlier).items() if "hook" in name})
        # the model is no part of its view
        self.__dict__.update(model=model, training=model.training, complete=True)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        refused = isinstance(value, nn.Module) or name in self._modules or name == "forward"
        if self.__dict__.get("complete") and refused:
            raise AttributeError(f"assigning {name!r} to this view would have no effect; {self.instead}")
        super().__setattr__(name, value)


class Patchify(View):
    """Images -> patch rows with pixels in (row, column, channel) order, as vit-pytorch's Rearrange."""

    instead = "use `model.patch_embed`"

    def __init__(self, patch_size: tuple[int, int]):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        return reference.patch_rows(images, self.patch_size, "hwc")


class PatchEmbeddingView(View, nn.Sequential):
    """vit-pytorch's `to_patch_embedding`: cut, LayerNorm, Linear, LayerNorm. Slices of it belong to no model."""

    instead = "use `model.patch_embed` and its `input_norm`, `proj` and `norm`"
    name = "to_patch_embedding"

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) if self.model is None else self.model.patch_embed(images)

    def __setitem__(self, *args) -> None:
        raise TypeError(f"changing this view would have no effect; {self.instead}")

    __delitem__ = append = insert = extend = pop = __setitem__


class TransformerView(View):
    """vit-pytorch's `transformer`: the blocks and the final norm."""

    instead = (
        "use `model.blocks[i]` with its `norm1`, `attn`, `norm2` and `mlp`, and `model.norm`, whose output is what "
        "vit-pytorch's `transformer` returns (`model.forward_intermediates` gives tokens of any block)"
    )
    name = "transformer"

    def __init__(self, model: nn.Module):
        super().__init__()
        self.blocks, self.norm = model.blocks, model.norm

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        return self.model._transform(x, **how)

    def modules(self) -> Iterator[nn.Module]:
        """The modules inside, and for each attention one of vit-pytorch's class, for which its Recorder looks here."""
        if not self.model.CALLS_VIEWS:
            raise NotImplementedError(
                "transformer.modules(): in a prepared model no module computes attention weights; use the original"
            )
        yield from super().modules()
        for module in super().modules():
            if type(module) is Attention:
                yield attention_view(module)

    @property
    def layers(self):
        raise NotImplementedError(f"transformer.layers: {self.instead}")


class AttentionView(View):
    """vit-pytorch's `Attention`, as far as it can be watched: `attend` is the softmax, called while it has hooks."""

    instead = "use `model.blocks[i].attn`, and `attend` and `dropout` here"

    def __init__(self, attn: Attention):
        nn.Module.__init__(self)
        self.heads, self.scale = attn.num_heads, attn.scale
        # kept beside the parts of the attention: as one of them it would be seen in every model
        self.attend = attn.__dict__.setdefault("_views", {}).setdefault("attend", nn.Softmax(dim=-1))
        self.dropout, self.to_qkv = attn.attn_drop, attn.qkv
        self.complete = True

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"this view does not compute; {self.instead}")


def attention_view(attn: Attention) -> AttentionView:
    """A view of vit-pytorch's own class where that exists.

    Its Recorder asks `isinstance`, and a class that derives from the one asked about is what is meant by that; the
    other ways to a yes are to lie in `__class__` or to change vit-pytorch's class. It is derived when somebody looks:
    vit-pytorch is no requirement, and who asks has imported it.
    """
    theirs = sys.modules.get("vit_pytorch.vit")
    return AttentionView(attn) if theirs is None else _derived(theirs.Attention)(attn)


@functools.cache
def _derived(theirs: type[nn.Module]) -> type[AttentionView]:
    return type("AttentionView", (AttentionView, theirs), {})


def watched(model: nn.Module, name: str) -> View | None:
    """The view `name` of the model, to be called in place of its parts; None where nobody watches it."""
    return None if watched_view(model, name) is None else getattr(model, name)


def attribute(model: nn.Module, name: str) -> Any:
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


def assigned(model: nn.Module, name: str, value: Any) -> tuple[str, Any]:
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
