"""What the kernels of a prepared block should take on Hopper, pipe by pipe, before and after a GPU has run them.

    python -m benchmarks estimate [--model NAME] [--batch N] [--tokens N] [--record FILE]

A product's tiles go through five pipes; each is charged with all that its kernel makes it do (microseconds):

tensor      matrix instructions, overhanging tiles in full, at the rate that cuBLAS was measured to sustain
issue       instructions around the products, as counted in the compiled kernel (benchmarks/aot.json), one a cycle and
            scheduler, at the clock that was sustained then
special     exponentials of the activation, 16 a cycle and multiprocessor
l2          bytes of tiles' operands, and what is read and written once a number
dram        bytes that have to cross once, if the L2 cache keeps the rest

`floor`     the longer of the useful products and the bytes that have to cross: no kernel is faster
`overlap`   the longest pipe, as if all ran side by side; few tiles leave a higher clock, and may take a tenth less
`serial`    loading or multiplying, and then the epilogue: as if nothing overlapped
`measured`  of the record of a sweep (benchmarks/results/nvidia-h200-tune.json), as a multiple of `overlap`: of the
            kernels of the record's commit, while instructions are counted in those of today

Each but `dram` is of the busiest multiprocessor. Attention is charged with its products over padded keys, with an
exponential a logit and with what crosses; instructions of its softmax and bytes from the L2 cache nobody has counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.core import record
from benchmarks.gpu import defaults
from benchmarks.roofline import print_table
from vitfast.choose import config_tables
from vitfast.choose.config_tables import Product
from vitfast.timm_names.variants import config_for

HERE = Path(__file__).parent
CEILINGS, TUNED = HERE / "results" / "nvidia-h200-models.json", HERE / "results" / "nvidia-h200-tune.json"
ARCH = 90
# of a multiprocessor and cycle: instructions, special functions, bytes from the L2 cache. The record has products whose
# operands came at 10 TB/s, four fifths of 64 bytes
SCHEDULERS, SPECIAL, L2_BYTES = 4, 16, 64
# special functions a number: GELU by erf has an exponential
SPECIALS = {"none": 0, "gelu": 1}


@dataclass(frozen=True)
class Device:
    """What a card sustained: FLOP/s in bf16, bytes/s, clock of a multiprocessor under that load, in Hz."""

    name: str
    multiprocessors: int
    flops: float
    bandwidth: float
    clock: float


def read_device(file: Path) -> Device:
    """
    Raises:
        ValueError: the record has no ceilings of a GPU.
    """
    read = record.read(file)
    found, run = read["ceilings"], read["run"]
    try:
        bf16 = found["matmul"]["bf16"]
        return Device(
            run["device"], run.get("multiprocessors", 132), bf16["tflops"] * 1e12, found["copy"]["gbps"] * 1e9,
            bf16["state"]["sm_mhz"] * 1e6,
        )  # fmt: skip
    except KeyError as missing:
        raise ValueError(f"estimate: {file} has no measured {missing} of a GPU") from None


@dataclass(frozen=True)
class Layer:
    """A product of a prepared block: [M, K] x [K, N], what is around it, and its name in records and compilations."""

    name: str
    M: int
    N: int
    K: int
    form: str
    act: str = "none"
    residual: bool = False


def layers(width: int, hidden: int, rows: int) -> list[Layer]:
    return [
        Layer("qkv", rows, 3 * width, width, "pieces"),
        Layer("proj", rows, width, width, "residual pieces", residual=True),
        Layer("fc1", rows, hidden, width, "pieces gelu", "gelu"),
        Layer("fc2", rows, width, hidden, "residual pieces", residual=True),
    ]


def compiled_name(config: Product, form: str) -> str:
    from vitfast.kernels.triton import linear

    return f"linear/{linear._product_compilation(config, form, linear.AROUND[form], 1).name} sm_{ARCH}"


def pipes(layer: Layer, config: Product, epilogue: int, device: Device) -> dict[str, float]:
    """Microseconds that each pipe is busy, and what becomes of them; `epilogue` in instructions a warp."""
    BM, BN, M, N, K = config.block_m, config.block_n, layer.M, layer.N, layer.K
    tiles = -(-M // BM) * -(-N // BN)
    depth = -(-K // config.block_k) * config.block_k
    slots = device.multiprocessors * config.programs
    # of the busiest multiprocessor
    each = -(-tiles // slots) * config.programs if tiles > slots else -(-tiles // device.multiprocessors)
    once = 2 * (M * K + N * K + M * N * (2 if layer.residual else 1))
    moved = 2 * ((BM + BN) * depth + BM * BN * (2 if layer.residual else 1))
    us = {
        "tensor": each * 2 * BM * BN * depth / (device.flops / device.multiprocessors),
        "issue": each * epilogue * config.warps / SCHEDULERS / device.clock,
        "special": each * BM * BN * SPECIALS[layer.act] / SPECIAL / device.clock,
        "l2": each * moved / L2_BYTES / device.clock,
        "dram": once / device.bandwidth,
    }
    us = {name: seconds * 1e6 for name, seconds in us.items()}
    floor = max(2e6 * M * N * K / device.flops, us["dram"])
    ahead, behind = max(us["tensor"], us["l2"], us["dram"]), max(us["issue"], us["special"])
    waves = tiles / slots
    return {"tiles": tiles, "waves": waves} | us | {
        "floor": floor, "overlap": max(ahead, behind), "serial": ahead + behind,
    }  # fmt: skip


def attention(B: int, N: int, H: int, head_dim: int, device: Device) -> dict[str, float]:
    """The forward of unmasked attention with tiles of 64 queries and keys in parts of 16."""
    queries, keys = -(-N // 64) * 64, -(-N // 16) * 16
    useful, done = (4.0 * B * H * n * head_dim for n in (N * N, queries * keys))
    tiles = B * H * queries // 64
    # of the busiest multiprocessor, of those there would be if all were as busy
    busy = -(-tiles // device.multiprocessors) * device.multiprocessors / tiles
    dram = 2 * 4 * B * N * H * head_dim / device.bandwidth * 1e6
    tensor = busy * done / device.flops * 1e6
    special = busy * B * H * queries * keys / SPECIAL / device.multiprocessors / device.clock * 1e6
    floor = max(useful / device.flops * 1e6, dram)
    return {
        "tiles": tiles, "waves": tiles / device.multiprocessors, "tensor": tensor, "special": special, "dram": dram,
        "floor": floor, "overlap": max(tensor, special, dram), "serial": max(tensor, dram) + special,
    }  # fmt: skip


def measured(rows: dict[str, Any], key: str) -> Iterator[tuple[dict[str, Any] | None, str, float]]:
    """(configuration, name, us) of what a record has under a row's key."""
    for name, found in rows.get(key, {}).get("variants", {}).items():
        if "ms" in found:
            yield found.get("config"), name, found["ms"] * 1e3


