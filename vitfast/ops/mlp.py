"""The MLP half of a block as one op: norm, first projection, activation, second projection, scale, residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast import reference
from vitfast.choose.config_tables import Product
from vitfast.choose.exportable import stock_only
from vitfast.kernels import cpu as cpu_kernels
from vitfast.kernels.operands import Norm, Projections, Saved, Tail, new
from vitfast.ops import _higher, _launch, _register, _stock, _tiles
from vitfast.ops._check import Reasons, alike, autocast_dtype, cast
from vitfast.ops._register import call, must_have_saved, wants_gradient
from vitfast.ops.linear import ACTIVATIONS as LINEAR_ACTIVATIONS
from vitfast.ops.linear import shape_of

ACTIVATIONS = LINEAR_ACTIVATIONS[1:]
RECOMPUTE = ("none", "act", "fc1")


def mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    norm_eps: float = 1e-6,
    norm: str = "layer",
    act: str = "gelu",
    gated: bool = False,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    recompute: str = "act",
) -> Tensor:
    """x + row_scale * gamma * (act(norm(x) @ w1.T + b1) @ w2.T + b2).

    Args:
        x: [B, ..., D], the residual; it stays fp32 under autocast.
        norm_weight, norm_bias: [D] or None; norm: 'layer' or 'rms'; norm_eps: added to the variance.
        w1: [F, D], b1: [F] or None.
        w2: [D, F], b2: [D] or None; [D, F / 2] when gated.
        act: 'gelu' (erf), 'gelu_tanh', 'quick_gelu' or 'silu'.
        gated: w1 holds gate and value, gate first, and the hidden activation is act(gate) * value (SwiGLU).
        gamma: [D], LayerScale.
        row_scale: [B], stochastic depth: 0 or 1 / keep probability per image. Gets no gradient.
        recompute: what the backward computes again in place of keeping it, beside the normed rows, which are never
            kept. 'none': the first projection's output and the hidden activation are kept, 2 F numbers a token; 'act':
            only the former, F numbers; the activation is computed again, which costs next to nothing; 'fc1': neither,
            for one more product.

    Returns:
        [B, ..., D] in x's dtype, or the weights' where that is the higher one.

    Raises:
        ValueError: shape, device, dtype, norm, act or recompute does not fit.

    Numerics: products accumulate in fp32, statistics in fp32.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"mlp: recompute must be one of {RECOMPUTE}, got {recompute!r}")
    dtype = autocast_dtype(x)
    w1, b1, w2, b2 = cast(w1, dtype), cast(b1, dtype), cast(w2, dtype), cast(b2, dtype)
    if not _usual(x, norm_weight, norm_bias, w1, b1, w2, b2, norm, act, gated, gamma, row_scale):
        _check(x, norm_weight, norm_bias, w1, b1, w2, b2, norm, act, gated, gamma, row_scale)
    args = (x, norm_weight, norm_bias, norm_eps, norm, w1, b1, w2, b2, act, gated, gamma, row_scale)
    if stock_only():
        return reference.mlp(*args)
    saves = wants_gradient(x, norm_weight, norm_bias, w1, b1, w2, b2, gamma)
    return call(_mlp, saves, *args, recompute if saves else "")[0]


