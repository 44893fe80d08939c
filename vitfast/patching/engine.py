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
from vitfast.choose.exportable import inside_export, stock_only
from vitfast.model.layers import added, dropping, eps_of, norm_args, norm_kind, parameters_of
from vitfast.model.plain import FORWARDS, PLAIN_TENSORS, any_global_hook, does_what_its_class_says
from vitfast.ops import _on_cpu
from vitfast.ops._check import FLOATS, autocast_dtype
from vitfast.ops._on_cpu import host_bound
from vitfast.patching.known import ABSENT, KNOWN, Known, learn, still_calls


class Patch(NamedTuple):
    """What is to be fused in a patched module.

    kind: the class whose forward it has otherwise; learnt: the classes that were found in it, which another process
    learns again when it reads the module; seen: what was decided at the last call of each branch (`branch_of`).
    """

    attention: bool
    norm: bool
    mlp: bool
    patch_embed: bool
    kind: type
    learnt: tuple[type, ...]
    seen: dict[tuple[int, str], Seen]

    def __reduce__(self) -> tuple:
        return restored, self[:-1]


def restored(*fields: Any) -> Patch:
    """A `Patch` that was saved or copied."""
    patch = Patch(*fields, {})
    for kind in (patch.kind, *patch.learnt):
        learn(kind)
    return patch


class Heads(NamedTuple):
    """What an attention module says of its heads.

    dropout_p: the rate at which weights are dropped now. makes_weights: whether its own forward does, not SDPA.
    """

    num_heads: int
    head_dim: int
    scale: float
    dropout_p: float
    makes_weights: bool


def runs_stock(patch: Patch | None, x: Any, training: bool = False) -> bool:
    """Whether the forward of the module's class is to run: no patch any more, a tracer, or too little to do.

    training: the module's mode. Not whether x wants a gradient, which in a checkpoint is True in one pass alone: with
    ops in the other, dropout might draw otherwise.
    """
    if patch is None or any_global_hook() or patch.kind.forward is not FORWARDS.get(patch.kind):
        return True
    # tracers and tensors of other kinds know nothing of ops
    if type(x) not in (Tensor, Parameter) or x.dtype not in FLOATS or host_bound(x):
        return True
    if training and x.is_cpu and x.numel() <= _on_cpu.TRAINING_BOUND and not torch.compiler.is_compiling():
        return True
    return inside_export() or stock_only()


def child(module: nn.Module, names: list[str]) -> nn.Module | None:
    """What lies there, from the outside in; from `_modules`, for `getattr` takes 0.8 us."""
    found: Any = module
    for name in names:
        if not isinstance(found, nn.Module):
            return None
        # a function that somebody put in the place of a module is no child
        inner = found._modules.get(name)
        found = found.__dict__.get(name) if inner is None else inner
    return found


def absorbable(module: nn.Module | None, roles: tuple[str, ...]) -> bool:
    """Whether an op may stand in for this module where one of these roles is wanted."""
    if module is None:
        return ABSENT in roles
    kind = type(module)
    known = KNOWN.get(kind)
    if known is None or known.role not in roles or not does_what_its_class_says(module, kind):
        return False
    if known.calls and not torch.compiler.is_compiling() and not still_calls(kind):
        return False
    return known.why_not is None or not known.why_not(module)


def inside(module: nn.Module | None, known: Known) -> dict[str, nn.Module] | None:
    """What each child of an attention or MLP is for -> the child; None where an op may not stand in for one of them."""
    parts = {}
    for use, names, roles in known.paths:
        found = child(module, names)
        if not absorbable(found, roles):
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


def run_linear(x: Tensor, norm: nn.Module | None, linear: nn.Module, prologue: bool, act: str = "none") -> Tensor:
    """`act(linear(norm(x)))`. prologue: the norm is computed inside the op."""
    if norm is not None and prologue:
        return ops.linear(x, *packed_weights(linear), act=act, **norm_args(norm))
    return ops.linear(x if norm is None else norm(x), *packed_weights(linear), act=act)


