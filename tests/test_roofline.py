"""FLOPs and bytes against torch's counter and known sizes; floors against the figures that the project was planned by."""

import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
import pytest

from vitfast import ViT, ViTConfig
from vitfast.bench import work
from vitfast.bench.case import Work
from vitfast.variants import config_for

# one of each part that changes the count: prefix tokens, pooling, gates, widths, norms, a second classifier
MODELS = [
    "test_vit", "vit_tiny_patch16_224", "vit_base_patch16_224", "vit_huge_patch14_224", "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2", "deit_small_distilled_patch16_224",
    "vit_base_patch16_siglip_224", "vit_base_patch16_clip_224", "vit_so150m_patch16_reg4_gap_256",
    "aimv2_large_patch14_224", "beit3_base_patch16_224",
]  # fmt: skip


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_flops_of_a_model_are_not_those_of_timms(name):
    config = config_for(name, num_classes=10)
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
        images = torch.randn(1, 3, *config.image_size)
    logits = counted(lambda: model.eval()(images))
    assert work.model(config, 1, "fp32").flops == logits
    print(name, logits)
