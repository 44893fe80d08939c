"""The entries of norms, linear layers and the MLP, whose arguments are known by the names that their ops give them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitfast import reference
from vitfast.calls import Call, Like, contiguous
from vitfast.dispatch import Config
from vitfast.families.family import Family, Results, arguments, some_rows

VECTORS = ("weight", "norm_weight", "bias", "norm_bias", "b1", "b2", "gamma")
MATRICES = ("weight", "w1", "w2")
SHARED = frozenset({*VECTORS, *MATRICES, "sums", "wide_bias"})
# what the forward leaves to the backward
KEPT = ("mean", "rstd", "pre", "branch", "hidden")


def _arguments(call: Call) -> dict[str, Any]:
    return dict(zip(arguments(call.op), call.args, strict=True))


# arguments


def _draw(call: Call, generator: torch.Generator) -> dict[str, Any]:
    """Every tensor in the range that it has in a model, by name."""
    return {
        name: _in_range(name, arg, generator) if isinstance(arg, Like) else arg
        for name, arg in _arguments(call).items()
    }


def _in_range(name: str, like: Like, generator: torch.Generator) -> Tensor:
    drawn = like.draw(generator)
    if name == "row_scale":
        # the second of three images is dropped
        return torch.where(torch.arange(len(drawn), device=drawn.device) % 3 == 1, 0.0, 1.25).to(drawn.dtype)
    if name in MATRICES and drawn.dim() == 2:
        return drawn.mul_(drawn.shape[1] ** -0.5)
    if name in VECTORS:
        return drawn.mul_(0.1).add_({"weight": 1.0, "norm_weight": 1.0, "gamma": 0.5}.get(name, 0.0))
    return drawn


def _draw_forward(call: Call, generator: torch.Generator) -> tuple[Any, ...]:
    return tuple(_draw(call, generator).values())


def _draw_backward(call: Call, generator: torch.Generator) -> tuple[Any, ...]:
    """Random ones, and what the forward keeps as stock operators make it of these: nothing else has a backward."""
    drawn = _draw(call, generator)
    kept = dict(zip(*_kept_by_forward(call.op, drawn), strict=True))
    given = {name: kept[name] for name in KEPT if name in kept and drawn[name] is not None}
    return tuple((drawn | given).values())


def _draw_folded(call: Call, generator: torch.Generator) -> tuple[Any, ...]:
    """Weights that belong together, and rows whose statistics matter, with those in as many pieces as the call has."""
    of = _draw(call, generator)
    x, pieces = of["x"], of["pieces"]
    x += 2 * torch.randn(*x.shape[:-1], 1, generator=generator, dtype=torch.float32, device=x.device).to(x.dtype)
    of |= {"sums": of["weight"].float().sum(1), "wide_bias": of["wide_bias"].mul_(0.1)}
    of["bias"] = of["wide_bias"].to(of["bias"].dtype)
    if pieces is not None:
        parts = x.float().reshape(pieces.shape[2], pieces.shape[0], -1)
        squares, mean = torch.var_mean(parts, -1, correction=0)
        of["pieces"] = torch.stack([mean.T, squares.T * parts.shape[2]], 1)
    return tuple(of.values())


def _kept_by_forward(op: str, of: dict[str, Any]) -> tuple[Sequence[str], Results]:
    """Names of what the forward returns, and that."""
    if op == "linear_backward":
        made = LAYERS["linear"].stock(
            [
                of["x"], of["weight"], of["bias"], of["norm_weight"], of["norm_bias"], of["norm_eps"], of["norm"],
                of["act"], of["gamma"], of["row_scale"], None, True,
            ]
        )  # fmt: skip
        return ("out", "mean", "rstd", "pre", "branch"), made
    if op == "mlp_backward":
        saves = "none" if of["hidden"] is not None else "fc1" if of["pre"] is None else "act"
        made = LAYERS["mlp"].stock(
            [
                of["x"], of["norm_weight"], of["norm_bias"], of["norm_eps"], of["norm"], of["w1"], of["b1"], of["w2"],
                of["b2"], of["act"], of["gated"], of["gamma"], of["row_scale"], saves,
            ]
        )  # fmt: skip
        return ("out", "mean", "rstd", "pre", "branch", "hidden"), made
    # any total is the sum of some residual and the branch
    x = of["x" if op == "layer_norm_backward" else "total"]
    dtype = str(x.dtype).removeprefix("torch.")
    made = LAYERS["layer_norm"].stock([x, of["weight"], of["bias"], of["eps"], of["kind"], dtype])
    return ("out", "mean", "rstd"), made


# small calls


def _smaller(call: Call) -> list[Call]:
    """Rows that fill no tile, in a few images; of a call with one token an image, as many images."""
    first = call.likes()[0].shape
    if len(first) == 2 or math.prod(first[1:-1]) == 1:
        return [_resized(call, n, 1) for n in (197, 17)]
    return [_resized(call, *size) for size in ((2, 197), (3, 17))]


def _resized(call: Call, images: int, tokens: int) -> Call:
    """The call with other rows: [images, tokens, C], or [images, C] where it has no tokens."""
    found = []
    for name, arg in _arguments(call).items():
        if isinstance(arg, Like) and name == "row_scale":
            arg = contiguous(images, dtype=arg.dtype)
        elif isinstance(arg, Like) and name == "pieces":
            arg = contiguous(arg.shape[0], 2, images * tokens, dtype=arg.dtype)
        elif isinstance(arg, Like) and name not in SHARED:
            middle = () if len(arg.shape) == 2 else (tokens,)
            small = contiguous(images, *middle, arg.shape[-1], dtype=arg.dtype)
            if tokens == 1 and arg.stride[0] > arg.shape[-1]:
                # a class token's row, after which those of other tokens lie
                small = small._replace(stride=(2 * small.stride[0], *small.stride[1:]))
            arg = small
        found.append(arg)
    return Call(call.op, tuple(found))


# what is true


def _statistics(x: Tensor, norm: str, eps: float) -> Results:
    if norm != "layer":
        return None, None
    return x.mean(-1, keepdim=True), (x.var(-1, keepdim=True, correction=0) + eps).rsqrt()


def _layer_norm(x, weight, bias, eps, kind, out_dtype) -> Results:
    return reference.layer_norm(x, weight, bias, eps, kind), *_statistics(x, kind, eps)


def _add_layer_norm(residual, branch, weight, bias, eps, kind, gamma, row_scale) -> Results:
    total, normed = reference.add_layer_norm(residual, branch, gamma, row_scale, weight, bias, eps, kind)
    return total, normed, *_statistics(total, kind, eps)


def _linear(
    x, weight, bias, norm_weight, norm_bias, norm_eps, norm, act, gamma, row_scale, residual, saves
) -> Results:  # fmt: skip
    out = reference.linear(
        x, weight, bias, norm_weight, norm_bias, norm_eps, norm, act, gamma, row_scale, residual
    )
    if not saves:
        return out, None, None, None, None
    pre = reference.linear(x, weight, bias, norm_weight, norm_bias, norm_eps, norm)
    branch = None if gamma is None else reference.activation(pre, act)
    return out, *_statistics(x, norm, norm_eps), None if act == "none" else pre, branch


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


def _mlp(
    x, norm_weight, norm_bias, norm_eps, norm, w1, b1, w2, b2, act, gated, gamma, row_scale, saves
) -> Results:
    out = reference.mlp(x, norm_weight, norm_bias, norm_eps, norm, w1, b1, w2, b2, act, gated, gamma, row_scale)
    if not saves:
        return out, None, None, None, None, None
    pre = reference.linear(x, w1, b1, norm_weight, norm_bias, norm_eps, norm)
    gate, value = pre.chunk(2, -1) if gated else (pre, 1.0)
    hidden = reference.activation(gate, act) * value
    branch = None if gamma is None else reference.linear(hidden, w2, b2)
    statistics = _statistics(x, norm, norm_eps)
    return out, *statistics, None if saves == "fc1" else pre, branch, hidden if saves == "none" else None


# gradients by autograd, from the inputs alone: what the forward kept carries the rounding of whoever made it


def gradients(
    forward: Callable[..., Any], inputs: Sequence[Tensor | None], mask: Sequence[bool], grads: Sequence[Tensor | None]
) -> Results:  # fmt: skip
    """Gradients of `inputs`, each where `mask` asks for it, from those of the results, None for one that has none."""
    with torch.enable_grad():
        leaves = [
            t.detach().requires_grad_() if t is not None and need else t for t, need in zip(inputs, mask, strict=True)
        ]
        results = forward(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        given = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        # a weight of the norm has none where only the sum's gradient is there
        found = iter(torch.autograd.grad([r for r, _ in given], wanted, [g for _, g in given], allow_unused=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in leaves)


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


def _linear_backward(
    grad, x, weight, bias, norm_weight, norm_bias, mean, rstd, pre, branch, gamma, row_scale, norm_eps, norm, act, mask
) -> Results:
    return gradients(
        lambda x, weight, bias, norm_weight, norm_bias, gamma: reference.linear(
            x, weight, bias, norm_weight, norm_bias, norm_eps, norm, act, gamma, row_scale
        ),
        (x, weight, bias, norm_weight, norm_bias, gamma), mask, (grad,),
    )  # fmt: skip


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


# configurations


def _only_builtin(call: Call, device: torch.device) -> list[None]:
    return [None]


def _products(call: Call, device: torch.device, N: int, K: int) -> list[Config]:
    from vitfast.kernels import linear

    of = _arguments(call)
    dtype = of["weight" if "weight" in of else "w1"].dtype
    M = math.prod(of["x"].shape[:-1])
    return [config.as_dict() for config in linear.configs(device, dtype, M, N, K)]


def _linear_configs(call: Call, device: torch.device) -> list[Config]:
    return _products(call, device, *_arguments(call)["weight"].shape)


def _whole(call: Call, device: torch.device) -> list[Config]:
    """One kernel for all of an MLP, where there is one."""
    from vitfast.kernels import mlp

    of = _arguments(call)
    if of["gated"] or of["saves"] not in ("", "fc1") or (of["saves"] and of["gamma"] is not None):
        return []
    w1 = of["w1"]
    return [config.as_dict() for config in mlp.whole_configs(device, of["x"].dtype, w1.dtype, *w1.shape)]


def _mlp_configs(call: Call, device: torch.device) -> list[Config | None]:
    """One for both products or for all at once, or by None the launcher's choice of each."""
    return [None, *_products(call, device, *_arguments(call)["w1"].shape), *_whole(call, device)]


