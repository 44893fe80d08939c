"""From images to tokens: cut into patches, project, add positions, put the prefix tokens in front."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast import reference
from vitfast.ops import _register
from vitfast.ops._check import FLOATS, Reasons, autocast_dtype, cast
from vitfast.ops._register import call, wants_gradient
from vitfast.switches import stock_only


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Images -> tokens, each token written once.

    Args:
        images: [B, C, H, W], floating point or uint8; NCHW, channels-last or any strides. H and W must be
            multiples of the patch.
        weight: [D, C, ph, pw], as of a Conv2d whose stride is its kernel; bias: [D] or None.
        pos_embed: [P + N, D] for all tokens, or [N, D] for the patches only; N = (H / ph) * (W / pw), row-major.
        prefix: [P, D], the class and register tokens.
        mean, std: [C], for uint8 images, which become (images / 255 - mean) / std.

    Returns:
        [B, P + N, D] in weight's dtype (autocast's under autocast), promoted with pos_embed's and prefix's.

    Raises:
        ValueError: shape, device or dtype does not fit; uint8 without mean and std.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), eq. 1.
    """
    dtype = autocast_dtype(weight)
    if images.dtype in FLOATS:
        images = cast(images, dtype)
    weight, bias = cast(weight, dtype), cast(bias, dtype)
    _check(images, weight, bias, pos_embed, prefix, mean, std)
    if stock_only():
        return _exportable(images, weight, bias, pos_embed, prefix, mean, std)
    differentiable = wants_gradient(images, weight, bias, pos_embed, prefix)
    return call(_patch_embed, differentiable, images, weight, bias, pos_embed, prefix, mean, std)


