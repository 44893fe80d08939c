"""What is true: every op in plain PyTorch, differentiable, exact in fp64.

The ops are tested against these functions in fp64, and the exportable mode runs them as they are.
Shapes: B images, N tokens, C or D channels, H heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.switches import differentiated_again, forward_mode


def activation(x: Tensor, name: str) -> Tensor:
    """'gelu' is x * Phi(x) by erf; 'gelu_tanh' and 'quick_gelu' are its two published approximations."""
    if name == "none":
        return x
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if name == "silu":
        return F.silu(x)
    raise ValueError(f"activation must be 'none', 'gelu', 'gelu_tanh', 'quick_gelu' or 'silu', got {name!r}")


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str = "layer",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """(x - mean) * rstd * weight + bias over the last dim, or x * rstd * weight for kind 'rms'."""
    shape = [int(x.shape[-1])]  # a number also where a tracer makes a tensor of it
    dtype = x.dtype if out_dtype is None else out_dtype
    if weight is not None and weight.dtype != x.dtype:
        # float32 parameters beside a half-precision input: torch takes that on CPUs only
        x = x.to(weight.dtype)
    if kind == "rms":
        y = F.rms_norm(x, shape, weight, eps)
    elif forward_mode():
        y = _layer_norm_by_hand(x, weight, bias, eps)
    else:
        y = F.layer_norm(x, shape, weight, bias, eps)
    return y.to(dtype)


def _layer_norm_by_hand(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    # the gradient of F.layer_norm's tangent takes mean and rstd for constants (torch 2.11 and 2.14)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    y = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def scale_branch(branch: Tensor, gamma: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """LayerScale per channel (gamma [C]) and stochastic depth per image (row_scale [B])."""
    if gamma is not None:
        branch = branch * gamma
    if row_scale is not None:
        branch = branch * row_scale.view(-1, *[1] * (branch.dim() - 1))
    return branch


def add_layer_norm(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str = "layer",
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The new residual, `residual + row_scale * gamma * branch`, and its norm."""
    total = residual + scale_branch(branch, gamma, row_scale)
    return total, layer_norm(total, weight, bias, eps, kind, out_dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm: str = "none",
    act: str = "none",
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + row_scale * gamma * act(norm(x) @ weight.T + bias); each part is optional."""
    h = x if norm == "none" else layer_norm(x, norm_weight, norm_bias, norm_eps, norm, weight.dtype)
    y = scale_branch(activation(F.linear(h, weight, bias), act), gamma, row_scale)
    return y if residual is None else residual + y


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(scale * q k^T + mask) v. q [B, Nq, H, D], k and v [B, Nk, H, D] -> [B, Nq, H * D].

    A bool mask is True where a key takes part, a float mask is added to the logits (as in
    `F.scaled_dot_product_attention`); a query with every key masked gives zeros there, and here.
    """
    if differentiated_again(q, k, v):
        # of that operator's gradient there is no derivative, and no forward-mode rule
        drop = lambda weights: F.dropout(weights, dropout_p)  # noqa: E731
        return attention_visibly(q, k, v, scale, mask, drop)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return out.transpose(1, 2).flatten(2)


def attention_visibly(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, on_weights: Callable[[Tensor], Tensor],
    softmax: Callable[[Tensor], Tensor] = lambda logits: logits.softmax(dim=-1),
) -> Tensor:  # fmt: skip
    """`attention` with the weights [B, H, Nq, Nk] of `softmax` passed through `on_weights` before they meet v."""
    logits = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    if mask is None:
        weights = softmax(logits)
    else:
        # no key at all: zeros, as `attention` gives; the softmax must not see such a row, whose gradient is NaN
        empty = (logits == float("-inf")).all(-1, keepdim=True)
        weights = softmax(logits.masked_fill(empty, 0.0)).masked_fill(empty, 0.0)
    weights = on_weights(weights)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v).flatten(2)


