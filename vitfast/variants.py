"""timm's model names and keywords: which ViTConfig each stands for, and which have none."""

from __future__ import annotations

import difflib
import fnmatch
import os
from dataclasses import fields as dataclass_fields
from typing import Any

import torch

from vitfast.config import ViTConfig
from vitfast.vit import ViT

# width, depth and heads of a letter; mlp_ratio (4 where not given) is timm's literal, for it also sets the MLP width
# when a caller changes embed_dim
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 192, "depth": 12, "heads": 3},
    "xsmall": {"dim": 256, "depth": 10, "heads": 4},
    "wee": {"dim": 256, "depth": 14, "heads": 4, "mlp_ratio": 5},
    "little": {"dim": 320, "depth": 14, "heads": 5, "mlp_ratio": 5.6},
    "small": {"dim": 384, "depth": 12, "heads": 6},
    "medium": {"dim": 512, "depth": 12, "heads": 8},
    "mediumd": {"dim": 512, "depth": 20, "heads": 8},
    "betwixt": {"dim": 640, "depth": 12, "heads": 10},
    "base": {"dim": 768, "depth": 12, "heads": 12},
    "so150m2": {"dim": 832, "depth": 21, "heads": 13, "mlp_ratio": 2.6153846153846154},
    "plus": {"dim": 896, "depth": 12, "heads": 14},
    "so150m": {"dim": 896, "depth": 18, "heads": 14, "mlp_ratio": 2.572},
    "large": {"dim": 1024, "depth": 24, "heads": 16},
    "so400m": {"dim": 1152, "depth": 27, "heads": 16, "mlp_ratio": 3.7362},
    "huge": {"dim": 1280, "depth": 32, "heads": 16},
    "giant": {"dim": 1408, "depth": 40, "heads": 16, "mlp_ratio": 4.363636363636363},
    "giantopt": {"dim": 1536, "depth": 40, "heads": 16},
    "giant1536": {"dim": 1536, "depth": 40, "heads": 24},
    "gigantic": {"dim": 1664, "depth": 48, "heads": 16, "mlp_ratio": 4.923076923076923},
    "aim_large": {"dim": 1024, "depth": 24, "heads": 8, "mlp_ratio": 2.75},
    "aim_huge": {"dim": 1536, "depth": 24, "heads": 12, "mlp_ratio": 2.6667},
    "aim_1b": {"dim": 2048, "depth": 24, "heads": 16, "mlp_ratio": 2.75},
    "aim_3b": {"dim": 3072, "depth": 24, "heads": 24, "mlp_ratio": 2.6667},
}

# what the members of a family share
_GAP = {"class_token": False, "pool": "mean"}
_GAP_NORM_FIRST = _GAP | {"norm_after_pool": False}
_GAP_BIASLESS = _GAP_NORM_FIRST | {"qkv_bias": False, "layer_scale": 1e-6}
_GAP_REG = _GAP | {"register_tokens": 1, "pos_embed": "patches", "layer_scale": 1e-5}
_GAP_REG4 = _GAP_REG | {"register_tokens": 4}
_SO150M = {"class_token": False, "register_tokens": 4}
_SO150M2 = _GAP | {"register_tokens": 1, "qkv_bias": False, "layer_scale": 1e-5}
_CLIP = {"pre_norm": True, "norm_eps": 1e-5}
_QUICK = _CLIP | {"activation": "quick_gelu"}
_SIGLIP = {"class_token": False, "pool": "map", "num_classes": 0}
_SIGLIP_GAP = _GAP_NORM_FIRST | {"num_classes": 0}
_TANH = {"activation": "gelu_tanh"}
_JEPA = _GAP_NORM_FIRST | {"num_classes": 0}
_DEIT3 = {"pos_embed": "patches", "layer_scale": 1e-6}
_DEIT_DISTILLED = {"distillation_token": True}
_FLEXI = {"pos_embed": "patches"}
_BEIT3 = {"attn_norm": True, "mlp_norm": True, "pool": "mean", "norm_eps": 1e-5}
_BEIT3_GIANT = _BEIT3 | {"mlp_ratio": 4.3637}
_DINOV2 = {"layer_scale": 1e-5, "num_classes": 0}
_DINOV2_REG = _DINOV2 | {"register_tokens": 4, "pos_embed": "patches"}
_TIPSV2 = {"layer_scale": 1.0, "register_tokens": 1, "pos_embed": "patches", "num_classes": 0}
_RADIO = {"register_tokens": 7, "pos_embed": "patches", "final_norm": False, "num_classes": 0}
_GLU = {"mlp": "swiglu_packed", "activation": "silu", "mlp_ratio": 5.33334}
# so400m outside SigLIP has the exact ratio; the widths agree here, but not at every embed_dim
_SO400M_EXACT = {"mlp_ratio": 3.736111111111111}
_AIMV2 = _GAP_NORM_FIRST | {
    "num_classes": 0, "qkv_bias": False, "proj_bias": False, "mlp": "swiglu", "activation": "silu",
    "norm": "rms", "norm_eps": 1e-5, "patch_norm": True,
}  # fmt: skip
_TEST = {"depth": 6, "mlp_ratio": 3, "dynamic_image_size": True}
_TEST_REG = {"class_token": False, "register_tokens": 1, "layer_scale": 1e-5}


