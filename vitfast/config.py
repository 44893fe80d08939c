"""What a Vision Transformer is made of: one frozen, checked description."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

MLPS = ("mlp", "swiglu_packed", "swiglu")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu")
NORMS = ("layer", "rms")
POOLS = ("token", "mean", "map", "none")
POSITIONS = ("all", "patches", "none")
RATES = ("emb_dropout", "attn_dropout", "proj_dropout", "mlp_dropout", "head_dropout", "drop_path")


class _Fields(dict):
    def __missing__(self, key: str) -> str:
        # peft asks the dict of what a model has as `config`, and gives models without one this answer
        if key == "model_type":
            return "custom"
        raise KeyError(key)


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Architecture and regularisation of a ViT. Every field is checked on construction.

    Sizes are in pixels, widths in channels. `None` for a derived field is replaced by its value, so a
    constructed config has no open ends.

    Args:
        image_size: height and width of the images, an int for square ones.
        patch_size: height and width of a patch, an int for square ones.
        channels: image channels.
        num_classes: rows of the classifier; 0 for no classifier.
        dim: width D of a token.
        depth: number of blocks.
        heads: attention heads H.
        head_dim: width of a head; `dim // heads` by default, but free otherwise.
        mlp_dim: output width of the MLP's first projection, `4 * dim` by default. With `swiglu_packed` that
            projection holds gate and value side by side, so the hidden width is half of it.
        mlp: 'mlp', 'swiglu_packed' (gate and value in one projection) or 'swiglu' (in two).
        activation: 'gelu' (erf), 'gelu_tanh', 'quick_gelu' (x * sigmoid(1.702 x)) or 'silu'.
        norm: 'layer' or 'rms'.
        norm_eps: added to the variance in every norm. 1e-6 in timm, 1e-5 in vit-pytorch and CLIP.
        qkv_bias: bias of the query, key and value projection.
        proj_bias: bias of the attention's output projection and of the MLP.
        out_proj: whether attention has an output projection (vit-pytorch drops it for one head of width dim).
        qk_norm: norm over each head's queries and keys.
        attn_norm: norm of the attention's output before its projection (BEiT-3).
        mlp_norm: norm of the hidden activation before the second projection (BEiT-3).
        layer_scale: initial value of the per-channel branch scale; None for none.
        class_token: a learned token at index 0.
        distillation_token: DeiT's second learned token and its own classifier.
        register_tokens: number of learned tokens after the class token.
        pos_embed: which tokens get a position: 'all', 'patches' or 'none'.
        pre_norm: norm before the first block and no bias in the patch projection (CLIP).
        patch_norm: norm of the patch tokens before positions are added.
        final_norm: norm after the last block, or after pooling.
        pool: 'token', 'mean', 'map' (attention pooling) or 'none' (all tokens).
        pool_prefix: let class and register tokens take part in pooling.
        norm_after_pool: final norm after pooling; by default only for 'mean'.
        input_norm: vit-pytorch's patch embedding, LayerNorm over the pixels of a patch, Linear, LayerNorm, and
            with it vit-pytorch's parameter shapes and order.
        emb_dropout, attn_dropout, proj_dropout, mlp_dropout, head_dropout: dropout rates.
        drop_path: stochastic depth rate of the last block; it grows linearly from 0 at the first.
        dynamic_image_size: accept any image size that the patch divides; positions are resampled (with
            `input_norm`: the first positions are used, as vit-pytorch does).
        dynamic_pad: with `dynamic_image_size`, pad at right and bottom to a multiple of the patch.

    Raises:
        ValueError, TypeError: the field, the rule it breaks and its value.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    channels: int = 3
    num_classes: int = 1000
    dim: int = 768
    depth: int = 12
    heads: int = 12
    head_dim: int | None = None
    mlp_dim: int | None = None
    mlp: str = "mlp"
    activation: str = "gelu"
    norm: str = "layer"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    proj_bias: bool = True
    out_proj: bool = True
    qk_norm: bool = False
    attn_norm: bool = False
    mlp_norm: bool = False
    layer_scale: float | None = None
    class_token: bool = True
    distillation_token: bool = False
    register_tokens: int = 0
    pos_embed: str = "all"
    pre_norm: bool = False
    patch_norm: bool = False
    final_norm: bool = True
    pool: str = "token"
    pool_prefix: bool = False
    norm_after_pool: bool | None = None
    input_norm: bool = False
    emb_dropout: float = 0.0
    attn_dropout: float = 0.0
    proj_dropout: float = 0.0
    mlp_dropout: float = 0.0
    head_dropout: float = 0.0
    drop_path: float = 0.0
    dynamic_image_size: bool = False
    dynamic_pad: bool = False

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (frozen)
        for name in self.__annotations__:
            value = getattr(self, name)
            if isinstance(value, numbers.Integral) and not isinstance(value, (bool, int)):
                put(name, int(value))  # numpy's
        put("image_size", _pair("image_size", self.image_size))
        put("patch_size", _pair("patch_size", self.patch_size))
        for name in ("channels", "dim", "heads"):
            _check(name, getattr(self, name), _is_int, lambda v: v >= 1, "an int of at least 1")
        for name in ("num_classes", "depth", "register_tokens"):
            _check(name, getattr(self, name), _is_int, lambda v: v >= 0, "an int of at least 0")
        if self.head_dim is None:
            if self.dim % self.heads:
                raise ValueError(
                    f"ViTConfig.dim must be a multiple of heads={self.heads} when head_dim is not given, got {self.dim}"
                )
            put("head_dim", self.dim // self.heads)
        if self.mlp_dim is None:
            put("mlp_dim", 4 * self.dim)
        for name in ("head_dim", "mlp_dim"):
            _check(name, getattr(self, name), _is_int, lambda v: v >= 1, "an int of at least 1")
        for name, allowed in (
            ("mlp", MLPS), ("activation", ACTIVATIONS), ("norm", NORMS), ("pool", POOLS), ("pos_embed", POSITIONS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"ViTConfig.{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.norm_after_pool is None:
            put("norm_after_pool", self.pool == "mean")
        for name, kind in self.__annotations__.items():
            if kind in ("bool", "bool | None") and not isinstance(getattr(self, name), bool):
                raise TypeError(f"ViTConfig.{name} must be a bool, got {getattr(self, name)!r}")
        for name in RATES:
            _check(name, getattr(self, name), _is_real, lambda v: 0.0 <= v < 1.0, "a number in [0, 1)")
        _check("norm_eps", self.norm_eps, _is_real, lambda v: v > 0, "a number above 0")
        if self.layer_scale is not None:
            _check("layer_scale", self.layer_scale, _is_real, lambda v: v != 0, "None or a number other than 0")
        self._check_combinations()

    def _check_combinations(self) -> None:
        head_dim, mlp_dim = int(self.head_dim or 0), int(self.mlp_dim or 0)

        def must(holds: bool, name: str, rule: str) -> None:
            if not holds:
                raise ValueError(f"ViTConfig.{name} must be {rule}, got {getattr(self, name)!r}")

        if not self.dynamic_image_size:
            (h, w), (ph, pw) = self.image_size, self.patch_size  # type: ignore[misc]  # pairs since __post_init__
            must(h % ph == 0 and w % pw == 0, "image_size", f"a multiple of patch_size={self.patch_size}")
        must(min(self.grid_size) >= 1, "image_size", f"at least one patch_size={self.patch_size}")
        must(self.pool != "token" or self.class_token, "pool", "other than 'token' when class_token is False")
        must(not self.distillation_token or self.class_token, "distillation_token", "False without a class_token")
        must(not self.distillation_token or self.pool == "token", "pool", "'token' with a distillation_token")
        must(not self.distillation_token or not self.register_tokens, "register_tokens", "0 with a distillation_token")
        must(self.mlp != "swiglu_packed" or mlp_dim % 2 == 0, "mlp_dim", "even for mlp='swiglu_packed'")
        must(self.pool != "map" or self.dim % self.heads == 0, "heads", f"a divisor of dim={self.dim} for pool='map'")
        must(self.dynamic_image_size or not self.dynamic_pad, "dynamic_pad", "False unless dynamic_image_size is True")
        must(self.out_proj or self.heads * head_dim == self.dim, "out_proj", "True unless heads * head_dim == dim")
        if self.input_norm:
            must(self.norm == "layer", "norm", "'layer' with input_norm")
            must(not self.register_tokens, "register_tokens", "0 with input_norm")
            must(not self.distillation_token, "distillation_token", "False with input_norm")
            must(not self.pre_norm, "pre_norm", "False with input_norm")
            must(not self.patch_norm, "patch_norm", "False with input_norm")
            must(self.pos_embed == "all", "pos_embed", "'all' with input_norm")
            must(not self.dynamic_pad, "dynamic_pad", "False with input_norm")

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches in an image of `image_size`: the grid that positions are learned for.

        Where the patch does not divide a dynamic size it rounds down, as in timm; padded images resample from it.
        """
        (h, w), (ph, pw) = self.image_size, self.patch_size  # type: ignore[misc]  # pairs since __post_init__
        return h // ph, w // pw

    @property
    def num_patches(self) -> int:
        """Patches in an image of `image_size`."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens, which come before the patches."""
        return int(self.class_token) + int(self.distillation_token) + self.register_tokens

    def replace(self, **changes: Any) -> ViTConfig:
        """A checked copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values; `ViTConfig(**d)` gives the config back."""
        return _Fields(asdict(self))

    def to_json_string(self) -> str:
        """The fields as JSON; transformers' callbacks write what a model has as `config`."""
        return json.dumps(self.to_dict())


_frozen = ViTConfig.__setattr__


def _set_attribute(self: ViTConfig, name: str, value: Any) -> None:
    # transformers' Trainer sets this one in whatever a model has as `config`; it is about text
    if name != "use_cache":
        _frozen(self, name, value)


ViTConfig.__setattr__ = _set_attribute  # type: ignore[method-assign,assignment]  # a frozen one takes no method


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, value: Any, kind: Callable[[Any], bool], rule: Callable[[Any], bool], text: str) -> None:
    if not kind(value):
        raise TypeError(f"ViTConfig.{name} must be {text}, got {value!r}")
    if not rule(value):
        raise ValueError(f"ViTConfig.{name} must be {text}, got {value!r}")


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = (value, value) if _is_int(value) else value
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(_is_int(v) for v in pair)):
        raise TypeError(f"ViTConfig.{name} must be an int or a pair of ints (height, width), got {value!r}")
    if min(pair) < 1:
        raise ValueError(f"ViTConfig.{name} must be at least 1 in both directions, got {value!r}")
    return pair[0], pair[1]
