"""The values that two models are run on, from one stage to another, and how far apart they may come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitfast.check.acceptance import FORMULA, FORMULA_OF_FP32, LUCK, apart
from vitfast.parity.chain import IMAGES, Chain, clone_in
from vitfast.parity.comparison import Error
from vitfast.parity.stages import chain_like, off_grid

DOUBLE = torch.float64


class Side(NamedTuple):
    """A model in fp64, and what it gives there.

    Attributes:
        model: the one that was handed in.
        exact: its clone in fp64; None where there can be none.
        chain: of that clone, or what can be read of an `Outside`.
        values: in fp64, by stage; of an `Outside` in its dtype.
    """

    model: Any
    exact: nn.Module | None
    chain: Chain
    values: dict[str, Tensor]

    def in_dtype(self, images: Tensor, dtype: torch.dtype) -> Chain:
        if self.exact is None:
            return self.chain
        return chain_like(self.chain, clone_in(self.model, dtype, images.device, dtype), images)


class Case(NamedTuple):
    """A stage, or a few that follow one another, run by both models from one value.

    Attributes:
        stage: what is computed; start: the stage whose value it is computed of.
        x: that value, in fp64; a, b: what the models make of it; None where one cannot take it.
        why: why `b` cannot.
        bound: how far apart the two may be, see `off`; own_bound: how far a model may be from itself.
        rounding: whether `b` was computed in a dtype, and fp64 would agree.
    """

    stage: str
    start: str
    x: Tensor
    a: Tensor | None
    b: Tensor | None
    why: str = ""
    bound: float = FORMULA
    own_bound: float = FORMULA
    rounding: bool = False

    @property
    def base(self) -> Tensor | None:
        """What a block adds to, whose error is to be seen next to what it adds."""
        alike = self.stage.startswith("blocks.") and self.a is not None and self.x.shape == self.a.shape
        return self.x if alike else None


def off(value: Tensor | None, exact: Tensor | None, base: Tensor | None = None) -> float:
    """`apart`, where both are finite; infinite where there is none or of another shape, NaN where they are finite in
    different places.
    """
    if value is None or exact is None or value.shape != exact.shape:
        return float("inf")
    finite = exact.isfinite()
    if not torch.equal(finite, value.isfinite()):
        return float("nan")
    if finite.all():
        return apart(value, exact, base)
    clean = lambda t: None if t is None else t.where(finite, 0.0)  # noqa: E731
    return apart(clean(value), clean(exact), clean(base))  # type: ignore[arg-type]  # tensors


def cases_of(a: Side, b: Side, images: Tensor, dtype: torch.dtype) -> list[Case]:
    """What both make of one value, for each stage that they have in common.

    In fp64 where both have it: from `a`'s value before the stage where `b` can be run from there, else from `b`'s own.
    The values of an `Outside` are in its dtype, and held to what `a` itself is off by there.
    """
    if not a.chain.stages:
        # two models that can be read only: whole runs, in fp64 where both have it
        both = [] if a.exact is None or b.exact is None else in_common(a, b)[0]
        return [Case(stage, IMAGES, images.double(), a.values[stage], b.values[stage]) for stage in both]
    if b.exact is None:
        return _outside(a, b, images, dtype)
    off_the_grid = any(off_grid(side.exact, images) for side in (a, b))
    stages = in_common(a, b)[0]
    found = []
    for stage in stages:
        start = start_of(a.chain, b.chain, stage, stages)
        held = a.values if b.chain.stages else b.values
        x = images.double() if start == IMAGES else held[start]
        of_a, why_a = span(a.chain, start, stage, x)
        of_b, why = span(b.chain, start, stage, x) if b.chain.stages else (b.values[stage], "")
        if why_a:
            raise RuntimeError(f"compare: a {why_a}")
        # libraries interpolate positions in fp32, or not
        bound = FORMULA_OF_FP32 if off_the_grid and start in (IMAGES, "patches") else FORMULA
        found.append(Case(stage, start, x, of_a, of_b, why, bound, bound))
    return found


def _outside(a: Side, b: Side, images: Tensor, dtype: torch.dtype) -> list[Case]:
    low = a.in_dtype(images, dtype)
    values, found = b.values, []
    stages = [stage.name for stage in a.chain.stages if stage.name in values]
    for stage in stages:
        start = start_of(a.chain, b.chain, stage, stages)
        x = images if start == IMAGES else values[start]
        exact, by_low = span(a.chain, start, stage, x.double())[0], span(low, start, stage, x)[0]
        case = Case(stage, start, x.double(), exact, values[stage].double())
        found.append(case._replace(bound=LUCK[dtype] * off(by_low, exact, case.base)))
    return found


def cases_in_dtype(a: Side, b: Side, images: Tensor, dtype: torch.dtype) -> list[Case]:
    """As `cases_of`, where `b` computes in `dtype`, of values that are exact there."""
    low, other = (side.in_dtype(images, dtype) for side in (a, b))
    stages, found = in_common(a, b)[0], []
    values = {} if other.stages else dict(other.values(images))
    for stage in stages:
        start = start_of(a.chain, b.chain, stage, stages)
        x = (images if start == IMAGES else (a.values if other.stages else values)[start]).to(dtype)
        exact, by_low = span(a.chain, start, stage, x.double())[0], span(low, start, stage, x)[0]
        of_b = span(other, start, stage, x)[0] if other.stages else values[stage]
        case = Case(stage, start, x.double(), exact, None if of_b is None else of_b.double())
        bound = LUCK[dtype] * off(by_low, exact, case.base)
        found.append(case._replace(bound=bound, rounding=True))
    return found


def in_common(a: Side, b: Side) -> tuple[list[str], str]:
    """The stages that both have, in order, and why these are the outputs alone where they are.

    Raises:
        ValueError: there are none.
    """
    if b.exact is None:
        return [stage.name for stage in a.chain.stages if stage.name in b.values], ""
    blocks = [sum(name.endswith(".mlp") for name in side.values) for side in (a, b)]
    widths = [{v.shape[-1] for name, v in side.values.items() if name == "patch_tokens"} for side in (a, b)]
    why = ""
    if all(blocks) and blocks[0] != blocks[1]:
        why = f"a has {blocks[0]} blocks and b {blocks[1]}"
    elif all(widths) and widths[0] != widths[1]:
        why = f"a has tokens of {widths[0].pop()} channels and b of {widths[1].pop()}"
    stages = [name for name in a.values if name in b.values]
    stages = [name for name in stages if name == "logits"] if why else stages
    if not stages or (why and a.values["logits"].shape != b.values["logits"].shape):
        shapes = [f"{name} {list(v.shape)}" for side in (a, b) for name, v in [*side.values.items()][-1:]]
        raise ValueError(f"compare: a and b must have stages in common, got {why or ' and '.join(shapes)}")
    return stages, why


def start_of(a: Chain, b: Chain, stage: str, stages: Sequence[str]) -> str:
    """The nearest stage before it whose value both can be given."""
    before = b.before(stage) if b.stages else [*stages, IMAGES]
    return next(name for name in a.before(stage) if name in before and (name in stages or name == IMAGES))


def span(chain: Chain, start: str, stage: str, x: Tensor) -> tuple[Tensor | None, str]:
    """What a model makes of a value, or why it cannot."""
    try:
        return chain.span(start, stage, x), ""
    except (RuntimeError, ValueError, IndexError) as error:
        return None, f"cannot take {start} {list(x.shape)}: {str(error).splitlines()[0]}"


def error_of(out: Tensor, ref: Tensor, low: Tensor) -> Error:
    """How far `out` is from fp64, and `low`, the yardstick, for what it is in units of that."""
    error = (out.double() - ref).abs()
    relative, yardstick = off(out, ref), off(low, ref)
    cosine = torch.cosine_similarity(out.double().flatten(), ref.flatten(), dim=0).item()
    units = relative / yardstick if yardstick else (0.0 if relative == 0 else float("inf"))
    return Error(error.max().item(), error.mean().item(), relative, cosine, units)
