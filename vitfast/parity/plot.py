"""A picture of error by depth."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vitfast.parity.comparison import Comparison

SUFFIXES = (".png", ".svg", ".pdf")


def draw(found: Comparison, path: Path) -> None:
    """Write the relative errors of all stages: inherited, of their own, the yardstick, and in fp64.

    Raises:
        ModuleNotFoundError: matplotlib is not there.
        ValueError: a file of another kind.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--plot must be a file of {', '.join(SUFFIXES)}, got {path}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError("--plot needs matplotlib: pip install 'vitfast[demo]'") from error
    rows = found.stages
    figure = Figure(figsize=(max(6.0, 0.35 * len(rows) + 3), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(rows))
    inherited = [None if row.inherited is None else row.inherited.relative for row in rows]
    yardstick = [
        None if row.inherited is None or not row.inherited.units else row.inherited.relative / row.inherited.units
        for row in rows
    ]
    own = [None if row.own is None else row.own.relative for row in rows]
    series: list[tuple[str, list[float | None], dict[str, Any]]] = [
        (f"b in {found.dtype}, inherited", inherited, {"marker": "o"}),
        (f"yardstick: a in {found.dtype}", yardstick, {"linestyle": "--", "color": "grey"}),
        (f"b in {found.dtype}, its own", own, {"marker": "s", "linestyle": "none"}),
        ("b in fp64, its own", [row.formula for row in rows], {"marker": "^", "linestyle": "none"}),
    ]
    for label, values, how in series:
        # zero has no logarithm, and neither has what could not be compared
        shown = [float("nan") if value is None or value <= 0 else value for value in values]
        if any(value == value for value in shown):
            axes.plot(places, shown, label=label, **how)
    if found.first is not None:
        at = next(i for i, row in enumerate(rows) if row.stage == found.first)
        axes.axvline(at, color="tab:red", linewidth=0.8)
        axes.annotate(f"first: {found.first}", (at, 0.0), (4, 4), xycoords=("data", "axes fraction"),
                      textcoords="offset points", color="tab:red", fontsize=8)  # fmt: skip
    axes.set_yscale("log")
    axes.set(ylabel="relative rms error, against a in fp64", title=f"{'parity' if found.ok else 'no parity'}, by depth")
    axes.set_xticks([*places], [row.stage for row in rows], rotation=90, fontsize=7)
    axes.legend(fontsize=8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
