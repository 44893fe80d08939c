"""Pictures of README and docs, as SVG, from the rows of one device. The same rows give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib
import matplotlib.ticker
import report_rows as rows_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report_rows import Device, Row, images_per_s, joined, main_dtype, ours, ratio_text, rival, timed
from report_tables import RIVAL, base_ops, largest_models, number, peaks, summary_rows

# after Okabe and Ito, whose colours people with any kind of colour vision tell apart; darker, for they colour text too
OURS = ("#0072B2", "#4A9BD6")
OTHERS = ("#555555", "#C65200", "#00805E", "#A9507F", "#8A6D00", "#7A4B3A", "#222222", "#7F7F7F")
INK, FAINT, BAR = "#24292F", "#D0D7DE", "#AFB8C1"
PANEL_WIDTH, BAR_HEIGHT, DPI = 4.6, 0.24, 100

STYLE = {
    # text as outlines: the reader's machine needs no font. Ids in the file come from the salt, not from chance
    "svg.fonttype": "path", "svg.hashsalt": "vitfast", "font.family": "DejaVu Sans", "font.size": 9,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 8, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "xtick.major.size": 0, "ytick.major.size": 0, "grid.color": "#EAEEF2", "axes.axisbelow": True,
    # opaque, so that it is legible on a dark page as well
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
}  # fmt: skip


def save(figure: Figure, format: str = "svg") -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if format == "svg" else {"Software": None}
    figure.savefig(buffer, format=format, dpi=DPI, metadata=metadata, bbox_inches="tight", pad_inches=0.15)
    if format != "svg":
        return buffer.getvalue()
    # matplotlib ends the lines of a path with a blank
    return b"\n".join(line.rstrip() for line in buffer.getvalue().split(b"\n"))


def draw(picture: Callable[[Device], Figure | None], device: Device, format: str = "svg") -> bytes | None:
    """The picture of this device in a file's bytes, None where nothing of it was measured."""
    with matplotlib.rc_context(STYLE):
        figure = picture(device)
        return None if figure is None else save(figure, format)


def summary(device: Device) -> Figure | None:
    """How many times timm's images/s ours are, one group of bars a model."""
    rows = [row for row in summary_rows(device) if _has(row, RIVAL)]
    if not rows:
        return None
    names = [[n for n in rows_of.variant_names([row]) if _has(row, n)] for row in rows]
    places, ticks, y = [], [], 0.0
    for of_row in names:
        places.append([y + i for i in range(len(of_row))])
        ticks.append(y + (len(of_row) - 1) / 2)
        y += len(of_row) + 0.7
    batches = " and ".join(f"{batch}" for batch in sorted({row["batch"] for row in rows}))
    figure, (ax,) = _panels(device, rows, f"Inference at batch {batches}: images a second, {RIVAL} = 1", [""],
                            [BAR_HEIGHT * y], width=8.2, left=1.6, right=2.6)  # fmt: skip
    colours = _colours(rows)
    longest = 1.0
    for row, of_row, at in zip(rows, names, places, strict=True):
        for name, place in zip(of_row, at, strict=True):
            ratio = images_per_s(row, name) / images_per_s(row, RIVAL)
            ax.barh(place, ratio, 0.85, color=BAR if name == row["baseline"] else colours[name])
            said = "" if name == row["baseline"] else f"  {ratio_text(row['variants'][name])}"
            _beside(ax, f"{images_per_s(row, name):,.0f}{said}  {name}", ratio, place)
            longest = max(longest, ratio)
    ax.axvline(1.0, color=INK, linewidth=0.7)
    _name_bars(ax, [row["name"] for row in rows], longest)
    ax.set(yticks=ticks, yticklabels=[row["name"] for row in rows], ylim=(y - 1.2, -0.5))
    return figure


def throughput_by_batch(device: Device) -> Figure | None:
    """Images/s over the batch, one panel a model, one line a variant."""
    rows = [row for row in main_dtype(_inference(device)) if not rows_of.is_cnn(row)]
    panels = {}
    for row in joined(rows):
        panels.setdefault(row["name"], []).append(row)
    panels = {name: found for name, found in panels.items() if len(found) > 1}
    if not panels:
        return None
    colours = _colours(rows)
    figure, axes = _panels(device, rows, "Inference: images a second by batch", list(panels), [2.3] * len(panels),
                           left=0.7, right=1.5, gap=0.95)  # fmt: skip
    for (name, found), ax in zip(panels.items(), axes, strict=True):
        ends = []
        for variant, colour in colours.items():
            line = [(row["batch"], images_per_s(row, variant)) for row in found if _has(row, variant)]
            if line:
                wide = 2.2 if colour in OURS else 1.3
                ax.plot(*zip(*line, strict=True), color=colour, linewidth=wide, marker="o", markersize=3.2,
                        clip_on=False)  # fmt: skip
                ends.append((*line[-1], variant, colour))
        batches = sorted({row["batch"] for row in found})
        ax.set(xscale="log", xticks=batches, xticklabels=batches, xlabel="batch", title=name)
        ax.minorticks_off()
        ax.set_ylim(0, 1.06 * max(y for _, y, _, _ in ends) if ends else 1)
        ax.set_xlim(batches[0] * 0.9, batches[-1])
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        ax.yaxis.grid(True)
        ax.spines["left"].set_visible(False)
        _label_ends(ax, ends)
    return figure


