"""The parts of a ViT in the order an image travels, after its patches: attention, MLP, block, attention pooling.

Parameters sit on plain `nn` modules under timm's names. A block hands them to its ops where the modules around are
untouched, and calls the modules themselves where somebody changed one (see `plain`).
Shapes: B images, N tokens, D channels, H heads.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vitfast import reference
from vitfast.choose.exportable import refuse_proxy
from vitfast.config import ViTConfig
from vitfast.model.layers import (
    ACTIVATIONS,
    NORMS,
    DropPath,
    LayerScale,
    OnOps,
    activation_name,
    build_activation,
    build_norm,
    dropping,
    eps_of,
    gamma_of,
    norm_args,
    norm_kind,
    norm_report,
    parameters_of,
    reasons_of,
    run_linear,
    run_norm,
)
from vitfast.model.plain import any_global_hook, plain, stands_for, watched_view
from vitfast.ops._attention_check import check_mask


def _norm_of_heads(norm: nn.Module, t: Tensor, using: ModuleType) -> Tensor:
    """`norm` of [B, N, H, head_dim]; one that somebody watches or put there sees timm's [B, H, N, head_dim]."""
    if plain(norm, nn.Identity, *NORMS) and not any_global_hook():
        return run_norm(norm, t, using)
    return norm(t.transpose(1, 2)).transpose(1, 2)


