"""What is true: every op in plain PyTorch, differentiable, exact in fp64.

The ops are tested against these functions in fp64, and the exportable mode runs them as they are.
Shapes: B images, N tokens, C or D channels, H heads.
"""

from vitfast.reference.activation import activation, scale_branch
from vitfast.reference.attention import attention, attention_kept, attention_lse, attention_visibly
from vitfast.reference.layer_norm import add_layer_norm, layer_norm
from vitfast.reference.linear import linear
from vitfast.reference.mlp import mlp
from vitfast.reference.patch_embed import normalise, patch_embed, patch_rows, with_prefix

__all__ = [
    "activation",
    "add_layer_norm",
    "attention",
    "attention_kept",
    "attention_lse",
    "attention_visibly",
    "layer_norm",
    "linear",
    "mlp",
    "normalise",
    "patch_embed",
    "patch_rows",
    "scale_branch",
    "with_prefix",
]
