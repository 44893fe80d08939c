"""Attention out of stock PyTorch operators and the C++ kernel: what runs where no Triton kernel does."""

from __future__ import annotations

import functools
import warnings

import torch
from torch.backends.cuda import cudnn_sdp_enabled

from vitfast import reference
from vitfast.choose import dispatch
from vitfast.kernels import cpu as cpu_kernels
from vitfast.kernels.operands import Extras

aten = torch.ops.aten
NOTHING = Extras()


def lse_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


def _rows(out):
    """[B, H, N, D] from a stock kernel -> [B, N, H * D], a view where that kernel wrote [B, N, H, D]."""
    return out.transpose(1, 2).flatten(2).contiguous()


def _laid_out(lse):
    """`lse` with the strides of a new tensor, by which calls are known again; `contiguous` keeps those of one query."""
    return lse.flatten().view(lse.shape)


def nothing(q):
    B, N, H, D = q.shape
    return q.new_zeros(B, N, H * D), q.new_full((B, H, N), float("-inf"), dtype=lse_dtype(q.dtype))


def attention_cpu(q, k, v, scale, with_lse=True):
    """`attention` below its checks; without lse a None may come in its place."""
    if not q.numel() or not k.numel():
        return nothing(q)
    run = _kernel_cpu if cpu_kernels.attends(q) else _flash_cpu
    if cpu_kernels.tiled(q.dtype):
        run = _faster(q, k, _kernel_cpu, _flash_cpu, q, k, v, scale, with_lse)
    return run(q, k, v, scale, with_lse)


def _faster(q, k, ours, stock, *args):
    """`ours` or `stock`, which attend q to k, where a clock decides."""
    # images and tokens by powers of two; sliced, since a raw call of the op may lack some
    sizes = (*(n.bit_length() for n in (*q.shape[:2], *k.shape[1:2])), *q.shape[2:])
    return cpu_kernels.faster_of("attention", sizes, ours, stock, *args)


def _kernel_cpu(q, k, v, scale, with_lse):
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return cpu_kernels.attention(q, k, v, scale, with_lse)


def _flash_cpu(q, k, v, scale, with_lse):
    _must_match(q, k, v)
    q, k, v = (_rows_of_heads(t) for t in (q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
    return _rows(out), _laid_out(lse)


def _must_match(q, k, v):
    """torch's kernel for CPUs takes k and v for as long as q says."""
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        shapes = ", ".join(str(list(t.shape)) for t in (q, k, v))
        raise ValueError(f"attention: q must be [B, Nq, H, D], k and v [B, Nk, H, D], got {shapes}")


def attention_qkv_cpu(qkv, scale):
    # one view of the whole in place of one a part: each costs a microsecond, beside 16 for all of the op
    if not qkv.numel():
        return nothing(qkv[:, :, 0])
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    run = _kernel_qkv_cpu if cpu_kernels.attends(qkv) else _flash_qkv_cpu
    if cpu_kernels.tiled(qkv.dtype):
        run = _faster(qkv, qkv, _kernel_qkv_cpu, _flash_qkv_cpu, qkv, scale)
    return run(qkv, scale)


def _kernel_qkv_cpu(qkv, scale):
    return cpu_kernels.attention_qkv(qkv, scale, with_lse=True)


def _flash_qkv_cpu(qkv, scale):
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        *qkv.permute(2, 0, 3, 1, 4).unbind(0), 0.0, False, scale=scale
    )
    return _rows(out), _laid_out(lse)


def attention_backward_cpu(grad, q, k, v, out, lse, scale):
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    B, N, H, D = q.shape
    _must_match(q, k, v)
    if grad.dtype != q.dtype or out.dtype != q.dtype or lse.shape != (B, H, N) or lse.dtype != lse_dtype(q.dtype):
        raise ValueError(f"attention_backward: lse must be {[B, H, N]}, and grad and out in {q.dtype}, got {lse.shape}")
    q, k, v = (_rows_of_heads(t) for t in (q, k, v))
    grad, out = (t.view(B, N, H, D).transpose(1, 2) for t in (grad.contiguous(), out))
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False, scale=scale)
    return tuple(g.transpose(1, 2) for g in grads)


