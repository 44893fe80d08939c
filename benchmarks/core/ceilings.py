"""What a device does at its best: large copies, large matrix products, and in bf16 the plain products of ViTs.

Measured in the same run as the rows that are compared with them. Nothing here fails a run: what cannot be measured is
{"absent": why}.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from vitfast.check.case import DTYPES, Work
from vitfast.measure import device as devices
from vitfast.measure.timing import rotating

WIDTHS = (192, 384, 768, 1024, 1280)
TOKENS = 197
# of a width: name of the product, K and N in widths
PRODUCTS = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}
MATMULS = ("bf16", "fp16", "tf32", "fp32", "fp8")
COPY_BYTES = 2**30
# how long a stretch is whose speed is looked at by itself
STRETCH_S = 0.1


def measure(
    device: torch.device | str, *, seconds: float = 2.0, size: int | None = None, widths: Sequence[int] = WIDTHS,
    batch: int | None = None, place: devices.Place | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure the ceilings of `device`.

    Args:
        seconds: how long each dtype's large product is sustained; the copy takes a quarter of it, each of a ViT's
            products a twentieth.
        size: rows and columns of the large products; by default 8192, on a CPU 2048.
        widths: of the models; batch: of their 197 tokens, by default 64, on a CPU 8.

    Returns:
        {"copy": {"gbps", "bytes", "seconds"}, "matmul": {dtype: {"tflops", "first", "shape", "seconds", "state"}},
        "gemm": [{"name", "width", "m", "n", "k", "dtype", "tflops", "gbps", "ms"}], "before"}. "first" is the speed
        of the first tenth of a second, before power and heat count; "before" is NVML's state when it began, "state"
        the one at the end of that product. Each may have {"absent": why} in place of its numbers.
    """
    place = place or devices.of(device)
    on_gpu = place.device.type == "cuda"
    size, batch = size or (8192 if on_gpu else 2048), batch or (64 if on_gpu else 8)
    with place.current():
        found: dict[str, Any] = {"before": place.state(), "copy": _tried(copy, place, seconds / 4)}
        progress(f"ceilings: copy {_text(found['copy'], 'gbps', 'GB/s')}")
        found["matmul"] = {}
        for name in MATMULS:
            found["matmul"][name] = _tried(matmul, place, name, size, seconds)
            progress(f"ceilings: {name} {_text(found['matmul'][name], 'tflops', 'TFLOP/s')}")
        found["gemm"] = []
        for width, name in itertools.product(widths, PRODUCTS):
            k, n = (width * factor for factor in PRODUCTS[name])
            row = {"name": name, "width": width, "m": batch * TOKENS, "n": n, "k": k, "dtype": "bf16"}
            found["gemm"].append(row | _tried(gemm, place, row, seconds / 20))
        progress(f"ceilings: {len(found['gemm'])} products of models")
        place.release()
    return found


def roofline(work: Work, ceilings: Mapping[str, Any], dtype: str, *, tf32: bool = False) -> tuple[float, str] | None:
    """The least milliseconds that the ceilings allow for `work`, and whether "compute" or "memory" sets them.

    None where a ceiling that this needs was not measured.
    """
    product = ceilings.get("matmul", {}).get("tf32" if tf32 and dtype == "fp32" else dtype, {})
    tflops, gbps = product.get("tflops"), ceilings.get("copy", {}).get("gbps")
    if not tflops or not gbps:
        return None
    compute_ms, memory_ms = work.flops / tflops / 1e9, work.bytes / gbps / 1e6
    return (compute_ms, "compute") if compute_ms >= memory_ms else (memory_ms, "memory")


