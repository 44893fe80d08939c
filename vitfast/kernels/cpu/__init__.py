"""The C++ kernels for the CPU, as functions of tensors: `vitfast._C` takes addresses, sizes and strides."""

from vitfast.kernels.cpu.activation import activation
from vitfast.kernels.cpu.arguments import ACTIVATIONS, DTYPES, FLOATS, PATCH_ORDERS, has_amx, kernels, takes
from vitfast.kernels.cpu.attention import attends, attention, attention_qkv
from vitfast.kernels.cpu.choice import faster_of, measured, settled, tiled
from vitfast.kernels.cpu.layer_norm import Norm, layer_norm
from vitfast.kernels.cpu.linear import PackedWeight, linear, linear_unpacked, multiplies, takes_unpacked
from vitfast.kernels.cpu.mlp import Block, block, mlp
from vitfast.kernels.cpu.patch_embed import embed, patch_rows

__all__ = [
    "ACTIVATIONS", "DTYPES", "FLOATS", "PATCH_ORDERS", "Block", "Norm", "PackedWeight", "activation", "attends",
    "attention", "attention_qkv", "block", "embed", "faster_of", "has_amx", "kernels", "layer_norm", "linear",
    "linear_unpacked", "measured", "mlp", "multiplies", "patch_rows", "settled", "takes", "takes_unpacked", "tiled",
]  # fmt: skip