def attention_cuda(q, k, v, scale, backend="flash"):
    """`attention` below its checks; backend: "flash", or "cudnn" where that was measured to be faster."""
    if not q.numel() or not k.numel():
        return nothing(q)
    if not _flash_takes(q):
        return attention_formula(q, k, v, scale)
    q, k, v = (_rows_of_heads(t) for t in (q, k, v))
    if backend == "cudnn":
        found = _cudnn_if_it_can("attention", q, lambda: _by_cudnn(q, k, v, scale))
        if found is not None:
            return found
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    return _rows(out), _laid_out(lse)


def _cudnn_if_it_can(op, q, run):
    """What `run` returns; None where cuDNN is not to be used, or has no plan for these sizes."""
    key = op, q.device, q.dtype, q.shape[-1]
    if not cudnn_sdp_enabled() or not _cudnn_agrees(*key):
        return None
    try:
        return run()
    except RuntimeError as problem:
        dispatch.spare(op, problem)
        _refused(key, f"{type(problem).__name__}: {problem}")
        return None


def _by_cudnn(q, k, v, scale):
    """Of [B, H, N, D]; lse comes as [B, H, N] or [B, H, N, 1], as torch's version has it."""
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False, scale=scale)
    return _rows(out), _laid_out(lse.reshape(q.shape[:3]))


def _by_cudnn_backward(grad, q, k, v, out, lse, scale):
    """Of [B, H, N, D], and lse [B, H, N], by whatever made them."""
    # of dropout, which there is none of
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse.unsqueeze(-1), unused, unused, None, None, None, q.shape[2], k.shape[2], 0.0, False,
        scale=scale,
    )  # fmt: skip


# known by op, device, dtype and head dim
_agrees: dict[tuple, bool] = {}


def _cudnn_agrees(op, device, dtype, head_dim):
    """Whether cuDNN's attention takes this, and its lse is the one that our backward and flash attention's read.

    Of the backward: whether it reads that one. Nothing that PyTorch documents says so: it is tried once, on few
    numbers; until then a graph gets flash attention.
    """
    key = op, device, dtype, head_dim
    if key not in _agrees:
        if torch.cuda.is_current_stream_capturing():
            return False
        generator = torch.Generator(device).manual_seed(0)
        drawn = torch.randn(4, 2, 40, 3, head_dim, generator=generator, dtype=torch.float32, device=device)
        grad, q, k, v = drawn.to(dtype).unbind(0)
        scale, rows = head_dim**-0.5, lambda *ts: (t.transpose(1, 2) for t in ts)
        expected = made = attention_formula(q, k, v, scale)
        if op == "attention_backward":
            expected = attention_formula_backward(grad.flatten(2), q, k, v, *made, scale)
        try:
            if op == "attention_backward":
                out = made[0].view(q.shape)
                found = tuple(rows(*_by_cudnn_backward(*rows(grad, q, k, v, out), made[1], scale)))
            else:
                found = _by_cudnn(*rows(q, k, v), scale)
            pairs = zip(found, expected, strict=True)
            # another question than `check.acceptance`'s: whether this computes attention and its logsumexp at all
            _agrees[key] = all(torch.allclose(a.float(), b.float(), 0.02, 0.02) for a, b in pairs)
            if not _agrees[key]:
                _refused(key, "it differs from the formula")
        # cuDNN refuses in many ways
        except RuntimeError as problem:
            dispatch.spare(op, problem)
            _refused(key, f"{type(problem).__name__}: {problem}")
    return _agrees[key]


def _refused(key, why):
    """Leave cuDNN's attention out from now on, and say so."""
    _agrees[key] = False
    op, _, dtype, head_dim = key
    what = "cuDNN's attention" + ("'s backward" if op == "attention_backward" else "")
    warnings.warn(
        f"{what}, which was chosen or is to be timed, is not used for {dtype} and head dim {head_dim}: "
        f"{why.splitlines()[0]}. PyTorch's flash attention takes its place",
        RuntimeWarning,
        stacklevel=2,
    )


