"""From images to tokens: cut into patches, project, add positions, put the prefix tokens in front."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast import reference
from vitfast.choose.exportable import refuse_proxy, stock_only
from vitfast.kernels import cpu as cpu_kernels
from vitfast.kernels.cuda import patch_embed as launcher
from vitfast.ops import _higher, _launch, _register
from vitfast.ops._check import FLOATS, Reasons, autocast_dtype, cast
from vitfast.ops._register import call, wants_gradient
from vitfast.ops.linear import linear


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    pad: bool = False,
    input_norm: tuple[Tensor | None, Tensor | None, float] | None = None,
) -> Tensor:
    """Images -> tokens, each token written once.

    Args:
        images: [B, C, H, W], floating point or uint8; NCHW, channels-last or any strides. Floating point ones have
            weight's dtype; under autocast any.
        weight: [D, C, ph, pw], as of a Conv2d whose stride is its kernel; bias: [D] or None.
        pos_embed: [P + N, D] for all tokens, or [N, D] for the patches only; N = (H / ph) * (W / pw), row-major.
        prefix: [P, D], the class and register tokens.
        mean, std: [C], for uint8 images, which become (images / 255 - mean) / std.
        pad: take images that the patch does not divide, as if zeros were at right and bottom, after the normalisation;
            the sizes of the grid are then rounded up.
        input_norm: weight [K], bias [K] and eps of a LayerNorm over the K pixels of each patch before the projection,
            as vit-pytorch has it. The weight is then [D, ph, pw, C], a view of a Linear's, and so is the order of
            the K pixels. Not in one kernel: the pixels' rows go through memory, where a norm in fp32 sees them.

    Returns:
        [B, P + N, D] in weight's dtype (autocast's under autocast), promoted with pos_embed's and prefix's.

    Raises:
        ValueError: shape, device or dtype does not fit; uint8 without mean and std; H or W is no multiple of the patch
            and `pad` is False.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), eq. 1.
    """
    refuse_proxy(images)
    dtype, rows_dtype = autocast_dtype(weight), images.dtype if images.dtype in FLOATS else weight.dtype
    weight, bias = cast(weight, dtype), cast(bias, dtype)
    if input_norm is not None:
        return _normed(images, weight, bias, pos_embed, prefix, mean, std, pad, input_norm, rows_dtype)
    check(images, weight, bias, pos_embed, prefix, mean, std, pad=pad, any_float=dtype is not None)
    if stock_only():
        return _exportable(images, weight, bias, pos_embed, prefix, mean, std)
    differentiable = wants_gradient(images, weight, bias, pos_embed, prefix)
    return call(_patch_embed, differentiable, images, weight, bias, pos_embed, prefix, mean, std)


def _normed(images, weight, bias, pos_embed, prefix, mean, std, pad, input_norm, rows_dtype):
    if weight.dim() != 4:
        raise ValueError(f"patch_embed: weight must be [D, ph, pw, C] beside input_norm, got {list(weight.shape)}")
    # what dtypes may meet in the norm is the op's matter that computes it
    check(images, weight.permute(0, 3, 1, 2), bias, pos_embed, prefix, mean, std, pad=pad, any_float=True)
    patch, (norm_weight, norm_bias, eps) = list(weight.shape[1:3]), input_norm
    if stock_only() or wants_gradient(images):
        rows = _rows_of(images, patch, rows_dtype, mean, std, "hwc")
    else:
        rows = call(_image_rows, False, images, patch, rows_dtype, mean, std, "hwc")
    x = linear(
        rows, weight.flatten(1), bias, norm="layer", norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=eps
    )  # fmt: skip
    return reference.with_prefix(x, pos_embed, prefix)


def patches_of(image, patch):
    H, W = image.shape[-2:]
    return -(-H // patch[0]) * -(-W // patch[1])


def check(
    images, weight, bias, pos_embed, prefix, mean, std, name="patch_embed", pad=False, any_float=False
):  # fmt: skip
    wrong = Reasons(name)
    if weight.dim() != 4 or images.dim() != 4:
        wrong.fail(
            f"images must be [B, C, H, W] and weight [D, C, ph, pw], got {list(images.shape)} and {list(weight.shape)}"
        )
        wrong.raise_if_any()
    B, C, H, W = images.shape
    D, weight_channels, ph, pw = weight.shape
    if weight_channels != C:
        wrong.fail(f"images must have {weight_channels} channels to match weight, got {C}")
    if not H or not W or (not pad and (H % ph or W % pw)):
        wrong.fail(f"images must be a multiple of the patch {ph}x{pw} in height and width, got {H}x{W}")
    else:
        N, P = patches_of(images, (ph, pw)), 0 if prefix is None else prefix.shape[0]
        wrong.shape("prefix", prefix, (P, D), f"to match weight.shape[0]={D}")
        # number by number: where sizes are symbols Dynamo finds no tuple in a tuple of tuples (torch 2.11)
        at = None if pos_embed is None else pos_embed.shape
        if at is not None and (len(at) != 2 or at[1] != D or (at[0] != N and at[0] != P + N)):
            wrong.fail(
                f"pos_embed must be [{N}, {D}] (patches) or [{P + N}, {D}] (all tokens), got {list(pos_embed.shape)}"
            )
    wrong.shape("bias", bias, (D,), f"to match weight.shape[0]={D}")
    if images.dtype == torch.uint8:
        if mean is None or std is None:
            wrong.fail("uint8 images need mean and std")
        wrong.shape("mean", mean, (C,), f"to match the {C} channels")
        wrong.shape("std", std, (C,), f"to match the {C} channels")
        wrong.same_dtype(weight=weight, bias=bias)
    elif images.dtype not in FLOATS:
        wrong.fail(f"images must be floating point or uint8, got {str(images.dtype)[6:]}")
    else:
        wrong.same_dtype(**({} if any_float else {"images": images}), weight=weight, bias=bias)
    if images.device != weight.device:
        wrong.fail(f"all tensors must be on one device, got images on {images.device}, weight on {weight.device}")
    if any(t is not None and t.requires_grad for t in (mean, std)) and torch.is_grad_enabled():
        wrong.fail("mean and std are constants of the images and get no gradient; detach them")
    wrong.tensors(weight=weight, bias=bias, pos_embed=pos_embed, prefix=prefix, mean=mean, std=std)
    wrong.raise_if_any()


def _exportable(images, weight, bias, pos_embed, prefix, mean, std):
    # a convolution rather than the reference's unfold: it is what exporters and their runtimes know best
    images = _as_floats(images, weight, mean, std)
    x = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return reference.with_prefix(x, pos_embed, prefix)


def _as_floats(images, weight, mean, std):
    """Images as stock operators multiply them: normalised, in weight's dtype, padded to whole patches."""
    if images.dtype == torch.uint8 and mean is not None:
        # in half precision it would be rounded three times
        images = reference.normalise(images, mean, std, torch.promote_types(weight.dtype, torch.float32))
    (H, W), (ph, pw) = images.shape[2:], weight.shape[2:]
    images = images.to(weight.dtype)
    return F.pad(images, (0, -W % pw, 0, -H % ph)) if H % ph or W % pw else images


