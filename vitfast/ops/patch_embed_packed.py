"""Images of different sizes -> one row of tokens, for attention over packed sequences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast import reference
from vitfast.choose.exportable import refuse_proxy, stock_only
from vitfast.kernels import cpu as cpu_kernels
from vitfast.kernels.cuda import patch_embed as launcher
from vitfast.ops import _higher, _launch, _register
from vitfast.ops._check import FLOATS, autocast_dtype, cast
from vitfast.ops._register import call, wants_gradient
from vitfast.ops.patch_embed import check, patches_of, token_dtype


def patch_embed_packed(
    images: list[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: list[Tensor] | None = None,
    prefix: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`patch_embed` of images of different sizes, their tokens one after the other and nothing between them.

    Args:
        images: [C, H_i, W_i] each, otherwise as in `patch_embed`; at least one.
        weight, bias, prefix, mean, std: as in `patch_embed`.
        pos_embed: for each image [P + N_i, D] or [N_i, D].

    Returns:
        Tokens [sum of P + N_i, D], dtype as in `patch_embed`, and int32 [len(images) + 1] on the same device: image i
        has tokens [cu_seqlens[i], cu_seqlens[i + 1]).

    Raises:
        TypeError: images is no list.
        ValueError: as `patch_embed`, naming the image; no image; not one pos_embed for each image.

    Source: Dehghani et al., "Patch n' Pack: NaViT" (2023), section 2.
    """
    refuse_proxy(images)
    if not isinstance(images, (list, tuple)):
        raise TypeError(f"patch_embed_packed: images must be a list of [C, H, W] tensors, got {type(images).__name__}")
    images = list(images)
    if not images or (pos_embed is not None and len(pos_embed) != len(images)):
        positions = "None" if pos_embed is None else len(pos_embed)
        raise ValueError(
            f"patch_embed_packed: at least one image and pos_embed for each (or None) are needed, got {len(images)} "
            f"images and pos_embed for {positions}"
        )
    dtype = autocast_dtype(weight)
    weight, bias = cast(weight, dtype), cast(bias, dtype)
    given: Sequence[Tensor | None] = [None] * len(images) if pos_embed is None else pos_embed
    for i, (image, position) in enumerate(zip(images, given, strict=True)):
        refuse_proxy(image)
        name = f"patch_embed_packed: images[{i}]"
        if image.dim() != 3:
            raise ValueError(f"{name}: images must be [C, H, W], got {list(image.shape)}")
        if image.dtype != images[0].dtype:
            raise ValueError(f"{name}: must have the dtype of images[0], {images[0].dtype}, got {image.dtype}")
        check(image[None], weight, bias, position, prefix, mean, std, name, any_float=dtype is not None)
    patch, P = list(weight.shape[2:]), 0 if prefix is None else prefix.shape[0]
    lengths = [patches_of(image, patch) for image in images]
    packed = None
    if pos_embed is not None:
        packed = torch.cat([each[-N:] for each, N in zip(pos_embed, lengths, strict=True)])
        if prefix is not None and P and any(each.shape[0] == P + N for each, N in zip(pos_embed, lengths, strict=True)):
            # the prefix tokens of images of other sizes have other positions
            whole = prefix.to(torch.promote_types(prefix.dtype, packed.dtype))
            pairs = zip(pos_embed, lengths, strict=True)
            prefix = torch.stack([whole + each[:P] if len(each) == P + N else whole for each, N in pairs])
    if stock_only() or wants_gradient(*images):
        tokens = _packed_stock(images, weight, bias, packed, prefix, mean, std)
    else:
        differentiable = wants_gradient(weight, bias, packed, prefix)
        tokens = call(_packed, differentiable, images, weight, bias, packed, prefix, mean, std)
    # added up on the host: the device need not be waited for
    ends = itertools.accumulate((P + N for N in lengths), initial=0)
    return tokens, torch.tensor(list(ends), dtype=torch.int32, device="cpu").to(weight.device, non_blocking=True)


def _packed_stock(images, weight, bias, positions, prefix, mean, std):
    patch = weight.shape[2:]
    x = F.linear(_rows_stock(images, patch, weight.dtype, mean, std), weight.flatten(1), bias)
    lengths = [patches_of(image, patch) for image in images]
    return _packed_tokens(x if positions is None else x + positions, prefix, lengths)


def _packed_tokens(x, prefix, lengths):
    """Patch tokens of all images [sum of N_i, D] with the prefix of each in front of its own."""
    if prefix is None:
        return x
    prefixes = prefix if prefix.dim() == 3 else prefix.expand(len(lengths), -1, -1)
    return torch.cat([part for pair in zip(prefixes, x.split(lengths), strict=True) for part in pair])


def _rows_stock(images, patch, dtype, mean, std):
    wide = torch.promote_types(dtype, torch.float32)
    images = [image if image.dtype in FLOATS or mean is None else reference.normalise(image, mean, std, wide)
              for image in images]  # fmt: skip
    return torch.cat([reference.patch_rows(image[None].to(dtype), patch)[0] for image in images])


def _rows_cpu(images, patch, dtype, mean, std):
    known = dtype in cpu_kernels.FLOATS and all(i.dtype in cpu_kernels.DTYPES for i in images)
    if not known or cpu_kernels.kernels() is None:
        return _rows_stock(images, patch, dtype, mean, std)
    lengths = [patches_of(image, patch) for image in images]
    rows = images[0].new_empty(sum(lengths), images[0].shape[0] * patch[0] * patch[1], dtype=dtype)
    for image, out in zip(images, rows.split(lengths), strict=True):
        cpu_kernels.patch_rows(image[None], tuple(patch), dtype=dtype, mean=mean, std=std, out=out[None])
    return rows