def _row(size: str, patch: int, image: int, *families: dict[str, Any], **own: Any) -> dict[str, Any]:
    row = _SIZES.get(size, {}) | {"patch_size": patch, "image_size": image}
    for family in families:
        row |= family
    return row | own


_ROWS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": _row("tiny", 16, 224),
    "vit_tiny_patch16_384": _row("tiny", 16, 384),
    "vit_small_patch8_224": _row("small", 8, 224, num_classes=0),
    "vit_small_patch16_224": _row("small", 16, 224),
    "vit_small_patch16_384": _row("small", 16, 384),
    "vit_small_patch32_224": _row("small", 32, 224),
    "vit_small_patch32_384": _row("small", 32, 384),
    "vit_small_patch16_36x1_224": _row("small", 16, 224, depth=36, layer_scale=1e-5),
    "vit_base_patch8_224": _row("base", 8, 224),
    "vit_base_patch16_224": _row("base", 16, 224),
    "vit_base_patch16_384": _row("base", 16, 384),
    "vit_base_patch32_224": _row("base", 32, 224),
    "vit_base_patch32_384": _row("base", 32, 384),
    "vit_base_patch16_224_miil": _row("base", 16, 224, qkv_bias=False, num_classes=11221),
    "vit_base_patch16_plus_240": _row("plus", 16, 240, layer_scale=1e-5),
    "vit_base_patch32_plus_256": _row("plus", 32, 256, layer_scale=1e-5),
    "vit_large_patch14_224": _row("large", 14, 224),
    "vit_large_patch16_224": _row("large", 16, 224),
    "vit_large_patch16_384": _row("large", 16, 384),
    "vit_large_patch32_224": _row("large", 32, 224, num_classes=0),
    "vit_large_patch32_384": _row("large", 32, 384),
    "vit_huge_patch14_224": _row("huge", 14, 224, num_classes=0),
    "vit_giant_patch14_224": _row("giant", 14, 224),
    "vit_gigantic_patch14_224": _row("gigantic", 14, 224),
    "vit_intern300m_patch14_448": _row(
        "large", 14, 448, num_classes=0, layer_scale=0.1, final_norm=False, dynamic_image_size=True
    ),
    # I-JEPA
    "vit_base_patch16_gap_224": _row("base", 16, 224, _GAP_NORM_FIRST, heads=16),
    "vit_huge_patch14_gap_224": _row("huge", 14, 224, _JEPA),
    "vit_huge_patch16_gap_448": _row("huge", 16, 448, _JEPA),
    "vit_giant_patch16_gap_224": _row("giant", 16, 224, _JEPA),
    # timm's own, mean-pooled
    "vit_wee_patch16_reg1_gap_256": _row("wee", 16, 256, _GAP_REG),
    "vit_little_patch16_reg1_gap_256": _row("little", 16, 256, _GAP_REG),
    "vit_little_patch16_reg4_gap_256": _row("little", 16, 256, _GAP_REG4),
    "vit_medium_patch16_gap_240": _row("medium", 16, 240, _GAP_BIASLESS, num_classes=11821),
    "vit_medium_patch16_gap_256": _row("medium", 16, 256, _GAP_BIASLESS),
    "vit_medium_patch16_gap_384": _row("medium", 16, 384, _GAP_BIASLESS),
    "vit_medium_patch16_reg1_gap_256": _row("medium", 16, 256, _GAP_REG),
    "vit_medium_patch16_reg4_gap_256": _row("medium", 16, 256, _GAP_REG4),
    "vit_mediumd_patch16_reg4_gap_256": _row("mediumd", 16, 256, _GAP_REG4),
    "vit_mediumd_patch16_reg4_gap_384": _row("mediumd", 16, 384, _GAP_REG4),
    "vit_betwixt_patch16_gap_256": _row("betwixt", 16, 256, _GAP_BIASLESS),
    "vit_betwixt_patch16_reg1_gap_256": _row("betwixt", 16, 256, _GAP_REG),
    "vit_betwixt_patch16_reg4_gap_256": _row("betwixt", 16, 256, _GAP_REG4),
    "vit_betwixt_patch16_reg4_gap_384": _row("betwixt", 16, 384, _GAP_REG4),
    "vit_base_patch16_reg4_gap_256": _row("base", 16, 256, _GAP_REG4, layer_scale=None),
    "vit_so150m_patch16_reg4_gap_256": _row("so150m", 16, 256, _SO150M, _GAP_NORM_FIRST),
    "vit_so150m_patch16_reg4_gap_384": _row("so150m", 16, 384, _SO150M, _GAP_NORM_FIRST),
    "vit_so150m_patch16_reg4_map_256": _row("so150m", 16, 256, _SO150M, pool="map"),
    "vit_so150m2_patch16_reg1_gap_256": _row("so150m2", 16, 256, _SO150M2),
    "vit_so150m2_patch16_reg1_gap_384": _row("so150m2", 16, 384, _SO150M2),
    "vit_so150m2_patch16_reg1_gap_448": _row("so150m2", 16, 448, _SO150M2),
    "test_vit": _row("", 16, 160, _TEST, dim=64, heads=2),
    "test_vit2": _row("", 16, 160, _TEST, _TEST_REG, dim=64, depth=8, heads=2, pool="mean"),
    "test_vit3": _row(
        "", 16, 160, _TEST_REG, dim=96, depth=9, heads=3, mlp_ratio=2, pool="map", pool_prefix=True
    ),
    "test_vit4": _row("", 16, 160, _TEST, _TEST_REG, dim=96, depth=9, heads=3, pool="mean", norm="rms"),
    # DeiT, DeiT III, FlexiViT, EVA, BEiT-3
    "deit_tiny_patch16_224": _row("tiny", 16, 224),
    "deit_small_patch16_224": _row("small", 16, 224),
    "deit_base_patch16_224": _row("base", 16, 224),
    "deit_base_patch16_384": _row("base", 16, 384),
    "deit_tiny_distilled_patch16_224": _row("tiny", 16, 224, _DEIT_DISTILLED),
    "deit_small_distilled_patch16_224": _row("small", 16, 224, _DEIT_DISTILLED),
    "deit_base_distilled_patch16_224": _row("base", 16, 224, _DEIT_DISTILLED),
    "deit_base_distilled_patch16_384": _row("base", 16, 384, _DEIT_DISTILLED),
    "deit3_small_patch16_224": _row("small", 16, 224, _DEIT3),
    "deit3_small_patch16_384": _row("small", 16, 384, _DEIT3),
    "deit3_medium_patch16_224": _row("medium", 16, 224, _DEIT3),
    "deit3_base_patch16_224": _row("base", 16, 224, _DEIT3),
    "deit3_base_patch16_384": _row("base", 16, 384, _DEIT3),
    "deit3_large_patch16_224": _row("large", 16, 224, _DEIT3),
    "deit3_large_patch16_384": _row("large", 16, 384, _DEIT3),
    "deit3_huge_patch14_224": _row("huge", 14, 224, _DEIT3),
    "flexivit_small": _row("small", 16, 240, _FLEXI),
    "flexivit_base": _row("base", 16, 240, _FLEXI),
    "flexivit_large": _row("large", 16, 240, _FLEXI),
    "eva_large_patch14_196": _row("large", 14, 196, pool="mean"),
    "eva_large_patch14_336": _row("large", 14, 336, pool="mean"),
    "beit3_base_patch16_224": _row("base", 16, 224, _BEIT3),
    "beit3_large_patch16_224": _row("large", 16, 224, _BEIT3),
    "beit3_giant_patch14_224": _row("giant", 14, 224, _BEIT3_GIANT),
    "beit3_giant_patch14_336": _row("giant", 14, 336, _BEIT3_GIANT),
    # CLIP; num_classes is the width of the projection into the shared space, or a classifier's 1000
    "vit_xsmall_patch16_clip_224": _row("xsmall", 16, 224, _CLIP, num_classes=512),
    "vit_medium_patch16_clip_224": _row("medium", 16, 224, _CLIP, num_classes=512),
    "vit_medium_patch32_clip_224": _row("medium", 32, 224, _CLIP, num_classes=512),
    "vit_betwixt_patch32_clip_224": _row("betwixt", 32, 224, _CLIP, num_classes=512),
    "vit_base_patch16_clip_224": _row("base", 16, 224, _CLIP),
    "vit_base_patch16_clip_384": _row("base", 16, 384, _CLIP),
    "vit_base_patch16_clip_quickgelu_224": _row("base", 16, 224, _QUICK, num_classes=512),
    "vit_base_patch16_plus_clip_240": _row("plus", 16, 240, _CLIP, num_classes=640),
    "vit_base_patch32_clip_224": _row("base", 32, 224, _CLIP),
    "vit_base_patch32_clip_256": _row("base", 32, 256, _CLIP, num_classes=512),
    "vit_base_patch32_clip_384": _row("base", 32, 384, _CLIP),
    "vit_base_patch32_clip_448": _row("base", 32, 448, _CLIP),
    "vit_base_patch32_clip_quickgelu_224": _row("base", 32, 224, _QUICK, num_classes=512),
    "vit_large_patch14_clip_224": _row("large", 14, 224, _CLIP),
    "vit_large_patch14_clip_336": _row("large", 14, 336, _CLIP),
    "vit_large_patch14_clip_quickgelu_224": _row("large", 14, 224, _QUICK, num_classes=768),
    "vit_large_patch14_clip_quickgelu_336": _row("large", 14, 336, _QUICK, num_classes=768),
    "vit_huge_patch14_clip_224": _row("huge", 14, 224, _CLIP),
    "vit_huge_patch14_clip_336": _row("huge", 14, 336, _CLIP),
    "vit_huge_patch14_clip_378": _row("huge", 14, 378, _CLIP, num_classes=1024),
    "vit_huge_patch14_clip_quickgelu_224": _row("huge", 14, 224, _QUICK, num_classes=1024),
    "vit_huge_patch14_clip_quickgelu_378": _row("huge", 14, 378, _QUICK, num_classes=1024),
    "vit_giant_patch14_clip_224": _row("giant", 14, 224, _CLIP, num_classes=1024),
    "vit_gigantic_patch14_clip_224": _row("gigantic", 14, 224, _CLIP, num_classes=1280),
    "vit_gigantic_patch14_clip_378": _row("gigantic", 14, 378, _CLIP, num_classes=1280),
    "vit_gigantic_patch14_clip_quickgelu_224": _row("gigantic", 14, 224, _QUICK, num_classes=1280),
    # DINOv2, TIPSv2, C-RADIO
    "vit_small_patch14_dinov2": _row("small", 14, 518, _DINOV2),
    "vit_base_patch14_dinov2": _row("base", 14, 518, _DINOV2),
    "vit_large_patch14_dinov2": _row("large", 14, 518, _DINOV2),
    "vit_giant_patch14_dinov2": _row("giant1536", 14, 518, _DINOV2, _GLU),
    "vit_small_patch14_reg4_dinov2": _row("small", 14, 518, _DINOV2_REG),
    "vit_base_patch14_reg4_dinov2": _row("base", 14, 518, _DINOV2_REG),
    "vit_large_patch14_reg4_dinov2": _row("large", 14, 518, _DINOV2_REG),
    "vit_giant_patch14_reg4_dinov2": _row("giant1536", 14, 518, _DINOV2_REG, _GLU),
    "vit_base_patch14_reg1_tipsv2": _row("base", 14, 448, _TIPSV2),
    "vit_large_patch14_reg1_tipsv2": _row("large", 14, 448, _TIPSV2),
    "vit_so400m_patch14_reg1_tipsv2": _row("so400m", 14, 448, _TIPSV2, _SO400M_EXACT),
    "vit_giant_patch14_reg1_tipsv2": _row("giant1536", 14, 448, _TIPSV2, _GLU),
    "vit_base_patch16_radio_v3": _row("base", 16, 512, _RADIO, layer_scale=1e-5),
    "vit_large_patch16_radio_v3": _row("large", 16, 512, _RADIO, layer_scale=1e-5),
    "vit_huge_patch16_radio_v3": _row("huge", 16, 512, _RADIO),
    "vit_giant_patch16_radio_v3": _row("giant1536", 16, 512, _RADIO),
    "vit_so400m_patch16_radio_v4": _row("so400m", 16, 512, _RADIO, _SO400M_EXACT, register_tokens=9),
    "vit_huge_patch16_radio_v4": _row("huge", 16, 512, _RADIO, register_tokens=9),
    "vit_so400m_patch14_siglip_gap_448": _row("so400m", 14, 448, _SIGLIP_GAP),
    "vit_so400m_patch14_siglip_gap_896": _row("so400m", 14, 896, _SIGLIP_GAP),
}

