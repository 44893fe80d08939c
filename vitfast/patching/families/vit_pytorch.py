"""vit-pytorch: `ViT`, `SimpleViT` and those variants whose blocks are the same.

The residuals are in `Transformer`, whose blocks are lists of an attention and an MLP. These two have forwards of their
own too, for where somebody watches, shards or calls one alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitfast import ops
from vitfast.model.layers import parameters_of
from vitfast.patching.engine import (
    Heads,
    Patch,
    absorbable,
    attention_branch,
    child,
    heads_of,
    hidden_of,
    inside,
    mlp_branch,
    run_norm,
    runs_stock,
    trains_in_half,
)
from vitfast.patching.known import KNOWN, LIBRARIES, Known


def transformer(module: nn.Module, x: Tensor) -> Tensor:
    """`Transformer.forward` of those with a norm after the blocks."""
    patch = module.__dict__.get("_vitfast")
    if runs_stock(patch, x, module.training) or trains_in_half(module, x) or x.dim() != 3 or not _as_built(module):
        return type(module).forward(module, x)
    return run_norm(child(module, ["norm"]), _run(module, patch, x), patch)


def transformer_without_norm(module: nn.Module, x: Tensor) -> Tensor:
    """`Transformer.forward` of those that return what the last block gives, whatever else somebody put there."""
    patch = module.__dict__.get("_vitfast")
    if runs_stock(patch, x, module.training) or trains_in_half(module, x) or x.dim() != 3 or not _as_built(module):
        return type(module).forward(module, x)
    return _run(module, patch, x)


def _as_built(module: nn.Module) -> bool:
    """Whether each layer is a list of two: with other ones the loop is the library's."""
    layers = child(module, ["layers"])
    return type(layers) is nn.ModuleList and all(
        type(layer) is nn.ModuleList and [*layer._modules] == ["0", "1"] for layer in layers
    )


def _run(module: nn.Module, patch: Patch, x: Tensor) -> Tensor:
    layers: Any = module._modules["layers"]
    for layer in layers:
        x = attention_branch(layer, patch, x, lambda attn, tokens: attn(tokens))
        x = mlp_branch(layer, patch, x)
    return x


def attention(module: nn.Module, x: Tensor) -> Tensor:
    """`Attention.forward`, its norm included, without the residual."""
    patch = module.__dict__.get("_vitfast")
    parts = None
    if (
        not runs_stock(patch, x, module.training)
        and x.dim() == 3
        and patch.attention
        and not _attention_why_not(module)
    ):
        parts = inside(module, KNOWN[patch.kind])
    if parts is None or trains_in_half(module, x):
        return type(module).forward(module, x)
    norm = parts["norm"]
    out = heads_of(module, norm, x, parts, patch, patch.norm and absorbable(norm, ("norm",)))
    out = ops.linear(out, *parameters_of(parts["proj"]))
    return parts["proj_drop"](out) if "proj_drop" in parts else out


def feed_forward(module: nn.Module, x: Tensor) -> Tensor:
    """`FeedForward.forward`, its norm included, without the residual."""
    patch = module.__dict__.get("_vitfast")
    parts = None
    if (
        not runs_stock(patch, x, module.training)
        and x.dim() > 1
        and patch.mlp
        and not KNOWN[patch.kind].why_not(module)
    ):
        parts = inside(module, KNOWN[patch.kind])
    # beside attention that runs as it is, the MLP was 3 % slower by ops
    if parts is None or trains_in_half(module, x):
        return type(module).forward(module, x)
    norm = parts["norm"]
    hidden = hidden_of(module, norm, x, parts, patch.norm and absorbable(norm, ("norm",)))
    hidden = parts["mid_drop"](hidden) if "mid_drop" in parts else hidden
    out = ops.linear(hidden, *parameters_of(parts["fc2"]))
    return parts["drop"](out) if "drop" in parts else out


def _heads(attn: Any) -> Heads:
    head_dim = attn.to_qkv.weight.shape[0] // (3 * attn.heads)
    drop = attn._modules.get("dropout")
    rate = drop.p if type(drop) is nn.Dropout and drop.training else 0.0
    return Heads(attn.heads, head_dim, attn.scale, rate, True)


def _attention_why_not(attn: Any) -> str:
    to_out: Any = child(attn, ["to_out"])
    if type(to_out) is nn.Identity:
        return "has no projection after its one head"
    longer = type(to_out) is nn.Sequential and len(to_out) != 2
    return f"has {len(to_out)} modules in to_out, not 2" if longer else ""


def _net_of(length: int) -> Any:
    def why_not(mlp: Any) -> str:
        net: Any = child(mlp, ["net"])
        # what else there is instead is told of itself
        longer = type(net) is nn.Sequential and len(net) != length
        return f"has {len(net)} modules in net, not {length}" if longer else ""

    return why_not


_QKV = {"norm": "norm", "qkv": "to_qkv", "softmax": "attend"}
_NET = {"sequence": "net", "norm": "net.0", "fc1": "net.1", "act": "net.2"}
_LAYERS = {"attn": "0", "mlp": "1"}
_WITH_NORM = {"Transformer": Known("block", _LAYERS, forward=transformer, layers="layers")}
_WITHOUT_NORM = {"Transformer": Known("block", _LAYERS, forward=transformer_without_norm, layers="layers")}
_OF_VIT = {
    "Attention": Known(
        "attention",
        {**_QKV, "attn_drop": "dropout", "sequence": "to_out", "proj": "to_out.0", "proj_drop": "to_out.1"},
        _heads, _attention_why_not, forward=attention,
    ),
    "FeedForward": Known(
        "mlp", {**_NET, "mid_drop": "net.3", "fc2": "net.4", "drop": "net.5"},
        why_not=_net_of(6), forward=feed_forward,
    ),
}  # fmt: skip
_OF_SIMPLE_VIT = {
    "Attention": Known("attention", {**_QKV, "proj": "to_out"}, _heads, _attention_why_not, forward=attention),
    "FeedForward": Known("mlp", {**_NET, "fc2": "net.3"}, why_not=_net_of(4), forward=feed_forward),
}
for _modules, _classes in (
    (("vit",), _OF_VIT | _WITH_NORM),
    (("vit_1d", "vit_3d", "vit_with_patch_dropout"), _OF_VIT | _WITHOUT_NORM),
    (
        ("simple_vit", "simple_vit_1d", "simple_vit_3d", "simple_vit_with_fft", "simple_vit_with_patch_dropout",
         "simple_vit_with_register_tokens"),
        _OF_SIMPLE_VIT | _WITH_NORM,
    ),
):  # fmt: skip
    for _module in _modules:
        LIBRARIES |= {f"vit_pytorch.{_module}.{_name}": _known for _name, _known in _classes.items()}
