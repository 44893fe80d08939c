"""LayerNorm and RMSNorm, alone or of a residual sum that is returned as well."""

from __future__ import annotations

import torch
from torch import Tensor

from vitfast import reference
from vitfast.choose.exportable import refuse_proxy, stock_only
from vitfast.kernels.operands import Norm, Saved, Tail, new
from vitfast.ops import _higher, _launch, _register, _stock
from vitfast.ops._check import Reasons
from vitfast.ops._on_cpu import faster_as_stock
from vitfast.ops._register import call, wants_gradient

KINDS = ("layer", "rms")


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str = "layer",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """(x - mean) * rstd * weight + bias over the last dim; kind 'rms' leaves mean and bias out.

    Args:
        x: [..., C], any strides.
        weight, bias: [C] or None.
        eps: added to the variance.
        kind: 'layer' or 'rms'.
        out_dtype: of the result, x's by default. Autocast leaves this op alone: a residual stream stays fp32.

    Returns:
        [..., C] in out_dtype.

    Raises:
        ValueError: shape, device, dtype or kind does not fit.

    Numerics: statistics in fp32 (fp64 for fp64), one cast at the end.
    Source: Ba et al., "Layer Normalization" (2016); Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """
    check = _check("layer_norm", x, weight, bias, kind)
    check.tensors(x=x, weight=weight, bias=bias)
    check.raise_if_any()
    out_dtype = out_dtype or x.dtype
    if stock_only():
        return reference.layer_norm(x, weight, bias, eps, kind, out_dtype)
    if faster_as_stock("layer_norm" if kind == "layer" else "rms_norm", x):
        return reference.layer_norm(x.contiguous(), weight, bias, eps, kind, out_dtype)
    # by name: AOTInductor hands a ScalarType on as another one (torch 2.11)
    name = str(out_dtype).removeprefix("torch.")
    return call(_layer_norm, wants_gradient(x, weight, bias), x, weight, bias, eps, kind, name)[0]


