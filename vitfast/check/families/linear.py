"""The entries of linear layers, of prepared ones too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitfast import reference
from vitfast.check.calls import Call
from vitfast.check.families.family import Family, Results
from vitfast.check.families.rows import (
    backward,
    draw_named,
    forward,
    gradients,
    named_arguments,
    product_configs,
    statistics,
)
from vitfast.choose.dispatch import Config


def _draw_folded(call: Call, generator: torch.Generator) -> tuple[Any, ...]:
    """Weights that belong together, and rows whose statistics matter, with those in as many pieces as the call has."""
    of = draw_named(call, generator)
    x, pieces = of["x"], of["pieces"]
    shift_rows(x, generator)
    of |= {"sums": of["weight"].float().sum(1), "wide_bias": of["wide_bias"].mul_(0.1)}
    of["bias"] = of["wide_bias"].to(of["bias"].dtype)
    if pieces is not None:
        of["pieces"] = pieces_of(x, pieces.shape[0])
    return tuple(of.values())


def shift_rows(x: Tensor, generator: torch.Generator) -> None:
    """Give each row a mean of its own."""
    x += 2 * torch.randn(*x.shape[:-1], 1, generator=generator, dtype=torch.float32, device=x.device).to(x.dtype)


def pieces_of(x: Tensor, count: int) -> Tensor:
    """Statistics of x's rows in `count` pieces, as a product leaves them."""
    parts = x.float().reshape(x.shape[:-1].numel(), count, -1)
    squares, mean = torch.var_mean(parts, -1, correction=0)
    return torch.stack([mean.T, squares.T * parts.shape[2]], 1)


def _linear(
    x, weight, bias, norm_weight, norm_bias, norm_eps, norm, act, gamma, row_scale, residual, saves
) -> Results:  # fmt: skip
    out = reference.linear(x, weight, bias, norm_weight, norm_bias, norm_eps, norm, act, gamma, row_scale, residual)
    if not saves:
        return out, None, None, None, None
    pre = reference.linear(x, weight, bias, norm_weight, norm_bias, norm_eps, norm)
    branch = None if gamma is None else reference.activation(pre, act)
    return out, *statistics(x, norm, norm_eps), None if act == "none" else pre, branch


def _folded(x, weight, sums, wide_bias, bias, pieces, norm_eps, norm, act) -> Results:
    return (reference.linear(x, weight, wide_bias, None, None, norm_eps, norm, act),)


def _added(x, weight, bias, residual) -> Results:
    return reference.linear(x, weight, bias, residual=residual), None


def _with_statistics(results: Results) -> Results:
    """Rows, and in place of `pieces` the rows normed by them, or where there are none by statistics taken here.

    Of a row these are as far from what is true as its numbers are; mean and deviation alone are off by luck.
    """
    out, pieces = results
    if pieces is None:
        square, mean = torch.var_mean(out.to(torch.promote_types(out.dtype, torch.float32)), -1, correction=0)
    else:
        means, squares = pieces.unbind(1)
        mean = means.mean(0)
        square = squares.sum(0) / out.shape[-1] + (means - mean).square().mean(0)
    mean, deviation = (t.view(*out.shape[:-1], 1) for t in (mean, square.sqrt()))
    return out, (out - mean) / deviation


def _linear_backward(
    grad, x, weight, bias, norm_weight, norm_bias, mean, rstd, pre, branch, gamma, row_scale, norm_eps, norm, act, mask
) -> Results:
    return gradients(
        lambda x, weight, bias, norm_weight, norm_bias, gamma: reference.linear(
            x, weight, bias, norm_weight, norm_bias, norm_eps, norm, act, gamma, row_scale
        ),
        (x, weight, bias, norm_weight, norm_bias, gamma), mask, (grad,),
    )  # fmt: skip


def _kept(of: dict[str, Any]) -> dict[str, Any]:
    made = LINEAR["linear"].stock(
        [
            of["x"], of["weight"], of["bias"], of["norm_weight"], of["norm_bias"], of["norm_eps"], of["norm"],
            of["act"], of["gamma"], of["row_scale"], None, True,
        ]
    )  # fmt: skip
    return dict(zip(("out", "mean", "rstd", "pre", "branch"), made, strict=True))


def _linear_configs(call: Call, device: torch.device) -> list[Config]:
    return product_configs(call, device, *named_arguments(call)["weight"].shape)


def _folded_configs(call: Call, device: torch.device) -> list[Config]:
    from vitfast.kernels.cuda import product

    of = named_arguments(call)
    half = of["x"].dtype == of["weight"].dtype != torch.float32
    turns = product.configs(device) if half and of["act"] in product.ACTIVATIONS else []
    return [*_linear_configs(call, device), *(config.as_dict() for config in turns)]


# by the name of the torch op
LINEAR: dict[str, Family] = {
    "linear": forward("linear", "linear", _linear, configs=_linear_configs),
    "linear_backward": backward("linear_backward", "linear_backward", _linear_backward, (1, 2, 3, 4, 5), _kept),
    "folded_linear": forward("folded_linear", "folded_linear", _folded, configs=_folded_configs, draw=_draw_folded),
    "added_linear": forward("added_linear", "added_linear", _added, configs=_linear_configs, extra=_with_statistics),
}
