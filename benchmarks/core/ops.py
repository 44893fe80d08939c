"""The ops of a ViT against everybody's way to compute them. Each factory makes a `Case` from plain values.

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
from benchmarks.core.case import dtype_of, one_of, positive, recorded
from benchmarks.core.compilers import autotuned, compiled
from benchmarks.core.op_case import MODES, Way, op_case
from vitfast.check.calls import Call, contiguous
from vitfast.check.case import Case, Function, Tensors
from vitfast.check.families import as_tuple

# of every norm
EPS = 1e-6
# tokens of an image with one class token: its size and patch
IMAGES = {197: (224, 16), 257: (224, 14), 577: (384, 16), 1025: (512, 16), 1370: (518, 14)}
# head dim: heads of a ViT that has it
HEADS = {64: 12, 72: 16, 80: 16}
WIDTHS = (768, 384, 1024, 192, 1280)
# K and outputs in widths, norm, activation, residual
LINEARS = {
    "qkv": (1, 3, "none", "none", False),
    "proj": (1, 1, "none", "none", True),
    "fc1": (1, 4, "none", "gelu", False),
    "fc2": (4, 1, "none", "none", True),
    "norm qkv": (1, 3, "layer", "none", False),
    "norm fc1": (1, 4, "layer", "gelu", False),
}
# as a block has them
PROJECTIONS = ("norm qkv", "proj", "norm fc1", "fc2")


@recorded
def attention(
    *, batch: int, tokens: int, heads: int, head_dim: int, mode: str = "forward", dtype: str = "bf16",
    device: str = "cpu",
) -> Case:  # fmt: skip
    """softmax(q k^T / sqrt(D)) v of the packed projection [B, N, 3, H, D].

    Results are [B, N, H, D]: the output, then with a backward the gradients of q, k and v.
    """
    positive(batch=batch, tokens=tokens, heads=heads, head_dim=head_dim)
    half, cuda = dtype != "fp32", torch.device(device).type == "cuda"
    qkv = contiguous(batch, tokens, 3, heads, head_dim, dtype=dtype_of(dtype))

    def packed(out: Tensor, *grads: Tensor) -> Tensors:
        return out.view(-1, tokens, heads, head_dim), *(t for grad in grads for t in grad.unbind(2))

    def apart(*found: Tensor) -> Tensors:
        return tuple(t.transpose(1, 2) for t in found)

    def as_timm(qkv: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """To rows [B, N, H * D] with the permutes around."""
        out = attend(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        return out.transpose(1, 2).reshape(qkv.shape[0], tokens, -1)

    def from_packed(build: Callable[[], Callable[[Tensor], Tensor]], *needs: str) -> Way:
        def run() -> Function:
            attend = build()
            return lambda qkv, *_: attend(qkv)

        return Way(run, needs, leaves=(0,), finish=packed)

    def sdpa(backend: SDPBackend, takes_fp32: bool, on_cpu: bool = False) -> Callable[..., Tensor]:
        if not (cuda or on_cpu):
            raise NotImplementedError("on a GPU only")
        if not (half or takes_fp32):
            raise NotImplementedError("fp16 and bf16 only")

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return attend

    def from_heads(backend: SDPBackend, *takes: bool) -> Way:
        """Of [B, H, N, D] from the start."""

        def run() -> Function:
            attend = sdpa(backend, *takes)
            return lambda qkv, q, k, v, *_: attend(q, k, v)

        return Way(run, leaves=(1, 2, 3), own_grads=True, finish=apart)

    def flash_attn(version: int) -> Callable[[Tensor], Tensor]:
        if not (cuda and half):
            raise NotImplementedError("fp16 and bf16 on a GPU only")
        attend = packed_flash_attn(version)
        return lambda qkv: attend(qkv).flatten(2)

    return op_case(
        "attention", {"tokens": tokens, "heads": heads, "head_dim": head_dim}, batch, mode, dtype, device,
        Call("attention_qkv", (qkv, head_dim**-0.5)), results=((batch, tokens, heads * head_dim),),
        ways={
            "SDPA packed": from_packed(lambda: partial(as_timm, attend=F.scaled_dot_product_attention)),
            "SDPA flash": from_heads(SDPBackend.FLASH_ATTENTION, not cuda, True),
            "SDPA cuDNN": from_heads(SDPBackend.CUDNN_ATTENTION, False),
            "SDPA efficient": from_heads(SDPBackend.EFFICIENT_ATTENTION, True),
            "SDPA math": from_heads(SDPBackend.MATH, True, True),
            "SDPA packed cuDNN": from_packed(lambda: partial(as_timm, attend=sdpa(SDPBackend.CUDNN_ATTENTION, False))),
            "flash-attn 2": from_packed(lambda: flash_attn(2), "flash_attn"),
            "flash-attn 3": from_packed(lambda: flash_attn(3), "flash_attn_interface"),
            "flash-attn 4": from_packed(lambda: flash_attn(4), "flash_attn"),
        },
        count=partial(work.attention, batch, tokens, heads, head_dim, dtype),
        # of the results: q, k and v
        leaves=(1, 2, 3), layouts_by_image=(True,) * 3,
        layouts=lambda qkv: tuple(t.transpose(1, 2).contiguous() for t in qkv.unbind(2)),
        layouts_of_grads=lambda grad: (grad.view(batch, tokens, heads, -1).transpose(1, 2).contiguous(),),
        left_out="SDPA but for the packed ones: q, k, v and gradients are [B, H, N, D] from the start",
    )  # fmt: skip


def packed_flash_attn(version: int) -> Callable[[Tensor], Tensor]:
    """The package's best function for packed projections, forward without what only a caller asks for."""
    if version == 2:
        from flash_attn import flash_attn_qkvpacked_func as packed

        return packed
    if version == 3:
        from flash_attn_interface import flash_attn_func as attend
    else:
        from flash_attn.cute import flash_attn_func as attend
    # releases differ in whether the logsumexp comes along
    return lambda qkv: as_tuple(attend(*qkv.unbind(2)))[0]


