"""The entries of the MLP."""

from __future__ import annotations

from typing import Any

import torch

from vitfast import reference
from vitfast.check.calls import Call
from vitfast.check.families.family import Family, Results
from vitfast.check.families.rows import backward, forward, gradients, named_arguments, product_configs, statistics
from vitfast.choose.dispatch import Config


def _mlp(x, norm_weight, norm_bias, norm_eps, norm, w1, b1, w2, b2, act, gated, gamma, row_scale, saves) -> Results:
    out = reference.mlp(x, norm_weight, norm_bias, norm_eps, norm, w1, b1, w2, b2, act, gated, gamma, row_scale)
    if not saves:
        return out, None, None, None, None, None
    pre = reference.linear(x, w1, b1, norm_weight, norm_bias, norm_eps, norm)
    gate, value = pre.chunk(2, -1) if gated else (pre, 1.0)
    hidden = reference.activation(gate, act) * value
    branch = None if gamma is None else reference.linear(hidden, w2, b2)
    pre_or_not = None if saves == "fc1" else pre
    hidden_or_not = hidden if saves == "none" else None
    return out, *statistics(x, norm, norm_eps), pre_or_not, branch, hidden_or_not


def _mlp_backward(
    grad, x, norm_weight, norm_bias, mean, rstd, w1, b1, w2, b2, pre, branch, hidden, gamma, row_scale,
    norm_eps, norm, act, gated, mask,
) -> Results:  # fmt: skip
    return gradients(
        lambda x, norm_weight, norm_bias, w1, b1, w2, b2, gamma: reference.mlp(
            x, norm_weight, norm_bias, norm_eps, norm, w1, b1, w2, b2, act, gated, gamma, row_scale
        ),
        (x, norm_weight, norm_bias, w1, b1, w2, b2, gamma), mask, (grad,),
    )  # fmt: skip


def _kept(of: dict[str, Any]) -> dict[str, Any]:
    saves = "none" if of["hidden"] is not None else "fc1" if of["pre"] is None else "act"
    made = MLP["mlp"].stock(
        [
            of["x"], of["norm_weight"], of["norm_bias"], of["norm_eps"], of["norm"], of["w1"], of["b1"], of["w2"],
            of["b2"], of["act"], of["gated"], of["gamma"], of["row_scale"], saves,
        ]
    )  # fmt: skip
    return dict(zip(("out", "mean", "rstd", "pre", "branch", "hidden"), made, strict=True))


def _whole(call: Call, device: torch.device) -> list[Config]:
    """One kernel for all of an MLP, where there is one."""
    from vitfast.kernels.triton import mlp

    of = named_arguments(call)
    if of["gated"] or of["saves"] not in ("", "fc1") or (of["saves"] and of["gamma"] is not None):
        return []
    w1 = of["w1"]
    return [config.as_dict() for config in mlp.whole_configs(device, of["x"].dtype, w1.dtype, *w1.shape)]


def _mlp_configs(call: Call, device: torch.device) -> list[Config | None]:
    """One for both products or for all at once, or by None the launcher's choice of each."""
    return [None, *product_configs(call, device, *named_arguments(call)["w1"].shape), *_whole(call, device)]


def _mlp_builtin(call: Call, device: torch.device) -> list[Config]:
    of = named_arguments(call)
    found = [product_configs(call, device, *of[weight].shape)[0] for weight in ("w1", "w2")]
    return found[: 1 if found[0] == found[1] else 2]


def _mlp_backward_configs(call: Call, device: torch.device) -> list[Config | None]:
    """Of the product with the activation's slope after it; without gates, which have kernels of their own."""
    of = named_arguments(call)
    return [None] if of["gated"] else product_configs(call, device, *of["w2"].shape[::-1])


# by the name of the torch op
MLP: dict[str, Family] = {
    "mlp": forward("mlp", "mlp", _mlp, configs=_mlp_configs, builtin=_mlp_builtin),
    "mlp_backward": backward(
        "mlp_backward", "mlp_backward", _mlp_backward, range(1, 8), _kept, configs=_mlp_backward_configs
    ),
}
