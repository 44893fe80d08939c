"""What the entries of norms, linear layers and the MLP share: arguments are known by the names that ops give them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitfast.check.calls import Call, Like, contiguous
from vitfast.check.families.family import Family, Results, arguments, some_rows
from vitfast.choose.dispatch import Config

VECTORS = (
    "weight", "norm_weight", "bias", "norm_bias", "b1", "b2", "gamma", "qkv_bias", "proj_bias", "fc1_bias", "fc2_bias",
)  # fmt: skip
MATRICES = ("weight", "w1", "w2", "qkv_weight", "proj_weight", "fc1_weight", "fc2_weight")
OF_WEIGHTS = ("sums", "wide_bias", "qkv_sums", "qkv_wide_bias", "fc1_sums", "fc1_wide_bias", "between")
SHARED = frozenset({*VECTORS, *MATRICES, *OF_WEIGHTS})
# what the forward leaves to the backward
KEPT = ("mean", "rstd", "pre", "branch", "hidden")
# of the results of a forward in a dict by name, what its backward is given
Kept = Callable[[dict[str, Any]], dict[str, Any]]


def named_arguments(call: Call) -> dict[str, Any]:
    return dict(zip(arguments(call.op), call.args, strict=True))


def draw_named(call: Call, generator: torch.Generator) -> dict[str, Any]:
    """Every tensor in the range that it has in a model, by name."""
    return {
        name: _in_range(name, arg, generator) if isinstance(arg, Like) else arg
        for name, arg in named_arguments(call).items()
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


def draw_forward(call: Call, generator: torch.Generator) -> tuple[Any, ...]:
    return tuple(draw_named(call, generator).values())


def draw_backward(kept: Kept) -> Callable[[Call, torch.Generator], tuple[Any, ...]]:
    """Random arguments, and what the forward keeps as stock operators make it of these: nothing else has a backward."""

    def draw(call: Call, generator: torch.Generator) -> tuple[Any, ...]:
        drawn = draw_named(call, generator)
        made = kept(drawn)
        given = {name: made[name] for name in KEPT if name in made and drawn[name] is not None}
        return tuple((drawn | given).values())

    return draw


def _smaller(call: Call) -> list[Call]:
    """Rows that fill no tile, in a few images; of a call with one token an image, as many images."""
    first = call.likes()[0].shape
    if len(first) == 2 or math.prod(first[1:-1]) == 1:
        return [resized(call, n, 1) for n in (197, 17)]
    return [resized(call, *size) for size in ((2, 197), (3, 17))]


def resized(call: Call, images: int, tokens: int) -> Call:
    """The call with other rows: [images, tokens, C], or [images, C] where it has no tokens."""
    found = []
    for name, arg in named_arguments(call).items():
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


def statistics(x: Tensor, norm: str, eps: float) -> Results:
    if norm != "layer":
        return None, None
    return x.mean(-1, keepdim=True), (x.var(-1, keepdim=True, correction=0) + eps).rsqrt()


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


def _only_builtin(call: Call, device: torch.device) -> list[None]:
    return [None]


def product_configs(call: Call, device: torch.device, N: int, K: int) -> list[Config]:
    from vitfast.kernels.triton import linear

    of = named_arguments(call)
    dtype = of["weight" if "weight" in of else "w1"].dtype
    M = math.prod(of["x"].shape[:-1])
    return [config.as_dict() for config in linear.configs(device, dtype, M, N, K)]


def _family(op: str, truth: Callable[..., Results], **more: Any) -> Family:
    return Family(
        run=lambda *args: getattr(torch.ops.vitfast, op)(*args), truth=truth, smaller=_smaller, shared=SHARED,
        rows=True, places=some_rows, **({"configs": _only_builtin} | more),
    )  # fmt: skip


def forward(op: str, kernel: str, truth: Callable[..., Results], **more: Any) -> Family:
    return _family(op, truth, kernel=kernel, **({"draw": draw_forward} | more))


def backward(
    op: str, kernel: str, truth: Callable[..., Results], sums: Sequence[int], kept: Kept, **more: Any
) -> Family:
    return _family(op, truth, kernel=kernel, draw=draw_backward(kept), grad=True, sums=frozenset(sums), **more)
