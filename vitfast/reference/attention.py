"""Softmax attention, its lse, and which weights dropout leaves."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.choose.exportable import differentiated_again


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
