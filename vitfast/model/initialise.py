"""How fresh weights are drawn: as timm draws them, after its modules were made."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitfast.model.attention_pool import AttentionPool
from vitfast.model.block import Mlp


@torch.no_grad()
def init_as_timm(model: nn.Module) -> None:
    """What timm does after its modules were made."""
    if next(model.parameters()).is_meta:
        return  # nothing is there, and drawing it takes its time
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for mlp in model.modules():
        if mlp is not model and hasattr(mlp, "init_weights"):
            # timm's, which somebody put there
            mlp.init_weights()
        elif type(mlp) is Mlp and mlp.kind == "swiglu":
            open_gate(mlp.fc1_g.weight, mlp.fc1_g.bias)
        elif type(mlp) is Mlp and mlp.kind == "swiglu_packed":
            # timm opens the second half, also where the first is the gate
            half, bias = mlp.fc1.out_features // 2, mlp.fc1.bias
            open_gate(mlp.fc1.weight[half:], None if bias is None else bias[half:])
    for name, std in (("pos_embed", 0.02), ("cls_token", None), ("reg_token", None), ("dist_token", 0.02)):
        token = getattr(model, name, None)
        if token is not None:
            nn.init.normal_(token, std=1e-6) if std is None else nn.init.trunc_normal_(token, std=std)
    if type(model.attn_pool) is AttentionPool:
        nn.init.trunc_normal_(model.attn_pool.latent, std=model.config.dim**-0.5)


def open_gate(weight: Tensor, bias: Tensor | None) -> None:
    """Start a SwiGLU gate at a constant: weights near zero, bias one."""
    nn.init.normal_(weight, std=1e-6)
    if bias is not None:
        nn.init.ones_(bias)
