"""Blocks of other libraries that `vitfast.patch` has changed, through the kernels: as exact as the blocks were."""

import copy

import pytest
import timm.layers
import torch
import vit_pytorch.simple_vit
import vit_pytorch.vit
from attention_cases import INTERPRETED
from launches import Launches
from timm.models.vision_transformer import Block
from torchvision.models.vision_transformer import EncoderBlock
from transformers import Dinov2Config, ViTConfig
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer
from transformers.models.vit.modeling_vit import ViTLayer

import vitfast
from vitfast.check.acceptance import rms_bound, rms_ratio_of_few
from vitfast.kernels.triton import attention, layer_norm, linear, mlp, mlp_gated

pytestmark = pytest.mark.usefixtures("stock_norms_of_a_gpu")
DIM, HEADS = 32, 2
BLOCKS = {
    "timm": lambda: Block(DIM, HEADS, qkv_bias=True, init_values=0.5, drop_path=0.5),
    "timm, all norms": lambda: Block(DIM, HEADS, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    "timm, SwiGLU and RMS norms": lambda: Block(
        DIM, HEADS, proj_bias=False, mlp_layer=timm.layers.SwiGLU, norm_layer=timm.layers.RmsNorm
    ),
    "timm, packed SwiGLU": lambda: Block(DIM, HEADS, mlp_layer=timm.layers.SwiGLUPacked),
    "Hugging Face ViT": lambda: ViTLayer(config_of(ViTConfig)),
    "Hugging Face DINOv2": lambda: Dinov2Layer(config_of(Dinov2Config, drop_path_rate=0.5, layerscale_value=0.5)),
    "torchvision": lambda: EncoderBlock(HEADS, DIM, 2 * DIM, dropout=0.0, attention_dropout=0.0),
    "vit-pytorch": lambda: vit_pytorch.vit.Transformer(DIM, 1, HEADS, DIM // HEADS, 2 * DIM),
    "vit-pytorch, simple": lambda: vit_pytorch.simple_vit.Transformer(DIM, 1, HEADS, DIM // HEADS, 2 * DIM),
}


def config_of(kind, **options):
    sizes = {"hidden_size": DIM, "num_attention_heads": HEADS, "intermediate_size": 2 * DIM, "mlp_ratio": 2}
    config = kind(**sizes | options)
    config._attn_implementation = "sdpa"
    return config


def block_of(name, device):
    """With gains, biases and a massive channel; exact in fp16."""
    torch.manual_seed(0)
    block = BLOCKS[name]().to(device)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_((p + (0.3 if p.dim() == 1 else 0.05) * torch.randn_like(p)).half())
    x = torch.randn(3, 7, DIM, device=device)
    x[:, 0, 5] = 60
    return block, x.half().float()


def step(block, x, dtype, cotangent):
    """Output and all gradients; one draw for every dtype."""
    block, x = copy.deepcopy(block).to(dtype), x.to(dtype).requires_grad_()
    torch.manual_seed(3)
    out = block(x)
    out.backward(cotangent.to(dtype))
    return {"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in block.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "train"), [*((name, True) for name in BLOCKS), ("timm", False)])
def test_block_is_less_exact_than_it_was(name, dtype, train, device, monkeypatch):
    block, x = block_of(name, device)
    block.train(train)
    cotangent = torch.randn_like(x).half()
    exact, stock = step(block, x, torch.float64, cotangent), step(block, x, dtype, cotangent)
    vitfast.patch(block).require("attention", "norm", "mlp")
    launches = Launches(monkeypatch, attention, layer_norm, linear, mlp, mlp_gated)
    found = step(block, x, dtype, cotangent)
    ran = set(launches.names)
    assert "product" in ran and all(any(name.startswith(way) for name in ran) for way in ("forward", "backward"))
    assert list(found) == list(exact)
    for at, ref in exact.items():
        assert (found[at].dtype, found[at].shape) == (stock[at].dtype, stock[at].shape), at
        off, low, size = (t.double().square().mean().sqrt() for t in (found[at] - ref, stock[at] - ref, ref))
        # of an op; a whole block's gradients are too far off to be its yardstick in single numbers
        assert off <= rms_bound(low, size, dtype, rms_ratio_of_few(ref.numel(), dtype)), (at, off / low)