def attention_backward_cuda(grad, q, k, v, out, lse, scale, backend="flash"):
    """`attention_backward` below its checks; `backend` as in `attention_cuda`, whoever made out and lse."""
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if not _flash_takes(q):
        return attention_formula_backward(grad, q, k, v, out, lse, scale)
    B, N, H, D = q.shape
    q, k, v = (_rows_of_heads(t) for t in (q, k, v))
    grad, out = (_rows_of_heads(t.contiguous().view(B, N, H, D)) for t in (grad, out))
    if backend == "cudnn":
        grads = _cudnn_if_it_can(
            "attention_backward", q, lambda: _by_cudnn_backward(grad, q, k, v, out, lse, scale)
        )  # fmt: skip
        if grads is not None:
            return tuple(g.transpose(1, 2).contiguous() for g in grads)
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
def attention_formula(q, k, v, scale, extras=NOTHING, image=0):
    """Attention as written, for what no stock kernel takes; the N x N weights live only inside this call.

    `image`: the number of the first image, by which dropout draws.
    """
    dtype = lse_dtype(q.dtype)
    k, v = _without_padding(extras.lengths, k, v)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.to(dtype), k.to(dtype)).mul_(scale)
    _mask_padding(logits, extras.lengths)
    lse = torch.logsumexp(logits, dim=-1)
    weights = _mask_empty(logits.sub_(lse.unsqueeze(-1)).exp_(), extras.lengths)
    if extras.dropout_p:
        weights.mul_(_dropout(weights, extras, image))
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.to(dtype)).to(q.dtype).flatten(2).contiguous(), lse


@_outside_autocast
def attention_formula_backward(grad, q, k, v, out, lse, scale, extras=NOTHING, image=0):
    """Gradients from q, k, v, out and lse. With P the weights, Z their dropout (1 without) and dP = Z * grad v^T:
    dS = P * (dP - rowsum(grad * out)), dq = scale dS k, dk = scale dS^T q, dv = (Z * P)^T grad.
    """
    B, N, H, D = q.shape
    dtype = lse_dtype(q.dtype)
    k, v = _without_padding(extras.lengths, k, v)
    qd, kd, vd, gd, od = (t.to(dtype) for t in (q, k, v, grad.reshape(B, N, H, D), out.view(B, N, H, D)))
    logits = torch.einsum("bqhd,bkhd->bhqk", qd, kd).mul_(scale)
    _mask_padding(logits, extras.lengths)
    weights = _mask_empty(logits.sub_(lse.unsqueeze(-1)).exp_(), extras.lengths)
    z = _dropout(weights, extras, image) if extras.dropout_p else None
    dv = torch.einsum("bhqk,bqhd->bkhd", weights if z is None else weights * z, gd)
    dp = torch.einsum("bqhd,bkhd->bhqk", gd, vd)
    if z is not None:
        dp.mul_(z)
    ds = dp.sub_((gd * od).sum(-1).transpose(1, 2).unsqueeze(-1)).mul_(weights)
    dq = torch.einsum("bhqk,bkhd->bqhd", ds, kd).mul_(scale)
    dk = torch.einsum("bhqk,bqhd->bkhd", ds, qd).mul_(scale)
    return tuple(t.to(q.dtype).contiguous() for t in (dq, dk, dv))


def attention_plainly(q, k, v, scale, extras=NOTHING, image=0):
    """Out of `attention_formula` as a graph that can be differentiated any number of times."""
    dtype = lse_dtype(q.dtype)
    k, v = _without_padding(extras.lengths, k, v)
    mask = None if extras.lengths is None else key_is_there(extras.lengths, k.shape[1])[:, None, None]
    drop = lambda weights: weights * _dropout(weights, extras, image) if extras.dropout_p else weights  # noqa: E731
    return reference.attention_visibly(q.to(dtype), k.to(dtype), v.to(dtype), scale, mask, drop).to(q.dtype)


def key_is_there(lengths, keys):
    """[B, keys]: whether each key of each image takes part."""
    return torch.arange(keys, device=lengths.device) < lengths.unsqueeze(1)


def _without_padding(lengths, k, v):
    """k and v with zeros in the padding, which may hold anything: 0 * NaN is NaN."""
    if lengths is None:
        return k, v
    gone = ~key_is_there(lengths, k.shape[1])[:, :, None, None]
    return k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)


def _mask_padding(logits, lengths):
    if lengths is not None:
        logits.masked_fill_(~key_is_there(lengths, logits.shape[-1])[:, None, None], float("-inf"))


def _mask_empty(weights, lengths):
    # without any key: exp(-inf - -inf)
    return weights if lengths is None else weights.masked_fill_((lengths <= 0)[:, None, None, None], 0.0)


def _dropout(weights, extras, image):
    kept = reference.attention_kept(extras.seed, weights.shape, extras.dropout_p, image)
    return kept.to(weights.dtype).mul_(1.0 / (1.0 - extras.dropout_p))
