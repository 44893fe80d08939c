"""Models that are recognised by their weights, and that no ViTConfig describes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class Refused(NamedTuple):
    """Weights of a model that cannot be held.

    Attributes:
        pattern: regex that one of the names matches.
        whose: whose model it is; lacks: what ViTConfig does not have.
        without: regex that no name matches, '' for none.
        beside: regex that another name matches.
        hidden: what is lacking has no weights; the model is known by what it alone of published ones does without.
    """

    pattern: str
    whose: str
    lacks: str
    without: str = ""
    beside: str = ""
    hidden: bool = False


ROTARY = "rotary positions"
RELATIVE = "relative positions in attention"
STAGES = "stages of several widths"
QKV = r"(^|\.)blocks\.0\.attn\.qkv\.weight$"
# the first that fits; patterns of one library's names before those that others share
REFUSED = (
    Refused(
        r"(^|\.)patch_to_embedding\.", "vit-pytorch before 0.7.0",
        "the scale of attention that it had until 0.6.6, dim ** -0.5 (those of 0.6.7 and 0.6.8 load once "
        "patch_to_embedding is renamed to to_patch_embedding.1)",
    ),
    Refused(r"\.mix_heads_(pre|post)_attn$", "vit-pytorch's CaiT", "class attention and talking heads"),
    Refused(r"(^|\.)reattn_weights$", "vit-pytorch's DeepViT", "attention that mixes heads"),
    Refused(r"(^|\.)to_patch_tokens\.", "vit-pytorch's ViT for small datasets", "shifted patches and their attention"),
    Refused(r"(^|\.)patch_merger\.", "vit-pytorch's ViT with a patch merger", "tokens that are merged on the way"),
    Refused(r"(^|\.)layers\.\d+\.[01]\.fns\.", "vit-pytorch's parallel ViT", "several branches beside one another"),
    Refused(r"(^|\.)transformer\.layers\..*\.rel_pos_bias\.", "a model of vit-pytorch", RELATIVE),
    Refused(
        r"(^|\.)to_patch_embedding\.", "a model of vit-pytorch that is not its ViT or SimpleViT", "its layers",
        r"(^|\.)transformer\.layers\.0\.0\.(fn\.){0,2}to_qkv\.weight$",
    ),
    Refused(r"(^|\.)patch_embed\.backbone\.", "timm's hybrids (and ViTamin)", "a stem of convolutions"),
    Refused(r"(^|/)conv_root/|(^|/)block1/unit\d+/", "Google's hybrids", "a stem that is a ResNet"),
    Refused(r"(^|\.)conv_proj\.conv_(bn_relu|last)", "torchvision's ViT with a stem of convolutions", "such a stem"),
    Refused(r"(^|\.)rope_embed(dings)?\.|(^|\.)storage_tokens$", "DINOv3", ROTARY),
    Refused(r"(^|\.)layer\.\d+\.layer_scale1\.lambda1$", "Hugging Face's DINOv3", ROTARY, r"position_embeddings$"),
    Refused(r"(^|\.)model\.layer\.\d+\.attention\.q_proj\.", "Hugging Face's DINOv3", ROTARY, r"position_embeddings$"),
    Refused(r"(^|\.)layers\.\d+\.blocks\.\d+\.", "Swin and other hierarchical models", STAGES),
    Refused(r"(^|\.)layers?\.\d+\.lambda_1$", "Hugging Face's BEiT or Data2Vec", RELATIVE),
    Refused(r"(^|\.)attn\.(rel_pos_[hw]|rel_pos\.|relative_position_bias_table)", "SAM or BEiT", RELATIVE),
    Refused(r"(^|\.)attention\.rel_pos_[hw]$", "Hugging Face's ViTDet or SAM", RELATIVE),
    Refused(r"(^|\.)attention\.relative_position_bias\.", "Hugging Face's BEiT", RELATIVE),
    Refused(r"(^|\.)rel_pos_bias\.", "BEiT with shared relative positions", RELATIVE),
    Refused(r"(^|\.)blocks_token_only\.", "CaiT", "class attention and talking heads"),
    Refused(r"(^|\.)blocks\.\d+\.attn\.(temperature|qk\.|gating_param)", "XCiT or ConViT", "their attention"),
    Refused(r"(^|\.)blocks\.\d+\.attn\.lambda_[qk]1$", "timm's differential attention", "that attention"),
    Refused(r"(^|\.)blocks\.\d+\.attn\.(q_bias|v_bias)$", "EVA or BEiT", "a bias of queries and values alone"),
    Refused(r"(^|\.)blocks\.\d+\.(attns|ffns)\.\d+\.", "timm's parallel blocks", "several branches beside one another"),
    Refused(r"(^|\.)blocks\.\d+\.(in_norm|mlp_out_proj)\.", "timm's parallel blocks", "attention beside the MLP"),
    Refused(r"(^|\.)blocks\.\d+\.gamma_?1$", "EVA, EVA-02 or DINOv3", ROTARY, r"(^|\.)pos_embed$"),
    Refused(r"(^|\.)rope\.freqs", "EVA-02 or timm's ViTs with mixed RoPE", ROTARY),
    Refused(r"(^|\.)blocks\.\d+\.attn\.q_proj\.", "EVA-02", ROTARY),
    Refused(r"(^|\.)norm_pre\.weight$", "the Perception Encoder", ROTARY, "", r"(^|\.)attn_pool\.latent$", True),
    Refused(
        r"(^|\.)norm_pre\.weight$", "the Perception Encoder for dense prediction or language", ROTARY,
        r"(^|\.)(fc_)?norm\.weight$", hidden=True,
    ),
    Refused(
        QKV, "timm's Qwen3 ViT", ROTARY, r"(^|\.)(cls_token|reg_token|attn_pool\.latent|(fc_)?norm\.weight)$",
        hidden=True,
    ),
    Refused(
        QKV, "timm's vit_base_patch16_rpn", "norms after attention and after the MLP",
        r"(^|\.)(cls_token|reg_token|qkv\.bias|ls1\.gamma|gamma_1)$", r"(^|\.)fc_norm\.weight$", True,
    ),
    Refused(r"(^|\.)shared_rel_pos\.", "timm's ViTs with shared relative positions", RELATIVE),
    Refused(r"(^|\.)blocks\.\d+\.(attn1|mlp1)\.", "DeiT's parallel blocks", "several branches beside one another"),
    Refused(r"(^|\.)patch_embed\.proj\.\d+\.", "DeiT or XCiT", "a stem of convolutions"),
    Refused(r"(^|\.)pos_embed_window$|(^|\.)blocks\.\d+\.proj\.weight$", "Hiera", STAGES),
    Refused(r"(^|\.)embeds\.(pos_embed|proj\.weight)", "timm's NaFlexViT", "images of several sizes in one batch"),
    Refused(r"(^|\.)tokens_to_token\.", "T2T-ViT", "its stem"),
    Refused(r"(^|\.)attnpool\.positional_embedding$", "CLIP with a ResNet", "a tower of convolutions"),
    Refused(r"(^|\.)attn_pool\.query$", "CoCa", "its attentional pooling"),
    Refused(r"(^|\.)blocks\.\d+\.norm_in\.|(^|\.)pixel_embed\.", "TNT", "a transformer inside of patches"),
    Refused(r"(^|\.)patch_embed\.0\.proj\.|(^|\.)patch_embeds\.0\.", "CrossViT or Twins", "several patch projections"),
    Refused(r"(^|\.)patch_conv\.weight$|(^|\.)vision_model\.patch_embedding\.patch", "Pixtral", ROTARY),
)  # fmt: skip


def refused(names: Iterable[str], told: bool) -> Refused | None:
    """The first model that is known and cannot be held, of which there are such names.

    Args:
        told: a config says what has no weights.
    """
    names = list(names)
    has = lambda pattern: any(re.search(pattern, name) for name in names)  # noqa: E731
    fits = lambda r: has(r.pattern) and has(r.beside) and not (r.without and has(r.without))  # noqa: E731
    return next((r for r in REFUSED if not (told and r.hidden) and fits(r)), None)
