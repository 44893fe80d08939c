"""A linear layer with everything a ViT block puts around it: norm before, activation, scale and residual after."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast import reference
from vitfast.choose.config_tables import Product
from vitfast.choose.exportable import stock_only
from vitfast.kernels import cpu as cpu_kernels
from vitfast.kernels.operands import Norm, Saved, Tail, new
from vitfast.ops import _higher, _launch, _register, _stock, _tiles
from vitfast.ops._check import Reasons, alike, autocast_dtype, cast
from vitfast.ops._on_cpu import faster_as_stock
from vitfast.ops._register import call, must_have_saved, wants_gradient

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "silu")
NORMS = ("none", "layer", "rms")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    act: str = "none",
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + row_scale * gamma * act(norm(x) @ weight.T + bias), each part optional.

    Args:
        x: [B, ..., K], any strides.
        weight: [D, K]; bias: [D] or None.
        norm: 'none', 'layer' or 'rms', with norm_weight [K], norm_bias [K] (or None) and norm_eps.
        act: 'none', 'gelu' (erf), 'gelu_tanh', 'quick_gelu' or 'silu'.
        gamma: [D], LayerScale.
        row_scale: [B], stochastic depth: 0 or 1 / keep probability per image. Gets no gradient.
        residual: [B, ..., D]; keeps its dtype (fp32 under autocast).

    Returns:
        [B, ..., D] in the weight's dtype, or in gamma's or the residual's where that is the higher one.

    Raises:
        ValueError: shape, device, dtype, norm or act does not fit.

    Numerics: products accumulate in fp32, statistics in fp32; rounds where `F.layer_norm`, `F.linear`, `F.gelu`
    and the additions round one after the other.
    """
    dtype = autocast_dtype(x)
    if norm == "none":
        x = cast(x, dtype)
    weight, bias = cast(weight, dtype), cast(bias, dtype)
    if not _usual(x, weight, bias, norm, norm_weight, norm_bias, act, gamma, row_scale, residual):
        _check(x, weight, bias, norm, norm_weight, norm_bias, act, gamma, row_scale, residual)
    args = (x, weight, bias, norm_weight, norm_bias, norm_eps, norm, act, gamma, row_scale, residual)
    if stock_only():
        return reference.linear(*args)
    if faster_as_stock("linear", x):
        return reference.linear(x.contiguous(), *args[1:]).contiguous()
    saves = wants_gradient(x, weight, bias, norm_weight, norm_bias, gamma, residual)
    return call(_linear, saves, *args, saves)[0]


def _usual(x, weight, bias, norm, norm_weight, norm_bias, act, gamma, row_scale, residual):
    """Whether this is a call of one dtype that `_check` would pass."""
    if norm not in NORMS or act not in ACTIVATIONS or weight.dim() != 2:
        return False
    if norm != "layer" and (norm_bias is not None or (norm == "none" and norm_weight is not None)):
        return False
    (D, K), shape = weight.shape, x.shape
    if len(shape) < 2:
        return False
    vectors = (bias, D), (norm_weight, K), (norm_bias, K), (gamma, D), (row_scale, shape[0])
    return (
        shape[-1] == K
        and (residual is None or residual.shape == (*shape[:-1], D))
        and alike(x, vectors, weight, residual)
    )


def _ignored(norm, norm_weight, norm_bias):
    """Names of what was given and would have no effect."""
    given = ("norm_weight", norm_weight), ("norm_bias", norm_bias)
    without = {"none": ("norm_weight", "norm_bias"), "rms": ("norm_bias",)}.get(norm, ())
    return [name for name, t in given if t is not None and name in without]


def _check(x, weight, bias, norm, norm_weight, norm_bias, act, gamma, row_scale, residual):
    check = Reasons("linear")
    if norm not in NORMS:
        check.fail(f"norm must be one of {NORMS}, got {norm!r}")
    for name in _ignored(norm, norm_weight, norm_bias):
        check.fail(f"{name} must be None for norm {norm!r}, got a tensor")
    if act not in ACTIVATIONS:
        check.fail(f"act must be one of {ACTIVATIONS}, got {act!r}")
    if weight.dim() != 2:
        check.fail(f"weight must be [D, K], got {list(weight.shape)}")
        check.raise_if_any()
    D, K = weight.shape
    if x.dim() < 2:
        check.fail(f"x must be [B, ..., K], got {list(x.shape)}")
        check.raise_if_any()
    if x.shape[-1] != K:
        check.fail(f"x must be [..., {K}] to match weight.shape[1]={K}, got {list(x.shape)}")
    check.shape("bias", bias, (D,), f"to match weight.shape[0]={D}")
    check.shape("norm_weight", norm_weight, (K,), f"to match weight.shape[1]={K}")
    check.shape("norm_bias", norm_bias, (K,), f"to match weight.shape[1]={K}")
    check.shape("gamma", gamma, (D,), f"to match weight.shape[0]={D}")
    check.shape("row_scale", row_scale, (x.shape[0],), "to match x.shape[0]")
    check.shape("residual", residual, (*x.shape[:-1], D), "to match the output")
    check.tensors(
        x=x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, gamma=gamma,
        row_scale=row_scale, residual=residual,
    )  # fmt: skip
    if norm == "none":
        check.same_dtype(x=x, weight=weight, bias=bias)
    else:
        check.norm_dtypes(x, norm_weight=norm_weight, norm_bias=norm_bias)
        check.same_dtype(weight=weight, bias=bias)
    check.raise_if_any()


