"""timm's model names and keywords: which ViTConfig each stands for, and which have none."""

from __future__ import annotations

from dataclasses import fields as dataclass_fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from vitfast.config import ACTIVATIONS, ViTConfig

TIMM_POOLS = {"token": "token", "mean": "avg", "map": "map", "none": ""}
POOLS_BY_TIMM_NAME = {timm_name: pool for pool, timm_name in TIMM_POOLS.items()}

# mlp_ratio, 4 where not given, is timm's literal: the MLP's width has to follow it when a caller changes embed_dim
_SIZES: dict[str, dict[str, Any]] = {
    "test64": {"dim": 64, "depth": 6, "heads": 2, "mlp_ratio": 3},
    "test96": {"dim": 96, "depth": 9, "heads": 3, "mlp_ratio": 3},
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
    "aim_huge": {"dim": 1536, "depth": 24, "heads": 12, "mlp_ratio": 2.6667},
    "aim_1b": {"dim": 2048, "depth": 24, "heads": 16, "mlp_ratio": 2.75},
    "aim_3b": {"dim": 3072, "depth": 24, "heads": 24, "mlp_ratio": 2.6667},
}

# what the members of a family share
_GAP = {"class_token": False, "pool": "mean"}
_GAP_NORM_FIRST = _GAP | {"norm_after_pool": False}
_GAP_BIASLESS = _GAP_NORM_FIRST | {"qkv_bias": False, "layer_scale": 1e-6}
_GAP_REG1 = _GAP | {"register_tokens": 1, "pos_embed": "patches", "layer_scale": 1e-5}
_GAP_REG4 = _GAP_REG1 | {"register_tokens": 4}
_SO150M2 = _GAP | {"register_tokens": 1, "qkv_bias": False, "layer_scale": 1e-5}
_MAP = {"class_token": False, "pool": "map"}
_TEST_REG = {"register_tokens": 1, "layer_scale": 1e-5}
_INTERN = {"layer_scale": 0.1, "final_norm": False, "dynamic_image_size": True, "num_classes": 0}
_DEIT3 = {"pos_embed": "patches", "layer_scale": 1e-6}
_BEIT3 = {"attn_norm": True, "mlp_norm": True, "pool": "mean", "norm_eps": 1e-5}
_CLIP = {"pre_norm": True, "norm_eps": 1e-5}
_QUICK = _CLIP | {"activation": "quick_gelu"}
_SIGLIP = _MAP | {"num_classes": 0}
_SIGLIP_GAP = _GAP_NORM_FIRST | {"num_classes": 0}
_TANH = {"activation": "gelu_tanh"}
_DINOV2 = {"layer_scale": 1e-5, "num_classes": 0}
_DINOV2_REG4 = _DINOV2 | {"register_tokens": 4, "pos_embed": "patches"}
_TIPSV2 = {"layer_scale": 1.0, "register_tokens": 1, "pos_embed": "patches", "num_classes": 0}
_RADIO = {"register_tokens": 7, "pos_embed": "patches", "final_norm": False, "num_classes": 0}
_GLU = {"mlp": "swiglu_packed", "activation": "silu", "mlp_ratio": 5.33334}
# so400m has the exact ratio outside SigLIP; the MLP is equally wide, but would not be at every embed_dim
_SO400M_EXACT = {"mlp_ratio": 3.736111111111111}
_AIMV2 = _SIGLIP_GAP | {
    "qkv_bias": False, "proj_bias": False, "mlp": "swiglu", "activation": "silu",
    "norm": "rms", "norm_eps": 1e-5, "patch_norm": True,
}  # fmt: skip


def _of(size: str, patch: int, *families: dict[str, Any], **own: Any) -> dict[str, Any]:
    fields = _SIZES[size] | {"patch_size": patch}
    for family in families:
        fields |= family
    return fields | own


