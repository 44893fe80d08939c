"""`vitfast.explain`: which part of a model runs as which op, and where not, why."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from vitfast.choose import dispatch, exportable
from vitfast.kernels import cpu as cpu_kernels
from vitfast.model.vit import ViT
from vitfast.ops import _on_cpu
from vitfast.ops._register import implementations
from vitfast.patching import stem
from vitfast.patching.engine import NOTES_ON_CPU
from vitfast.patching.report import report_of


class Row(NamedTuple):
    """One part of the model: what runs it, and why nothing better does."""

    part: str
    path: str
    reason: str


class Explanation:
    """What `explain` found; `str()` is a table."""

    def __init__(self, rows: list[Row], notes: list[str]):
        self.rows = rows
        self.notes = notes

    @property
    def all_fused(self) -> bool:
        return all(row.path.startswith("op") for row in self.rows)

    def __str__(self) -> str:
        rows = [Row("part", "runs as", "because"), *self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{row.part:<{widths[0]}}  {row.path:<{widths[1]}}  {row.reason}".rstrip() for row in rows]
        return "\n".join([*lines, *self.notes])

    __repr__ = __str__


def explain(model: nn.Module) -> Explanation:
    """Which part of the model runs as which op at the next call, and where not, why.

    Args:
        model: a `vitfast.ViT`, a model that `vitfast.patch` was called on, or a module that contains such.

    Returns:
        An `Explanation`: `str()` prints a table, `.rows` has (part, path, reason).

    Raises:
        TypeError: there is neither inside.
    """
    vits = [(name, m) for name, m in model.named_modules() if isinstance(m, ViT)]
    rows = _patched_rows(model)
    of_libraries, stems = bool(rows), any(row.path == "op patch_embed" for row in rows)
    if not vits and not rows:
        raise TypeError(
            "explain: model must be or contain a vitfast.ViT, or one that vitfast.patch was called on, "
            f"got {type(model).__name__}"
        )
    for prefix, vit in vits:
        for part, op_name, reasons in vit.fusion_report():
            name = f"{prefix}.{part}" if prefix else part
            if exportable.stock_only() or vit.exportable:
                why = "its exportable is True" if vit.exportable else "set_exportable(True) is on"
                rows.append(Row(name, "stock operators", why))
            elif reasons:
                rows.append(Row(name, "its modules' own forward", "; ".join(reasons)))
            else:
                rows.append(Row(name, f"op {op_name}", ""))
    device = next((vits[0][1] if vits else model).parameters()).device
    without: dict[tuple[str, str], list[str]] = {}
    for op, devices in implementations().items():
        here = devices.get(device.type)
        if here is not None and here.kernel is None:
            without.setdefault((here.path, here.why_no_kernel), []).append(op)
    notes = [f"on {device.type}, {path} ({why}): {', '.join(found)}" for (path, why), found in without.items()]
    for _, vit in vits:
        # of a prepared one
        report = getattr(vit, "graph_report", lambda: None)()
        notes += [] if report is None else str(report).splitlines()
    if device.type == "cpu":
        notes += (
            [stem.ON_CPU] * stems
            + [*NOTES_ON_CPU] * of_libraries
            + _on_cpu.notes()
            + [f"measured on this CPU: {line}" for line in cpu_kernels.measured()]
        )
    return Explanation(rows, notes + (_built_in(rows, device) if device.type == "cuda" else []))


def _patched_rows(model: nn.Module) -> list[Row]:
    """Of blocks that are patched, and of what was left in a model that has some."""
    if not any("_vitfast" in module.__dict__ for module in model.modules()):
        return []
    report = report_of(model, vits=False)
    stock = "set_exportable(True) is on" if exportable.stock_only() else ""
    rows = []
    for part in (*report.fused, *report.left):
        runs = f"op {part.op}" if part.op and not stock else "its modules' own forward"
        rows.append(Row(part.name, runs, stock or part.reason))
    return rows


def _built_in(rows: list[Row], device: torch.device) -> list[str]:
    """What was measured, on cards like this one, of each kernel that may run a part."""
    ops = {op for row in rows for op in row.path.removeprefix("op ").split(", ")}
    # another form of blocks that are made of this op
    ops |= {"prepared_block"} if "added_linear" in ops else set()
    return [
        f"built in, {name}: {words}"
        for name in dispatch.KERNELS
        if name.removesuffix("_backward") in ops
        for words in dispatch.facts(name, device.index or 0)["builtin"].values()
    ]
