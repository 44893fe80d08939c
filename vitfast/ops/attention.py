"""Non-causal softmax attention that reads the packed projection in place and writes rows for the next one."""

from __future__ import annotations

import functools
from collections.abc import Hashable

import torch
from torch import Tensor

from vitfast import reference
from vitfast.choose import dispatch
from vitfast.choose.config_tables import Config
from vitfast.choose.exportable import stock_only
from vitfast.kernels.operands import Extras, Starts
from vitfast.ops import _attention_stock as stock
from vitfast.ops import _higher, _register
from vitfast.ops._attention_check import check_extras, check_heads
from vitfast.ops._attention_stock import attention_plainly, key_is_there, lse_dtype
from vitfast.ops._check import FLOATS, autocast_dtype, cast
from vitfast.ops._launch import INTERPRETED, attempt, may_be_kernels, ready
from vitfast.ops._register import call, wants_gradient

# of smaller ones fp32 makes 0, and 0 times the -inf of a masked logit is no number
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v.

    Args:
        q: [B, Nq, H, D], any strides; views of the packed projection are read in place.
        k, v: [B, Nk, H, D], any strides.
        scale: of the logits, D ** -0.5 by default; a tensor of one number gets a gradient.
        mask: bool (True: the key takes part) or float (added to the logits), broadcastable to [B, H, Nq, Nk].
        lengths: int32 or int64 [B]: the first keys of each image that take part; what lies behind them is never read.
        dropout_p: dropout of the attention weights, below 1; drawn from torch's generator of the device.
        return_lse: also return the log of the softmax's denominators.

    Returns:
        [B, Nq, H * D] in q's dtype (autocast's under autocast), and lse [B, H, Nq] where asked: fp32 (fp64 for
        fp64), natural logarithm, no gradient. With no key at all: zeros, and lse -inf.

    Raises:
        ValueError: shape, device, dtype or rate does not fit; a mask together with lengths.
        TypeError: a mask that is neither bool nor float; lengths that are no integers.
        NotImplementedError: lse together with a mask, or on CPUs with dropout or lengths.

    Numerics: logits, softmax and accumulation in fp32; products of fp32 as `torch.get_float32_matmul_precision` says.
    A mask, and on CPUs dropout or lengths, runs `F.scaled_dot_product_attention`.
    Source: Vaswani et al., "Attention Is All You Need" (2017), eq. 1.
    """
    dtype = autocast_dtype(q)
    q, k, v = cast(q, dtype), cast(k, dtype), cast(v, dtype)
    check_heads(q, k, v)
    if isinstance(scale, Tensor):
        q, scale = scaled(q, scale), 1.0
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    saves = wants_gradient(q, k, v)
    if mask is None and lengths is None and not dropout_p and (return_lse or not stock_only()):
        out, lse = call(_attention, saves, q, k, v, scale, None, 0.0, None)
        return (out, lse) if return_lse else out
    check_extras(q, k, mask, lengths, dropout_p)
    if _needs_sdpa(q, scale, mask, lengths, dropout_p, return_lse):
        return _sdpa(q, k, v, scale, mask, lengths, dropout_p)
    seed = draw_seed(q, dropout_p)
    out, lse = call(_attention, saves, q, k, v, scale, _int32(lengths), dropout_p, seed)
    return (out, lse) if return_lse else out


def attention_qkv(
    qkv: Tensor,
    *,
    scale: float | Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of the packed projection [B, N, 3, H, D]; the gradient comes back packed as well."""
    qkv = cast(qkv, autocast_dtype(qkv))
    if isinstance(scale, Tensor):
        q, k, v = qkv.unbind(2)
        return attention(q, k, v, scale=scale, mask=mask, lengths=lengths, dropout_p=dropout_p, return_lse=return_lse)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"attention_qkv: qkv must be [B, N, 3, H, D], got {list(qkv.shape)}")
    if qkv.dtype not in FLOATS:
        raise ValueError(f"attention_qkv: qkv must be a floating point tensor, got {str(qkv.dtype)[6:]}")
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    saves = wants_gradient(qkv)
    if mask is None and lengths is None and not dropout_p and (return_lse or not stock_only()):
        out, lse = call(_attention_qkv, saves, qkv, scale, None, 0.0, None)
        return (out, lse) if return_lse else out
    q, k, v = qkv.unbind(2)
    check_extras(q, k, mask, lengths, dropout_p)
    if _needs_sdpa(q, scale, mask, lengths, dropout_p, return_lse):
        return _sdpa(q, k, v, scale, mask, lengths, dropout_p)
    seed = draw_seed(q, dropout_p)
    out, lse = call(_attention_qkv, saves, qkv, scale, _int32(lengths), dropout_p, seed)
    return (out, lse) if return_lse else out


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    queries: int | slice | Tensor = slice(None),
    heads: int | slice | Tensor = slice(None),
    scale: float | None = None,
) -> Tensor:
    """The attention weights of chosen queries and heads, for maps beside fused attention: exp(scale * q k^T - lse).

    Args:
        q: [B, Nq, H, D]. k: [B, Nk, H, D].
        lse: [B, H, Nq] of `attention(..., return_lse=True)`; without it the softmax is computed here.
        queries: which queries, as an index of them: 0 is the class token where there is one.
        heads: which heads, the same.
        scale: of the logits, D ** -0.5 by default.

    Returns:
        [B, heads, queries, Nk] in fp32 (fp64 for fp64), an axis less for each index that is a number; differentiable
        with respect to q and k where lse is not given.

    Raises:
        ValueError: shape, device or dtype does not fit.
    """
    check_heads(q, k, k)
    of_lse = [q.shape[0], q.shape[2], q.shape[1]]
    if lse is not None and list(lse.shape) != of_lse:
        raise ValueError(f"attention_weights: lse must be {of_lse}, got {list(lse.shape)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = lse_dtype(q.dtype)
    # numbers last, so that both axes are there for the product
    q, k = q.transpose(1, 2)[:, _as_slice(heads)], k.transpose(1, 2)[:, _as_slice(heads)]
    q = q[:, :, _as_slice(queries)]
    with torch.autocast(q.device.type, enabled=False):
        logits = (q.to(dtype) * scale) @ k.to(dtype).transpose(-1, -2)
    if lse is None:
        weights = logits.softmax(-1)
    else:
        weights = (logits - lse[:, _as_slice(heads)][:, :, _as_slice(queries), None]).exp()
    if isinstance(queries, int):
        weights = weights[:, :, 0]
    return weights[:, 0] if isinstance(heads, int) else weights


def _as_slice(index):
    return slice(index, index + 1 or None) if isinstance(index, int) else index


def _needs_sdpa(q, scale, mask, lengths, dropout_p, return_lse):
    kernels = may_be_kernels(q)
    # the op's own way without kernels has all weights in memory, so that it is for lse only
    if mask is None and kernels and dropout_p < 1 and not stock_only() and (return_lse or kernels_run(q, scale)):
        return False
    if return_lse:
        what = "a mask" if mask is not None else "dropout_p or lengths" + ("" if kernels else " on a CPU")
        raise NotImplementedError(f"attention: return_lse=True is not available together with {what}")
    return True


def _sdpa(q, k, v, scale, mask, lengths, dropout_p):
    if lengths is not None:
        there = key_is_there(lengths, k.shape[1])
        gone = ~there[:, :, None, None]
        # padding may hold anything, and 0 * NaN is NaN
        k, v, mask = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0), there[:, None, None]
    return reference.attention(q, k, v, scale, mask, dropout_p)


