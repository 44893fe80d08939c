"""Attention's entries.

q [B, Nq, H, D], k and v [B, Nk, H, D] or all of them as qkv [B, N, 3, H, D]; out [B, Nq, H * D], lse [B, H, Nq].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitfast import reference
from vitfast.check.calls import Call, Like, contiguous
from vitfast.check.families.family import Family, Tensors, draw_all, some_images
from vitfast.choose.dispatch import Config


def _by_head(truth: Callable[..., Tensors], *tensors: Tensor) -> list[list[Tensors]]:
    """`truth` of each head of each image: the weights of all of them in fp64 could take more memory than the model."""
    B, H = tensors[0].shape[0], tensors[0].shape[2]
    return [[truth(*(t[i : i + 1, :, h : h + 1] for t in tensors)) for h in range(H)] for i in range(B)]


def _join(found: list[list[Tensors]], *dims: int) -> Tensors:
    """The results of all heads of all images, each with its heads in the dim given."""
    return tuple(
        torch.cat([torch.cat([head[n] for head in image], dim) for image in found]) for n, dim in enumerate(dims)
    )


def _attention_truth(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensors:
    """out and lse."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
        return reference.attention(q, k, v, scale), torch.logsumexp(logits, dim=-1)

    return _join(_by_head(attend, q, k, v), 2, 1)


def _attention_backward_truth(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensors:
    """By autograd, from the inputs alone: `out` and `lse` carry the rounding of the forward that made them."""

    def gradients(grad: Tensor, *inputs: Tensor) -> Tensors:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in inputs]
            return torch.autograd.grad(reference.attention(*leaves, scale), leaves, grad.flatten(2))

    return _join(_by_head(gradients, grad.unflatten(-1, q.shape[2:]), q, k, v), 2, 2, 2)


# of attention, in fp32: a GiB
MOST_WEIGHTS = 1 << 28


def _images(call: Call, generator: torch.Generator) -> Tensor:
    """`some_images`, fewer where stock operators might have no room for so many at once."""
    q, k = _parts(call)
    return some_images(call, generator, max(1, min(4, MOST_WEIGHTS // (q.shape[1] * q.shape[2] * k.shape[1]))))


def _draw_backward(call: Call, generator: torch.Generator) -> tuple[Any, ...]:
    """Random ones, and out and lse as stock operators make them of these: nothing else has a backward."""
    args = list(draw_all(call, generator))
    forward = "attention_qkv" if call.op == "attention_qkv_backward" else "attention"
    args[-3:-1] = ATTENTION[forward].stock([*args[1:-3], args[-1]])
    return tuple(args)


def _parts(call: Call) -> tuple[Like, Like]:
    """q and k of a call, forward or backward, packed or not; of the packed ones without their strides."""
    first = call.args[1 if call.op.endswith("_backward") else 0]
    if "qkv" in call.op:
        B, N, _, H, D = first.shape
        return (contiguous(B, N, H, D, dtype=first.dtype),) * 2
    return first, call.args[2 if call.op.endswith("_backward") else 1]


# more keys than that are more steps of the same loop; and the truth of a few images has to take milliseconds
MOST_TOKENS = 1025


def _smaller_attention(call: Call) -> list[Call]:
    """The call's own tokens, fewer than any block of a kernel, and a few more than some blocks.

    Enough images and heads that the error of all numbers together is not a matter of luck.
    """
    q, k = _parts(call)
    D, own = q.shape[-1], (q.shape[1], k.shape[1])
    if own[0] == own[1]:
        sizes = [(n, n) for n in (min(own[0], MOST_TOKENS), 17, 131)]
    else:
        sizes = [(min(own[0], MOST_TOKENS), n) for n in (min(own[1], MOST_TOKENS), 17, 131)]
    return [_attention_call(call, 2 if nq > 8 else 16, nq, nk, 3, D) for nq, nk in sizes]


def _attention_call(like: Call, B: int, Nq: int, Nk: int, H: int, D: int) -> Call:
    """A call of the same op with other sizes; k and v lie side by side, as a model's projection leaves them."""
    dtype, scale = like.dtype, like.args[-1]
    if "qkv" in like.op:
        inputs = [contiguous(B, Nq, 3, H, D, dtype=dtype)]
    else:
        kv = Like((B, Nk, H, D), (2 * Nk * H * D, 2 * H * D, D, 1), dtype)
        inputs = [contiguous(B, Nq, H, D, dtype=dtype), kv, kv]
    if not like.op.endswith("_backward"):
        return Call(like.op, (*inputs, scale))
    rows = contiguous(B, Nq, H * D, dtype=dtype)
    lse = contiguous(B, H, Nq, dtype=torch.promote_types(dtype, torch.float32))
    return Call(like.op, (rows, *inputs, rows, lse, scale))


def _attention_configs(call: Call, device: torch.device) -> list[Config]:
    from vitfast.kernels.triton import attention

    q, k = _parts(call)
    configs = attention.backward_configs if call.op.endswith("_backward") else attention.forward_configs
    B, Nq, H, D = q.shape
    return [config.as_dict() for config in configs(device, q.dtype, B * H, D, Nq, k.shape[1])]


def _attention(op: str, truth: Callable[..., Any], grad: bool = False) -> Family:
    return Family(
        kernel="attention_backward" if grad else "attention",
        run=lambda *args: getattr(torch.ops.vitfast, op)(*args),
        truth=truth,
        smaller=_smaller_attention,
        configs=_attention_configs,
        draw=_draw_backward if grad else draw_all,
        grad=grad,
        places=_images,
        rivals=({"backend": "flash"}, {"backend": "cudnn"}),
    )


# by the name of the torch op
ATTENTION: dict[str, Family] = {
    "attention": _attention("attention", _attention_truth),
    "attention_qkv": _attention(
        "attention_qkv", lambda qkv, scale: _attention_truth(*qkv.unbind(2), scale)
    ),
    "attention_backward": _attention("attention_backward", _attention_backward_truth, grad=True),
    "attention_qkv_backward": _attention(
        "attention_qkv_backward",
        lambda grad, qkv, out, lse, scale: torch.stack(
            _attention_backward_truth(grad, *qkv.unbind(2), out, lse, scale), dim=2
        ),
        grad=True,
    ),
}  # fmt: skip
