"""A model in memory as a source of weights: what its modules and attributes tell of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.checkpoints.checkpoint import unwrapped
from vitfast.checkpoints.described import config_of
from vitfast.model.vit import ViT
from vitfast.timm_names.variants import POOLS_BY_TIMM_NAME
from vitfast.weights.layouts.layout import Facts

# class of an activation -> ViTConfig's name of it
ACTIVATIONS = {
    "GELU": "gelu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "GeluTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "QuickGELUActivation": "quick_gelu", "SiLU": "silu",
    "SiLUActivation": "silu",
}  # fmt: skip
# what transformers' MLPs call theirs
ACTIVATION_NAMES = ("activation_fn", "act_fn", "intermediate_act_fn")
# transformers leaves hooks of this module, which only look, after one call that wants hidden states
CAPTURES = "transformers.utils.output_capturing"


def of_live(model: Any) -> tuple[dict[str, Tensor], Facts, str]:
    """(weights, facts, whose) of a model of vitfast, timm, Hugging Face, torchvision or vit-pytorch.

    Raises:
        TypeError: a model of another library.
        NotImplementedError: parts that no ViTConfig describes.
    """
    model = unwrapped(model)
    if type(model).__name__ == "TimmWrapperModel" or hasattr(model, "timm_model"):
        model = model.timm_model
    whose = f"{type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, ViT):
        return model.state_dict(), Facts(timm={"pretrained_cfg": _cfg(model)}, fields=config_of(model).to_dict()), whose
    _check_untouched(model)
    for kind in type(model).__mro__:
        facts_of = FACTS.get(f"{kind.__module__}.{kind.__qualname__}")
        if facts_of is not None:
            return model.state_dict(), facts_of(model), whose
    if hasattr(model, "config") and hasattr(model.config, "to_dict"):
        return _hugging_face(model.state_dict()), _of_hugging_face(model), whose
    raise TypeError(f"source must be a ViT of vitfast, timm, Hugging Face, torchvision or vit-pytorch, got {whose}")


def _hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As on disk: gate and value of DINOv2's MLP are one product there."""
    for name in [name for name in state if ".mlp.gate_proj." in name]:
        gate, up = state.pop(name), state.pop(name.replace(".gate_proj.", ".up_proj."))
        state[name.replace(".gate_proj.", ".weights_in.")] = torch.cat([gate, up])
        down = name.replace(".gate_proj.", ".down_proj.")
        state[name.replace(".gate_proj.", ".weights_out.")] = state.pop(down)
    return state


def _check_untouched(model: nn.Module) -> None:
    """Raise NotImplementedError where somebody made a module compute something else than its class does."""
    for name, module in model.named_modules():
        held = vars(module)
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(getattr(hook, "__module__", None) != CAPTURES for hook in hooks):
            raise NotImplementedError(f"{name or 'the model'} has a hook, which weights and config do not hold")
        if "forward" in held and "_vitfast" not in held:
            raise NotImplementedError(f"{name or 'the model'}.forward was replaced")
        width = getattr(module, "head_dim", None)
        scale = getattr(module, "scaling", getattr(module, "scale", None))
        if isinstance(width, int) and isinstance(scale, float) and scale != width**-0.5:
            raise NotImplementedError(f"{name}: scale must be head_dim ** -0.5, {width**-0.5}, got {scale}")


def one_of(what: str, found: Iterable[Any]) -> Any:
    """What all blocks share.

    Raises:
        NotImplementedError: they have several.
    """
    several = set(found)
    if len(several) != 1:
        raise NotImplementedError(f"{what} must be one for all blocks, got {sorted(several)}")
    return several.pop()


def _of_hugging_face(model: Any) -> Facts:
    """The config, and what its modules have come to be since."""
    # a text tower and a decoder have others
    inside = {name: each for name, each in model.named_modules() if not name.startswith(("text_model", "decoder"))}
    fields = {}
    if eps := {each.eps for each in inside.values() if hasattr(each, "eps") and hasattr(each, "normalized_shape")}:
        fields["norm_eps"] = one_of("norm_eps", eps)
    if activations := [each for name, each in inside.items() if name.rpartition(".")[2] in ACTIVATION_NAMES]:
        fields["activation"] = one_of("activation", map(activation_of, activations))
    heads = [getattr(each, "num_attention_heads", getattr(each, "num_heads", None)) for each in inside.values()]
    if heads := [number for number in heads if number is not None]:
        fields["heads"] = one_of("heads", heads)
    return Facts(hf=model.config.to_dict(), fields=fields)


def activation_of(module: nn.Module) -> str:
    """ViTConfig's name.

    Raises:
        NotImplementedError: it has none.
    """
    name = type(module).__name__
    if name not in ACTIVATIONS:
        raise NotImplementedError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name}")
    found = ACTIVATIONS[name]
    return "gelu_tanh" if found == "gelu" and getattr(module, "approximate", "none") == "tanh" else found


def eps_of(model: Any) -> float:
    """The eps that all norms of a model share.

    Raises:
        NotImplementedError: they have several.
    """
    norms = (module for module in model.modules() if hasattr(module, "eps") and hasattr(module, "normalized_shape"))
    return one_of("norm_eps", (norm.eps for norm in norms))