@recorded
def layer_norm(
    *, batch: int, tokens: int, width: int, mode: str = "forward", dtype: str = "bf16", device: str = "cpu"
) -> Case:
    """The norm of [B, N, C] with weight and bias."""
    positive(batch=batch, tokens=tokens, width=width)
    like = partial(contiguous, dtype=dtype_of(dtype))

    def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, EPS)

    return op_case(
        "layer_norm", {"tokens": tokens, "width": width}, batch, mode, dtype, device,
        Call("layer_norm", (like(batch, tokens, width), like(width), like(width), EPS, "layer", None)),
        results=((batch, tokens, width),),
        ways={
            "F.layer_norm": Way(lambda: stock),
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
    like = partial(contiguous, dtype=dtype_of(dtype))
    rows, vector = like(batch, tokens, width), like(width)

    def stock(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
        total = x + branch
        return total, F.layer_norm(total, weight.shape, weight, bias, EPS)

    def liger() -> Function:
        norm = _liger(device)

        def run(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
            total = x + branch
            return total, norm(total, weight, bias)

        return run

    return op_case(
        "add_layer_norm", {"tokens": tokens, "width": width}, batch, mode, dtype, device,
        Call("add_layer_norm", (rows, rows, vector, vector, EPS, "layer", None, None)),
        results=((batch, tokens, width),) * 2,
        ways={
            "add, F.layer_norm": Way(lambda: stock),
            "compiled": Way(lambda: compiled(stock)),
            "add, Liger": Way(liger, ("liger_kernel",)),
        },
        count=partial(work.add_layer_norm, batch * tokens, width, dtype),
    )  # fmt: skip


def _liger(device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Liger's LayerNorm of (x, weight, bias)."""
    if torch.device(device).type != "cuda":
        raise NotImplementedError("on a GPU only")
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, EPS)


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
    like = partial(contiguous, dtype=dtype_of(dtype))
    vector, added = like(K) if normed else None, like(batch, tokens, D) if residual else None

    def stock(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        if normed:
            x = F.layer_norm(x, rest[0].shape, *rest, EPS)
        y = F.linear(x, weight, bias)
        if act == "gelu":
            y = F.gelu(y)
        return rest[0] + y if residual else y

    x, weight = like(batch, tokens, K), like(D, K)
    return op_case(
        f"linear {kind}", {"tokens": tokens, "width": width}, batch, mode, dtype, device,
        Call("linear", (x, weight, like(D), vector, vector, EPS, norm, act, None, None, added, False)),
        results=((batch, tokens, D),),
        ways={
            "F.linear": Way(lambda: stock),
            "product": Way(lambda: lambda x, weight, *rest: F.linear(x, weight), leaves=(0, 1), part=True),
            "compiled": Way(lambda: compiled(stock)),
            "compiled max-autotune": Way(lambda: autotuned(stock, device)),
        },
        count=partial(work.linear, batch * tokens, K, D, dtype, norm=normed, act=act != "none", residual=residual),
    )  # fmt: skip


@recorded
def mlp(
    *, batch: int, tokens: int, width: int, act: str = "gelu", mode: str = "forward", dtype: str = "bf16",
    device: str = "cpu",
) -> Case:  # fmt: skip
    """The MLP half of a block: x + fc2(act(fc1(norm(x)))); `act` is 'gelu' or 'gelu_tanh'."""
    positive(batch=batch, tokens=tokens, width=width)
    approximate = {"gelu": "none", "gelu_tanh": "tanh"}[one_of("act", act, ("gelu", "gelu_tanh"))]
    like, hidden = partial(contiguous, dtype=dtype_of(dtype)), 4 * width
    tensors = (
        like(width),
        like(width),
        EPS,
        "layer",
        like(hidden, width),
        like(hidden),
        like(width, hidden),
        like(width),
    )

    def stock(x: Tensor, nw: Tensor, nb: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = F.gelu(F.linear(F.layer_norm(x, nw.shape, nw, nb, EPS), w1, b1), approximate=approximate)
        return x + F.linear(h, w2, b2)

    def products(x: Tensor, nw: Tensor, nb: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.linear(x, w1), w2)

    return op_case(
        "mlp" if act == "gelu" else f"mlp {act}", {"tokens": tokens, "width": width}, batch, mode, dtype, device,
        Call("mlp", (like(batch, tokens, width), *tensors, act, False, None, None, "")),
        results=((batch, tokens, width),),
        ways={
            "eager": Way(lambda: stock),
            "product": Way(lambda: products, leaves=(0, 3, 5), part=True),
            "compiled": Way(lambda: compiled(stock)),
            "compiled max-autotune": Way(lambda: autotuned(stock, device)),
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
    like = partial(contiguous, dtype=to)
    pixels, rgb = like(batch, 3, size, size), contiguous(3, dtype=torch.float32) if raw else None
    if raw:
        pixels = pixels._replace(dtype=torch.uint8, stride=(3 * size * size, 1, 3 * size, 3))

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

    def last(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, prefix: Tensor, *in_last: Tensor) -> Tensor:
        return to_tokens(*in_last, bias, positions, prefix)

    other = {"conv2d mul and add": Way(lambda: one_pass)}
    layouts = {}
    if not raw:
        other = {"conv2d channels_last": Way(lambda: last, leaves=(6, 2, 3, 4))}
        form = {"memory_format": torch.channels_last}
        layouts = {
            "layouts": lambda x, weight, *_: (x.contiguous(**form), weight.contiguous(**form)),
            "layouts_by_image": (True, False),
            "left_out": "conv2d channels_last: images and weight are channels last from the start",
        }
    given = pixels, like(width, 3, patch, patch), like(width), like(tokens, width), like(1, width), rgb, rgb
    return op_case(
        f"patch_embed {images}", {"size": size, "patch": patch, "width": width}, batch, mode, dtype, device,
        Call("patch_embed", given), results=((batch, tokens, width),), leaves=(1, 2, 3, 4),
        ways={"conv2d": Way(lambda: stock), **other, "compiled": Way(lambda: compiled(stock))},
        count=partial(
            work.patch_embed, batch, (size, size), (patch, patch), 3, width, dtype,
            image_dtype="uint8" if raw else None, prefix=1,
        ),
        **layouts,
    )  # fmt: skip


FACTORIES: dict[str, Callable[..., Case]] = {
    "attention": attention,
    "layer_norm": layer_norm,
    "add_layer_norm": add_layer_norm,
    "linear": linear,
    "mlp": mlp,
    "patch_embed": patch_embed,
}

# which rows a benchmark has by default


def listed(
    of: Sequence[str] = tuple(FACTORIES), *, device: str, dtypes: Sequence[str], batches: Sequence[int],
    modes: Sequence[str] = MODES, tokens: Sequence[int] = tuple(IMAGES), widths: Sequence[int] | None = None,
    heads: Mapping[int, int] = HEADS, kinds: Sequence[str] = PROJECTIONS,
    images: Mapping[int, tuple[int, int]] = IMAGES,
) -> Iterator[Callable[[], Case]]:  # fmt: skip
    """The rows of the ops named, shorter sequences first; each is made when it is called.

    Args:
        widths: of all but attention; by default `WIDTHS`, of sequences longer than 257 the first, since these are only
            more rows to them; of patches of 518 x 518 images also DINOv2's.
        heads: of attention, {head dim: heads}.
        kinds: of `LINEARS`.
        images: of patch_embed, {tokens: (size, patch)}.

    Raises:
        ValueError: patch_embed with a number of tokens that is not in `images`.
    """
    unknown = [n for n in tokens if n not in images]
    if "patch_embed" in of and unknown:
        raise ValueError(f"tokens of patch_embed must be among {', '.join(map(str, images))}, got {unknown[0]}")
    for n, dtype, batch, mode, name in itertools.product(tokens, dtypes, batches, modes, of):
        # DINOv2's large model is the one with such images
        usual = WIDTHS if n <= 257 else (768, 1024) if (name, n) == ("patch_embed", 1370) else WIDTHS[:1]
        shapes: list[dict[str, Any]] = [{"tokens": n, "width": width} for width in widths or usual]
        if name == "attention":
            shapes = [{"tokens": n, "heads": count, "head_dim": dim} for dim, count in heads.items()]
        elif name == "linear":
            shapes = [shape | {"kind": kind} for shape in shapes for kind in kinds]
        elif name == "patch_embed":
            size, patch = images[n]
            sizes = [{"size": size, "patch": patch, "width": shape["width"]} for shape in shapes]
            shapes = [shape | {"images": pixels} for shape in sizes for pixels in ("float", "uint8")]
        for shape in shapes:
            yield partial(FACTORIES[name], **shape, batch=batch, mode=mode, dtype=dtype, device=device)


# one small shape of each op, and of each kind of it, to see whether all runs
tiny = partial(listed, tokens=(17,), widths=(32,), heads={8: 2}, kinds=tuple(LINEARS), images={17: (32, 8)})
