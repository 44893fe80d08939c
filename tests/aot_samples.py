"""Kernels with one fault each, and the same ones without it, for the tests of `make aot`."""

import os

import triton
import triton.language as tl

from vitfast.kernels.triton.compilation import Compilation


@triton.jit
def attention(
    q, k, v, out, stride, heads, tokens, scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of (batch, tokens, heads, D): online softmax over blocks of BN keys."""
    blocks = tl.cdiv(tokens, BM)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BM
    base = head // heads * tokens * stride + head % heads * D
    columns = tl.arange(0, D)
    rows = tl.arange(0, BM)
    keys = tl.arange(0, BN)
    start = base + first.to(tl.int64) * stride
    here = (first + rows < tokens)[:, None]
    query = tl.load(q + start + rows[:, None] * stride + columns[None, :], mask=here, other=0.0)
    total = tl.zeros((BM, D), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    largest = tl.full((BM,), float("-inf"), tl.float32)
    for at in tl.range(0, tokens, BN):
        offsets = base + at.to(tl.int64) * stride + keys[:, None] * stride + columns[None, :]
        there = at + keys < tokens
        key = tl.load(k + offsets, mask=there[:, None], other=0.0)
        value = tl.load(v + offsets, mask=there[:, None], other=0.0)
        score = tl.dot(query, key.T, input_precision=PRECISION) * scale
        score = tl.where(there[None, :], score, float("-inf"))
        now = tl.maximum(largest, tl.max(score, 1))
        part = tl.exp2(score - now[:, None])
        fade = tl.exp2(largest - now)
        weight = weight * fade + tl.sum(part, 1)
        total = tl.dot(part.to(value.dtype), value, total * fade[:, None], input_precision=PRECISION)
        largest = now
    total = (total / weight[:, None]).to(out.dtype.element_ty)
    tl.store(out + start + rows[:, None] * stride + columns[None, :], total, mask=here)


@triton.jit
def copy_rows(x, out, stride, count, HOW: tl.constexpr, BM: tl.constexpr, C: tl.constexpr):
    """Copies a tile of BM rows and C columns; HOW says how the offset of its first row is computed."""
    program = tl.program_id(0)
    rows = tl.arange(0, BM)
    tile = rows[:, None] * stride + tl.arange(0, C)[None, :]
    if HOW == "wide":
        tile += program.to(tl.int64) * BM * stride
    elif HOW == "narrow":
        tile += program * BM * stride
    elif HOW == "narrow, cast too late":
        tile += (program * BM * stride).to(tl.int64)
    elif HOW == "narrow, as a tensor":
        tile = (program * BM + rows)[:, None] * stride + tl.arange(0, C)[None, :]
    elif HOW == "narrow, constant stride":
        tile = (program * BM + rows)[:, None] * 768 + tl.arange(0, C)[None, :]
    elif HOW == "wide, divided":
        tile += (program // count).to(tl.int64) * stride + program % count * BM
    elif HOW == "wide, programs in groups":
        tile += (program // (8 * count) * 8 + program % count) * 128
    elif HOW == "narrow, whole images":
        tile += program // count * (197 * 768)
    elif HOW == "narrow, remainder":
        tile += program % count * stride
    elif HOW == "narrow, one branch":
        start = stride
        if program < count:
            start = program * stride + tl.load(x).to(tl.int32)
        tile += start
    elif HOW == "narrow, carried by a loop":
        start = program
        for _ in range(count):
            start = start * stride
        tile += start
    elif HOW == "narrow, counter":
        for row in range(count):
            tl.store(out + row * stride + tile, tl.load(x + row * stride + tile))
    elif HOW == "wide, counter":
        for row in range(count):
            start = row.to(tl.int64) * stride
            tl.store(out + start + tile, tl.load(x + start + tile))
    elif HOW == "wide, counter times a constant":
        for row in range(count):
            tl.store(out + row * 768 + tile, tl.load(x + tile))
    elif HOW == "narrow, counter of a persistent kernel":
        for row in range(program, count, tl.num_programs(0)):
            tl.store(out + row * 768 + tile, tl.load(x + tile))
    elif HOW == "narrow, after a loop":
        for row in range(count):
            tl.store(out + row.to(tl.int64) * stride + tile, tl.load(x + tile))
        for row in range(count):
            tl.store(out + row * stride + tile, tl.load(x + tile))
    elif HOW == "narrow, for the next round":
        start = count
        for row in range(count):
            tl.store(out + start + tile, tl.load(x + tile))
            start = row * stride
    elif HOW == "wide, only compared in 32 bits":
        tile += tl.where(program * stride < count, 1, 2)
    elif HOW == "narrow, while":
        row = program
        while row < count:
            tl.store(out + row * stride + tile, tl.load(x + tile))
            row += tl.num_programs(0)
    tl.store(out + tile, tl.load(x + tile))


@triton.jit
def does_not_compile(x, C: tl.constexpr):
    tl.static_assert(C > 1, "C must be above 1")


class TakesTheProcessDown(Compilation):
    """As a compiler that crashes does."""

    @property
    def warps(self):
        os._exit(1)


def of_attention(
    name, dtype="bf16", bm=64, bn=64, warps=4, stages=2, precision="tf32", divisible=("stride",), **more
):  # fmt: skip
    pointers = ("q", "k", "v", "out")
    signature = {**dict.fromkeys(pointers, f"*{dtype}"), **dict.fromkeys(("stride", "heads", "tokens"), "i32")}
    signature["scale"] = "fp32"
    constants = {"D": 64, "BM": bm, "BN": bn, "PRECISION": precision}
    return Compilation(name, attention, signature, constants, (*pointers, *divisible), warps, stages, **more)


def of_copy(how):
    signature = {"x": "*bf16", "out": "*bf16", "stride": "i32", "count": "i32"}
    constants = {"HOW": how, "BM": 16, "C": 32}
    return Compilation(f"copy {how}", copy_rows, signature, constants, ("x", "out"), 4, 2)


FINE = of_attention("fine")
SPILLING = of_attention("spilling", bm=128, bn=256)
NOT_TUNED_FOR = of_attention("not a default", bm=128, bn=256, default=False)
IEEE = of_attention("ieee", "fp32", bm=32, bn=32, precision="ieee", ieee=True)
TF32_IN_IEEE = of_attention("tf32", "fp32", bm=32, bn=32, ieee=True)
NARROW_LOADS = of_attention("narrow loads", divisible=())
SMALL_TILE = of_attention("small tile", bm=16)
TOO_FEW_WARPS = of_attention("two warps", bn=32, warps=2)
TOO_MUCH_SHARED = of_attention("large tile", "fp32", bm=128, bn=128, warps=8, stages=3, default=False)
DOES_NOT_COMPILE = Compilation("does not compile", does_not_compile, {"x": "*fp32"}, {"C": 1}, (), 4, 2)
TAKES_THE_PROCESS_DOWN = TakesTheProcessDown("takes the process down", *FINE[1:])


def compilations(arch):
    """What the tests run in other processes; on sm_80 also what goes wrong."""
    yield FINE
    yield of_copy("wide")
    if arch == 80:
        yield from (TAKES_THE_PROCESS_DOWN, DOES_NOT_COMPILE, of_copy("narrow"))
