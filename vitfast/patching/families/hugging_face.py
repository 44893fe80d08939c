"""transformers: the layers of ViT, DeiT, DINOv2 and DINOv2 with registers, and their attentions.

The attentions have a forward of their own too: transformers leaves hooks on them after one call that wants hidden
states or attentions, and from then on a layer has to call its attention.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.patching.engine import Heads, Patch, attention_branch, heads_of, inside, mlp_branch, run_linear, runs_stock
from vitfast.patching.known import KNOWN, LIBRARIES, Known

# what layers hand on to attentions and neither SDPA nor eager attention looks at
UNREAD = ("output_hidden_states", "num_items_in_batch")
# what transformers takes out of the keywords, and warns of, where it checkpoints
CACHES = ("use_cache", "past_key_values", "cache", "layer_past")


def vit_layer(module: nn.Module, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
    """`ViTLayer.forward`."""
    return _layer(module, _vit_call, hidden_states, attention_mask, kwargs)


def dinov2_layer(module: nn.Module, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
    """`Dinov2Layer.forward`."""
    return _layer(module, _dinov2_call, hidden_states, attention_mask, kwargs)


def _vit_call(attn: nn.Module, normed: Tensor, attention_mask: Any, kwargs: dict[str, Any]) -> Tensor:
    return attn(normed, attention_mask, **kwargs)[0]


def _dinov2_call(attn: nn.Module, normed: Tensor, attention_mask: Any, kwargs: dict[str, Any]) -> Tensor:
    return attn(normed, attention_mask=attention_mask, **kwargs)[0]


def _layer(module: Any, call: Callable, hidden_states: Tensor, attention_mask: Any, kwargs: dict[str, Any]) -> Tensor:
    patch = module.__dict__.get("_vitfast")
    checkpoints = _checkpoints(module)
    if (
        runs_stock(patch, hidden_states, module.training)
        or hidden_states.dim() != 3
        or (checkpoints and any(map(kwargs.get, CACHES)))
    ):
        return type(module).forward(module, hidden_states, attention_mask, **kwargs)
    if checkpoints:
        run = functools.partial(_branches, module, patch, call, kwargs)
        return module._gradient_checkpointing_func(run, hidden_states, attention_mask)
    return _branches(module, patch, call, kwargs, hidden_states, attention_mask)


def _checkpoints(layer: Any) -> bool:
    """Whether the forward of its class recomputes itself in the backward now.

    From 5.23 on transformers wraps the forward of the class for that, and before, it was `__call__` that did it.
    """
    return layer.training and layer.gradient_checkpointing and hasattr(type(layer).forward, "__wrapped__")


def _branches(
    layer: nn.Module, patch: Patch, call: Callable, kwargs: dict[str, Any], x: Tensor, attention_mask: Any
) -> Tensor:
    x = attention_branch(
        layer, patch, x,
        lambda attn, normed: call(attn, normed, attention_mask, kwargs),
        absorbs=attention_mask is None and _reads_none_of(kwargs),
    )  # fmt: skip
    return mlp_branch(layer, patch, x)


def attention(module: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> tuple[Tensor, Any]:
    """`ViTAttention.forward`, which is asked for its weights too: only SDPA has none to give."""
    patch, parts = module.__dict__.get("_vitfast"), None
    if (
        not runs_stock(patch, hidden_states, module.training)
        and hidden_states.dim() == 3
        and patch.attention
        and attention_mask is None
        and _reads_none_of(kwargs)
        and type(module) is patch.kind
        and not _why_not_alone(module)
    ):
        parts = inside(module, KNOWN[patch.kind])
    if parts is None:
        return type(module).forward(module, hidden_states, attention_mask, **kwargs)
    heads = heads_of(module, None, hidden_states, parts, patch, False)
    return run_linear(heads, None, parts["proj"], False), None


def _reads_none_of(kwargs: Mapping[str, Any]) -> bool:
    """Whether attention computes the same without these keywords."""
    return all(value is None or value is False or name in UNREAD for name, value in kwargs.items())


def _heads(attn: Any) -> Heads:
    num_heads = attn._modules["q_proj"].out_features // attn.head_dim
    rate = attn.attention_dropout if attn.training else 0.0
    return Heads(num_heads, attn.head_dim, attn.scaling, rate, attn.config._attn_implementation == "eager")


def _why_not(attn: Any) -> str:
    """An attention is fused where the function that it would call is one that ops stand in for."""
    name = attn.config._attn_implementation
    functions = sys.modules[type(attn).__module__].ALL_ATTENTION_FUNCTIONS
    if name not in ("sdpa", "eager"):
        return f"has attn_implementation {name!r}, which runs as it is"
    if ("eager" in functions) if name == "eager" else not _is_sdpa(functions.get(name)):
        return f"has attn_implementation {name!r} with a function that somebody registered"
    if attn.is_causal or "num_key_value_groups" in attn.__dict__:
        return "is causal" if attn.is_causal else "has groups of keys and values"
    return ""


def _why_not_alone(attn: Any) -> str:
    eager = attn.config._attn_implementation == "eager"
    return "has hooks, and attn_implementation 'eager' with weights for them" if eager else _why_not(attn)


def _is_sdpa(function: Any) -> bool:
    """Whether it is transformers' own, and nothing that wraps it."""
    if torch.compiler.is_compiling():
        # Dynamo knows no `__module__` of a function
        return function is sys.modules["transformers.integrations.sdpa_attention"].sdpa_attention_forward
    at = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    own = at == ("transformers.integrations.sdpa_attention", "sdpa_attention_forward")
    return own and not hasattr(function, "__wrapped__")


