"""torchvision: the blocks of `vit_*`, whose attention is `nn.MultiheadAttention`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitfast.model.plain import FORWARDS
from vitfast.patching.engine import Heads, attention_branch, mlp_branch, runs_stock
from vitfast.patching.known import KNOWN, LIBRARIES, Known


def block(module: nn.Module, input: Tensor) -> Tensor:
    """`torchvision.models.vision_transformer.EncoderBlock.forward`."""
    patch = module.__dict__.get("_vitfast")
    # what is no batch of tokens is theirs to refuse
    if runs_stock(patch, input, module.training) or input.dim() != 3:
        return type(module).forward(module, input)
    x = attention_branch(
        module, patch, input, lambda attn, normed: attn(normed, normed, normed, need_weights=False)[0]
    )  # fmt: skip
    return mlp_branch(module, patch, x)


def _heads(attn: Any) -> Heads:
    # not its `head_dim`, which stays what it was where somebody changes the number of heads
    head_dim = attn.embed_dim // attn.num_heads
    return Heads(attn.num_heads, head_dim, head_dim**-0.5, attn.dropout if attn.training else 0.0, False)


def _other_than_built(attn: Any) -> str:
    if attn.in_proj_weight is None or attn.bias_k is not None or attn.bias_v is not None or attn.add_zero_attn:
        return "has projections of its own for keys or values, or adds keys"
    return "" if attn.batch_first else "has batch_first off"


def _longer(mlp: Any) -> str:
    return "" if len(mlp) == 5 else f"has {len(mlp)} modules, not 5"


# torch's own, which is known without a digest
KNOWN[nn.MultiheadAttention] = Known("attention", {"proj": "out_proj"}, read=_heads, why_not=_other_than_built)
FORWARDS[nn.MultiheadAttention] = nn.MultiheadAttention.forward
LIBRARIES |= {
    "torchvision.models.vision_transformer.EncoderBlock": Known(
        "block",
        {
            "norm1": "ln_1", "attn": "self_attention", "drop1": "dropout",
            "norm2": "ln_2", "mlp": "mlp",
        },
        forward=block,
    ),
    "torchvision.models.vision_transformer.MLPBlock": Known(
        "mlp", {"fc1": "0", "act": "1", "mid_drop": "2", "fc2": "3", "drop": "4"}, why_not=_longer
    ),
}  # fmt: skip