def attention_lse(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """log(sum(exp(scale * q k^T))) over the keys, [B, H, Nq]."""
    return torch.logsumexp(scale * torch.einsum("bqhd,bkhd->bhqk", q, k), dim=-1)


def attention_kept(seed: Tensor, shape: tuple[int, int, int, int], rate: float, image: int = 0) -> Tensor:
    """Which attention weights [B, H, Nq, Nk] dropout leaves, as the kernels draw it: bool of `shape`.

    The first word of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) at the counter
    (query, key, image * H + head, 0), images counted from `image` on, with the int64 `seed` as key; a weight stays
    where its upper 31 bits are at least rate * 2**31.
    """
    B, H, Nq, Nk = shape
    word = 0xFFFFFFFF
    count = lambda n: torch.arange(n, dtype=torch.int64, device=seed.device)  # noqa: E731
    c0 = count(Nq)[:, None].expand(B * H, Nq, Nk)
    c1, c2, c3 = count(Nk), image * H + count(B * H)[:, None, None], torch.zeros_like(c0)
    key0, key1 = seed.reshape(()) & word, (seed.reshape(()) >> 32) & word
    for _ in range(10):
        # products of 64 bits wrap around as they must
        high, low = 0xCD9E8D57 * c2, 0xD2511F53 * c0
        c0, c2 = (high >> 32 & word) ^ c1 ^ key0, (low >> 32 & word) ^ c3 ^ key1
        c1, c3 = high & word, low & word
        key0, key1 = (key0 + 0x9E3779B9) & word, (key1 + 0xBB67AE85) & word
    return (c0 >> 1 >= round(rate * 2**31)).view(shape)


def mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    norm: str,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: str = "gelu",
    gated: bool = False,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """x + row_scale * gamma * (act(norm(x) @ w1.T + b1) @ w2.T + b2).

    Gated: w1 holds gate and value, gate first; the hidden activation is act(gate) * value.
    """
    h = F.linear(layer_norm(x, norm_weight, norm_bias, norm_eps, norm, w1.dtype), w1, b1)
    if gated:
        gate, value = h.chunk(2, dim=-1)
        h = activation(gate, act) * value
    else:
        h = activation(h, act)
    return x + scale_branch(F.linear(h, w2, b2), gamma, row_scale)


def patch_rows(images: Tensor, patch: tuple[int, int], order: str = "chw") -> Tensor:
    """Images [B, C, H, W] -> patch rows [B, N, C * ph * pw], row-major over the grid, in the given pixel order."""
    B, C, H, W = images.shape
    ph, pw = patch
    x = images.reshape(B, C, H // ph, ph, W // pw, pw)
    x = x.permute(0, 2, 4, 1, 3, 5) if order == "chw" else x.permute(0, 2, 4, 3, 5, 1)
    return x.reshape(B, (H // ph) * (W // pw), C * ph * pw)


def normalise(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images -> (images / 255 - mean) / std per channel."""
    x = images.to(dtype) / 255
    return (x - mean.to(dtype).view(-1, 1, 1)) / std.to(dtype).view(-1, 1, 1)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Images [B, C, H, W] -> tokens [B, P + N, D]: cut, project, add positions, put the prefix tokens first.

    weight [D, C, ph, pw]; prefix [P, D]; pos_embed [P + N, D] adds to all tokens, [N, D] to the patches only.
    uint8 images are divided by 255 and normalised with mean and std [C].
    """
    if images.dtype == torch.uint8:
        if mean is None or std is None:
            raise ValueError("patch_embed: uint8 images need mean and std, got None")
        images = normalise(images, mean, std, weight.dtype)
    D, _, ph, pw = weight.shape
    x = F.linear(patch_rows(images, (ph, pw)), weight.reshape(D, -1), bias)
    return with_prefix(x, pos_embed, prefix)


def with_prefix(x: Tensor, pos_embed: Tensor | None, prefix: Tensor | None) -> Tensor:
    """Patch tokens [B, N, D] -> [B, P + N, D] with the prefix in front and positions added.

    Positions are added to the patches, and to the prefix too where there is a position for it.
    """
    tokens = x
    if pos_embed is not None and pos_embed.shape[0] == x.shape[1]:
        tokens, pos_embed = x + pos_embed, None
    if prefix is not None:
        tokens = torch.cat([prefix.expand(x.shape[0], -1, -1), tokens], dim=1)
    return tokens if pos_embed is None else tokens + pos_embed