def scaled(q: Tensor, scale: Tensor) -> Tensor:
    """q times a scale that is learned; ops take numbers, which have no gradient."""
    if scale.numel() != 1 or not scale.is_floating_point():
        raise ValueError(f"attention: scale must be one number, got {list(scale.shape)} in {str(scale.dtype)[6:]}")
    return (q * scale.reshape(())).to(q.dtype)


def _int32(lengths):
    return None if lengths is None else lengths.to(torch.int32).contiguous()


def draw_seed(q: Tensor, dropout_p: float) -> Tensor | None:
    """int64 [1] from the generator of q's device: replayed by checkpointing, fresh in each replay of a CUDA graph."""
    if not dropout_p:
        return None
    # Inductor writes the bounds into its Triton code as int32
    high, low = torch.randint(2**31 - 1, (2, 1), device=q.device).unbind()
    return high << 31 | low


def kernels_run(q: Tensor, scale: float) -> bool:
    """Whether kernels compute this with dropout or lengths; torch.compile is told what holds for any kernel.

    Raises:
        NotImplementedError: the user forced them where they cannot; says all the reasons.
    """
    if not may_be_kernels(q) or torch.compiler.is_compiling():
        return may_be_kernels(q)
    return ready("attention", q) and dispatch.choose("attention", (), q.device.index, _why_not(q, scale))


def _why_not(q, scale):
    return _why_not_for(q.device, q.dtype, q.shape[3], scale >= SMALLEST_SCALE)