def _gelu_why_not(module: Any) -> str:
    own = module.act is F.gelu or getattr(module.act, "__func__", None) is type(module)._gelu_python
    return "" if own else "has another act"


def _gelu_tanh_why_not(module: Any) -> str:
    act = module.act
    stock = isinstance(act, functools.partial) and act.func is F.gelu and act.keywords == {"approximate": "tanh"}
    own = stock or getattr(act, "__func__", None) is type(module)._gelu_tanh_python
    return "" if own else "has another act"


_VIT = {
    "norm1": "layernorm_before", "attn": "attention", "drop1": "dropout",
    "norm2": "layernorm_after", "mlp": "mlp", "drop2": "dropout",
}  # fmt: skip
_DINOV2 = {
    "norm1": "norm1", "attn": "attention", "scale1": "layer_scale1", "drop_path1": "drop_path",
    "norm2": "norm2", "mlp": "mlp", "scale2": "layer_scale2", "drop_path2": "drop_path",
}  # fmt: skip
for _at, _children, _forward in (
    ("vit.modeling_vit.ViT", _VIT, vit_layer),
    ("deit.modeling_deit.DeiT", _VIT, vit_layer),
    ("dinov2.modeling_dinov2.Dinov2", _DINOV2, dinov2_layer),
    ("dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegisters", _DINOV2, dinov2_layer),
):
    LIBRARIES |= {
        f"transformers.models.{_at}Layer": Known("block", _children, forward=_forward),
        f"transformers.models.{_at}Attention": Known(
            "attention",
            {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "o_proj"},
            read=_heads,
            why_not=_why_not,
            forward=attention,
            calls=("eager_attention_forward",),
            why_not_alone=_why_not_alone,
        ),
        f"transformers.models.{_at}MLP": Known("mlp", {"fc1": "fc1", "act": "activation_fn", "fc2": "fc2"}),
    }
    if _children is _DINOV2:
        LIBRARIES |= {
            f"transformers.models.{_at}SwiGLUFFN": Known(
                "mlp", {"gate": "gate_proj", "value": "up_proj", "act": "act_fn", "fc2": "down_proj"}
            ),
            f"transformers.models.{_at}LayerScale": Known("scale", read=lambda scale: scale.lambda1),
            f"transformers.models.{_at}DropPath": Known("drop_path", read=lambda path: path.drop_prob),
        }
_ACTIVATIONS = "transformers.activations."
LIBRARIES |= {
    f"{_ACTIVATIONS}GELUActivation": Known(
        "activation", read=lambda act: "gelu", why_not=_gelu_why_not, calls=("_gelu_python",)
    ),
    f"{_ACTIVATIONS}GELUTanh": Known(
        "activation", read=lambda act: "gelu_tanh", why_not=_gelu_tanh_why_not, calls=("_gelu_tanh_python",)
    ),
    f"{_ACTIVATIONS}NewGELUActivation": Known("activation", read=lambda act: "gelu_tanh"),
    f"{_ACTIVATIONS}QuickGELUActivation": Known("activation", read=lambda act: "quick_gelu"),
    f"{_ACTIVATIONS}SiLUActivation": Known("activation", read=lambda act: "silu"),
}
