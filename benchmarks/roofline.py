"""The least time of every op and of whole models, from config, batch and what the device can do.

    python -m benchmarks.roofline [--model NAME ...] [--batch N] [--ceilings FILE]

The time of an op is that of its matrix products at the highest rate, or that of its bytes at the highest rate,
whichever is longer (benchmarks/core/work.py counts both). For a model:

floor      matrix products alone
roofline   the sum over its kernels, with norms, activations and residuals inside the products
exposed    the same, with these as kernels of their own: what a compiler makes of a model
fp8        all products; "fp8_linear": those of the blocks, while attention and patches stay in bf16
training   forward and backward

At batch 1 weights have to be read for a single image: the floor is the longer of reading them and computing, if both
overlap perfectly, and their sum if not at all.

Without --ceilings the rates are those of an H200: 790 TFLOP/s in bf16 and 4.3 TB/s as measured, 1501 TFLOP/s in fp8.
--ceilings takes a benchmark's JSON, whose run measured its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.core import record, work
from vitfast import ViTConfig
from vitfast.check.case import Work
from vitfast.timm_names.variants import config_for

MODELS = {
    f"{name} {size}": config_for(name, img_size=size, num_classes=1000)
    for name, sizes in {
        "vit_tiny_patch16_224": (224,), "vit_small_patch16_224": (224, 384), "vit_base_patch16_224": (224, 384),
        "vit_large_patch16_224": (224, 384), "vit_huge_patch14_224": (224,), "vit_small_patch14_dinov2": (518,),
        "vit_base_patch14_dinov2": (518,), "vit_large_patch14_dinov2": (518,),
    }.items()
    for size in sizes
}  # fmt: skip


@dataclass(frozen=True)
class Ceilings:
    """What a device can do: FLOP/s by dtype, bytes/s, and whence these figures are."""

    flops: Mapping[str, float]
    bandwidth: float
    source: str

    def times(self, done: Work, dtype: str) -> tuple[float, float]:
        """Seconds that the products and the bytes of `done` need.

        Raises:
            ValueError: products in a dtype whose rate is not known.
        """
        if done.flops and dtype not in self.flops:
            raise ValueError(f"roofline: no {dtype} rate in {self.source}, only {', '.join(self.flops)}")
        return done.flops / self.flops[dtype] if done.flops else 0.0, done.bytes / self.bandwidth


H200 = Ceilings({"bf16": 790e12, "fp16": 790e12, "fp8": 1501e12}, 4.3e12, "H200 (790 TFLOP/s bf16, 1501 fp8, 4.3 TB/s)")


def read_ceilings(file: Path) -> Ceilings:
    """What the run of a benchmark's JSON measured of its device.

    Raises:
        ValueError: the file is no record, or has none.
    """
    read = record.read(file)
    found = read["ceilings"]
    rates = {name: each["tflops"] * 1e12 for name, each in found.get("matmul", {}).items() if each.get("tflops")}
    gbps = found.get("copy", {}).get("gbps")
    if not rates or not gbps:
        raise ValueError(f"roofline: {file} has no measured ceilings")
    speeds = ", ".join(f"{rate / 1e12:.4g} TFLOP/s {name}" for name, rate in rates.items())
    source = f"{read['run']['device']} as measured in {file.name} ({speeds}, {gbps:.4g} GB/s)"
    return Ceilings(rates, gbps * 1e9, source)


def compute(parts: list[work.Part], ceilings: Ceilings) -> float:
    """Seconds of the matrix products alone."""
    return sum(part.count * ceilings.times(part.work, part.dtype)[0] for part in parts)


def roofline(parts: list[work.Part], ceilings: Ceilings) -> float:
    """Seconds when each kernel takes the longer of computing and moving bytes."""
    return sum(part.count * max(ceilings.times(part.work, part.dtype)) for part in parts)


FP8, LINEAR, TRAINING = {"dtype": "fp8"}, {"linear_dtype": "fp8"}, {"training": True}
# images/s, or us at batch 1: by what, and of which parts
FIGURES = {
    "inference floor_bf16": (compute, {}), "inference roofline_bf16": (roofline, {}),
    "inference exposed_bf16": (roofline, {"fused": False}), "inference floor_fp8": (compute, FP8),
    "inference roofline_fp8_linear": (roofline, LINEAR), "training floor_bf16": (compute, TRAINING),
    "training roofline_bf16": (roofline, TRAINING), "training floor_fp8_linear": (compute, LINEAR | TRAINING),
    "batch_1_us compute_bf16": (compute, {}), "batch_1_us compute_fp8": (compute, FP8),
    "batch_1_us roofline_bf16": (roofline, {}), "batch_1_us roofline_fp8_linear": (roofline, LINEAR),
}  # fmt: skip


def floors(config: ViTConfig, batch: int, ceilings: Ceilings, class_token_only: bool = False) -> dict[str, Any]:
    """All figures of a model; None where the device has no such rate."""
    last = dict(class_token_only_last_block=class_token_only)
    flops = {part.name: part.count * part.work.flops for part in work.parts(config, 1, "bf16", **last)}
    bytes_s = work.parameters(config) / ceilings.bandwidth
    found = {
        "gflop": sum(flops.values()) / 1e9,
        "gflop_training": work.model(config, 1, "bf16", training=True, **last).flops / 1e9,
        "attention_share": (flops.get("attention", 0) + flops.get("last attention", 0)) / sum(flops.values()),
        "batch_1_us weights_bf16": 2e6 * bytes_s, "batch_1_us weights_fp8": 1e6 * bytes_s,
    }  # fmt: skip
    for name, (time, options) in FIGURES.items():
        one = name.startswith("batch_1_us")
        if "fp8" in options.values() and "fp8" not in ceilings.flops:
            found[name] = None
            continue
        seconds = time(work.parts(config, 1 if one else batch, **{"dtype": "bf16"} | options | last), ceilings)
        found[name] = 1e6 * seconds if one else batch / seconds
    return found


def op_table(config: ViTConfig, batch: int, ceilings: Ceilings, **options: Any) -> list[dict[str, Any]]:
    """One row a kernel of the model: work and least time of all its runs."""
    rows = []
    for part in work.parts(config, batch, "bf16", **options):
        computing, moving = (part.count * seconds * 1e6 for seconds in ceilings.times(part.work, part.dtype))
        rows.append({
            "op": part.name, "dtype": part.dtype, "runs": part.count, "gflop": part.count * part.work.flops / 1e9,
            "mb": part.count * part.work.bytes / 1e6, "flop_per_byte": part.work.flops / part.work.bytes,
            "compute_us": computing, "memory_us": moving, "limit": "compute" if computing > moving else "memory",
        })  # fmt: skip
    return rows


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        return "no rate" if value is None else str(value)

    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print(f"| {' | '.join(map(cell, row.values()))} |")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", help="names of vitfast.list_models(); also prints their ops")
    parser.add_argument("--batch", type=int, default=256, help="images (default 256)")
    parser.add_argument("--ceilings", type=Path, help="JSON file of a benchmark on the device")
    args = parser.parse_args(argv)
    try:
        ceilings = read_ceilings(args.ceilings) if args.ceilings else H200
        if args.batch < 1:
            raise ValueError(f"roofline: --batch must be at least 1, got {args.batch}")
        models = {name: config_for(name) for name in args.model} if args.model else MODELS
        table = [{"model": name} | floors(config, args.batch, ceilings) for name, config in models.items()]
        print_table(f"{ceilings.source}; images/s at batch {args.batch}, us at batch 1", table)
        for name, config in models.items() if args.model else ():
            for mode, options in {"inference": {}, "training": TRAINING}.items():
                print_table(f"{name}, {mode}, bf16", op_table(config, args.batch, ceilings, **options))
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        print(error if str(error).startswith("roofline") else f"roofline: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
