"""From images to tokens: cut into patches, project, add positions, put the prefix tokens in front."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast import native, reference
from vitfast.ops import _register
from vitfast.ops._check import FLOATS, Reasons, autocast_dtype, cast
from vitfast.ops._register import call, wants_gradient
from vitfast.ops.linear import linear
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
        ValueError: as `patch_embed`, naming the image; no image; not one pos_embed for each image.

    Source: Dehghani et al., "Patch n' Pack: NaViT" (2023), section 2.
    """
    if not images or (pos_embed is not None and len(pos_embed) != len(images)):
        positions = "None" if pos_embed is None else len(pos_embed)
        raise ValueError(
            f"patch_embed_packed: at least one image and pos_embed for each (or None) are needed, got {len(images)} "
            f"images and pos_embed for {positions}"
        )
    dtype = autocast_dtype(weight)
    images = [cast(image, dtype) if image.dtype in FLOATS else image for image in images]
    weight, bias = cast(weight, dtype), cast(bias, dtype)
    positions = [None] * len(images) if pos_embed is None else pos_embed
    for i, (image, position) in enumerate(zip(images, positions, strict=True)):
        if image.dim() != 3:
            raise ValueError(f"patch_embed_packed: images[{i}]: images must be [C, H, W], got {list(image.shape)}")
        _check(image[None], weight, bias, position, prefix, mean, std, f"patch_embed_packed: images[{i}]")
    patch, P = list(weight.shape[2:]), 0 if prefix is None else prefix.shape[0]
    lengths = [_patches(image, patch) for image in images]
    if stock_only() or wants_gradient(*images):
        rows = _rows_stock(images, patch, weight.dtype, mean, std)
    else:
        rows = call(_patch_rows, False, images, patch, weight.dtype, mean, std)
    if pos_embed is None:
        tokens = linear(rows[None], weight.flatten(1), bias)[0]
    else:
        on_patches = torch.cat([position[-N:] for position, N in zip(pos_embed, lengths, strict=True)])
        tokens = linear(rows[None], weight.flatten(1), bias, residual=on_patches[None])[0]
    if P:
        parts = []
        for position, N, patches in zip(positions, lengths, tokens.split(lengths), strict=True):
            on_prefix = position is not None and position.shape[0] == P + N
            parts += [prefix + position[:P] if on_prefix else prefix, patches]
        tokens = torch.cat(parts)
    cu_seqlens = torch.tensor([0] + [P + N for N in lengths], device=weight.device).cumsum(0, dtype=torch.int32)
    return tokens, cu_seqlens