def packed_weights(linear: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias; of `nn.MultiheadAttention` those of its packed projection."""
    if type(linear) is nn.MultiheadAttention:
        return linear.in_proj_weight, linear.in_proj_bias
    return parameters_of(linear)


def heads_of(
    attn: nn.Module, norm: nn.Module | None, x: Tensor, parts: dict[str, nn.Module], patch: Patch, prologue: bool
) -> Tensor:
    """Attention of norm(x) by all heads, before the projection: [B, N, D] -> [B, N, H * head_dim]."""
    heads: Heads = KNOWN[type(attn)].read(attn)
    how: dict[str, Any] = {"scale": heads.scale, "dropout_p": heads.dropout_p}
    if "q" in parts:
        # three weights: a packed copy of them would have to be made anew at each call
        x = x if norm is None else run_norm(norm, x, patch)
        shape = *x.shape[:-1], heads.num_heads, heads.head_dim
        return ops.attention(*(parts[use](x).view(shape) for use in "qkv"), **how)
    qkv = run_linear(x, norm, parts.get("qkv", attn), prologue)
    qkv = qkv.view(*x.shape[:-1], 3, heads.num_heads, heads.head_dim)
    if not ("q_norm" in parts and (is_norm(parts["q_norm"]) or is_norm(parts["k_norm"]))):
        return ops.attention_qkv(qkv, **how)
    q, k, v = qkv.unbind(2)
    return ops.attention(run_norm(parts["q_norm"], q, patch), run_norm(parts["k_norm"], k, patch), v, **how)


NOTES_ON_CPU = (
    f"on cpu, in training, blocks of other libraries of up to {_on_cpu.TRAINING_BOUND:,} numbers run as they are: ops "
    "are no faster",
    "on cpu, in training in bf16 and fp16, attention without SDPA, where a library has it, is faster and runs as it is",
)


def trains_in_half(module: nn.Module, x: Tensor) -> bool:
    """Whether a module in training mode computes in half precision on a CPU (`NOTES_ON_CPU`).

    There a step takes 1.2 to 1.3 times as long by ops as by products and a softmax.
    """
    if not (_on_cpu.WEIGHTS_IN_HALF and module.training and x.is_cpu):
        return False
    return (autocast_dtype(x) or x.dtype) in (torch.bfloat16, torch.float16)


def faster_as_it_is(attn: nn.Module, x: Tensor) -> bool:
    """Whether this attention is such products and a softmax, and trains so."""
    return trains_in_half(attn, x) and KNOWN[type(attn)].read(attn).makes_weights


def is_norm(module: nn.Module) -> bool:
    return KNOWN[type(module)].role == "norm"


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
        scale = self.scale
        known = None if scale is None else KNOWN[type(scale)]
        gamma = None if known is None or known.role == "identity" else known.read(scale)
        return gamma, lambda: _row_scale(self.drop_path, x, gamma)


class Branch(NamedTuple):
    """Half of a block as it is now.

    norm: None where `part`, the attention or MLP, has it inside. parts: what children of `part` are for -> child, None
    where it runs itself. prologue: whether the norm is computed inside the op that follows.
    """

    norm: nn.Module | None
    part: nn.Module
    parts: dict[str, nn.Module] | None
    tail: Tail
    prologue: bool


def branch_of(block: nn.Module, patch: Patch, part: str) -> Branch:
    """'attn' or 'mlp' of a block; what was decided at the last call, where nothing of it has changed."""
    compiling = torch.compiler.is_compiling()
    # an id in a graph would make it one of this block alone
    seen = None if compiling else patch.seen.get((id(block), part))
    if seen is not None and seen.holds():
        return seen.branch
    here: dict[str, Any] = {}
    fits = True
    for use, names, roles in KNOWN[patch.kind].branches[part]:
        found = here[use] = child(block, names)
        if use not in ("norm", part) and not absorbable(found, roles):
            fits = False
    norm, module, parts = here.get("norm"), here[part], None
    asked, role = (patch.attention, "attention") if part == "attn" else (patch.mlp, "mlp")
    if asked and fits and absorbable(module, (role,)):
        parts = inside(module, KNOWN[type(module)])
        norm = norm if parts is None else parts.get("norm", norm)
    prologue = patch.norm and norm is not None and absorbable(norm, ("norm",))
    tail = Tail(here.get("drop"), here.get("scale"), here.get("drop_path"))
    branch = Branch(norm, module, parts, tail, prologue)
    if parts is not None and prologue and not compiling:
        patch.seen[id(block), part] = Seen.of(block, patch, part, branch)
    return branch


class Seen(NamedTuple):
    """What was decided of a branch, all of whose modules are as built, and what would change that.

    block: kept, so that no other has its id. modules: (children of its parent, name, module, its class, its
    `__dict__`, its own forward); forwards: (class, forward, `Known.calls`); parameters: the dicts that have some; asks:
    (`Known.why_not`, module).
    """

    branch: Branch
    block: nn.Module
    modules: list[tuple]
    forwards: list[tuple]
    parameters: list[dict]
    asks: list[tuple]

    @classmethod
    def of(cls, block: nn.Module, patch: Patch, part: str, branch: Branch) -> Seen:
        paths = [(block, names) for _, names, _ in KNOWN[patch.kind].branches[part]]
        paths += [(branch.part, names) for _, names, _ in KNOWN[type(branch.part)].paths]
        modules, there = [], []
        for holder, names in paths:
            parent = child(holder, names[:-1])
            found = None if parent is None else parent._modules.get(names[-1])
            # where there is no module somebody may put a function
            held = {} if parent is None else (parent if found is None else found).__dict__
            own = held.get(names[-1] if found is None else "forward")
            modules.append((parent._modules if parent else {}, names[-1], found, type(found), held, own))
            there += [] if found is None else [found]
        kinds = {type(module) for module in there}
        return cls(
            branch,
            block,
            modules,
            [(kind, kind.forward, KNOWN[kind].calls) for kind in kinds],  # type: ignore[attr-defined]
            [module._parameters for module in there if module._parameters],
            [(ask, module) for module in there if (ask := KNOWN[type(module)].why_not) is not None],
        )

    def holds(self) -> bool:
        """`absorbable` of all these modules, written out: twelve blocks ask it of twenty modules each."""
        for children, name, module, kind, held, own in self.modules:
            if children.get(name) is not module:
                return False
            if module is None:
                if held.get(name) is not own:
                    return False
            elif (
                type(module) is not kind
                or held["_forward_hooks"]
                or held["_forward_pre_hooks"]
                or held["_backward_hooks"]
                or held["_backward_pre_hooks"]
                or held.get("forward") is not own
            ):
                return False
        for kind, forward, calls in self.forwards:
            if kind.forward is not forward or (calls and not still_calls(kind)):
                return False
        for parameters in self.parameters:
            for parameter in parameters.values():
                if parameter is not None and type(parameter) not in PLAIN_TENSORS:
                    return False
        return not any(ask(module) for ask, module in self.asks)


def _row_scale(drop_path: nn.Module | None, x: Tensor, gamma: Tensor | None) -> Tensor | None:
    """[B], 0 or 1 / keep probability: what the module makes of ones, so that it draws what it would have drawn."""
    if drop_path is None or not drop_path.training or KNOWN[type(drop_path)].role == "identity":
        return None
    if not KNOWN[type(drop_path)].read(drop_path):
        return None
    dtype = autocast_dtype(x) or x.dtype
    dtype = dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)
    return drop_path(x.new_ones((x.shape[0], 1, 1), dtype=dtype)).flatten()


def attention_branch(
    block: nn.Module, patch: Patch, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor], absorbs: bool = True
) -> Tensor:
    """x + drop_path(scale(dropout(attn(norm(x))))).

    Args:
        x: [B, N, D].
        call: (attention module, normed tokens) -> what it gives, where the module is to run itself.
        absorbs: whether this call wants no more of it than ops give.
    """
    norm, attn, parts, tail, prologue = branch_of(block, patch, "attn")
    if parts is None or not absorbs or faster_as_it_is(attn, x):
        norm = None if parts is not None and "norm" in parts else norm
        return x + tail.run(call(attn, x if norm is None else run_norm(norm, x, patch)))
    out = heads_of(attn, norm, x, parts, patch, prologue)
    dropouts, proj = _there(parts.get("proj_drop"), tail.dropout), parts["proj"]
    out, inner = _inner(parts, out, patch)
    if KNOWN[type(proj)].role == "identity":
        for dropout in dropouts:
            out = dropout(out)
        return x + tail._replace(dropout=None).run(out)
    return added(x, out, proj, dropouts, *tail.scales(x), **inner)


def _there(*modules: nn.Module | None) -> list[Any]:
    """Those that are there and no Identity."""
    return [module for module in modules if module is not None and type(module) is not nn.Identity]


def _inner(parts: dict[str, nn.Module], out: Tensor, patch: Patch) -> tuple[Tensor, dict[str, Any]]:
    """What the last projection takes, and the norm before it, which the op computes where norms are to be fused."""
    norm = parts.get("inner_norm")
    if norm is None or not is_norm(norm):
        return out, {}
    return (out, norm_args(norm)) if patch.norm else (norm(out), {})


def mlp_branch(block: nn.Module, patch: Patch, x: Tensor) -> Tensor:
    """x + drop_path(scale(dropout(mlp(norm(x))))), x [B, N, D]."""
    norm, mlp, parts, tail, prologue = branch_of(block, patch, "mlp")
    if parts is None:
        return x + tail.run(mlp(x if norm is None else run_norm(norm, x, patch)))
    scales, inner = tail.scales(x), parts.get("inner_norm")
    middle, dropouts = parts.get("mid_drop"), _there(parts.get("drop"), tail.dropout)
    drops = any(dropping(drop) for drop in _there(middle, *dropouts))
    if "fc1" in parts and prologue and not drops and (inner is None or not is_norm(inner)):
        gamma, row_scale = scales
        return ops.mlp(
            x, *parameters_of(norm), *parameters_of(parts["fc1"]), *parameters_of(parts["fc2"]),
            norm_eps=eps_of(norm, norm.weight), norm=norm_kind(norm), act=_act(parts), gated=gated(mlp),
            gamma=gamma, row_scale=row_scale(),
        )  # fmt: skip
    hidden = hidden_of(mlp, norm, x, parts, prologue)
    hidden, last = _inner(parts, hidden if middle is None else middle(hidden), patch)
    return added(x, hidden, parts["fc2"], dropouts, *scales, **last)


def gated(mlp: nn.Module) -> bool:
    """Whether its first projection gives gate and value."""
    return KNOWN[type(mlp)].read(mlp) is True


def _act(parts: dict[str, nn.Module]) -> str:
    return KNOWN[type(parts["act"])].read(parts["act"])


def hidden_of(mlp: nn.Module, norm: nn.Module | None, x: Tensor, parts: dict[str, nn.Module], prologue: bool) -> Tensor:
    """The hidden activation of an MLP, the norm before it included."""
    act = _act(parts)
    if "gate" in parts:
        if norm is not None and not prologue:
            x, norm = norm(x), None
        value = run_linear(x, norm, parts["value"], prologue)
        return run_linear(x, norm, parts["gate"], prologue, act) * value
    if gated(mlp):
        gate, value = run_linear(x, norm, parts["fc1"], prologue).chunk(2, dim=-1)
        return reference.activation(gate, act) * value
    return run_linear(x, norm, parts["fc1"], prologue, act)
