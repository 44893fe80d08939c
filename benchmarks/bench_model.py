"""Time whole models against timm eager: inference and training step, in one run, in turns.

    python benchmarks/bench_model.py --device cpu [--models vit_small_patch16_224 ...] [--quick] [--json FILE]

Each row is timed only after its logits were checked against timm's on the same weights and images. The ratio is the
median over rounds of timm's time by ours, pair by pair; timm is timed twice a round, and its ratio to itself is the
noise. Rounds whose noise exceeds 3 % are measured again; "noisy" counts those that stayed above it
(see vitfast/timing.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from report import DTYPES, describe, heading, in_own_process, peak_growth_mib, relative_error, write_json, wrong

import vitfast
from vitfast.timing import inference, interleaved_medians, training_step

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")
TRAINED = ("vit_small_patch16_224",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=15.0, help="about how long to measure one row")
    parser.add_argument("--quick", action="store_true", help="2 seconds a row")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(json.dumps(training_memory(*arguments.memory_of)))
        return 0
    seconds = 2.0 if arguments.quick else arguments.seconds
    record = {"run": describe(arguments.device, ("timm",)), "rows": [], "memory": []}
    print_header(record["run"])
    failed = False
    for name in arguments.models:
        for dtype in arguments.dtypes:
            for row in bench(name, dtype, arguments.batches, arguments.device, seconds):
                record["rows"].append(row)
                failed |= "error" in row
                print(format_row(row), flush=True)
    if arguments.device == "cpu" and sys.platform == "linux":
        print("\n| memory of a training step, batch 8 | dtype | timm MiB | vitfast MiB |\n|---|---|---|---|")
        for name in (n for n in arguments.models if n in TRAINED):
            for dtype in arguments.dtypes:
                row = compare_memory(name, dtype, arguments.threads)
                record["memory"].append(row)
                print(f"| {name} | {dtype} | {row['timm']:.0f} | {row['vitfast']:.0f} |", flush=True)
    if arguments.json:
        write_json(arguments.json, record)
    return int(failed)


def print_header(run: dict[str, Any]) -> None:
    print(heading(run, ("timm",)))
    print("Medians; ratio above 1: vitfast is faster\n")
    print("| model | job | batch | dtype | timm ms | vitfast ms | ratio | 25-75 % | timm / timm | rounds (noisy) |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)


def format_row(row: dict[str, Any]) -> str:
    start = f"| {row['model']} | {row['job']} | {row['batch']} | {row['dtype']} |"
    if "error" in row:
        return f"{start} not timed: {row['error']} |"
    return (
        f"{start} {row['timm_ms']:.1f} | {row['vitfast_ms']:.1f} | {row['ratio']:.3f} | "
        f"{row['ratio_25']:.3f}-{row['ratio_75']:.3f} | {row['noise']:.3f} | {row['rounds']} ({row['noisy']}) |"
    )


def bench(name: str, dtype: str, batches: list[int], device: str, seconds: float):
    theirs = timm.create_model(name).to(device, DTYPES[dtype])
    ours = vitfast.create_model(name).to(device, DTYPES[dtype])
    ours.load_state_dict(theirs.state_dict())
    jobs = [("inference", batch) for batch in batches]
    if name in TRAINED:
        jobs.append(("training step", max(batches)))
    for job, batch in jobs:
        images = torch.randn(batch, 3, *theirs.patch_embed.img_size, device=device, dtype=DTYPES[dtype])
        labels = torch.arange(batch, device=device)
        row = {"model": name, "job": job, "batch": batch, "dtype": dtype}
        with torch.inference_mode():
            why_not = wrong(relative_error(ours.eval()(images), theirs.eval()(images)), dtype)
        if why_not is not None:
            yield row | {"error": why_not}
        elif job == "inference":
            yield row | timed(inference(ours, images), inference(theirs, images), device, seconds)
        else:
            calls = training_step(ours, images, labels), training_step(theirs, images, labels)
            yield row | timed(*calls, device, seconds)


def timed(ours: Callable, theirs: Callable, device: str, seconds: float) -> dict[str, Any]:
    result = interleaved_medians({"timm": theirs, "vitfast": ours}, device=device, budget_s=seconds)
    low, high = result.spread["vitfast"]
    return {
        "timm_ms": result.median_ms["timm"], "vitfast_ms": result.median_ms["vitfast"],
        "ratio": result.ratio["vitfast"], "ratio_25": low, "ratio_75": high, "noise": result.noise,
        "rounds": result.rounds, "repeated": result.repeated, "noisy": result.noisy,
    }  # fmt: skip


def compare_memory(name: str, dtype: str, threads: int) -> dict[str, Any]:
    """Peak memory of one training step of each library, each in a process of its own."""
    row: dict[str, Any] = {"model": name, "dtype": dtype}
    for library in ("timm", "vitfast"):
        row[library] = in_own_process(
            __file__, "--threads", threads, "--memory-of", f"{library}:{name}", dtype
        )
    return row


def training_memory(library_and_name: str, dtype: str) -> float:
    """MiB by which the process grew at its peak over two training steps."""
    library, name = library_and_name.split(":")
    create = {"timm": timm.create_model, "vitfast": vitfast.create_model}[library]
    model = create(name).to(DTYPES[dtype])
    images = torch.randn(8, 3, *model.patch_embed.img_size, dtype=DTYPES[dtype])
    call = training_step(model, images, torch.arange(8))
    return peak_growth_mib(call)


if __name__ == "__main__":
    sys.exit(main())
