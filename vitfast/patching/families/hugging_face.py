"""Hugging Face transformers: ViT, DeiT, DINOv2 and DINOv2 with registers.

A layer discards the attention weights that its attention module returns, so attention is part of the layer where
nobody watches that module. transformers records attentions with hooks on it: then it is called, and its own forward
runs ops where there are no weights to return.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vitfast.patching.engine import Heads, Patch, attention_branch, heads_of, inside, mlp_branch, runs_stock
from vitfast.patching.known import KNOWN, LIBRARIES, Known


def layer(module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """`ViTLayer.forward` and its like, with the checkpointing that transformers puts around it."""
    patch = module.__dict__.get("_vitfast")
    if runs_stock(patch, hidden_states):
        return type(module).forward(module, hidden_states, attention_mask, **kwargs)
    run = functools.partial(_layer, module, patch)
    # older ones checkpoint in `__call__`, around any forward
    if module.gradient_checkpointing and module.training and hasattr(type(module).forward, "__wrapped__"):
        return module._gradient_checkpointing_func(functools.partial(run, **kwargs), hidden_states, attention_mask)
    return run(hidden_states, attention_mask, **kwargs)


def _layer(module: Any, patch: Patch, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    x = attention_branch(
        module, patch, x,
        lambda attn, normed: attn(normed, attention_mask=attention_mask, **kwargs)[0],
        absorbs=_plain_call(attention_mask, kwargs),
    )  # fmt: skip
    return mlp_branch(module, patch, x)


def attention(module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """`ViTAttention.forward` and its like: [B, N, D] and the weights, None where the implementation makes none."""
    patch = module.__dict__.get("_vitfast")
    parts = None
    if not runs_stock(patch, hidden_states) and patch.attention and _plain_call(attention_mask, kwargs):
        parts = None if _why_not(module) or _makes_weights(module) else inside(module, KNOWN[patch.kind])
    if parts is None:
        return type(module).forward(module, hidden_states, attention_mask, **kwargs)
    out = heads_of(module, None, hidden_states, parts, patch, False)
    return parts["proj"](out), None


def _plain_call(mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether attention is asked for no more than ops give."""
    return mask is None and all(value is None or value is False for value in kwargs.values())


def _is_own(implementation: str) -> bool:
    """Whether nobody registered a function under the name of this implementation."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, None)
    return found is (sdpa_attention_forward if implementation == "sdpa" else None)


def _heads(attn: Any) -> Heads:
    return Heads(
        attn.num_attention_heads, attn.head_dim, attn.scaling, attn.attention_dropout if attn.training else 0.0
    )


def _why_not(attn: Any) -> str:
    if attn.is_causal or getattr(attn, "num_key_value_groups", 1) != 1:
        return "is causal, or shares keys between heads"
    chosen = attn.config._attn_implementation
    return "" if chosen in ("sdpa", "eager") and _is_own(chosen) else f"runs the attn_implementation {chosen!r}"


def _makes_weights(attn: Any) -> str:
    eager = attn.config._attn_implementation == "eager"
    return "makes its weights, for somebody watches it and the attn_implementation is 'eager'" if eager else ""


def _gelu_why_not(act: Any) -> str:
    """They keep the function that they call, in C or in Python."""
    own = getattr(act.act, "__func__", None) in (
        getattr(type(act), name, None) for name in ("_gelu_python", "_gelu_tanh_python")
    )
    tanh = getattr(act.act, "func", None) is F.gelu and act.act.keywords == {"approximate": "tanh"}
    return "" if own or act.act is F.gelu or tanh else "calls another function"


_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "o_proj"}
_VIT = {
    "norm1": "layernorm_before", "attn": "attention", "drop1": "dropout",
    "norm2": "layernorm_after", "mlp": "mlp", "drop2": "dropout",
}  # fmt: skip
_DINO = {
    "norm1": "norm1", "attn": "attention", "scale1": "layer_scale1", "drop_path1": "drop_path",
    "norm2": "norm2", "mlp": "mlp", "scale2": "layer_scale2", "drop_path2": "drop_path",
}  # fmt: skip
for _module, _prefix, _children in (
    ("vit", "ViT", _VIT), ("deit", "DeiT", _VIT), ("dinov2", "Dinov2", _DINO),
    ("dinov2_with_registers", "Dinov2WithRegisters", _DINO),
):  # fmt: skip
    _at = f"transformers.models.{_module}.modeling_{_module}.{_prefix}"
    LIBRARIES |= {
        f"{_at}Layer": Known("block", _children, forward=layer),
        f"{_at}Attention": Known(
            "attention",
            _ATTENTION,
            read=_heads,
            why_not=_why_not,
            forward=attention,
            calls=("eager_attention_forward",),
        ),
        f"{_at}MLP": Known("mlp", {"fc1": "fc1", "act": "activation_fn", "fc2": "fc2"}),
        f"{_at}SwiGLUFFN": Known("mlp", {"gate": "gate_proj", "value": "up_proj", "act": "act_fn", "fc2": "down_proj"}),
        f"{_at}LayerScale": Known("scale", read=lambda scale: scale.lambda1),
        f"{_at}DropPath": Known("drop_path", read=lambda path: path.drop_prob),
    }
_AT = "transformers.activations."
LIBRARIES |= {
    f"{_AT}GELUActivation": Known("activation", read=lambda act: "gelu", why_not=_gelu_why_not),
    f"{_AT}GELUTanh": Known("activation", read=lambda act: "gelu_tanh", why_not=_gelu_why_not),
    f"{_AT}NewGELUActivation": Known("activation", read=lambda act: "gelu_tanh"),
    f"{_AT}QuickGELUActivation": Known("activation", read=lambda act: "quick_gelu"),
    f"{_AT}SiLUActivation": Known("activation", read=lambda act: "silu"),
}
