"""The least time of every op and of whole models, from config, batch and what the device can do.

    python benchmarks/roofline.py [--model NAME ...] [--batch N] [--class-token-only] [--ceilings FILE] [--json]

The time of an op is that of its matrix products at the highest rate, or that of its bytes at the highest rate,
whichever is longer (benchmarks/core/work.py counts both). For a model:

floor      matrix products alone
roofline   the sum over its kernels, with norms, activations and residuals inside the products
exposed    the same, with these as kernels of their own: what a compiler makes of a model
fp8        all products; "fp8 linear": those of the blocks, while attention and patches stay in bf16
training   forward and backward

At batch 1 weights have to be read for a single image: the floor is the longer of reading them and computing, if both
overlap perfectly, and their sum if not at all.

Without --ceilings the rates are those of an H200: 790 TFLOP/s in bf16 and 4.3 TB/s as measured, 1501 TFLOP/s in fp8.
--ceilings takes a benchmark's JSON, whose run measured its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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


def floors(config: ViTConfig, batch: int, ceilings: Ceilings, class_token_only: bool = False) -> dict[str, Any]:
    """All figures of a model: images/s at `batch`, us at batch 1; None where the device has no such rate."""
    last = dict(class_token_only_last_block=class_token_only)

    def parts(images: int, dtype: str = "bf16", **options: Any) -> list[work.Part]:
        return work.parts(config, images, dtype, **last, **options)

    def rate(time, images: int = batch, **options: Any) -> float | None:
        return None if _missing(ceilings, options) else images / time(parts(images, **options), ceilings)

    def latency(time, **options: Any) -> float | None:
        return None if _missing(ceilings, options) else 1e6 * time(parts(1, **options), ceilings)

    fp8_linear = dict(linear_dtype="fp8")
    weights = work.parameters(config)
    flops = {part.name: part.count * part.work.flops for part in parts(1)}
    forward = sum(flops.values())
    return {
        "gflop": forward / 1e9,
        "gflop_training": work.model(config, 1, "bf16", training=True, **last).flops / 1e9,
        "attention_share": (flops.get("attention", 0) + flops.get("last attention", 0)) / forward,
        "inference": {
            "floor_bf16": rate(compute), "roofline_bf16": rate(roofline), "exposed_bf16": rate(roofline, fused=False),
            "floor_fp8": rate(compute, dtype="fp8"), "roofline_fp8_linear": rate(roofline, **fp8_linear),
        },
        "training": {
            "floor_bf16": rate(compute, training=True), "roofline_bf16": rate(roofline, training=True),
            "floor_fp8_linear": rate(compute, training=True, **fp8_linear),
        },
        "batch_1_us": {
            "weights_bf16": 1e6 * weights * 2 / ceilings.bandwidth, "compute_bf16": latency(compute),
            "weights_fp8": 1e6 * weights / ceilings.bandwidth, "compute_fp8": latency(compute, dtype="fp8"),
            "roofline_bf16": latency(roofline), "roofline_fp8_linear": latency(roofline, **fp8_linear),
        },
    }  # fmt: skip


def _missing(ceilings: Ceilings, options: Mapping[str, Any]) -> bool:
    return "fp8" in options.values() and "fp8" not in ceilings.flops


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


def print_models(table: Mapping[str, dict[str, Any]], batch: int) -> None:
    print(f"images/s at batch {batch}, us at batch 1\n")
    head = (
        "model", "GFLOP", "training", "attention", "floor bf16", "roofline", "exposed", "floor fp8", "fp8 linear",
        "train bf16", "roofline", "fp8 linear", "b1 weights/compute bf16", "fp8", "roofline bf16", "fp8 linear",
    )  # fmt: skip
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name, row in table.items():
        one = row["batch_1_us"]
        cells = [
            name, f"{row['gflop']:.2f}", f"{row['gflop_training']:.1f}", f"{row['attention_share']:.1%}",
            *map(_number, row["inference"].values()), *map(_number, row["training"].values()),
            f"{_number(one['weights_bf16'])} / {_number(one['compute_bf16'])}",
            f"{_number(one['weights_fp8'])} / {_number(one['compute_fp8'])}",
            _number(one["roofline_bf16"]), _number(one["roofline_fp8_linear"]),
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


def print_ops(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n")
    head = ("op", "dtype", "runs", "GFLOP", "MB", "FLOP/byte", "compute us", "memory us", "limit")
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        numbers = (_number(row[name]) for name in ("gflop", "mb", "flop_per_byte", "compute_us", "memory_us"))
        print(f"| {row['op']} | {row['dtype']} | {row['runs']} | {' | '.join(numbers)} | {row['limit']} |")
    total = sum(max(row["compute_us"], row["memory_us"]) for row in rows)
    print(f"\ntogether {_number(total)} us")


def _number(value: float | None) -> str:
    if value is None:
        return "no rate"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", help="names of vitfast.list_models(); also prints their ops")
    parser.add_argument("--image-size", type=int, help="other than the models' own")
    parser.add_argument("--batch", type=int, default=256, help="images (default 256)")
    parser.add_argument("--class-token-only", action="store_true", help="the last block computes only what is pooled")
    parser.add_argument("--ceilings", type=Path, help="JSON file of a benchmark on the device")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    args = parser.parse_args()
    try:
        ceilings = read_ceilings(args.ceilings) if args.ceilings else H200
        if args.batch < 1:
            raise ValueError(f"roofline: --batch must be at least 1, got {args.batch}")
        size = {"img_size": args.image_size} if args.image_size else {}
        models = {name: config_for(name, **size) for name in args.model} if args.model else MODELS
        table = {name: floors(config, args.batch, ceilings, args.class_token_only) for name, config in models.items()}
        modes = {
            "inference, bf16": {}, "inference, fp8 linear": dict(linear_dtype="fp8"),
            "training, bf16": dict(training=True),
        }  # fmt: skip
        ops = {
            f"{name}, {mode}, batch {batch}": op_table(
                config, batch, ceilings, class_token_only_last_block=args.class_token_only, **options
            )
            for name, config in (models.items() if args.model else ())
            for mode, options in modes.items()
            for batch in sorted({1, args.batch})
            if not (_missing(ceilings, options) or (batch == 1 < args.batch and "training" in options))
        }
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        print(f"roofline: {error}" if not str(error).startswith("roofline") else error, file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps({"ceilings": asdict(ceilings), "batch": args.batch, "models": table, "ops": ops}, indent=2))
        return 0
    print(f"{ceilings.source}; ", end="")
    print_models(table, args.batch)
    for title, rows in ops.items():
        print_ops(title, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