# SigLIP: each tower with attention pooling (siglip) and with mean pooling (siglip_gap)
for _kind, _pooling in (("siglip", _SIGLIP), ("siglip_gap", _SIGLIP_GAP)):
    _ROWS |= {f"vit_base_patch16_{_kind}_{i}": _row("base", 16, i, _pooling) for i in (224, 256, 384, 512)}
    _ROWS |= {f"vit_base_patch32_{_kind}_256": _row("base", 32, 256, _pooling, _TANH)}
    _ROWS |= {f"vit_large_patch16_{_kind}_{i}": _row("large", 16, i, _pooling) for i in (256, 384)}
    _ROWS |= {f"vit_large_patch16_{_kind}_512": _row("large", 16, 512, _pooling, _TANH)}
    _ROWS |= {f"vit_so400m_patch14_{_kind}_{i}": _row("so400m", 14, i, _pooling) for i in (224, 378)}
    _ROWS |= {f"vit_so400m_patch16_{_kind}_{i}": _row("so400m", 16, i, _pooling, _TANH) for i in (256, 384, 512)}
    _ROWS |= {f"vit_giantopt_patch16_{_kind}_{i}": _row("giantopt", 16, i, _pooling, _TANH) for i in (256, 384)}

for _size in ("large", "huge", "1b", "3b"):
    _ROWS |= {f"aimv2_{_size}_patch14_{i}": _row(f"aim_{_size}", 14, i, _AIMV2) for i in (224, 336, 448)}

