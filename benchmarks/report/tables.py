"""Tables of README and docs, as Markdown, from the rows of one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import report_rows as rows_of
from report_rows import Device, Row, dtype, images_per_s, joined, largest_batch, ours, ratio_text, rival, timed

NOT_MEASURED = "not measured"
PACKAGES = ("torch", "triton", "timm", "transformers", "cuda", "driver")
# what the shorter table of ops shows: the shapes of a ViT-B
BASE = {"width": 768, "head_dim": 64}
# what the README shows of all that was measured: these models, and of the others the one that people have
SUMMARY = tuple(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large"))
RIVAL = "timm"
GRAPHS = "Where the host is the limit, times are of replayed CUDA graphs; the last column is its clock without them."


class Notes:
    """Footnotes of a table: what is said in many cells stands below it once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"

    def lines(self) -> list[str]:
        return [f"\\[{i}\\] {text}  " for i, text in enumerate(self.texts, 1)]


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def cell(row: Row, name: str, value: Callable[[Row], str], notes: Notes, with_ratio: bool = True) -> str:
    """One variant's cell: its value, and what has to be said about it; or why there is none."""
    variant = row["variants"].get(name)
    if variant is None:
        return "-"
    if "absent" in variant:
        return "absent"
    if not timed(variant):
        why = variant.get("not_timed") or variant.get("why_not_accepted") or "its result was not accepted"
        return f"not timed {notes(_one_line(why))}"
    text = value(variant)
    if with_ratio and name != row["baseline"] and ratio_text(variant):
        text += f" ({ratio_text(variant)})"
    if variant.get("accepted") is False:
        error = variant.get("error_ratio")
        size = f"{error:.1f} times the yardstick's error" if error is not None else "an error that is not finite"
        text += " " + notes(f"outside the acceptance rule: {size}")
    if variant.get("host_bound"):
        text += " " + notes("bound by the host: issuing the work takes as long as the device needs for it")
    return text


def _one_line(text: str) -> str:
    # what says that it cannot do something says so well enough
    text = " ".join(str(text).removeprefix("NotImplementedError: ").split()).replace("|", "/").replace("<", "&lt;")
    return text if len(text) <= 160 else text[:157] + "..."


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> list[str]:
    head, lines = list(head), [list(line) for line in lines]
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def _complete(
    device: Device, rows: Iterable[Row], body: list[str], notes: Notes, explained: str, noise: bool = True
) -> str:
    """A table with its caption above and its notes below."""
    shown = [part for row in rows for part in row.get("parts", [row])]
    apart = [abs(row[q] - 1) for row in shown for q in ("noise_25", "noise_75") if noise and row.get(q) is not None]
    caption = [f"**{device.where(shown)}** ({device.versions(shown, PACKAGES)}).", explained]
    caption += [f"The baseline differs from itself by up to {max(apart):.1%}."] if apart else []
    below = ["", *notes.lines()] if notes.texts else []
    return "\n".join([" ".join(caption), "", *body, *below])


def _variants_table(device: Device, rows: list[Row], value: Callable[[Row, str], str], explained: str) -> str | None:
    """One line a model, batch and dtype, one column a variant; a table for each kind of model with its own rivals."""
    kinds: dict[tuple[bool, str], list[Row]] = {}
    for row in rows:
        kinds.setdefault((rows_of.is_cnn(row), row["baseline"]), []).append(row)
    notes, body, absent = Notes(), [], {}
    for found in kinds.values():
        names = rows_of.variant_names(found)
        shown = [n for n in names if not all("absent" in row["variants"].get(n, {"absent": ""}) for row in found)]
        absent |= dict.fromkeys(name for name in names if name not in shown)
        lines = [
            [row["name"], str(row["batch"]), dtype(row),
             *(cell(row, name, lambda variant, name=name, row=row: value(row, name), notes) for name in shown)]
            for row in found
        ]  # fmt: skip
        body += [*([""] if body else []), *table(["model", "batch", "dtype", *shown], lines)]
    if absent:
        explained += f" Absent there: {', '.join(absent)}."
    return _complete(device, rows, body, notes, explained) if rows else None


def summary(device: Device) -> str | None:
    rows = summary_rows(device)
    if not rows:
        return None
    notes, names = Notes(), rows_of.variant_names(rows)
    replayed = any(map(is_replayed, rows))
    head = ["model", "batch", "dtype", *names, *([f"without graphs: {' / '.join(names)}"] if replayed else [])]
    lines = [
        [row["name"], str(row["batch"]), dtype(row),
         *(cell(row, name, lambda _, name=name, row=row: f"{images_per_s(row, name):,.0f}", notes) for name in names),
         *([" / ".join(called(row, name, lambda ms, row=row: f"{row['batch'] * 1e3 / ms:,.0f}") for name in names)]
           if replayed else [])]
        for row in rows
    ]  # fmt: skip
    explained = f"Inference at the largest batch, images/s; in brackets the ratio to {RIVAL}, pair by pair, "
    explained += "≈ within noise." + f" {GRAPHS}" * replayed
    return _complete(device, rows, table(head, lines), notes, explained)


