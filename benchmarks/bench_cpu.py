"""Time on a CPU what `benchmarks/run.py cpu` does not: against timm, in turns in one run.

    python benchmarks/bench_cpu.py [--only patch ...] [--models NAME ...] [--quick] [--out FOLDER]

patch   uint8 images, channels last, to tokens
growth  speed and peak memory over batch and image size
gelu    the tanh GELU, alone and in an MLP

Everybody has the same threads, weights and images, rounded to bf16 so that both dtypes share one expected result:
timm's in fp64. What differs from it by more than benchmarks/report.py allows is reported and not timed; nor is what is
not installed or fails. A ratio is the median over rounds of the baseline's time by the variant's, pair by pair; above 1
the variant is faster. "noise" is the baseline's ratio to itself (see vitfast/measure/timing.py). "others" is the share
of the machine's CPU time that other processes took meanwhile. They slow variants very differently, torch's threads
(which wait for each other by spinning) the most, so rows where it is more than a few percent compare nothing. With
--out all is also in <out>/<cpu>-cpu-parts.json after every row; an earlier file of that name gets the suffix .before.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from shared import (
    DTYPES,
    OtherProcesses,
    describe,
    heading,
    in_own_process,
    peak_growth_mib,
    relative_error,
    set_aside,
    slug,
    write_json,
    wrong,
)
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vitfast
from vitfast.kernels import cpu as cpu_kernels
from vitfast.measure.timing import Comparison, inference, interleaved_medians

MODELS = ["vit_small_patch16_224", "vit_base_patch16_224"]
PACKAGES = ("timm",)
OURS = ("vitfast", "prepared")
GROWTH_BATCHES = (1, 2, 4, 8, 16, 32, 64)
GROWTH_SIZES = (224, 384, 512, 768, 1024)

Call = Callable[[], Any]
Row = dict[str, Any]


def main() -> int:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.memory_of:
        print(json.dumps(forward_memory(*arguments.memory_of)))
        return 0
    record: dict[str, Any] = {"run": describe(packages=PACKAGES)}
    file = arguments.out and arguments.out / f"{slug(record['run']['cpu'])}-cpu-parts.json"
    if file and (before := set_aside(file)):
        print(f"an earlier record is now {before}")
    print(heading(record["run"], PACKAGES))
    print("Medians; ratio (25-75 %) above 1: faster than the first. Errors are relative, against timm in fp64.")
    failed = False
    for table in arguments.only:
        rows, header, lines_of = TABLES[table]
        print(f"\n{header}\n" + "|---" * (header.count("|") - 1) + "|", flush=True)
        record[table] = []
        for row in rows(arguments):
            record[table].append(row)
            failed |= any("not_timed" in row["variants"][name] for name in OURS if name in row["variants"])
            print("\n".join(lines_of(row)), flush=True)
            if file:
                write_json(file, record)
    return int(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--models", nargs="+", default=MODELS, help="growth takes the first")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="patch takes the largest")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for everybody")
    parser.add_argument("--seconds", type=float, default=15.0, help="about how long to measure one row")
    parser.add_argument("--quick", action="store_true", help="1 second a row; less growth, a batch of 1 for gelu")
    parser.add_argument("--out", type=Path, help="also write the rows to a file in this folder, after each row")
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds = 1.0
    return arguments


def measure(
    builders: Mapping[str, Callable[[], Call]], expected: Tensor, dtype: str, seconds: float
) -> tuple[Row, Comparison | None]:
    """Build each variant, check what it computes, and time those that are right against the first.

    Returns:
        The row, and the `Comparison`, None where there were not two to compare.
    """
    variants: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    for name, build in builders.items():
        began = time.perf_counter()
        try:
            # exporters warn of much that does not matter: the result is checked
            with warnings.catch_warnings(action="ignore"):
                call = build()
                result = call()
        # other people's software may fail in any way, which must not cost the rest of the run
        except Exception as problem:
            variants[name] = {"not_timed": f"{type(problem).__name__}: {problem}".splitlines()[0][:200]}
            continue
        ready_s = time.perf_counter() - began
        error = relative_error(torch.as_tensor(result), expected)
        variants[name] = {"error": error, "ready_s": ready_s}
        why_not = wrong(error, dtype)
        if why_not is None:
            calls[name] = call
        else:
            variants[name]["not_timed"] = why_not
    baseline = next(iter(builders))
    row: Row = {"dtype": dtype, "baseline": baseline, "variants": variants}
    if baseline not in calls or len(calls) < 2:
        return row, None
    others = OtherProcesses()
    result = interleaved_medians(calls, budget_s=seconds)
    for name in calls:
        variants[name]["ms"] = result.median_ms[name]
        if name != baseline:
            low, high = result.spread[name]
            variants[name] |= {"ratio": result.ratio[name], "ratio_25": low, "ratio_75": high}
    row |= {
        "noise": result.noise, "rounds": result.rounds, "repeated": result.repeated, "noisy": result.noisy,
        "others": others.share(), "rounds_ms": result.rounds_ms,
    }  # fmt: skip
    return row, result


# models


@dataclass
class Case:
    """One model in one dtype with images; `model` is timm's, in fp32, and `expected` its logits in fp64."""

    model: nn.Module
    name: str
    images: Tensor
    expected: Tensor
    dtype: str
    options: Row

    def timm(self) -> Call:
        return inference(copy.deepcopy(self.model).to(DTYPES[self.dtype]), self.images.to(DTYPES[self.dtype]))

    def ours(self) -> nn.Module:
        model = vitfast.create_model(self.name, **self.options)
        model.load_state_dict(self.model.state_dict())
        return model.eval().to(DTYPES[self.dtype])

    def vitfast(self) -> Call:
        return inference(self.ours(), self.images.to(DTYPES[self.dtype]))

    def prepared(self) -> Call:
        prepared = vitfast.prepare(self.ours(), dtype=DTYPES[self.dtype])
        return partial(prepared, self.images.to(DTYPES[self.dtype]))


