"""Tables of the report from the rows of bench_cpu.py: patches, growth over batch and image size, tanh GELU."""

from __future__ import annotations

from collections.abc import Callable

from report_rows import Device, Row
from report_tables import number, table


def patch(device: Device) -> str | None:
    def cells(row: Row) -> list[str]:
        variants = row["variants"]
        theirs = variants.get(row.get("against"), {})
        none = (None, None, None)
        (_, ratio, _), (_, prepared_ratio, _) = row.get("ratio", none), row.get("ratio of prepared", none)
        parts = [_ms(variants["vitfast"]), _ratio(ratio), _ms(variants["prepared"]), _ratio(prepared_ratio)]
        return [row["model"], str(row["batch"]), row["dtype"], _ms(theirs), row.get("against", "-"), *parts]

    head = (
        "model", "batch", "dtype", "timm ms", "its way", "`ops.patch_embed` ms", "ratio", "prepared ms", "ratio",
    )  # fmt: skip
    explained = (
        "From uint8 images, channels last, to tokens: normalise, cut, project, add positions, class token; against the "
        "fastest of three ways to do it with timm's modules."
    )
    return _parts_table(device, "patch", head, cells, explained)


def growth(device: Device) -> str | None:
    def cells(row: Row) -> list[str]:
        theirs, ours = row["variants"]["timm"], row["variants"]["prepared"]
        each = [_ms(variant, row["batch"]) for variant in (theirs, ours)]
        memory = [f"{variant['peak_mib']:,.0f}" if "peak_mib" in variant else "-" for variant in (theirs, ours)]
        speed = [
            f"{row['gflop'] * row['batch'] / variant['ms']:.2f}" if "ms" in variant else "-"
            for variant in (theirs, ours)
        ]
        start = [row["dtype"], str(row["batch"]), f"{row['tokens']:,}"]
        return [*start, *each, _ratio(ours.get("ratio")), *speed, *memory]

    head = (
        "dtype", "batch", "tokens", "timm ms an image", "prepared ms an image", "ratio", "timm TFLOP/s",
        "prepared TFLOP/s", "timm MiB", "prepared MiB",
    )  # fmt: skip
    names = sorted({row["model"] for row in device.parts.get("growth", ())})
    explained = (
        f"{', '.join(names)}. TFLOP/s count timm's operations, whatever a variant leaves out; MiB are what one forward "
        "adds at its peak, in a process of its own."
    )
    return _parts_table(device, "growth", head, cells, explained)


def gelu(device: Device) -> str | None:
    def cells(row: Row) -> list[str]:
        theirs, ours = row["variants"]["torch"], row["variants"]["vitfast"]
        shape = ", ".join(map(str, row["shape"]))
        return [row["job"], f"[{shape}]", row["dtype"], _ms(theirs), _ms(ours), _ratio(ours.get("ratio"))]

    head = ("tanh GELU", "shape", "dtype", "torch ms", "vitfast ms", "ratio")
    return _parts_table(device, "gelu", head, cells, "The MLP is of width 768, with its norm and residual.")


def _parts_table(
    device: Device, part: str, head: tuple[str, ...], cells: Callable[[Row], list[str]], explained: str
) -> str | None:
    rows = device.parts.get(part)
    if not rows:
        return None
    run = device.parts["run"]
    dirty = " with local changes" if run["dirty"] else ""
    stamp = f"commit {run['commit'] or 'unknown'}{dirty}, {run['date'][:10]}"
    where = f"**{device.name}; {stamp}** (torch {run['torch']}, timm {run['timm']})."
    noise = max((abs(row["noise"] - 1) for row in rows if "noise" in row), default=0.0)
    said = f"Medians; ratios above 1: faster; the first variant differs from itself by up to {noise:.1%}."
    return "\n".join([f"{where} {explained} {said}", "", *table(head, map(cells, rows))])


def _ms(variant: Row, images: int = 1) -> str:
    return number(variant["ms"] / images) if "ms" in variant else "not timed"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}×"
