"""How many floating point operations an op is, for `torch.utils.flop_counter.FlopCounterMode`: those of its products.

As torch counts: two for a multiplication and its addition; norms, activations, softmax and additions for nothing; the
backward of attention with the logits computed again. So a model counts what the stock operators of its parts count.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def _rows(x: Shape) -> int:
    return math.prod(x[:-1])


def linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * _rows(x) * math.prod(weight)


def linear_backward(grad: Shape, x: Shape, weight: Shape, *others: Any, **__: Any) -> int:
    need_x, need_weight, _, need_norm_weight, need_norm_bias, _ = others[-1]
    return ((need_x or need_norm_weight or need_norm_bias) + need_weight) * linear(x, weight)


def folded_linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return linear(x, weight)


def added_linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return linear(x, weight)


def prepared_block(
    x: Shape, pieces: Any, qkv_weight: Shape, qkv_sums: Any, qkv_wide_bias: Any, qkv_bias: Any, proj_weight: Shape,
    proj_bias: Any, fc1_weight: Shape, fc1_sums: Any, fc1_wide_bias: Any, fc1_bias: Any, fc2_weight: Shape, *_: Any,
    **__: Any,
) -> int:  # fmt: skip
    B, N, _ = x
    weights = sum(map(math.prod, (qkv_weight, proj_weight, fc1_weight, fc2_weight)))
    return 2 * B * N * weights + _attention(FORWARD, B, 1, N, N, proj_weight[1])


def mlp(x: Shape, norm_weight: Any, norm_bias: Any, eps: float, norm: str, w1: Shape, b1: Any, w2: Shape, *_: Any,
        **__: Any) -> int:  # fmt: skip
    return linear(x, w1) + 2 * _rows(x) * math.prod(w2)


def mlp_backward(
    grad: Shape, x: Shape, norm_weight: Any, norm_bias: Any, mean: Any, rstd: Any, w1: Shape, b1: Any, w2: Shape,
    b2: Any, pre: Any, branch: Any, hidden: Any, *others: Any, **__: Any,
) -> int:  # fmt: skip
    *of_input, need_w1, need_b1, need_w2, _, _ = others[-1]
    first, second = linear(x, w1), 2 * _rows(x) * math.prod(w2)
    need_pre = any(of_input) or need_w1 or need_b1
    again = pre is None and (need_pre or (need_w2 and hidden is None))
    return (any(of_input) + need_w1 + again) * first + (need_pre + need_w2) * second


def _attention(products: int, images: int, heads: int, queries: int, keys: int, head_dim: int) -> int:
    return 2 * products * images * heads * queries * keys * head_dim


FORWARD, BACKWARD = 2, 5


def attention(q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    B, Nq, H, D = q
    return _attention(FORWARD, B, H, Nq, k[1], D)


def attention_backward(grad: Shape, q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    return BACKWARD * attention(q, k) // FORWARD


def attention_qkv(qkv: Shape, *_: Any, **__: Any) -> int:
    B, N, _, H, D = qkv
    return _attention(FORWARD, B, H, N, N, D)


def attention_qkv_backward(grad: Shape, qkv: Shape, *_: Any, **__: Any) -> int:
    return BACKWARD * attention_qkv(qkv) // FORWARD


def _lengths(starts: Any, longest: int) -> list[int]:
    # nothing is known of the images of a tensor without numbers: all are counted as the longest, as torch does
    return [int(longest)] * (len(starts) - 1) if starts.device.type == "meta" else starts.diff().tolist()


def attention_varlen(q: Any, k: Any, v: Any, q_starts: Any, k_starts: Any, max_q: int, max_k: int, *_: Any,
                     **__: Any) -> int:  # fmt: skip
    lengths = zip(_lengths(q_starts, max_q), _lengths(k_starts, max_k), strict=True)
    return sum(_attention(FORWARD, 1, q.shape[1], Nq, Nk, q.shape[2]) for Nq, Nk in lengths)


def attention_varlen_backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *others: Any, **__: Any) -> int:
    return BACKWARD * attention_varlen(q, k, v, *others) // FORWARD


def _patches(image: Shape, weight: Shape) -> int:
    return -(-image[-2] // weight[-2]) * -(-image[-1] // weight[-1])


def patch_embed(images: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * images[0] * _patches(images, weight) * math.prod(weight)


def patch_embed_backward(grad: Shape, images: Shape, weight: Shape, *others: Any, **__: Any) -> int:
    need_images, need_weight, *_ = others[-1]
    return (need_images + need_weight) * patch_embed(images, weight)


def patch_embed_packed(images: Sequence[Shape], weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * sum(_patches(image, weight) for image in images) * math.prod(weight)


def patch_embed_packed_backward(grad: Shape, images: Sequence[Shape], weight: Shape, *others: Any, **__: Any) -> int:
    need_weight, *_ = others[-1]
    return need_weight * patch_embed_packed(images, weight)


FORMULAS: tuple[Callable[..., int], ...] = (
    linear, linear_backward, folded_linear, added_linear, prepared_block, mlp, mlp_backward, attention,
    attention_backward, attention_qkv, attention_qkv_backward, patch_embed, patch_embed_backward, patch_embed_packed,
    patch_embed_packed_backward,
)  # fmt: skip
# these read where images begin, the others shapes only
OF_TENSORS = attention_varlen, attention_varlen_backward


def register(counter: ModuleType) -> None:
    """Tell `torch.utils.flop_counter` of all ops."""
    for formula in (*FORMULAS, *OF_TENSORS):
        op = getattr(torch.ops.vitfast, formula.__name__)
        counter.register_flop_formula(op, get_raw=formula in OF_TENSORS)(formula)


class _WhenImported:
    """Calls `register` when somebody imports the counter: that imports triton, which vitfast's import must not."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != COUNTER:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((each for each in found if each is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = exec_module
        return spec


def register_when_imported() -> None:
    """`register` now or as soon as the counter is there."""
    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    # stays: being asked for is not being imported, and a module can be loaded again
    sys.meta_path.insert(0, _WhenImported())
