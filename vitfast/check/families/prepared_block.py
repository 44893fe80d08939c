"""The entry of a prepared block: its kernel is the form with deferred biases, its stock form the five kernels."""

from __future__ import annotations

import math
from typing import Any

import torch

from vitfast import reference
from vitfast.check.calls import Call
from vitfast.check.families.family import Family, Results
from vitfast.check.families.linear import pieces_of, shift_rows
from vitfast.check.families.rows import SHARED, named_arguments, resized
from vitfast.check.families.rows import draw_named as draw_rows
from vitfast.choose.config_tables import BLAS
from vitfast.choose.dispatch import Config


def _draw(call: Call, generator: torch.Generator) -> tuple[Any, ...]:
    """Parts that belong together. Biases of proj and fc2 cancel: nobody adds those that a block leaves pending."""
    of = draw_rows(call, generator)
    x, pieces = of["x"], of["pieces"]
    for part in ("qkv", "fc1"):
        bias = of[f"{part}_wide_bias"].mul_(0.1)
        of |= {f"{part}_sums": of[f"{part}_weight"].float().sum(1), f"{part}_bias": bias.to(of[f"{part}_bias"].dtype)}
    first, second = of["proj_bias"], of["fc2_bias"]
    if first is not None and second is not None:
        of |= {"between": first.float(), "fc2_bias": -first}
    else:
        for bias in (first, second, of["between"]):
            if bias is not None:
                bias.zero_()
    shift_rows(x, generator)
    if pieces is not None:
        of["pieces"] = pieces_of(x, pieces.shape[0])
    return tuple(of.values())


def _truth(
    x, pieces, qkv_weight, qkv_sums, qkv_wide_bias, qkv_bias, proj_weight, proj_bias, fc1_weight, fc1_sums,
    fc1_wide_bias, fc1_bias, fc2_weight, fc2_bias, between, heads, scale, eps1, eps2, norm, act, gated,
) -> Results:  # fmt: skip
    qkv = reference.linear(x, qkv_weight, qkv_wide_bias, None, None, eps1, norm).unflatten(-1, (3, heads, -1))
    x = reference.linear(reference.attention(*qkv.unbind(2), scale), proj_weight, proj_bias, residual=x)
    return (reference.mlp(x, None, None, eps2, norm, fc1_weight, fc1_wide_bias, fc2_weight, fc2_bias, act, gated),)


def _smaller(call: Call) -> list[Call]:
    return [resized(call, *size) for size in ((2, 197), (3, 17))]


def _configs(call: Call, device: torch.device) -> list[Config]:
    """Of fc1; products with what is gated are cuBLAS's."""
    from vitfast.kernels.triton import linear

    of = named_arguments(call)
    if of["gated"]:
        return [BLAS.as_dict()]
    found = linear.configs(device, call.dtype, math.prod(of["x"].shape[:-1]), *of["fc1_weight"].shape)
    return [BLAS.as_dict(), *(config.as_dict() for config in found if config.kernel == "tiles")]


# by the name of the torch op
PREPARED_BLOCK: dict[str, Family] = {
    "prepared_block": Family(
        kernel="prepared_block", run=lambda *args: torch.ops.vitfast.prepared_block(*args), truth=_truth,
        smaller=_smaller, configs=_configs, draw=_draw, shared=SHARED,
    ),
}  # fmt: skip
