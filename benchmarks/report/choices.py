"""The table of built-in choices: from `vitfast.choose.builtin`, whose tables ops read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from report_tables import table

import vitfast
from vitfast.choose import builtin, config_tables
from vitfast.choose.builtin import Measured

ROOT = Path(vitfast.__file__).parents[1]
NUMBER = re.compile(r" [0-9.]+ us$")
# of a configuration, what stands in it under "kernel"
KINDS = {"blas": "cuBLAS and kernels around it", "tiles": "one kernel", "whole": "one kernel for both layers"}
WORDS = {"layer": "LayerNorm before", "none": "", "gelu": "GELU after", "around": "residual after",
         "wide": "in fp32", "pieces": "statistics given", "act": "its input kept"}  # fmt: skip
DTYPES = {"float16": "fp16", "float32": "fp32"}


def choices() -> str:
    """A table for each architecture that was measured, and one of what is chosen elsewhere."""
    measured = [arch for arch in config_tables.ARCHITECTURES if builtin.table(arch)]
    parts = ["\n".join([_heading(arch), "", *_measured(builtin.table(arch))]) for arch in measured]
    return "\n\n".join([*parts, "\n".join([_elsewhere_heading(measured), "", *_elsewhere()])])


def form(row: Measured) -> str:
    """What is around the product, or how wide a head is, in words; and the dtype where it is another than bf16."""
    dtype = [] if row.shape[0] == "bfloat16" else [DTYPES.get(str(row.shape[0]), str(row.shape[0]))]
    return ", ".join([_around(row), *dtype])


def _around(row: Measured) -> str:
    op = row.kernel.removesuffix("_backward")
    if op == "attention":
        return f"head dim {row.shape[4]}"
    if op == "patch_embed":
        return str(row.shape[7])
    words = [WORDS.get(word, word) for word in str(row.shape[-1]).split()]
    return ", ".join(filter(None, words)) or ("residual after" if op == "added_linear" else "alone")


def _groups(rows: Iterable[Measured]) -> dict[tuple[str, str], list[Measured]]:
    found: dict[tuple[str, str], list[Measured]] = {}
    for row in rows:
        found.setdefault((row.kernel, form(row)), []).append(row)
    return found


def _heading(arch: int) -> str:
    cards = ", ".join(dict.fromkeys(card for row in builtin.table(arch) for card in row.ratio))
    dtype = ", bf16" if all(row.shape[0] == "bfloat16" for row in builtin.table(arch)) else ""
    return (
        f"**sm_{arch}, measured on {cards}**{dtype}; ratios: the fastest stock operators' time by the kernel's. "
        f"Each shape's choice is a line of `{builtin.path_of(arch).relative_to(ROOT).as_posix()}`."
    )


def _measured(rows: Sequence[Measured]) -> list[str]:
    head = ("kernel", "form", "shapes", "kernel runs", "its ratio there", "stock runs", "kernel's ratio there", "as")
    return table(head, [_cells(*item) for item in _groups(rows).items()])


def _cells(name: tuple[str, str], rows: Sequence[Measured]) -> list[str]:
    ours, stock = ([row for row in rows if row.choice.kernel is mine] for mine in (True, False))
    return [f"`{name[0]}`", name[1], str(len(rows)), str(len(ours)), _range(ours), str(len(stock)), _range(stock),
            _ways(ours, stock)]  # fmt: skip


def _range(rows: Sequence[Measured]) -> str:
    found = [ratio for row in rows if not row.host for ratio in row.ratio.values()]
    return "-".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (min(found), max(found)))) + "×" if found else "-"


def _ways(ours: Sequence[Measured], stock: Sequence[Measured]) -> str:
    """How the kernel is computed, and which stock operators, each with its number of shapes; and what else is said."""
    found = Counter(KINDS.get(str((row.choice.config or {}).get("kernel")), "") for row in ours)
    found += Counter("cuDNN" if row.choice.config else "" for row in stock)
    listed = [f"{words} {count}" for words, count in found.items() if words]
    # the same in words, with other numbers in each row
    notes = dict.fromkeys(NUMBER.sub("", note) for row in (*ours, *stock) for note in row.choice.reason.split("; ")[1:])
    return "; ".join(filter(None, [", ".join(listed), *notes])) or "-"


# what stands for a form where none of its shapes was measured: many rows, of which a model has most
ELSEWHERE: Mapping[str, tuple[str, builtin.Shape]] = {
    "attention, up to 256 keys": ("attention", ("bfloat16", 10, 197, 197, 64)),
    "attention, more keys": ("attention", ("bfloat16", 10, 577, 577, 64)),
    "attention, backward": ("attention_backward", ("bfloat16", 10, 197, 197, 64)),
    "norms": ("layer_norm", ("bfloat16", 14, 768, "layer")),
    "patch embedding": ("patch_embed", ("bfloat16", "bfloat16", 14, 768, 3, 16, 16, "channels apart")),
    "patch embedding, fp32": ("patch_embed", ("float32", "float32", 14, 768, 3, 16, 16, "channels apart")),
    "a product alone, or with a residual": ("linear", ("bfloat16", "bfloat16", 14, 768, 768, "none none around")),
    "a norm, or an activation, and a product": ("linear", ("bfloat16", "bfloat16", 14, 2304, 768, "layer none")),
    "MLP": ("mlp", ("bfloat16", "bfloat16", 14, 3072, 768, "layer gelu")),
    "MLP of few rows": ("mlp", ("bfloat16", "bfloat16", 8, 3072, 768, "layer gelu")),
    "MLP of width 192 that keeps nothing": ("mlp", ("bfloat16", "bfloat16", 14, 768, 192, "layer gelu")),
    "MLP, backward": ("mlp_backward", ("bfloat16", "bfloat16", 14, 3072, 768, "layer gelu act")),
}  # fmt: skip


def _elsewhere_heading(measured: Sequence[int]) -> str:
    known = ", ".join(f"sm_{arch}" for arch in measured)
    where = f"other architectures than {known}, and other shapes there" if measured else "on every architecture"
    return f"**Where nothing was measured**: {where}."


def _elsewhere() -> list[str]:
    lines = []
    for words, (kernel, shape) in ELSEWHERE.items():
        found = builtin.careful(kernel, shape, 90)
        way = KINDS.get(str((found.config or {}).get("kernel")), "the kernel") if found.kernel else "stock operators"
        lines.append([words, way, found.reason.removeprefix("unmeasured: ")])
    return table(("", "runs as", "because (unmeasured)"), lines)
