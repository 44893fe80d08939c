"""The parts of a ViT in the order an image travels, after its patches: attention, MLP, block.

Parameters sit on plain `nn` modules under timm's names. A block hands them to its ops where the modules around are
untouched, and calls the modules themselves where somebody changed one (see `plain`).
Shapes: B images, N tokens, D channels, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

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
    added,
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
    run_norm,
    too_small,
)
from vitfast.model.plain import any_global_hook, plain, stands_for, watched_view
from vitfast.ops._attention_check import check_mask


def norm_of_heads(norm: nn.Module, t: Tensor, using: ModuleType) -> Tensor:
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
        if self.calls_dropout and (any_global_hook() or watched_view(self, "attend")):
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
        alone = plain(parts["q_norm"], nn.Identity) and plain(parts["k_norm"], nn.Identity) and not any_global_hook()
        if not alone or self._weights_are_watched():
            return self.attend(*qkv.unbind(2), mask)
        out = self.ops.attention_qkv(qkv, scale=self.scale, mask=mask, dropout_p=self.dropout_p())
        return run_norm(parts["norm"], out, self.ops)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q [B, Nq, H, head_dim], k and v [B, Nk, H, head_dim] -> [B, Nq, H * head_dim]."""
        q, k = norm_of_heads(self.q_norm, q, self.ops), norm_of_heads(self.k_norm, k, self.ops)
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
        # `is False`, for a proxy of a tracer is to be told
        mask = attn_mask if is_causal is False else with_causal(attn_mask, is_causal, x)
        out = self.attend_packed(self.split(self.qkv(x), 3), mask)
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


class Part(NamedTuple):
    """A module of a block and the classes under which an op may stand in for it; `type(None)` where it may be absent.

    holder: '' for the block itself, 'attn' or 'mlp'.
    """

    holder: str
    name: str
    kinds: tuple[type, ...]

    @property
    def path(self) -> str:
        return f"{self.holder}.{self.name}".removeprefix(".")

    def of(self, block: nn.Module) -> nn.Module | None:
        """The module, None where there is none. Read from `_modules`, for the reason given at `parameters_of`."""
        holder = block._modules[self.holder] if self.holder else block
        found = holder._modules.get(self.name)
        return holder.__dict__.get(self.name) if found is None else found


def _part(path: str, *kinds: type) -> Part:
    holder, _, name = path.rpartition(".")
    return Part(holder, name, kinds)


class Step(NamedTuple):
    """What one op computes of a block, and the parts that it stands in for; op '' for what is no step of its own."""

    op: str
    parts: tuple[Part, ...]