def _check(images, weight, bias, pos_embed, prefix, mean, std):
    check = Reasons("patch_embed")
    if weight.dim() != 4 or images.dim() != 4:
        check.fail(
            f"images must be [B, C, H, W] and weight [D, C, ph, pw], got {list(images.shape)} and {list(weight.shape)}"
        )
        check.raise_if_any()
    B, C, H, W = images.shape
    D, weight_channels, ph, pw = weight.shape
    if weight_channels != C:
        check.fail(f"images must have {weight_channels} channels to match weight, got {C}")
    if H % ph or W % pw or not H or not W:
        check.fail(f"images must be a multiple of the patch {ph}x{pw} in height and width, got {H}x{W}")
    else:
        N, P = (H // ph) * (W // pw), 0 if prefix is None else prefix.shape[0]
        check.shape("prefix", prefix, (P, D), f"to match weight.shape[0]={D}")
        if pos_embed is not None and tuple(pos_embed.shape) not in ((N, D), (P + N, D)):
            check.fail(
                f"pos_embed must be [{N}, {D}] (patches) or [{P + N}, {D}] (all tokens), got {list(pos_embed.shape)}"
            )
    check.shape("bias", bias, (D,), f"to match weight.shape[0]={D}")
    if images.dtype == torch.uint8:
        if mean is None or std is None:
            check.fail("uint8 images need mean and std")
        check.shape("mean", mean, (C,), f"to match the {C} channels")
        check.shape("std", std, (C,), f"to match the {C} channels")
        check.same_dtype(weight=weight, bias=bias)
    elif images.dtype not in FLOATS:
        check.fail(f"images must be floating point or uint8, got {str(images.dtype)[6:]}")
    else:
        check.same_dtype(images=images, weight=weight, bias=bias)
    if images.device != weight.device:
        check.fail(f"all tensors must be on one device, got images on {images.device}, weight on {weight.device}")
    check.tensors(weight=weight, bias=bias, pos_embed=pos_embed, prefix=prefix, mean=mean, std=std)
    check.raise_if_any()


def _exportable(images, weight, bias, pos_embed, prefix, mean, std):
    # a convolution rather than the reference's unfold: it is what exporters and their runtimes know best
    if images.dtype == torch.uint8:
        images = reference.normalise(images, mean, std, weight.dtype)
    x = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return reference.with_prefix(x, pos_embed, prefix)


def _token_dtype(weight, pos_embed, prefix):
    dtype = weight.dtype
    for t in (pos_embed, prefix):
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _sizes(images, weight, prefix):
    B, _, H, W = images.shape
    D, _, ph, pw = weight.shape
    return B, 0 if prefix is None else prefix.shape[0], (H // ph) * (W // pw), D


def _patch_embed_stock(images, weight, bias, pos_embed, prefix, mean, std):
    B, P, N, D = _sizes(images, weight, prefix)
    tokens = images.new_empty(B, P + N, D, dtype=_token_dtype(weight, pos_embed, prefix))
    if images.dtype == torch.uint8:
        images = reference.normalise(images, mean, std, weight.dtype)
    # contiguous: for other strides torch may take another kernel, whose result has other bits
    images, weight = images.contiguous(), weight.contiguous()
    x = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    on_prefix = pos_embed is not None and P > 0 and pos_embed.shape[0] == P + N
    if pos_embed is None:
        tokens[:, P:] = x
    else:
        torch.add(x, pos_embed[P:] if on_prefix else pos_embed, out=tokens[:, P:])
    if P:
        tokens[:, :P] = prefix + pos_embed[:P] if on_prefix else prefix
    return tokens


def _patch_embed_fake(images, weight, bias, pos_embed, prefix, mean, std):
    B, P, N, D = _sizes(images, weight, prefix)
    return images.new_empty(B, P + N, D, dtype=_token_dtype(weight, pos_embed, prefix))


def _patch_embed_backward_stock(grad, images, weight, pos_embed, prefix, mean, std, mask):
    need_images, need_weight, need_bias, need_pos, need_prefix = mask
    B, P, N, D = _sizes(images, weight, prefix)
    grad = grad.contiguous()
    grad_pos = grad_prefix = grad_images = grad_weight = grad_bias = None
    if need_pos:
        on_prefix = pos_embed.shape[0] == P + N
        grad_pos = (grad if on_prefix else grad[:, P:]).sum(0).to(pos_embed.dtype)
    if need_prefix:
        grad_prefix = grad[:, :P].sum(0).to(prefix.dtype)
    patches = grad[:, P:].to(weight.dtype)
    if need_bias:
        grad_bias = patches.sum((0, 1))
    if need_images or need_weight:
        if images.dtype == torch.uint8:
            images = reference.normalise(images, mean, std, weight.dtype)
        images, weight = images.contiguous(), weight.contiguous()
        (ph, pw), (H, W) = weight.shape[2:], images.shape[2:]
        maps = patches.transpose(1, 2).reshape(B, D, H // ph, W // pw)
        grad_images, grad_weight, _ = torch.ops.aten.convolution_backward(
            maps, images, weight, None, [ph, pw], [0, 0], [1, 1], False, [0, 0], 1, [need_images, need_weight, False]
        )
        grad_images, grad_weight = (None if g is None else g.contiguous() for g in (grad_images, grad_weight))
    return grad_images, grad_weight, grad_bias, grad_pos, grad_prefix


def _patch_embed_backward_fake(grad, images, weight, pos_embed, prefix, mean, std, mask):
    need_images, need_weight, need_bias, need_pos, need_prefix = mask
    empty = lambda t: torch.empty_like(t, memory_format=torch.contiguous_format)  # noqa: E731
    return (
        empty(images) if need_images else None,
        empty(weight) if need_weight else None,
        weight.new_empty(weight.shape[0]) if need_bias else None,
        empty(pos_embed) if need_pos else None,
        empty(prefix) if need_prefix else None,
    )


def _setup(ctx, inputs, output):
    images, weight, _, pos_embed, prefix, mean, std = inputs
    ctx.save_for_backward(images, weight, pos_embed, prefix, mean, std)


def _patch_embed_grad(ctx, grad):
    images, weight, pos_embed, prefix, mean, std = ctx.saved_tensors
    grads = _patch_embed_backward(
        grad, images, weight, pos_embed, prefix, mean, std, list(ctx.needed[:5])
    )
    return *grads, None, None


_patch_embed = _register.op(
    "patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, Tensor? mean,"
    " Tensor? std) -> Tensor",
    cpu=_patch_embed_stock, cuda=_patch_embed_stock, fake=_patch_embed_fake,
)  # fmt: skip
_patch_embed_backward = _register.op(
    "patch_embed_backward(Tensor grad, Tensor images, Tensor weight, Tensor? pos_embed, Tensor? prefix, Tensor? mean,"
    " Tensor? std, bool[] mask) -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)",
    cpu=_patch_embed_backward_stock, cuda=_patch_embed_backward_stock, fake=_patch_embed_backward_fake,
)  # fmt: skip
_register.autograd("patch_embed", setup_context=_setup, backward=_patch_embed_grad)
