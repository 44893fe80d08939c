"""Other people's ViTs with the weights of one of ours, so that their results agree.

Weights are a state dict under timm's names. Each function here returns a `Network` on the CPU in fp32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.config import ViTConfig
from vitfast.weights import vit_pytorch as vit_pytorch_names

Weights = Mapping[str, Tensor]
Patterns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Network:
    """A model as a benchmark sees it.

    Attributes:
        logits: from what `module` returns.
        watched: parameters whose gradients stand for all: each by the names of its parts, which are its rows.
    """

    module: nn.Module
    watched: tuple[tuple[str, ...], ...]
    logits: Callable[[Any], Tensor] = lambda out: out


def random_weights(shapes: Weights, seed: int = 0, gain: float = 0.7) -> dict[str, Tensor]:
    """Weights for a model of these tensors; nothing is zero or one, so that nobody can leave a part out unseen.

    Rounded so that fp32, fp16 and bf16 hold the same numbers and one reference is the truth for all of them.

    Args:
        gain: by which a projection makes normed rows larger.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, like in shapes.items():
        kind = name.rpartition(".")[2]
        drawn = torch.randn(like.shape, generator=generator)
        if kind in ("cls_token", "reg_token", "dist_token", "pos_embed", "latent"):
            drawn *= 0.5
        elif like.dim() > 1:
            drawn *= gain * like[0].numel() ** -0.5
        elif kind in ("weight", "gamma", "running_var"):
            drawn = drawn.mul_(0.1).add_(0.5 if kind == "gamma" else 1)
        else:
            drawn *= 0.1
        found[name] = exact(drawn)
    return found


def exact(values: Tensor) -> Tensor:
    """The values, which are fp32, rounded to what bf16 and fp16 both have."""
    return values.bfloat16().half().float()


def filled(make: Callable[[], nn.Module], weights: Weights) -> nn.Module:
    """What `make` makes, with these weights, where they are; made on no device, for initialisation takes longer than
    all else."""
    with torch.device("meta"):
        module = make()
    module.to_empty(device=next(iter(weights.values())).device).load_state_dict(weights)
    return module


def watched(config: ViTConfig) -> tuple[tuple[str, ...], ...]:
    """Under timm's names: where the gradient comes from last, in the last block, and the projection of patches."""
    return ("blocks.0.attn.qkv.weight",), (f"blocks.{config.depth - 1}.norm2.weight",), ("patch_embed.proj.weight",)


def renamed(names: Mapping[str, list[str]], config: ViTConfig) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(names[name]) for (name,) in watched(config))


def is_plain(config: ViTConfig, **allowed: Any) -> bool:
    """Whether this is the ViT of Dosovitskiy et al. (2021), but for these fields; only its sizes are free."""
    sizes = {"image_size", "patch_size", "channels", "num_classes", "dim", "depth", "heads", "mlp_dim", "norm_eps"}
    return config == ViTConfig(**{size: getattr(config, size) for size in sizes}, **allowed)


def of_timm(name: str, options: Mapping[str, Any], config: ViTConfig, weights: Weights) -> Network:
    import timm

    return Network(filled(partial(timm.create_model, name, **options), weights), watched(config))


def of_torchvision(config: ViTConfig, weights: Weights) -> Network:
    """torchvision's VisionTransformer, of which vit_b_16 and the others are sizes.

    Raises:
        NotImplementedError: it has no such architecture.
    """
    from torchvision.models import VisionTransformer

    if not is_plain(config) or config.channels != 3 or not config.num_classes or not _square(config):
        raise NotImplementedError("torchvision has no such architecture")
    make = partial(
        VisionTransformer, config.image_size[0], config.patch_size[0], config.depth, config.heads, config.dim,
        config.mlp_dim, num_classes=config.num_classes, norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
    )  # fmt: skip
    return _translated(make, weights, TORCHVISION, config)


# other people's names to timm's; {i} is the block, a number after | the third of qkv