ABSENT = type(None)
MAYBE_NORM = (nn.Identity, *NORMS)
# All parts of a block, each once, by the step that they belong to: whether an op may take a step (`Block.by_op`), what
# `explain` says of it and what `prepare` wants unchanged are read from here. Where a part is none of its classes, or
# somebody changed it, the modules of its step run as they are.
STEPS = {
    "attn": Step("", (_part("attn", Attention), _part("attn.gate", ABSENT))),
    "norm1 + attn.qkv": Step("linear", (_part("norm1", *NORMS), _part("attn.qkv", nn.Linear))),
    "attn.q_norm": Step("layer_norm", (_part("attn.q_norm", *MAYBE_NORM),)),
    "attn.k_norm": Step("layer_norm", (_part("attn.k_norm", *MAYBE_NORM),)),
    "attn softmax": Step("attention", (_part("attn.attn_drop", nn.Dropout),)),
    "attn.norm": Step("layer_norm", (_part("attn.norm", *MAYBE_NORM),)),
    "attn.proj + residual": Step(
        "linear",
        (
            _part("attn.proj", nn.Linear, nn.Identity),
            _part("attn.proj_drop", nn.Dropout),
            _part("ls1", nn.Identity, LayerScale),
            _part("drop_path1", DropPath, nn.Identity),
        ),
    ),
    "norm2 + mlp + residual": Step(
        "mlp",
        (
            _part("norm2", *NORMS),
            _part("mlp", Mlp),
            _part("mlp.fc1", nn.Linear, ABSENT),
            _part("mlp.fc1_g", nn.Linear, ABSENT),
            _part("mlp.fc1_x", nn.Linear, ABSENT),
            _part("mlp.act", *ACTIVATIONS),
            _part("mlp.drop1", nn.Dropout),
            _part("mlp.norm", *MAYBE_NORM),
            _part("mlp.fc2", nn.Linear),
            _part("mlp.drop2", nn.Dropout),
            _part("ls2", nn.Identity, LayerScale),
            _part("drop_path2", DropPath, nn.Identity),
        ),
    ),
}


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
        if self.training and attn_mask is None and not is_causal and self._leaves_images_out():
            return self._without_dropped(x, keep)
        x = self.attention_branch(x, attn_mask, keep, is_causal=is_causal)
        return self.mlp_branch(x)

    def attention_branch(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        keep: int | None = None,
        kept: bool = False,
        is_causal: bool = False,
    ) -> Tensor:
        """x + drop_path1(ls1(attn(norm1(x)))), for all tokens, or in an untouched block for the first `keep`.

        kept: stochastic depth has decided already, and all these images keep the branch.
        """
        parts = self._modules
        norm1, attn, scale, drop_path = parts["norm1"], parts["attn"], parts["ls1"], parts["drop_path1"]
        if (not kept and too_small(attn._modules.get("qkv"), x)) or not self.by_op("attn"):
            # what somebody put there need not know of it
            causal = {"is_causal": True} if is_causal else {}
            x = x + drop_path(scale(attn(norm1(x), attn_mask=attn_mask, **causal)))
            return x if keep is None else x[:, :keep]
        if keep is None:
            qkv = attn._modules["qkv"]
            packed = self._normed_linear(x, norm1, qkv) if self.by_op("norm1 + attn.qkv") else qkv(norm1(x))
            # `is False`, for a proxy of a tracer is to be told
            mask = attn_mask if is_causal is False else with_causal(attn_mask, is_causal, x)
            out = attn.attend_packed(attn.split(packed, 3), mask)
        else:
            out, x = self._attend_first(x, keep), x[:, :keep]
        proj, dropout = attn._modules["proj"], attn._modules["proj_drop"]
        if type(proj) is nn.Identity or not self.by_op("attn.proj + residual"):
            return x + drop_path(scale(dropout(proj(out))))
        return added(x, out, proj, [dropout], *_scales(scale, drop_path, x, kept), self.ops)

    def mlp_branch(self, x: Tensor, kept: bool = False) -> Tensor:
        """x + drop_path2(ls2(mlp(norm2(x)))); kept as in `attention_branch`."""
        parts = self._modules
        norm2, mlp, scale, drop_path = parts["norm2"], parts["mlp"], parts["ls2"], parts["drop_path2"]
        if (not kept and too_small(mlp._modules.get("fc2"), x)) or not self.by_op("norm2 + mlp + residual"):
            return x + drop_path(scale(mlp(norm2(x))))
        inside = mlp._modules
        if self._mlp_is_one_op(mlp):
            gamma = gamma_of(scale)
            return self.ops.mlp(
                x, *parameters_of(norm2), *parameters_of(inside["fc1"]), *parameters_of(inside["fc2"]),
                norm_eps=eps_of(norm2, norm2.weight), norm=norm_kind(norm2), act=activation_name(inside["act"]),
                gated=mlp.kind == "swiglu_packed", gamma=gamma, row_scale=_row_scale(drop_path, x, gamma, kept),
                recompute=mlp.recompute,
            )  # fmt: skip
        hidden = inside["drop1"](self._hidden(x, norm2, mlp))
        norm = {} if type(inside["norm"]) is nn.Identity else norm_args(inside["norm"])
        scales = _scales(scale, drop_path, x, kept)
        return added(x, hidden, inside["fc2"], [inside["drop2"]], *scales, self.ops, **norm)

    def by_op(self, step: str) -> bool:
        """Whether ops may compute this step of `STEPS` now: every part is plain, and no global hook is to see them."""
        if any_global_hook():
            return False
        modules = self._modules
        # `Part.of` written out: a model of 12 blocks asks 250 times
        for holder, name, kinds in STEPS[step].parts:
            inside = modules[holder] if holder else self
            module = inside._modules.get(name)
            # not `or`: a container with nothing in it counts as false
            module = inside.__dict__.get(name) if module is None else module
            if not plain(module, *kinds) and (module is not None or ABSENT not in kinds):
                return False
        return True

    def untouched(self, dropout_counts: bool = True) -> bool:
        """Whether every part is what `Block` built, so that each token's row of norms and projections is its own.

        Not while dropout is on, unless it does not count: fewer numbers would be drawn than for all tokens, and a
        seed would give others.
        """
        if not plain(self, Block) or not all(map(self.by_op, STEPS)):
            return False
        dropouts = self.attn.proj_drop, self.mlp.drop1, self.mlp.drop2
        return not (dropout_counts and (self.attn.dropout_p() or any(map(dropping, dropouts))))

    def _normed_linear(self, x: Tensor, norm: nn.Module, linear: nn.Module, act: str = "none") -> Tensor:
        return self.ops.linear(x, *parameters_of(linear), act=act, **norm_args(norm))

    def _attend_first(self, x: Tensor, keep: int) -> Tensor:
        """Attention of the first `keep` tokens over all; keys and values for all, queries only for these."""
        attn, norm = self.attn, norm_args(self.norm1)
        inner, (weight, bias) = attn.attn_dim, parameters_of(attn.qkv)
        kv = self.ops.linear(x, weight[inner:], None if bias is None else bias[inner:], **norm)
        q = self.ops.linear(x[:, :keep], weight[:inner], None if bias is None else bias[:inner], **norm)
        return attn.attend(attn.split(q, 1).squeeze(2), *attn.split(kv, 2).unbind(2))

    @staticmethod
    def _mlp_is_one_op(mlp: nn.Module) -> bool:
        inside = mlp._modules
        drops = dropping(inside["drop1"]) or dropping(inside["drop2"])
        return mlp.kind != "swiglu" and type(inside["norm"]) is nn.Identity and not drops

    def _hidden(self, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        """The MLP's hidden activation of plain parts, the norm before it included."""
        act = activation_name(mlp.act)
        if mlp.kind == "mlp":
            return self._normed_linear(x, norm, mlp.fc1, act)
        if mlp.kind == "swiglu_packed":
            gate, value = self._normed_linear(x, norm, mlp.fc1).chunk(2, dim=-1)
            return reference.activation(gate, act) * value
        return self._normed_linear(x, norm, mlp.fc1_g, act) * self._normed_linear(x, norm, mlp.fc1_x)

    def _leaves_images_out(self) -> bool:
        paths = self._modules["drop_path1"], self._modules["drop_path2"]
        if not all(type(path) is DropPath for path in paths) or not any(path.leaves_out() for path in paths):
            return False
        return self.untouched()

    def _without_dropped(self, x: Tensor, keep: int | None) -> Tensor:
        """`forward`, each branch for the images only that stochastic depth leaves it."""
        kept = self.drop_path1.kept(x, gamma_of(self.ls1))
        done = self.attention_branch(x.index_select(0, kept), None, keep, kept=True)
        x = (x if keep is None else x[:, :keep]).to(done.dtype).index_copy(0, kept, done)
        kept = self.drop_path2.kept(x, gamma_of(self.ls2))
        done = self.mlp_branch(x.index_select(0, kept), kept=True)
        return x.to(done.dtype).index_copy(0, kept, done)

    def parts(self) -> list[tuple]:
        """(name, module, the classes it has in an untouched block), for all modules inside."""
        return [part for step in STEPS for part in self._parts_of(step)]

    def _parts_of(self, step: str) -> list[tuple]:
        """`parts` of one step, without those inside of an attention or MLP of another class, and the absent ones."""
        strange = [name for name, kind in (("attn", Attention), ("mlp", Mlp)) if type(getattr(self, name)) is not kind]
        here = [(part, part.of(self)) for part in STEPS[step].parts if part.holder not in strange]
        return [(part.path, module, *part.kinds) for part, module in here if module is not None]

    def fusion_report(self) -> list[tuple[str, str, list[str]]]:
        """(part, op, reasons against it) of this block as it is now."""
        attn, mlp = self.attn, self.mlp
        if type(attn) is not Attention or type(mlp) is not Mlp:
            return [("attn and mlp", "", reasons_of([("attn", attn, Attention), ("mlp", mlp, Mlp)]))]
        hooks = ["a global module hook is registered"] if any_global_hook() else []
        whole = hooks + reasons_of(self._parts_of("attn"))
        attend = watched_view(attn, "attend")
        # the kernels for GPUs drop weights themselves
        sdpa = attn.dropout_p() and not any(p.is_cuda for p in attn.parameters())
        besides = {
            "norm1 + attn.qkv": whole,
            "attn softmax": ["attn_drop is on: scaled_dot_product_attention"] * bool(sdpa)
            + ([] if attend is None else reasons_of([("attn.attend", attend, nn.Softmax)])),
            "attn.proj + residual": whole + ["attn.proj is Identity, not Linear"] * (type(attn.proj) is nn.Identity),
            "norm2 + mlp + residual": hooks,
        }
        rows = []
        for step, (op, _) in STEPS.items():
            parts = self._parts_of(step)
            if op == "layer_norm":
                rows += norm_report([(name, module) for name, module, *_ in parts])
            elif op:
                op = op if op != "mlp" or self._mlp_is_one_op(mlp) else "linear (one a projection)"
                rows.append((step, op, besides[step] + reasons_of(parts)))
        return rows


def _scales(
    scale: nn.Module, drop_path: nn.Module, x: Tensor, kept: bool
) -> tuple[Tensor | None, Callable[[], Tensor | None]]:
    """What LayerScale multiplies with, and what draws what stochastic depth does."""
    gamma = gamma_of(scale)
    return gamma, lambda: _row_scale(drop_path, x, gamma, kept)


def _row_scale(drop_path: nn.Module, x: Tensor, gamma: Tensor | None, kept: bool) -> Tensor | None:
    if type(drop_path) is nn.Identity:  # timm's where nothing is dropped
        return None
    return drop_path.kept_scale(x, gamma) if kept else drop_path.row_scale(x, gamma)


stands_for(Attention, Mlp, Block)
