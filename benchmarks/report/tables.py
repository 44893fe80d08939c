"""Tables of README and docs, as Markdown, from the rows of one device. A footnote stands in its cell as ⟦text⟧."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from benchmarks.core.patched import PATCHED, UNPATCHED
from benchmarks.report import rows as of
from benchmarks.report.rows import Device, Row, images_per_s, number, ours, rival, timed

PACKAGES = ("torch", "triton", "timm", "transformers", "onnxruntime", "openvino", "nncf", "cuda", "driver")
RATIOS = "in brackets how many times as fast as the baseline, pair by pair, ≈ within noise."
# of records that do not say what is within noise
ALONE = f"{RATIOS.partition(', ≈')[0].capitalize()}."
GRAPHS = "Where the host is the limit, times are of replayed CUDA graphs; the last column is its clock without them."
ROOFLINE = "The roofline is the time that the op's products or bytes need at this device's measured ceilings."
COARSE = (
    "% off: rms error of the logits against fp64, with random weights, of variants in int8, which are shown for "
    "comparison: in no ratio to the fastest other do they count."
)
PRODUCT = "Product alone: the time of `F.linear` without anything around it as a share of vitfast's."

BOTH = (
    "Other libraries' models as they are and after `vitfast.patch`, in turns in one process, ms of a call; training is "
    "forward, loss and backward. Ratio: unpatched by patched, pair by pair, ≈ within noise, which is what unpatched "
    "is to itself; of both the quartiles."
)

Line = Mapping[str, object]


def table(lines: Iterable[Line]) -> str:
    """Columns are the keys of the lines; one with nothing in it is left out."""
    lines = [{name: "-" if cell is None else str(cell) for name, cell in line.items()} for line in lines]
    every = dict.fromkeys(name for line in lines for name in line)
    shown = [name for name in every if {line.get(name, "-") for line in lines} - {"-", "absent"}]
    rows = [shown, ["---"] * len(shown), *([line.get(name, "-") for name in shown] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def captioned(device: Device, rows: list[Row], body: str, explained: str, noise: bool = True) -> str | None:
    """A table with its caption above and its footnotes below; None where it has no rows."""
    if not rows:
        return None
    shown, notes, versions = [part for row in rows for part in row.get("parts", [row])], {}, []
    for package in PACKAGES:
        seen = sorted({row["run"][package] for row in shown if row["run"].get(package)})
        versions += [f"{package.replace('cuda', 'CUDA')} {' and '.join(seen)}"] if seen else []
    apart = [abs(row[q] - 1) for row in shown for q in ("noise_25", "noise_75") if noise and row.get(q) is not None]
    explained += f" The baseline differs from itself by up to {max(apart):.1%}." if apart else ""
    body = re.sub("⟦(.*?)⟧", lambda found: f"[{notes.setdefault(found[1], len(notes) + 1)}]", body)
    below = [f"\\[{i}\\] {text}  " for text, i in notes.items()]
    caption = f"**{device.where(shown)}** ({', '.join(versions)}). {explained}"
    return "\n".join([caption, "", body, *([""] if below else []), *below])


def cell(value: Callable[[Row, str], str], row: Row, name: str | None, with_ratio: bool = True) -> str:
    """One variant's value, and what has to be said about it; or why there is none."""
    variant = row["variants"].get(name)
    if variant is None or "absent" in variant:
        return "-" if variant is None else "absent"
    if not timed(variant):
        # what says that it cannot do something says so well enough
        why = " ".join(variant.get("not_timed", "no time came out").removeprefix("NotImplementedError: ").split())
        why = why if len(why) <= 160 else why[:157] + "..."
        return f"not timed ⟦{why.replace('|', '/').replace('<', '&lt;')}⟧"
    text, error = value(row, name), variant.get("error_ratio")
    if with_ratio and name != row["baseline"] and of.ratio_text(variant):
        text += f" ({of.ratio_text(variant)})"
    if of.is_coarse(variant):
        text += f", {variant['error']:.1%} off" if variant.get("error") is not None else ", error unknown"
        if variant.get("accepted") is False:
            text += f" ⟦more than the {variant['tolerance']:.0%} that int8 may be off⟧"
    elif variant.get("accepted") is False:
        size = "an error that is not finite" if error is None else f"{error:.1f} times the yardstick's error"
        text += f" ⟦outside the acceptance rule: {size}⟧"
    if variant.get("host_bound"):
        text += " ⟦bound by the host: issuing the work takes as long as the device needs for it⟧"
    return text


rate = partial(cell, lambda row, name: f"{images_per_s(row, name):,.0f}")
time = partial(cell, lambda row, name: number(row["variants"][name]["ms"]))


def _of_an_image(row: Row, name: str) -> str:
    variant, gflop = row["variants"][name], row["gflop"] * row["batch"]
    memory = f", {variant['peak_mib']:,.0f} MiB" if "peak_mib" in variant else ""
    return f"{number(variant['ms'] / row['batch'])} ms, {gflop / variant['ms']:.2f} TFLOP/s{memory}"


