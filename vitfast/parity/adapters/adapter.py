"""What the adapters share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vitfast.parity.chain import Stage
from vitfast.patching.engine import attention_branch, mlp_branch, runs_stock

# (model, images) -> its stages for images of this size
Adapter = Callable[[Any, Tensor], tuple[Stage, ...]]
Step = tuple[str, Callable[[Tensor], Tensor]]


class UnknownPart(Exception):
    """A part of a model that its adapter does not know; the message says which."""


def class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def expect(module: Any, *names: str) -> Any:
    """`module`, where its class has one of these names and nobody watches it, for its forward is not going to run.

    Raises:
        UnknownPart: another class, hooks, or a forward of its own.
    """
    if type(module).__name__ not in names:
        raise UnknownPart(f"has {class_name(module)} where {' or '.join(names)} was expected")
    if module._forward_hooks or module._forward_pre_hooks:
        raise UnknownPart(f"has hooks on a {type(module).__name__}")
    if "forward" in vars(module) and "_vitfast" not in vars(module):
        raise UnknownPart(f"has a forward of its own on a {type(module).__name__}")
    return module


def halves(
    i: int,
    block: Any,
    attn: Callable[[Tensor], Tensor],
    mlp: Callable[[Tensor], Tensor],
    call: Callable[[Any, Tensor], Tensor],
    holder: Any = None,
) -> list[Step]:
    """The two stages of a block, each with its residual; by ops where `vitfast.patch` has put them.

    Args:
        attn, mlp: what the block's own forward does.
        call: (attention module, normed tokens) -> what it gives.
        holder: the module that was patched, where it isn't the block.
    """

    def by_ops(branch: Callable, stock: Callable[[Tensor], Tensor], *call: Callable) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            patch = vars(block if holder is None else holder).get("_vitfast")
            return stock(x) if runs_stock(patch, x) else branch(block, patch, x, *call)

        return run

    return [
        (f"blocks.{i}.attn", by_ops(attention_branch, attn, call)),
        (f"blocks.{i}.mlp", by_ops(mlp_branch, mlp)),
    ]
