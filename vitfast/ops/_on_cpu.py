"""Which calls of ops run as stock operators on a CPU, because these are faster there."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vitfast.ops._launch import INTERPRETED

ALWAYS = sys.maxsize
# Numbers in an op's first input up to which stock operators are faster on a CPU. An op costs a call through torch's
# dispatcher, and its gradient a Python function and its calls; what it saves grows with its input. Where the times are
# alike the op stays: it holds less memory between forward and backward. One number for inference and training, so that
# both compute the same. Not mlp, whose C++ activation is faster in inference, nor attention: there the C++ kernel is
# faster for any number of tokens, and torch's operator, faster in training up to some thousand numbers, has no second
# derivative. `python -m benchmarks.host --crossover` measures.
LIMITS = {
    # on a CPU the op is the stock operator and a call around it
    "layer_norm": ALWAYS,
    # `ops.layer_norm` of kind 'rms': stock operators keep three times its input for the backward
    "rms_norm": 1 << 17,
    "linear": 1 << 16,
}
# Whether attention that a library computes without SDPA stays as it is in training in half precision: SDPA's backward,
# which is the op's, takes longer there than products and a softmax (`python -m benchmarks patch vit-pytorch`).
WEIGHTS_IN_HALF = True
# Numbers in the input of a block of another library up to which it runs its own forward in training: there ops are
# level with stock operators, or up to 4 % slower (`python -m benchmarks patch --batches 1 --modes training`).
TRAINING_BOUND = 1 << 18
# Numbers in the input of a block or a model up to which its modules run as they are: there is less to do than to ask.
HOST_BOUND = 1 << 14


def host_bound(x: Tensor, each: float = 1.0) -> bool:
    """Whether a call on x takes as long as Python does on a CPU, so that looking for ops costs more than they save.

    Args:
        x: the input.
        each: how many numbers are computed of one of x's.
    """
    # written out, since a block asks several times; tangents of torch's own norm have a wrong gradient
    if type(x) is not Tensor or INTERPRETED or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    return x.is_cpu and 0 < x.numel() * each <= HOST_BOUND


def faster_as_stock(op: str, x: Tensor) -> bool:
    """Whether stock operators are to run this call, of whose op in `LIMITS` x is the first input."""
    # a graph serves other sizes too, and has no calls to save
    if type(x) is not Tensor or INTERPRETED or torch.compiler.is_compiling():
        return False
    return x.is_cpu and 0 < x.numel() <= LIMITS[op]


def notes() -> list[str]:
    """`LIMITS` and `HOST_BOUND` in words, for `vitfast.explain`."""
    words = [f"{op} " + ("always" if most == ALWAYS else f"up to {most:,}") for op, most in LIMITS.items()]
    return [
        f"on cpu, modules of up to {HOST_BOUND:,} numbers run as they are, not as ops: looking for ops costs more",
        f"on cpu, stock operators are faster by numbers in the input: {', '.join(words)}",
    ]
