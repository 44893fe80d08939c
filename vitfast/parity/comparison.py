"""What `compare` found: a table, and the same as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from vitfast.parity.findings import Diagnosis


class Error(NamedTuple):
    """How far a stage is from fp64.

    Attributes:
        max, mean: of the absolute error.
        relative: rms of the error over that of the value.
        cosine: between the two.
        units: `relative` over that of the yardstick, the first model in the same dtype.
    """

    max: float
    mean: float
    relative: float
    cosine: float
    units: float


class Row(NamedTuple):
    """One stage.

    Attributes:
        stage: the name that `ViT.intermediates` gives it, or 'patches'.
        inherited: error of the second model in the dtype, all stages before it included.
        own: the same of this stage alone, which both models ran from the first one's value before it; None where that
            cannot be.
        formula: how far the two are apart in fp64, this stage alone, as a share of what it adds; None without fp64.
        faults: what the rule has against it; empty where it passed.
    """

    stage: str
    inherited: Error | None
    own: Error | None
    formula: float | None
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.faults


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    a, b: the classes of the two models.
    dtype: 'fp32', 'fp16' or 'bf16'.
    stages: one row a stage, in order.
    first: the first stage that the rule does not accept; None where there is none.
    typical: error of the typical row of all stages, in yardsticks.
    preprocessing: in what the preparation of images differs.
    notes: what could not be compared, and how it was compared instead.
    diagnosis: which substitutions make the two agree; None where they agree, or nobody looked.
    gradients: one row a stage, of the gradient of its input; empty where nobody asked.
    """

    a: str
    b: str
    dtype: str
    stages: tuple[Row, ...]
    first: str | None
    typical: float | None
    preprocessing: tuple[str, ...]
    notes: tuple[str, ...]
    diagnosis: Diagnosis | None
    gradients: tuple[Row, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the rule accepts every stage."""
        return self.first is None

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON, in which numbers that are not finite are text."""
        return {
            "ok": self.ok,
            "a": self.a,
            "b": self.b,
            "dtype": self.dtype,
            "first": self.first,
            "typical_yardsticks": _plain(self.typical),
            "preprocessing": list(self.preprocessing),
            "notes": list(self.notes),
            "stages": [_row(row) for row in self.stages],
            "gradients": [_row(row) for row in self.gradients],
            "diagnosis": None if self.diagnosis is None else _plain(self.diagnosis.to_dict()),
        }

    def __str__(self) -> str:
        lines = [f"a: {self.a}", f"b: {self.b}"]
        lines += [f"images are prepared otherwise: {each}" for each in self.preprocessing]
        lines += [f"note: {note}" for note in self.notes]
        width = max(len(row.stage) for row in self.stages)
        lines += [
            f"{self.dtype}, against a in fp64; yardstick: a in {self.dtype}",
            f"{'':{width}}  {'inherited':^48}  {'its own':^25}  {'fp64':>8}",
            f"{'stage':{width}}  {'max':>8} {'mean':>8} {'relative':>8} {'cosine':>10} {'yardsticks':>10}  "
            f"{'max':>8} {'relative':>8} {'yardst.':>7}  {'relative':>8}",
        ]
        for row in self.stages:
            e, own = row.inherited, row.own
            inherited = f"{'-':>48}"
            if e is not None:
                inherited = f"{e.max:8.1e} {e.mean:8.1e} {e.relative:8.1e} {e.cosine:10.7f} {_short(e.units):>10}"
            alone = f"{'-':>25}"
            if own is not None:
                alone = f"{own.max:8.1e} {own.relative:8.1e} {_short(own.units):>7}"
            formula = f"{'-':>8}" if row.formula is None else f"{row.formula:8.1e}"
            mark = "" if row.passed else "  first" if row.stage == self.first else "  not accepted"
            lines.append(f"{row.stage:{width}}  {inherited}  {alone}  {formula}{mark}")
        for row in self.gradients:
            told = "-" if row.own is None else f"{row.own.relative:8.1e} {_short(row.own.units):>7}"
            mark = "" if row.passed else f"  {row.faults[0]}"
            lines.append(f"{row.stage:{width}}  gradient of its input: {told}  {row.formula or 0.0:8.1e}{mark}")
        if self.ok:
            return "\n".join([*lines, f"parity: every stage is accepted, the typical row is {_of(self.typical)}"])
        rows = (*self.stages, *self.gradients)
        row = next(row for row in rows if row.stage == self.first and row.faults)
        lines.append(f"no parity, first at {row.stage}: {row.faults[0]}")
        if self.diagnosis is not None:
            lines.append(str(self.diagnosis))
        return "\n".join(lines)


def _row(row: Row) -> dict[str, Any]:
    return {
        "stage": row.stage,
        "passed": row.passed,
        "inherited": None if row.inherited is None else _plain(row.inherited._asdict()),
        "own": None if row.own is None else _plain(row.own._asdict()),
        "formula": _plain(row.formula),
        "faults": list(row.faults),
    }


def _short(units: float) -> str:
    return f"{units:.2f}" if units < 1e4 else f"{units:.0e}"


def _of(typical: float | None) -> str:
    return "-" if typical is None else f"{typical:.2f} yardsticks off"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