def _timm(model: Any) -> Facts:
    blocks = list(model.blocks)
    kinds = {type(block).__name__ for block in blocks} | {
        type(block.attn).__name__ for block in blocks if hasattr(block, "attn")
    }
    if not kinds <= {"Block", "Attention"} or not hasattr(model.patch_embed, "proj"):
        raise NotImplementedError(
            f"a model of timm must have Block, Attention and PatchEmbed, got {', '.join(sorted(kinds))} and "
            f"{type(model.patch_embed).__name__}"
        )
    if model.global_pool not in POOLS_BY_TIMM_NAME:
        raise NotImplementedError(f"global_pool must be one of {list(POOLS_BY_TIMM_NAME)}, got {model.global_pool!r}")
    stem, after = model.patch_embed, not isinstance(model.fc_norm, nn.Identity)
    fields = {
        "image_size": stem.img_size or tuple(g * p for g, p in zip(stem.grid_size, stem.patch_size, strict=True)),
        "norm_eps": eps_of(model), "pool": POOLS_BY_TIMM_NAME[model.global_pool], "norm_after_pool": after,
        "pool_prefix": bool(getattr(model, "pool_include_prefix", False)),
        "dynamic_image_size": bool(model.dynamic_img_size),
        "dynamic_pad": bool(getattr(model.patch_embed, "dynamic_img_pad", False)),
        "emb_dropout": model.pos_drop.p if isinstance(model.pos_drop, nn.Dropout) else 0.0,
        "head_dropout": model.head_drop.p if isinstance(model.head_drop, nn.Dropout) else 0.0,
    }  # fmt: skip
    if model.pos_embed is None:
        fields["pos_embed"] = "none"
    else:
        fields["pos_embed"] = "patches" if model.no_embed_class and model.num_prefix_tokens else "all"
    if blocks:
        attn, mlp = blocks[0].attn, blocks[0].mlp
        drop = getattr(blocks[-1].drop_path1, "drop_prob", 0.0)
        fields |= {
            "heads": one_of("heads", (block.attn.num_heads for block in blocks)),
            "head_dim": one_of("head_dim", (block.attn.head_dim for block in blocks)),
            "activation": one_of("activation", (activation_of(block.mlp.act) for block in blocks)),
            "attn_dropout": attn.attn_drop.p, "proj_dropout": attn.proj_drop.p,
            "mlp_dropout": getattr(mlp.drop1, "p", 0.0), "drop_path": drop or 0.0,
        }  # fmt: skip
    return Facts(timm={"pretrained_cfg": _cfg(model)}, fields=fields)


def _cfg(model: Any) -> dict[str, Any]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return cfg.to_dict() if hasattr(cfg, "to_dict") else dict(cfg)


def _torchvision(model: Any) -> Facts:
    layers = list(model.encoder.layers)
    rates = {
        "emb_dropout": model.encoder.dropout.p,
        "proj_dropout": layers[0].dropout.p,
        "attn_dropout": layers[0].self_attention.dropout,
        "mlp_dropout": layers[0].mlp[2].p,
    }
    fields = {
        "image_size": model.image_size, "patch_size": model.patch_size, "norm_eps": eps_of(model),
        "heads": one_of("heads", (layer.num_heads for layer in layers)),
        "activation": one_of("activation", (activation_of(layer.mlp[1]) for layer in layers)),
    }  # fmt: skip
    return Facts(fields=fields | rates)


def _vit_pytorch(model: Any) -> Facts:
    """Of a ViT of vit-pytorch 0.7.0 or newer, or of a SimpleViT."""
    layers = [tuple(_inside(each) for each in layer) for layer in model.transformer.layers]
    attention, feed_forward = layers[0]
    head_dim = attention.to_qkv.out_features // 3 // attention.heads
    scale = one_of("scale", (each.scale for each, _ in layers))
    if scale != head_dim**-0.5:
        raise NotImplementedError(f"attention's scale must be head_dim ** -0.5, {head_dim**-0.5}, got {scale}")
    no_activation = (nn.Linear, nn.LayerNorm, nn.Dropout)
    activations = (next(each for each in mlp.net if not isinstance(each, no_activation)) for _, mlp in layers)
    fields = {
        "heads": one_of("heads", (each.heads for each, _ in layers)), "head_dim": head_dim, "norm_eps": eps_of(model),
        "activation": one_of("activation", map(activation_of, activations)),
        "emb_dropout": _rate(getattr(model, "dropout", None)), "proj_dropout": _rate(attention.to_out),
        "attn_dropout": _rate(getattr(attention, "dropout", None)), "mlp_dropout": _rate(feed_forward.net),
    }  # fmt: skip
    axes = getattr(model.to_patch_embedding[0], "axes_lengths", {})
    fields |= {"patch_size": (axes["p1"], axes["p2"])} if {"p1", "p2"} <= axes.keys() else {}
    positions, pool = getattr(model, "pos_embedding", None), getattr(model, "pool", None)
    if isinstance(positions, Tensor) and not isinstance(positions, nn.Parameter) and "patch_size" in fields:
        # SimpleViT's begin with the sine of the column, which is 0 once in each row
        rows = int((positions[:, 0] == 0).sum())
        fields["image_size"] = rows * axes["p1"], len(positions) // rows * axes["p2"]
    elif pool is not None and model.mlp_head is not None:
        fields["pool"] = {"cls": "token"}.get(pool, pool)
    return Facts(fields=fields)


def _inside(module: Any) -> Any:
    # before 1.4.0 norms and sums were modules around it
    return _inside(module.fn) if hasattr(module, "fn") else module


def _rate(module: Any) -> float:
    return next((each.p for each in module.modules() if isinstance(each, nn.Dropout)), 0.0) if module else 0.0


FACTS: dict[str, Callable[[Any], Facts]] = {
    "timm.models.vision_transformer.VisionTransformer": _timm,
    "torchvision.models.vision_transformer.VisionTransformer": _torchvision,
    "vit_pytorch.vit.ViT": _vit_pytorch,
    "vit_pytorch.vit_pytorch.ViT": _vit_pytorch,  # before 0.9.1
    "vit_pytorch.simple_vit.SimpleViT": _vit_pytorch,
}
