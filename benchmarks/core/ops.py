"""The ops of a ViT against everybody's way to compute them. Each function here makes a `Case` from plain values.

Inputs and truth come from `vitfast.check.families`. All tensors of an op, weights too, are inputs, so that they rotate.
A rival that wants another layout than a ViT's tensors have (heads apart, channels last) gets inputs of its own in it;
notes["left_out"] says what of the time that is. With mode 'forward+backward' the last inputs are the gradients of the
results, and the gradients of inputs and weights come after the results.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.core import work
from benchmarks.core.compilers import compiled
from benchmarks.core.op_case import MODES, Op, Way, op_case
from vitfast.check.calls import Call, contiguous
from vitfast.check.case import DTYPES, Case, Function, Tensors
from vitfast.check.families import as_tuple

# of every norm
EPS = 1e-6
# tokens of an image with one class token: its size and patch
IMAGES = {17: (32, 8), 197: (224, 16), 257: (224, 14), 577: (384, 16), 1025: (512, 16), 1370: (518, 14)}
# head dim: heads of a ViT that has it
HEADS = {64: 12, 72: 16, 80: 16}
# as a block has them: K and outputs in widths, norm, activation, residual
LINEARS = {
    "norm qkv": (1, 3, "layer", "none", False),
    "proj": (1, 1, "none", "none", True),
    "norm fc1": (1, 4, "layer", "gelu", False),
    "fc2": (4, 1, "none", "none", True),
}


@op_case
def attention(*, batch: int, tokens: int, heads: int, head_dim: int, dtype: str) -> Op:
    """softmax(q k^T / sqrt(D)) v of the packed projection [B, N, 3, H, D].

    Results are [B, N, H, D]: the output, then with a backward the gradients of q, k and v.
    """
    qkv = contiguous(batch, tokens, 3, heads, head_dim, dtype=DTYPES[dtype])

    def from_packed(build: Callable[[], Callable[[Tensor], Tensor]], *needs: str) -> Way:
        def finish(out: Tensor, *grads: Tensor) -> Tensors:
            return out.view(-1, tokens, heads, head_dim), *(t for grad in grads for t in grad.unbind(2))

        return Way(build, needs, reads=(0,), finish=finish)

    def from_heads(backend: SDPBackend) -> Way:
        """Of [B, H, N, D] from the start."""

        def finish(*found: Tensor) -> Tensors:
            return tuple(t.transpose(1, 2) for t in found)

        return Way(lambda: sdpa(backend), reads=(1, 2, 3), own_grads=True, finish=finish)

    def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return attend

    def as_timm(qkv: Tensor, attend: Callable[..., Tensor] = F.scaled_dot_product_attention) -> Tensor:
        """To rows [B, N, H * D] with the permutes around."""
        out = attend(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        return out.transpose(1, 2).reshape(qkv.shape[0], tokens, -1)

    return Op(
        Call("attention_qkv", (qkv, head_dim**-0.5)),
        ways={
            "SDPA packed": from_packed(lambda: as_timm),
            "SDPA flash": from_heads(SDPBackend.FLASH_ATTENTION),
            "SDPA cuDNN": from_heads(SDPBackend.CUDNN_ATTENTION),
            "SDPA efficient": from_heads(SDPBackend.EFFICIENT_ATTENTION),
            "SDPA math": from_heads(SDPBackend.MATH),
            "SDPA packed cuDNN": from_packed(lambda: partial(as_timm, attend=sdpa(SDPBackend.CUDNN_ATTENTION))),
            "flash-attn 2": from_packed(lambda: packed_flash_attn(2), "flash_attn"),
            "flash-attn 3": from_packed(lambda: packed_flash_attn(3), "flash_attn_interface"),
            "flash-attn 4": from_packed(lambda: packed_flash_attn(4), "flash_attn"),
        },
        count=partial(work.attention, batch, tokens, heads, head_dim, dtype),
        layouts=lambda qkv: tuple(t.transpose(1, 2).contiguous() for t in qkv.unbind(2)),
        layouts_of_grads=lambda grad: (grad.view(batch, tokens, heads, -1).transpose(1, 2).contiguous(),),
        layouts_by_image=(True,) * 3, gradients_by_image=(True,) * 3,
        left_out="SDPA but for the packed ones: q, k, v and gradients are [B, H, N, D] from the start",
    )  # fmt: skip


def packed_flash_attn(version: int) -> Callable[[Tensor], Tensor]:
    """The package's best function for packed projections, to rows, forward without what only a caller asks for."""
    if version == 2:
        from flash_attn import flash_attn_qkvpacked_func as packed

        return lambda qkv: packed(qkv).flatten(2)
    if version == 3:
        from flash_attn_interface import flash_attn_func as attend
    else:
        from flash_attn.cute import flash_attn_func as attend
    # releases differ in whether the logsumexp comes along
    return lambda qkv: as_tuple(attend(*qkv.unbind(2)))[0].flatten(2)