_FIELD_DEFAULTS = {field.name: field.default for field in dataclass_fields(ViTConfig)}
_MLP_RATIOS = {name: row.get("mlp_ratio", 4.0) for name, row in _ROWS.items()}


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in row.items() if name != "mlp_ratio" and value != _FIELD_DEFAULTS[name]}
    ratio = row.get("mlp_ratio", 4.0)
    return own if ratio == 4.0 else own | {"mlp_dim": int(row["dim"] * ratio)}


VARIANTS: dict[str, dict[str, Any]] = {name: _fields(row) for name, row in _ROWS.items()}

_HYBRID = "embed_layer=HybridEmbed"
_VITAMIN = "embed_layer=HybridEmbed and mlp_layer=GeGluMlp"
_INDIVISIBLE = "img_size=384 with patch_size=14, which drops the last 6 pixels (the same tower with 378 has no rest)"

UNSUPPORTED: dict[str, str] = {
    "vit_base_mci_224": _HYBRID,
    "vit_base_r26_s32_224": _HYBRID,
    "vit_base_r50_s16_224": _HYBRID,
    "vit_base_r50_s16_384": _HYBRID,
    "vit_large_r50_s32_224": _HYBRID,
    "vit_large_r50_s32_384": _HYBRID,
    "vit_small_r26_s32_224": _HYBRID,
    "vit_small_r26_s32_384": _HYBRID,
    "vit_tiny_r_s16_p8_224": _HYBRID,
    "vit_tiny_r_s16_p8_384": _HYBRID,
    "vitamin_small_224": _VITAMIN,
    "vitamin_base_224": _VITAMIN,
    **{f"vitamin_large_{image}": _VITAMIN for image in (224, 256, 336, 384)},
    **{f"vitamin_large2_{image}": _VITAMIN for image in (224, 256, 336, 384)},
    **{f"vitamin_xlarge_{image}": _VITAMIN for image in (256, 336, 384)},
    "vit_base_patch16_xp_224": "block_fn=ParallelScalingBlock",
    "vit_large_patch14_xp_224": "block_fn=ParallelScalingBlock",
    "vit_huge_patch14_xp_224": "block_fn=ParallelScalingBlock",
    "vit_pwee_patch16_reg1_gap_256": "block_fn=ParallelScalingBlock",
    "vit_dpwee_patch16_reg1_gap_256": "block_fn=DiffParallelScalingBlock",
    "vit_small_patch16_18x2_224": "block_fn=ParallelThingsBlock",
    "vit_base_patch16_18x2_224": "block_fn=ParallelThingsBlock",
    "vit_base_patch16_rpn_224": "block_fn=ResPostBlock",
    "vit_dwee_patch16_reg1_gap_256": "attn_layer='diff'",
    "vit_dlittle_patch16_reg1_gap_256": "attn_layer='diff'",
    "vit_so400m_patch14_siglip_384": _INDIVISIBLE,
    "vit_so400m_patch14_siglip_gap_384": _INDIVISIBLE,
}