def _patches(image, patch):
    H, W = image.shape[-2:]
    return (H // patch[0]) * (W // patch[1])


def _check(images, weight, bias, pos_embed, prefix, mean, std, name="patch_embed"):
    check = Reasons(name)
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
    if images.dtype == torch.uint8:
        images = reference.normalise(images, mean, std, weight.dtype)
    # contiguous: for other strides torch may take another kernel, whose result has other bits
    images, weight = images.contiguous(), weight.contiguous()
    x = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return place_prefix(x, pos_embed, prefix, _new_tokens(images, weight, pos_embed, prefix))


def _new_tokens(images, weight, pos_embed, prefix):
    B, P, N, D = _sizes(images, weight, prefix)
    return images.new_empty(B, P + N, D, dtype=_token_dtype(weight, pos_embed, prefix))


def place_prefix(x, pos_embed, prefix, tokens):
    """`reference.with_prefix`, each token written once into `tokens`, where `x` may be the patches already."""
    P = 0 if prefix is None else prefix.shape[0]
    on_prefix = pos_embed is not None and P > 0 and pos_embed.shape[0] == tokens.shape[1]
    if pos_embed is not None:
        torch.add(x, pos_embed[P:] if on_prefix else pos_embed, out=tokens[:, P:])
    elif x.data_ptr() != tokens[:, P:].data_ptr():
        tokens[:, P:] = x
    if P:
        tokens[:, :P] = prefix + pos_embed[:P] if on_prefix else prefix
    return tokens


def _has_kernel(images, weight):
    if not images.numel() or not weight.numel() or images.dtype not in native.DTYPES:
        return False
    return weight.dtype in native.FLOATS and native.kernels() is not None


def _patch_embed_cpu(images, weight, bias, pos_embed, prefix, mean, std):
    # The order chw for channels-last images too: taking their channels apart costs 0.2 ms for 8 x 3 x 224 x 224, the
    # order hwc would need the weight permuted at 0.3 to 1.3 ms, and the result would depend on the strides.
    if not _has_kernel(images, weight):
        return _patch_embed_stock(images, weight, bias, pos_embed, prefix, mean, std)
    P, patch = 0 if prefix is None else prefix.shape[0], tuple(weight.shape[2:])
    rows = functools.partial(native.patch_rows, images, patch, dtype=weight.dtype, mean=mean, std=std)
    flat = weight.flatten(1).contiguous()
    if _token_dtype(weight, pos_embed, prefix) != weight.dtype:
        tokens = _new_tokens(images, weight, pos_embed, prefix)
        return place_prefix(_project(rows(), flat, bias), pos_embed, prefix, tokens)
    # Rows of zeros leave room for the prefix, so that the rest happens in place. The bias belongs to the product: it
    # may cancel most of it, and added afterwards it would leave the rounding of what it cancels.
    tokens = _project(rows(prefix=P), flat, bias)
    return place_prefix(tokens[:, P:], pos_embed, prefix, tokens)


def _project(rows, weight, bias):
    if rows.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # oneDNN: F.linear takes MKL for fp32, which on AMD EPYC (Zen 4) is slower than it by 4 % (B/16), 5 % (S/16)
        # and 16 % (L/14), and for the last two slower than the stock convolution. That convolution beats this for
        # S/14 and Ti/16 by 1 to 2 %, with twice the rounding error: not worth a second path.
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return F.linear(rows, weight, bias)


def _patch_embed_fake(images, weight, bias, pos_embed, prefix, mean, std):
    return _new_tokens(images, weight, pos_embed, prefix)


def _patch_embed_grads(grad, images, weight, pos_embed, prefix, mean, std, mask):
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
        grads_of = _rows_backward if weight.device.type == "cpu" and _has_kernel(images, weight) else _conv_backward
        grad_images, grad_weight = grads_of(patches, images, weight, mean, std, [need_images, need_weight])
    return grad_images, grad_weight, grad_bias, grad_pos, grad_prefix


def _conv_backward(grad, images, weight, mean, std, mask):
    """Gradients of images and weight; `grad` is that of the patches, [B, N, D]."""
    if images.dtype == torch.uint8:
        images = reference.normalise(images, mean, std, weight.dtype)
    images, weight = images.contiguous(), weight.contiguous()
    (B, _, H, W), (D, _, ph, pw) = images.shape, weight.shape
    maps = grad.transpose(1, 2).reshape(B, D, H // ph, W // pw)
    grads = torch.ops.aten.convolution_backward(
        maps, images, weight, None, [ph, pw], [0, 0], [1, 1], False, [0, 0], 1, [*mask, False]
    )
    return [None if g is None else g.contiguous() for g in grads[:2]]


def _rows_backward(grad, images, weight, mean, std, mask):
    """`_conv_backward` by matrix products. B/16, 8 images on one core of an EPYC (Zen 4), this and that in ms: weight
    19 and 21 in fp32, 10 and 14 in bf16; images 19 and 106, 9 and 56.
    """
    (B, C, H, W), (D, _, ph, pw) = images.shape, weight.shape
    grad, grad_images, grad_weight = grad.reshape(-1, D), None, None
    if mask[0]:
        pixels = (grad @ weight.reshape(D, -1)).view(B, H // ph, W // pw, C, ph, pw)
        grad_images = pixels.permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)
    if mask[1]:
        rows = native.patch_rows(images, (ph, pw), dtype=weight.dtype, mean=mean, std=std)
        grad_weight = (grad.t() @ rows.flatten(0, 1)).view(weight.shape)
    return grad_images, grad_weight


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


def _rows_stock(images, patch, dtype, mean, std):
    images = [image if image.dtype in FLOATS else reference.normalise(image, mean, std, dtype) for image in images]
    return torch.cat([reference.patch_rows(image[None], patch)[0] for image in images])


def _rows_cpu(images, patch, dtype, mean, std):
    if dtype not in native.FLOATS or native.kernels() is None or any(i.dtype not in native.DTYPES for i in images):
        return _rows_stock(images, patch, dtype, mean, std)
    rows = _rows_fake(images, patch, dtype, mean, std)
    for image, out in zip(images, rows.split([_patches(image, patch) for image in images]), strict=True):
        native.patch_rows(image[None], patch, dtype=dtype, mean=mean, std=std, out=out[None])
    return rows


def _rows_fake(images, patch, dtype, mean, std):
    total = sum(_patches(image, patch) for image in images)
    return images[0].new_empty(total, images[0].shape[0] * patch[0] * patch[1], dtype=dtype)


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
    cpu=_patch_embed_cpu, cuda=_patch_embed_stock, fake=_patch_embed_fake, cpu_kernel="csrc/patch_rows_cpu.h",
)  # fmt: skip
_patch_embed_backward = _register.op(
    "patch_embed_backward(Tensor grad, Tensor images, Tensor weight, Tensor? pos_embed, Tensor? prefix, Tensor? mean,"
    " Tensor? std, bool[] mask) -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)",
    cpu=_patch_embed_grads, cuda=_patch_embed_grads, fake=_patch_embed_backward_fake,
)  # fmt: skip
_register.autograd("patch_embed", setup_context=_setup, backward=_patch_embed_grad)
# for images of different sizes; without a gradient, which only images need: stock operators have it
_patch_rows = _register.op(
    "patch_rows(Tensor[] images, int[] patch, ScalarType dtype, Tensor? mean, Tensor? std) -> Tensor",
    cpu=_rows_cpu, cuda=_rows_stock, fake=_rows_fake, cpu_kernel="csrc/patch_rows_cpu.h",
)  # fmt: skip
