"""The ops of a ViT against everybody's way to compute them. Each function makes a `Case` from plain values.

All tensors of an op, weights too, are inputs, so that they rotate. A rival that wants another layout than a ViT's
tensors have (heads apart, channels last) gets inputs of its own in it; notes["left_out"] says what of the time that is.
With mode 'forward+backward' the last inputs are the gradients of the results, and the gradients of inputs and weights
come after the results.
"""

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
from vitfast.bench.compilers import compiled
from vitfast.bench.factory import dtype_of, one_of, positive, recorded
from vitfast.bench.op_case import MODES, Draw, Way, op_case

EPS = 1e-6
# K and outputs in widths, norm, activation, residual
LINEARS = {
    "qkv": (1, 3, "none", "none", False),
    "proj": (1, 1, "none", "none", True),
    "fc1": (1, 4, "none", "gelu", False),
    "fc2": (4, 1, "none", "none", True),
    "norm qkv": (1, 3, "layer", "none", False),
    "norm fc1": (1, 4, "layer", "gelu", False),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

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


def _liger(device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Liger's LayerNorm of (x, weight, bias)."""
    if torch.device(device).type != "cuda":
        raise NotImplementedError("on a GPU only")
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, EPS)


@recorded
def layer_norm(
    *, batch: int, tokens: int, width: int, mode: str = "forward", dtype: str = "bf16", device: str = "cpu"
) -> Case:
    """The norm of [B, N, C] with weight and bias."""
    positive(batch=batch, tokens=tokens, width=width)

    def draw_inputs(draw: Draw) -> Tensors:
        return draw(batch, tokens, width), 1 + draw(width, scale=0.1), draw(width, scale=0.1)

    def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, EPS)

    return op_case(
        "layer_norm", {"tokens": tokens, "width": width}, batch, mode, dtype, device, draw_inputs,
        images=(True, False, False), results=((batch, tokens, width),),
        truth=lambda x, weight, bias: reference.layer_norm(x, weight, bias, EPS),
        ways={
            "F.layer_norm": Way(lambda: stock),
            "vitfast": Way(lambda: partial(ops.layer_norm, eps=EPS)),
            "compiled": Way(lambda: compiled(stock)),
            "Liger": Way(lambda: _liger(device), ("liger_kernel",)),
        },
        count=partial(work.layer_norm, batch * tokens, width, dtype),
    )  # fmt: skip