def summary_rows(device: Device) -> list[Row]:
    """Ours and timm's at the largest batch, of the models that the README shows."""
    rows = [row for row in largest_models(device) if row["name"] in SUMMARY and row["baseline"] == RIVAL]

    def shown(variants: Row) -> Row:
        return {name: variant for name, variant in variants.items() if variant.get("ours") or name == RIVAL}

    return [row | {"variants": shown(row["variants"])} for row in rows]


def is_replayed(row: Row) -> bool:
    """Whether a time of this row is that of a replayed graph, and another when Python calls."""
    return any(timed(v) and v.get("graph") and v.get("wall_ms") is not None for v in row["variants"].values())


def called(row: Row, name: str, text: Callable[[float], str]) -> str:
    """What the host's clock says of a variant whose operators Python calls one after the other."""
    variant = row["variants"].get(name, {})
    return text(variant["wall_ms"]) if timed(variant) and variant.get("wall_ms") is not None else "-"


def host(device: Device) -> str | None:
    """Milliseconds of a call by the host's clock, of the rows whose times are those of graphs."""
    rows = [row for row in joined(r for r in device.rows if r["kind"] == "model") if is_replayed(row) and ours(row)]
    if not rows:
        return None
    mine = {name for row in rows for name, variant in row["variants"].items() if variant.get("ours")}
    names = [name for name in rows_of.variant_names(rows) if name == RIVAL or name in mine]
    lines = [
        [row["name"], row["mode"], str(row["batch"]), dtype(row), *(called(row, name, number) for name in names)]
        for row in rows
    ]
    explained = "Milliseconds of a call from Python without a graph, by the host's clock."
    body = table(["model", "mode", "batch", "dtype", *names], lines)
    return _complete(device, rows, body, Notes(), explained, noise=False)


def throughput(device: Device) -> str | None:
    rows = joined(r for r in device.rows if r["mode"] == "inference" and r["batch"] > 1)
    return _variants_table(
        device, rows, lambda row, name: f"{images_per_s(row, name):,.0f}",
        "Inference, images/s; in brackets the ratio to the baseline, pair by pair, ≈ within noise.",
    )  # fmt: skip


def latency(device: Device) -> str | None:
    rows = joined(r for r in device.rows if r["mode"] == "inference" and r["batch"] == 1)
    return _variants_table(
        device, rows, lambda row, name: number(row["variants"][name]["ms"]),
        "Inference of one image, ms; in brackets how many times as fast as the baseline, pair by pair, ≈ within noise.",
    )  # fmt: skip


def training(device: Device) -> str | None:
    rows = joined(r for r in device.rows if r["mode"] == "training")
    return _variants_table(
        device, rows, lambda row, name: f"{images_per_s(row, name):,.0f}",
        "Training without the optimizer (forward, loss, backward), images/s; in brackets the ratio to the baseline, "
        "pair by pair, ≈ within noise.",
    )  # fmt: skip


def memory(device: Device) -> str | None:
    rows = joined(r for r in device.rows if r["mode"] == "training" and has_memory(r))
    if not rows:
        return None
    notes, names = Notes(), [n for n in rows_of.variant_names(rows) if any(n in peaks(row) for row in rows)]
    lines = []
    for row in rows:
        found = peaks(row)
        cells = (" / ".join(f"{mib:,.0f}" for mib in found[name]) if name in found else "-" for name in names)
        lines.append([row["name"], str(row["batch"]), dtype(row), *cells])
    explained = "Memory of a training step at its peak beyond weights and images, MiB: allocated / reserved."
    body = table(["model", "batch", "dtype", *names], lines)
    return _complete(device, rows, body, notes, explained, noise=False)


def has_memory(row: Row) -> bool:
    return bool(peaks(row))


def peaks(row: Row) -> dict[str, tuple[float, float]]:
    """Peak memory of the variants, allocated and reserved, MiB."""
    return {
        name: (v["peak_allocated_mib"], v["peak_reserved_mib"])
        for name, v in row["variants"].items()
        if timed(v) and v.get("peak_allocated_mib") is not None
    }


def ops(device: Device) -> str | None:
    return _ops(device, base_ops(device))


def all_ops(device: Device) -> str | None:
    return _ops(device, [r for r in device.rows if r["kind"] == "op"])


def base_ops(device: Device) -> list[Row]:
    """Rows of ops in the shapes of a ViT-B, each at its largest batch."""
    rows = [row for row in device.rows if row["kind"] == "op"]
    return largest_batch(r for r in rows if all(r["shape"].get(name, size) == size for name, size in BASE.items()))