# timm keyword -> fields that take its value as it is
_RENAMED: dict[str, tuple[str, ...]] = {
    "img_size": ("image_size",),
    "patch_size": ("patch_size",),
    "in_chans": ("channels",),
    "num_classes": ("num_classes",),
    "embed_dim": ("dim",),
    "depth": ("depth",),
    "num_heads": ("heads",),
    "qkv_bias": ("qkv_bias",),
    "qk_norm": ("qk_norm",),
    "scale_attn_norm": ("attn_norm",),
    "scale_mlp_norm": ("mlp_norm",),
    "proj_bias": ("proj_bias",),
    "class_token": ("class_token",),
    "reg_tokens": ("register_tokens",),
    "pre_norm": ("pre_norm",),
    "final_norm": ("final_norm",),
    "fc_norm": ("norm_after_pool",),
    "pool_include_prefix": ("pool_prefix",),
    "dynamic_img_size": ("dynamic_image_size",),
    "dynamic_img_pad": ("dynamic_pad",),
    "drop_rate": ("head_dropout",),
    "pos_drop_rate": ("emb_dropout",),
    "proj_drop_rate": ("proj_dropout", "mlp_dropout"),
    "attn_drop_rate": ("attn_dropout",),
    "drop_path_rate": ("drop_path",),
}
_POOLS = {"token": "token", "avg": "mean", "map": "map", "": "none"}
_ACTIVATIONS = {
    "": "gelu", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu", "swish": "silu",
}  # fmt: skip
# a norm that is named by a string has timm's default eps, whatever the variant's own was
_NORMS = {"": ("layer", 1e-6), "layernorm": ("layer", 1e-6), "rmsnorm": ("rms", 1e-6)}
_MAPPED = ("global_pool", "mlp_ratio", "init_values", "pos_embed", "no_embed_class", "act_layer", "norm_layer",
           "embed_norm_layer")  # fmt: skip