def throughput_by_rival(device: Device) -> Figure | None:
    """Images/s of every variant at the largest batch, one panel a model."""
    rows = [row for row in largest_models(device) if row["batch"] > 1 and not rows_of.is_cnn(row)]
    rows = [row for row in rows if any(map(timed, row["variants"].values()))]
    if not rows:
        return None
    titles = [f"{row['name']}, batch {row['batch']}" for row in rows]
    title = "Inference at the largest batch: images a second"
    return _bars(device, rows, titles, title, images_per_s, "{:,.0f}".format, most_first=True)


def latency(device: Device) -> Figure | None:
    """Milliseconds of every variant for one image, one panel a model."""
    rows = joined(row for row in main_dtype(_inference(device)) if row["batch"] == 1 and not rows_of.is_cnn(row))
    rows = [row for row in rows if any(map(timed, row["variants"].values()))]
    if not rows:
        return None
    titles = [row["name"] for row in rows]
    return _bars(device, rows, titles, "Inference of one image: milliseconds", _ms, number, most_first=False)


def memory(device: Device) -> Figure | None:
    """Peak memory of a training step of every variant, one panel a model."""
    rows = joined(row for row in main_dtype(r for r in device.rows if r["mode"] == "training") if peaks(row))
    best = {row["name"]: row for row in rows}
    if not best:
        return None
    rows = list(best.values())
    titles = [f"{row['name']}, batch {row['batch']}" for row in rows]
    title = "Memory of a training step at its peak, GiB allocated; lines: reserved"
    figure, axes = _panels(device, rows, title, titles, [_height(len(peaks(row))) for row in rows])
    for row, ax in zip(rows, axes, strict=True):
        found = sorted(peaks(row).items(), key=lambda item: item[1][0])
        for y, (name, (allocated, reserved)) in enumerate(found):
            colour = _bar_colour(row, name)
            ax.barh(y, allocated / 1024, 0.7, color=colour)
            ax.plot([allocated / 1024, reserved / 1024], [y, y], color=INK, linewidth=0.9)
            _beside(ax, f"{allocated / 1024:.1f}", max(allocated, reserved) / 1024, y)
        _name_bars(ax, [name for name, _ in found], max(max(p) for _, p in found) / 1024)
    return figure


def roofline_by_op(device: Device) -> Figure | None:
    """Percent of the roofline that ours and the fastest other reach, one panel a mode."""
    rows = [row for row in main_dtype(base_ops(device)) if _percent(row, ours(row)) or _percent(row, rival(row))]
    if not rows:
        return None
    order = list(dict.fromkeys(row["name"] for row in rows))
    panels = {}
    for row in sorted(rows, key=lambda row: order.index(row["name"])):
        panels.setdefault(row["mode"], []).append(row)
    title = "Percent of the roofline: ours in blue, the fastest other in grey"
    heights = [_height(2.2 * len(found)) for found in panels.values()]
    figure, axes = _panels(device, rows, title, list(panels), heights, width=4.8, left=1.75)
    for found, ax in zip(panels.values(), axes, strict=True):
        for y, row in enumerate(found):
            for name, at, colour in ((ours(row), y - 0.19, OURS[0]), (rival(row), y + 0.19, BAR)):
                percent = _percent(row, name)
                if percent is not None:
                    ax.barh(at, percent, 0.34, color=colour)
                    _beside(ax, f"{percent:.0f}  {name}{_not_accepted(row, name)}", percent, at, fontsize=7.5)
            if ours(row) is None and any(v.get("ours") for v in row["variants"].values()):
                _beside(ax, "vitfast was not timed", 0, y - 0.19, fontsize=7.5)
        labels = [f"{row['name']}, {_tokens(row)}" for row in found]
        ax.set(yticks=range(len(found)), yticklabels=labels, ylim=(len(found) - 0.5, -0.5))
        # a little above 100 is possible: ceilings are measured as well
        most = max(100, *(_percent(row, n) or 0 for row in found for n in (ours(row), rival(row))))
        ax.set_xlim(0, 1.02 * most)
        ax.axvline(100, color=INK, linewidth=0.8)
        ax.xaxis.grid(True)
        ax.spines["left"].set_visible(False)
    return figure


