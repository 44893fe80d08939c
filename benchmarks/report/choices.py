"""The tables of built-in choices: from `vitfast.choose.builtin`, whose tables ops read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import vitfast
from benchmarks.report.tables import Line, table
from vitfast.choose import builtin, config_tables
from vitfast.choose.builtin import Measured

ROOT = Path(vitfast.__file__).parents[1]
NUMBER = re.compile(r" [0-9.]+ us$")
# of a configuration, what stands in it under "kernel"
KINDS = {"blas": "cuBLAS and kernels around it", "tiles": "one kernel", "whole": "one kernel for both layers"}
WORDS = {"layer": "LayerNorm before", "none": "", "gelu": "GELU after", "around": "residual after",
         "wide": "in fp32", "pieces": "statistics given", "act": "its input kept"}  # fmt: skip
DTYPES = {"float16": "fp16", "float32": "fp32", "bfloat16": ""}
# what stands for a form where none of its shapes was measured: many rows, of which a model has most
ELSEWHERE: dict[str, tuple[str, builtin.Shape]] = {
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
}


def choices() -> str:
    """A table for each architecture that was measured, and one of what is chosen elsewhere."""
    measured = [arch for arch in config_tables.ARCHITECTURES if builtin.table(arch)]
    known = ", ".join(f"sm_{arch}" for arch in measured)
    where = f"other architectures than {known}, and other shapes there" if measured else "on every architecture"
    return "\n\n".join([*map(_measured, measured), f"**Where nothing was measured**: {where}.", table(_elsewhere())])


def form(row: Measured) -> str:
    """What is around the product, or how wide a head is, in words; and the dtype where it is another than bf16."""
    op = row.kernel.removesuffix("_backward")
    if op == "attention":
        words = [f"head dim {row.shape[4]}"]
    elif op == "patch_embed":
        words = [str(row.shape[7])]
    else:
        words = [WORDS.get(word, word) for word in str(row.shape[-1]).split()]
        words = list(filter(None, words)) or ["residual after" if op == "added_linear" else "alone"]
    return ", ".join(filter(None, [*words, DTYPES.get(str(row.shape[0]), str(row.shape[0]))]))


def _measured(arch: int) -> str:
    rows, groups = builtin.table(arch), {}
    for row in rows:
        groups.setdefault((row.kernel, form(row)), []).append(row)
    cards = ", ".join(dict.fromkeys(card for row in rows for card in row.ratio))
    dtype = ", bf16" if all(row.shape[0] == "bfloat16" for row in rows) else ""
    heading = (
        f"**sm_{arch}, measured on {cards}**{dtype}; ratios: the fastest stock operators' time by the kernel's. "
        f"Each shape's choice is a line of `{builtin.path_of(arch).relative_to(ROOT).as_posix()}`."
    )
    return f"{heading}\n\n{table(_line(*name, found) for name, found in groups.items())}"


def _line(kernel: str, form: str, rows: Sequence[Measured]) -> Line:
    ours, stock = ([row for row in rows if row.choice.kernel is mine] for mine in (True, False))
    # how the kernel is computed, and by which stock operators, each with its number of shapes; and what else is said
    kinds = KINDS | ({"tiles": "fc1 by a kernel, the rest as there"} if kernel == "prepared_block" else {})
    ways = Counter(kinds.get(_kind(row.choice), "") for row in ours)
    ways += Counter("cuDNN" if row.choice.config else "" for row in stock)
    listed = ", ".join(f"{words} {count}" for words, count in ways.items() if words)
    # the same in words, with other numbers in each row
    notes = dict.fromkeys(NUMBER.sub("", note) for row in (*ours, *stock) for note in row.choice.reason.split("; ")[1:])
    return {
        "kernel": f"`{kernel}`", "form": form, "shapes": len(rows), "kernel runs": len(ours),
        "its ratio there": _range(ours), "stock runs": len(stock), "kernel's ratio there": _range(stock),
        "as": "; ".join(filter(None, [listed, *notes])) or None,
    }  # fmt: skip


def _kind(choice: builtin.Builtin) -> str:
    return str((choice.config or {}).get("kernel"))


def _range(rows: Sequence[Measured]) -> str | None:
    found = [ratio for row in rows if not row.host for ratio in row.ratio.values()]
    return "-".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (min(found), max(found)))) + "×" if found else None


def _elsewhere() -> list[Line]:
    lines = []
    for words, (kernel, shape) in ELSEWHERE.items():
        found = builtin.careful(kernel, shape, 90)
        way = KINDS.get(_kind(found), "the kernel") if found.kernel else "stock operators"
        lines.append({"": words, "runs as": way, "because (unmeasured)": found.reason.removeprefix("unmeasured: ")})
    return lines