@functools.lru_cache(maxsize=4096)
def _why_not_for(device, dtype, head_dim, positive):
    from vitfast.kernels.triton import attention as launcher

    return tuple(launcher.why_not(device, dtype, head_dim, positive))


def shape_key(q: Tensor, k: Tensor) -> tuple[Hashable, ...]:
    """What choices are kept under: heads of all images by powers of two, since a few more change nothing."""
    heads = (q.shape[0] * q.shape[2]).bit_length()
    return str(q.dtype)[6:], heads, q.shape[1], k.shape[1], q.shape[3]


def attempt_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, extras: Extras, starts: Starts | None = None
) -> tuple[Tensor, Tensor] | None:
    """Out and lse by the kernels, None where they do not compute this.

    Raises:
        NotImplementedError: the user forced them where they cannot run; says all the reasons.
    """
    if not ready("attention", q):
        return None
    from vitfast.kernels.triton import attention as launcher

    return attempt(
        "attention", q, _why_not(q, scale), _key(q, k, extras, starts),
        lambda config: launcher.forward(
            _rows_in_place(q), _rows_in_place(k), _rows_in_place(v), scale, extras, starts, config=_config(config)
        ),
    )  # fmt: skip


def attempt_backward(
    grad: Tensor, heads: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, scale: float, extras: Extras,
    starts: Starts | None = None, into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """dq, dk and dv by the kernels, None where they do not compute this; `into` as the launcher has it."""
    q, k, v = heads
    if not ready("attention_backward", q):
        return None
    from vitfast.kernels.triton import attention as launcher

    return attempt(
        "attention_backward", q, _why_not(q, scale), _key(q, k, extras, starts),
        lambda config: launcher.backward(
            grad.contiguous(), _rows_in_place(q), _rows_in_place(k), _rows_in_place(v), out, lse, scale, extras, starts,
            config=_config(config), into=into,
        ),
    )  # fmt: skip


def _key(q, k, extras, starts):
    """What choices are kept under; nobody tunes dropout, lengths and packed sequences."""
    return () if extras.wanted or starts is not None else shape_key(q, k)


def _config(config):
    return None if config is None else Config(**config)


def _rows_in_place(t):
    """`t` itself where its rows lie in one piece, as kernels read them; else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _forward(q, k, v, scale, extras):
    """Out and lse by the kernels or the formula; None where a stock kernel may do it."""
    found = attempt_forward(q, k, v, scale, extras)
    if found is None and extras.wanted:
        return stock.attention_formula(q, k, v, scale, extras)
    return found


def _attention_cpu(q, k, v, scale, *given):
    if q.numel() and k.numel():
        found = _forward(q, k, v, scale, Extras(*given))
        if found is not None:
            return found
    return stock.attention_cpu(q, k, v, scale)


def _attention_cuda(q, k, v, scale, *given):
    if not q.numel() or not k.numel():
        return stock.nothing(q)
    found = _forward(q, k, v, scale, Extras(*given))
    if found is None:
        which = dispatch.stock_config("attention", shape_key(q, k), q.device.index)
        found = stock.attention_cuda(q, k, v, scale, **(which or {}))
    return found


def _attention_qkv_cpu(qkv, scale, *given):
    if INTERPRETED or (given and Extras(*given).wanted):
        return _attention_cpu(*qkv.unbind(2), scale, *given)
    return stock.attention_qkv_cpu(qkv, scale)


def _attention_qkv_cuda(qkv, scale, *given):
    return _attention_cuda(*qkv.unbind(2), scale, *given)


def _backward(plainly):
    """By the kernels, the formula or stock operators."""

    def run(grad, heads, out, lse, scale, extras, into=None):
        q, k, v = heads
        if not q.numel() or not k.numel():
            return tuple(map(torch.zeros_like, heads))
        grads = attempt_backward(grad, heads, out, lse, scale, extras, into=into)
        if grads is None and extras.wanted:
            return stock.attention_formula_backward(grad, q, k, v, out, lse, scale, extras)
        return plainly(grad, q, k, v, out, lse, scale) if grads is None else grads

    return run


def _flat_backward(run):
    """`run` of the flat schema."""

    def flat(grad, q, k, v, out, lse, scale, *given):
        return tuple(g.contiguous() for g in run(grad, (q, k, v), out, lse, scale, Extras(*given)))

    return flat


def _packed_backward(backward):
    """`backward` of the packed projection, whose gradient is written where it belongs or stacked."""

    def run(grad, qkv, out, lse, scale, *given):
        heads, extras = qkv.unbind(2), Extras(*given)
        if not may_be_kernels(qkv):
            return torch.stack(backward(grad, heads, out, lse, scale, extras), dim=2)
        packed = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        parts = packed.unbind(2)
        grads = backward(grad, heads, out, lse, scale, extras, parts)
        return packed if grads is parts else torch.stack(grads, dim=2, out=packed)

    return run


def _stock_backward_cuda(grad, q, k, v, out, lse, scale):
    which = dispatch.stock_config("attention_backward", shape_key(q, k), q.device.index)
    return stock.attention_backward_cuda(grad, q, k, v, out, lse, scale, **(which or {}))


_backward_cpu, _backward_cuda = _backward(stock.attention_backward_cpu), _backward(_stock_backward_cuda)


def _attention_fake(q, k, v, scale, *given):
    B, N, H, D = q.shape
    return q.new_empty(B, N, H * D), q.new_empty(B, H, N, dtype=lse_dtype(q.dtype))


def _attention_backward_fake(grad, q, k, v, *given):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _setup(ctx, inputs, output):
    # the dispatcher leaves out arguments that are the defaults
    ctx.given = len(inputs)
    whole = (*inputs, *(None, 0.0, None)[ctx.given - ctx.required :])
    *tensors, ctx.scale, lengths, ctx.dropout_p, seed = whole
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out, lse, lengths, seed)


def _setup_attention(ctx, inputs, output):
    ctx.required = 4
    _setup(ctx, inputs, output)


def _setup_qkv(ctx, inputs, output):
    ctx.required = 2
    _setup(ctx, inputs, output)


def _attention_grad(ctx, grad, _):
    grads = (None,) * 3
    if grad is not None:
        *saved, lengths, seed = ctx.saved_tensors
        if _higher.wanted(grad):
            how = ctx.scale, Extras(lengths, ctx.dropout_p, seed)
            grads = _higher.grads(lambda *qkv: attention_plainly(*qkv, *how), saved[:3], ctx.needed[:3], grad)
        else:
            grads = call(_attention_backward, False, grad, *saved, ctx.scale, lengths, ctx.dropout_p, seed)
            grads = tuple(g if n else None for g, n in zip(grads, ctx.needed, strict=False))
    return *grads, *(None,) * (ctx.given - 3)


def _attention_qkv_grad(ctx, grad, _):
    if grad is not None:
        *saved, lengths, seed = ctx.saved_tensors
        if _higher.wanted(grad):
            how = ctx.scale, Extras(lengths, ctx.dropout_p, seed)
            formula = lambda qkv: attention_plainly(*qkv.unbind(2), *how)  # noqa: E731
            (grad,) = _higher.grads(formula, saved[:1], [True], grad)
        else:
            grad = call(_attention_qkv_backward, False, grad, *saved, ctx.scale, lengths, ctx.dropout_p, seed)
    return grad, *(None,) * (ctx.given - 1)


_EXTRAS = "float scale, Tensor? lengths=None, float dropout_p=0.0, Tensor? seed=None"

_attention = _register.op(
    f"attention(Tensor q, Tensor k, Tensor v, {_EXTRAS}) -> (Tensor, Tensor)",
    cpu=_attention_cpu, cuda=_attention_cuda, fake=_attention_fake, cpu_kernel="csrc/cpu/attention.h",
    cuda_kernel="attention", planned=True,
)  # fmt: skip
_attention_backward = _register.op(
    f"attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_EXTRAS})"
    " -> (Tensor, Tensor, Tensor)",
    cpu=_flat_backward(_backward_cpu), cuda=_flat_backward(_backward_cuda), fake=_attention_backward_fake,
    cuda_kernel="attention_backward", planned=True,
)  # fmt: skip
_register.autograd("attention", setup_context=_setup_attention, backward=_attention_grad)
_attention_qkv = _register.op(
    f"attention_qkv(Tensor qkv, {_EXTRAS}) -> (Tensor, Tensor)",
    cpu=_attention_qkv_cpu, cuda=_attention_qkv_cuda, cpu_kernel="csrc/cpu/attention.h",
    cuda_kernel="attention", planned=True,
    fake=lambda qkv, *others: _attention_fake(*qkv.unbind(2), *others),
)  # fmt: skip
_attention_qkv_backward = _register.op(
    f"attention_qkv_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, {_EXTRAS}) -> Tensor",
    cpu=_packed_backward(_backward_cpu), cuda=_packed_backward(_backward_cuda),
    cuda_kernel="attention_backward", planned=True,
    fake=lambda grad, qkv, *others: torch.empty_like(qkv, memory_format=torch.contiguous_format),
)  # fmt: skip
_register.autograd("attention_qkv", setup_context=_setup_qkv, backward=_attention_qkv_grad)
