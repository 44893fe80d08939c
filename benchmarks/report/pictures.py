"""Pictures of README and docs, as PNG, from the rows of one device. The same rows give the same bytes."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.report import rows as of
from benchmarks.report.rows import Device, Row, number, ours, rival, timed

# after Okabe and Ito, whose colours people with any kind of colour vision tell apart
BLUE, ORANGE, GREY, INK, QUIET = "#0072B2", "#C65200", "#AFB8C1", "#24292F", "#57606A"
COLOURS = (BLUE, "#4A9BD6", "#555555", ORANGE, "#00805E", "#A9507F", "#8A6D00", "#7A4B3A", "#222222", "#7F7F7F")
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8.5, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.07,
}  # fmt: skip
SPREAD = ("ms", "ms_20", "ms_80")
BARS = "\n×: times as fast as the bar without one, pair by pair; ≈: within noise; lines: 20 to 80 % of the rounds"


class Mark(NamedTuple):
    """A bar as long as `x[0]`, with a line from one of `ends` to the other; a point; or a line through points."""

    name: str
    mine: bool = False
    x: tuple[float, ...] = (0.0,)
    y: tuple[float, ...] = ()
    said: str = ""
    ends: tuple[float, ...] = ()


class Picture(NamedTuple):
    """What is drawn, all of it but the style: in each panel, below its heading, bars, lines or points."""

    kind: str
    title: str
    below: str
    panels: dict[str, list[Mark]]

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def png(self) -> bytes:
        """The file, with the digest as its "Description"."""
        drawn, file, info = io.BytesIO(), io.BytesIO(), PngInfo()
        with matplotlib.rc_context(STYLE):
            self.figure().savefig(drawn, format="png", dpi=150)
        info.add_text("Description", self.digest)
        Image.open(drawn).convert("RGB").quantize(128).save(file, "png", optimize=True, pnginfo=info)
        return file.getvalue()

    def figure(self) -> Figure:
        columns = min(2, len(self.panels))
        lines = math.ceil(len(self.panels) / columns)
        most = max(map(len, self.panels.values()))
        height = {"lines": 2.6, "points": 3.8}.get(self.kind, 0.45 + 0.22 * most)
        figure = Figure(figsize=(9.2 if columns == 2 else 7, 0.7 + lines * height), layout="constrained")
        figure.suptitle(self.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.supxlabel(self.below, x=0.01, ha="left", fontsize=7.5, color=QUIET)
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for ax in axes[len(self.panels) :]:
            ax.remove()
        every = [mark for marks in self.panels.values() for mark in marks]
        names = dict.fromkeys(mark.name for mark in every)
        colours = dict(zip(names, COLOURS * len(names), strict=False))
        handles: dict[str, Line2D] = {}
        for ax, (heading, marks) in zip(axes, self.panels.items(), strict=False):
            ax.set_title(heading)
            if self.kind == "lines":
                _lines(ax, marks, colours)
                handles |= {line.get_label(): line for line in ax.lines}
            elif self.kind == "points":
                _points(ax, marks)
            else:
                # percents have one scale
                _bars(ax, marks, every if self.kind == "percent" else marks, most)
        if handles:
            figure.legend(handles=list(handles.values()), loc="outside right upper")
        return figure


def _bars(ax: Axes, marks: list[Mark], compared: list[Mark], most: int) -> None:
    for y, mark in enumerate(marks):
        ax.barh(y, mark.x, 0.8, color=BLUE if mark.mine else GREY)
        ax.plot(mark.ends, [y] * len(mark.ends), color=INK, linewidth=0.9)
        at = (max(mark.x + mark.ends), y)
        ax.annotate(mark.said, at, (5, 0), textcoords="offset points", va="center", annotation_clip=False)
    longest = max(max(mark.x + mark.ends) for mark in compared)
    ax.set(xlim=(0, longest or 1), ylim=(most - 0.5, -0.5), xticks=[])
    ax.set_yticks(range(len(marks)), [mark.name for mark in marks])
    ax.spines["bottom"].set_visible(False)


def _lines(ax: Axes, marks: list[Mark], colours: dict[str, str]) -> None:
    for mark in marks:
        ax.plot(
            mark.x, mark.y, color=colours[mark.name], linewidth=2 if mark.mine else 1.2, marker=".", label=mark.name
        )
    batches = sorted({x for mark in marks for x in mark.x})
    ax.set(xscale="log", xticks=batches, xticklabels=batches, xlabel="batch", ylim=(0, None))
    ax.minorticks_off()
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.yaxis.grid(True, color="#EAEEF2")


def _points(ax: Axes, marks: list[Mark]) -> None:
    for i, mark in enumerate(marks):
        colour, line = ORANGE if mark.said else BLUE, len(mark.x) > 1
        style = {"marker": "s" if mark.said else "o", "fillstyle": "full" if mark.mine or mark.said else "none"}
        ax.plot(mark.x, mark.y, color=GREY if line else colour, linewidth=0.9, **({} if line else style))
        at = (mark.x[0], mark.y[0])
        # above a line, which falls; and apart from that of the next mark, which may be near
        offset = (7, 4 if line else 2 if i % 2 else -9)
        ax.annotate(mark.name, at, offset, textcoords="offset points", color=QUIET if line else colour)
    xs, ys = ([number for mark in marks for number in each(mark)] for each in (lambda m: m.x, lambda m: m.y))
    # wide enough for two powers of ten
    ax.set(xscale="log", xlim=(min(xs) / 3, max(xs) * 3), xlabel="GFLOP an image")
    ax.set(yscale="log", ylim=(min(ys) / 3, max(ys) * 3), ylabel="images/s")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:,.10g}")
        axis.set_minor_formatter("")
        axis.set_tick_params(which="major", length=4)


def _picture(
    device: Device, kind: str, title: str, rows: list[Row], panels: dict[str, list[Mark]], more: str = ""
) -> Picture | None:
    """None where no panel has a mark."""
    dtypes = " and ".join(sorted({row["dtype"] for row in rows}))
    below = f"{device.where(part for row in rows for part in row.get('parts', [row]))}; {dtypes}{more}"
    panels = {heading: marks for heading, marks in panels.items() if any(mark.x for mark in marks)}
    return Picture(kind, title, below, panels) if panels else None


def _of_bars(
    device: Device, title: str, rows: list[Row], lengths: Callable[[Row, Row], list[float | None]], *,
    speed: bool = True, kind: str = "bars",
) -> Picture | None:  # fmt: skip
    """One panel a row, one bar a variant; by row and variant its length, and the ends of the line in it."""
    panels: dict[str, list[Mark]] = {}
    for row in rows:
        marks = []
        for name in of.variant_names([row]):
            variant = row["variants"].get(name, {})
            mine, ratio = bool(variant.get("ours")), of.ratio_text(variant) if speed and name != row["baseline"] else ""
            length, *ends = lengths(row, variant) if timed(variant) else [None]
            if length is not None:
                words = (number(length), ratio, "not accepted" if variant.get("accepted") is False else "")
                marks.append(Mark(name, mine, (length,), (), "  ".join(filter(None, words)), tuple(ends)))
            elif mine and not timed(variant):
                marks.append(Mark(name, mine, said="not timed"))
        size = next(f"{side} {row['shape'][side]}" for side in ("tokens", "size", "height") if side in row["shape"])
        is_op = row["kind"] == "op"
        panels[f"{row['name']}, {row['mode']}, {size}" if is_op else f"{row['model']}, batch {row['batch']}"] = marks
    return _picture(device, kind, title, rows, panels, BARS if speed else "")


def _rate(row: Row, variant: Row) -> list[float | None]:
    return [row["batch"] * 1e3 / variant[each] for each in SPREAD]


def summary(device: Device) -> Picture | None:
    return _of_bars(device, "Inference: images a second, vitfast and timm", of.summary_models(device), _rate)


def rivals(device: Device) -> Picture | None:
    rows = [row for row in of.largest_models(device) if row["batch"] > 1 and not of.is_cnn(row)]
    return _of_bars(device, "Inference at the largest batch: images a second", rows, _rate)


def latency(device: Device) -> Picture | None:
    rows = [row for row in of.models(device, "inference", True) if row["batch"] == 1 and not of.is_cnn(row)]
    title = "Inference of one image: milliseconds"
    return _of_bars(device, title, rows, lambda row, variant: [variant[each] for each in SPREAD])


def memory(device: Device) -> Picture | None:
    def gib(row: Row, variant: Row) -> list[float | None]:
        allocated, reserved = of.peaks(variant) or (None, None)
        return [None] if allocated is None else [allocated / 1024, allocated / 1024, reserved / 1024]

    title = "Memory of a training step at its peak, GiB allocated; lines: reserved"
    return _of_bars(device, title, of.largest_batch(of.models(device, "training", True)), gib, speed=False)


def ops(device: Device) -> Picture | None:
    rows = []
    for row in of.base_ops(device, True):
        best = (ours(row) or next((name for name, v in row["variants"].items() if v.get("ours")), None), rival(row))
        rows.append(row | {"variants": {name: row["variants"][name] for name in best if name}})
    title = "Percent of the roofline: vitfast and the fastest other"
    return _of_bars(device, title, rows, lambda row, variant: [variant.get("percent")], speed=False, kind="percent")


def throughput(device: Device) -> Picture | None:
    """Images/s over the batch, one panel a model, one line a variant."""
    rows, panels = [row for row in of.models(device, "inference", True) if not of.is_cnn(row)], {}
    for row in rows:
        panel = panels.setdefault(row["model"], {name: Mark(name, x=()) for name in of.variant_names(rows)})
        for name, variant in row["variants"].items():
            if timed(variant):
                rate, mark = of.images_per_s(row, name), panel[name]
                panel[name] = Mark(name, bool(variant.get("ours")), (*mark.x, row["batch"]), (*mark.y, rate))
    lines = {model: [mark for mark in panel.values() if len(mark.x) > 1] for model, panel in panels.items()}
    return _picture(device, "lines", "Inference: images a second by batch", rows, lines)


def flops(device: Device) -> Picture | None:
    """Images/s over an image's FLOPs, for ViTs and CNNs: the fastest variant of each at its largest batch."""
    rows, marks = [row for row in of.largest_models(device) if ours(row) or rival(row)], []
    for row in rows:
        best = min(filter(None, (ours(row), rival(row))), key=lambda name: row["variants"][name]["ms"])
        gflop, rate = row["work"]["flops"] / row["batch"] / 1e9, of.images_per_s(row, best)
        kind = "CNN" if of.is_cnn(row) else ""
        marks.append(Mark(row["model"], bool(row["variants"][best].get("ours")), (gflop,), (rate,), kind))
    dtype = rows[0]["dtype"] if rows else ""
    if ceiling := device.ceilings.get("matmul", {}).get(dtype, {}).get("tflops"):
        ends = (min(mark.x for mark in marks)[0], max(mark.x for mark in marks)[0])
        name = f"{number(ceiling)} TFLOP/s: ceiling in {dtype}"
        marks.append(Mark(name, False, ends, tuple(ceiling * 1e3 / gflop for gflop in ends)))
    more = "\neach model at its largest batch; squares: CNNs; hollow: another variant than vitfast is the fastest"
    return _picture(device, "points", "Inference: images a second by what a model computes", rows, {"": marks}, more)


# by table, above which they stand
PICTURES = {
    "summary": (summary,), "throughput": (throughput, rivals), "latency": (latency,), "memory": (memory,),
    "ops": (ops,), "flops": (flops,),
}  # fmt: skip
