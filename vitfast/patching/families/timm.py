"""timm: the blocks of `VisionTransformer`, and so of DeiT, DINOv2, SigLIP and CLIP under timm's names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitfast.patching.engine import Heads, attention_branch, mlp_branch, runs_stock
from vitfast.patching.known import LIBRARIES, Known, norm_why_not


def block(module: nn.Module, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """`timm.models.vision_transformer.Block.forward`."""
    patch = module.__dict__.get("_vitfast")
    if runs_stock(patch, x, module.training):
        return type(module).forward(module, x, attn_mask=attn_mask, is_causal=is_causal)
    x = attention_branch(
        module, patch, x,
        lambda attn, normed: attn(normed, attn_mask=attn_mask, is_causal=is_causal),
        absorbs=attn_mask is None and is_causal is False,
    )  # fmt: skip
    return mlp_branch(module, patch, x)


def _heads(attn: Any) -> Heads:
    drop, fused = attn._modules["attn_drop"], attn.fused_attn
    # where timm makes the weights it multiplies by `scale` and calls the dropout; else SDPA's own scale, and the rate
    scale = attn.head_dim**-0.5 if fused else attn.scale
    rate = getattr(drop, "p", 0.0) if (attn if fused else drop).training else 0.0
    return Heads(attn.num_heads, attn.head_dim, scale, rate, not fused)


def _slow_norm(norm: Any) -> str:
    # it computes in autocast's dtype, or by another package
    return "has timm's fast norm on" if norm._fast_norm else norm_why_not(norm)


def _glu(mlp: Any) -> str:
    return "has its gate last" if mlp.gate_last else "" if mlp.chunk_dim == -1 else f"has chunk_dim {mlp.chunk_dim}"


_MLP = {"act": "act", "mid_drop": "drop1", "inner_norm": "norm", "fc2": "fc2", "drop": "drop2"}
LIBRARIES |= {
    "timm.models.vision_transformer.Block": Known(
        "block",
        {
            "norm1": "norm1", "attn": "attn", "scale1": "ls1", "drop_path1": "drop_path1",
            "norm2": "norm2", "mlp": "mlp", "scale2": "ls2", "drop_path2": "drop_path2",
        },
        forward=block,
    ),
    "timm.layers.attention.Attention": Known(
        "attention",
        {
            "qkv": "qkv", "q_norm": "q_norm", "k_norm": "k_norm", "attn_drop": "attn_drop", "inner_norm": "norm",
            "output_gate": "gate", "proj": "proj", "proj_drop": "proj_drop",
        },
        read=_heads,
    ),
    "timm.layers.mlp.Mlp": Known("mlp", {"fc1": "fc1"} | _MLP),
    "timm.layers.mlp.GluMlp": Known("mlp", {"fc1": "fc1"} | _MLP, read=lambda mlp: True, why_not=_glu),
    "timm.layers.mlp.SwiGLU": Known("mlp", {"gate": "fc1_g", "value": "fc1_x"} | _MLP),
    "timm.layers.norm.LayerNorm": Known("norm", why_not=_slow_norm),
    "timm.layers.norm.RmsNorm": Known("norm", why_not=_slow_norm),
    "timm.layers.layer_scale.LayerScale": Known("scale", read=lambda scale: scale.gamma),
    "timm.layers.drop.DropPath": Known("drop_path", read=lambda path: path.drop_prob, calls=("drop_path",)),
    "timm.layers.activations.GELU": Known("activation", read=lambda act: "gelu"),
    "timm.layers.activations.GELUTanh": Known("activation", read=lambda act: "gelu_tanh"),
    "timm.layers.activations.QuickGELU": Known("activation", read=lambda act: "quick_gelu", calls=("quick_gelu",)),
}  # fmt: skip