@recorded
def add_layer_norm(
    *, batch: int, tokens: int, width: int, mode: str = "forward", dtype: str = "bf16", device: str = "cpu"
) -> Case:
    """The sum of residual and branch, both [B, N, C], and its norm: what stands between two halves of a block."""
    positive(batch=batch, tokens=tokens, width=width)

    def draw_inputs(draw: Draw) -> Tensors:
        x, branch = draw(batch, tokens, width), draw(batch, tokens, width)
        return x, branch, 1 + draw(width, scale=0.1), draw(width, scale=0.1)

    def stock(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
        total = x + branch
        return total, F.layer_norm(total, weight.shape, weight, bias, EPS)

    def liger() -> Callable[..., Tensors]:
        norm = _liger(device)

        def run(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
            total = x + branch
            return total, norm(total, weight, bias)

        return run

    return op_case(
        "add_layer_norm", {"tokens": tokens, "width": width}, batch, mode, dtype, device, draw_inputs,
        images=(True, True, False, False), results=((batch, tokens, width),) * 2,
        truth=lambda x, branch, weight, bias: reference.add_layer_norm(x, branch, None, None, weight, bias, EPS),
        ways={
            "add, F.layer_norm": Way(lambda: stock),
            "vitfast": Way(lambda: partial(ops.add_layer_norm, eps=EPS)),
            "compiled": Way(lambda: compiled(stock)),
            "add, Liger": Way(liger, ("liger_kernel",)),
        },
        count=partial(work.add_layer_norm, batch * tokens, width, dtype),
    )  # fmt: skip


@recorded
def linear(
    *, batch: int, tokens: int, width: int, kind: str, mode: str = "forward", dtype: str = "bf16", device: str = "cpu"
) -> Case:
    """A projection of a block with what is around it: qkv (bias), proj and fc2 (bias, residual), fc1 (bias, GELU).

    "norm qkv" and "norm fc1" have the norm before them as well.
    """
    positive(batch=batch, tokens=tokens, width=width)
    inside, outside, norm, act, residual = LINEARS[one_of("kind", kind, LINEARS)]
    K, D, normed = inside * width, outside * width, norm != "none"

    def draw_inputs(draw: Draw) -> Tensors:
        given = draw(batch, tokens, K), draw(D, K, scale=K**-0.5), draw(D, scale=0.1)
        if normed:
            return *given, 1 + draw(K, scale=0.1), draw(K, scale=0.1)
        return (*given, draw(batch, tokens, D)) if residual else given

    def stock(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        if normed:
            x = F.layer_norm(x, rest[0].shape, *rest, EPS)
        y = F.linear(x, weight, bias)
        if act == "gelu":
            y = F.gelu(y)
        return rest[0] + y if residual else y

    def ours(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        if normed:
            return ops.linear(
                x, weight, bias, norm=norm, norm_weight=rest[0], norm_bias=rest[1], norm_eps=EPS, act=act
            )
        return ops.linear(x, weight, bias, act=act, residual=rest[0] if residual else None)

    def truth(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        norm_weight, norm_bias = rest if normed else (None, None)
        added = rest[0] if residual else None
        return reference.linear(x, weight, bias, norm_weight, norm_bias, EPS, norm, act, residual=added)

    return op_case(
        f"linear {kind}", {"tokens": tokens, "width": width}, batch, mode, dtype, device, draw_inputs,
        images=(True, False, False) + (False,) * (2 * normed) + (True,) * residual, results=((batch, tokens, D),),
        truth=truth,
        ways={
            "F.linear": Way(lambda: stock),
            "vitfast": Way(lambda: ours),
            "product": Way(lambda: lambda x, weight, *rest: F.linear(x, weight), leaves=(0, 1), part=True),
            "compiled": Way(lambda: compiled(stock)),
            "compiled max-autotune": Way(lambda: _autotuned(stock, device)),
        },
        count=partial(work.linear, batch * tokens, K, D, dtype, norm=normed, act=act != "none", residual=residual),
    )  # fmt: skip


def _autotuned(function: Function, device: str) -> Function:
    """torch.compile's best; without graphs of its own, since every variant here is replayed from one."""
    if torch.device(device).type != "cuda":
        raise NotImplementedError("on a GPU only")
    return compiled(function, "max-autotune-no-cudagraphs")


@recorded
def mlp(
    *, batch: int, tokens: int, width: int, mode: str = "forward", dtype: str = "bf16", device: str = "cpu"
) -> Case:
    """The MLP half of a block: x + fc2(GELU(fc1(norm(x))))."""
    positive(batch=batch, tokens=tokens, width=width)
    hidden = 4 * width

    def draw_inputs(draw: Draw) -> Tensors:
        return (
            draw(batch, tokens, width), 1 + draw(width, scale=0.1), draw(width, scale=0.1),
            draw(hidden, width, scale=width**-0.5), draw(hidden, scale=0.1),
            draw(width, hidden, scale=hidden**-0.5), draw(width, scale=0.1),
        )  # fmt: skip

    def stock(x: Tensor, nw: Tensor, nb: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = F.gelu(F.linear(F.layer_norm(x, nw.shape, nw, nb, EPS), w1, b1))
        return x + F.linear(h, w2, b2)

    def truth(x: Tensor, nw: Tensor, nb: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return reference.mlp(x, nw, nb, EPS, "layer", w1, b1, w2, b2)

    def products(x: Tensor, nw: Tensor, nb: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.linear(x, w1), w2)

    return op_case(
        "mlp", {"tokens": tokens, "width": width}, batch, mode, dtype, device, draw_inputs,
        images=(True,) + (False,) * 6, results=((batch, tokens, width),), truth=truth,
        ways={
            "eager": Way(lambda: stock),
            "vitfast": Way(lambda: partial(ops.mlp, norm_eps=EPS)),
            "product": Way(lambda: products, leaves=(0, 3, 5), part=True),
            "compiled": Way(lambda: compiled(stock)),
            "compiled max-autotune": Way(lambda: _autotuned(stock, device)),
        },
        count=partial(work.mlp, batch * tokens, width, hidden, dtype),
    )  # fmt: skip


@recorded
def patch_embed(
    *, batch: int, size: int, patch: int, width: int, images: str = "float", mode: str = "forward",
    dtype: str = "bf16", device: str = "cpu",
) -> Case:  # fmt: skip
    """Images to tokens with positions and a class token in front; the backward is that of the parameters.

    Args:
        images: 'float' (normalised, [B, 3, H, W] in `dtype`) or 'uint8' (rows of pixels as a decoder leaves them).
    """
    positive(batch=batch, size=size, patch=patch, width=width)
    raw = one_of("images", images, ("float", "uint8")) == "uint8"
    if size % patch:
        raise ValueError(f"size must be a multiple of patch={patch}, got {size}")
    to, tokens = dtype_of(dtype), 1 + (size // patch) ** 2

    def draw_inputs(draw: Draw) -> Tensors:
        pixels = 3 * patch * patch
        weight = draw(width, 3, patch, patch, scale=pixels**-0.5)
        given = draw(width, scale=0.1), draw(tokens, width, scale=0.5), draw(1, width, scale=0.5)
        if raw:
            decoded = draw.integers(256, batch, size, size, 3).to(torch.uint8).permute(0, 3, 1, 2)
            return decoded, weight, *given, draw.constant(MEAN), draw.constant(STD)
        x, last = draw(batch, 3, size, size), {"memory_format": torch.channels_last}
        return x, weight, *given, x.contiguous(**last), weight.contiguous(**last)

    def to_tokens(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, prefix: Tensor) -> Tensor:
        x = F.conv2d(x, weight, bias, stride=patch).flatten(2).transpose(1, 2)
        return torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1) + positions

    def stock(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, prefix: Tensor, *rest: Tensor) -> Tensor:
        if raw:
            mean, std = (t[:, None, None] for t in rest)
            x = x.float().div_(255).sub_(mean).div_(std).to(to)
        return to_tokens(x, weight, bias, positions, prefix)

    def one_pass(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, prefix: Tensor, *rest: Tensor) -> Tensor:
        mean, std = (t[:, None, None] for t in rest)
        x = torch.addcmul(-mean / std, x, 1 / (255 * std))
        return to_tokens(x.to(to), weight, bias, positions, prefix)

    def last(
        x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, prefix: Tensor, x_last: Tensor, weight_last: Tensor
    ) -> Tensor:
        return to_tokens(x_last, weight_last, bias, positions, prefix)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, prefix: Tensor, *rest: Tensor) -> Tensor:
        mean, std = rest if raw else (None, None)
        return ops.patch_embed(x, weight, bias, pos_embed=positions, prefix=prefix, mean=mean, std=std)

    def truth(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, prefix: Tensor, *rest: Tensor) -> Tensor:
        if raw:
            x = reference.normalise(x, *rest, torch.float64)
        return reference.patch_embed(x, weight, bias, positions, prefix)

    more = {"conv2d mul and add": Way(lambda: one_pass)}
    if not raw:
        more = {"conv2d channels_last": Way(lambda: last, leaves=(6, 2, 3, 4))}
    shape = {"size": size, "patch": patch, "width": width}
    return op_case(
        f"patch_embed {images}", shape, batch, mode, dtype, device, draw_inputs,
        images=(True,) + (False,) * 6 if raw else (True, False, False, False, False, True, False),
        results=((batch, tokens, width),), leaves=(1, 2, 3, 4), truth=truth,
        ways={
            "conv2d": Way(lambda: stock),
            "vitfast": Way(lambda: ours),
            **more,
            "compiled": Way(lambda: compiled(stock)),
        },
        count=partial(
            work.patch_embed, batch, (size, size), (patch, patch), 3, width, dtype,
            image_dtype="uint8" if raw else None, prefix=1,
        ),
        notes={} if raw else {"left_out": "conv2d channels_last: images and weight are channels last from the start"},
    )  # fmt: skip


FACTORIES: dict[str, Callable[..., Case]] = {
    "attention": attention,
    "layer_norm": layer_norm,
    "add_layer_norm": add_layer_norm,
    "linear": linear,
    "mlp": mlp,
    "patch_embed": patch_embed,
}