def _ops(device: Device, rows: list[Row]) -> str | None:
    if not rows:
        return None
    notes = Notes()

    def ms(row: Row, name: str | None) -> str:
        if name is None:
            return "-"
        return cell(row, name, lambda variant: number(variant["ms"]), notes)

    def percent(row: Row, name: str | None) -> str:
        found = None if name is None else row["variants"][name].get("percent")
        return "-" if found is None else f"{found:.0f} %" if found >= 10 else f"{found:.1f} %"

    def product(row: Row) -> str:
        alone, mine = row["variants"].get("product", {}).get("ms"), ours(row)
        return "-" if alone is None or mine is None else f"{100 * alone / row['variants'][mine]['ms']:.0f} %"

    has_product, lines = any("product" in row["variants"] for row in rows), []
    for row in rows:
        mine, other = ours(row) or next((n for n, v in row["variants"].items() if v.get("ours")), None), rival(row)
        limit = next((v["limit"] for v in row["variants"].values() if v.get("limit")), "-")
        shape = ", ".join(f"{name} {value}" for name, value in row["shape"].items())
        lines.append([
            row["name"], row["mode"], shape, str(row["batch"]), dtype(row),
            ms(row, row["baseline"] if row["baseline"] in row["variants"] else None), ms(row, mine),
            other or "-", ms(row, other), percent(row, ours(row)), percent(row, other), limit,
            *([product(row)] if has_product else []),
        ])  # fmt: skip
    head = (
        "op", "mode", "shape", "batch", "dtype", "baseline ms", "vitfast ms", "fastest other", "ms",
        "vitfast of roofline", "fastest other of roofline", "limit", *(["product alone"] if has_product else []),
    )  # fmt: skip
    explained = (
        "In brackets how many times as fast as the baseline, pair by pair, ≈ within noise. The roofline is the time "
        "that the op's products or bytes need at this device's measured ceilings."
    )
    if has_product:
        explained += " Product alone: the time of `F.linear` without anything around it as a share of vitfast's."
    return _complete(device, rows, table(head, lines), notes, explained)


def flops(device: Device) -> str | None:
    """The fastest of ours and of the others for each model, at its largest batch, beside what a model computes."""
    rows = [row for row in largest_models(device) if ours(row) or rival(row)]
    if not rows:
        return None
    notes, lines = Notes(), []

    def of(row: Row, name: str | None) -> list[str]:
        if name is None:
            return ["-", "-"]
        tflops = row["variants"][name].get("tflops")
        rate = cell(row, name, lambda variant: f"{images_per_s(row, name):,.0f}", notes, with_ratio=False)
        return [rate, "-" if tflops is None else number(tflops)]

    for row in rows:
        gflop = row["work"]["flops"] / row["batch"] / 1e9
        lines.append([
            row["name"], number(gflop), str(row["batch"]), dtype(row), *of(row, ours(row)), rival(row) or "-",
            *of(row, rival(row)),
        ])  # fmt: skip
    head = (
        "model", "GFLOP an image", "batch", "dtype", "vitfast images/s", "TFLOP/s", "fastest other", "images/s",
        "TFLOP/s",
    )  # fmt: skip
    return _complete(device, rows, table(head, lines), notes, "Inference at the largest batch; 1 multiply-add: 2 FLOP.")


def ceilings(device: Device) -> str | None:
    """What the device does at its best, in the run whose rows are compared with it."""
    found = device.ceilings
    if not found:
        return None
    run = found["run"]
    products = {name: each for name, each in found.get("matmul", {}).items() if each.get("tflops")}
    copied = found.get("copy", {}).get("gbps")
    head = ["copy GB/s", *(f"{name} TFLOP/s" for name in products)]
    cells = ["absent" if copied is None else f"{copied:,.0f}"]
    cells += [f"{number(each['tflops'])} ({number(each['first'])})" for each in products.values()]
    body = table(head, [cells])
    gemms = [each for each in found.get("gemm", []) if each.get("tflops")]
    widths = sorted({each["width"] for each in gemms})
    lines = {}
    for each in gemms:
        lines.setdefault((each["name"], each["dtype"]), {})[each["width"]] = number(each["tflops"])
    if lines:
        of_width = ([f"{name}, {dtype}", *(line.get(w, "-") for w in widths)] for (name, dtype), line in lines.items())
        rows = f"{gemms[0]['m']:,} rows"
        body += ["", *table([f"products of a block, {rows}: TFLOP/s", *(f"width {w}" for w in widths)], of_width)]
    stamp = {"date": run["date"], "commit": run.get("commit")}
    explained = "Large copies and matrix products, sustained, in brackets in the first tenth of a second."
    return _complete(device, [stamp], body, Notes(), explained)


def largest_models(device: Device) -> list[Row]:
    """Inference rows of the pictures' dtype, each model at its largest batch."""
    rows = joined(rows_of.main_dtype(r for r in device.rows if r["mode"] == "inference"))
    best: dict[str, Any] = {}
    for row in rows:
        if row["name"] not in best or row["batch"] > best[row["name"]]["batch"]:
            best[row["name"]] = row
    return list(best.values())
