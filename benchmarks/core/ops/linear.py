"""Linear layers with what is around them, against everybody's way to compute them."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from vitfast import ops, reference
from vitfast.bench import work
from vitfast.bench.case import Case, Tensors
from vitfast.bench.compilers import autotuned, compiled
from vitfast.bench.factory import one_of, positive, recorded
from vitfast.bench.op_case import EPS, Draw, Way, op_case

# K and outputs in widths, norm, activation, residual
LINEARS = {
    "qkv": (1, 3, "none", "none", False),
    "proj": (1, 1, "none", "none", True),
    "fc1": (1, 4, "none", "gelu", False),
    "fc2": (4, 1, "none", "none", True),
    "norm qkv": (1, 3, "layer", "none", False),
    "norm fc1": (1, 4, "layer", "gelu", False),
}


@recorded
def linear(
    *, batch: int, tokens: int, width: int, kind: str, mode: str = "forward", dtype: str = "bf16", device: str = "cpu"
) -> Case:
    """A projection of a block with what is around it: qkv (bias), proj and fc2 (bias, residual), fc1 (bias, GELU).

    "norm qkv" and "norm fc1" have the norm before them as well.
    """
    positive(batch=batch, tokens=tokens, width=width)
    inside, outside, norm, act, residual = LINEARS[one_of("kind", kind, LINEARS)]
    K, D, normed = inside * width, outside * width, norm != "none"

    def draw_inputs(draw: Draw) -> Tensors:
        given = draw(batch, tokens, K), draw(D, K, scale=K**-0.5), draw(D, scale=0.1)
        if normed:
            return *given, 1 + draw(K, scale=0.1), draw(K, scale=0.1)
        return (*given, draw(batch, tokens, D)) if residual else given

    def stock(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        if normed:
            x = F.layer_norm(x, rest[0].shape, *rest, EPS)
        y = F.linear(x, weight, bias)
        if act == "gelu":
            y = F.gelu(y)
        return rest[0] + y if residual else y

    def ours(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        if normed:
            return ops.linear(x, weight, bias, norm=norm, norm_weight=rest[0], norm_bias=rest[1], norm_eps=EPS, act=act)
        return ops.linear(x, weight, bias, act=act, residual=rest[0] if residual else None)

    def truth(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        norm_weight, norm_bias = rest if normed else (None, None)
        added = rest[0] if residual else None
        return reference.linear(x, weight, bias, norm_weight, norm_bias, EPS, norm, act, residual=added)

    return op_case(
        f"linear {kind}", {"tokens": tokens, "width": width}, batch, mode, dtype, device, draw_inputs,
        images=(True, False, False) + (False,) * (2 * normed) + (True,) * residual, results=((batch, tokens, D),),
        truth=truth,
        ways={
            "F.linear": Way(lambda: stock),
            "vitfast": Way(lambda: ours),
            "product": Way(lambda: lambda x, weight, *rest: F.linear(x, weight), leaves=(0, 1), part=True),
            "compiled": Way(lambda: compiled(stock)),
            "compiled max-autotune": Way(lambda: autotuned(stock, device)),
        },
        count=partial(work.linear, batch * tokens, K, D, dtype, norm=normed, act=act != "none", residual=residual),
    )  # fmt: skip
