"""`compare`: two models stage by stage, in fp64 for their formulas and in their own dtype for their arithmetic.

How far off a stage may be is asked of `vitfast.check.acceptance`; what is computed here is shown only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitfast.check.acceptance import FORMULA, LUCK, RMS_RATIO, apart, stage_faults
from vitfast.inference.prepare import PreparedViT
from vitfast.parity.chain import IMAGES, Chain, Outside, clone_in
from vitfast.parity.comparison import Comparison, Error, Row
from vitfast.parity.stages import chain_like, exact_chain

DOUBLE = torch.float64


class Side(NamedTuple):
    """A model in fp64, and what it gives there.

    Attributes:
        model: the one that was handed in.
        exact: its clone in fp64; None where there can be none.
        chain: of that clone, or what can be read of an `Outside`.
        values: in fp64, by stage.
    """

    model: Any
    exact: nn.Module | None
    chain: Chain
    values: dict[str, Tensor]


class Segment(NamedTuple):
    """A stage, or a few that follow one another, run by both models from one value.

    Attributes:
        stage: what is computed; start: the stage whose value it is computed of.
        x: that value; a, b: what the models make of it; b may be why it cannot.
    """

    stage: str
    start: str
    x: Tensor
    a: Tensor
    b: Tensor | str


@torch.no_grad()
def compare(
    a: nn.Module | Outside, b: nn.Module | Outside, images: Tensor, *, dtype: torch.dtype | None = None,
    diagnose: bool = True,
) -> Comparison:  # fmt: skip
    """Two models on the same images: where they differ first, by how much, and why.

    Formulas are compared in fp64, with weights and images rounded to `dtype`: there a difference is plain. Arithmetic
    is compared in `dtype`: errors against `a` in fp64 stand next to those of `a` itself in `dtype`, its yardstick. Each
    stage is also run from `a`'s value before it, so that its own error is apart from what it inherited. The models
    stay as they are, and are compared in evaluation mode.

    Args:
        a, b: models of vitfast, timm, Hugging Face, torchvision or vit-pytorch; of other modules the values are read
            that enter and leave their blocks.
        images: [B, C, H, W], normalised pixels, on the device to compare on.
        dtype: torch.float32, torch.float16 or torch.bfloat16; by default that of `a`'s parameters, fp32 for fp64.
        diagnose: look for a substitution that makes them agree, where they do not.

    Raises:
        ValueError: another dtype, or models that have no stage in common.
        TypeError: no models, or no images.
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"compare: images must be normalised pixels [B, C, H, W] in a floating point dtype, got {got}")
    a, b = _model("a", a), _model("b", b)
    told = _preprocessing(a, b)
    dtype = _dtype(a, b, dtype)
    if isinstance(a, Outside) and isinstance(b, Outside):
        raise ValueError("compare: a or b must be a model that runs in fp64, got two that only have values")
    images = images.to(dtype)
    one, two = (_side(model, images, dtype) for model in (a, b))
    swapped = not one.chain.stages and bool(two.chain.stages)
    if swapped:
        one, two = two, one
    notes = [*one.chain.notes, *two.chain.notes]
    if swapped:
        notes.append(f"the yardstick is {two.chain.whose}'s: a cannot be run stage by stage".replace("two", "one"))
    stages = _in_common(one, two, notes)
    segments = _segments(one, two, stages, images.double())
    formula = {each.stage: _formula_error(each) for each in segments} if two.exact is not None else {}
    if two.exact is None:
        notes.append(f"{two.chain.whose} has no fp64: formulas are compared in {_name(dtype)} only")
    rows, typical = _rows(one, two, stages, formula, images, dtype)
    first = next((row.stage for row in rows if row.faults), None)
    names = one.chain.whose, two.chain.whose
    notes += _what_the_dtype_hides(rows, dtype)
    names = (names[1], names[0]) if swapped else names
    found = None
    if first is not None and diagnose:
        from vitfast.parity.diagnose import diagnosis

        found = diagnosis(one, two, segments, images, dtype, swapped)
    return Comparison(names[0], names[1], _name(dtype), tuple(rows), first, typical, told, tuple(notes), found)


def _model(name: str, model: Any) -> nn.Module | Outside:
    if isinstance(model, PreparedViT):
        # frozen in its dtype; its last block computes what is read alone
        read = lambda x: {**model.intermediates(x), "logits": model(x)}  # noqa: E731
        return Outside("vitfast.prepare's", read, model.dtype, model.pretrained_cfg or {})
    if not isinstance(model, (nn.Module, Outside)):
        raise TypeError(f"compare: {name} must be a model, got {type(model).__name__}")
    return model