# timm keyword -> the values that change nothing; any other asks for what ViTConfig can't express
_FIXED: dict[str, tuple[Any, ...]] = {
    "embed_layer": (), "block_fn": (), "mlp_layer": (), "attn_layer": ("", "attn"),
    "patch_drop_rate": (0.0,), "fix_init": (False,), "weight_init": ("",),
    "pretrained_cfg": (), "pretrained_cfg_overlay": (), "cache_dir": ("",), "pruned": (False,), "use_naflex": (False,),
    "features_only": (False,), "out_indices": (), "scriptable": (False,), "exportable": (False,), "no_jit": (False,),
}  # fmt: skip


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    checkpoint_path: str | os.PathLike[str] | None = "",
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    **timm_keywords: Any,
) -> ViT:
    """Build the model that timm has under this name, with freshly initialised weights.

    Default values are timm's: what is not given is what `timm.create_model(name)` would use.

    Args:
        name: a name from `list_models()`, without a pretrained tag.
        pretrained: must be False; vitfast downloads nothing.
        checkpoint_path: weights to load into the model, for `vitfast.load_checkpoint`.
        device: where to create the parameters; torch's default device when None. 'meta' allocates nothing.
        dtype: dtype of the parameters; torch's default when None.
        **timm_keywords: see `config_for`.

    Raises:
        ValueError: an unknown name, a name with a pretrained tag, or a value that no ViTConfig accepts.
        TypeError: a keyword that timm's VisionTransformer does not have, or a value of the wrong type.
        NotImplementedError: `pretrained=True`, a name in `UNSUPPORTED`, or a value that no ViTConfig field stands
            for; the message names the field and the value.
    """
    if pretrained:
        raise NotImplementedError(
            f"create_model: pretrained must be False, got {pretrained!r}: vitfast downloads no weights; pass the file "
            "as checkpoint_path"
        )
    config = config_for(name, **timm_keywords)
    if device is None:
        model = ViT.from_config(config)
    else:
        with torch.device(device):
            model = ViT.from_config(config)
    if dtype is not None:
        model = model.to(dtype)
    if checkpoint_path:
        # only a model that reads a file needs the file format's package
        from vitfast.weights.checkpoint import load_checkpoint

        load_checkpoint(model, checkpoint_path)
    return model


