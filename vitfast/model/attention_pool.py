"""Pooling of all tokens by attention. Shapes: B images, N tokens, D channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitfast.config import ViTConfig
from vitfast.model.block import Mlp, norm_of_heads
from vitfast.model.layers import OnOps, build_norm, norm_report, reasons_of, run_linear, run_norm
from vitfast.model.plain import any_global_hook, plain, stands_for


class AttentionPool(OnOps, nn.Module):
    """Pooling by one learned query that attends to all tokens, then an MLP (SigLIP's head, timm's 'map')."""

    # timm's attributes for what it can do besides
    latent_len, pos_embed, feat_size, pool = (property(lambda self, fixed=f: fixed) for f in (1, None, None, "token"))
    latent_dim = out_features = property(lambda self: self.latent.shape[-1])

    def __init__(self, config: ViTConfig):
        super().__init__()
        dim = config.dim
        self.num_heads, self.head_dim = config.heads, dim // config.heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = True
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)
        self.norm = build_norm(config, dim)
        # timm's pooling MLP is a plain one with biases, whatever the blocks have
        self.mlp = Mlp(config.replace(mlp="mlp", mlp_norm=False, mlp_dropout=0.0, proj_bias=True))

    def fusion_report(self) -> list[tuple[str, str, list[str]]]:
        """`Block.fusion_report` of the pooling; its MLP sees one row an image and always runs as modules."""
        parts = [("q", self.q, nn.Linear), ("kv", self.kv, nn.Linear), ("proj", self.proj, nn.Linear)]
        whole = reasons_of([("attn_pool", self, AttentionPool)])
        rows = [(f"attn_pool.{part[0]}", "linear", whole + reasons_of([part])) for part in parts]
        return [*rows, ("attn_pool softmax", "attention", whole), *norm_report([("attn_pool.norm", self.norm)])]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Tokens [B, N, D] -> [B, D]; attn_mask: as in `ops.attention`, of one query."""
        heads = (self.num_heads, self.head_dim)
        latent = self.latent
        if not plain(self.q, nn.Linear) or any_global_hook():
            # once for each image, as timm's: somebody watches it
            latent = latent.expand(x.shape[0], -1, -1)
        q = run_linear(self.q, latent, self.ops).expand(x.shape[0], -1, -1).unflatten(-1, heads)
        k, v = run_linear(self.kv, x, self.ops).unflatten(-1, (2, *heads)).unbind(2)
        q, k = norm_of_heads(self.q_norm, q, self.ops), norm_of_heads(self.k_norm, k, self.ops)
        out = self.ops.attention(q, k, v, scale=self.scale, mask=attn_mask)
        pooled = self.proj_drop(run_linear(self.proj, out, self.ops))
        return (pooled + self.mlp(run_norm(self.norm, pooled, self.ops)))[:, 0]


stands_for(AttentionPool)