def _mlp_builtin(call: Call, device: torch.device) -> list[Config]:
    of = _arguments(call)
    found = [_products(call, device, *of[weight].shape)[0] for weight in ("w1", "w2")]
    return found[: 1 if found[0] == found[1] else 2]


def _mlp_backward_configs(call: Call, device: torch.device) -> list[Config | None]:
    """Of the product with the activation's slope after it; without gates, which have kernels of their own."""
    of = _arguments(call)
    return [None] if of["gated"] else _products(call, device, *of["w2"].shape[::-1])


def _family(op: str, truth: Callable[..., Results], **more: Any) -> Family:
    return Family(
        run=lambda *args: getattr(torch.ops.vitfast, op)(*args), truth=truth, smaller=_smaller, shared=SHARED,
        rows=True, places=some_rows, **({"configs": _only_builtin} | more),
    )  # fmt: skip


def _forward(op: str, kernel: str, truth: Callable[..., Results], **more: Any) -> Family:
    return _family(op, truth, kernel=kernel, **({"draw": _draw_forward} | more))


def _backward(op: str, kernel: str, truth: Callable[..., Results], sums: Sequence[int], **more: Any) -> Family:
    return _family(op, truth, kernel=kernel, draw=_draw_backward, grad=True, sums=frozenset(sums), **more)


