"""Non-causal softmax attention that reads the packed projection in place and writes rows for the next one."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vitfast import native, reference
from vitfast.ops import _register
from vitfast.ops._check import FLOATS, Reasons, autocast_dtype, cast
from vitfast.ops._register import call, wants_gradient
from vitfast.switches import stock_only

aten = torch.ops.aten


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v.

    Args:
        q: [B, Nq, H, D], any strides; views of the packed projection are read in place.
        k, v: [B, Nk, H, D], any strides.
        scale: of the logits, D ** -0.5 by default.
        mask: bool (True: the key takes part) or float (added to the logits), broadcastable to [B, H, Nq, Nk].
        dropout_p: dropout of the attention weights.
        return_lse: also return the log of the softmax's denominators.

    Returns:
        [B, Nq, H * D] in q's dtype (autocast's under autocast), and lse [B, H, Nq] where asked: fp32 (fp64 for
        fp64), natural logarithm, no gradient. With no key at all: zeros, and lse -inf.

    Raises:
        ValueError: shape, device or dtype does not fit.
        TypeError: a mask that is neither bool nor float.
        NotImplementedError: lse together with a mask or dropout.

    Numerics: logits, softmax and accumulation in fp32. A mask or dropout runs `F.scaled_dot_product_attention`.
    Source: Vaswani et al., "Attention Is All You Need" (2017), eq. 1.
    """
    dtype = autocast_dtype(q)
    q, k, v = cast(q, dtype), cast(k, dtype), cast(v, dtype)
    _check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None:
        check_mask(mask, q, k)
    if _needs_sdpa(mask, dropout_p, return_lse):
        return reference.attention(q, k, v, scale, mask, dropout_p)
    out, lse = call(_attention, wants_gradient(q, k, v), q, k, v, scale)
    return (out, lse) if return_lse else out


def attention_qkv(
    qkv: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of the packed projection [B, N, 3, H, D]; the gradient comes back packed as well."""
    qkv = cast(qkv, autocast_dtype(qkv))
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"attention_qkv: qkv must be [B, N, 3, H, D], got {list(qkv.shape)}")
    if qkv.dtype not in FLOATS:
        raise ValueError(f"attention_qkv: qkv must be a floating point tensor, got {str(qkv.dtype)[6:]}")
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None:
        check_mask(mask, qkv[:, :, 0], qkv[:, :, 1])
    if _needs_sdpa(mask, dropout_p, return_lse):
        return reference.attention(*qkv.unbind(2), scale, mask, dropout_p)
    out, lse = call(_attention_qkv, wants_gradient(qkv), qkv, scale)
    return (out, lse) if return_lse else out


def _needs_sdpa(mask, dropout_p, return_lse):
    if mask is None and not dropout_p and (return_lse or not stock_only()):
        return False
    if return_lse:
        raise NotImplementedError("attention: return_lse=True is not available together with a mask or dropout_p")
    return True


def _check(q, k, v):
    check = Reasons("attention")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            check.fail(f"{name} must be [B, N, H, D], got {list(t.shape)}")
    check.raise_if_any()
    B, _, H, D = q.shape
    check.shape("k", k, (B, k.shape[1], H, D), "to match q")
    check.shape("v", v, tuple(k.shape), "to match k")
    check.tensors(q=q, k=k, v=v)
    check.same_dtype(q=q, k=k, v=v)
    check.raise_if_any()


def check_mask(mask, q, k):
    """Raise where `mask` cannot be used with q [B, Nq, H, D] and k [B, Nk, H, D]."""
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise TypeError(
            f"attention: mask must be bool or float (float32 or q's {str(q.dtype)[6:]}), got {str(mask.dtype)[6:]}"
        )
    B, Nq, H, _ = q.shape
    full = (B, H, Nq, k.shape[1])
    missing = 4 - mask.dim()
    if not 0 <= missing <= 2 or any(n not in (1, size) for n, size in zip(mask.shape, full[missing:], strict=True)):
        raise ValueError(f"attention: mask must be broadcastable to {list(full)}, got {list(mask.shape)}")


def _lse_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


def _rows(out):
    """[B, H, N, D] from a stock kernel -> [B, N, H * D], a view where that kernel wrote [B, N, H, D]."""
    return out.transpose(1, 2).flatten(2).contiguous()


def _nothing(q):
    B, N, H, D = q.shape
    return q.new_zeros(B, N, H * D), q.new_full((B, H, N), float("-inf"), dtype=_lse_dtype(q.dtype))


def attention_cpu(q, k, v, scale, with_lse=True):
    """`attention` below its checks; without lse a None may come in its place."""
    if not q.numel() or not k.numel():
        return _nothing(q)
    if native.takes(q):
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        return native.attention(q, k, v, scale, with_lse)
    q, k, v = (_rows_of_heads(t) for t in (q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
    return _rows(out), lse.contiguous()


def _attention_qkv_cpu(qkv, scale):
    # one view of the whole in place of one a part: each costs a microsecond, beside 16 for all of the op
    if not qkv.numel():
        return _nothing(qkv[:, :, 0])
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    if native.takes(qkv):
        return native.attention_qkv(qkv, scale, with_lse=True)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        *qkv.permute(2, 0, 3, 1, 4).unbind(0), 0.0, False, scale=scale
    )
    return _rows(out), lse.contiguous()


def _attention_backward_cpu(grad, q, k, v, out, lse, scale):
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    B, N, H, D = q.shape
    q, k, v = (_rows_of_heads(t) for t in (q, k, v))
    grad, out = (t.view(B, N, H, D).transpose(1, 2) for t in (grad.contiguous(), out))
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, scale=scale
    )
    return tuple(g.transpose(1, 2).contiguous() for g in grads)


def _attention_cuda(q, k, v, scale):
    if not q.numel() or not k.numel():
        return _nothing(q)
    if not _flash_takes(q):
        return attention_formula(q, k, v, scale)
    q, k, v = (_rows_of_heads(t) for t in (q, k, v))
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    return _rows(out), lse.contiguous()


def _attention_backward_cuda(grad, q, k, v, out, lse, scale):
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if not _flash_takes(q):
        return attention_formula_backward(grad, q, k, v, out, lse, scale)
    B, N, H, D = q.shape
    q, k, v = (_rows_of_heads(t) for t in (q, k, v))
    grad, out = (_rows_of_heads(t.contiguous().view(B, N, H, D)) for t in (grad, out))
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)
    grads = aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, unused, unused, scale=scale
    )
    return tuple(g.transpose(1, 2).contiguous() for g in grads)


def _rows_of_heads(t):
    """[B, N, H, D] -> [B, H, N, D] as torch's flash attention reads it: 16 bytes at a time, which it does not check."""
    starts = (t.storage_offset(), *t.stride()[:-1])
    if t.stride(-1) != 1 or (t.is_cuda and any(start * t.element_size() % 16 for start in starts)):
        t = t.clone(memory_format=torch.contiguous_format)
    return t.transpose(1, 2)


def _flash_takes(q):
    """torch's flash attention: half precision, head dims in eights up to 256, Ampere or newer."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _outside_autocast(formula):
    """An op runs inside its caller's autocast, which would round the fp32 logits below."""

    @functools.wraps(formula)
    def run(q, *args):
        with torch.autocast(q.device.type, enabled=False):
            return formula(q, *args)

    return run


@_outside_autocast
def attention_formula(q, k, v, scale):
    """Attention as written, for what no stock kernel takes; the N x N weights live only inside this call."""
    dtype = _lse_dtype(q.dtype)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.to(dtype), k.to(dtype)).mul_(scale)
    lse = torch.logsumexp(logits, dim=-1)
    weights = logits.sub_(lse.unsqueeze(-1)).exp_()
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.to(dtype)).to(q.dtype).flatten(2).contiguous(), lse


