"""Parts of a prepared model on a CPU: our kernels on packed weights beside oneDNN's and SDPA, for where one is chosen.

Rows of kind "op". Weights are packed before anything is timed, as `vitfast.prepare` does, and are the same in every
call, as in a model; only rows change. Ours are the kernels of the instruction set that this process uses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import rivals, work
from benchmarks.core.apart import recorded
from benchmarks.core.ceilings import PRODUCTS
from vitfast import reference
from vitfast.check.case import DTYPES, Case, Function, Variant, Work
from vitfast.inference.cpu_block import ONEDNN_ROWS
from vitfast.kernels import cpu as cpu_kernels

HEAD_DIM, EPS = 64, 1e-6

Linear = Callable[..., Tensor]


@recorded
def product(*, product: str, width: int, batch: int, tokens: int = 197, dtype: str = "bf16") -> Case:
    """One of a block's four products, x W^T + b, with nothing around it."""
    K, D = (width * times for times in PRODUCTS[product])
    weight, bias = _weights({"weight": (D, K), "bias": (D,)}, dtype).values()

    def packed() -> Function:
        ours = cpu_kernels.PackedWeight(weight, bias, _multiplying(dtype))
        return lambda x: cpu_kernels.linear(x, ours)

    def unpacked() -> Function:
        kernels = _multiplying(dtype)
        if not cpu_kernels.takes_unpacked(weight, kernels):
            raise NotImplementedError(f"{kernels.name} packs every weight")
        return lambda x: cpu_kernels.linear_unpacked(x, weight, bias, using=kernels)

    ways = {
        "oneDNN": lambda: _by_onednn(weight, bias),
        "vitfast": packed,
        "F.linear": lambda: partial(_linear, weight, bias),
        "vitfast unpacked": unpacked,
    }
    return _case(
        f"packed {product}", ways, partial(_linear, weight.double(), bias.double()), (tokens, K), batch, dtype,
        {"tokens": tokens, "width": width}, work.linear(batch * tokens, K, D, dtype),
    )  # fmt: skip


@recorded
def attention(*, heads: int, batch: int, tokens: int = 197, dtype: str = "bf16") -> Case:
    """Of one layer, from the packed projection to the rows that the next product reads."""
    scale = HEAD_DIM**-0.5

    def ours() -> Function:
        kernels = _kernels()
        return lambda qkv: cpu_kernels.attention_qkv(qkv, scale, with_lse=False, using=kernels)[0]

    return _case(
        "packed attention", {"SDPA": lambda: _sdpa, "vitfast": ours},
        lambda qkv: reference.attention(*qkv.unbind(2), scale), (tokens, 3, heads, HEAD_DIM), batch, dtype,
        {"tokens": tokens, "heads": heads, "head_dim": HEAD_DIM}, work.attention(batch, tokens, heads, HEAD_DIM, dtype),
    )  # fmt: skip