def _flat(run):
    """`run` of the flat schema."""

    def by_schema(x, weight, bias, norm_weight, norm_bias, norm_eps, norm, act, gamma, row_scale, residual, saves):
        norm, tail = new(Norm, (norm_weight, norm_bias, norm_eps, norm)), new(Tail, (gamma, row_scale, residual))
        return run(x, weight, bias, norm, act, tail, saves)

    return by_schema


def _linear_stock(x, weight, bias, norm, act, tail, saves):
    mean = rstd = pre = branch = None
    if norm.kind == "none":
        h = x.contiguous()
    else:
        h, mean, rstd = _stock.norm_forward(x, norm, weight.dtype)
    y = F.linear(h, weight, bias)
    if act != "none":
        y, pre = (_stock.activation(y, act), y) if saves else (_stock.activation_in_place(y, act), None)
    if tail.gamma is not None:
        branch = y
    out = _stock.add_branch(y, tail)
    return (out, mean, rstd, pre, branch) if saves else (out, None, None, None, None)


def _linear_tiles(x, weight, bias, norm, act, tail, saves):
    return _tiles.product_and_tail(x, weight, bias, norm, act, tail), None, None, None, None


def _linear_cpu(x, weight, bias, norm, act, tail, saves):
    if saves or not cpu_kernels.tiled(weight.dtype) or not _tiles.takes(x, norm, weight):
        return _linear_stock(x, weight, bias, norm, act, tail, saves)
    args = x, weight, bias, norm, act, tail, saves
    scaled = "scaled" * (tail.gamma is not None or tail.row_scale is not None)
    sizes = shape_of(x, weight, norm.kind, act, scaled, "residual" * (tail.residual is not None))
    return cpu_kernels.faster_of("linear", sizes, _linear_tiles, _linear_stock, *args)(*args)


def shape_of(x, weight, *words):
    """What choices are kept under: rows by powers of two, since a few more change nothing."""
    rows = (x.numel() // x.shape[-1]).bit_length()
    return str(x.dtype)[6:], str(weight.dtype)[6:], rows, *weight.shape, " ".join(filter(None, words))


def _linear_kernel(x, weight, bias, norm, act, tail, saves):
    found = None
    if x.numel() and weight.numel() and _launch.ready("linear", x):
        from vitfast.kernels.triton import linear as launcher

        around = [t.dtype for t in tail if t is not None]
        # a result wider than the weights, as of the residual under autocast, takes more room beside a tile
        wide = any(torch.promote_types(dtype, weight.dtype) != weight.dtype for dtype in around)
        words = norm.kind, act, "around" * bool(around), "wide" * wide
        found = _launch.attempt(
            "linear", x, launcher.why_not(x, weight, norm.kind, tail.gamma, act, saves), shape_of(x, weight, *words),
            lambda config: launcher.forward(
                x, weight, bias, norm, act, tail, saves, config=Product(**config) if config else None
            ),
        )  # fmt: skip
    return found or _linear_stock(x, weight, bias, norm, act, tail, saves)


def _linear_fake(x, weight, bias, norm, act, tail, saves):
    y = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=weight.dtype)
    mean = rstd = pre = branch = None
    if norm.kind != "none":
        mean, rstd = _stock.stats_fake(x, norm)
    if act != "none":
        pre = torch.empty_like(y)
    if tail.gamma is not None:
        branch = torch.empty_like(y)
    out = _stock.add_branch(y, tail)
    return (out, mean, rstd, pre, branch) if saves else (out, None, None, None, None)


