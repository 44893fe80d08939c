"""The entries of norms."""

from __future__ import annotations

from typing import Any

import torch

from vitfast import reference
from vitfast.check.families.family import Family, Results
from vitfast.check.families.rows import backward, forward, gradients, statistics


def _layer_norm(x, weight, bias, eps, kind, out_dtype) -> Results:
    return reference.layer_norm(x, weight, bias, eps, kind), *statistics(x, kind, eps)


def _add_layer_norm(residual, branch, weight, bias, eps, kind, gamma, row_scale) -> Results:
    total, normed = reference.add_layer_norm(residual, branch, gamma, row_scale, weight, bias, eps, kind)
    return total, normed, *statistics(total, kind, eps)


def _layer_norm_backward(grad, x, mean, rstd, weight, bias, eps, kind, mask) -> Results:
    return gradients(
        lambda x, weight, bias: reference.layer_norm(x, weight, bias, eps, kind), (x, weight, bias), mask, (grad,)
    )


def _add_layer_norm_backward(
    grad_total, grad_normed, total, branch, mean, rstd, weight, bias, gamma, row_scale, eps, kind, branch_dtype, mask
) -> Results:
    # kept for gamma's gradient only, which nothing else depends on
    branch = torch.zeros_like(total) if branch is None else branch
    residual = total - reference.scale_branch(branch, gamma, row_scale)
    need_residual, need_branch, need_weight, need_bias, need_gamma = mask
    return gradients(
        lambda residual, weight, bias, branch, gamma: reference.add_layer_norm(
            residual, branch, gamma, row_scale, weight, bias, eps, kind
        ),
        (residual, weight, bias, branch, gamma),
        (need_residual, need_weight, need_bias, need_branch, need_gamma), (grad_total, grad_normed),
    )  # fmt: skip


def _kept_of(x: str) -> Any:
    """What the forward keeps of the rows that the backward calls `x`."""

    def kept(of: dict[str, Any]) -> dict[str, Any]:
        dtype = str(of[x].dtype).removeprefix("torch.")
        made = LAYER_NORM["layer_norm"].stock([of[x], of["weight"], of["bias"], of["eps"], of["kind"], dtype])
        return dict(zip(("out", "mean", "rstd"), made, strict=True))

    return kept


# by the name of the torch op
LAYER_NORM: dict[str, Family] = {
    "layer_norm": forward("layer_norm", "layer_norm", _layer_norm),
    "layer_norm_backward": backward(
        "layer_norm_backward", "layer_norm_backward", _layer_norm_backward, (1, 2), _kept_of("x")
    ),
    "add_layer_norm": forward("add_layer_norm", "layer_norm", _add_layer_norm),
    # any total is the sum of some residual and the branch
    "add_layer_norm_backward": backward(
        "add_layer_norm_backward", "layer_norm_backward", _add_layer_norm_backward, (1, 2, 4), _kept_of("total")
    ),
}