def list_models(filter: str = "") -> list[str]:
    """The names `create_model` accepts, sorted; `filter` is a shell pattern such as 'vit_*_dinov2'."""
    return sorted(fnmatch.filter(VARIANTS, filter) if filter else VARIANTS)


def config_for(name: str, **timm_keywords: Any) -> ViTConfig:
    """The ViTConfig that timm's name and VisionTransformer keywords describe.

    Default values are timm's, which for most fields are the variant's own. A keyword of value None counts as not
    given. What depends on another keyword follows it: the MLP's width follows `embed_dim` and `mlp_ratio`, and the
    place of the final norm follows `global_pool` where neither the variant nor `fc_norm` fixes it.

    Args:
        name: a name from `list_models()`, without a pretrained tag.
        **timm_keywords: img_size, patch_size, in_chans, num_classes, global_pool ('token', 'avg', 'map', ''),
            embed_dim, depth, num_heads, mlp_ratio, qkv_bias, qk_norm, scale_attn_norm, scale_mlp_norm, proj_bias,
            init_values (0 for no LayerScale), class_token, pos_embed ('learn', 'none', ''), no_embed_class,
            reg_tokens, pre_norm, final_norm, fc_norm, pool_include_prefix, dynamic_img_size, dynamic_img_pad,
            drop_rate, pos_drop_rate, proj_drop_rate (attention's projection and MLP), attn_drop_rate,
            drop_path_rate, act_layer ('gelu', 'gelu_tanh', 'quick_gelu', 'silu'), norm_layer and embed_norm_layer
            ('layernorm', 'rmsnorm'). Further keywords of timm are accepted with a value that changes nothing.

    Raises:
        ValueError, TypeError, NotImplementedError: as `create_model`.
    """
    fields = dict(_variant(name))
    keywords = {keyword: value for keyword, value in timm_keywords.items() if value is not None}
    for keyword, value in keywords.items():
        _check_keyword(keyword, value)
    for keyword, names in _RENAMED.items():
        if keyword in keywords:
            fields |= dict.fromkeys(names, keywords[keyword])

    if "global_pool" in keywords:
        fields["pool"] = _choice("global_pool", keywords, _POOLS)
    if "act_layer" in keywords:
        fields["activation"] = _choice("act_layer", keywords, _ACTIVATIONS)
    if "init_values" in keywords:
        # timm builds no LayerScale for 0, which is how a caller turns a variant's own off
        fields["layer_scale"] = keywords["init_values"] or None

    ratio = keywords.get("mlp_ratio", _MLP_RATIOS[name])
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"config_for: mlp_ratio must be a number, got {ratio!r}")
    dim = fields.get("dim", ViTConfig.dim)
    if isinstance(dim, int) and {"embed_dim", "mlp_ratio"} & keywords.keys():
        fields["mlp_dim"] = int(dim * ratio)

    if {"pos_embed", "no_embed_class"} & keywords.keys():
        on_patches = keywords.get("no_embed_class", fields.get("pos_embed") == "patches")
        learned = {"learn": True, "none": False, "": False}
        if keywords.get("pos_embed", "learn") not in learned:
            raise ValueError(f"config_for: pos_embed must be one of {tuple(learned)}, got {keywords['pos_embed']!r}")
        positions = "patches" if on_patches else "all"
        fields["pos_embed"] = positions if learned[keywords.get("pos_embed", "learn")] else "none"

    norm = (fields.get("norm", ViTConfig.norm), fields.get("norm_eps", ViTConfig.norm_eps))
    patch_norm = norm if fields.get("patch_norm") else None
    if "norm_layer" in keywords:
        norm = _choice("norm_layer", keywords, _NORMS)
    if "embed_norm_layer" in keywords:
        patch_norm = _choice("embed_norm_layer", keywords, _NORMS) if keywords["embed_norm_layer"] else None
    if patch_norm not in (None, norm):
        raise NotImplementedError(
            f"config_for: norm_layer={norm} (kind, eps) beside another embed_norm_layer={patch_norm} has no ViTConfig "
            "field"
        )
    fields |= {"norm": norm[0], "norm_eps": norm[1], "patch_norm": patch_norm is not None}
    return ViTConfig(**fields)