def _rows_on(device, images, patch, dtype, mean, std):
    return (_rows_stock if device.type == "cuda" else _rows_cpu)(images, patch, dtype, mean, std)


def _packed_shape_of(images, weight):
    patches = sum(patches_of(image, weight.shape[2:]) for image in images)
    kinds = [str(t.dtype)[6:] for t in (images[0], weight)]
    return *kinds, patches.bit_length(), *weight.shape, "packed"


def _why_not(images, weight, *others):
    reasons = launcher.why_not(images[0], weight.dtype, weight.shape[2:], *others)
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        # their addresses and sizes go to the device at every call
        reasons.append("packed images in a CUDA graph")
    return reasons


def _packed_run(images, weight, bias, positions, prefix, mean, std):
    found = None
    if weight.numel() and _launch.ready("patch_embed", weight):
        dtype = token_dtype(weight, positions, prefix)
        found = _launch.attempt(
            "patch_embed", weight, _why_not(images, weight, positions, prefix), _packed_shape_of(images, weight),
            lambda config: launcher.embed(
                images, weight, bias, positions, prefix, None, mean, std, dtype, config
            ),
        )  # fmt: skip
    if found is not None:
        return found
    patch = weight.shape[2:]
    x = F.linear(_rows_on(weight.device, images, patch, weight.dtype, mean, std), weight.flatten(1), bias)
    tokens = _packed_tokens(
        x if positions is None else x + positions, prefix, [patches_of(image, patch) for image in images]
    )
    return tokens.to(token_dtype(weight, positions, prefix))


def _packed_fake(images, weight, bias, positions, prefix, mean, std):
    P = 0 if prefix is None else prefix.shape[-2]
    rows = sum(P + patches_of(image, weight.shape[2:]) for image in images)
    return weight.new_empty(rows, weight.shape[0], dtype=token_dtype(weight, positions, prefix))


def _packed_grads(grad, images, weight, positions, prefix, mean, std, mask):
    need_weight, need_bias, need_positions, need_prefix = mask
    grad_weight = grad_bias = grad_positions = grad_prefix = None
    P, patch = 0 if prefix is None else prefix.shape[-2], weight.shape[2:]
    lengths = [patches_of(image, patch) for image in images]
    parts = grad.split([n for N in lengths for n in (P, N)])
    wide = torch.promote_types(grad.dtype, torch.float32)
    if need_prefix:
        of_prefix = torch.stack(parts[::2])
        grad_prefix = of_prefix.to(prefix.dtype) if prefix.dim() == 3 else of_prefix.sum(0, dtype=wide).to(prefix.dtype)
    if need_positions:
        grad_positions = torch.cat(parts[1::2]).to(positions.dtype)
    if need_bias:
        grad_bias = torch.stack([part.sum(0, dtype=wide) for part in parts[1::2]]).sum(0).to(weight.dtype)
    if need_weight:
        if _launch.ready("patch_embed_backward", weight):
            grad_weight = _launch.attempt(
                "patch_embed_backward", weight, _why_not(images, weight), _packed_shape_of(images, weight),
                lambda config: launcher.weight_gradient(
                    images, weight, grad.to(weight.dtype), P, mean, std, config
                ),
            )  # fmt: skip
        if grad_weight is None:
            rows = _rows_on(weight.device, images, patch, weight.dtype, mean, std)
            of_patches = torch.cat(parts[1::2]).to(weight.dtype)
            grad_weight = (of_patches.t() @ rows).view(weight.shape)
    return grad_weight, grad_bias, grad_positions, grad_prefix


def _packed_backward_fake(grad, images, weight, positions, prefix, mean, std, mask):
    empty = lambda t: torch.empty_like(t, memory_format=torch.contiguous_format)  # noqa: E731
    need_weight, need_bias, need_positions, need_prefix = mask
    return (
        empty(weight) if need_weight else None,
        weight.new_empty(weight.shape[0]) if need_bias else None,
        empty(positions) if need_positions else None,
        empty(prefix) if need_prefix else None,
    )


def _packed_setup(ctx, inputs, output):
    images, *others = inputs
    ctx.save_for_backward(*others, *images)


def _packed_grad(ctx, grad):
    weight, bias, positions, prefix, mean, std, *images = ctx.saved_tensors
    mask = list(ctx.needed[1:5])
    if _higher.wanted(grad):
        formula = lambda *given: _packed_stock(images, *given, mean, std)  # noqa: E731
        grads = _higher.grads(formula, (weight, bias, positions, prefix), mask, grad)
    else:
        grads = _packed_backward(grad, images, weight, positions, prefix, mean, std, mask)
    return None, *grads, None, None


_packed = _register.op(
    "patch_embed_packed(Tensor[] images, Tensor weight, Tensor? bias, Tensor? positions, Tensor? prefix,"
    " Tensor? mean, Tensor? std) -> Tensor",
    cpu=_packed_run, cuda=_packed_run, fake=_packed_fake, cpu_kernel="csrc/cpu/patch_rows.h", cuda_kernel="patch_embed",
)  # fmt: skip
_packed_backward = _register.op(
    "patch_embed_packed_backward(Tensor grad, Tensor[] images, Tensor weight, Tensor? positions, Tensor? prefix,"
    " Tensor? mean, Tensor? std, bool[] mask) -> (Tensor?, Tensor?, Tensor?, Tensor?)",
    cpu=_packed_grads, cuda=_packed_grads, fake=_packed_backward_fake, cuda_kernel="patch_embed_backward",
)  # fmt: skip
_register.autograd("patch_embed_packed", setup_context=_packed_setup, backward=_packed_grad)