def token_dtype(weight, pos_embed, prefix):
    dtype = weight.dtype
    for t in (pos_embed, prefix):
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _sizes(images, weight, prefix):
    P = 0 if prefix is None else prefix.shape[0]
    return images.shape[0], P, patches_of(images, weight.shape[2:]), weight.shape[0]


def _patch_embed_stock(images, weight, bias, pos_embed, prefix, mean, std):
    # contiguous: for other strides torch may take another kernel, whose result has other bits
    images, weight = _as_floats(images, weight, mean, std).contiguous(), weight.contiguous()
    x = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return place_prefix(x, pos_embed, prefix, _new_tokens(images, weight, pos_embed, prefix))


def _new_tokens(images, weight, pos_embed, prefix):
    B, P, N, D = _sizes(images, weight, prefix)
    return images.new_empty(B, P + N, D, dtype=token_dtype(weight, pos_embed, prefix))


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
    if not images.numel() or not weight.numel() or images.dtype not in cpu_kernels.DTYPES:
        return False
    return weight.dtype in cpu_kernels.FLOATS and cpu_kernels.kernels() is not None


def _patch_embed_cpu(images, weight, bias, pos_embed, prefix, mean, std):
    # The order chw for channels-last images too: taking their channels apart costs 0.2 ms for 8 x 3 x 224 x 224, the
    # order hwc would need the weight permuted at 0.3 to 1.3 ms, and the result would depend on the strides.
    if not _has_kernel(images, weight):
        return _patch_embed_stock(images, weight, bias, pos_embed, prefix, mean, std)
    P, patch = 0 if prefix is None else prefix.shape[0], tuple(weight.shape[2:])
    rows = functools.partial(cpu_kernels.patch_rows, images, patch, dtype=weight.dtype, mean=mean, std=std, pad=True)
    flat = weight.flatten(1).contiguous()
    if token_dtype(weight, pos_embed, prefix) != weight.dtype:
        tokens = _new_tokens(images, weight, pos_embed, prefix)
        return place_prefix(_project(rows(), flat, bias), pos_embed, prefix, tokens)
    # Rows of zeros leave room for the prefix, so that the rest happens in place. The bias belongs to the product: it
    # may cancel most of it, and added afterwards it would leave the rounding of what it cancels.
    tokens = _project(rows(prefix=P), flat, bias)
    return place_prefix(tokens[:, P:], pos_embed, prefix, tokens)