def copy(place: devices.Place, seconds: float) -> dict[str, Any]:
    """Copying from one large tensor to another; every byte counts twice, read and written."""
    wanted = max(COPY_BYTES if place.graphs else 2**28, 4 * place.cache_bytes())
    size = int(min(wanted, place.free_bytes() // 4))
    source = torch.empty(size, dtype=torch.uint8, device=place.device).fill_(1)
    target = torch.empty_like(source)
    rates = sustained(lambda: target.copy_(source), place, seconds)
    return {"gbps": 2 * size * rates.mean / 1e9, "bytes": size, "seconds": rates.seconds}


def matmul(place: devices.Place, name: str, size: int, seconds: float) -> dict[str, Any]:
    """A product of two square matrices of random normal numbers in one dtype ("tf32" is fp32 rounded to it)."""
    _check_supported(place, name)
    a, b = (_normal(place, size, size, index) for index in range(2))
    if name == "fp8":
        a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device=place.device)
        call = lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
    else:
        to = torch.float32 if name == "tf32" else DTYPES[name]
        a, b = a.to(to), b.to(to)
        call = lambda: torch.mm(a, b.t())  # noqa: E731
    with _precision("high" if name == "tf32" else "highest"):
        rates = sustained(call, place, seconds)
        state = place.state_under(call, 1e3 / rates.mean)
    flops = 2 * size**3 / 1e12
    return {
        "tflops": flops * rates.mean, "first": flops * rates.first, "shape": [size, size, size],
        "seconds": rates.seconds, "state": state,
    }  # fmt: skip


def gemm(place: devices.Place, row: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """One of a ViT's products as `F.linear` does it, without bias, on inputs that rotate past the cache."""
    _check_supported(place, row["dtype"])
    m, n, k, to = row["m"], row["n"], row["k"], DTYPES[row["dtype"]]
    moved = (m * k + n * k + m * n) * to.itemsize
    count = devices.input_sets(place, (m * k + n * k) * to.itemsize, moved)
    sets = [
        (_normal(place, m, k, 2 * i).to(to), (_normal(place, n, k, 2 * i + 1) / math.sqrt(k)).to(to))
        for i in range(count)
    ]
    rates = sustained(rotating(F.linear, sets), place, seconds)
    return {"tflops": 2 * m * n * k * rates.mean / 1e12, "gbps": moved * rates.mean / 1e9, "ms": 1e3 / rates.mean}


class Rates:
    """Calls a second: `mean` over all of `seconds`, and `first` in the first stretch of them."""

    def __init__(self, calls: int, stretches_ms: list[float]) -> None:
        self.seconds = sum(stretches_ms) / 1e3
        self.mean = calls * len(stretches_ms) / self.seconds
        self.first = calls * 1e3 / stretches_ms[0]


def sustained(call: Callable[[], Any], place: devices.Place, seconds: float) -> Rates:
    """Call without a pause for about `seconds`."""
    sampler = place.sampler()
    # what would let the device cool down between samples
    sampler.pause_s = 0.0
    call()
    once_ms = max(min(sampler(call, 1) for _ in range(3)), 1e-3)
    calls = max(1, round(min(STRETCH_S, seconds) * 1e3 / once_ms))
    stretches: list[float] = []
    while sum(stretches) < seconds * 1e3:
        stretches.append(sampler(call, calls) * calls)
    return Rates(calls, stretches)


def _check_supported(place: devices.Place, name: str) -> None:
    """Raise NotImplementedError where a product in this dtype would be emulated or fail."""
    if place.device.type == "cuda":
        capability = torch.cuda.get_device_capability(place.device)
        needed = {"bf16": (8, 0), "tf32": (8, 0), "fp8": (8, 9)}.get(name, (0, 0))
        if capability < needed:
            raise NotImplementedError(f"compute capability is {capability}, {name} needs {needed}")
    elif name == "bf16":
        if not any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("amx_tile", "avx512_bf16")):
            raise NotImplementedError("this CPU does not multiply bf16")
    elif name != "fp32":
        raise NotImplementedError(f"{name} is not measured on a CPU")


def _normal(place: devices.Place, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator(place.device).manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, device=place.device)


@contextlib.contextmanager
def _precision(wanted: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _tried(measured: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    try:
        return measured(*arguments)
    except Exception as problem:
        return {"absent": devices.first_line(problem)}


def _text(found: Mapping[str, Any], number: str, unit: str) -> str:
    return f"{found[number]:.4g} {unit}" if number in found else f"absent: {found['absent']}"
