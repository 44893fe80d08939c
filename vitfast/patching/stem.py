"""The convolution that cuts an image into patches and projects them, as a product: the stem of every family.

The module that holds it keeps its own forward, with its checks, its padding and its layouts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitfast import ops
from vitfast.model.plain import FORWARDS, plain_weights, why_changed
from vitfast.ops._check import autocast_dtype
from vitfast.ops._register import wants_gradient
from vitfast.patching.engine import runs_stock
from vitfast.patching.known import KNOWN

# 'module.Class' -> the name of what cuts the patches in it, '' for all of it
STEMS = {
    "timm.layers.patch_embed.PatchEmbed": "proj",
    "timm.layers.hybrid_embed.HybridEmbed": "",
    "torchvision.models.vision_transformer.VisionTransformer": "conv_proj",
    **{
        f"transformers.models.{module}.modeling_{module}.{prefix}PatchEmbeddings": "projection"
        for module, prefix in (
            ("vit", "ViT"), ("deit", "DeiT"), ("dinov2", "Dinov2"), ("dinov2_with_registers", "Dinov2WithRegisters"),
        )
    },
    # norms and a product, where there is no convolution to gain from
    "vit_pytorch.vit.ViT": "to_patch_embedding",
    "vit_pytorch.simple_vit.SimpleViT": "to_patch_embedding",
}  # fmt: skip

ON_CPU = "on cpu, the convolution that cuts the patches is faster than an op in training in fp32, and runs there"


def conv(module: nn.Conv2d, input: Tensor) -> Tensor:
    """`Conv2d.forward` of a convolution whose stride is its kernel: input [B, C, H, W] -> [B, D, H / ph, W / pw]."""
    patch = module.__dict__.get("_vitfast")
    if runs_stock(patch, input) or not patch.patch_embed or why_not(module) or _by_stock(module, input):
        return type(module).forward(module, input)
    (B, _, H, W), (ph, pw) = input.shape, module.kernel_size
    tokens = ops.patch_embed(input, module.weight, module.bias)
    return tokens.transpose(1, 2).view(B, module.out_channels, H // ph, W // pw)


KNOWN[nn.Conv2d].forward = conv


def why_not(module: nn.Module) -> str:
    """Why this is no convolution that cuts patches as it was built, '' where it is one."""
    # hooks of its own run whatever its forward is
    return cuts_otherwise(module) or ("" if plain_weights(module) else why_changed(module) or "")


def cuts_otherwise(module: nn.Module) -> str:
    """`why_not` but for its weights, which FSDP2 makes whole only while the model runs."""
    if type(module) is not nn.Conv2d:
        return f"is {type(module).__module__}.{type(module).__qualname__}, not Conv2d"
    if module.kernel_size != module.stride or module.padding != (0, 0) or module.dilation != (1, 1):
        return f"has kernel {module.kernel_size}, stride {module.stride}, padding {module.padding}"
    if module.groups != 1:
        return f"has {module.groups} groups"
    if nn.Conv2d.forward is not FORWARDS[nn.Conv2d]:
        return "is a Conv2d, whose forward was patched"
    return ""


def _by_stock(module: nn.Conv2d, images: Tensor) -> bool:
    """Whether the convolution is faster, or its words on a mistake are wanted."""
    weight, (ph, pw) = module.weight, module.kernel_size
    if images.dim() != 4 or images.shape[1] != module.in_channels or images.shape[2] % ph or images.shape[3] % pw:
        return True
    if autocast_dtype(weight) is None and images.dtype != weight.dtype:
        return True
    # see ON_CPU: an op takes 1.1 to 1.3 times as long there, and 0.6 to 0.95 elsewhere
    full = (autocast_dtype(weight) or weight.dtype) is torch.float32
    return full and images.is_cpu and wants_gradient(images, weight, module.bias)
