"""What runs where nobody tuned: the one place that every built-in choice comes from.

For an architecture that a record exists of (`benchmarks/results/*-tune.json`) the choice is what was fastest there, in
a table that `benchmarks/gpu/defaults.py` writes: `measured_sm90.json` and its like. It has a row for each kernel and
shape that was measured; a call takes the row of its own class that is nearest in size, as far as that is within a
factor of two. A class is everything in the key of a shape but its sizes: dtypes (one for both half precisions, whose
instructions are the same), widths of the layers, what is around the product. Sizes are rows, heads of all images,
tokens.

Everything else is unmeasured, and the choice a careful one: kernels where their counts of bytes and instructions leave
little doubt, cuBLAS with our kernels before and after it, or stock operators.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vitfast.choose import config_tables

Config = Mapping[str, int | str]
Shape = tuple[Hashable, ...]

SCHEMA = 1
FOLDER = Path(__file__).parent
# for tests of kernels, which would test little where stock operators are the choice; the interpreter does likewise
EVERYWHERE = os.environ.get("VITFAST_KERNELS_EVERYWHERE") == "1"
HOST = "of stock operators' time some may be the host's"
# of the logarithms of two sizes: a factor of two
NEAR = 1.0
# where in a key the sizes are: those kept as bit lengths, and those kept as they are
BITS = {"attention": (1,), "layer_norm": (1,), "linear": (2,), "folded_linear": (2,), "added_linear": (2,), "mlp": (2,),
        "patch_embed": (2,), "prepared_block": (1,)}  # fmt: skip
LENGTHS = {"attention": (2, 3)}
# rows of an MLP: fewer do not fill a device; and so many keep every multiprocessor busy with tiles of 64
LEAST_ROWS, WHOLE_ROWS = 512, 8192
SAFE_KEYS = 256
# ways to compute the same by kernels too: there the other way is no stock operators
FORMS = ("prepared_block",)


class Builtin(NamedTuple):
    """A choice: the kernel with this configuration (None: as its launcher chooses), or stock operators.

    Of stock operators the configuration says which, where there are several. `reason` is in words.
    """

    kernel: bool
    config: Config | None
    reason: str


class Measured(NamedTuple):
    """A row of a table: the choice, and times of stock operators by those of the fastest configuration, by card.

    Of stock operators that started one after the other and not in a graph the time may be the host's: such a ratio says
    who is faster, and not by how much.
    """

    kernel: str
    shape: Shape
    choice: Builtin
    ratio: Mapping[str, float]
    host: bool = False


# what `dispatch` takes there in place of the tables
ALWAYS = Builtin(True, None, "the kernel wherever it can run (Triton's interpreter, or VITFAST_KERNELS_EVERYWHERE)")


@functools.lru_cache(maxsize=4096)
def builtin(kernel: str, shape: Shape, arch: int) -> Builtin:
    """The choice for a call where nobody tuned.

    Args:
        kernel: a name of `dispatch.KERNELS`.
        shape: what the op asks `dispatch.choose` with.
        arch: of `config_tables.ARCHITECTURES`.
    """
    return _nearest(kernel, shape, arch) or careful(kernel, shape, arch)


def path_of(arch: int) -> Path:
    """The file of an architecture's table."""
    return FOLDER / f"measured_sm{arch}.json"


@functools.cache
def table(arch: int) -> tuple[Measured, ...]:
    """What was measured on cards of this architecture; nothing where there is no record."""
    path = path_of(arch)
    return parsed(json.loads(path.read_text())) if path.exists() else ()


def parsed(data: Mapping[str, Any]) -> tuple[Measured, ...]:
    """The rows of a table's file.

    Raises:
        ValueError: it is of another schema.
    """
    if data.get("schema") != SCHEMA:
        raise ValueError(f"a table of built-in choices has schema {data.get('schema')!r}, expected {SCHEMA}")
    return tuple(
        Measured(
            row["kernel"], tuple(row["shape"]), Builtin(row["use"] == "kernel", row["config"], reason_of(row)),
            row["ratio"], row.get("host", False),
        )
        for row in data["rows"]
    )  # fmt: skip


def configs(arch: int, *kernels: str) -> list[Config]:
    """What the table of an architecture runs these kernels with, each once."""
    found = [row.choice.config for row in table(arch) if row.kernel in kernels and row.choice.kernel]
    return [config for i, config in enumerate(found) if config is not None and config not in found[:i]]


def reason_of(row: Mapping[str, Any]) -> str:
    """A row in words."""
    each = ", ".join(f"{ratio:.2f} x stock on {card}" for card, ratio in row["ratio"].items())
    each += f" ({', '.join(row['records'])})"
    lost = "" if row["use"] == "kernel" else "not faster beyond the noise: "
    notes = [row.get("note"), HOST if row.get("host") else None]
    return "; ".join(filter(None, [f"measured: {lost}{each}", *notes]))


def class_and_sizes(kernel: str, shape: Shape) -> tuple[Shape, tuple[float, ...]]:
    """All of a key but its sizes, and their logarithms to base 2."""
    op = kernel.removesuffix("_backward")
    places, lengths = BITS.get(op, ()), LENGTHS.get(op, ())
    sizes = [float(shape[i]) for i in places] + [math.log2(shape[i]) for i in lengths]
    rest = [part for i, part in enumerate(shape) if i not in (*places, *lengths)]
    return tuple("bfloat16" if part == "float16" else part for part in rest), tuple(sizes)


