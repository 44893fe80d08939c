"""Gradients as a graph of stock operators: what a backward returns where its result is differentiated once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vitfast.choose.exportable import forward_mode


def wanted(*grads: Tensor | None) -> bool:
    """Whether a backward that is given `grads` must return a graph (`create_graph=True`), tangents, or a batch of
    gradients (`is_grads_batched=True`): its own op has no rules for these, stock operators have.
    """
    return torch.is_grad_enabled() or forward_mode() or any(g is not None and _batched(g) for g in grads)


def _batched(t: Tensor) -> bool:
    # private to torch: there is no public way (torch 2.14)
    return torch._C._functorch.is_legacy_batchedtensor(t) or torch._C._functorch.is_functorch_wrapped_tensor(t)


def grads(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of `formula(*inputs)` where they are needed, themselves functions of the inputs and of `grad`.

    Args:
        formula: differentiable stock operators.
        inputs: as the op had them.
        needed: for each input.
        grad: of the result.
    """
    if not any(needed):
        return [None] * len(inputs)
    create_graph = torch.is_grad_enabled()
    # the inputs have been cast already, and autocast would round the fp32 logits of attention
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        # Of aliases: one input may be computed from another, whose gradient would then hold that path a second time.
        aliases = [t.view_as(t) if need else t for t, need in zip(inputs, needed, strict=True)]
        leaves = [t for t, need in zip(aliases, needed, strict=True) if need]
        out = formula(*aliases)
        found = iter(torch.autograd.grad(out, leaves, grad, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needed]