def flops_and_throughput(device: Device) -> Figure | None:
    """Images/s over an image's FLOPs, for ViTs and CNNs: the fastest variant of each at its largest batch."""
    rows = [row for row in largest_models(device) if ours(row) or rival(row)]
    if len(rows) < 2:
        return None
    title = "Inference: images a second by what a model computes"
    more = "each model at its largest batch; squares: CNNs; hollow: another variant than vitfast is the fastest"
    figure, (ax,) = _panels(device, rows, title, [""], [3.6], width=6.6, left=0.7, right=0.4, more=more)
    points = []
    for row in rows:
        best = min((name for name in (ours(row), rival(row)) if name), key=lambda name: _ms(row, name))
        at = (row["work"]["flops"] / row["batch"] / 1e9, images_per_s(row, best))
        cnn, mine = rows_of.is_cnn(row), row["variants"][best].get("ours")
        colour = OTHERS[1] if cnn else OURS[0]
        ax.plot(*at, "s" if cnn else "o", markersize=6, color=colour, fillstyle="full" if mine or cnn else "none")
        points.append((at, row["name"], colour))
    gflops, rates = zip(*(at for at, _, _ in points), strict=True)
    ax.set(xscale="log", yscale="log", xlabel="GFLOP an image", ylabel="images/s")
    ax.set(xlim=(min(gflops) / 2, max(gflops) * 5), ylim=(min(rates) / 2, max(rates) * 2.5))
    _lines_of_equal_speed(ax, device, rows[0]["dtype"])
    _name_points(ax, points)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    return figure