def shape_of(images, weight):
    """What choices are kept under: patches by powers of two, since a few more change nothing."""
    patches = images.shape[0] * patches_of(images, weight.shape[2:])
    kinds = [str(t.dtype)[6:] for t in (images, weight)]
    return *kinds, patches.bit_length(), *weight.shape, "channels last" if images.stride(1) == 1 else "channels apart"


def _patch_embed_kernel(images, weight, bias, pos_embed, prefix, mean, std):
    args, found = (images, weight, bias, pos_embed, prefix, mean, std), None
    if images.numel() and weight.numel() and _launch.ready("patch_embed", images):
        found = _launch.attempt(
            "patch_embed", images, launcher.why_not(images, weight.dtype, weight.shape[2:], pos_embed, prefix),
            shape_of(images, weight), lambda config: _by_kernel(*args, config),
        )  # fmt: skip
    if found is not None:
        return found
    return (_patch_embed_stock if images.is_cuda else _patch_embed_cpu)(*args)


def _by_kernel(images, weight, bias, pos_embed, prefix, mean, std, config):
    _, P, N, _ = _sizes(images, weight, prefix)
    of_prefix, positions = None, pos_embed
    if pos_embed is not None and P and pos_embed.shape[0] == P + N:
        of_prefix, positions = pos_embed[:P], pos_embed[P:]
    dtype = token_dtype(weight, pos_embed, prefix)
    return launcher.embed(images, weight, bias, positions, prefix, of_prefix, mean, std, dtype, config)


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
    if need_pos or need_prefix or need_bias:
        # one pass for all three; the sum over the rest has a hundredth of the numbers
        wide = torch.promote_types(grad.dtype, torch.float32)
        by_token = grad.sum(0, dtype=wide)
        if need_pos:
            on_prefix = pos_embed.shape[0] == P + N
            # copies: results of an op share no memory
            grad_pos = (by_token if on_prefix else by_token[P:]).to(pos_embed.dtype, copy=True)
        if need_prefix:
            grad_prefix = by_token[:P].to(prefix.dtype, copy=True)
        if need_bias:
            grad_bias = by_token[P:].sum(0).to(weight.dtype)
    if need_images or need_weight:
        mask = [need_images, need_weight]
        grad_images, grad_weight = _grads_of_product(grad.to(weight.dtype), images, weight, P, mean, std, mask)
    return grad_images, grad_weight, grad_bias, grad_pos, grad_prefix


def _grads_of_product(grad, images, weight, P, mean, std, mask):
    """Gradients of images and weight; `grad` is that of the tokens, [B, P + N, D]."""
    patches, found = grad[:, P:], None
    if images.numel() and weight.numel() and _launch.ready("patch_embed_backward", images):
        found = _launch.attempt(
            "patch_embed_backward", images, launcher.why_not(images, weight.dtype, weight.shape[2:]),
            shape_of(images, weight),
            lambda config: (
                _images_backward(patches, images, weight) if mask[0] else None,
                launcher.weight_gradient(images, weight, grad, P, mean, std, config) if mask[1] else None,
            ),
        )  # fmt: skip
    if found is not None:
        return found
    if weight.is_cuda or not _has_kernel(images, weight):
        return _conv_backward(patches, images, weight, mean, std, mask)
    return _rows_backward(patches, images, weight, mean, std, mask)


