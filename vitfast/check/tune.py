"""`vitfast tune`: time kernels against stock operators on this card, for some models' shapes, and keep who won."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.check.calls import NAMES, SEED, Call, Prepared
from vitfast.check.case import Case, Variant
from vitfast.check.compare import NO_TIME_LEFT, compare
from vitfast.check.families import FAMILIES, Family
from vitfast.check.measuring import BUILT_IN, STOCK, Row, keep, verdict
from vitfast.check.warmup import batches_of, check_dtype, description, kernel_calls, models_in
from vitfast.choose import dispatch
from vitfast.choose.tuning_cache import Choice
from vitfast.config import ViTConfig
from vitfast.measure import device as devices
from vitfast.measure.device import Place
from vitfast.ops import _launch

# how long to time one call, and the least of that where the budget is short
SECONDS, LEAST_S = 2.0, 0.1
BUDGET_S = 300.0
# the truth of more would take more time than all the rest
CHECK_IMAGES = 2
# a kernel that is not made for a call, or had no memory or time, was neither slower nor wrong
UNDECIDED = ("NotImplementedError", "out of memory", NO_TIME_LEFT)


@dataclass
class Report:
    """A row for each shape; prints as a table. `path` is the file they are kept in, None where it was not written."""

    rows: list[Row] = field(default_factory=list)
    path: Path | None = None

    def __str__(self) -> str:
        lines = ["| call | stock ms | kernel ms | use | configuration | |", "|---" * 6 + "|"]
        for row in self.rows:
            times = ["" if ms is None else f"{ms:.4g}" for ms in (row.stock_ms, row.kernel_ms)]
            notes = "; ".join([row.why, *(f"wrong and not timed: {each}" for each in row.wrong)])
            cells = [row.call, *times, row.use or "as before", words(row.config), notes]
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
        return "\n".join(lines)


def tune(
    models: nn.Module | ViTConfig | Iterable[nn.Module | ViTConfig],
    batch: int | Iterable[int] = (1,),
    dtype: torch.dtype = torch.bfloat16,
    training: bool = False,
    *,
    device: torch.device | str = "cuda",
    prepared: bool = False,
    budget_s: float = BUDGET_S,
    progress: bool = True,
) -> Report:
    """Time every configuration of every kernel that these models may run against stock operators; keep the fastest.

    What is wrong by `vitfast.check.acceptance` is not timed, and a kernel that is not faster than stock beyond the
    noise loses. What won holds at once, and for every later process with the same card, driver, versions and
    kernels: see `vitfast.choose.tuning_cache`. Nothing else should use the card meanwhile. Forgets what torch.compile
    compiled.

    Args:
        models: `ViTConfig`s, or modules that are or contain a `vitfast.ViT`, also one that `vitfast.prepare` made.
        batch: numbers of images.
        dtype: float32, bfloat16 or float16; prepared models are measured in their own.
        training: also the backward, which prepared models do not have.
        device: a CUDA device.
        prepared: also what `vitfast.prepare` makes of these models in this dtype.
        budget_s: for all; what does not fit is left as it was.
        progress: print a line for each shape on stderr.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came.
        NotImplementedError: no kernel can run here; says why.
        vitfast.check.compare.DeviceLost: a kernel broke the device; what was finished before is kept.
    """
    batches = batches_of("tune", batch)
    check_dtype("tune", dtype)
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"tune: device must be a CUDA device, got {device}: kernels for CPUs have nothing to tune")
    if why := dispatch.why_no_kernels():
        raise NotImplementedError(f"tune: no kernel can run here: {why}")
    described = _described(models, device)
    if prepared:
        described += [Prepared(each, dtype, device) for each in described if isinstance(each, ViTConfig)]
    calls = kernel_calls(described, batches, dtype, training)
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if progress else lambda text: None
    return tune_calls(calls, devices.of(device), budget_s, say)


def _described(models: Any, device: torch.device) -> list[ViTConfig | Prepared]:
    if isinstance(models, (nn.Module, ViTConfig)):
        models = [models]
    found: list[ViTConfig | Prepared] = []
    for model in models:
        alone = isinstance(model, ViTConfig)
        found += [model] if alone else [description(vit, device) for vit in models_in("tune", model)]
    return found


def tune_calls(calls: Sequence[Call], place: Place, budget_s: float, say: Callable[[str], None]) -> Report:
    """`tune` for calls that are known."""
    report, done, began = Report(), set(), place.clock()
    for i, call in enumerate(calls):
        family, left = FAMILIES[call.op], budget_s - (place.clock() - began)
        if left < LEAST_S:
            report.rows.append(Row(family.kernel, str(call), "", why=NO_TIME_LEFT))
            continue
        asked, by_image = _asked(family, call, place)
        if asked is None:
            why = _launch.why_no_triton() or "the op does not choose here"
            report.rows.append(Row(family.kernel, str(call), "", why=why))
            continue
        name = asked.kernel, asked.shape
        if name in done:
            continue
        known = dispatch.built_in(*name, asked.device)
        configs = list(family.configs(call, place.device))
        if known.kernel and known.config is not None and known.config not in configs:
            configs.append(known.config)
        seconds = max(LEAST_S, min(SECONDS, left / (len(calls) - i)))
        stock = None if known.kernel else known.config
        row = _tune_one(family, call, configs, stock, by_image, place, left, seconds)
        report.rows.append(row)
        if row.use:
            done.add(name)
            choice = Choice(row.use == "kernel", row.config, row.kernel_ms, row.stock_ms, row.stock)
            report.path = keep(asked.device, {name: choice}, "tune", stacklevel=4) or report.path
        left = budget_s - (place.clock() - began)
        say(f"tune {i + 1}/{len(calls)}, {max(left, 0):.0f} s left: {call}: {row.use or 'as before'}, {row.why}")
    return report


def _asked(family: Family, call: Call, place: Place) -> tuple[dispatch.Seen | None, tuple[bool, ...]]:
    """What the op asks `dispatch` for this call, None where it does not ask; and which results come by image."""
    generator = torch.Generator(place.device).manual_seed(SEED)
    with place.current(), dispatch.watching() as seen:
        results = family.stock(family.draw(call, generator))
        place.synchronize()
    asked = [each for each in seen if each.kernel == family.kernel]
    return (asked[-1] if asked else None), family.by_image(results)


def _tune_one(
    family: Family, call: Call, listed: Sequence[dispatch.Config | None], stock: dispatch.Config | None,
    by_image: tuple[bool, ...], place: Place, left: float, seconds: float,
) -> Row:  # fmt: skip
    configs = {words(config) or BUILT_IN: config for config in listed}
    rivals = {f"{STOCK} {words(each)}": each for each in family.rivals if each != (stock or family.rivals[0])}
    case = _case(family, call, by_image, configs, {STOCK: stock, **rivals}, place)
    row = compare(case, seconds=seconds, place=place, deadline=place.clock() + left)
    return _decided(family.kernel, call, row["variants"], configs, rivals)


def _case(
    family: Family, call: Call, by_image: tuple[bool, ...], configs: Mapping[str, dispatch.Config | None],
    stock: dispatch.Config | None, place: Place,
) -> Case:  # fmt: skip
    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(arg for arg in family.draw(call, generator) if isinstance(arg, Tensor))

    def way(run: Callable[[Sequence[Any]], tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *tensors: family.measurable(run(call.fill(tensors)))

    def operators(config: dispatch.Config | None) -> Variant:
        return Variant(lambda: way(lambda args: family.stock(args, config)))

    def kernel(config: dispatch.Config | None) -> Variant:
        return Variant(lambda: way(lambda args: family.with_config(args, config)), ours=True)

    first = call.likes()[0].shape
    return Case(
        kind="op", name=call.op, mode="forward+backward" if family.grad else "forward",
        shape={f"dim {i}": n for i, n in enumerate(first[1:], 1)}, batch=first[0], dtype=NAMES[call.dtype],
        device=place.device, inputs=inputs, reference=way(family.true),
        cut=lambda tensors, n: family.cut(call, tensors, n), per_image=by_image,
        variants={
            **{name: operators(config) for name, config in stock.items()},
            **{name: kernel(each) for name, each in configs.items()},
        },
        baseline=STOCK, yardstick=STOCK, check_images=CHECK_IMAGES,
    )  # fmt: skip


def _decided(
    kernel: str, call: Call, variants: Mapping[str, Any], configs: Mapping[str, dispatch.Config | None],
    rivals: Mapping[str, dispatch.Config],
) -> Row:  # fmt: skip
    stock, wrong = variants[STOCK], tuple(name for name in configs if variants[name].get("accepted") is False)
    if "ms" not in stock or not stock["accepted"]:
        why = stock.get("not_timed") or stock.get("why_not_accepted")
        return Row(kernel, str(call), "", why=f"stock operators are no measure: {why}")
    faster = [name for name in rivals if variants[name].get("accepted") and _beyond_noise(variants[name])]
    rival = min(faster, key=lambda name: variants[name]["ms"], default=None)
    chosen = {"stock_ms": stock["ms"], "wrong": wrong}
    if rival is not None:
        chosen |= {"stock_ms": variants[rival]["ms"], "stock": rivals[rival]}
    timed = [name for name in configs if "ms" in variants[name]]
    if timed:
        best = min(timed, key=lambda name: variants[name]["ms"])
        found = variants[best]
        use, why = verdict(found["ratio"], found["within_noise"])
        if rival is not None and use == "kernel":
            against, clear = variants[rival], found["ratio_25"] > variants[rival]["ratio_75"]
            use, why = verdict(against["ms"] / found["ms"], not clear)
        return Row(kernel, str(call), use, kernel_ms=found["ms"], config=configs[best], why=why, **chosen)
    reasons = [variants[name].get("not_timed", "not timed") for name in configs]
    open_yet = any(reason.startswith(UNDECIDED) for reason in reasons)
    why = reasons[0] if reasons else "the kernel has no configuration for it"
    return Row(kernel, str(call), "" if open_yet or not reasons else "stock", why=why, **chosen)


def _beyond_noise(found: Mapping[str, Any]) -> bool:
    """Whether it was timed, and faster than the baseline."""
    return "ms" in found and verdict(found["ratio"], found["within_noise"])[0] == "kernel"


def words(config: dispatch.Config | None) -> str:
    """A configuration in a table."""
    return "" if config is None else " ".join(f"{name}={value}" for name, value in config.items())