growth = partial(cell, _of_an_image)


def memory(row: Row, name: str) -> str:
    return " / ".join(f"{mib:,.0f}" for mib in of.peaks(row["variants"].get(name, {}))) or "-"


def called(row: Row, name: str, per_s: bool = False) -> str:
    """What the host's clock says of a variant, of ours or timm's, whose operators Python calls one after the other."""
    variant = row["variants"].get(name, {})
    ms = variant.get("wall_ms") if variant.get("ours") or name == of.RIVAL else None
    return "-" if ms is None else f"{row['batch'] * 1e3 / ms:,.0f}" if per_s else number(ms)


def is_replayed(row: Row) -> bool:
    """Whether a time of this row is that of a replayed graph, and another when Python calls."""
    return any(timed(v) and v.get("graph") and v.get("wall_ms") is not None for v in row["variants"].values())


def by_variant(
    device: Device, rows: list[Row], cell: Callable[[Row, str], str], explained: str,
    named: tuple[str, ...] = ("model", "batch", "dtype"), more: Callable[[Row], Line] = lambda row: {},
) -> str | None:  # fmt: skip
    """One line a row, one column a variant; a table for each kind of model with its own rivals."""
    kinds: dict[tuple[bool, str], list[Row]] = {}
    for row in rows:
        kinds.setdefault((of.is_cnn(row), row["baseline"] if row["kind"] == "model" else ""), []).append(row)
    bodies, absent = [], {}
    for found in kinds.values():
        columns = {name: [cell(row, name) for row in found] for name in of.variant_names(found)}
        absent |= {name: None for name, texts in columns.items() if "absent" in texts and {*texts} <= {"-", "absent"}}
        lines = []
        for i, row in enumerate(found):
            lines.append({each: row[each] for each in named} | {name: texts[i] for name, texts in columns.items()})
            lines[-1] |= more(row)
        bodies.append(table(lines))
    explained += f" Absent there: {', '.join(absent)}." if absent else ""
    every = [variant for row in rows for variant in row["variants"].values()]
    explained += f" {COARSE}" if cell in (rate, time) and any(map(of.is_coarse, filter(timed, every))) else ""
    return captioned(
        device, sum(kinds.values(), []), "\n\n".join(bodies), explained, noise=cell in (rate, time, growth)
    )


def summary(device: Device) -> str | None:
    rows = of.summary_models(device)
    names, replayed = of.variant_names(rows), any(map(is_replayed, rows))

    def without(row: Row) -> Line:
        head = f"without graphs: {' / '.join(names)}"
        return {head: " / ".join(called(row, name, per_s=True) for name in names)} if replayed else {}

    explained = f"Inference at the largest batch, images/s; {RATIOS.replace('the baseline', of.RIVAL)}"
    return by_variant(device, rows, rate, explained + f" {GRAPHS}" * replayed, more=without)


def of_ops(rows: Callable[[Device], list[Row]], device: Device) -> str | None:
    def percent(row: Row, name: str | None) -> str | None:
        found = row["variants"].get(name, {}).get("percent")
        return None if found is None else f"{found:.0f} %" if found >= 10 else f"{found:.1f} %"

    lines, found = [], rows(device)
    for row in found:
        best, other, variants = ours(row), rival(row), row["variants"]
        alone = variants.get("product", {}).get("ms")
        lines.append({
            "op": row["name"], "mode": row["mode"],
            "shape": ", ".join(f"{name} {size}" for name, size in row["shape"].items()),
            "batch": row["batch"], "dtype": row["dtype"], "baseline ms": time(row, row["baseline"]),
            # one of ours without a time says why
            "vitfast ms": time(row, best or next((name for name, v in variants.items() if v.get("ours")), None)),
            "fastest other": other, "its ms": time(row, other), "vitfast of roofline": percent(row, best),
            "fastest other of roofline": percent(row, other),
            "limit": next((v["limit"] for v in variants.values() if v.get("limit")), None),
            "product alone": f"{100 * alone / variants[best]['ms']:.0f} %" if alone and best else None,
        })  # fmt: skip
    more = f" {PRODUCT}" if any(line["product alone"] for line in lines) else ""
    return captioned(device, found, table(lines), f"{RATIOS.capitalize()} {ROOFLINE}{more}")