def _dtype(a: Any, b: Any, dtype: torch.dtype | None) -> torch.dtype:
    outside = [model.dtype for model in (a, b) if isinstance(model, Outside)]
    own = (p.dtype for model in (a, b) if isinstance(model, nn.Module) for p in model.parameters())
    found = dtype or next(iter(outside), None) or next((p for p in own if p.is_floating_point), torch.float32)
    found = torch.float32 if found is DOUBLE and dtype is None else found
    if found not in RMS_RATIO:
        raise ValueError(f"compare: dtype must be one of {', '.join(map(str, RMS_RATIO))}, got {found}")
    for fixed in outside:
        if fixed is not found:
            raise ValueError(f"compare: dtype must be {fixed}, which one of the models has, got {found}")
    return found


def _side(model: Any, images: Tensor, dtype: torch.dtype) -> Side:
    if isinstance(model, Outside):
        return Side(model, None, Chain(model.whose, (), model.read), {})
    exact = clone_in(model, DOUBLE, images.device, dtype)
    chain, values = exact_chain(exact, images.double())
    return Side(model, exact, chain, values)


def _in_common(a: Side, b: Side, notes: list[str]) -> list[str]:
    """The stages that both have, in order; the outputs alone where they are made otherwise.

    Raises:
        ValueError: there are none.
    """
    if b.exact is None:
        return [stage.name for stage in a.chain.stages]
    blocks = [sum(name.endswith(".mlp") for name in side.values) for side in (a, b)]
    widths = [{v.shape[-1] for name, v in side.values.items() if name == "patch_tokens"} for side in (a, b)]
    why = ""
    if all(blocks) and blocks[0] != blocks[1]:
        why = f"a has {blocks[0]} blocks and b {blocks[1]}"
    elif all(widths) and widths[0] != widths[1]:
        why = f"a has tokens of {widths[0].pop()} channels and b of {widths[1].pop()}"
    stages = [name for name in a.values if name in b.values]
    if why:
        stages = [name for name in stages if name == "logits"]
        notes.append(f"{why}: only their outputs are compared")
    if not stages or (why and a.values["logits"].shape != b.values["logits"].shape):
        shapes = [f"{name} {list(v.shape)}" for side in (a, b) for name, v in [*side.values.items()][-1:]]
        raise ValueError(f"compare: a and b must have stages in common, got {why or ' and '.join(shapes)}")
    return stages


def _segments(a: Side, b: Side, stages: list[str], images: Tensor) -> list[Segment]:
    """What both make in fp64 of one value, for each stage; none where `a` cannot be run from its stages."""
    if not a.chain.stages or b.exact is None:
        return []
    found = []
    for stage in stages:
        start = _start(a.chain, b.chain, stage, stages)
        held = a.values if b.chain.stages else b.values
        x = images if start == IMAGES else held[start]
        whole = start == IMAGES and not b.chain.stages
        of_a = _span(a.chain, start, stage, x)
        of_b = _span(b.chain, start, stage, x) if b.chain.stages else b.values[stage]
        if whole and stage in a.values:
            of_a = a.values[stage]
        if isinstance(of_a, str):
            raise RuntimeError(f"compare: a {of_a}")
        found.append(Segment(stage, start, x, of_a, of_b))
    return found


def _start(a: Chain, b: Chain, stage: str, stages: list[str]) -> str:
    """The nearest stage before it whose value both can be given."""
    before = b.before(stage) if b.stages else [*stages, IMAGES]
    return next(name for name in a.before(stage) if name in before and (name in stages or name == IMAGES))


def _span(chain: Chain, start: str, stage: str, x: Tensor) -> Tensor | str:
    try:
        return chain.span(start, stage, x)
    except (RuntimeError, ValueError, IndexError) as error:
        return f"cannot take {start} {list(x.shape)}: {str(error).splitlines()[0]}"


def base_of(segment: Segment) -> Tensor | None:
    """What a block adds to, whose error is to be seen next to what it adds."""
    alike = segment.stage.startswith("blocks.") and segment.x.shape == segment.a.shape
    return segment.x if alike else None


def _formula_error(segment: Segment) -> float | str:
    """How far apart the two are in fp64, as a share of what the stage adds; why they can't be compared."""
    if isinstance(segment.b, str):
        return segment.b
    if segment.a.shape != segment.b.shape:
        return f"is {list(segment.b.shape)}, not {list(segment.a.shape)}"
    return distance(segment.b, segment.a, base_of(segment))


def distance(value: Tensor, exact: Tensor, base: Tensor | None = None) -> float:
    """`apart`, where both are finite; NaN where they are so in different places."""
    finite = exact.isfinite()
    if not torch.equal(finite, value.isfinite()):
        return float("nan")
    clean = lambda t: t if t is None else t.where(finite, 0.0)  # noqa: E731
    return apart(clean(value), clean(exact), clean(base))  # type: ignore[arg-type]  # tensors


