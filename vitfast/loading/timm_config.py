"""A config in timm's terms: a name and keywords that build the same model there."""

from __future__ import annotations

import functools
from typing import Any

from vitfast.config import ViTConfig
from vitfast.loading.report import LoadReport
from vitfast.timm_names.variants import TIMM_POOLS, VARIANTS, config_for

# field -> timm's keyword and its value of a config
KEYWORDS: dict[str, Any] = {
    "image_size": ("img_size", lambda c: list(c.image_size)),
    "patch_size": ("patch_size", lambda c: c.patch_size[0] if len({*c.patch_size}) == 1 else list(c.patch_size)),
    "channels": ("in_chans", lambda c: c.channels),
    "num_classes": ("num_classes", lambda c: c.num_classes),
    "dim": ("embed_dim", lambda c: c.dim),
    "depth": ("depth", lambda c: c.depth),
    "heads": ("num_heads", lambda c: c.heads),
    "mlp_dim": ("mlp_ratio", lambda c: c.mlp_dim / c.dim),
    "activation": ("act_layer", lambda c: c.activation),
    "qkv_bias": ("qkv_bias", lambda c: c.qkv_bias),
    "proj_bias": ("proj_bias", lambda c: c.proj_bias),
    "qk_norm": ("qk_norm", lambda c: c.qk_norm),
    "attn_norm": ("scale_attn_norm", lambda c: c.attn_norm),
    "mlp_norm": ("scale_mlp_norm", lambda c: c.mlp_norm),
    "layer_scale": ("init_values", lambda c: c.layer_scale or 0.0),
    "class_token": ("class_token", lambda c: c.class_token),
    "register_tokens": ("reg_tokens", lambda c: c.register_tokens),
    "pre_norm": ("pre_norm", lambda c: c.pre_norm),
    "final_norm": ("final_norm", lambda c: c.final_norm),
    "pool": ("global_pool", lambda c: TIMM_POOLS[c.pool]),
    "pool_prefix": ("pool_include_prefix", lambda c: c.pool_prefix),
    "norm_after_pool": ("fc_norm", lambda c: c.norm_after_pool),
    "dynamic_image_size": ("dynamic_img_size", lambda c: c.dynamic_image_size),
    "dynamic_pad": ("dynamic_img_pad", lambda c: c.dynamic_pad),
    "head_dropout": ("drop_rate", lambda c: c.head_dropout),
    "emb_dropout": ("pos_drop_rate", lambda c: c.emb_dropout),
    "attn_dropout": ("attn_drop_rate", lambda c: c.attn_dropout),
    "drop_path": ("drop_path_rate", lambda c: c.drop_path),
}


def timm_config(config: ViTConfig, report: LoadReport) -> tuple[dict[str, Any], str]:
    """timm's config.json of the hub; empty, and why, where no name and keywords of timm build such a model."""
    name, arguments, lacking = _named(config)
    if lacking:
        return {}, f"no name and keywords of timm build this model, {lacking}: config.json is not written"
    cfg = report.pretrained_cfg(config)
    cfg["fixed_input_size"] = not config.dynamic_image_size
    labels = {"label_names": list(cfg.pop("label_names"))} if "label_names" in cfg else {}
    entries = {
        key: list(value) if isinstance(value, tuple) else value for key, value in cfg.items() if value is not None
    }
    return {
        "architecture": name, "num_classes": config.num_classes, "num_features": config.dim,
        "global_pool": TIMM_POOLS[config.pool], "model_args": arguments, "pretrained_cfg": entries,
    } | labels, ""  # fmt: skip


def _named(config: ViTConfig) -> tuple[str, dict[str, Any], str]:
    """timm's name whose keywords are fewest, these, and what no keyword makes of the name that is nearest."""
    wanted, lacking = config.to_dict(), ""
    found = []
    for name in VARIANTS:
        own = _variant(name).to_dict()
        differ = [field for field in wanted if wanted[field] != own[field]]
        found.append((len(differ), name, differ))
    for _, name, differ in sorted(found):
        arguments = {KEYWORDS[field][0]: KEYWORDS[field][1](config) for field in differ if field in KEYWORDS}
        if config.mlp_dim != _variant(name).mlp_dim or config.dim != _variant(name).dim:
            arguments["mlp_ratio"] = _ratio(config)
        if "pos_embed" in differ:
            none = config.pos_embed == "none"
            arguments |= {"pos_embed": "none"} if none else {"no_embed_class": config.pos_embed == "patches"}
        if all(each.norm_after_pool == (each.pool == "mean") for each in (config, _variant(name))):
            arguments.pop("fc_norm", None)
        try:
            built = config_for(name, **arguments)
        except (ValueError, TypeError, NotImplementedError):
            continue
        if built == config:
            return name, arguments, ""
        rest = [field for field, value in built.to_dict().items() if value != wanted[field]]
        lacking = lacking or f"with {', '.join(f'{field}={wanted[field]!r}' for field in rest)} beside {name}"
    return "", {}, lacking or "whose sizes none takes"


def _ratio(config: ViTConfig) -> float:
    """The ratio of which timm makes this width of an MLP, by int(dim * ratio)."""
    width, D = int(config.mlp_dim or 0), config.dim
    ratio = width / D
    return ratio if int(D * ratio) == width else (width + 0.5) / D


@functools.cache
def _variant(name: str) -> ViTConfig:
    return config_for(name)