# name -> fields; a name with {} stands for one variant an image size, which is what replaces the braces
_TABLE: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("vit_tiny_patch16_{}", (224, 384), _of("tiny", 16)),
    ("vit_small_patch8_{}", (224,), _of("small", 8, num_classes=0)),
    ("vit_small_patch16_{}", (224, 384), _of("small", 16)),
    ("vit_small_patch32_{}", (224, 384), _of("small", 32)),
    ("vit_small_patch16_36x1_{}", (224,), _of("small", 16, depth=36, layer_scale=1e-5)),
    ("vit_base_patch8_{}", (224,), _of("base", 8)),
    ("vit_base_patch16_{}", (224, 384), _of("base", 16)),
    ("vit_base_patch32_{}", (224, 384), _of("base", 32)),
    ("vit_base_patch16_{}_miil", (224,), _of("base", 16, qkv_bias=False, num_classes=11221)),
    ("vit_base_patch16_plus_{}", (240,), _of("plus", 16, layer_scale=1e-5)),
    ("vit_base_patch32_plus_{}", (256,), _of("plus", 32, layer_scale=1e-5)),
    ("vit_large_patch14_{}", (224,), _of("large", 14)),
    ("vit_large_patch16_{}", (224, 384), _of("large", 16)),
    ("vit_large_patch32_{}", (224,), _of("large", 32, num_classes=0)),
    ("vit_large_patch32_{}", (384,), _of("large", 32)),
    ("vit_huge_patch14_{}", (224,), _of("huge", 14, num_classes=0)),
    ("vit_giant_patch14_{}", (224,), _of("giant", 14)),
    ("vit_gigantic_patch14_{}", (224,), _of("gigantic", 14)),
    ("vit_intern300m_patch14_{}", (448,), _of("large", 14, _INTERN)),
    # mean pooling: I-JEPA, then timm's own
    ("vit_base_patch16_gap_{}", (224,), _of("base", 16, _GAP_NORM_FIRST, heads=16)),
    ("vit_huge_patch14_gap_{}", (224,), _of("huge", 14, _GAP_NORM_FIRST, num_classes=0)),
    ("vit_huge_patch16_gap_{}", (448,), _of("huge", 16, _GAP_NORM_FIRST, num_classes=0)),
    ("vit_giant_patch16_gap_{}", (224,), _of("giant", 16, _GAP_NORM_FIRST, num_classes=0)),
    ("vit_wee_patch16_reg1_gap_{}", (256,), _of("wee", 16, _GAP_REG1)),
    ("vit_little_patch16_reg1_gap_{}", (256,), _of("little", 16, _GAP_REG1)),
    ("vit_little_patch16_reg4_gap_{}", (256,), _of("little", 16, _GAP_REG4)),
    ("vit_medium_patch16_gap_{}", (240,), _of("medium", 16, _GAP_BIASLESS, num_classes=11821)),
    ("vit_medium_patch16_gap_{}", (256, 384), _of("medium", 16, _GAP_BIASLESS)),
    ("vit_medium_patch16_reg1_gap_{}", (256,), _of("medium", 16, _GAP_REG1)),
    ("vit_medium_patch16_reg4_gap_{}", (256,), _of("medium", 16, _GAP_REG4)),
    ("vit_mediumd_patch16_reg4_gap_{}", (256, 384), _of("mediumd", 16, _GAP_REG4)),
    ("vit_betwixt_patch16_gap_{}", (256,), _of("betwixt", 16, _GAP_BIASLESS)),
    ("vit_betwixt_patch16_reg1_gap_{}", (256,), _of("betwixt", 16, _GAP_REG1)),
    ("vit_betwixt_patch16_reg4_gap_{}", (256, 384), _of("betwixt", 16, _GAP_REG4)),
    ("vit_base_patch16_reg4_gap_{}", (256,), _of("base", 16, _GAP_REG4, layer_scale=None)),
    ("vit_so150m_patch16_reg4_gap_{}", (256, 384), _of("so150m", 16, _GAP_NORM_FIRST, register_tokens=4)),
    ("vit_so150m_patch16_reg4_map_{}", (256,), _of("so150m", 16, _MAP, register_tokens=4)),
    ("vit_so150m2_patch16_reg1_gap_{}", (256, 384, 448), _of("so150m2", 16, _SO150M2)),
    ("test_vit", (160,), _of("test64", 16, dynamic_image_size=True)),
    ("test_vit2", (160,), _of("test64", 16, _GAP, _TEST_REG, depth=8, dynamic_image_size=True)),
    ("test_vit3", (160,), _of("test96", 16, _MAP, _TEST_REG, mlp_ratio=2, pool_prefix=True)),
    ("test_vit4", (160,), _of("test96", 16, _GAP, _TEST_REG, norm="rms", dynamic_image_size=True)),
    # DeiT, DeiT III, FlexiViT, EVA, BEiT-3
    ("deit_tiny_patch16_{}", (224,), _of("tiny", 16)),
    ("deit_small_patch16_{}", (224,), _of("small", 16)),
    ("deit_base_patch16_{}", (224, 384), _of("base", 16)),
    ("deit_tiny_distilled_patch16_{}", (224,), _of("tiny", 16, distillation_token=True)),
    ("deit_small_distilled_patch16_{}", (224,), _of("small", 16, distillation_token=True)),
    ("deit_base_distilled_patch16_{}", (224, 384), _of("base", 16, distillation_token=True)),
    ("deit3_small_patch16_{}", (224, 384), _of("small", 16, _DEIT3)),
    ("deit3_medium_patch16_{}", (224,), _of("medium", 16, _DEIT3)),
    ("deit3_base_patch16_{}", (224, 384), _of("base", 16, _DEIT3)),
    ("deit3_large_patch16_{}", (224, 384), _of("large", 16, _DEIT3)),
    ("deit3_huge_patch14_{}", (224,), _of("huge", 14, _DEIT3)),
    ("flexivit_small", (240,), _of("small", 16, pos_embed="patches")),
    ("flexivit_base", (240,), _of("base", 16, pos_embed="patches")),
    ("flexivit_large", (240,), _of("large", 16, pos_embed="patches")),
    ("eva_large_patch14_{}", (196, 336), _of("large", 14, pool="mean")),
    ("beit3_base_patch16_{}", (224,), _of("base", 16, _BEIT3)),
    ("beit3_large_patch16_{}", (224,), _of("large", 16, _BEIT3)),
    ("beit3_giant_patch14_{}", (224, 336), _of("giant", 14, _BEIT3, mlp_ratio=4.3637)),
    # CLIP: num_classes is the width of the space shared with text, or a classifier's 1000
    ("vit_xsmall_patch16_clip_{}", (224,), _of("xsmall", 16, _CLIP, num_classes=512)),
    ("vit_medium_patch16_clip_{}", (224,), _of("medium", 16, _CLIP, num_classes=512)),
    ("vit_medium_patch32_clip_{}", (224,), _of("medium", 32, _CLIP, num_classes=512)),
    ("vit_betwixt_patch32_clip_{}", (224,), _of("betwixt", 32, _CLIP, num_classes=512)),
    ("vit_base_patch16_clip_{}", (224, 384), _of("base", 16, _CLIP)),
    ("vit_base_patch16_clip_quickgelu_{}", (224,), _of("base", 16, _QUICK, num_classes=512)),
    ("vit_base_patch16_plus_clip_{}", (240,), _of("plus", 16, _CLIP, num_classes=640)),
    ("vit_base_patch32_clip_{}", (224, 384, 448), _of("base", 32, _CLIP)),
    ("vit_base_patch32_clip_{}", (256,), _of("base", 32, _CLIP, num_classes=512)),
    ("vit_base_patch32_clip_quickgelu_{}", (224,), _of("base", 32, _QUICK, num_classes=512)),
    ("vit_large_patch14_clip_{}", (224, 336), _of("large", 14, _CLIP)),
    ("vit_large_patch14_clip_quickgelu_{}", (224, 336), _of("large", 14, _QUICK, num_classes=768)),
    ("vit_huge_patch14_clip_{}", (224, 336), _of("huge", 14, _CLIP)),
    ("vit_huge_patch14_clip_{}", (378,), _of("huge", 14, _CLIP, num_classes=1024)),
    ("vit_huge_patch14_clip_quickgelu_{}", (224, 378), _of("huge", 14, _QUICK, num_classes=1024)),
    ("vit_giant_patch14_clip_{}", (224,), _of("giant", 14, _CLIP, num_classes=1024)),
    ("vit_gigantic_patch14_clip_{}", (224, 378), _of("gigantic", 14, _CLIP, num_classes=1280)),
    ("vit_gigantic_patch14_clip_quickgelu_{}", (224,), _of("gigantic", 14, _QUICK, num_classes=1280)),
    # SigLIP: each tower with attention pooling, and with mean pooling
    ("vit_base_patch16_siglip_{}", (224, 256, 384, 512), _of("base", 16, _SIGLIP)),
    ("vit_base_patch16_siglip_gap_{}", (224, 256, 384, 512), _of("base", 16, _SIGLIP_GAP)),
    ("vit_base_patch32_siglip_{}", (256,), _of("base", 32, _SIGLIP, _TANH)),
    ("vit_base_patch32_siglip_gap_{}", (256,), _of("base", 32, _SIGLIP_GAP, _TANH)),
    ("vit_large_patch16_siglip_{}", (256, 384), _of("large", 16, _SIGLIP)),
    ("vit_large_patch16_siglip_gap_{}", (256, 384), _of("large", 16, _SIGLIP_GAP)),
    ("vit_large_patch16_siglip_{}", (512,), _of("large", 16, _SIGLIP, _TANH)),
    ("vit_large_patch16_siglip_gap_{}", (512,), _of("large", 16, _SIGLIP_GAP, _TANH)),
    ("vit_so400m_patch14_siglip_{}", (224, 378), _of("so400m", 14, _SIGLIP)),
    ("vit_so400m_patch14_siglip_gap_{}", (224, 378, 448, 896), _of("so400m", 14, _SIGLIP_GAP)),
    ("vit_so400m_patch16_siglip_{}", (256, 384, 512), _of("so400m", 16, _SIGLIP, _TANH)),
    ("vit_so400m_patch16_siglip_gap_{}", (256, 384, 512), _of("so400m", 16, _SIGLIP_GAP, _TANH)),
    ("vit_giantopt_patch16_siglip_{}", (256, 384), _of("giantopt", 16, _SIGLIP, _TANH)),
    ("vit_giantopt_patch16_siglip_gap_{}", (256, 384), _of("giantopt", 16, _SIGLIP_GAP, _TANH)),
    # DINOv2, TIPSv2, C-RADIO, AIMv2
    ("vit_small_patch14_dinov2", (518,), _of("small", 14, _DINOV2)),
    ("vit_base_patch14_dinov2", (518,), _of("base", 14, _DINOV2)),
    ("vit_large_patch14_dinov2", (518,), _of("large", 14, _DINOV2)),
    ("vit_giant_patch14_dinov2", (518,), _of("giant1536", 14, _DINOV2, _GLU)),
    ("vit_small_patch14_reg4_dinov2", (518,), _of("small", 14, _DINOV2_REG4)),
    ("vit_base_patch14_reg4_dinov2", (518,), _of("base", 14, _DINOV2_REG4)),
    ("vit_large_patch14_reg4_dinov2", (518,), _of("large", 14, _DINOV2_REG4)),
    ("vit_giant_patch14_reg4_dinov2", (518,), _of("giant1536", 14, _DINOV2_REG4, _GLU)),
    ("vit_base_patch14_reg1_tipsv2", (448,), _of("base", 14, _TIPSV2)),
    ("vit_large_patch14_reg1_tipsv2", (448,), _of("large", 14, _TIPSV2)),
    ("vit_so400m_patch14_reg1_tipsv2", (448,), _of("so400m", 14, _TIPSV2, _SO400M_EXACT)),
    ("vit_giant_patch14_reg1_tipsv2", (448,), _of("giant1536", 14, _TIPSV2, _GLU)),
    ("vit_base_patch16_radio_v3", (512,), _of("base", 16, _RADIO, layer_scale=1e-5)),
    ("vit_large_patch16_radio_v3", (512,), _of("large", 16, _RADIO, layer_scale=1e-5)),
    ("vit_huge_patch16_radio_v3", (512,), _of("huge", 16, _RADIO)),
    ("vit_giant_patch16_radio_v3", (512,), _of("giant1536", 16, _RADIO)),
    ("vit_so400m_patch16_radio_v4", (512,), _of("so400m", 16, _RADIO, _SO400M_EXACT, register_tokens=9)),
    ("vit_huge_patch16_radio_v4", (512,), _of("huge", 16, _RADIO, register_tokens=9)),
    ("aimv2_large_patch14_{}", (224, 336, 448), _of("large", 14, _AIMV2, heads=8, mlp_ratio=2.75)),
    ("aimv2_huge_patch14_{}", (224, 336, 448), _of("aim_huge", 14, _AIMV2)),
    ("aimv2_1b_patch14_{}", (224, 336, 448), _of("aim_1b", 14, _AIMV2)),
    ("aimv2_3b_patch14_{}", (224, 336, 448), _of("aim_3b", 14, _AIMV2)),
]
_ROWS = {name.format(image): fields | {"image_size": image} for name, images, fields in _TABLE for image in images}
_MLP_RATIOS: dict[str, float] = {name: row.pop("mlp_ratio", 4.0) for name, row in _ROWS.items()}
_DEFAULTS = {field.name: field.default for field in dataclass_fields(ViTConfig)}