def patched(device: Device) -> str | None:
    """A line for each of other libraries' models before and after `vitfast.patch`."""
    rows, lines = of.patched_models(device), []
    for row in rows:
        notes, found = row["notes"], row["variants"].get(PATCHED, {})
        # of a model in which nothing is fused no time says anything
        shown = bool(notes["fused"]) and timed(found) and found.get("ratio") is not None
        left = "; ".join(f"{kind}: {why}" for kind, why in notes["left"].items()).replace("|", "/").replace("<", "&lt;")
        note = f" ⟦left: {left}⟧" if left else ""
        lines.append({
            "family": notes["family"], "model": notes["model"], "mode": row["mode"], "batch": row["batch"],
            "dtype": row["dtype"], "fused": (", ".join(notes["fused"]) or "nothing") + note,
            "unpatched ms": time(row, UNPATCHED), "patched ms": time(row, PATCHED, False) if notes["fused"] else None,
            "ratio": of.ratio_text(found) if shown else None,
            "ratio's quartiles": quartiles(found["ratio_25"], found["ratio_75"]) if shown else None,
            "noise": quartiles(row["noise_25"], row["noise_75"]) if row.get("noise_25") is not None else None,
        })  # fmt: skip
    return captioned(device, rows, table(lines), BOTH)


def quartiles(low: float, high: float) -> str:
    return f"{low:.2f} to {high:.2f}"


def flops(device: Device) -> str | None:
    """The fastest of ours and of the others for each model, at its largest batch, beside what a model computes."""
    rows, lines = [row for row in of.largest_models(device) if ours(row) or rival(row)], []
    for row in rows:
        best, other = ours(row), rival(row)
        of_ours, of_other = (row["variants"].get(name, {}).get("tflops") for name in (best, other))
        lines.append({
            "model": row["model"], "GFLOP an image": number(row["work"]["flops"] / row["batch"] / 1e9),
            "batch": row["batch"], "dtype": row["dtype"], "vitfast images/s": rate(row, best, False),
            "vitfast TFLOP/s": of_ours and number(of_ours), "fastest other": other,
            "its images/s": rate(row, other, False), "its TFLOP/s": of_other and number(of_other),
        })  # fmt: skip
    explained = "Inference at the largest batch; 1 multiply-add: 2 FLOP."
    return captioned(device, rows, table(lines), explained)


def ceilings(device: Device) -> str | None:
    """What the device does at its best, in the run whose rows are compared with it."""
    found = device.ceilings
    if not found:
        return None
    copied = found.get("copy", {}).get("gbps")
    line = {"copy GB/s": copied and f"{copied:,.0f}"}
    for name, each in found.get("matmul", {}).items():
        if each.get("tflops"):
            line[f"{name} TFLOP/s"] = f"{number(each['tflops'])} ({number(each['first'])})"
    lines: dict[str, dict[str, str]] = {}
    for each in sorted((each for each in found.get("gemm", []) if each.get("tflops")), key=lambda each: each["width"]):
        name, head = f"{each['name']}, {each['dtype']}", f"products of a block, {each['m']:,} rows: TFLOP/s"
        lines.setdefault(name, {head: name})[f"width {each['width']}"] = number(each["tflops"])
    body = "\n\n".join(table(part) for part in ([line], lines.values()) if part)
    explained = "Large copies and matrix products, sustained, in brackets in the first tenth of a second."
    return captioned(device, [found], body, explained)


def _by_variant(rows: Callable[[Device], list[Row]], *how: Any) -> Callable[[Device], str | None]:
    return lambda device: by_variant(device, rows(device), *how)


TABLES = {
    "summary": summary, "ops": partial(of_ops, of.base_ops), "all ops": partial(of_ops, partial(of.of_kind, "op")),
    "flops": flops, "ceilings": ceilings, "patched": patched,
    "host": _by_variant(
        lambda device: [row for row in of.models(device) if is_replayed(row) and ours(row)], called,
        "Milliseconds of a call from Python without a graph, by the host's clock.",
        ("model", "mode", "batch", "dtype")),
    "throughput": _by_variant(
        lambda device: [row for row in of.models(device, "inference") if row["batch"] > 1], rate,
        f"Inference, images/s; {RATIOS}"),
    "latency": _by_variant(
        lambda device: [row for row in of.models(device, "inference") if row["batch"] == 1], time,
        f"Inference of one image, ms; {RATIOS}"),
    "training": _by_variant(
        partial(of.models, mode="training"), rate,
        f"Training without the optimizer (forward, loss, backward), images/s; {RATIOS}"),
    "memory": _by_variant(
        lambda device: [row for row in of.models(device, "training") if any(map(of.peaks, row["variants"].values()))],
        memory,
        "Memory of a training step at its peak beyond weights and images, MiB: allocated / reserved."),
    "patch": _by_variant(
        partial(of.of_kind, "patch"), time,
        "From uint8 images, channels last, to tokens: normalise, cut, project, add positions and class token, ms; the "
        f"baseline is the fastest of three ways to do it with timm's modules. {ALONE}"),
    "growth": _by_variant(
        partial(of.of_kind, "growth"), growth,
        "Of an image; TFLOP/s count timm's operations, whatever a variant leaves out; MiB are what one forward adds at "
        f"its peak, in a process of its own. {ALONE}", ("model", "dtype", "batch", "tokens")),
    "gelu": _by_variant(
        partial(of.of_kind, "gelu"), time,
        f"Milliseconds; the MLP is of width 768, with its norm and residual. {ALONE}", ("job", "shape", "dtype")),
}  # fmt: skip