def given(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """What a part is told of attention: only what was asked for, which one that somebody put there may not know.

    Raises:
        ValueError: both are asked for.
    """
    if attn_mask is not None and is_causal:
        raise ValueError("is_causal must be False where attn_mask is given, got True: a mask can say the same")
    how: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
    return how | ({"is_causal": True} if is_causal else {})


def with_causal(mask: Tensor | None, is_causal: bool, x: Tensor) -> Tensor | None:
    """`mask`, or for tokens x [B, N, D] the mask [N, N] under which a token attends to itself and those before it.

    Raises:
        ValueError: both are asked for.
    """
    refuse_proxy(x)
    if not is_causal:
        return mask
    given(mask, is_causal)
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril_()


class Attention(OnOps, nn.Module):
    """Multi-head self-attention with one packed projection; called directly it runs without norm and residual.

    Attributes are timm's. `fused_attn=False` makes the attention weights exist; a linear layer put at `gate` is
    computed of the tokens, and its sigmoid multiplies what attention gives.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        inner = config.heads * config.head_dim
        self.num_heads, self.head_dim, self.attn_dim = config.heads, config.head_dim, inner
        self.scale = config.head_dim**-0.5
        self.fused_attn = True
        # as vit-pytorch's attention does
        self.calls_dropout = config.input_norm
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=config.qkv_bias)
        self.q_norm = build_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(config.attn_dropout)
        self.norm = build_norm(config, inner) if config.attn_norm else nn.Identity()
        self.gate: nn.Module | None = None
        self.proj = nn.Linear(inner, config.dim, bias=config.proj_bias) if config.out_proj else nn.Identity()
        self.proj_drop = nn.Dropout(config.proj_dropout)

    def _weights_are_watched(self) -> bool:
        """Whether somebody replaced or watches the dropout of the attention weights, which timm's does not call, or
        watches the softmax of vit-pytorch's, or asked for the weights with `fused_attn`.
        """
        if self.calls_dropout and (any_global_hook() or ("_views" in self.__dict__ and watched_view(self, "attend"))):
            return True
        return not self.fused_attn or not plain(self._modules["attn_drop"], nn.Dropout)

    def dropout_p(self) -> float:
        """The rate at which weights are dropped now: timm's attention asks itself for the mode, vit-pytorch's calls the
        module.
        """
        drop = self._modules["attn_drop"]
        return drop.p if (drop if self.calls_dropout else self).training else 0.0

    def split(self, projected: Tensor, parts: int) -> Tensor:
        """[B, N, parts * H * head_dim] -> [B, N, parts, H, head_dim]"""
        return projected.view(*projected.shape[:-1], parts, self.num_heads, self.head_dim)

    def attend_packed(self, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
        """Packed projection [B, N, 3, H, head_dim] -> [B, N, H * head_dim]."""
        parts = self._modules
        normed = not (plain(parts["q_norm"], nn.Identity) and plain(parts["k_norm"], nn.Identity))
        if normed or any_global_hook() or self._weights_are_watched():
            return self.attend(*qkv.unbind(2), mask)
        out = self.ops.attention_qkv(qkv, scale=self.scale, mask=mask, dropout_p=self.dropout_p())
        return run_norm(parts["norm"], out, self.ops)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q [B, Nq, H, head_dim], k and v [B, Nk, H, head_dim] -> [B, Nq, H * head_dim]."""
        q, k = _norm_of_heads(self.q_norm, q, self.ops), _norm_of_heads(self.k_norm, k, self.ops)
        if not self._weights_are_watched():
            out = self.ops.attention(q, k, v, scale=self.scale, mask=mask, dropout_p=self.dropout_p())
        else:
            # so they have to exist
            if mask is not None:
                check_mask(mask, q, k)
            attend = watched_view(self, "attend")
            softmax = {} if attend is None else {"softmax": attend}
            out = reference.attention_visibly(q, k, v, self.scale, mask, self.attn_drop, **softmax)
        return run_norm(self.norm, out, self.ops)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        gate = None if self.gate is None else self.gate(x).sigmoid()
        out = self.attend_packed(self.split(self.qkv(x), 3), with_causal(attn_mask, is_causal, x))
        return self.proj_drop(self.proj(out if gate is None else out * gate))


class Mlp(nn.Module):
    """Two projections with an activation between, gated or not; called directly it runs without norm and residual."""

    # of timm's gated MLP: the first half of fc1 is the gate
    gate_last, chunk_dim = property(lambda self: False), property(lambda self: -1)

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.kind = config.mlp
        hidden = config.mlp_dim // 2 if self.kind == "swiglu_packed" else config.mlp_dim
        if self.kind == "swiglu":
            self.fc1_g = nn.Linear(config.dim, hidden, bias=config.proj_bias)
            self.fc1_x = nn.Linear(config.dim, hidden, bias=config.proj_bias)
        else:
            self.fc1 = nn.Linear(config.dim, config.mlp_dim, bias=config.proj_bias)
        self.act = build_activation(config.activation)
        self.drop1 = nn.Dropout(config.mlp_dropout)
        self.norm = build_norm(config, hidden) if config.mlp_norm else nn.Identity()
        # of `ops.mlp`
        self.recompute = "act"
        self.fc2 = nn.Linear(hidden, config.dim, bias=config.proj_bias)
        self.drop2 = nn.Dropout(config.mlp_dropout)

    @property
    def first_names(self) -> tuple[str, ...]:
        """Names of the projections before the activation."""
        return ("fc1_g", "fc1_x") if self.kind == "swiglu" else ("fc1",)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            hidden = self.act(self.fc1_g(x)) * self.fc1_x(x)
        elif self.kind == "swiglu_packed":
            gate, value = self.fc1(x).chunk(2, dim=-1)
            hidden = self.act(gate) * value
        else:
            hidden = self.act(self.fc1(x))
        return self.drop2(self.fc2(self.norm(self.drop1(hidden))))


class Block(OnOps, nn.Module):
    """Pre-norm transformer block: x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, config: ViTConfig, drop_path: float):
        super().__init__()
        scale = lambda: LayerScale(config.dim, config.layer_scale) if config.layer_scale else nn.Identity()  # noqa: E731
        self.norm1 = build_norm(config, config.dim)
        self.attn = Attention(config)
        self.ls1 = scale()
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = build_norm(config, config.dim)
        self.mlp = Mlp(config)
        self.ls2 = scale()
        self.drop_path2 = DropPath(drop_path)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, keep: int | None = None
    ) -> Tensor:
        """Tokens [B, N, D] -> [B, N, D]; an untouched block computes only the first `keep` if asked."""
        if attn_mask is None and not is_causal and self.training and self._leaves_images_out():
            return self._without_dropped(x, keep)
        return self.mlp_branch(self.attention_branch(x, attn_mask, keep, is_causal=is_causal))

    def _leaves_images_out(self) -> bool:
        parts = self._modules["drop_path1"], self._modules["drop_path2"]
        paths = all(type(part) is DropPath for part in parts)
        return paths and any(part.leaves_out() for part in parts) and self.untouched()

    def _without_dropped(self, x: Tensor, keep: int | None) -> Tensor:
        """`forward`, each branch for the images only that stochastic depth leaves it."""
        kept = self.drop_path1.kept(x, gamma_of(self.ls1))
        done = self.attention_branch(x.index_select(0, kept), None, keep, kept=True)
        x = (x if keep is None else x[:, :keep]).to(done.dtype).index_copy(0, kept, done)
        kept = self.drop_path2.kept(x, gamma_of(self.ls2))
        done = self.mlp_branch(x.index_select(0, kept), kept=True)
        return x.to(done.dtype).index_copy(0, kept, done)

    def _row_scale(self, drop_path: nn.Module, x: Tensor, gamma: Tensor | None, kept: bool) -> Tensor | None:
        if type(drop_path) is nn.Identity:  # timm's where nothing is dropped
            return None
        return drop_path.kept_scale(x, gamma) if kept else drop_path.row_scale(x, gamma)

    # The two branches read their parts from `_modules`, for the reason given at `parameters_of`.

    def attention_branch(
        self, x: Tensor, attn_mask: Tensor | None = None, keep: int | None = None, kept: bool = False,
        is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        """x + attention(norm1(x)), for all tokens, or in an untouched block for the first `keep`.

        kept: stochastic depth has decided already, and all these images keep the branch.
        """
        parts = self._modules
        norm1, attn, scale, drop_path = parts["norm1"], parts["attn"], parts["ls1"], parts["drop_path1"]
        if any_global_hook() or not plain(attn, Attention) or attn.gate is not None:
            # what somebody put there need not know of it
            causal = {"is_causal": True} if is_causal else {}
            return x + drop_path(scale(attn(norm1(x), attn_mask=attn_mask, **causal)))
        if is_causal is not False:  # a proxy of a tracer is to be told
            attn_mask = with_causal(attn_mask, is_causal, x)
        qkv, proj, proj_drop = attn._modules["qkv"], attn._modules["proj"], attn._modules["proj_drop"]
        if keep is not None:
            out = self._attend_first(x, keep)
            x = x[:, :keep]
        else:
            if plain(norm1, *NORMS) and plain(qkv, nn.Linear):
                packed = self.ops.linear(x, *parameters_of(qkv), **norm_args(norm1))
            else:
                packed = qkv(norm1(x))
            out = attn.attend_packed(attn.split(packed, 3), attn_mask)
        if not self._plain_tail(scale, drop_path, proj_drop) or not plain(proj, nn.Linear):
            return x + drop_path(scale(proj_drop(proj(out))))
        gamma = gamma_of(scale)
        if dropping(proj_drop):
            branch = proj_drop(self.ops.linear(out, *parameters_of(proj)))
            return x + reference.scale_branch(branch, gamma, self._row_scale(drop_path, x, gamma, kept))
        row_scale = self._row_scale(drop_path, x, gamma, kept)
        return self.ops.linear(out, *parameters_of(proj), gamma=gamma, row_scale=row_scale, residual=x)

    def _attend_first(self, x: Tensor, keep: int) -> Tensor:
        """Attention of the first `keep` tokens over all; keys and values for all, queries only for these."""
        attn, qkv, norm = self.attn, self.attn.qkv, norm_args(self.norm1)
        inner, (weight, bias) = attn.attn_dim, parameters_of(qkv)
        kv = self.ops.linear(x, weight[inner:], None if bias is None else bias[inner:], **norm)
        q = self.ops.linear(x[:, :keep], weight[:inner], None if bias is None else bias[:inner], **norm)
        return attn.attend(attn.split(q, 1).squeeze(2), *attn.split(kv, 2).unbind(2))

    def mlp_branch(self, x: Tensor, kept: bool = False) -> Tensor:
        """x + mlp(norm2(x)); kept as in `attention_branch`."""
        parts = self._modules
        norm2, mlp, scale, drop_path = parts["norm2"], parts["mlp"], parts["ls2"], parts["drop_path2"]
        if not self._plain_mlp():
            return x + drop_path(scale(mlp(norm2(x))))
        inside = mlp._modules
        fc2, drop1, drop2, inner_norm = inside["fc2"], inside["drop1"], inside["drop2"], inside["norm"]
        gamma, has_norm = gamma_of(scale), type(inner_norm) is not nn.Identity
        if mlp.kind != "swiglu" and not has_norm and not dropping(drop1) and not dropping(drop2):
            return self.ops.mlp(
                x, *parameters_of(norm2), *parameters_of(inside["fc1"]), *parameters_of(fc2),
                norm_eps=eps_of(norm2, norm2.weight), norm=norm_kind(norm2), act=activation_name(inside["act"]),
                gated=mlp.kind == "swiglu_packed", gamma=gamma, row_scale=self._row_scale(drop_path, x, gamma, kept),
                recompute=mlp.recompute,
            )  # fmt: skip
        hidden = drop1(self._hidden(x))
        inner = norm_args(inner_norm) if has_norm else {}
        if dropping(drop2):
            branch = drop2(self.ops.linear(hidden, *parameters_of(fc2), **inner))
            return x + reference.scale_branch(branch, gamma, self._row_scale(drop_path, x, gamma, kept))
        row_scale = self._row_scale(drop_path, x, gamma, kept)
        return self.ops.linear(hidden, *parameters_of(fc2), gamma=gamma, row_scale=row_scale, residual=x, **inner)

    def _hidden(self, x: Tensor) -> Tensor:
        """The MLP's hidden activation, norm2 included."""
        mlp, norm, act = self.mlp, norm_args(self.norm2), activation_name(self.mlp.act)
        if mlp.kind == "mlp":
            return self.ops.linear(x, *parameters_of(mlp.fc1), act=act, **norm)
        if mlp.kind == "swiglu_packed":
            gate, value = self.ops.linear(x, *parameters_of(mlp.fc1), **norm).chunk(2, dim=-1)
            return reference.activation(gate, act) * value
        gate = self.ops.linear(x, *parameters_of(mlp.fc1_g), act=act, **norm)
        return gate * self.ops.linear(x, *parameters_of(mlp.fc1_x), **norm)

    def untouched(self, dropout_counts: bool = True) -> bool:
        """Whether every part is what `Block` built, so that each token's row of norms and projections is its own.

        Not while dropout is on, unless it does not count: fewer numbers would be drawn than for all tokens, and a
        seed would give others.
        """
        attn = self.attn
        if any_global_hook() or not plain(self, Block) or not plain(attn, Attention) or not self._plain_mlp():
            return False
        maybe_norm = (nn.Identity, *NORMS)
        dropouts = (attn.proj_drop, self.mlp.drop1, self.mlp.drop2)
        return (
            self._plain_tail(self.ls1, self.drop_path1, attn.proj_drop)
            and plain(self.norm1, *NORMS)
            and plain(attn.qkv, nn.Linear)
            and plain(attn.q_norm, *maybe_norm)
            and plain(attn.k_norm, *maybe_norm)
            and plain(attn.attn_drop, nn.Dropout)
            and plain(attn.norm, *maybe_norm)
            and attn.gate is None
            and plain(attn.proj, nn.Linear, nn.Identity)
            and not (dropout_counts and (attn.dropout_p() or any(map(dropping, dropouts))))
        )

    def _plain_tail(self, scale: nn.Module, drop_path: nn.Module, dropout: nn.Module) -> bool:
        maybe_drop = (DropPath, nn.Identity)
        return plain(scale, nn.Identity, LayerScale) and plain(drop_path, *maybe_drop) and plain(dropout, nn.Dropout)

    def _plain_mlp(self) -> bool:
        parts, inside = self._modules, self._modules["mlp"]._modules
        return (
            not any_global_hook()
            and plain(parts["mlp"], Mlp)
            and self._plain_tail(parts["ls2"], parts["drop_path2"], inside["drop2"])
            and plain(parts["norm2"], *NORMS)
            and plain(inside["act"], *ACTIVATIONS)
            and plain(inside["drop1"], nn.Dropout)
            and plain(inside["norm"], nn.Identity, *NORMS)
            and plain(inside["fc2"], nn.Linear)
            and all(plain(inside[name], nn.Linear) for name in parts["mlp"].first_names)
        )

    def _mlp_parts(self) -> list[tuple]:
        mlp = self.mlp
        parts = [
            ("norm2", self.norm2, *NORMS), ("mlp", mlp, Mlp), ("mlp.act", mlp.act, *ACTIVATIONS),
            ("mlp.drop1", mlp.drop1, nn.Dropout), ("mlp.norm", mlp.norm, nn.Identity, *NORMS),
            ("mlp.fc2", mlp.fc2, nn.Linear),
        ]  # fmt: skip
        return parts + [(f"mlp.{name}", getattr(mlp, name), nn.Linear) for name in mlp.first_names]

    def parts(self) -> list[tuple]:
        """(name, module, the classes it has in an untouched block), for all modules inside."""
        attn, maybe_norm = self.attn, (nn.Identity, *NORMS)
        found = [("norm1", self.norm1, *NORMS), ("attn", attn, Attention)]
        if type(attn) is Attention:
            found += [
                ("attn.qkv", attn.qkv, nn.Linear), ("attn.q_norm", attn.q_norm, *maybe_norm),
                ("attn.k_norm", attn.k_norm, *maybe_norm), ("attn.attn_drop", attn.attn_drop, nn.Dropout),
                ("attn.norm", attn.norm, *maybe_norm), ("attn.proj", attn.proj, nn.Linear, nn.Identity),
                ("attn.proj_drop", attn.proj_drop, nn.Dropout),
            ]  # fmt: skip
            found += [] if attn.gate is None else [("attn.gate", attn.gate, type(None))]
        for n in (1, 2):
            found.append((f"ls{n}", getattr(self, f"ls{n}"), nn.Identity, LayerScale))
            found.append((f"drop_path{n}", getattr(self, f"drop_path{n}"), DropPath, nn.Identity))
        if type(self.mlp) is Mlp:
            return [*found, *self._mlp_parts(), ("mlp.drop2", self.mlp.drop2, nn.Dropout)]
        return [*found, ("norm2", self.norm2, *NORMS), ("mlp", self.mlp, Mlp)]

    def fusion_report(self) -> list[tuple[str, str, list[str]]]:
        """(part, op, reasons against it) of this block as it is now."""
        if type(self.attn) is not Attention or type(self.mlp) is not Mlp:
            return [("attn and mlp", "", reasons_of([("attn", self.attn, Attention), ("mlp", self.mlp, Mlp)]))]
        whole = [("attn", self.attn, Attention)]
        whole += [] if self.attn.gate is None else [("attn.gate", self.attn.gate, type(None))]
        hooks = ["a global module hook is registered"] if any_global_hook() else []
        tail = lambda n, drop: [  # noqa: E731
            (f"ls{n}", getattr(self, f"ls{n}"), nn.Identity, LayerScale),
            (f"drop_path{n}", getattr(self, f"drop_path{n}"), DropPath, nn.Identity), drop,
        ]  # fmt: skip
        qkv = [("norm1", self.norm1, *NORMS), ("attn.qkv", self.attn.qkv, nn.Linear)]
        proj = [("attn.proj", self.attn.proj, nn.Linear)] + tail(1, ("attn.proj_drop", self.attn.proj_drop, nn.Dropout))
        softmax = [("attn.attn_drop", self.attn.attn_drop, nn.Dropout)]
        attend = watched_view(self.attn, "attend")
        softmax += [] if attend is None else [("attn.attend", attend, nn.Softmax)]
        # the kernels for GPUs drop weights themselves
        sdpa = self.attn.dropout_p() and not any(p.is_cuda for p in self.attn.parameters())
        dropout = ["attn_drop is on: scaled_dot_product_attention"] if sdpa else []
        mlp_op = "mlp"
        if self.mlp.kind == "swiglu" or type(self.mlp.norm) is not nn.Identity or dropping(self.mlp.drop1):
            mlp_op = "linear (one a projection)"
        inner = [(f"attn.{name}", getattr(self.attn, name)) for name in ("q_norm", "k_norm", "norm")]
        return [
            ("norm1 + attn.qkv", "linear", hooks + reasons_of(whole + qkv)),
            *norm_report(inner),
            ("attn softmax", "attention", dropout + reasons_of(softmax)),
            ("attn.proj + residual", "linear", hooks + reasons_of(whole + proj)),
            ("norm2 + mlp + residual", mlp_op,
             hooks + reasons_of(self._mlp_parts() + tail(2, ("mlp.drop2", self.mlp.drop2, nn.Dropout)))),
        ]  # fmt: skip


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
        q, k = _norm_of_heads(self.q_norm, q, self.ops), _norm_of_heads(self.k_norm, k, self.ops)
        out = self.ops.attention(q, k, v, scale=self.scale, mask=attn_mask)
        pooled = self.proj_drop(run_linear(self.proj, out, self.ops))
        return (pooled + self.mlp(run_norm(self.norm, pooled, self.ops)))[:, 0]


stands_for(Attention, Mlp, Block, AttentionPool)