VARIANTS: dict[str, dict[str, Any]] = {
    name: {field: value for field, value in row.items() if value != _DEFAULTS[field]}
    | ({"mlp_dim": int(row["dim"] * _MLP_RATIOS[name])} if _MLP_RATIOS[name] != 4.0 else {})
    for name, row in _ROWS.items()
}

# what ViTConfig lacks, in timm's terms -> the variants that need it
_MISSING = {
    "embed_layer=HybridEmbed": (
        "vit_base_mci_224 vit_tiny_r_s16_p8_224 vit_tiny_r_s16_p8_384 vit_small_r26_s32_224 vit_small_r26_s32_384 "
        "vit_base_r26_s32_224 vit_base_r50_s16_224 vit_base_r50_s16_384 vit_large_r50_s32_224 vit_large_r50_s32_384"
    ),
    "embed_layer=HybridEmbed and mlp_layer=GeGluMlp": (
        "vitamin_small_224 vitamin_base_224 vitamin_large_224 vitamin_large_256 vitamin_large_336 vitamin_large_384 "
        "vitamin_large2_224 vitamin_large2_256 vitamin_large2_336 vitamin_large2_384 "
        "vitamin_xlarge_256 vitamin_xlarge_336 vitamin_xlarge_384"
    ),
    "block_fn=ParallelScalingBlock": (
        "vit_base_patch16_xp_224 vit_large_patch14_xp_224 vit_huge_patch14_xp_224 vit_pwee_patch16_reg1_gap_256"
    ),
    "block_fn=DiffParallelScalingBlock": "vit_dpwee_patch16_reg1_gap_256",
    "block_fn=ParallelThingsBlock": "vit_small_patch16_18x2_224 vit_base_patch16_18x2_224",
    "block_fn=ResPostBlock": "vit_base_patch16_rpn_224",
    "attn_layer='diff'": "vit_dwee_patch16_reg1_gap_256 vit_dlittle_patch16_reg1_gap_256",
    # 378 gives the same patches from a resized image, so nothing but the cut of 6 pixels is missing
    "img_size=384 with patch_size=14 (a cut of 6 pixels; the variant with 378 has the same weights)": (
        "vit_so400m_patch14_siglip_384 vit_so400m_patch14_siglip_gap_384"
    ),
}
UNSUPPORTED: dict[str, str] = {name: field for field, names in _MISSING.items() for name in names.split()}

