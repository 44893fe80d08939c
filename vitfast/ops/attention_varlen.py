"""Attention of images of different sizes in one packed sequence, without padding."""

from __future__ import annotations

import torch
from torch import Tensor

from vitfast import reference
from vitfast.choose.exportable import stock_only
from vitfast.kernels.operands import Extras, Starts
from vitfast.ops import _attention_stock as stock
from vitfast.ops import _higher, _register
from vitfast.ops._check import Reasons, autocast_dtype, cast
from vitfast.ops._register import call, wants_gradient
from vitfast.ops.attention import attempt_backward, attempt_forward, draw_seed, scaled


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float | Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v within each image of a packed sequence.

    Args:
        q: [all queries, H, D], any strides; views of a packed projection are read in place.
        k, v: [all keys, H, D], any strides.
        cu_seqlens_q: int32 [images + 1]: image i has the queries from cu_seqlens_q[i] to cu_seqlens_q[i + 1]; starts
            with 0, rises to the number of queries, which is not checked on a GPU: that would wait for it.
        cu_seqlens_k: the same of the keys; cu_seqlens_q by default.
        max_seqlen_q, max_seqlen_k: no image has more queries and keys than these; without them they are found out,
            which waits for the device.
        scale: of the logits, D ** -0.5 by default; a tensor of one number gets a gradient.
        dropout_p: dropout of the attention weights, below 1.
        return_lse: also return the log of the softmax's denominators.

    Returns:
        [all queries, H * D] in q's dtype (autocast's under autocast), and lse [H, all queries] where asked: fp32 (fp64
        for fp64), natural logarithm, no gradient. For queries of an image without keys: zeros, and lse -inf.

    Raises:
        ValueError: shape, device or dtype does not fit; on a CPU: positions that do not.
    """
    dtype = autocast_dtype(q)
    q, k, v = cast(q, dtype), cast(k, dtype), cast(v, dtype)
    same = cu_seqlens_k is None or cu_seqlens_k is cu_seqlens_q
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p)
    if isinstance(scale, Tensor):
        q, scale = scaled(q, scale), 1.0
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if max_seqlen_q is None:
        max_seqlen_q = _longest(cu_seqlens_q)
    if max_seqlen_k is None:
        max_seqlen_k = max_seqlen_q if same else _longest(cu_seqlens_k)
    for name, most, tokens in (("max_seqlen_q", max_seqlen_q, len(q)), ("max_seqlen_k", max_seqlen_k, len(k))):
        if tokens and most < 1:
            raise ValueError(f"attention_varlen: {name} must be at least 1 where there are tokens, got {most}")
    if stock_only() and not return_lse:
        return _by_image(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, dropout_p)
    out, lse = call(
        _varlen, wants_gradient(q, k, v), q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
        dropout_p, draw_seed(q, dropout_p),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _longest(starts: Tensor) -> int:
    return int(starts.diff().max()) if len(starts) > 1 else 0


def _check(q, k, v, q_starts, k_starts, dropout_p):
    check = Reasons("attention_varlen")
    if not 0.0 <= dropout_p < 1.0:
        check.fail(f"dropout_p must be from 0 to below 1, got {dropout_p}")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 3:
            check.fail(f"{name} must be [all tokens, H, D], got {list(t.shape)}")
    check.raise_if_any()
    check.shape("k", k, (k.shape[0], *q.shape[1:]), "to match q")
    check.shape("v", v, tuple(k.shape), "to match k")
    check.tensors(q=q, k=k, v=v)
    check.same_dtype(q=q, k=k, v=v)
    for name, starts, total in (("cu_seqlens_q", q_starts, q.shape[0]), ("cu_seqlens_k", k_starts, k.shape[0])):
        if starts.dtype != torch.int32 or starts.dim() != 1 or not len(starts) or starts.device != q.device:
            got = f"{list(starts.shape)} {str(starts.dtype)[6:]} on {starts.device}"
            check.fail(f"{name} must be int32 [images + 1] on {q.device}, got {got}")
        elif len(starts) != len(q_starts):
            check.fail(f"{name} must have as many entries as cu_seqlens_q, {len(q_starts)}, got {len(starts)}")
        elif starts.device.type == "cpu" and not torch.compiler.is_compiling():
            ends = starts.tolist()
            if ends[0] != 0 or ends[-1] != total or ends != sorted(ends):
                check.fail(f"{name} must rise from 0 to the number of tokens, {total}, got {ends[:8]}...{ends[-1]}")
    check.raise_if_any()


def _images(q, k, v, q_starts, k_starts):
    """(q, k, v) of each image as [1, N, H, D]; waits for the device."""
    at, at_k = q_starts.tolist(), k_starts.tolist()
    for i in range(len(at) - 1):
        rows, keys = slice(at[i], at[i + 1]), slice(at_k[i], at_k[i + 1])
        yield rows, keys, q[None, rows], k[None, keys], v[None, keys]


def _by_image(q, k, v, q_starts, k_starts, scale, dropout_p):
    """Out of stock operators, differentiable."""
    images = _images(q, k, v, q_starts, k_starts)
    parts = [reference.attention(*qkv, scale, None, dropout_p)[0] for _, _, *qkv in images]
    return torch.cat(parts) if parts else q.flatten(1)


def _plainly(q, k, v, q_starts, k_starts, scale, extras):
    images = enumerate(_images(q, k, v, q_starts, k_starts))
    parts = [stock.attention_plainly(*qkv, scale, extras, i)[0] for i, (_, _, *qkv) in images]
    return torch.cat(parts) if parts else q.flatten(1)


def _grouped(given):
    """starts, scale and extras of what the flat schema has behind the tensors."""
    return Starts(*given[:4]), given[4], Extras(None, *given[5:])


def _forward(plain, formula):
    """One call of `plain` an image; of the formula where there is dropout, in which every image has its own numbers."""

    def run_images(q, k, v, *given):
        starts, scale, extras = _grouped(given)
        there = q.numel() and k.numel()
        if there:
            results = attempt_forward(q[None], k[None], v[None], scale, extras, starts)
            if results is not None:
                return tuple(t[0] for t in results)
        out = q.new_zeros(q.shape[0], q.shape[1] * q.shape[2])
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=stock.lse_dtype(q.dtype))
        if not there:
            return out, lse
        for i, (rows, _, *qkv) in enumerate(_images(q, k, v, starts.q, starts.k)):
            if qkv[0].numel() and qkv[1].numel():
                one = formula(*qkv, scale, extras, i) if extras.wanted else plain(*qkv, scale)
                out[rows], lse[:, rows] = one[0][0], one[1][0]
        return out, lse

    return run_images


def _backward(plain, formula):
    def run_images(grad, q, k, v, out, lse, *given):
        starts, scale, extras = _grouped(given)
        there = q.numel() and k.numel()
        if there:
            results = attempt_backward(grad, (q[None], k[None], v[None]), out, lse, scale, extras, starts)
            if results is not None:
                return tuple(g[0] for g in results)
        grads = tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        if not there:
            return grads
        for i, (rows, keys, *qkv) in enumerate(_images(q, k, v, starts.q, starts.k)):
            if qkv[0].numel() and qkv[1].numel():
                given = (grad[None, rows], *qkv, out[None, rows].contiguous(), lse[None, :, rows].contiguous(), scale)
                own = formula(*given, extras, i) if extras.wanted else plain(*given)
                for t, part, g in zip(grads, (rows, keys, keys), own, strict=True):
                    t[part] = g[0]
        return grads

    return run_images


def _fake(q, k, v, *others):
    N, H, D = q.shape
    return q.new_empty(N, H * D), q.new_empty(H, N, dtype=stock.lse_dtype(q.dtype))


def _backward_fake(grad, q, k, v, *others):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _setup(ctx, inputs, output):
    ctx.given = len(inputs)
    whole = (*inputs, *(0.0, None)[ctx.given - 8 :])
    q, k, v, *starts, ctx.max_q, ctx.max_k, ctx.scale, ctx.dropout_p, seed = whole
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, *starts, seed)


def _grad(ctx, grad, _):
    grads = (None,) * 3
    if grad is not None:
        *saved, seed = ctx.saved_tensors
        if _higher.wanted(grad):
            how = *saved[5:], ctx.scale, Extras(None, ctx.dropout_p, seed)
            formula = lambda *qkv: _plainly(*qkv, *how)  # noqa: E731
            grads = _higher.grads(formula, saved[:3], ctx.needed[:3], grad)
        else:
            grads = call(_varlen_backward, False, grad, *saved, ctx.max_q, ctx.max_k, ctx.scale, ctx.dropout_p, seed)
            grads = tuple(g if n else None for g, n in zip(grads, ctx.needed, strict=False))
    return *grads, *(None,) * (ctx.given - 3)


_STARTS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
_EXTRAS = "float scale, float dropout_p=0.0, Tensor? seed=None"
_formulas = stock.attention_formula, stock.attention_formula_backward

_varlen = _register.op(
    f"attention_varlen(Tensor q, Tensor k, Tensor v, {_STARTS}, {_EXTRAS}) -> (Tensor, Tensor)",
    cpu=_forward(stock.attention_cpu, _formulas[0]), cuda=_forward(stock.attention_cuda, _formulas[0]), fake=_fake,
    cpu_kernel="csrc/cpu/attention.h", cuda_kernel="attention", planned=True,
)  # fmt: skip
_varlen_backward = _register.op(
    "attention_varlen_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_STARTS}, {_EXTRAS}) -> (Tensor, Tensor, Tensor)",
    cpu=_backward(stock.attention_backward_cpu, _formulas[1]),
    cuda=_backward(stock.attention_backward_cuda, _formulas[1]), fake=_backward_fake,
    cuda_kernel="attention_backward", planned=True,
)  # fmt: skip
_register.autograd("attention_varlen", setup_context=_setup, backward=_grad)
