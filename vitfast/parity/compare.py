"""`compare`: two models stage by stage, in fp64 for their formulas and in their own dtype for their arithmetic.

How far off a stage may be is asked of `vitfast.check.acceptance`; what is computed here is shown only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.check.acceptance import LUCK, RMS_RATIO, stage_faults
from vitfast.inference.prepare import PreparedViT
from vitfast.parity.cases import DOUBLE, Case, Side, cases_of, error_of, in_common, off, span, start_of
from vitfast.parity.chain import IMAGES, Chain, Outside, clone_in
from vitfast.parity.comparison import Comparison, Error, Row
from vitfast.parity.diagnosis import diagnosis
from vitfast.parity.gradients import gradient_rows
from vitfast.parity.stages import exact_chain, hooked


@torch.no_grad()
def compare(
    a: nn.Module | Outside, b: nn.Module | Outside, images: Tensor, *, dtype: torch.dtype | None = None,
    diagnose: bool = True, gradients: bool = False,
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
        gradients: compare what each stage hands back too: the gradient of its input for a random cotangent.

    Raises:
        ValueError: another dtype, or models that have no stage in common.
        TypeError: no models, or no images.
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point() or not images.numel():
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"compare: images must be normalised pixels [B, C, H, W] in a floating point dtype, got {got}")
    a, b = _model("a", a), _model("b", b)
    told = _preprocessing(a, b)
    dtype = _dtype(a, b, dtype)
    images = images.to(dtype)
    sides, labels = [_side(model, images, dtype) for model in (a, b)], ("a", "b")
    if all(side.exact is None for side in sides):
        raise ValueError("compare: a or b must be a model that runs in fp64, got two of which only values can be read")
    notes = [note for side in sides for note in side.chain.notes]
    if (not sides[0].chain.stages and sides[1].chain.stages) or sides[0].exact is None:
        sides.reverse()
        labels = ("b", "a")
        notes.append(
            "a can't be run stage by stage, so b's rounding is the yardstick, and errors are against b in fp64"
        )
    one, two = sides
    stages, why = in_common(one, two)
    notes += [f"{why}: only their outputs are compared"] if why else []
    notes += [f"{two.chain.whose} has no fp64: it is compared in {_name(dtype)} only"] if two.exact is None else []
    cases = {} if two.exact is None else {case.stage: case for case in cases_of(one, two, images, dtype)}
    rows, typical = _rows(one, two, stages, cases, images, dtype)
    back = gradient_rows(one, two, stages, images, dtype) if gradients else ()
    first = next((row.stage for row in (*rows, *back) if row.faults), None)
    wrong = any(row.faults for row in rows)
    found = diagnosis(one, two, images, dtype, labels) if wrong and diagnose and not why else None
    whose = dict(zip(labels, (one.chain.whose, two.chain.whose), strict=True))
    notes += _what_the_dtype_hides(rows, cases, dtype)
    return Comparison(
        whose["a"],
        whose["b"],
        _name(dtype),
        rows,
        first,
        typical,
        told,
        tuple(dict.fromkeys(notes)),
        found,
        back,
    )


def worst_by_kind(rows: Iterable[Row]) -> list[Row]:
    """One row for all blocks' attention and one for all blocks' MLPs: the one that is most yardsticks off."""
    worst: dict[str, Row] = {}
    for row in rows:
        kind = re.sub(r"^blocks\.\d+\.", "blocks.*.", row.stage)
        if kind not in worst or _used(row) > _used(worst[kind]):
            worst[kind] = row
    return list(worst.values())


def _used(row: Row) -> float:
    error = row.inherited or row.own
    # NaN is the worst
    return float("inf") if error is None or error.units != error.units else error.units


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
        return Side(model, None, Chain(model.whose, (), model.read), dict(model.read(images)))
    exact = clone_in(model, DOUBLE, images.device, dtype)
    try:
        chain, values = exact_chain(exact, images.double())
    except AssertionError as error:
        # as some libraries say it
        raise ValueError(f"compare: {type(model).__name__} can't take images {list(images.shape)}: {error}") from error
    except (RuntimeError, TypeError, NotImplementedError) as error:
        # images that it can't take fail here as well
        why = f"can't be run in fp64 ({str(error).splitlines()[0]})"
        low = hooked(clone_in(model, dtype, images.device, dtype), why)
        return Side(model, None, low, dict(low.read(images)))
    return Side(model, exact, chain, values)


def _rows(
    a: Side, b: Side, stages: list[str], cases: Mapping[str, Case], images: Tensor, dtype: torch.dtype
) -> tuple[tuple[Row, ...], float | None]:
    """What each stage is off by in `dtype`, inherited and of its own; and the typical row of all."""
    low, other = (side.in_dtype(images, dtype) for side in (a, b))
    lows, outs = low.values(images), dict(other.values(images)) if b.exact is not None else b.values
    logs, rows = [], []
    for stage in stages:
        out, ref, case = outs[stage], a.values.get(stage), cases.get(stage)
        own, alone = _own(a, low, other, stage, stages, outs, images, dtype) if a.chain.stages else (None, [])
        faults = [*([] if case is None else _formula_faults(case)), *alone]
        inherited = None
        if ref is not None and out.shape == ref.shape:
            inherited = error_of(out, ref, lows[stage])
            found, row_logs = stage_faults(out, ref, lows[stage], few=True)
            faults += [f"inherited: {fault}" for fault in found]
            if ref.numel() and not ref.isfinite().any():
                faults.append("nothing is compared: all of it is NaN or Inf in both")
            logs += [] if row_logs is None else [row_logs]
        elif not faults:
            faults.append(f"is {list(out.shape)}, not {None if ref is None else list(ref.shape)}")
        formula = None if case is None or case.b is None else off(case.b, case.a, case.base)
        rows.append(Row(stage, inherited, own, formula, tuple(faults)))
    typical = torch.cat(logs).mean().exp().item() if logs else None
    if typical is not None and not typical <= RMS_RATIO[dtype] and not any(row.faults for row in rows):
        worst = max(range(len(rows)), key=lambda i: (rows[i].own or rows[i].inherited).units)  # type: ignore[union-attr]
        fault = f"the typical row of all stages is {typical:.2f} yardsticks off, more than {RMS_RATIO[dtype]}"
        rows[worst] = rows[worst]._replace(faults=(fault,))
    return tuple(rows), typical


def _formula_faults(case: Case) -> list[str]:
    """What is against the formula of a stage, by what both make of one value in fp64."""
    if case.a is None or case.b is None:
        return [case.why]
    if case.a.shape != case.b.shape:
        return [f"is {list(case.b.shape)}, not {list(case.a.shape)}"]
    apart = off(case.b, case.a, case.base)
    if apart <= case.bound:
        return []
    if apart != apart:
        return ["has NaN or Inf where the other has none"]
    return [f"another formula: in fp64 it differs by {apart:.1e} of what it adds, more than {case.bound:.1e}"]


def _own(
    a: Side, low: Chain, other: Chain, stage: str, stages: list[str], outs: Mapping[str, Tensor], images: Tensor,
    dtype: torch.dtype,
) -> tuple[Error | None, list[str]]:  # fmt: skip
    """The error that this stage makes of a value which is exact in `dtype`, and what the rule has against it."""
    start = start_of(a.chain, other, stage, stages)
    x = (images if start == IMAGES else (a.values if other.stages else outs)[start]).to(dtype)
    ref, by_low = span(a.chain, start, stage, x.double())[0], span(low, start, stage, x)[0]
    out = span(other, start, stage, x)[0] if other.stages else outs[stage]
    if ref is None or by_low is None or out is None or out.shape != ref.shape:
        return None, []
    found, _ = stage_faults(out, ref, by_low, few=True)
    return error_of(out, ref, by_low), [f"its own: {fault}" for fault in found]


def _what_the_dtype_hides(rows: tuple[Row, ...], cases: Mapping[str, Case], dtype: torch.dtype) -> list[str]:
    """That a difference of formulas can be seen in fp64 only, where that is so."""
    seen = [row for row in rows if row.formula is not None and not row.formula <= cases[row.stage].bound]
    units = [row.own.units for row in seen if row.own is not None and row.own.units <= LUCK[dtype]]
    if not units:
        return []
    return [
        f"{len(units)} of {len(seen)} stages with another formula could pass in {_name(dtype)}, at up to "
        f"{max(units):.2f} yardsticks: it is fp64 that tells"
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