def _flat_backward(run):
    def by_schema(
        grad, x, weight, bias, norm_weight, norm_bias, mean, rstd, pre, branch, gamma, row_scale, norm_eps, norm, act,
        mask,
    ):  # fmt: skip
        norm, tail = new(Norm, (norm_weight, norm_bias, norm_eps, norm)), new(Tail, (gamma, row_scale, None))
        return run(grad, x, weight, bias, norm, act, new(Saved, (mean, rstd, pre, branch, None)), tail, mask)

    return by_schema


def _linear_backward_stock(grad, x, weight, bias, norm, act, saved, tail, mask):
    need_x, need_weight, need_bias, need_norm_weight, need_norm_bias, need_gamma = mask
    x = x.contiguous()
    grad, grad_gamma = _stock.branch_grads(grad, saved.branch, tail, weight.dtype, need_gamma)
    grad = _stock.activation_backward(grad, saved.pre, act)
    need_h = need_x or need_norm_weight or need_norm_bias
    h = None
    if need_weight:
        # normed again rather than kept: one light pass against M * K numbers of memory
        h = x if norm.kind == "none" else _stock.norm_forward(x, norm, weight.dtype)[0]
    grad_x, grad_weight, grad_bias = _stock.matmul_grads(grad, h, weight, (need_h, need_weight, need_bias))
    grad_norm_weight = grad_norm_bias = None
    if norm.kind != "none" and need_h:
        grad_x, grad_norm_weight, grad_norm_bias = _stock.norm_backward(
            grad_x, x, norm, saved.mean, saved.rstd, [need_x, need_norm_weight, need_norm_bias]
        )
    return grad_x, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias, grad_gamma


def _linear_backward_kernel(grad, x, weight, bias, norm, act, saved, tail, mask):
    found = None
    if x.numel() and weight.numel() and _launch.ready("linear_backward", x):
        from vitfast.kernels.triton import linear_grads as launcher

        around = "around" if tail.gamma is not None or tail.row_scale is not None else ""
        found = _launch.attempt(
            "linear_backward", x, launcher.why_not(x, weight, norm.kind), shape_of(x, weight, norm.kind, act, around),
            lambda config: launcher.backward(grad, x, weight, bias, norm, act, saved, tail, mask),
        )  # fmt: skip
    return found or _linear_backward_stock(grad, x, weight, bias, norm, act, saved, tail, mask)


def _linear_backward_fake(grad, x, weight, bias, norm, act, saved, tail, mask):
    wanted = zip((x, weight, bias, norm.weight, norm.bias, tail.gamma), mask, strict=True)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and need else None
        for t, need in wanted
    )


def _linear_setup(ctx, inputs, output):
    *given, eps, kind, act, gamma, row_scale, _, ctx.saves = inputs
    *kept, branch = output[1:]
    ctx.mark_non_differentiable(*[t for t in output[1:] if t is not None])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, *kept, branch if ctx.needed[8] else None, gamma, row_scale)
    ctx.how = (eps, kind, act)


def _linear_grad(ctx, grad, *_):
    must_have_saved("linear", ctx.saves)
    if grad is None:
        return (None,) * 12
    need = ctx.needed
    mask = [*need[:5], need[8]]
    grads = (None,) * 6
    if _higher.wanted(grad):
        *given, _, _, _, _, gamma, row_scale = ctx.saved_tensors
        formula = lambda *given: reference.linear(*given[:5], *ctx.how, given[5], row_scale)  # noqa: E731
        grads = _higher.grads(formula, (*given, gamma), mask, grad)
    elif any(mask):
        grads = call(_linear_backward, False, grad, *ctx.saved_tensors, *ctx.how, mask)
    return *grads[:5], None, None, None, grads[5], None, grad if need[10] else None, None


_linear = _register.op(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, str norm,"
    " str act, Tensor? gamma, Tensor? row_scale, Tensor? residual, bool saves)"
    " -> (Tensor, Tensor?, Tensor?, Tensor?, Tensor?)",
    cpu=_flat(_linear_kernel if _launch.INTERPRETED else _linear_cpu), cuda=_flat(_linear_kernel),
    fake=_flat(_linear_fake), cuda_kernel="linear", planned=True,
)  # fmt: skip
_linear_backward = _register.op(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias,"
    " Tensor? mean, Tensor? rstd, Tensor? pre, Tensor? branch, Tensor? gamma, Tensor? row_scale, float norm_eps,"
    " str norm, str act, bool[] mask) -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)",
    cpu=_flat_backward(_linear_backward_kernel if _launch.INTERPRETED else _linear_backward_stock),
    cuda=_flat_backward(_linear_backward_kernel), fake=_flat_backward(_linear_backward_fake),
    cuda_kernel="linear_backward", planned=True,
)  # fmt: skip
_register.autograd("linear", setup_context=_linear_setup, backward=_linear_grad)
