"""FLOPs and fewest bytes of every op and of whole models.

A multiply-add is 2 FLOPs, and only matrix products count: norms, softmax and activations are a few percent of an op's
arithmetic and run beside it. Bytes are what has to cross the memory bus if an op is one kernel: each tensor that it is
given read once, each that it returns written once. Shapes: B images, N tokens, H heads, D width of a head.

Sources of the factors, with the forward as 1:

- a linear layer's backward has two products of the forward's size (gradients of input and weight): 3 in all, 2 for
  patches of images, which need no gradient.
- attention's backward has four of the forward's two products' size, and computes q k^T again because nobody keeps
  N x N probabilities: 7 products for 2, so 3.5 in all (Dao et al., FlashAttention, arXiv 2205.14135, section 3.1).

A dtype is 'fp32', 'fp16', 'bf16', 'fp8' or 'uint8'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from vitfast.check.case import Work
from vitfast.config import ViTConfig
from vitfast.model.vit import ViT

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "uint8": 1}
STATISTIC = 4  # bytes of a logsumexp, mean or reciprocal deviation, always fp32


@dataclass(frozen=True)
class Part:
    """One kernel of a model's forward (or forward and backward).

    Attributes:
        dtype: of its matrix products.
        count: how often it runs; work: that of once.
    """

    name: str
    dtype: str
    count: int
    work: Work


def attention(
    B: int, N: int, H: int, D: int, dtype: str, *, Nk: int | None = None, backward: bool = False,
    out_dtype: str | None = None,
) -> Work:  # fmt: skip
    """softmax(q k^T) v; q [B, N, H, D], k and v [B, Nk, H, D], in tensors of their own or packed in one.

    The backward reads q, k, v, the output, its gradient and the logsumexp, and writes three gradients.
    """
    Nk = N if Nk is None else Nk
    queries, keys, size = B * N * H * D, B * Nk * H * D, BYTES[dtype]
    out = queries * BYTES[out_dtype or dtype]
    read = (queries + 2 * keys) * size
    flops = 4 * B * H * N * Nk * D
    if not backward:
        return Work(flops, read + out)
    return Work(7 * flops // 2, (read + out) + (read + 2 * out + read) + 2 * STATISTIC * B * N * H)


def linear(
    rows: int, K: int, N: int, dtype: str, *, bias: bool = True, norm: bool = False, act: bool = False,
    gated: bool = False, gamma: bool = False, residual: bool = False, backward: bool = False,
    x_dtype: str | None = None, out_dtype: str | None = None,
) -> Work:  # fmt: skip
    """residual + gamma * act(norm(x) W^T + bias); x [rows, K], W [N, K], out [rows, N] or, gated, [rows, N / 2].

    With an activation the forward for a backward also writes what goes into it, and the backward reads that. The
    residual's gradient is the output's and is not written again; gamma's follows from the weight's.

    Args:
        dtype: of the product: the weight, and x where nothing else is said.
        x_dtype: of x in memory, where it is converted on the way in.
        out_dtype: of output and residual, x's by default.
    """
    size, x_size = BYTES[dtype], BYTES[x_dtype or dtype]
    out_size = BYTES[out_dtype or x_dtype or dtype]
    columns = N // 2 if gated else N
    weights = (N * K + N * bias + 2 * K * norm + columns * gamma) * size
    x, out, flops = rows * K * x_size, rows * columns * out_size, 2 * rows * K * N
    forward = x + weights + out * (1 + residual)
    if not backward:
        return Work(flops, forward)
    kept = rows * N * out_size * (act or gated) + 2 * STATISTIC * rows * norm
    return Work(3 * flops, forward + kept + (out + x + kept + weights) + (weights + x))


def layer_norm(rows: int, C: int, dtype: str, *, backward: bool = False) -> Work:
    """norm(x) with weight and bias; x [rows, C]. The backward reads x, its statistics and the gradient."""
    x, weights = rows * C * BYTES[dtype], 2 * C * BYTES[dtype]
    if not backward:
        return Work(0, 2 * x + weights)
    return Work(0, 2 * (2 * x + weights) + (x + weights) + 4 * STATISTIC * rows)


def add_layer_norm(rows: int, C: int, dtype: str, *, backward: bool = False, residual_dtype: str | None = None) -> Work:
    """total = residual + branch and norm(total), both returned; [rows, C] each.

    The backward reads the gradients of both results and the total, and writes one gradient, which is residual's and
    branch's alike.
    """
    branch, total = rows * C * BYTES[dtype], rows * C * BYTES[residual_dtype or dtype]
    weights = 2 * C * BYTES[dtype]
    forward = branch + total + total + branch + weights
    if not backward:
        return Work(0, forward)
    return Work(0, forward + (branch + 2 * total + weights) + (weights + total) + 4 * STATISTIC * rows)


def mlp(rows: int, C: int, hidden: int, dtype: str, *, backward: bool = False) -> Work:
    """x + fc2(act(fc1(norm(x)))) as one kernel, so that the hidden rows stay inside; x [rows, C].

    For a backward fc1's output is written and read once, which saves its product.
    """
    size = BYTES[dtype]
    x, weights = rows * C * size, (2 * hidden * C + hidden + 3 * C) * size
    flops = 4 * rows * C * hidden
    if not backward:
        return Work(flops, 2 * x + weights)
    kept = rows * hidden * size + 2 * STATISTIC * rows
    return Work(3 * flops, 2 * (2 * x + weights + kept) + (x + weights))


def mlp_widths(mlp_dim: int, kind: str = "mlp") -> tuple[int, int]:
    """Output width of the MLP's first projection(s) and input width of the last."""
    if kind == "mlp":
        return mlp_dim, mlp_dim
    return (mlp_dim, mlp_dim // 2) if kind == "swiglu_packed" else (2 * mlp_dim, mlp_dim)


def patch_embed(
    B: int, image_size: tuple[int, int], patch_size: tuple[int, int], channels: int, C: int, dtype: str, *,
    image_dtype: str | None = None, prefix: int = 0, positions: bool = True, bias: bool = True,
    backward: bool = False, patch_grad: bool = False,
) -> Work:  # fmt: skip
    """Images [B, channels, height, width] -> tokens [B, prefix + N, C], with positions and prefix tokens added.

    Args:
        image_dtype: of the images where it is another than that of weights and tokens.
        patch_grad: whether the backward goes on through the projection, to the images or to a norm of the patches.
    """
    size, image = BYTES[dtype], channels * patch_size[0] * patch_size[1]
    N = (image_size[0] // patch_size[0]) * (image_size[1] // patch_size[1])
    images = B * channels * image_size[0] * image_size[1] * BYTES[image_dtype or dtype]
    tokens = B * (prefix + N) * C * size
    weights = (image * C + C * bias + (prefix + N) * C * positions + prefix * C) * size
    flops = 2 * B * N * image * C
    forward = images + tokens + weights
    if not backward:
        return Work(flops, forward)
    back = tokens + images + weights + (weights + images) * patch_grad
    return Work(flops * (3 if patch_grad else 2), forward + back)


def parts(
    config: ViTConfig, batch: int, dtype: str, *, training: bool = False, class_token_only_last_block: bool = False,
    image_dtype: str | None = None, linear_dtype: str | None = None, fused: bool = True,
) -> list[Part]:  # fmt: skip
    """The kernels of a model in the order an image travels, norms, activations and residuals inside the products.

    Args:
        dtype: of the residual stream, attention, patch embedding and head.
        class_token_only_last_block: leave out what only other tokens' results need.
        linear_dtype: of the products of the blocks where it is another: then they take their inputs so from memory,
            but for the residual stream, and whoever writes such an input writes it so.
        fused: False has activations, and residuals with the norms after them, as kernels of their own.

    Raises:
        ValueError: an unknown dtype; `class_token_only_last_block` for a model that pools otherwise.
    """
    if class_token_only_last_block and config.pool != "token":
        raise ValueError(f"work: class_token_only_last_block needs pool='token', got {config.pool!r}")
    B, C, depth, prefix = batch, config.dim, config.depth, config.num_prefix_tokens
    N = prefix + config.num_patches
    embed = patch_embed(
        B, config.image_size, config.patch_size, config.channels, C, dtype, image_dtype=image_dtype, prefix=prefix,
        positions=config.pos_embed != "none", bias=not config.pre_norm, backward=training, patch_grad=config.input_norm,
    )  # fmt: skip
    options = dict(training=training, linear_dtype=linear_dtype, fused=fused)
    found = [Part("patch_embed", dtype, 1, embed)]
    if class_token_only_last_block and depth:
        found += _block(config, B, N, N, dtype, count=depth - 1, **options)
        last = _block(config, B, N, 1 + config.distillation_token, dtype, count=1, **options)
        found += [replace(part, name=f"last {part.name}") for part in last]
    else:
        found += _block(config, B, N, N, dtype, count=depth, **options)
    found += _head(config, B, N, dtype, training)
    return [part for part in found if part.count]


def _block(config, B, N, keep, dtype, *, count, training, linear_dtype, fused):
    """Blocks that compute `keep` of their N tokens."""
    C, H, D = config.dim, config.heads, config.head_dim
    first, second = mlp_widths(config.mlp_dim, config.mlp)
    gated, inner, rows = config.mlp != "mlp", H * D, B * keep
    inside = linear_dtype or dtype
    common = dict(backward=training, bias=config.proj_bias)
    tail = common | dict(gamma=config.layer_scale is not None, residual=fused, out_dtype=dtype)
    head = dict(norm=fused, x_dtype=dtype if fused else inside, backward=training)

    def part(name, work):
        return Part(name, inside, count, work)

    def project(name, tokens, width):
        done = linear(B * tokens, C, width, inside, bias=config.qkv_bias, out_dtype=dtype, **head)
        return part(name, done)

    softmax = attention(B, keep, H, D, dtype, Nk=N, backward=training, out_dtype=inside)
    found = [
        *([project("qkv", N, 3 * inner)] if keep == N else [project("kv", N, 2 * inner), project("q", keep, inner)]),
        Part("attention", dtype, count, softmax),
    ]
    if config.out_proj:
        found.append(part("proj", linear(rows, inner, C, inside, **tail)))
    found += [
        part("fc1", linear(rows, C, first, inside, bias=config.proj_bias, act=fused, gated=gated and fused,
                           out_dtype=inside, **head)),
        part("fc2", linear(rows, second, C, inside, **tail)),
    ]  # fmt: skip
    if not fused:
        # the first norm has no branch before it, and the last sum no norm after
        sums = add_layer_norm(rows, C, inside, residual_dtype=dtype, backward=training)
        found += [
            Part("add + norm", dtype, 2 * count, sums),
            part("activation", _activation(rows, first, second, inside, training)),
        ]
    return found


def _activation(rows, width, out_width, dtype, backward):
    x, out = rows * width * BYTES[dtype], rows * out_width * BYTES[dtype]
    return Work(0, x + out + (x + out + x) * backward)


def _head(config, B, N, dtype, training):
    """Attention pooling and classifiers."""
    C, found, pooled = config.dim, [], 1
    if config.pool == "none":
        pooled = N
    if config.pool == "map":
        keys, D = N if config.pool_prefix else config.num_patches, C // config.heads
        pool = attention(B, 1, config.heads, D, dtype, Nk=keys, backward=training)
        # the query is the same for all images
        found = [
            Part("pool q", dtype, 1, linear(1, C, C, dtype, backward=training)),
            Part("pool kv", dtype, 1, linear(B * keys, C, 2 * C, dtype, backward=training)),
            Part("pool attention", dtype, 1, pool),
            Part("pool proj", dtype, 1, linear(B, C, C, dtype, backward=training)),
            Part("pool mlp", dtype, 1, mlp(B, C, config.mlp_dim, dtype, backward=training)),
        ]
    if config.num_classes:
        classifier = linear(B * pooled, C, config.num_classes, dtype, backward=training)
        found.append(Part("head", dtype, 1 + config.distillation_token, classifier))
    return found


@lru_cache
def parameters(config: ViTConfig) -> int:
    """How many parameters the model has."""
    with torch.device("meta"):
        return sum(p.numel() for p in ViT.from_config(config).parameters())


def model(
    config: ViTConfig, batch: int, dtype: str, training: bool = False, class_token_only_last_block: bool = False, *,
    image_dtype: str | None = None, weight_dtype: str | None = None,
) -> Work:  # fmt: skip
    """A whole model's forward, or its forward and backward (no loss, no optimizer).

    FLOPs are those of its parts. Bytes are as if nothing else than inputs, results and weights left the chip: images
    and weights read once, results written. A backward reads images and weights again and writes the gradients; what it
    needs and can't get back without a matrix product is written once and read once: each block's two residuals,
    queries, keys, values, attention's output with its logsumexp, and the MLP's first projection.

    Args:
        batch: images.
        image_dtype, weight_dtype: where they are not `dtype`; under autocast weights are 'fp32'.

    Raises:
        ValueError: as `parts`.
    """
    found = parts(
        config, batch, dtype, training=training, class_token_only_last_block=class_token_only_last_block,
        image_dtype=image_dtype,
    )  # fmt: skip
    flops = sum(part.count * part.work.flops for part in found)
    N, C = config.num_patches + config.num_prefix_tokens, config.dim
    images = batch * config.channels * config.image_size[0] * config.image_size[1] * BYTES[image_dtype or dtype]
    weights = parameters(config) * BYTES[weight_dtype or dtype]
    results = (config.num_classes or C) * (1 + config.distillation_token) * (N if config.pool == "none" else 1)
    forward = images + weights + batch * results * BYTES[dtype]
    if not training:
        return Work(flops, forward)
    keep = 1 + config.distillation_token if class_token_only_last_block else N
    kept = (config.depth - 1) * _kept(config, N, N, dtype) + _kept(config, N, keep, dtype) if config.depth else 0
    return Work(flops, forward + images + 2 * weights + 2 * batch * kept + batch * results * BYTES[dtype])


def _kept(config, N, keep, dtype):
    """Bytes for the backward that a block of one image keeps."""
    inner, width = config.heads * config.head_dim, mlp_widths(config.mlp_dim, config.mlp)[0]
    elements = N * config.dim + 2 * N * inner + keep * (2 * inner + config.dim + width)
    return elements * BYTES[dtype] + STATISTIC * keep * config.heads
