"""How images are prepared for the weights that timm has under each name: facts of timm 1.0.31, tested against it.

timm reads them from `model.pretrained_cfg`, and takes ImageNet's without a word where a model has none.
"""

from __future__ import annotations

from typing import Any

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

# (mean and std, crop_pct, interpolation, crop_mode): names
_GROUPS = {
    (HALF, 0.9, "bicubic", "center"): (
        "vit_base_patch16_224 vit_base_patch16_gap_224 vit_base_patch16_reg4_gap_256 "
        "vit_base_patch16_siglip_224 vit_base_patch16_siglip_256 vit_base_patch16_siglip_384 "
        "vit_base_patch16_siglip_512 vit_base_patch16_siglip_gap_224 vit_base_patch16_siglip_gap_256 "
        "vit_base_patch16_siglip_gap_384 vit_base_patch16_siglip_gap_512 vit_base_patch32_224 "
        "vit_base_patch32_siglip_256 vit_base_patch32_siglip_gap_256 vit_base_patch8_224 "
        "vit_giant_patch14_224 vit_giantopt_patch16_siglip_256 vit_giantopt_patch16_siglip_384 "
        "vit_giantopt_patch16_siglip_gap_256 vit_giantopt_patch16_siglip_gap_384 vit_gigantic_patch14_224 "
        "vit_huge_patch14_224 vit_large_patch14_224 vit_large_patch16_224 vit_large_patch16_siglip_256 "
        "vit_large_patch16_siglip_384 vit_large_patch16_siglip_512 vit_large_patch16_siglip_gap_256 "
        "vit_large_patch16_siglip_gap_384 vit_large_patch16_siglip_gap_512 vit_large_patch32_224 "
        "vit_small_patch16_224 vit_small_patch16_36x1_224 vit_small_patch32_224 "
        "vit_so150m_patch16_reg4_map_256 vit_so400m_patch14_siglip_224 vit_so400m_patch14_siglip_378 "
        "vit_so400m_patch14_siglip_gap_224 vit_so400m_patch14_siglip_gap_378 vit_so400m_patch16_siglip_256 "
        "vit_so400m_patch16_siglip_384 vit_so400m_patch16_siglip_512 vit_so400m_patch16_siglip_gap_256 "
        "vit_so400m_patch16_siglip_gap_384 vit_so400m_patch16_siglip_gap_512 vit_tiny_patch16_224 "
    ),
    (CLIP, 1.0, "bicubic", "center"): (
        "aimv2_1b_patch14_224 aimv2_1b_patch14_336 aimv2_1b_patch14_448 aimv2_3b_patch14_224 "
        "aimv2_3b_patch14_336 aimv2_3b_patch14_448 aimv2_huge_patch14_224 aimv2_huge_patch14_336 "
        "aimv2_huge_patch14_448 aimv2_large_patch14_224 aimv2_large_patch14_336 aimv2_large_patch14_448 "
        "eva_large_patch14_196 vit_base_patch16_clip_quickgelu_224 vit_base_patch16_plus_clip_240 "
        "vit_base_patch16_radio_v3 vit_base_patch32_clip_256 vit_base_patch32_clip_384 "
        "vit_base_patch32_clip_448 vit_giant_patch14_clip_224 vit_giant_patch16_radio_v3 "
        "vit_gigantic_patch14_clip_224 vit_gigantic_patch14_clip_quickgelu_224 vit_huge_patch14_clip_224 "
        "vit_huge_patch14_clip_378 vit_huge_patch14_clip_quickgelu_224 vit_huge_patch14_clip_quickgelu_378 "
        "vit_huge_patch16_radio_v3 vit_huge_patch16_radio_v4 vit_large_patch14_clip_quickgelu_224 "
        "vit_large_patch14_clip_quickgelu_336 vit_large_patch16_radio_v3 vit_so400m_patch16_radio_v4 "
    ),
    (HALF, 0.95, "bicubic", "center"): (
        "flexivit_base flexivit_large flexivit_small test_vit test_vit2 test_vit3 test_vit4 "
        "vit_base_patch16_plus_240 vit_base_patch32_plus_256 vit_betwixt_patch16_gap_256 "
        "vit_betwixt_patch16_reg1_gap_256 vit_betwixt_patch16_reg4_gap_256 vit_little_patch16_reg1_gap_256 "
        "vit_little_patch16_reg4_gap_256 vit_medium_patch16_gap_240 vit_medium_patch16_gap_256 "
        "vit_medium_patch16_reg1_gap_256 vit_medium_patch16_reg4_gap_256 vit_mediumd_patch16_reg4_gap_256 "
        "vit_so150m_patch16_reg4_gap_256 vit_wee_patch16_reg1_gap_256 "
    ),
    (IMAGENET, 1.0, "bicubic", "center"): (
        "beit3_base_patch16_224 beit3_giant_patch14_224 beit3_giant_patch14_336 beit3_large_patch16_224 "
        "deit3_base_patch16_384 deit3_large_patch16_384 deit3_small_patch16_384 "
        "deit_base_distilled_patch16_384 deit_base_patch16_384 vit_base_patch14_dinov2 "
        "vit_base_patch14_reg4_dinov2 vit_giant_patch14_dinov2 vit_giant_patch14_reg4_dinov2 "
        "vit_huge_patch16_gap_448 vit_intern300m_patch14_448 vit_large_patch14_dinov2 "
        "vit_large_patch14_reg4_dinov2 vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2 "
    ),
    (HALF, 1.0, "bicubic", "center"): (
        "vit_base_patch16_384 vit_base_patch32_384 vit_betwixt_patch16_reg4_gap_384 "
        "vit_large_patch14_clip_224 vit_large_patch16_384 vit_large_patch32_384 "
        "vit_mediumd_patch16_reg4_gap_384 vit_small_patch16_384 vit_small_patch32_384 "
        "vit_so150m2_patch16_reg1_gap_256 vit_so150m2_patch16_reg1_gap_384 vit_so150m_patch16_reg4_gap_384 "
        "vit_so400m_patch14_siglip_gap_448 vit_so400m_patch14_siglip_gap_896 vit_tiny_patch16_384 "
    ),
    (IMAGENET, 0.9, "bicubic", "center"): (
        "deit3_base_patch16_224 deit3_huge_patch14_224 deit3_large_patch16_224 deit3_medium_patch16_224 "
        "deit3_small_patch16_224 deit_base_distilled_patch16_224 deit_base_patch16_224 "
        "deit_small_distilled_patch16_224 deit_small_patch16_224 deit_tiny_distilled_patch16_224 "
        "deit_tiny_patch16_224 vit_giant_patch16_gap_224 vit_huge_patch14_gap_224 vit_small_patch8_224 "
    ),
    (CLIP, 0.9, "bicubic", "center"): (
        "vit_base_patch32_clip_224 vit_base_patch32_clip_quickgelu_224 vit_betwixt_patch32_clip_224 "
        "vit_medium_patch16_clip_224 vit_medium_patch32_clip_224 vit_xsmall_patch16_clip_224 "
    ),
    (CLIP, 1.0, "bicubic", "squash"): (
        "eva_large_patch14_336 vit_base_patch16_clip_384 vit_gigantic_patch14_clip_378 "
        "vit_huge_patch14_clip_336 "
    ),
    (NONE, 1.0, "bicubic", "center"): (
        "vit_base_patch14_reg1_tipsv2 vit_giant_patch14_reg1_tipsv2 vit_large_patch14_reg1_tipsv2 "
        "vit_so400m_patch14_reg1_tipsv2 "
    ),
    (HALF, 1.0, "bicubic", "squash"): (
        "vit_large_patch14_clip_336 vit_so150m2_patch16_reg1_gap_448 "
    ),
    (NONE, 0.875, "bilinear", "center"): (
        "vit_base_patch16_224_miil "
    ),
    (CLIP, 0.95, "bicubic", "center"): (
        "vit_base_patch16_clip_224 "
    ),
    (HALF, 0.95, "bicubic", "squash"): (
        "vit_medium_patch16_gap_384 "
    ),
}
_BY_NAME = {name: how for how, names in _GROUPS.items() for name in names.split()}


def data_config(model_name: str, image_size: tuple[int, int]) -> dict[str, Any]:
    """timm's entries for the default weights of this name; images of `image_size`, height and width."""
    (mean, std), crop_pct, interpolation, crop_mode = _BY_NAME[model_name]
    return {
        "architecture": model_name, "input_size": (3, *image_size), "mean": mean, "std": std, "crop_pct": crop_pct,
        "interpolation": interpolation, "crop_mode": crop_mode,
    }  # fmt: skip