# timm keyword -> the field that takes its value as it is
_RENAMED = {
    "img_size": "image_size", "patch_size": "patch_size", "in_chans": "channels", "num_classes": "num_classes",
    "embed_dim": "dim", "depth": "depth", "num_heads": "heads", "qkv_bias": "qkv_bias", "proj_bias": "proj_bias",
    "qk_norm": "qk_norm", "scale_attn_norm": "attn_norm", "scale_mlp_norm": "mlp_norm",
    "class_token": "class_token", "reg_tokens": "register_tokens", "pre_norm": "pre_norm",
    "final_norm": "final_norm", "fc_norm": "norm_after_pool", "pool_include_prefix": "pool_prefix",
    "dynamic_img_size": "dynamic_image_size", "dynamic_img_pad": "dynamic_pad",
    "drop_rate": "head_dropout", "pos_drop_rate": "emb_dropout", "attn_drop_rate": "attn_dropout",
    "drop_path_rate": "drop_path",
}  # fmt: skip
# timm keyword -> what its strings mean
_CHOICES: dict[str, dict[str, Any]] = {
    "global_pool": POOLS_BY_TIMM_NAME,
    "act_layer": {name: name for name in ACTIVATIONS} | {"": "gelu", "swish": "silu"},
    # a norm asked for by name has timm's default eps, whatever eps the variant has
    "norm_layer": {"layernorm": ("layer", 1e-6), "": ("layer", 1e-6), "rmsnorm": ("rms", 1e-6)},
    "embed_norm_layer": {"layernorm": ("layer", 1e-6), "": None, "rmsnorm": ("rms", 1e-6)},
    "pos_embed": {"learn": True, "none": False, "": False},
}
_COMPUTED = ("mlp_ratio", "init_values", "no_embed_class", "proj_drop_rate")
# timm keyword -> the values that change nothing; any other needs what ViTConfig does not have
_FIXED: dict[str, tuple[Any, ...]] = {
    "embed_layer": (), "block_fn": (), "mlp_layer": (), "attn_layer": ("", "attn"),
    "patch_drop_rate": (0.0,), "fix_init": (False,), "weight_init": ("",), "pruned": (False,), "use_naflex": (False,),
}  # fmt: skip