@recorded
def block(*, width: int, batch: int, tokens: int = 197, dtype: str = "bf16") -> Case:
    """A whole block: in one call, and by oneDNN and SDPA with our norms and GELU between them."""
    heads, shapes = width // HEAD_DIM, {}
    for name, (times_in, times_out) in PRODUCTS.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (times_out * width, times_in * width), (times_out * width,)
    shapes |= {f"{name}.{kind}": (width,) for name in ("norm1", "norm2") for kind in ("weight", "bias")}
    found = _weights(shapes, dtype)
    of = {name: (found[f"{name}.weight"], found[f"{name}.bias"]) for name in (*PRODUCTS, "norm1", "norm2")}

    def ours() -> Function:
        kernels = _multiplying(dtype)
        qkv, proj, fc1, fc2 = (cpu_kernels.PackedWeight(*of[name], kernels) for name in PRODUCTS)
        norms = [cpu_kernels.Norm(*of[name], EPS) for name in ("norm1", "norm2")]
        whole = cpu_kernels.Block(
            norms[0], qkv, proj, norms[1], fc1, fc2, "gelu", heads, HEAD_DIM, HEAD_DIM**-0.5
        )  # fmt: skip
        return lambda x: cpu_kernels.block(x, whole)

    def by_onednn() -> Function:
        qkv, proj, fc1, fc2 = (_by_onednn(*of[name]) for name in PRODUCTS)

        def run(x: Tensor) -> Tensor:
            attended = _sdpa(qkv(cpu_kernels.layer_norm(x, *of["norm1"], EPS)).unflatten(2, (3, heads, HEAD_DIM)))
            x = proj(attended, x)
            hidden = fc1(cpu_kernels.layer_norm(x, *of["norm2"], EPS))
            return fc2(cpu_kernels.activation(hidden, "gelu", hidden), x)

        return run

    def truth(x: Tensor) -> Tensor:
        (n1, n2, *products) = ([t.double() for t in of[name]] for name in ("norm1", "norm2", *PRODUCTS))
        qkv, proj, fc1, fc2 = products
        q, k, v = F.linear(F.layer_norm(x, (width,), *n1, EPS), *qkv).unflatten(2, (3, heads, HEAD_DIM)).unbind(2)
        x = x + F.linear(reference.attention(q, k, v, HEAD_DIM**-0.5), *proj)
        return x + F.linear(F.gelu(F.linear(F.layer_norm(x, (width,), *n2, EPS), *fc1)), *fc2)

    products = [work.linear(batch * tokens, width * i, width * o, dtype).flops for i, o in PRODUCTS.values()]
    flops = sum(products) + work.attention(batch, tokens, heads, HEAD_DIM, dtype).flops
    moved = 2 * batch * tokens * width + sum(t.numel() for t in found.values())
    return _case(
        "packed block", {"oneDNN": by_onednn, "vitfast": ours}, truth, (tokens, width), batch, dtype,
        {"tokens": tokens, "width": width}, Work(flops, moved * DTYPES[dtype].itemsize),
    )  # fmt: skip


def _by_onednn(weight: Tensor, bias: Tensor) -> Linear:
    """x W^T + b, plus a residual where one is given, with the weight in oneDNN's layout."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ONEDNN_ROWS)

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, bias, "add")

    return run


def _linear(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def _sdpa(qkv: Tensor) -> Tensor:
    """[B, N, 3, H, D] -> [B, N, H * D]"""
    return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)


def _kernels() -> Any:
    """Those of this process.

    Raises:
        NotImplementedError: there are none.
    """
    if cpu_kernels.kernels() is None:
        raise NotImplementedError("there is no extension")
    return cpu_kernels.kernels()


def _multiplying(dtype: str) -> Any:
    """Those of this process.

    Raises:
        NotImplementedError: they multiply no such numbers.
    """
    kernels = _kernels()
    if not cpu_kernels.multiplies(DTYPES[dtype], kernels):
        raise NotImplementedError(f"{kernels.name} multiplies no {dtype}")
    return kernels


def _weights(shapes: dict[str, tuple[int, ...]], dtype: str) -> dict[str, Tensor]:
    drawn = rivals.random_weights({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    return {name: each.to(DTYPES[dtype]) for name, each in drawn.items()}


def _case(
    name: str, ways: dict[str, Callable[[], Function]], truth: Function, row: tuple[int, ...], batch: int, dtype: str,
    shape: dict[str, int], count: Work,
) -> Case:  # fmt: skip
    def inputs(generator: torch.Generator) -> tuple[Tensor]:
        return (rivals.exact(torch.randn(batch, *row, generator=generator)).to(DTYPES[dtype]),)

    def in_inference(build: Callable[[], Function]) -> Function:
        run = build()

        def call(x: Tensor) -> Tensor:
            with torch.inference_mode():
                return run(x)

        return call

    baseline = next(iter(ways))
    return Case(
        kind="op", name=name, mode="forward", shape=shape, batch=batch, dtype=dtype, device=torch.device("cpu"),
        inputs=inputs, reference=truth, cut=lambda given, n: (given[0][:n],), per_image=(True,),
        variants={
            way: Variant(lambda build=build: in_inference(build), ours=way.startswith("vitfast"))
            for way, build in ways.items()
        },
        baseline=baseline, yardstick=baseline, work=count,
        notes={"kernels": getattr(cpu_kernels.kernels(), "name", None)},
    )  # fmt: skip
