"""Which calls of ops run as stock operators on a CPU, because these are faster there."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from vitfast.choose.exportable import forward_mode, stock_only
from vitfast.ops._launch import INTERPRETED


class Limit(NamedTuple):
    """Numbers in an op's first input up to which stock operators are faster."""

    inference: int
    training: int


ALWAYS = sys.maxsize
# An op costs a call through torch's dispatcher, and its gradient a Python function and its calls; what it saves grows
# with its input. `python -m benchmarks.host --crossover` measures these. Above, training keeps the op where the times
# are alike: it holds less memory between forward and backward. Not attention: the C++ kernel is faster for any number
# of tokens, and torch's operator, faster in training up to some thousand numbers, has no second derivative.
LIMITS = {
    # on a CPU the op is the stock operator and a call around it
    "layer_norm": Limit(ALWAYS, ALWAYS),
    # `ops.layer_norm` of kind 'rms': stock operators keep three times its input for the backward
    "rms_norm": Limit(ALWAYS, 1 << 17),
    "linear": Limit(1 << 16, 1 << 16),
    "mlp": Limit(1 << 14, 1 << 16),
}


# Numbers in the input of a block or a model up to which its modules run as they are: there is less to do than to ask.
HOST_BOUND = 1 << 14


def host_bound(x: Tensor, numbers: int | None = None) -> bool:
    """Whether a call on x takes as long as Python does on a CPU, so that looking for ops costs more than they save.

    Args:
        x: the input.
        numbers: in what is computed of x, where they are not as many as in x.
    """
    # a graph serves other sizes too, and costs no Python; tangents of torch's own norm have a wrong gradient
    if type(x) is not Tensor or INTERPRETED or torch.compiler.is_compiling() or forward_mode():
        return False
    return x.is_cpu and 0 < (x.numel() if numbers is None else numbers) <= HOST_BOUND


def by_stock(op: str, x: Tensor, saves: bool) -> bool:
    """Whether stock operators are to run this call of `op` and to differentiate it: where they must, or are faster.

    Args:
        op: a key of `LIMITS`.
        x: the op's first input.
        saves: whether a backward may follow.
    """
    if stock_only():
        return True
    limit = LIMITS[op].training if saves else LIMITS[op].inference
    if type(x) is not Tensor or INTERPRETED or torch.compiler.is_compiling():
        return False
    return x.is_cpu and 0 < x.numel() <= limit


def notes() -> list[str]:
    """`LIMITS` and `HOST_BOUND` in words, for `vitfast.explain`."""
    words = []
    for op, limit in LIMITS.items():
        most = [("inference", limit.inference), ("training", limit.training)]
        words += [f"{op} in {when} up to {n:,}" for when, n in most if n < ALWAYS]
        words += [f"{op} always"] * (limit == (ALWAYS, ALWAYS))
    return [
        f"on cpu, modules of up to {HOST_BOUND:,} numbers run as they are, not as ops: looking for ops costs more",
        f"on cpu, stock operators are faster by numbers in the input: {', '.join(words)}",
    ]
