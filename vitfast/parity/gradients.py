"""The same comparison for gradients: what each stage hands back, of one value and one cotangent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitfast.check.acceptance import FORMULA, stage_faults
from vitfast.parity.cases import Side, error_of, off, start_of
from vitfast.parity.chain import IMAGES, Chain
from vitfast.parity.comparison import Row

SEED = 0


def gradient_rows(a: Side, b: Side, stages: Sequence[str], images: Tensor, dtype: torch.dtype) -> tuple[Row, ...]:
    """For each stage the gradient of its input, in fp64 and in `dtype`; of weights the names differ, of inputs not.

    Raises:
        ValueError: one of the two cannot be run stage by stage.
    """
    if not a.chain.stages or not b.chain.stages or a.exact is None or b.exact is None:
        raise ValueError("compare: gradients=True takes models that can be run stage by stage in fp64")
    low, other = a.in_dtype(images, dtype), b.in_dtype(images, dtype)
    generator = torch.Generator().manual_seed(SEED)
    rows = []
    for stage in stages:
        start = start_of(a.chain, b.chain, stage, stages)
        x = images.double() if start == IMAGES else a.values[start]
        cotangent = torch.randn(a.values[stage].shape, generator=generator).to(x.device, dtype)
        span = start, stage
        exact, of_b = (_pulled_back(chain, span, x, cotangent.double()) for chain in (a.chain, b.chain))
        # a residual hands the cotangent on as it is
        base = cotangent.double() if stage.startswith("blocks.") and cotangent.shape == x.shape else None
        formula = off(of_b, exact, base)
        faults = [] if formula <= FORMULA else [f"another gradient: in fp64 it differs by {formula:.1e}"]
        rounded = x.to(dtype)
        ref = _pulled_back(a.chain, span, rounded.double(), cotangent.double())
        by_low, out = (_pulled_back(chain, span, rounded, cotangent) for chain in (low, other))
        own = None
        if ref is not None and by_low is not None and out is not None:
            own = error_of(out, ref, by_low)
            faults += [f"its own: {fault}" for fault in stage_faults(out, ref, by_low, few=True)[0]]
        rows.append(Row(stage, None, own, formula, tuple(faults)))
    return tuple(rows)


@torch.enable_grad()
def _pulled_back(chain: Chain, span: tuple[str, str], x: Tensor, cotangent: Tensor) -> Tensor | None:
    """The gradient of a stage's input; None where it cannot take it, or has another shape."""
    x = x.detach().requires_grad_()
    try:
        out = chain.span(*span, x)
        (gradient,) = torch.autograd.grad(out, x, cotangent, materialize_grads=True)
    except (RuntimeError, ValueError, IndexError):
        return None
    return gradient