def _usual(x, norm_weight, norm_bias, w1, b1, w2, b2, norm, act, gated, gamma, row_scale):
    """Whether this is a call of one dtype that `_check` would pass."""
    if norm not in ("layer", "rms") or act not in ACTIVATIONS or w1.dim() != 2 or (gated and w1.shape[0] % 2):
        return False
    if norm == "rms" and norm_bias is not None:
        return False
    (hidden, D), shape = w1.shape, x.shape
    if len(shape) < 2:
        return False
    vectors = (norm_weight, D), (norm_bias, D), (b1, hidden), (b2, D), (gamma, D), (row_scale, shape[0])
    return shape[-1] == D and w2.shape == (D, hidden // 2 if gated else hidden) and alike(x, vectors, w1, w2)


def _check(x, norm_weight, norm_bias, w1, b1, w2, b2, norm, act, gated, gamma, row_scale):
    check = Reasons("mlp")
    if norm not in ("layer", "rms"):
        check.fail(f"norm must be 'layer' or 'rms', got {norm!r}")
    if norm == "rms" and norm_bias is not None:
        check.fail("norm_bias must be None for norm 'rms', got a tensor")
    if act not in ACTIVATIONS:
        check.fail(f"act must be one of {ACTIVATIONS}, got {act!r}")
    if w1.dim() != 2 or x.dim() < 2:
        check.fail(f"x must be [B, ..., D] and w1 [F, D], got {list(x.shape)} and {list(w1.shape)}")
        check.raise_if_any()
    hidden, D = w1.shape
    if gated and hidden % 2:
        check.fail(f"w1.shape[0] must be even when gated, got {hidden}")
    if x.shape[-1] != D:
        check.fail(f"x must be [..., {D}] to match w1.shape[1]={D}, got {list(x.shape)}")
    check.shape("norm_weight", norm_weight, (D,), f"to match w1.shape[1]={D}")
    check.shape("norm_bias", norm_bias, (D,), f"to match w1.shape[1]={D}")
    check.shape("b1", b1, (hidden,), f"to match w1.shape[0]={hidden}")
    check.shape("w2", w2, (D, hidden // 2 if gated else hidden), "to match w1")
    check.shape("b2", b2, (D,), f"to match w1.shape[1]={D}")
    check.shape("gamma", gamma, (D,), f"to match w1.shape[1]={D}")
    check.shape("row_scale", row_scale, (x.shape[0],), "to match x.shape[0]")
    check.tensors(
        x=x, norm_weight=norm_weight, norm_bias=norm_bias, w1=w1, b1=b1, w2=w2, b2=b2, gamma=gamma, row_scale=row_scale
    )
    check.norm_dtypes(x, norm_weight=norm_weight, norm_bias=norm_bias)
    check.same_dtype(w1=w1, b1=b1, w2=w2, b2=b2)
    check.raise_if_any()


def _flat(run):
    """`run` of the flat schema."""

    def by_schema(x, norm_weight, norm_bias, norm_eps, norm, w1, b1, w2, b2, act, gated, gamma, row_scale, saves):
        norm, fc = new(Norm, (norm_weight, norm_bias, norm_eps, norm)), new(Projections, (w1, b1, w2, b2, act, gated))
        return run(x, norm, fc, new(Tail, (gamma, row_scale, x)), saves)

    return by_schema


def _hidden(pre, fc):
    if not fc.gated:
        return _stock.activation(pre, fc.act)
    gate, value = pre.chunk(2, dim=-1)
    # in place: every activation but 'none', which is not allowed here, gives a fresh tensor
    return reference.activation(gate, fc.act).mul_(value)


def _mlp_stock(x, norm, fc, tail, saves):
    h, mean, rstd = _stock.norm_forward(x, norm, fc.w1.dtype)
    pre = F.linear(h, fc.w1, fc.b1)
    if not saves:
        # over the projection: the largest tensor of a block is touched once less
        hidden = _hidden(pre, fc) if fc.gated else _stock.activation_in_place(pre, fc.act)
        return _stock.add_branch(F.linear(hidden, fc.w2, fc.b2), tail), None, None, None, None, None
    hidden = _hidden(pre, fc)
    y = F.linear(hidden, fc.w2, fc.b2)
    branch = None if tail.gamma is None else y
    kept = (None if saves == "fc1" else pre, branch, hidden if saves == "none" else None)
    return _stock.add_branch(y, tail), mean, rstd, *kept


def _mlp_tiles(x, norm, fc, tail, saves):
    hidden = _tiles.product(x, fc.w1, fc.b1, norm, "none" if fc.gated else fc.act)
    hidden = _hidden(hidden, fc) if fc.gated else hidden
    return _tiles.product_and_tail(hidden, fc.w2, fc.b2, None, "none", tail), None, None, None, None, None


def _mlp_cpu(x, norm, fc, tail, saves):
    if saves or not cpu_kernels.tiled(fc.w1.dtype) or not _tiles.takes(x, norm, fc.w1, fc.w2):
        return _mlp_stock(x, norm, fc, tail, saves)
    args = x, norm, fc, tail, saves
    return cpu_kernels.faster_of("mlp", _key(x, norm, fc, tail, ""), _mlp_tiles, _mlp_stock, *args)(*args)


def _key(x, norm, fc, tail, kept):
    """What choices are kept under."""
    scaled = "scaled" if tail.gamma is not None or tail.row_scale is not None else ""
    return shape_of(x, fc.w1, norm.kind, fc.act, "gated" * fc.gated, scaled, kept)


def _mlp_kernel(x, norm, fc, tail, saves):
    found = None
    if x.numel() and fc.w1.numel() and _launch.ready("mlp", x):
        from vitfast.kernels.triton import mlp as launcher

        found = _launch.attempt(
            "mlp", x, launcher.why_not(x, fc.w1), _key(x, norm, fc, tail, saves),
            lambda config: launcher.forward(x, norm, fc, tail, saves, config=Product(**config) if config else None),
        )  # fmt: skip
    return found or _mlp_stock(x, norm, fc, tail, saves)


def _mlp_fake(x, norm, fc, tail, saves):
    y = x.new_empty(x.shape, dtype=fc.w1.dtype)
    if not saves:
        return _stock.add_branch(y, tail), None, None, None, None, None
    mean, rstd = _stock.stats_fake(x, norm)
    wide = lambda like: x.new_empty(*x.shape[:-1], like, dtype=fc.w1.dtype)  # noqa: E731
    pre = None if saves == "fc1" else wide(fc.w1.shape[0])
    hidden = wide(fc.w2.shape[1]) if saves == "none" else None
    branch = None if tail.gamma is None else torch.empty_like(y)
    return _stock.add_branch(y, tail), mean, rstd, pre, branch, hidden


def _flat_backward(run):
    def by_schema(
        grad, x, norm_weight, norm_bias, mean, rstd, w1, b1, w2, b2, pre, branch, hidden, gamma, row_scale,
        norm_eps, norm, act, gated, mask,
    ):  # fmt: skip
        norm, fc = new(Norm, (norm_weight, norm_bias, norm_eps, norm)), new(Projections, (w1, b1, w2, b2, act, gated))
        saved, tail = new(Saved, (mean, rstd, pre, branch, hidden)), new(Tail, (gamma, row_scale, None))
        return run(grad, x, norm, fc, saved, tail, mask)

    return by_schema


def _mlp_backward_stock(grad, x, norm, fc, saved, tail, mask):
    need_x, need_norm_weight, need_norm_bias, need_w1, need_b1, need_w2, need_b2, need_gamma = mask
    mean, rstd, pre, branch, hidden = saved
    x = x.contiguous()
    need_h = need_x or need_norm_weight or need_norm_bias
    need_pre = need_h or need_w1 or need_b1
    grad_y, grad_gamma = _stock.branch_grads(grad, branch, tail, fc.w1.dtype, need_gamma)
    h = None
    if pre is None and (need_pre or (need_w2 and hidden is None)):
        h = _stock.norm_forward(x, norm, fc.w1.dtype)[0]
        pre = F.linear(h, fc.w1, fc.b1)
    if need_w2 and hidden is None:
        hidden = _hidden(pre, fc)
    grad_pre, grad_w2, grad_b2 = _stock.matmul_grads(grad_y, hidden, fc.w2, (need_pre, need_w2, need_b2))
    del hidden
    grad_x = grad_w1 = grad_b1 = grad_norm_weight = grad_norm_bias = None
    if need_pre:
        if fc.gated:
            gate, value = pre.chunk(2, dim=-1)
            grad_gate = _stock.activation_backward(grad_pre * value, gate, fc.act)
            grad_pre = torch.cat([grad_gate, grad_pre * reference.activation(gate, fc.act)], dim=-1)
        else:
            grad_pre = _stock.activation_backward(grad_pre, pre, fc.act)
        if need_w1 and h is None:
            h = _stock.norm_forward(x, norm, fc.w1.dtype)[0]
        grad_h, grad_w1, grad_b1 = _stock.matmul_grads(grad_pre, h, fc.w1, (need_h, need_w1, need_b1))
        if need_h:
            grad_x, grad_norm_weight, grad_norm_bias = _stock.norm_backward(
                grad_h, x, norm, mean, rstd, [need_x, need_norm_weight, need_norm_bias]
            )
    if need_x:
        # the residual's gradient may be of a higher dtype: x's own is what the shape function promises
        grad_x = (grad_x + grad).to(x.dtype).contiguous()
    return grad_x, grad_norm_weight, grad_norm_bias, grad_w1, grad_b1, grad_w2, grad_b2, grad_gamma


def _mlp_backward_kernel(grad, x, norm, fc, saved, tail, mask):
    found = None
    if x.numel() and fc.w1.numel() and _launch.ready("mlp_backward", x):
        from vitfast.kernels.triton import mlp as launcher

        kept = "none" if saved.hidden is not None else "fc1" if saved.pre is None else "act"
        found = _launch.attempt(
            "mlp_backward", x, launcher.why_not(x, fc.w1), _key(x, norm, fc, tail, kept),
            lambda config: launcher.backward(
                grad, x, norm, fc, saved, tail, mask, config=Product(**config) if config else None
            ),
        )  # fmt: skip
    return found or _mlp_backward_stock(grad, x, norm, fc, saved, tail, mask)


def _mlp_backward_fake(grad, x, norm, fc, saved, tail, mask):
    wanted = zip((x, norm.weight, norm.bias, *fc[:4], tail.gamma), mask, strict=True)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and need else None
        for t, need in wanted
    )


def _mlp_setup(ctx, inputs, output):
    x, norm_weight, norm_bias, eps, kind, *weights, act, gated, gamma, row_scale, ctx.saves = inputs
    _, mean, rstd, pre, branch, hidden = output
    ctx.mark_non_differentiable(*[t for t in output[1:] if t is not None])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x, norm_weight, norm_bias, mean, rstd, *weights, pre,
        branch if ctx.needed[11] else None, hidden, gamma, row_scale,
    )  # fmt: skip
    ctx.how = (eps, kind, act, gated)


def _mlp_grad(ctx, grad, *_):
    must_have_saved("mlp", bool(ctx.saves))
    if grad is None:
        return (None,) * 14
    need = ctx.needed
    mask = [*need[:3], *need[5:9], need[11]]
    if _higher.wanted(grad):
        x, norm_weight, norm_bias, _, _, *weights, _, _, _, gamma, row_scale = ctx.saved_tensors
        eps, kind, act, gated = ctx.how
        grads = _higher.grads(
            lambda *given: reference.mlp(*given[:3], eps, kind, *given[3:7], act, gated, given[7], row_scale),
            (x, norm_weight, norm_bias, *weights, gamma), mask, grad,
        )  # fmt: skip
    else:
        grads = call(_mlp_backward, False, grad, *ctx.saved_tensors, *ctx.how, mask)
    return *grads[:3], None, None, *grads[3:7], None, None, grads[7], None, None


_mlp = _register.op(
    "mlp(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, str norm, Tensor w1, Tensor? b1, Tensor w2,"
    " Tensor? b2, str act, bool gated, Tensor? gamma, Tensor? row_scale, str saves)"
    " -> (Tensor, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)",
    cpu=_flat(_mlp_kernel if _launch.INTERPRETED else _mlp_cpu), cuda=_flat(_mlp_kernel), fake=_flat(_mlp_fake),
    cuda_kernel="mlp", planned=True,
)  # fmt: skip
_mlp_backward = _register.op(
    "mlp_backward(Tensor grad, Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor? mean, Tensor? rstd,"
    " Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? pre, Tensor? branch, Tensor? hidden,"
    " Tensor? gamma, Tensor? row_scale, float norm_eps, str norm, str act, bool gated, bool[] mask)"
    " -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)",
    cpu=_flat_backward(_mlp_backward_kernel if _launch.INTERPRETED else _mlp_backward_stock),
    cuda=_flat_backward(_mlp_backward_kernel), fake=_flat_backward(_mlp_backward_fake), cuda_kernel="mlp_backward",
    planned=True,
)  # fmt: skip
_register.autograd("mlp", setup_context=_mlp_setup, backward=_mlp_grad)