def _conv_backward(grad, images, weight, mean, std, mask):
    given, (H, W) = images, images.shape[2:]
    images, weight = _as_floats(images, weight, mean, std).contiguous(), weight.contiguous()
    (B, _, padded_H, padded_W), (D, _, ph, pw) = images.shape, weight.shape
    maps = grad.transpose(1, 2).reshape(B, D, padded_H // ph, padded_W // pw)
    grad_images, grad_weight, _ = torch.ops.aten.convolution_backward(
        maps, images, weight, None, [ph, pw], [0, 0], [1, 1], False, [0, 0], 1, [*mask, False]
    )
    if grad_images is not None:
        grad_images = grad_images[:, :, :H, :W].to(given.dtype).contiguous()
    return grad_images, None if grad_weight is None else grad_weight.contiguous()


def _rows_backward(grad, images, weight, mean, std, mask):
    """`_conv_backward` by matrix products. B/16, 8 images on one core of an EPYC (Zen 4), this and that in ms: weight
    19 and 21 in fp32, 10 and 14 in bf16; images 19 and 106, 9 and 56.
    """
    grad_images = _images_backward(grad, images, weight) if mask[0] else None
    grad_weight = None
    if mask[1]:
        rows = cpu_kernels.patch_rows(images, tuple(weight.shape[2:]), dtype=weight.dtype, mean=mean, std=std, pad=True)
        grad_weight = (grad.reshape(-1, weight.shape[0]).t() @ rows.flatten(0, 1)).view(weight.shape)
    return grad_images, grad_weight


def _images_backward(grad, images, weight):
    """The gradient of images by a matrix product, which is deterministic; `grad` [B, N, D] is that of the patches."""
    (B, C, H, W), (D, _, ph, pw) = images.shape, weight.shape
    gh, gw = -(-H // ph), -(-W // pw)
    pixels = (grad.reshape(-1, D) @ weight.reshape(D, -1)).view(B, gh, gw, C, ph, pw).permute(0, 3, 1, 4, 2, 5)
    return pixels.reshape(B, C, gh * ph, gw * pw)[:, :, :H, :W].to(images.dtype).contiguous()


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


def _rows_of(images, patch, dtype, mean, std, order):
    like = images.new_empty(0, 0, *patch, dtype=dtype)
    return reference.patch_rows(_as_floats(images, like, mean, std), patch, order)


def _image_rows_stock(images, patch, dtype, mean, std, order):
    rows = _rows_of(images, patch, dtype, mean, std, order)
    # of some layouts they are the images' own memory, which an op must not return
    own = rows.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()
    return rows.contiguous() if own else rows.clone(memory_format=torch.contiguous_format)


def _image_rows_cpu(images, patch, dtype, mean, std, order):
    takes = images.dtype in cpu_kernels.DTYPES and dtype in cpu_kernels.FLOATS and cpu_kernels.kernels() is not None
    if not images.numel() or not takes:
        return _image_rows_stock(images, patch, dtype, mean, std, order)
    return cpu_kernels.patch_rows(images, tuple(patch), order=order, dtype=dtype, mean=mean, std=std, pad=True)


def _image_rows_kernel(images, patch, dtype, mean, std, order):
    found, (B, C) = None, images.shape[:2]
    if images.numel() and _launch.ready("patch_embed", images):
        like = images.new_empty(0, C, *patch, dtype=dtype)
        found = _launch.attempt(
            "patch_embed", images, launcher.why_not(images, dtype, patch), (*shape_of(images, like), "rows"),
            lambda config: launcher.rows(images, patch, dtype, mean, std, order),
        )  # fmt: skip
    if found is not None:
        return found.view(B, patches_of(images, patch), -1)
    return (_image_rows_stock if images.is_cuda else _image_rows_cpu)(images, patch, dtype, mean, std, order)


def _image_rows_fake(images, patch, dtype, mean, std, order):
    B, C = images.shape[:2]
    return images.new_empty(B, patches_of(images, patch), C * patch[0] * patch[1], dtype=dtype)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _patch_embed_grad(ctx, grad):
    images, weight, bias, pos_embed, prefix, mean, std = ctx.saved_tensors
    need = list(ctx.needed[:5])
    if _higher.wanted(grad):
        grads = _higher.grads(
            lambda images, weight, *others: reference.patch_embed(
                _as_floats(images, weight, mean, std), weight, *others
            ),
            (images, weight, bias, pos_embed, prefix), need, grad,
        )  # fmt: skip
    else:
        grads = call(_patch_embed_backward, False, grad, images, weight, pos_embed, prefix, mean, std, need)
    return *grads, None, None


_patch_embed = _register.op(
    "patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, Tensor? mean,"
    " Tensor? std) -> Tensor",
    cpu=_patch_embed_kernel if _launch.INTERPRETED else _patch_embed_cpu, cuda=_patch_embed_kernel,
    fake=_patch_embed_fake, cpu_kernel="csrc/cpu/patch_rows.h", cuda_kernel="patch_embed",
)  # fmt: skip
_patch_embed_backward = _register.op(
    "patch_embed_backward(Tensor grad, Tensor images, Tensor weight, Tensor? pos_embed, Tensor? prefix, Tensor? mean,"
    " Tensor? std, bool[] mask) -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)",
    cpu=_patch_embed_grads, cuda=_patch_embed_grads, fake=_patch_embed_backward_fake,
    cuda_kernel="patch_embed_backward",
)  # fmt: skip
_register.autograd("patch_embed", setup_context=_setup, backward=_patch_embed_grad)
# without a gradient, which only images need: stock operators have it
_image_rows = _register.op(
    "image_rows(Tensor images, int[] patch, ScalarType dtype, Tensor? mean, Tensor? std, str order) -> Tensor",
    cpu=_image_rows_kernel if _launch.INTERPRETED else _image_rows_cpu, cuda=_image_rows_kernel, fake=_image_rows_fake,
    cpu_kernel="csrc/cpu/patch_rows.h", cuda_kernel="patch_embed",
)  # fmt: skip
_register.no_gradient("image_rows")