def timm_model(name: str, **options: Any) -> nn.Module:
    """timm's model in fp32. Nothing in it is zero or one, so that a variant cannot leave it out unseen."""
    model = timm.create_model(name, **options).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        parameter.copy_(parameter.bfloat16())
    for token in (model.cls_token, model.pos_embed):
        if token is not None:
            token.copy_((0.5 * torch.randn_like(token)).bfloat16())
    return model


def cases(name: str, inputs: list[tuple[int, int]], dtypes: list[str], **options: Any) -> Iterator[Case]:
    """Every dtype for every (batch, pixels a side)."""
    model = timm_model(name, **options)
    exact = copy.deepcopy(model).double()
    for batch, size in inputs:
        images = torch.randn(batch, 3, size, size).bfloat16().float()
        with torch.inference_mode():
            expected = exact(images.double())
        for dtype in dtypes:
            yield Case(model, name, images, expected, dtype, options)


# patch embedding


def patch_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    batch = max(arguments.batches)
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    for name in arguments.models:
        model = timm_model(name)
        # as a decoder leaves them: rows of pixels
        decoded = torch.randint(0, 256, (batch, *model.patch_embed.img_size, 3), dtype=torch.uint8)
        images = decoded.permute(0, 3, 1, 2)
        expected = timm_tokens(copy.deepcopy(model).double(), step_by_step(images, mean, std, torch.float64))
        for dtype in arguments.dtypes:
            theirs = copy.deepcopy(model).to(DTYPES[dtype])
            builders = {
                way: partial(partial, timm_way, theirs, normalise, images, mean, std, DTYPES[dtype])
                for way, normalise in NORMALISATIONS.items()
            }
            builders["vitfast"] = partial(partial, our_way, theirs, images, mean, std)
            builders["prepared"] = partial(prepared_way, name, model, dtype, images, mean, std)
            row, result = measure(builders, expected, dtype, arguments.seconds)
            if result and {"vitfast", "prepared"} <= result.median_ms.keys():
                fastest = min(result.median_ms.keys() - {"vitfast", "prepared"}, key=result.median_ms.__getitem__)
                row |= {"against": fastest, "ratio": result.ratio_of(fastest, "vitfast")}
                row |= {"ratio of prepared": result.ratio_of(fastest, "prepared")}
            yield {"model": name, "batch": batch} | row