def _variant(name: str) -> dict[str, Any]:
    if not isinstance(name, str):
        raise TypeError(f"create_model: name must be a str, got {name!r}")
    if name in VARIANTS:
        return VARIANTS[name]
    untagged, _, tag = name.partition(".")
    if untagged in UNSUPPORTED:
        raise NotImplementedError(f"create_model: {untagged} needs timm's {UNSUPPORTED[untagged]}: not supported")
    if untagged in VARIANTS:
        raise ValueError(
            f"create_model: the tag {tag!r} of {name!r} names weights, and vitfast downloads none; use {untagged!r} with "
            "the num_classes and img_size of those weights, and their file as checkpoint_path"
        )
    if ":" in name:
        raise ValueError(
            f"create_model: name must be one of list_models(), got the location {name!r}, and vitfast downloads nothing; "
            "use the model's name, and the file of its weights as checkpoint_path"
        )
    raise ValueError(
        f"create_model: name must be one of list_models(), got {name!r}; {_closest(untagged, [*VARIANTS, *UNSUPPORTED])}"
    )


def _check_keyword(keyword: str, value: Any) -> None:
    if keyword in _RENAMED or keyword in _MAPPED:
        return
    if keyword not in _FIXED:
        known = [*_RENAMED, *_MAPPED, *_FIXED]
        raise TypeError(
            f"create_model: timm's VisionTransformer has no keyword {keyword!r} (={value!r}); {_closest(keyword, known)}"
        )
    accepted = _FIXED[keyword]
    if value not in accepted:
        rule = f"only {', '.join(map(repr, accepted))}" if accepted else "only leaving it out"
        raise NotImplementedError(f"create_model: {keyword}={value!r} is not supported, {rule}")


def _choice(keyword: str, keywords: dict[str, Any], table: dict[str, Any]) -> Any:
    value = keywords[keyword]
    # timm ignores case everywhere and underscores in the names of norms
    key = value.lower() if isinstance(value, str) else None
    if key is not None and table is _NORMS:
        key = key.replace("_", "")
    if key not in table:
        raise NotImplementedError(
            f"create_model: {keyword}={value!r} is not supported, only {', '.join(map(repr, table))}"
        )
    return table[key]


def _closest(word: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=4, cutoff=0.5)
    return f"close to it: {', '.join(matches)}" if matches else "nothing is close to it"
