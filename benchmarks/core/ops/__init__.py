"""The ops of a ViT against everybody's way to compute them. Each function makes a `Case` from plain values.

All tensors of an op, weights too, are inputs, so that they rotate. A rival that wants another layout than a ViT's
tensors have (heads apart, channels last) gets inputs of its own in it; notes["left_out"] says what of the time that is.
With mode 'forward+backward' the last inputs are the gradients of the results, and the gradients of inputs and weights
come after the results.
"""

from collections.abc import Callable

from vitfast.bench.case import Case
from vitfast.bench.ops.attention import attention
from vitfast.bench.ops.layer_norm import add_layer_norm, layer_norm
from vitfast.bench.ops.linear import LINEARS, linear
from vitfast.bench.ops.mlp import mlp
from vitfast.bench.ops.patch_embed import patch_embed

__all__ = ["FACTORIES", "LINEARS", "add_layer_norm", "attention", "layer_norm", "linear", "mlp", "patch_embed"]

FACTORIES: dict[str, Callable[..., Case]] = {
    "attention": attention,
    "layer_norm": layer_norm,
    "add_layer_norm": add_layer_norm,
    "linear": linear,
    "mlp": mlp,
    "patch_embed": patch_embed,
}
