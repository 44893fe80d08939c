"""The ops of a ViT as torch sees them: checks, autocast, shape functions, gradients, one implementation a device.

`vitfast.reference` says what each computes. Forward and backward, `torch.compile`, `torch.export`, any strides and
empty batches work with all of them.
"""

from vitfast.ops import _flops
from vitfast.ops import linear_folded as linear_folded
from vitfast.ops import prepared_block as prepared_block
from vitfast.ops.attention import attention, attention_qkv, attention_weights
from vitfast.ops.attention_varlen import attention_varlen
from vitfast.ops.layer_norm import add_layer_norm, layer_norm
from vitfast.ops.linear import linear
from vitfast.ops.mlp import mlp
from vitfast.ops.patch_embed import patch_embed
from vitfast.ops.patch_embed_packed import patch_embed_packed

_flops.register_when_imported()

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_qkv",
    "attention_varlen",
    "attention_weights",
    "layer_norm",
    "linear",
    "mlp",
    "patch_embed",
    "patch_embed_packed",
]
