"""The MLP half of a block against everybody's way to compute it."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from vitfast import ops, reference
from vitfast.bench import work
from vitfast.bench.case import Case, Tensors
from vitfast.bench.compilers import autotuned, compiled
from vitfast.bench.factory import positive, recorded
from vitfast.bench.op_case import EPS, Draw, Way, op_case


@recorded
def mlp(
    *, batch: int, tokens: int, width: int, mode: str = "forward", dtype: str = "bf16", device: str = "cpu"
) -> Case:
    """The MLP half of a block: x + fc2(GELU(fc1(norm(x))))."""
    positive(batch=batch, tokens=tokens, width=width)
    hidden = 4 * width

    def draw_inputs(draw: Draw) -> Tensors:
        return (
            draw(batch, tokens, width), 1 + draw(width, scale=0.1), draw(width, scale=0.1),
            draw(hidden, width, scale=width**-0.5), draw(hidden, scale=0.1),
            draw(width, hidden, scale=hidden**-0.5), draw(width, scale=0.1),
        )  # fmt: skip

    def stock(x: Tensor, nw: Tensor, nb: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = F.gelu(F.linear(F.layer_norm(x, nw.shape, nw, nb, EPS), w1, b1))
        return x + F.linear(h, w2, b2)

    def truth(x: Tensor, nw: Tensor, nb: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return reference.mlp(x, nw, nb, EPS, "layer", w1, b1, w2, b2)

    def products(x: Tensor, nw: Tensor, nb: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.linear(x, w1), w2)

    return op_case(
        "mlp", {"tokens": tokens, "width": width}, batch, mode, dtype, device, draw_inputs,
        images=(True,) + (False,) * 6, results=((batch, tokens, width),), truth=truth,
        ways={
            "eager": Way(lambda: stock),
            "vitfast": Way(lambda: partial(ops.mlp, norm_eps=EPS)),
            "product": Way(lambda: products, leaves=(0, 3, 5), part=True),
            "compiled": Way(lambda: compiled(stock)),
            "compiled max-autotune": Way(lambda: autotuned(stock, device)),
        },
        count=partial(work.mlp, batch * tokens, width, hidden, dtype),
    )  # fmt: skip
