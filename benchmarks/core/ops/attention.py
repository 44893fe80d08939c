"""Attention against everybody's way to compute it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitfast import ops, reference
from vitfast.bench import work
from vitfast.bench.case import Case, Function, Tensors, Variant
from vitfast.bench.factory import dtype_of, one_of, positive, recorded
from vitfast.bench.op_case import MODES, Draw


@recorded
def attention(
    *, batch: int, tokens: int, heads: int, head_dim: int, mode: str = "forward", dtype: str = "bf16",
    device: str = "cpu",
) -> Case:  # fmt: skip
    """softmax(q k^T / sqrt(D)) v of the packed projection [B, N, 3, H, D].

    Results are [B, N, H, D]: the output, then with a backward the gradients of q, k and v.
    """
    positive(batch=batch, tokens=tokens, heads=heads, head_dim=head_dim)
    to, backward = dtype_of(dtype), one_of("mode", mode, MODES) != "forward"
    half, cuda = dtype != "fp32", torch.device(device).type == "cuda"
    shape = (batch, tokens, heads, head_dim)

    def inputs(generator: torch.Generator) -> Tensors:
        draw = Draw(generator, to)
        qkv = draw(batch, tokens, 3, heads, head_dim)
        apart = tuple(t.transpose(1, 2).contiguous() for t in qkv.unbind(2))
        if not backward:
            return qkv, *apart
        grad = draw(*shape)
        return qkv, *apart, grad, grad.transpose(1, 2).contiguous()

    def from_packed(attend: Callable[[Tensor], Tensor]) -> Callable[[], Function]:
        def run(qkv: Tensor, q: Tensor, k: Tensor, v: Tensor, *grads: Tensor) -> Tensor | Tensors:
            if not backward:
                with torch.inference_mode():
                    return attend(qkv).view(shape_of(qkv))
            with torch.enable_grad():
                qkv = qkv.detach().requires_grad_()
                out = attend(qkv).view(shape_of(qkv))
                (grad,) = torch.autograd.grad(out, qkv, grads[0])
            return out.detach(), *grad.unbind(2)

        return lambda: run

    def from_heads(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Function:
        """`attend` takes and gives [B, H, N, D]."""

        def run(qkv: Tensor, q: Tensor, k: Tensor, v: Tensor, *grads: Tensor) -> Tensor | Tensors:
            if not backward:
                with torch.inference_mode():
                    return attend(q, k, v).transpose(1, 2)
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (q, k, v)]
                out = attend(*leaves)
                found = torch.autograd.grad(out, leaves, grads[1])
            return tuple(t.transpose(1, 2) for t in (out.detach(), *found))

        return run

    def shape_of(qkv: Tensor) -> tuple[int, ...]:
        return qkv.shape[0], tokens, heads, head_dim

    def forced(backend: SDPBackend, takes_fp32: bool, on_cpu: bool = False) -> Callable[..., Tensor]:
        if not (cuda or on_cpu):
            raise NotImplementedError("on a GPU only")
        if not (half or takes_fp32):
            raise NotImplementedError("fp16 and bf16 only")

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return attend

    def flash_attn(version: int) -> Function:
        if not (cuda and half):
            raise NotImplementedError("fp16 and bf16 on a GPU only")
        return from_packed(_flash_attn(version))()

    def sdpa(backend: SDPBackend, *takes: bool) -> Callable[[], Function]:
        return lambda: from_heads(forced(backend, *takes))

    def packed_cudnn() -> Function:
        attend = forced(SDPBackend.CUDNN_ATTENTION, False)
        return from_packed(lambda qkv: _as_timm(qkv, attend))()

    variants = {
        "SDPA packed": Variant(from_packed(partial(_as_timm, attend=F.scaled_dot_product_attention))),
        "vitfast": Variant(from_packed(ops.attention_qkv), ours=True),
        "SDPA flash": Variant(sdpa(SDPBackend.FLASH_ATTENTION, not cuda, True)),
        "SDPA cuDNN": Variant(sdpa(SDPBackend.CUDNN_ATTENTION, False)),
        "SDPA efficient": Variant(sdpa(SDPBackend.EFFICIENT_ATTENTION, True)),
        "SDPA math": Variant(sdpa(SDPBackend.MATH, True, True)),
        "SDPA packed cuDNN": Variant(packed_cudnn),
        "flash-attn 2": Variant(partial(flash_attn, 2), needs=("flash_attn",)),
        "flash-attn 3": Variant(partial(flash_attn, 3), needs=("flash_attn_interface",)),
        "flash-attn 4": Variant(partial(flash_attn, 4), needs=("flash_attn",)),
    }

    def truth(qkv: Tensor, q: Tensor, k: Tensor, v: Tensor, *grads: Tensor) -> Tensor | Tensors:
        def attend(qkv: Tensor) -> Tensor:
            return reference.attention(*qkv.unbind(2), head_dim**-0.5)

        return from_packed(attend)()(qkv, q, k, v, *grads)

    return Case(
        kind="op", name="attention", mode=mode, shape={"tokens": tokens, "heads": heads, "head_dim": head_dim},
        batch=batch, dtype=dtype, device=torch.device(device), inputs=inputs, reference=truth,
        cut=lambda given, n: tuple(t[:n] for t in given), per_image=(True,) * (4 if backward else 1),
        variants=variants, baseline="SDPA packed", yardstick="SDPA packed",
        work=work.attention(batch, tokens, heads, head_dim, dtype, backward=backward),
        notes={"left_out": "SDPA but for the packed ones: q, k, v and gradients are [B, H, N, D] from the start"},
    )  # fmt: skip


def _as_timm(qkv: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    """Packed [B, N, 3, H, D] to rows [B, N, H * D] with the permutes around."""
    out = attend(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
    return out.transpose(1, 2).reshape(qkv.shape[0], qkv.shape[1], -1)


def _flash_attn(version: int) -> Callable[[Tensor], Tensor]:
    """The package's best function for packed projections, forward without what only a caller asks for."""
    if version == 2:
        from flash_attn import flash_attn_qkvpacked_func as packed

        return packed
    if version == 3:
        from flash_attn_interface import flash_attn_func as attend
    else:
        from flash_attn.cute import flash_attn_func as attend

    def run(qkv: Tensor) -> Tensor:
        out = attend(*qkv.unbind(2))
        # releases differ in whether the logsumexp comes along
        return out[0] if isinstance(out, tuple) else out

    return run