_LAYER = r"encoder\.layers\.encoder_layer_(\d+)\."
TORCHVISION = (
    (r"class_token", "cls_token"),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"conv_proj\.(\w+)", r"patch_embed.proj.\1"),
    (r"encoder\.ln\.(\w+)", r"norm.\1"),
    (r"heads\.head\.(\w+)", r"head.\1"),
    (_LAYER + r"ln_([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (_LAYER + r"self_attention\.in_proj_(\w+)", r"blocks.\1.attn.qkv.\2"),
    (_LAYER + r"self_attention\.out_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (_LAYER + r"mlp\.0\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (_LAYER + r"mlp\.3\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
)
# of release 4 and of release 5
HUGGING_FACE = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"layernorm\.(\w+)", r"norm.\1"),
    (r"classifier\.(\w+)", r"head.\1"),
    (r"layers\.(\d+)\.(?:layernorm_before|norm1)\.(\w+)", r"blocks.\1.norm1.\2"),
    (r"layers\.(\d+)\.(?:layernorm_after|norm2)\.(\w+)", r"blocks.\1.norm2.\2"),
    (r"layers\.(\d+)\.attention\.(?:attention\.query|q_proj)\.(\w+)", r"blocks.\1.attn.qkv.\2|0"),
    (r"layers\.(\d+)\.attention\.(?:attention\.key|k_proj)\.(\w+)", r"blocks.\1.attn.qkv.\2|1"),
    (r"layers\.(\d+)\.attention\.(?:attention\.value|v_proj)\.(\w+)", r"blocks.\1.attn.qkv.\2|2"),
    (r"layers\.(\d+)\.attention\.(?:output\.dense|o_proj)\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"layers\.(\d+)\.(?:intermediate\.dense|mlp\.fc1)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"layers\.(\d+)\.(?:output\.dense|mlp\.fc2)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"layers\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
)


def of_hugging_face(config: ViTConfig, weights: Weights) -> Network:
    """Hugging Face's ViTForImageClassification, or Dinov2Model, with scaled_dot_product_attention.

    Raises:
        NotImplementedError: it has no such architecture, or this release has names that are not known here.
    """
    import transformers

    sizes = {
        "hidden_size": config.dim, "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
        "image_size": config.image_size[0], "patch_size": config.patch_size[0], "num_channels": config.channels,
        "layer_norm_eps": config.norm_eps, "hidden_act": "gelu", "attn_implementation": "sdpa",
    }  # fmt: skip
    if _square(config) and is_plain(config) and config.num_classes:
        settings = transformers.ViTConfig(
            **sizes, intermediate_size=config.mlp_dim, num_labels=config.num_classes, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        make, logits = partial(transformers.ViTForImageClassification, settings), lambda out: out.logits
    elif (
        _square(config) and is_plain(config, layer_scale=config.layer_scale) and not config.num_classes
        and config.mlp_dim % config.dim == 0
    ):  # fmt: skip
        settings = transformers.Dinov2Config(**sizes, mlp_ratio=config.mlp_dim // config.dim)
        make, logits = partial(transformers.Dinov2Model, settings), lambda out: out.pooler_output
    else:
        raise NotImplementedError("transformers has no such architecture")
    return _translated(make, weights, HUGGING_FACE, config, logits)


def _translated(
    make: Callable[[], nn.Module], weights: Weights, patterns: Patterns, config: ViTConfig, *logits: Callable
) -> Network:
    with torch.device("meta"):
        shapes = make().state_dict()
    theirs, names = from_timm(shapes, weights, patterns)
    return Network(filled(make, theirs), renamed(names, config), *logits)


def from_timm(shapes: Weights, weights: Weights, patterns: Patterns) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """A state dict in other people's names, and for each of timm's names theirs."""
    theirs: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    for name, like in shapes.items():
        short = name.removeprefix("vit.").replace("encoder.layer.", "layers.")
        if short == "embeddings.mask_token":  # no part of the forward
            theirs[name] = torch.zeros(like.shape)
            continue
        for pattern, ours in patterns:
            if match := re.fullmatch(pattern, short):
                key, _, third = match.expand(ours).partition("|")
                theirs[name] = weights[key].chunk(3)[int(third)] if third else weights[key]
                names.setdefault(key, []).append(name)
                break
        else:
            raise NotImplementedError(f"a parameter of theirs is not known here: {name!r}")
    if missing := weights.keys() - names.keys():
        raise NotImplementedError(f"their model has no place for {', '.join(sorted(missing)[:3])}")
    return theirs, names


def of_vit_pytorch(config: ViTConfig, weights: Weights) -> Network:
    """vit-pytorch's ViT for a config with `input_norm`; its parts are under its own names.

    Raises:
        NotImplementedError: it has no such architecture.
    """
    from vit_pytorch import ViT

    if not config.input_norm or not config.num_classes:
        raise NotImplementedError("vit-pytorch has no such architecture")
    make = partial(
        ViT, image_size=config.image_size, patch_size=config.patch_size, num_classes=config.num_classes,
        dim=config.dim, depth=config.depth, heads=config.heads, mlp_dim=config.mlp_dim, dim_head=config.head_dim,
        channels=config.channels, pool="cls" if config.class_token else "mean",
    )  # fmt: skip
    theirs = vit_pytorch_names.from_vitfast(weights, config)
    # in the same order
    names = {name: [their] for name, their in zip(weights, theirs, strict=True)}
    return Network(filled(make, theirs), renamed(names, config))


def _square(config: ViTConfig) -> bool:
    return all(len(set(size)) == 1 for size in (config.image_size, config.patch_size))