def _lines_of_equal_speed(ax: Axes, device: Device, dtype: str) -> None:
    """Powers of ten of TFLOP/s, and the ceiling of products in this dtype where it was measured."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    ceiling = device.ceilings.get("matmul", {}).get(dtype, {}).get("tflops")
    speeds = [(10.0**power, f"{10.0**power:g} TFLOP/s", FAINT) for power in range(-3, 5)]
    speeds = [speed for speed in speeds if ceiling is None or speed[0] < 0.7 * ceiling]
    speeds += [] if ceiling is None else [(ceiling, f"{number(ceiling)} TFLOP/s: ceiling in {dtype}", "#8C959F")]
    for tflops, text, colour in speeds:
        ends = [tflops * 1e3 / left, tflops * 1e3 / right]
        if ends[0] > low and ends[1] < high:
            ax.plot([left, right], ends, color=colour, linewidth=0.8, zorder=0)
            # where the line enters the picture
            at = (max(left, tflops * 1e3 / high), min(high, ends[0]))
            ax.annotate(text, at, (4, -1), textcoords="offset points", fontsize=7, color="#57606A", va="top")
    ax.set(xlim=(left, right), ylim=(low, high))


def _name_points(ax: Axes, points: list[tuple[tuple[float, float], str, str]]) -> None:
    """Names right of their points, above or below where another name is."""
    taken: list[tuple[float, float, float]] = []
    for at, name, colour in sorted(points, key=lambda point: point[0][1], reverse=True):
        x, y = ax.transData.transform(at) * 72 / ax.figure.dpi
        width, places = 4.6 * len(name), (0, -11, 11, -22, 22)
        free = [
            dy for dy in places
            if all(abs(y + dy - other) > 10 or x > end or x + width < start for start, end, other in taken)
        ]  # fmt: skip
        dy = (free or places)[0]
        taken.append((x, x + width, y + dy))
        ax.annotate(name, at, (7, dy), textcoords="offset points", fontsize=7.5, color=colour, va="center",
                    bbox=dict(facecolor="white", edgecolor="none", pad=0.5, alpha=0.8))  # fmt: skip


def _inference(device: Device) -> list[Row]:
    return [row for row in device.rows if row["mode"] == "inference"]


def _has(row: Row, name: str) -> bool:
    return name in row["variants"] and timed(row["variants"][name])


def _ms(row: Row, name: str) -> float:
    return row["variants"][name]["ms"]


def _not_accepted(row: Row, name: str) -> str:
    return "  not accepted" if row["variants"][name].get("accepted") is False else ""


def _percent(row: Row, name: str | None) -> float | None:
    return None if name is None else row["variants"][name].get("percent")


def _tokens(row: Row) -> str:
    shape = row["shape"]
    return f"{shape['tokens']} tokens" if "tokens" in shape else f"{shape['size']} pixels" if "size" in shape else ""


def _colours(rows: Iterable[Row]) -> dict[str, str]:
    """A colour for every variant: ours blue, the baseline dark grey, the rest as they come."""
    rows = list(rows)
    mine = {name for row in rows for name, v in row["variants"].items() if v.get("ours")}
    blue, rest = iter(OURS * 9), iter(OTHERS * 9)
    return {name: next(blue if name in mine else rest) for name in rows_of.variant_names(rows)}


def _bar_colour(row: Row, name: str) -> str:
    return OURS[0] if row["variants"][name].get("ours") else BAR


def _height(bars: float) -> float:
    return BAR_HEIGHT * max(bars, 2)


def _panels(
    device: Device, rows: list[Row], title: str, titles: list[str], heights: list[float], *,
    width: float = PANEL_WIDTH, left: float = 1.45, right: float = 0.95, gap: float = 0.55, more: str = "",
) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """Axes in two columns with headings; title and where it was measured stand above. All lengths in inches.

    Args:
        left, right: of each panel's axes, for names and values; gap: below, for the next heading.
    """
    columns = min(2, len(titles))
    lines = [heights[i : i + columns] for i in range(0, len(heights), columns)]
    tall = [max(line) for line in lines]
    head = 0.85 + 0.2 * bool(more)
    total, across = head + sum(tall) + gap * (len(tall) - 1), columns * width
    figure = Figure(figsize=(across, total))
    axes = []
    for i, height in enumerate(heights):
        line, column = divmod(i, columns)
        bottom = total - head - sum(tall[:line]) - gap * line - height
        box = ((column * width + left) / across, bottom / total, (width - left - right) / across, height / total)
        axes.append(figure.add_axes(box))
        axes[-1].set_title(titles[i])
    parts = [part for row in rows for part in row.get("parts", [row])]
    dtypes = " and ".join(sorted({rows_of.dtype(row) for row in rows}))
    for text, down, style in (
        (title, 0.12, dict(fontsize=12, fontweight="bold")),
        (f"{device.where(parts)}; {dtypes}", 0.36, dict(fontsize=8, color="#57606A")),
        (more, 0.54, dict(fontsize=8, color="#57606A")),
    ):
        figure.text(0.06 / across, 1 - down / total, text, va="top", **style)
    return figure, axes


def _bars(
    device: Device, rows: list[Row], titles: list[str], title: str, value: Callable[[Row, str], float],
    text: Callable[[float], str], most_first: bool,
) -> Figure:  # fmt: skip
    """One bar a variant, the fastest on top, with the spread of the rounds as a line."""
    shown = [sorted((n for n in row["variants"] if _has(row, n)), key=lambda n, row=row: _ms(row, n)) for row in rows]
    more = "×: times as fast as the bar without one, pair by pair; ≈: within noise; lines: 20 to 80 % of the rounds"
    figure, axes = _panels(device, rows, title, titles, [_height(len(names)) for names in shown], more=more)
    for row, names, ax in zip(rows, shown, axes, strict=True):
        longest = 0.0
        for y, name in enumerate(names):
            variant = row["variants"][name]
            at = value(row, name)
            ax.barh(y, at, 0.7, color=_bar_colour(row, name))
            ends = [at * (variant[q] / variant["ms"]) ** (-1 if most_first else 1) for q in ("ms_20", "ms_80")]
            ax.plot(ends, [y, y], color=INK, linewidth=0.9)
            said = f"  {ratio_text(variant)}" if name != row["baseline"] else ""
            said += _not_accepted(row, name)
            longest = max(longest, at, *ends)
            _beside(ax, text(at) + said, max(at, *ends), y)
        _name_bars(ax, names, longest)
    return figure


def _beside(ax: Axes, text: str, x: float, y: float, **style: Any) -> None:
    ax.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", annotation_clip=False, **style)


def _name_bars(ax: Axes, names: list[str], longest: float) -> None:
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), xlim=(0, longest), xticks=[])
    ax.spines["bottom"].set_visible(False)


def _label_ends(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names at the right ends of lines, moved apart where they would overlap."""
    ends = sorted(ends, key=lambda end: end[1])
    _, top = ax.get_ylim()
    gap, places = 0.062 * top, []
    for _, y, _, _ in ends:
        places.append(max(y, places[-1] + gap) if places else y)
    # what was pushed above the top moves the rest down
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], top - gap * (len(places) - 1 - i))
    for (x, _, name, colour), place in zip(ends, places, strict=True):
        _beside(ax, name, x, place, color=colour, fontsize=7.5, fontweight="bold" if colour in OURS else "normal")


PICTURES = {
    "summary": summary, "throughput": throughput_by_batch, "rivals": throughput_by_rival, "latency": latency,
    "memory": memory, "ops": roofline_by_op, "flops": flops_and_throughput,
}  # fmt: skip