@op_case
def layer_norm(*, batch: int, tokens: int, width: int, dtype: str) -> Op:
    """The norm of [B, N, C] with weight and bias."""
    like = partial(contiguous, dtype=DTYPES[dtype])

    def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, EPS)

    return Op(
        Call("layer_norm", (like(batch, tokens, width), like(width), like(width), EPS, "layer", None)),
        ways={
            "F.layer_norm": Way(lambda: stock),
            "compiled": Way(lambda: compiled(stock)),
            "Liger": Way(liger, ("liger_kernel",)),
        },
        count=partial(work.layer_norm, batch * tokens, width, dtype),
    )


@op_case
def add_layer_norm(*, batch: int, tokens: int, width: int, dtype: str) -> Op:
    """The sum of residual and branch, both [B, N, C], and its norm: what stands between two halves of a block."""
    like = partial(contiguous, dtype=DTYPES[dtype])
    rows, vector = like(batch, tokens, width), like(width)

    def stock(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
        total = x + branch
        return total, F.layer_norm(total, weight.shape, weight, bias, EPS)

    def with_liger() -> Function:
        norm = liger()

        def run(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
            total = x + branch
            return total, norm(total, weight, bias)

        return run

    return Op(
        Call("add_layer_norm", (rows, rows, vector, vector, EPS, "layer", None, None)),
        ways={
            "add, F.layer_norm": Way(lambda: stock),
            "compiled": Way(lambda: compiled(stock)),
            "add, Liger": Way(with_liger, ("liger_kernel",)),
        },
        count=partial(work.add_layer_norm, batch * tokens, width, dtype),
    )


def liger() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Liger's LayerNorm of (x, weight, bias)."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, EPS)


@op_case
def linear(*, batch: int, tokens: int, width: int, kind: str, dtype: str) -> Op:
    """A projection of a block with what is around it: proj and fc2 (bias, residual), and after the norm before them qkv
    (bias) and fc1 (bias, GELU)."""
    inside, outside, norm, act, residual = LINEARS[kind]
    K, D, normed = inside * width, outside * width, norm != "none"
    like = partial(contiguous, dtype=DTYPES[dtype])
    vector, added = like(K) if normed else None, like(batch, tokens, D) if residual else None

    def stock(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        if normed:
            x = F.layer_norm(x, rest[0].shape, *rest, EPS)
        y = F.linear(x, weight, bias)
        if act == "gelu":
            y = F.gelu(y)
        return rest[0] + y if residual else y

    x, weight = like(batch, tokens, K), like(D, K)
    return Op(
        Call("linear", (x, weight, like(D), vector, vector, EPS, norm, act, None, None, added, False)),
        ways={
            "F.linear": Way(lambda: stock),
            "product": Way(lambda: F.linear, reads=(0, 1), part=True),
            "compiled": Way(lambda: compiled(stock)),
        },
        count=partial(work.linear, batch * tokens, K, D, dtype, norm=normed, act=act != "none", residual=residual),
    )


@op_case
def mlp(*, batch: int, tokens: int, width: int, dtype: str, act: str = "gelu") -> Op:
    """The MLP half of a block: x + fc2(act(fc1(norm(x)))); `act` is 'gelu' or 'gelu_tanh'."""
    like, hidden = partial(contiguous, dtype=DTYPES[dtype]), 4 * width
    vector, first, second = like(width), like(hidden, width), like(width, hidden)

    def stock(x: Tensor, nw: Tensor, nb: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = F.linear(F.layer_norm(x, nw.shape, nw, nb, EPS), w1, b1)
        return x + F.linear(F.gelu(h, approximate="tanh" if act == "gelu_tanh" else "none"), w2, b2)

    return Op(
        Call("mlp", (
            like(batch, tokens, width), vector, vector, EPS, "layer", first, like(hidden), second, vector, act, False,
            None, None, "",
        )),
        ways={
            "eager": Way(lambda: stock),
            "product": Way(lambda: lambda x, w1, w2: F.linear(F.linear(x, w1), w2), reads=(0, 3, 5), part=True),
            "compiled": Way(lambda: compiled(stock)),
        },
        count=partial(work.mlp, batch * tokens, width, hidden, dtype),
    )  # fmt: skip


@op_case
def patch_embed(*, batch: int, size: int, patch: int, width: int, images: str, dtype: str) -> Op:
    """Images to tokens with positions and a class token in front; the backward is that of the parameters.

    Args:
        images: 'float' (normalised, [B, 3, H, W] in `dtype`) or 'uint8' (rows of pixels as a decoder leaves them).
    """
    to, tokens, raw = DTYPES[dtype], 1 + (size // patch) ** 2, images == "uint8"
    like = partial(contiguous, dtype=to)
    pixels, rgb = like(batch, 3, size, size), contiguous(3, dtype=torch.float32) if raw else None
    if raw:
        pixels = pixels._replace(dtype=torch.uint8, stride=(3 * size * size, 1, 3 * size, 3))

    def to_tokens(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, prefix: Tensor) -> Tensor:
        x = F.conv2d(x, weight, bias, stride=patch).flatten(2).transpose(1, 2)
        return torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1) + positions

    def step_by_step(x: Tensor, *rest: Tensor) -> Tensor:
        *parameters, mean, std = rest
        x = x.float().div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])
        return to_tokens(x.to(to), *parameters)

    def mul_and_add(x: Tensor, *rest: Tensor) -> Tensor:
        *parameters, mean, std = rest
        mean, std = mean[:, None, None], std[:, None, None]
        return to_tokens(torch.addcmul(-mean / std, x, 1 / (255 * std)).to(to), *parameters)

    stock = step_by_step if raw else to_tokens
    if raw:
        other, layouts = {"conv2d mul and add": Way(lambda: mul_and_add)}, {"constant": (0, 5, 6)}
    else:
        other = {"conv2d channels_last": Way(lambda: to_tokens, reads=(5, 6, 2, 3, 4))}
        layouts = {
            "layouts": lambda *t: tuple(each.contiguous(memory_format=torch.channels_last) for each in t[:2]),
            "layouts_by_image": (True, False),
            "constant": (0, 5),
            "left_out": "conv2d channels_last: images and weight are channels last from the start",
        }
    given = pixels, like(width, 3, patch, patch), like(width), like(tokens, width), like(1, width), rgb, rgb
    return Op(
        Call("patch_embed", given),
        ways={"conv2d": Way(lambda: stock), **other, "compiled": Way(lambda: compiled(stock))},
        count=partial(
            work.patch_embed, batch, (size, size), (patch, patch), 3, width, dtype,
            image_dtype="uint8" if raw else None, prefix=1,
        ),
        **layouts,
    )  # fmt: skip


FACTORIES: dict[str, Callable[..., Case]] = {
    made.__name__: made for made in (attention, layer_norm, add_layer_norm, linear, mlp, patch_embed)
}


def listed(
    of: Sequence[str] = tuple(FACTORIES), *, device: str, dtypes: Sequence[str], batches: Sequence[int],
    tokens: Sequence[int], modes: Sequence[str] = MODES, widths: Sequence[int] = (768,),
    heads: Mapping[int, int] = HEADS,
) -> Iterator[Callable[[], Case]]:  # fmt: skip
    """The rows of the ops named, shorter sequences first; each is made when it is called.

    Args:
        widths: of all but attention.
        heads: of attention, {head dim: heads}.

    Raises:
        ValueError: patch_embed with a number of tokens that is not in `IMAGES`.
    """
    unknown = [n for n in tokens if n not in IMAGES]
    if "patch_embed" in of and unknown:
        raise ValueError(f"tokens of patch_embed must be among {', '.join(map(str, IMAGES))}, got {unknown[0]}")
    for n, dtype, batch, mode, name in itertools.product(tokens, dtypes, batches, modes, of):
        shapes: list[dict[str, Any]] = [{"tokens": n, "width": width} for width in widths]
        if name == "attention":
            shapes = [{"tokens": n, "heads": count, "head_dim": dim} for dim, count in heads.items()]
        elif name == "linear":
            shapes = [shape | {"kind": kind} for shape in shapes for kind in LINEARS]
        elif name == "patch_embed":
            size, patch = IMAGES[n]
            sizes = [{"size": size, "patch": patch, "width": width} for width in widths]
            shapes = [shape | {"images": pixels} for shape in sizes for pixels in ("float", "uint8")]
        for shape in shapes:
            yield partial(FACTORIES[name], **shape, batch=batch, mode=mode, dtype=dtype, device=device)


# one small shape of each op, and of each kind of it, to see whether all runs
tiny = partial(listed, tokens=(17,), widths=(32,), heads={8: 2})
