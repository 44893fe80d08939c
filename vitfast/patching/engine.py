"""What a patched block computes: its two branches as ops, from the modules as they are at the call.

Shapes: B images, N tokens, D channels, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from vitfast import ops, reference
from vitfast.choose.exportable import exporting, stock_only
from vitfast.model.layers import added, dropping, eps_of, norm_args, norm_kind, parameters_of
from vitfast.model.plain import FORWARDS, any_global_hook, plain
from vitfast.ops._check import FLOATS, autocast_dtype
from vitfast.ops._on_cpu import host_bound
from vitfast.patching.known import KNOWN, Known, learn

# what a child may be for -> the roles of `Known` that do; ABSENT: there may be nothing
ABSENT = ""
USES = {
    **dict.fromkeys(("norm", "norm1", "norm2"), ("norm",)),
    **dict.fromkeys(("q_norm", "k_norm", "inner_norm"), ("norm", "identity")),
    **dict.fromkeys(("qkv", "q", "k", "v", "fc1", "gate", "value", "fc2"), ("linear",)),
    "proj": ("linear", "identity"),
    **dict.fromkeys(("attn_drop", "proj_drop", "mid_drop", "drop1", "drop2"), ("dropout", "identity")),
    **dict.fromkeys(("scale1", "scale2"), ("scale", "identity")),
    **dict.fromkeys(("drop_path1", "drop_path2"), ("drop_path", "identity")),
    "act": ("activation",),
    "softmax": ("softmax",),
    "sequence": ("sequence",),
    "attn": ("attention",),
    "mlp": ("mlp",),
    "output_gate": (ABSENT,),
}


class Patch(NamedTuple):
    """What is to be fused in a patched module. kind: the class whose forward it has otherwise; learnt: the classes
    that were found in it, which another process learns again when it reads the module.
    """

    attention: bool
    norm: bool
    mlp: bool
    patch_embed: bool
    kind: type
    learnt: tuple[type, ...]

    def __reduce__(self) -> tuple:
        return restored, tuple(self)


def restored(*fields: Any) -> Patch:
    """A `Patch` that was saved."""
    patch = Patch(*fields)
    for kind in (patch.kind, *patch.learnt):
        learn(kind)
    return patch


class Heads(NamedTuple):
    """What an attention module says of its heads. dropout_p: the rate at which weights are dropped now."""

    num_heads: int
    head_dim: int
    scale: float
    dropout_p: float


def runs_stock(patch: Patch | None, x: Any) -> bool:
    """Whether the forward of the module's class is to run: no patch any more, a tracer, or too little to do."""
    if patch is None or any_global_hook() or patch.kind.forward is not FORWARDS.get(patch.kind):
        return True
    # tracers and tensors of other kinds know nothing of ops
    if type(x) not in (Tensor, Parameter) or x.dtype not in FLOATS or host_bound(x):
        return True
    return exporting() or stock_only()


def child(module: nn.Module, name: str) -> nn.Module | None:
    """The child of this name, dotted where it lies deeper; from `_modules`, for `getattr` takes 0.8 us."""
    if "." not in name:
        found = module._modules.get(name)
        # a function that somebody put in the place of a module
        return module.__dict__.get(name) if found is None else found
    inner: nn.Module | None = module
    for part in name.split("."):
        inner = child(inner, part) if isinstance(inner, nn.Module) else None
    return inner


def absorbable(module: nn.Module | None, roles: tuple[str, ...]) -> bool:
    """Whether an op may stand in for this module where one of these roles is wanted."""
    if module is None:
        return ABSENT in roles
    known = KNOWN.get(type(module))
    return known is not None and known.role in roles and plain(module, type(module)) and not known.why_not(module)


def inside(module: nn.Module | None, known: Known | None) -> dict[str, nn.Module] | None:
    """What each child of an attention or MLP is for -> the child; None where an op may not stand in for one of them."""
    if module is None or known is None:
        return None
    parts = {}
    for use, name in known.children.items():
        found = child(module, name)
        if not absorbable(found, USES[use]):
            return None
        if found is not None:
            parts[use] = found
    return parts


