"""Norms, alone or of a residual sum, against everybody's way to compute them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast import ops, reference
from vitfast.bench import work
from vitfast.bench.case import Case, Tensors
from vitfast.bench.compilers import compiled
from vitfast.bench.factory import positive, recorded
from vitfast.bench.op_case import EPS, Draw, Way, op_case


@recorded
def layer_norm(
    *, batch: int, tokens: int, width: int, mode: str = "forward", dtype: str = "bf16", device: str = "cpu"
) -> Case:
    """The norm of [B, N, C] with weight and bias."""
    positive(batch=batch, tokens=tokens, width=width)

    def draw_inputs(draw: Draw) -> Tensors:
        return draw(batch, tokens, width), 1 + draw(width, scale=0.1), draw(width, scale=0.1)

    def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, EPS)

    return op_case(
        "layer_norm", {"tokens": tokens, "width": width}, batch, mode, dtype, device, draw_inputs,
        images=(True, False, False), results=((batch, tokens, width),),
        truth=lambda x, weight, bias: reference.layer_norm(x, weight, bias, EPS),
        ways={
            "F.layer_norm": Way(lambda: stock),
            "vitfast": Way(lambda: partial(ops.layer_norm, eps=EPS)),
            "compiled": Way(lambda: compiled(stock)),
            "Liger": Way(lambda: _liger(device), ("liger_kernel",)),
        },
        count=partial(work.layer_norm, batch * tokens, width, dtype),
    )  # fmt: skip


@recorded
def add_layer_norm(
    *, batch: int, tokens: int, width: int, mode: str = "forward", dtype: str = "bf16", device: str = "cpu"
) -> Case:
    """The sum of residual and branch, both [B, N, C], and its norm: what stands between two halves of a block."""
    positive(batch=batch, tokens=tokens, width=width)

    def draw_inputs(draw: Draw) -> Tensors:
        x, branch = draw(batch, tokens, width), draw(batch, tokens, width)
        return x, branch, 1 + draw(width, scale=0.1), draw(width, scale=0.1)

    def stock(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
        total = x + branch
        return total, F.layer_norm(total, weight.shape, weight, bias, EPS)

    def liger() -> Callable[..., Tensors]:
        norm = _liger(device)

        def run(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
            total = x + branch
            return total, norm(total, weight, bias)

        return run

    return op_case(
        "add_layer_norm", {"tokens": tokens, "width": width}, batch, mode, dtype, device, draw_inputs,
        images=(True, True, False, False), results=((batch, tokens, width),) * 2,
        truth=lambda x, branch, weight, bias: reference.add_layer_norm(x, branch, None, None, weight, bias, EPS),
        ways={
            "add, F.layer_norm": Way(lambda: stock),
            "vitfast": Way(lambda: partial(ops.add_layer_norm, eps=EPS)),
            "compiled": Way(lambda: compiled(stock)),
            "add, Liger": Way(liger, ("liger_kernel",)),
        },
        count=partial(work.add_layer_norm, batch * tokens, width, dtype),
    )  # fmt: skip


def _liger(device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Liger's LayerNorm of (x, weight, bias)."""
    if torch.device(device).type != "cuda":
        raise NotImplementedError("on a GPU only")
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, EPS)