# by the name of the torch op
LAYERS: dict[str, Family] = {
    "layer_norm": _forward("layer_norm", "layer_norm", _layer_norm),
    "layer_norm_backward": _backward("layer_norm_backward", "layer_norm_backward", _layer_norm_backward, (1, 2)),
    "add_layer_norm": _forward("add_layer_norm", "layer_norm", _add_layer_norm),
    "add_layer_norm_backward": _backward(
        "add_layer_norm_backward", "layer_norm_backward", _add_layer_norm_backward, (1, 2, 4)
    ),
    "linear": _forward("linear", "linear", _linear, configs=_linear_configs),
    "linear_backward": _backward("linear_backward", "linear_backward", _linear_backward, (1, 2, 3, 4, 5)),
    "folded_linear": _forward(
        "folded_linear", "folded_linear", _folded, configs=_linear_configs, draw=_draw_folded
    ),
    "added_linear": _forward(
        "added_linear", "added_linear", _added, configs=_linear_configs, extra=_with_statistics
    ),
    "mlp": _forward("mlp", "mlp", _mlp, configs=_mlp_configs, builtin=_mlp_builtin),
    "mlp_backward": _backward(
        "mlp_backward", "mlp_backward", _mlp_backward, range(1, 8), configs=_mlp_backward_configs
    ),
}  # fmt: skip