def list_models(filter: str = "") -> list[str]:
    """The names that `create_model` takes, sorted; `filter` is a shell pattern such as 'vit_*_dinov2'."""
    return sorted(name for name in VARIANTS if fnmatchcase(name, filter or "*"))


def config_for(name: str, **timm_keywords: Any) -> ViTConfig:
    """The ViTConfig that timm's name and VisionTransformer keywords describe.

    Default values are timm's, which are the variant's own; None counts as not given. What depends on another
    keyword follows it: the MLP's width follows `embed_dim` and `mlp_ratio`, and the place of the final norm
    follows `global_pool` unless the variant or `fc_norm` fixes it.

    Args:
        name: a name from `list_models()`, without a pretrained tag.
        **timm_keywords: img_size, patch_size, in_chans, num_classes, global_pool ('token', 'avg', 'map', ''),
            embed_dim, depth, num_heads, mlp_ratio, qkv_bias, qk_norm, scale_attn_norm, scale_mlp_norm,
            proj_bias, init_values (0: no LayerScale), class_token, pos_embed ('learn', 'none', ''),
            no_embed_class, reg_tokens, pre_norm, final_norm, fc_norm, pool_include_prefix, dynamic_img_size,
            dynamic_img_pad, drop_rate, pos_drop_rate, proj_drop_rate (projection and MLP), attn_drop_rate,
            drop_path_rate, act_layer ('gelu', 'gelu_tanh', 'quick_gelu', 'silu'), norm_layer and
            embed_norm_layer ('layernorm', 'rmsnorm'). timm's other keywords may have their default value.

    Raises:
        ValueError, TypeError, NotImplementedError: as `create_model`.
    """
    fields = dict(_variant(name))
    given = {keyword: value for keyword, value in timm_keywords.items() if value is not None}
    for keyword, value in given.items():
        _check_keyword(keyword, value)
    fields |= {_RENAMED[keyword]: value for keyword, value in given.items() if keyword in _RENAMED}
    chosen = {keyword: _choice(keyword, value) for keyword, value in given.items() if keyword in _CHOICES}

    if "global_pool" in chosen:
        fields["pool"] = chosen["global_pool"]
    if "act_layer" in chosen:
        fields["activation"] = chosen["act_layer"]
    if "proj_drop_rate" in given:
        fields["proj_dropout"] = fields["mlp_dropout"] = given["proj_drop_rate"]
    if "init_values" in given:
        # timm builds no LayerScale for 0, which is how a caller turns off the variant's
        fields["layer_scale"] = given["init_values"] or None

    if "embed_dim" in given or "mlp_ratio" in given:
        ratio, dim = given.get("mlp_ratio", _MLP_RATIOS[name]), fields.get("dim", ViTConfig.dim)
        for keyword, value in (("mlp_ratio", ratio), ("embed_dim", dim)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"create_model: {keyword} must be a number, got {value!r}")
        fields["mlp_dim"] = int(dim * ratio)

    if "pos_embed" in chosen or "no_embed_class" in given:
        on_patches = given.get("no_embed_class", fields.get("pos_embed") == "patches")
        fields["pos_embed"] = ("patches" if on_patches else "all") if chosen.get("pos_embed", True) else "none"

    own_norm = fields.get("norm", ViTConfig.norm), fields.get("norm_eps", ViTConfig.norm_eps)
    norm = chosen.get("norm_layer", own_norm)
    patch_norm = chosen.get("embed_norm_layer", own_norm if fields.get("patch_norm") else None)
    if patch_norm not in (None, norm):
        raise NotImplementedError(
            f"create_model: embed_norm_layer={patch_norm} (kind, eps) is not supported beside norm_layer={norm}, "
            "only the same one"
        )
    return ViTConfig(**fields | {"norm": norm[0], "norm_eps": norm[1], "patch_norm": patch_norm is not None})


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
            f"create_model: the tag {tag!r} of {name!r} names weights, and vitfast downloads none: drop the tag, "
            "pass num_classes and img_size of those weights, and their file as checkpoint_path"
        )
    if ":" in name:
        raise ValueError(
            f"create_model: {name!r} is a place to load from, and vitfast downloads nothing: pass one of "
            "list_models(), and the file of the weights as checkpoint_path"
        )
    close = _close_to(untagged, [*VARIANTS, *UNSUPPORTED])
    raise ValueError(f"create_model: name must be one of list_models(), got {name!r}; {close}")


