"""The ops that models call, as stock PyTorch operators: for modules whose `exportable` is True."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vitfast import ops
from vitfast.choose.exportable import stock_operators


def _lowered(op: Callable) -> Callable:
    @functools.wraps(op)
    def lowered(*args: Any, **kwargs: Any) -> Any:
        # around this call alone: a compiler may stop between two calls, and a hook may raise there
        with stock_operators():
            return op(*args, **kwargs)

    return lowered


attention, attention_qkv = _lowered(ops.attention), _lowered(ops.attention_qkv)
layer_norm, linear = _lowered(ops.layer_norm), _lowered(ops.linear)
mlp, patch_embed = _lowered(ops.mlp), _lowered(ops.patch_embed)