def step_by_step(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    exact = torch.promote_types(dtype, torch.float32)
    mean, std = mean.to(exact)[:, None, None], std.to(exact)[:, None, None]
    return images.to(exact).div_(255).sub_(mean).div_(std).to(dtype)


def mul_and_add(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    scale, shift = 1 / (255 * std), -mean / std
    return torch.addcmul(shift[:, None, None].to(dtype), images.to(dtype), scale[:, None, None].to(dtype))


def mul_and_add_nchw(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    return mul_and_add(images, mean, std, dtype).contiguous()


NORMALISATIONS = {"step by step": step_by_step, "mul and add": mul_and_add, "mul and add, NCHW": mul_and_add_nchw}


def timm_way(model: nn.Module, normalise: Callable, images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype):
    with torch.inference_mode():
        return timm_tokens(model, normalise(images, mean, std, dtype))


def timm_tokens(model: nn.Module, images: Tensor) -> Tensor:
    return model._pos_embed(model.patch_embed(images))


def our_way(model: nn.Module, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    projection = model.patch_embed.proj
    with torch.inference_mode():
        return vitfast.ops.patch_embed(
            images, projection.weight, projection.bias,
            pos_embed=model.pos_embed[0], prefix=model.cls_token[0], mean=mean, std=std,
        )  # fmt: skip


def prepared_way(name: str, model: nn.Module, dtype: str, images: Tensor, mean: Tensor, std: Tensor) -> Call:
    ours = vitfast.create_model(name)
    ours.load_state_dict(model.state_dict())
    prepared = vitfast.prepare(ours.eval(), DTYPES[dtype], mean=mean.tolist(), std=std.tolist())

    def call() -> Tensor:
        with torch.inference_mode():
            return prepared.embed(images)

    return call


def patch_lines(row: Row) -> Iterator[str]:
    variants = row["variants"].values()
    ratio = [triple(row[name]) if name in row else "" for name in ("ratio", "ratio of prepared")]
    times = [f"{variant['ms']:.1f}" if "ms" in variant else cell(variant) for variant in variants]
    yield line(row["model"], row["batch"], row["dtype"], *times, *ratio, row.get("against", ""), noise(row))
    yield line("", "", "error", *map(error, variants), "", "", "", "")


# growth


def growth_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    name = arguments.models[0]
    inputs = [(batch, GROWTH_SIZES[0]) for batch in GROWTH_BATCHES] + [(1, size) for size in GROWTH_SIZES[1:]]
    if arguments.quick:
        inputs = [(2, GROWTH_SIZES[0]), (1, GROWTH_SIZES[1])]
    for case in cases(name, inputs, arguments.dtypes, dynamic_img_size=True):
        batch, size = len(case.images), case.images.shape[-1]
        height, width = case.model.patch_embed.dynamic_feat_size((size, size))
        tokens = height * width + case.model.num_prefix_tokens
        row, _ = measure({"timm": case.timm, "prepared": case.prepared}, case.expected, case.dtype, arguments.seconds)
        row |= {"model": name, "batch": batch, "size": size, "tokens": tokens, "gflop": gflop(case)}
        if sys.platform == "linux" and "rounds" in row:
            for library, variant in row["variants"].items():
                variant |= in_own_process(
                    __file__, "--threads", arguments.threads, "--memory-of", library, name, case.dtype, batch, size
                )
        yield row


def gflop(case: Case) -> float:
    """Of one image: two for every multiplication with its addition, in timm's model, whatever a variant leaves out."""
    model = copy.deepcopy(case.model).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(case.images[:1].to("meta"))
    return counter.get_total_flops() / 1e9


def forward_memory(library: str, name: str, dtype: str, batch: str, size: str) -> Row:
    """MiB by which the process grows at its peak over two forwards, and what preparing packed."""
    options = {"dynamic_img_size": True}
    images = torch.randn(int(batch), 3, int(size), int(size))
    case = Case(timm_model(name, **options), name, images, images, dtype, options)
    call = {"timm": case.timm, "prepared": case.prepared}[library]()
    found = {"peak_mib": peak_growth_mib(call)}
    return found if library == "timm" else found | {"packed_mib": call.func.packed_bytes / 2**20}


def growth_lines(row: Row) -> Iterator[str]:
    theirs, ours = row["variants"].values()
    start = row["model"], row["dtype"], row["batch"], row["size"], row["tokens"]
    if "rounds" not in row:
        yield line(*start, cell(theirs), cell(ours), *[""] * 9)
        return
    per_image = [f"{variant['ms'] / row['batch']:.1f}" for variant in (theirs, ours)]
    per_second = [f"{row['batch'] * 1e3 / variant['ms']:.1f}" for variant in (theirs, ours)]
    speed = [f"{row['gflop'] * row['batch'] * 1e3 / variant['ms']:.0f}" for variant in (theirs, ours)]
    memory = [f"{variant['peak_mib']:.0f}" if "peak_mib" in variant else "" for variant in (theirs, ours)]
    packed = f"{ours['packed_mib']:.0f}" if "packed_mib" in ours else ""
    ratio = f"{ours['ratio']:.2f} ({ours['ratio_25']:.2f}-{ours['ratio_75']:.2f})"
    yield line(*start, *per_image, ratio, *per_second, *speed, *memory, packed, f"{ours['error']:.0e}", noise(row))


# tanh GELU


def gelu_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    # SigLIP B/16 at 432 pixels
    batch, tokens, width, hidden = 1 if arguments.quick else 8, 729, 768, 3072
    x = torch.randn(batch, tokens, width).bfloat16().float()
    pre = torch.randn(batch, tokens, hidden).bfloat16().float()
    norm, fc1, fc2 = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, hidden), nn.Linear(hidden, width)
    mlp = nn.Sequential(norm, fc1, nn.GELU(approximate="tanh"), fc2).requires_grad_(False)
    for parameter in mlp.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter) if parameter.dim() == 1 else 0).copy_(parameter.bfloat16())
    expected_mlp = x.double() + copy.deepcopy(mlp).double()(x.double())
    expected_alone = F.gelu(pre.double(), approximate="tanh")
    for dtype in arguments.dtypes:
        to = DTYPES[dtype]
        for job, expected, builders in (
            ("activation", expected_alone, gelu_alone(pre.to(to))),
            ("activation into given memory", expected_alone, gelu_into(pre.to(to))),
            ("MLP", expected_mlp, gelu_in_mlp(copy.deepcopy(mlp).to(to), x.to(to))),
        ):
            row, _ = measure(builders, expected, dtype, arguments.seconds)
            yield {"job": job, "shape": list(pre.shape)} | row


def gelu_alone(pre: Tensor) -> dict[str, Callable[[], Call]]:
    return {
        "torch": lambda: lambda: F.gelu(pre, approximate="tanh"),
        "vitfast": lambda: lambda: cpu_kernels.activation(pre, "gelu_tanh", torch.empty_like(pre)),
    }


def gelu_into(pre: Tensor) -> dict[str, Callable[[], Call]]:
    out = torch.empty_like(pre)
    return {
        "torch": lambda: lambda: torch.ops.aten.gelu.out(pre, approximate="tanh", out=out),
        "vitfast": lambda: lambda: cpu_kernels.activation(pre, "gelu_tanh", out),
    }


def gelu_in_mlp(mlp: nn.Sequential, x: Tensor) -> dict[str, Callable[[], Call]]:
    norm, fc1, _, fc2 = mlp

    def theirs() -> Tensor:
        with torch.inference_mode():
            return x + mlp(x)

    def ours() -> Tensor:
        with torch.inference_mode():
            return vitfast.ops.mlp(
                x, norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, norm_eps=1e-6, act="gelu_tanh"
            )

    return {"torch": lambda: theirs, "vitfast": lambda: ours}


def gelu_lines(row: Row) -> Iterator[str]:
    theirs, ours = row["variants"].values()
    shape = "x".join(map(str, row["shape"]))
    yield line(row["job"], shape, row["dtype"], cell(theirs), cell(ours), error(theirs), error(ours), noise(row))


# printing


def line(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def cell(variant: Row) -> str:
    if "not_timed" in variant:
        return variant["not_timed"].replace("|", "/")
    if "ms" not in variant:
        return "nothing to compare with"
    ratio = " {ratio:.2f} ({ratio_25:.2f}-{ratio_75:.2f})".format(**variant) if "ratio" in variant else ""
    return f"{variant['ms']:.1f}{ratio}"


def triple(ratio: tuple[float, float, float]) -> str:
    low, median, high = ratio
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def error(variant: Row) -> str:
    return f"{variant['error']:.0e}" if "error" in variant else ""


def noise(row: Row) -> str:
    if "rounds" not in row:
        return ""
    others = "" if row["others"] is None else f", {row['others']:.0%}"
    return f"{row['noise']:.3f}, {row['rounds']} ({row['noisy']}){others}"


NOISE = "noise, rounds (noisy), others"
# name: rows, header, lines of a row
TABLES = {
    "patch": (
        patch_rows,
        line("patch embedding of", "batch", "dtype", *(f"timm, {way} ms" for way in NORMALISATIONS), "vitfast ms",
             "prepared ms", "ratio to the fastest of timm's", "of prepared", "which is", NOISE),
        patch_lines,
    ),
    "growth": (
        growth_rows,
        line("model", "dtype", "batch", "pixels", "tokens", "timm ms an image", "prepared ms an image", "ratio",
             "timm images/s", "prepared images/s", "timm GFLOP/s", "prepared GFLOP/s", "timm peak MiB",
             "prepared peak MiB", "packed MiB", "error", NOISE),
        growth_lines,
    ),
    "gelu": (
        gelu_rows,
        line("tanh GELU", "shape", "dtype", "torch ms", "vitfast ms, ratio", "torch error", "vitfast error",
             NOISE),
        gelu_lines,
    ),
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