@functools.cache
def _by_class(arch: int) -> dict[tuple[str, Shape], list[tuple[tuple[float, ...], Measured]]]:
    found: dict[tuple[str, Shape], list[tuple[tuple[float, ...], Measured]]] = {}
    for row in table(arch):
        kind, sizes = class_and_sizes(row.kernel, row.shape)
        found.setdefault((row.kernel, kind), []).append((sizes, row))
    return found


def _nearest(kernel: str, shape: Shape, arch: int) -> Builtin | None:
    if not shape:
        return None
    kind, sizes = class_and_sizes(kernel, shape)
    near = []
    for known, row in _by_class(arch).get((kernel, kind), ()):
        apart = [abs(a - b) for a, b in zip(sizes, known, strict=True)]
        if max(apart, default=0.0) <= NEAR and _takes(row.choice, kernel, shape):
            # of two that are as near that of the call's own dtype
            near.append((sum(apart), shape[0] != row.shape[0], known, row.choice))
    return min(near, key=lambda each: each[:3])[3] if near else None


def _takes(choice: Builtin, kernel: str, shape: Shape) -> bool:
    """Whether what ran a near size runs this one too."""
    if not choice.kernel or choice.config is None or not kernel.startswith("attention"):
        return True
    return shape[3] <= longest(kernel, str(choice.config["kernel"]))


@functools.cache
def longest(kernel: str, way: str) -> int:
    """Keys that attention's forward or backward takes at most where it is computed in this way."""
    tables = config_tables.BACKWARD if kernel.endswith("_backward") else config_tables.FORWARD
    return max(row.keys for table in tables.values() for row in table if row.config.kernel == way)


# unmeasured


def _kernel(why: str, config: Config | None = None) -> Builtin:
    return Builtin(True, config, f"unmeasured: {why}")


def _stock(why: str) -> Builtin:
    return Builtin(False, None, f"unmeasured: {why}")


def careful(kernel: str, shape: Shape, arch: int) -> Builtin:
    """The choice for a call of which nothing was measured."""
    op = kernel.removesuffix("_backward")
    if op == "attention":
        return _careful_attention(kernel, shape)
    if op in FORMS:
        return _stock("the five kernels of a prepared block")
    if op == "layer_norm":
        return _kernel("a norm is one pass over memory, and the kernel needs no other")
    if op == "patch_embed":
        if shape[1] == "float32" and shape[-1] != "rows":
            return _stock("products of fp32 are not for tensor cores, and cuDNN's are as good as any")
        return _kernel("the kernel reads every pixel once and writes no patches")
    return _careful_product(kernel, shape, arch)


def _careful_attention(kernel: str, shape: Shape) -> Builtin:
    if not shape:
        return _kernel("with dropout, lengths or packed sequences stock operators keep all weights of all heads")
    dtype, _, _, keys, head_dim = shape
    if dtype == "float32" or head_dim % 8:
        return _kernel("stock operators would keep all weights of all heads")
    if kernel == "attention" and keys <= SAFE_KEYS:
        return _kernel(f"up to {SAFE_KEYS} keys the kernel reads and writes what it must, and no copies are made")
    return _stock("flash attention of PyTorch")


BLAS = config_tables.BLAS.as_dict()


def _careful_product(kernel: str, shape: Shape, arch: int) -> Builtin:
    words = str(shape[5]).split()
    if kernel.startswith("mlp"):
        return _careful_mlp(kernel, shape, words, arch)
    # norm and activation are the first two
    alone = words in ([], ["none", "none"]) or (kernel == "linear" and words[:2] == ["none", "none"])
    if alone:
        return _stock("a product is what cuBLAS is for")
    if kernel == "linear_backward":
        return _kernel("products by cuBLAS, what is around them by kernels of one pass each")
    return _kernel("the product by cuBLAS, what is around it by kernels of one pass each", BLAS)


def _careful_mlp(kernel: str, shape: Shape, words: list[str], arch: int) -> Builtin:
    rows, hidden, width = shape[2:5]
    if kernel == "mlp":
        # one kernel for both layers keeps nothing of a row that a backward would read
        keeps = words[-1] in ("none", "act") or (words[-1] == "fc1" and "scaled" in words)
        half = shape[0] == shape[1] != "float32"
        if half and not keeps and "gated" not in words and rows >= WHOLE_ROWS.bit_length():
            whole = config_tables.WHOLE[arch].get(width) if width in config_tables.WHOLE_FIRST.get(arch, ()) else None
            if whole is not None and hidden % whole.block_n == 0:
                return _kernel("both layers in one kernel, which hidden numbers never leave", whole.as_dict())
        if rows < LEAST_ROWS.bit_length():
            return _stock(f"fewer than {LEAST_ROWS} rows do not fill a device")
    return _kernel("products by cuBLAS, what is around them by kernels of one pass each", BLAS)


# in words


def summary(kernel: str, arch: int) -> str:
    """What the table of an architecture has of a kernel."""
    rows = [row for row in table(arch) if row.kernel == kernel]
    if not rows:
        return f"unmeasured on sm_{arch}"
    cards = ", ".join(dict.fromkeys(card for row in rows for card in row.ratio))
    won = [ratio for row in rows if row.choice.kernel and not row.host for ratio in row.ratio.values()]
    ratios = f" ({min(won):.2f} to {max(won):.2f} x stock)" if won else ""
    ours = sum(row.choice.kernel for row in rows)
    shapes = f"{len(rows)} shape" + "s" * (len(rows) > 1)
    return f"measured for {shapes} on {cards}: the kernel for {ours}{ratios}, stock for {len(rows) - ours}"