@_outside_autocast
def attention_formula_backward(grad, q, k, v, out, lse, scale):
    """Gradients from q, k, v, out and lse. With P the weights and dP = grad v^T:
    dS = P * (dP - rowsum(grad * out)), dq = scale dS k, dk = scale dS^T q, dv = P^T grad.
    """
    B, N, H, D = q.shape
    dtype = _lse_dtype(q.dtype)
    qd, kd, vd, gd, od = (t.to(dtype) for t in (q, k, v, grad.reshape(B, N, H, D), out.view(B, N, H, D)))
    weights = torch.einsum("bqhd,bkhd->bhqk", qd, kd).mul_(scale).sub_(lse.unsqueeze(-1)).exp_()
    dv = torch.einsum("bhqk,bqhd->bkhd", weights, gd)
    ds = torch.einsum("bqhd,bkhd->bhqk", gd, vd).sub_((gd * od).sum(-1).transpose(1, 2).unsqueeze(-1)).mul_(weights)
    dq = torch.einsum("bhqk,bkhd->bqhd", ds, kd).mul_(scale)
    dk = torch.einsum("bhqk,bqhd->bkhd", ds, qd).mul_(scale)
    return tuple(t.to(q.dtype).contiguous() for t in (dq, dk, dv))


def _attention_fake(q, k, v, scale):
    B, N, H, D = q.shape
    return q.new_empty(B, N, H * D), q.new_empty(B, H, N, dtype=_lse_dtype(q.dtype))


def _attention_backward_fake(grad, q, k, v, out, lse, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _setup(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out, lse)


def _attention_grad(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    need = ctx.needed
    grads = _attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return *(g if n else None for g, n in zip(grads, need, strict=False)), None


def _attention_qkv_grad(ctx, grad, _):
    if grad is None:
        return None, None
    return _attention_qkv_backward(grad, *ctx.saved_tensors, ctx.scale), None


def _packed(forward):
    return lambda qkv, scale: forward(*qkv.unbind(2), scale)


def _packed_backward(backward):
    return lambda grad, qkv, out, lse, scale: torch.stack(backward(grad, *qkv.unbind(2), out, lse, scale), dim=2)


_attention = _register.op(
    "attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    cpu=attention_cpu, cuda=_attention_cuda, fake=_attention_fake, cpu_kernel="csrc/attention_cpu.h",
)  # fmt: skip
_attention_backward = _register.op(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=_attention_backward_cpu, cuda=_attention_backward_cuda, fake=_attention_backward_fake,
)  # fmt: skip
_register.autograd("attention", setup_context=_setup, backward=_attention_grad)
_attention_qkv = _register.op(
    "attention_qkv(Tensor qkv, float scale) -> (Tensor, Tensor)",
    cpu=_attention_qkv_cpu, cuda=_packed(_attention_cuda), cpu_kernel="csrc/attention_cpu.h",
    fake=lambda qkv, scale: _attention_fake(*qkv.unbind(2), scale),
)  # fmt: skip
_attention_qkv_backward = _register.op(
    "attention_qkv_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, float scale) -> Tensor",
    cpu=_packed_backward(_attention_backward_cpu), cuda=_packed_backward(_attention_backward_cuda),
    fake=lambda grad, qkv, out, lse, scale: torch.empty_like(qkv, memory_format=torch.contiguous_format),
)  # fmt: skip
_register.autograd("attention_qkv", setup_context=_setup, backward=_attention_qkv_grad)