def add_layer_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str = "layer",
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum `residual + row_scale * gamma * branch` and its norm.

    Args:
        residual: [B, ..., C]; its dtype is kept (fp32 under autocast).
        branch: same shape, may be of a lower precision.
        weight, bias, eps, kind: as in `layer_norm`.
        gamma: [C], LayerScale.
        row_scale: [B], stochastic depth: 0 or 1 / keep probability per image. Gets no gradient.

    Returns:
        (sum, normed): the normed rows in the branch's dtype.

    Raises:
        ValueError: shape, device, dtype or kind does not fit.
    """
    check = _check("add_layer_norm", residual, weight, bias, kind, name="residual")
    check.tensors(residual=residual, branch=branch, weight=weight, bias=bias, gamma=gamma, row_scale=row_scale)
    check.shape("branch", branch, tuple(residual.shape), "to match residual")
    check.shape("gamma", gamma, (residual.shape[-1],), "to match residual.shape[-1]")
    check.shape("row_scale", row_scale, (residual.shape[0],), "to match residual.shape[0]")
    check.raise_if_any()
    if stock_only():
        return reference.add_layer_norm(residual, branch, gamma, row_scale, weight, bias, eps, kind, branch.dtype)
    return _add_layer_norm(residual, branch, weight, bias, eps, kind, gamma, row_scale)[:2]


def _check(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, name: str = "x") -> Reasons:
    refuse_proxy(x)
    check = Reasons(op)
    if x.dim() < 1:
        check.fail(f"{name} must be [..., C], got {list(x.shape)}")
        check.raise_if_any()
    if kind not in KINDS:
        check.fail(f"kind must be one of {KINDS}, got {kind!r}")
    check.shape("weight", weight, (x.shape[-1],), f"to match {name}.shape[-1]={x.shape[-1]}")
    check.shape("bias", bias, (x.shape[-1],), f"to match {name}.shape[-1]={x.shape[-1]}")
    if kind == "rms" and bias is not None:
        check.fail("bias must be None for kind 'rms'")
    check.norm_dtypes(x, weight=weight, bias=bias)
    return check


def _flat(run):
    """`run` of the flat schema."""
    return lambda x, weight, bias, eps, kind, out_dtype: run(
        x, new(Norm, (weight, bias, eps, kind)), getattr(torch, out_dtype)
    )


def _shape_of(x, extra):
    """What choices are kept under: rows by powers of two; `extra` says in a word what the call is beside its shape."""
    return str(x.dtype)[6:], (x.numel() // x.shape[-1]).bit_length(), x.shape[-1], extra


def _layer_norm_kernel(x, norm, out_dtype):
    found = None
    if x.numel() and _launch.ready("layer_norm", x):
        from vitfast.kernels.triton import layer_norm as launcher

        found = _launch.attempt(
            "layer_norm", x, launcher.why_not(x, norm.weight, norm.bias), _shape_of(x, norm.kind),
            lambda config: launcher.forward(x, norm, out_dtype, statistics=norm.kind == "layer")[1:],
        )  # fmt: skip
    return found or _stock.norm_forward(x, norm, out_dtype)


def _layer_norm_fake(x, norm, out_dtype):
    normed = torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format)
    return normed, *_stock.stats_fake(x, norm)


def _flat_backward(run):
    return lambda grad, x, mean, rstd, weight, bias, eps, kind, mask: run(
        grad, x, new(Norm, (weight, bias, eps, kind)), mean, rstd, mask
    )


def _layer_norm_backward_kernel(grad, x, norm, mean, rstd, mask):
    found = None
    if x.numel() and _launch.ready("layer_norm_backward", x):
        from vitfast.kernels.triton import layer_norm as launcher

        found = _launch.attempt(
            "layer_norm_backward", x, launcher.why_not(x, grad, norm.weight, norm.bias), _shape_of(x, norm.kind),
            lambda config: launcher.backward(grad, x, norm, mask)[:3],
        )  # fmt: skip
    return found or _stock.norm_backward(grad, x, norm, mean, rstd, mask)


def _layer_norm_backward_fake(grad, x, norm, mean, rstd, mask):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if mask[0] else None,
        torch.empty_like(norm.weight) if mask[1] and norm.weight is not None else None,
        torch.empty_like(norm.bias) if mask[2] and norm.bias is not None else None,
    )


def _layer_norm_setup(ctx, inputs, output):
    x, weight, bias, *ctx.how, _ = inputs
    _, mean, rstd = output
    if mean is not None:
        ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, rstd, weight, bias)


def _layer_norm_grad(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    need = list(ctx.needed[:3])
    if _higher.wanted(grad):
        x, _, _, *norm = ctx.saved_tensors
        grads = _grads_as_graph(grad, x, Norm(*norm, *ctx.how), need)
    else:
        grads = call(_layer_norm_backward, False, grad, *ctx.saved_tensors, *ctx.how, need)
    return *grads, None, None, None


def _grads_as_graph(grad, x, norm, need):
    formula = lambda *given: reference.layer_norm(*given, norm.eps, norm.kind, grad.dtype)  # noqa: E731
    return _higher.grads(formula, (x, norm.weight, norm.bias), need, grad)


def _flat_sum(run):
    return lambda residual, branch, weight, bias, eps, kind, gamma, row_scale: run(
        branch, new(Tail, (gamma, row_scale, residual)), new(Norm, (weight, bias, eps, kind))
    )


def _add_layer_norm_stock(branch, tail, norm):
    scaled = reference.scale_branch(branch, tail.gamma, tail.row_scale)
    total = (tail.residual + scaled).to(tail.residual.dtype).contiguous()
    return total, *_stock.norm_forward(total, norm, branch.dtype)


def _add_layer_norm_kernel(branch, tail, norm):
    residual, found = tail.residual, None
    if residual.numel() and _launch.ready("layer_norm", residual):
        from vitfast.kernels.triton import layer_norm as launcher

        found = _launch.attempt(
            "layer_norm", residual, launcher.why_not(residual, branch, norm.weight, norm.bias, *tail[:2]),
            _shape_of(residual, f"{norm.kind} of a sum"),
            lambda config: launcher.forward(
                residual, norm, branch.dtype, branch=branch, tail=tail, statistics=norm.kind == "layer"
            ),
        )  # fmt: skip
    return found or _add_layer_norm_stock(branch, tail, norm)


def _add_layer_norm_fake(branch, tail, norm):
    total = torch.empty_like(tail.residual, memory_format=torch.contiguous_format)
    return total, torch.empty_like(total, dtype=branch.dtype), *_stock.stats_fake(total, norm)


def _flat_sum_backward(run):
    def by_schema(
        grad_total, grad_normed, total, branch, mean, rstd, weight, bias, gamma, row_scale, eps, kind, branch_dtype,
        mask,
    ):  # fmt: skip
        norm, tail = new(Norm, (weight, bias, eps, kind)), new(Tail, (gamma, row_scale, None))
        saved = new(Saved, (mean, rstd, None, branch, None))
        return run(grad_total, grad_normed, total, norm, saved, tail, getattr(torch, branch_dtype), mask)

    return by_schema


def _add_layer_norm_backward_stock(grad_total, grad_normed, total, norm, saved, tail, branch_dtype, mask):
    need_residual, need_branch, need_weight, need_bias, need_gamma = mask
    grad, grad_weight, grad_bias, grad_branch, grad_gamma = grad_total, None, None, None, None
    if grad_normed is not None:
        needs_total = need_residual or need_branch or need_gamma
        grad, grad_weight, grad_bias = _stock.norm_backward(
            grad_normed, total, norm, saved.mean, saved.rstd, [needs_total, need_weight, need_bias]
        )
        if grad_total is not None and grad is not None:
            grad = grad + grad_total
    if grad is not None and (need_branch or need_gamma):
        grad_branch, grad_gamma = _stock.branch_grads(grad, saved.branch, tail, branch_dtype, need_gamma)
        if grad_branch is grad or grad_branch is grad_total:
            grad_branch = grad_branch.clone()
    grad = grad.clone() if grad is grad_total and need_residual else grad
    return (
        grad if need_residual else None, grad_weight, grad_bias, grad_branch if need_branch else None, grad_gamma,
    )  # fmt: skip


def _add_layer_norm_backward_kernel(grad_total, grad_normed, total, norm, saved, tail, branch_dtype, mask):
    need_residual, need_branch, need_weight, need_bias, need_gamma = mask
    found = None
    if total.numel() and _launch.ready("layer_norm_backward", total):
        from vitfast.kernels.triton import layer_norm as launcher

        found = _launch.attempt(
            "layer_norm_backward", total,
            launcher.why_not(total, grad_total, grad_normed, norm.weight, norm.bias, *tail[:2]),
            _shape_of(total, f"{norm.kind} of a sum"),
            lambda config: launcher.backward_of_sum(
                grad_normed, total, norm, [need_residual, need_weight, need_bias], total_grad=grad_total,
                branch=saved.branch, branch_dtype=branch_dtype if need_branch else None, tail=tail,
                need_gamma=need_gamma,
            ),
        )  # fmt: skip
    return found or _add_layer_norm_backward_stock(
        grad_total, grad_normed, total, norm, saved, tail, branch_dtype, mask
    )  # fmt: skip


def _add_layer_norm_backward_fake(grad_total, grad_normed, total, norm, saved, tail, branch_dtype, mask):
    need_residual, need_branch, need_weight, need_bias, need_gamma = mask
    like = lambda t, need: torch.empty_like(t) if need and t is not None else None  # noqa: E731
    contiguous = {"memory_format": torch.contiguous_format}
    normed = grad_normed is not None
    return (
        torch.empty_like(total, **contiguous) if need_residual else None,
        like(norm.weight, need_weight and normed), like(norm.bias, need_bias and normed),
        torch.empty_like(total, dtype=branch_dtype, **contiguous) if need_branch else None,
        like(tail.gamma, need_gamma),
    )  # fmt: skip


def _add_layer_norm_setup(ctx, inputs, output):
    _, branch, weight, bias, eps, kind, gamma, row_scale = inputs
    total, _, mean, rstd = output
    if mean is not None:
        ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    kept = branch if ctx.needed[6] else None
    ctx.save_for_backward(total, kept, mean, rstd, weight, bias, gamma, row_scale)
    ctx.how, ctx.branch_dtype = (eps, kind), branch.dtype


def _add_layer_norm_grad(ctx, grad_total, grad_normed, *_):
    if grad_total is None and grad_normed is None:
        return (None,) * 8
    need = ctx.needed
    if _higher.wanted(grad_total, grad_normed):
        return _add_layer_norm_grads_as_graph(ctx, grad_total, grad_normed)
    grad, grad_weight, grad_bias, grad_branch, grad_gamma = _add_layer_norm_backward(
        grad_total, grad_normed, *ctx.saved_tensors, *ctx.how, str(ctx.branch_dtype)[6:], [*need[:4], need[6]]
    )
    return grad, grad_branch, grad_weight, grad_bias, None, None, grad_gamma, None


def _add_layer_norm_grads_as_graph(ctx, grad_total, grad_normed):
    # in terms of the sum: its own graph leads on to what was added up
    total, branch, _, _, weight, bias, gamma, row_scale = ctx.saved_tensors
    grad, grad_weight, grad_bias, grad_gamma = grad_total, None, None, None
    if grad_normed is not None:
        norm = Norm(weight, bias, *ctx.how)
        grad, grad_weight, grad_bias = _grads_as_graph(grad_normed, total, norm, [True, *ctx.needed[2:4]])
        grad = grad if grad_total is None else grad + grad_total
    if ctx.needed[6]:
        scaled = reference.scale_branch(grad * branch, None, row_scale)
        grad_gamma = scaled.sum(tuple(range(scaled.dim() - 1))).to(gamma.dtype)
    grad_branch = reference.scale_branch(grad, gamma, row_scale).to(ctx.branch_dtype) if ctx.needed[1] else None
    return grad if ctx.needed[0] else None, grad_branch, grad_weight, grad_bias, None, None, grad_gamma, None


_layer_norm = _register.op(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, str kind, str out_dtype)"
    " -> (Tensor, Tensor?, Tensor?)",
    cpu=_flat(_layer_norm_kernel if _launch.INTERPRETED else _stock.norm_forward), cuda=_flat(_layer_norm_kernel),
    fake=_flat(_layer_norm_fake), cuda_kernel="layer_norm", planned=True,
)  # fmt: skip
_layer_norm_backward = _register.op(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor? mean, Tensor? rstd, Tensor? weight, Tensor? bias, float eps,"
    " str kind, bool[] mask) -> (Tensor?, Tensor?, Tensor?)",
    cpu=_flat_backward(_layer_norm_backward_kernel if _launch.INTERPRETED else _stock.norm_backward),
    cuda=_flat_backward(_layer_norm_backward_kernel), fake=_flat_backward(_layer_norm_backward_fake),
    cuda_kernel="layer_norm_backward", planned=True,
)  # fmt: skip
_register.autograd("layer_norm", setup_context=_layer_norm_setup, backward=_layer_norm_grad)
_add_layer_norm = _register.op(
    "add_layer_norm(Tensor residual, Tensor branch, Tensor? weight, Tensor? bias, float eps, str kind,"
    " Tensor? gamma, Tensor? row_scale) -> (Tensor, Tensor, Tensor?, Tensor?)",
    cpu=_flat_sum(_add_layer_norm_kernel if _launch.INTERPRETED else _add_layer_norm_stock),
    cuda=_flat_sum(_add_layer_norm_kernel), fake=_flat_sum(_add_layer_norm_fake), cuda_kernel="layer_norm",
    planned=True,
)  # fmt: skip
_add_layer_norm_backward = _register.op(
    "add_layer_norm_backward(Tensor? grad_total, Tensor? grad_normed, Tensor total, Tensor? branch, Tensor? mean,"
    " Tensor? rstd, Tensor? weight, Tensor? bias, Tensor? gamma, Tensor? row_scale, float eps, str kind,"
    " str branch_dtype, bool[] mask) -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)",
    cpu=_flat_sum_backward(_add_layer_norm_backward_kernel if _launch.INTERPRETED else _add_layer_norm_backward_stock),
    cuda=_flat_sum_backward(_add_layer_norm_backward_kernel), fake=_flat_sum_backward(_add_layer_norm_backward_fake),
    cuda_kernel="layer_norm_backward", planned=True,
)  # fmt: skip
_register.autograd("add_layer_norm", setup_context=_add_layer_norm_setup, backward=_add_layer_norm_grad)
