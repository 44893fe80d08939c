"""What the hardware counted in a kernel, by NVIDIA's ncu: fc1, attention backward, patch embedding.

    python -m benchmarks.gpu.profile KERNEL      runs one of them, the last call between marks for ncu

The stage runs ncu on each and keeps the counters of `KEPT`; where ncu is not there, or may not read counters, the
record says why.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.core import harness
from benchmarks.gpu.stages import LOG_CHARACTERS, Outcome, Run, Stage, printed, say
from vitfast import ops
from vitfast.choose import dispatch

KERNELS = ("fc1", "attention_backward", "patch_embed")
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats")
# tensor pipe, bytes of L2 and DRAM, what warps wait for, and how long it took
KEPT = re.compile(
    r"pipe_tensor|^lts__t_bytes|^dram__bytes|dram__throughput|lts__throughput|issue_stalled|^gpu__time_duration"
)
BATCH = 64


def call(kernel: str, mark: Callable[[], None]) -> None:
    """One call of ViT-B/16's, after `mark` what `kernel` names."""
    like = {"device": "cuda", "dtype": torch.bfloat16}
    if kernel == "fc1":
        x, weight, bias, norm = (torch.randn(*n, **like) for n in ((BATCH, 197, 768), (3072, 768), (3072,), (768,)))
        mark()
        ops.linear(x, weight, bias, norm="layer", norm_weight=norm, norm_bias=norm, act="gelu")
    elif kernel == "attention_backward":
        out = ops.attention_qkv(torch.randn(BATCH, 197, 3, 12, 64, **like, requires_grad=True))
        grad = torch.ones_like(out)
        mark()
        out.backward(grad)
    else:
        images = torch.randint(256, (BATCH, 3, 224, 224), device="cuda", dtype=torch.uint8)
        weight, bias = torch.randn(768, 3, 16, 16, **like), torch.randn(768, **like)
        half = torch.full((3,), 0.5, device="cuda")
        mark()
        ops.patch_embed(images, weight, bias, mean=half, std=half)
    torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.profile", description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=KERNELS)
    kernel = parser.parse_args(argv).kernel
    with dispatch.backend("kernel"):
        call(kernel, lambda: None)
        call(kernel, torch.cuda.profiler.start)
        torch.cuda.profiler.stop()


def profile(run: Run, stage: Stage, budget_s: float) -> Outcome:
    ends, facts = time.perf_counter() + budget_s, run.stage(stage.name)
    ncu = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if ncu is None or run.device.type != "cuda":
        facts["absent"] = "no ncu on the PATH" if ncu is None else "no GPU"
        return Outcome()
    counters = facts.setdefault("counters", {})
    for kernel in (kernel for kernel in KERNELS if kernel not in counters):
        status, text = printed([
            ncu, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw",
            *(word for section in SECTIONS for word in ("--section", section)),
            sys.executable, "-m", "benchmarks.gpu.profile", kernel,
        ], ends - time.perf_counter())  # fmt: skip
        if status is None:
            return Outcome([], harness.NO_TIME_LEFT)
        if "ERR_NVGPUCTRPERM" in text:
            facts["absent"] = "the driver allows only root to read counters (ERR_NVGPUCTRPERM)"
            return Outcome()
        counters[kernel] = counted(text) or {"status": status, "said": text[-LOG_CHARACTERS:]}
        run.record.write()
        say(f"profile: {kernel}: {len(counters[kernel])} kernels")
    return Outcome()


def counted(text: str) -> list[dict[str, float | str]]:
    """Of each kernel its name and counters, with their units, from what ncu printed."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    names, units, *found = csv.reader(line for line in lines[begin:] if line.startswith('"'))
    return [
        {"kernel": line[names.index("Kernel Name")][:100]}
        | {
            f"{name} [{unit}]": float(value.replace(",", ""))
            for name, unit, value in zip(names, units, line, strict=True)
            if KEPT.search(name) and re.fullmatch(r"[\d.,]+", value)
        }
        for line in found
    ]


if __name__ == "__main__":
    main()