def _check_keyword(keyword: str, value: Any) -> None:
    if keyword in _RENAMED or keyword in _CHOICES or keyword in _COMPUTED:
        return
    if keyword not in _FIXED:
        close = _close_to(keyword, [*_RENAMED, *_CHOICES, *_COMPUTED, *_FIXED])
        raise TypeError(f"create_model: timm's VisionTransformer has no keyword {keyword!r} (={value!r}); {close}")
    if value not in _FIXED[keyword]:
        rule = f"only {', '.join(map(repr, _FIXED[keyword]))}" if _FIXED[keyword] else "leave it out"
        raise NotImplementedError(f"create_model: {keyword}={value!r} is not supported, {rule}")


def _choice(keyword: str, value: Any) -> Any:
    choices = _CHOICES[keyword]
    # timm takes 'LayerNorm' and 'layer_norm' for 'layernorm'
    name = value.lower().replace("_", "") if "norm" in keyword and isinstance(value, str) else value
    if not isinstance(name, str) or name not in choices:
        raise NotImplementedError(
            f"create_model: {keyword}={value!r} is not supported, only {', '.join(map(repr, choices))}"
        )
    return choices[name]


def _close_to(word: str, known: list[str]) -> str:
    matches = get_close_matches(word, known, n=4, cutoff=0.5)
    return f"close to it: {', '.join(matches)}" if matches else "nothing is close to it"
