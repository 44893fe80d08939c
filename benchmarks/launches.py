"""What starting kernels costs the host: microseconds of Python an op, up to the C function that starts a kernel.

    python -m benchmarks.launches [--tokens N] [--dim D]

Everything between a call of an op and that function is what a GPU's host runs: dispatcher, plans, Triton's launcher.
The driver is made up, so that no GPU is needed: kernels are compiled for sm_90 and started on nothing, and tensors are
on the CPU. Two columns: by plan (`vitfast.kernels.plans`), and as the first call of a layout finds its way.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

SAMPLES, SAMPLE_S = 30, 0.004
SWITCH = "TRITON_INTERPRET"


class Driver:
    """Of a GPU that is not there; `started` counts what it was given to start."""

    def __init__(self):
        self.started, self.utils = 0, self

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        made = object.__new__(nvidia.CudaLauncher)
        made.num_ctas = 1
        made.launch = nvidia.wrap_handle_tensordesc(
            self.start, dict(source.signature), getattr(metadata, "tensordesc_meta", None)
        )
        for name in ("global_scratch", "profile_scratch"):
            setattr(made, f"{name}_size", 0)
            setattr(made, f"{name}_align", 1)
        made.launch_cooperative_grid = made.launch_pdl = False
        return made

    def start(self, *_: Any) -> None:
        self.started += 1

    def fill_tma_descriptor(self, *_: Any) -> int:
        return 1

    def load_binary(self, *_: Any) -> tuple:
        return "module", 1, 16, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def calls(tokens: int, dim: int) -> dict[str, Callable]:
    """What blocks call, in bf16: by name."""
    from vitfast import ops
    from vitfast.ops.linear_folded import added_linear, folded_linear

    tensor = lambda *shape: torch.ones(shape, dtype=torch.bfloat16)  # noqa: E731
    x, gain, shift = tensor(1, tokens, dim), tensor(dim), tensor(dim)
    wqkv, bqkv, w1, b1 = tensor(3 * dim, dim), tensor(3 * dim), tensor(4 * dim, dim), tensor(4 * dim)
    w2, b2, hidden = tensor(dim, 4 * dim), tensor(dim), tensor(1, tokens, 4 * dim)
    qkv, sums = tensor(1, tokens, 3, dim // 64, 64), torch.ones(4 * dim)
    _, pieces = added_linear(hidden, w2, b2, x)
    return {
        "layer_norm": lambda: ops.layer_norm(x, gain, shift, 1e-6),
        "linear, norm": lambda: ops.linear(x, wqkv, bqkv, norm="layer", norm_weight=gain, norm_bias=shift),
        "linear, residual": lambda: ops.linear(hidden, w2, b2, residual=x),
        "mlp": lambda: ops.mlp(x, gain, shift, w1, b1, w2, b2),
        "attention_qkv": lambda: ops.attention_qkv(qkv),
        "folded_linear": lambda: folded_linear(x, w1, sums, sums, b1, pieces, 1e-6, "layer", "gelu"),
        "added_linear": lambda: added_linear(hidden, w2, b2, x),
    }


def microseconds(call: Callable) -> float:
    """The least of some samples: the rest is other work of the machine."""
    started = time.perf_counter()
    call()
    count = max(1, int(SAMPLE_S / max(time.perf_counter() - started, 1e-6)))
    best = float("inf")
    for _ in range(SAMPLES):
        started = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - started) / count)
    return best * 1e6


def measure(tokens: int, dim: int) -> dict[str, tuple[int, float, float]]:
    """By op: kernels that a call starts, microseconds by plan and without. In a process that imported no vitfast."""
    os.environ[SWITCH] = "1"
    # ops take kernels on a CPU where the interpreter runs them
    from vitfast.choose import dispatch
    from vitfast.ops import _launch

    del os.environ[SWITCH]
    from vitfast.kernels.triton import launch, linear

    driver, found = Driver(), {}
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(launch, "_device_reasons", lambda device, dtype: ()),
        mock.patch.object(linear, "multiprocessors", lambda device: 132),
        mock.patch.object(_launch, "why_no_triton", lambda: ""),
        torch.no_grad(),
    ):
        for name, call in calls(tokens, dim).items():
            call()
            before = driver.started
            call()
            launches = driver.started - before
            planned = microseconds(call)
            with mock.patch.object(dispatch, "observed", lambda: True):
                found[name] = launches, planned, microseconds(call)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--dim", type=int, default=768, help="a multiple of 64")
    given = parser.parse_args(argv)
    if given.tokens < 1 or given.dim < 64 or given.dim % 64:
        parser.error(f"--tokens must be at least 1 and --dim a multiple of 64, got {given.tokens} and {given.dim}")
    if "vitfast" in sys.modules:
        how = ["--tokens", str(given.tokens), "--dim", str(given.dim)]
        return subprocess.run([sys.executable, "-m", "benchmarks.launches", *how]).returncode
    torch.set_num_threads(1)
    print(f"{'op':<18} {'launches':>8} {'us by plan':>11} {'us without':>11} {'by plan, each':>14}")
    for name, (launches, planned, alone) in measure(given.tokens, given.dim).items():
        print(f"{name:<18} {launches:>8} {planned:>11.1f} {alone:>11.1f} {planned / max(1, launches):>14.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