def _rows(
    a: Side, b: Side, stages: list[str], formula: Mapping[str, float | str], images: Tensor, dtype: torch.dtype
) -> tuple[list[Row], float | None]:
    """What each stage is off by in `dtype`, inherited and of its own; and the typical row of all."""
    low, other = (_in_dtype(side, images, dtype) for side in (a, b))
    low_values, out_values = low.values(images), dict(other.values(images))
    exact, logs, rows = a.values, [], []
    for stage in stages:
        if stage not in out_values:
            continue
        faults: list[str] = []
        wrong = formula.get(stage, 0.0)
        if isinstance(wrong, str):
            faults.append(wrong)
        elif not wrong <= FORMULA:
            faults.append(f"another formula: fp64 differs by {wrong:.1e} of what it adds, more than {FORMULA:.1e}")
        out, ref = out_values[stage], exact[stage]
        inherited = own = None
        if out.shape == ref.shape:
            inherited = _error(out, ref, low_values[stage])
            found, row_logs = stage_faults(out, ref, low_values[stage])
            faults += [f"inherited: {fault}" for fault in found]
            logs += [] if row_logs is None else [row_logs]
        elif not faults:
            faults.append(f"is {list(out.shape)}, not {list(ref.shape)}")
        if a.chain.stages:
            own, found = _own(a.chain, low, other, stage, stages, out_values, exact, images, dtype)
            faults = found + faults
        told = wrong if stage in formula and isinstance(wrong, float) else None
        rows.append(Row(stage, inherited, own, told, tuple(faults)))
    typical = torch.cat(logs).mean().exp().item() if logs else None
    if typical is not None and not typical <= RMS_RATIO[dtype] and not any(row.faults for row in rows):
        worst = max(rows, key=lambda row: (row.own or row.inherited).units)  # type: ignore[union-attr]  # one is there
        fault = f"the typical row of all stages is {typical:.2f} yardsticks off, more than {RMS_RATIO[dtype]}"
        rows[rows.index(worst)] = worst._replace(faults=(fault,))
    return rows, typical


def _in_dtype(side: Side, images: Tensor, dtype: torch.dtype) -> Chain:
    if side.exact is None:
        return side.chain
    return chain_like(side.chain, clone_in(side.model, dtype, images.device, dtype), images)


def _own(
    exact: Chain, low: Chain, other: Chain, stage: str, stages: list[str], outs: Mapping[str, Tensor],
    refs: Mapping[str, Tensor], images: Tensor, dtype: torch.dtype,
) -> tuple[Error | None, list[str]]:  # fmt: skip
    """The error that this stage makes of a value which is exact in `dtype`, and what the rule has against it."""
    start = _start(exact, other, stage, [name for name in stages if name in outs])
    held = {**(refs if other.stages else outs), IMAGES: images}
    x = held[start].to(dtype)
    ref, by_low = _span(exact, start, stage, x.double()), _span(low, start, stage, x)
    out = _span(other, start, stage, x) if other.stages else outs[stage]
    if isinstance(ref, str) or isinstance(by_low, str) or isinstance(out, str) or out.shape != ref.shape:
        return None, []
    found, _ = stage_faults(out, ref, by_low)
    return _error(out, ref, by_low), [f"its own: {fault}" for fault in found]


def _error(out: Tensor, ref: Tensor, low: Tensor) -> Error:
    off = (out.double() - ref).abs()
    relative, yardstick = distance(out, ref), distance(low, ref)
    cosine = torch.cosine_similarity(out.double().flatten(), ref.flatten(), dim=0).item()
    units = relative / yardstick if yardstick else (0.0 if relative == 0 else float("inf"))
    return Error(off.max().item(), off.mean().item(), relative, cosine, units)


def _what_the_dtype_hides(rows: list[Row], dtype: torch.dtype) -> list[str]:
    """That a difference of formulas can be seen in fp64 only, where that is so."""
    seen = [row for row in rows if row.formula is not None and not row.formula <= FORMULA]
    hidden = [row for row in seen if row.own is not None and row.own.units <= RMS_RATIO[dtype]]
    if not hidden:
        return []
    worst = max(row.own.units for row in hidden)  # type: ignore[union-attr]  # there, by the line above
    return [
        f"{len(hidden)} of {len(seen)} stages with another formula can't be told by {_name(dtype)} (at most "
        f"{worst:.2f} yardsticks, where luck may make {LUCK[dtype]:g}): fp64 tells them"
    ]


def _preprocessing(a: Any, b: Any) -> tuple[str, ...]:
    """In what the preparation of images differs, by timm's entries of both; nothing where one has none."""
    first, second = (getattr(model, "pretrained_cfg", None) or {} for model in (a, b))
    first, second = (cfg.to_dict() if hasattr(cfg, "to_dict") else dict(cfg) for cfg in (first, second))
    found = []
    for name in ("mean", "std", "input_size", "interpolation", "crop_pct"):
        values = [tuple(v) if isinstance(v := cfg.get(name), list) else v for cfg in (first, second)]
        if None not in values and values[0] != values[1]:
            found.append(f"{name}: a has {values[0]}, b has {values[1]}")
    return tuple(found)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