def row(kernel: str, how: str, us: dict[str, float], taken: float | None) -> dict[str, Any]:
    more = "" if taken is None else f"{taken / us['overlap']:.2f}x"
    return {"kernel": kernel, "as": how} | us | {"measured": "" if taken is None else taken, "over overlap": more}


def words(config: Product) -> str:
    how = f"persistent{config.programs}" if config.persistent else ""
    more = [how, "flatten" * config.flatten, "ahead" * config.ahead]
    tile = f"{config.block_m}x{config.block_n}x{config.block_k} w{config.warps} p{config.parts}"
    return " ".join([tile, *filter(None, more)])


def block(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sums of the least that each kernel has in a column; blank where one has nothing."""
    sums: dict[str, Any] = {}
    for name in ("floor", "overlap", "serial", "measured"):
        least: dict[str, float] = {}
        for each in rows:
            # not cuBLAS alone, which is no form of the kernel
            if each.get(name) and each.get("floor"):
                least[each["kernel"]] = min(each[name], least.get(each["kernel"], each[name]))
        sums[name] = sum(least.values()) if least.keys() == {each["kernel"] for each in rows} else ""
    return {"kernel": "block", "as": "the least of each"} | sums


def table(name: str, batch: int, tokens: int | None, device: Device, tuned: Path | None) -> list[dict[str, Any]]:
    """A row a kernel and configuration of one block, the fastest expected first.

    Raises:
        ValueError: no such model, or a record that is none.
    """
    model = config_for(name)
    H, D = model.heads, model.dim
    N = tokens or model.num_patches + model.num_prefix_tokens
    compiled = json.loads((HERE / "aot.json").read_text())["rows"]
    rows = {} if tuned is None else defaults.read(tuned)["rows"]
    found = []
    key = f"attention forward H{H} B{batch} N{N} D{D // H}"
    ours = [us for config, _, us in measured(rows, key) if config and "block_m" in config]
    found.append(row("attention", "", attention(batch, N, H, D // H, device), min(ours, default=None)))
    candidates = [each.config for each in config_tables.PRODUCT[ARCH] if each.bits == 16]
    for layer in layers(D, model.mlp_dim, batch * N):
        times = {}
        for config, called, us in measured(rows, f"prepared {layer.name} D{D} B{batch} N{N}"):
            if config and config["kernel"] == "tiles":
                times[Product(**config)] = us
            elif called.startswith("("):
                found.append({"kernel": layer.name, "as": called.strip("()"), "measured": us})
        each = []
        for config in dict.fromkeys([*candidates, *times]):
            known = compiled.get(compiled_name(config, layer.form)) if config.kernel == "tiles" else None
            # tiles that are for few rows
            if known and config.descriptors and config.block_m * config.block_n >= 128 * 128:
                us = pipes(layer, config, known["epilogue"], device)
                each.append(row(layer.name, words(config), us, times.get(config)))
        found += sorted(each, key=lambda each: each["overlap"])
    found.append(block(found))
    columns = list(dict.fromkeys(name for each in sorted(found, key=len, reverse=True) for name in each))
    return [{name: each.get(name, "") for name in columns} for each in found]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks estimate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="a name of vitfast.list_models()")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--tokens", type=int, help="of an image, where they are others than the model's")
    parser.add_argument("--ceilings", type=Path, default=CEILINGS, help="record of models on a GPU: what it sustains")
    parser.add_argument("--record", type=Path, default=TUNED, help="record of a sweep there")
    args = parser.parse_args(argv)
    try:
        if args.batch < 1 or (args.tokens is not None and args.tokens < 1):
            raise ValueError(f"estimate: --batch and --tokens must be at least 1, got {args.batch} and {args.tokens}")
        device = read_device(args.ceilings)
        rows = table(args.model, args.batch, args.tokens, device, args.record)
    except (ValueError, OSError) as error:
        print(error if str(error).startswith("estimate") else f"estimate: {error}", file=sys.stderr)
        return 1
    rates = f"{device.flops / 1e12:.0f} TFLOP/s, {device.bandwidth / 1e12:.2f} TB/s, {device.clock / 1e9:.2f} GHz"
    print_table(f"{args.model}, {args.batch} images, {device.name} ({rates} sustained); us", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