def run_norm(norm: nn.Module, x: Tensor, patch: Patch) -> Tensor:
    """`norm(x)`, as an op where that may stand in for it."""
    if KNOWN.get(type(norm), KNOWN[nn.Linear]).role == "identity":
        return norm(x)
    if not patch.norm or not absorbable(norm, ("norm",)):
        return norm(x)
    weight, bias = parameters_of(norm)
    return ops.layer_norm(x, weight, bias, eps_of(norm, weight), norm_kind(norm))


def run_linear(x: Tensor, norm: nn.Module | None, linear: nn.Module, patch: Patch, act: str = "none") -> Tensor:
    """`act(linear(norm(x)))`, the norm inside the op where that may stand in for it."""
    weights = packed_weights(linear)
    if norm is not None and patch.norm and absorbable(norm, ("norm",)):
        return ops.linear(x, *weights, act=act, **norm_args(norm))
    return ops.linear(x if norm is None else norm(x), *weights, act=act)


def packed_weights(linear: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias; of `nn.MultiheadAttention` those of its packed projection."""
    if type(linear) is nn.MultiheadAttention:
        return linear.in_proj_weight, linear.in_proj_bias
    return parameters_of(linear)


def heads_of(attn: nn.Module, norm: nn.Module | None, x: Tensor, parts: dict[str, nn.Module], patch: Patch) -> Tensor:
    """Attention of norm(x) by all heads, before the projection: [B, N, D] -> [B, N, H * head_dim]."""
    heads: Heads = KNOWN[type(attn)].read(attn)
    how: dict[str, Any] = {"scale": heads.scale, "dropout_p": heads.dropout_p}
    shape = *x.shape[:-1], -1, heads.num_heads, heads.head_dim
    if "q" in parts:
        # three weights: a packed copy of them would have to be made anew at each call
        x = x if norm is None else run_norm(norm, x, patch)
        return ops.attention(*(parts[use](x).view(shape).squeeze(2) for use in "qkv"), **how)
    qkv = run_linear(x, norm, parts.get("qkv", attn), patch).view(shape)
    if all(KNOWN[type(parts[use])].role == "identity" for use in ("q_norm", "k_norm") if use in parts):
        return ops.attention_qkv(qkv, **how)
    q, k, v = qkv.unbind(2)
    return ops.attention(run_norm(parts["q_norm"], q, patch), run_norm(parts["k_norm"], k, patch), v, **how)


class Tail(NamedTuple):
    """What a block does with a branch before it adds it; None for what it has not."""

    dropout: nn.Module | None
    scale: nn.Module | None
    drop_path: nn.Module | None

    def run(self, branch: Tensor) -> Tensor:
        """By the modules themselves."""
        for module in self:
            branch = branch if module is None else module(branch)
        return branch

    def scales(self, x: Tensor) -> tuple[Tensor | None, Callable[[], Tensor | None]]:
        """gamma [D] and what draws the row_scale [B], as `added` wants them."""
        gamma = None
        if self.scale is not None and KNOWN[type(self.scale)].role == "scale":
            gamma = KNOWN[type(self.scale)].read(self.scale)
        return gamma, lambda: _row_scale(self.drop_path, x, gamma)


def _row_scale(drop_path: nn.Module | None, x: Tensor, gamma: Tensor | None) -> Tensor | None:
    """[B], 0 or 1 / keep probability: what the module makes of ones, so that it draws what it would have drawn."""
    if drop_path is None or not drop_path.training or KNOWN[type(drop_path)].role == "identity":
        return None
    if not KNOWN[type(drop_path)].read(drop_path):
        return None
    dtype = autocast_dtype(x) or x.dtype
    dtype = dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)
    return drop_path(x.new_ones((x.shape[0], 1, 1), dtype=dtype)).flatten()


def tail_of(block: nn.Module, names: Any, branch: str) -> tuple[Tail, bool]:
    """The tail of branch '1' or '2' of a block, and whether ops may stand in for it."""
    uses = [use + branch for use in ("drop", "scale", "drop_path")]
    modules = [child(block, names[use]) if use in names else None for use in uses]
    fits = all(module is None or absorbable(module, USES[use]) for use, module in zip(uses, modules, strict=True))
    return Tail(*modules), fits


def attention_branch(
    block: nn.Module, patch: Patch, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor], absorbs: bool = True
) -> Tensor:
    """x + drop_path(scale(dropout(attn(norm(x))))).

    Args:
        x: [B, N, D].
        call: (attention module, normed tokens) -> what it gives, where the module is to run itself.
        absorbs: whether this call wants no more of it than ops give.
    """
    names = KNOWN[patch.kind].children
    norm, attn = child(block, names["norm1"]) if "norm1" in names else None, child(block, names["attn"])
    tail, fits = tail_of(block, names, "1")
    parts = None
    if patch.attention and absorbs and fits and absorbable(attn, ("attention",)):
        parts = inside(attn, KNOWN[type(attn)])
    if parts is None:
        return x + tail.run(call(attn, x if norm is None else run_norm(norm, x, patch)))
    out = heads_of(attn, parts.get("norm", norm), x, parts, patch)
    dropouts = [drop for drop in (parts.get("proj_drop"), tail.dropout) if drop is not None]
    proj, inner = parts["proj"], parts.get("inner_norm")
    if KNOWN[type(proj)].role == "identity":
        for dropout in dropouts:
            out = dropout(out)
        return x + tail._replace(dropout=None).run(out)
    return added(x, out, proj, dropouts, *tail.scales(x), **_prologue(inner))


def _prologue(norm: nn.Module | None) -> dict[str, Any]:
    return {} if norm is None or KNOWN[type(norm)].role == "identity" else norm_args(norm)


def mlp_branch(block: nn.Module, patch: Patch, x: Tensor) -> Tensor:
    """x + drop_path(scale(dropout(mlp(norm(x))))), x [B, N, D]."""
    names = KNOWN[patch.kind].children
    norm, mlp = child(block, names["norm2"]) if "norm2" in names else None, child(block, names["mlp"])
    tail, fits = tail_of(block, names, "2")
    parts = None
    if patch.mlp and fits and absorbable(mlp, ("mlp",)):
        parts = inside(mlp, KNOWN[type(mlp)])
    if parts is None:
        return x + tail.run(mlp(x if norm is None else run_norm(norm, x, patch)))
    norm = parts.get("norm", norm)
    scales, prologue = tail.scales(x), _prologue(parts.get("inner_norm"))
    dropouts = [drop for drop in (parts.get("drop1"), tail.dropout) if drop is not None]
    middle = parts.get("mid_drop")
    drops = any(dropping(drop) for drop in (middle, *dropouts) if drop is not None)
    if "fc1" in parts and not drops and not prologue and patch.norm and absorbable(norm, ("norm",)):
        gamma, row_scale = scales
        return ops.mlp(
            x, *parameters_of(norm), *parameters_of(parts["fc1"]), *parameters_of(parts["fc2"]),
            norm_eps=eps_of(norm, norm.weight), norm=norm_kind(norm), act=_act(parts), gated=gated(mlp),
            gamma=gamma, row_scale=row_scale(),
        )  # fmt: skip
    hidden = hidden_of(mlp, norm, x, parts, patch)
    hidden = hidden if middle is None else middle(hidden)
    return added(x, hidden, parts["fc2"], dropouts, *scales, **prologue)


def gated(mlp: nn.Module) -> bool:
    """Whether its first projection gives gate and value."""
    return KNOWN[type(mlp)].read(mlp) is True


def _act(parts: dict[str, nn.Module]) -> str:
    return KNOWN[type(parts["act"])].read(parts["act"])


def hidden_of(mlp: nn.Module, norm: nn.Module | None, x: Tensor, parts: dict[str, nn.Module], patch: Patch) -> Tensor:
    """The hidden activation of an MLP, the norm before it included."""
    act = _act(parts)
    if "gate" in parts:
        if norm is not None and not (patch.norm and absorbable(norm, ("norm",))):
            x, norm = norm(x), None
        value = run_linear(x, norm, parts["value"], patch)
        return run_linear(x, norm, parts["gate"], patch, act) * value
    if gated(mlp):
        gate, value = run_linear(x, norm, parts["fc1"], patch).chunk(2, dim=-1)
        return reference.activation(gate, act) * value
    return run_linear(x, norm, parts["fc1"], patch, act)
