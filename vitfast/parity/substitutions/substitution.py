"""A change of a model that may be what another one does otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitfast.model.layers import NORMS, eps_of
from vitfast.parity.variant import Variant, set_parameter

EPS = (1e-6, 1e-5, 1e-12)
# where a change is made in blocks: in which of them, None for all and the norms around them
Blocks = Sequence[int] | None
Change = Callable[[Variant, Blocks], Variant | None]


class Substitution(NamedTuple):
    """A change of a model.

    Attributes:
        name: what it is about, such as 'eps'.
        what: how it is changed.
        change: (a copy of a variant, blocks) -> the changed variant; None where there is nothing to change.
        by_block: whether it can be made in some blocks only.
        scope: where it is made, in words; "" for everywhere.
    """

    name: str
    what: str
    change: Change
    by_block: bool = False
    scope: str = ""


def on_model(change: Callable[[Any], Any]) -> Change:
    """Of a change that is made to the modules of a model; one that returns False found nothing to change."""

    def run(variant: Variant, _: Blocks) -> Variant | None:
        return None if change(variant.model) is False else variant

    return run


def on_blocks(change: Callable[[Any], Any]) -> Change:
    """The same to each block."""

    def run(variant: Variant, blocks: Blocks) -> Variant | None:
        chosen = range(len(variant.model.blocks)) if blocks is None else blocks
        done = [change(variant.model.blocks[i]) for i in chosen]
        return None if all(each is False for each in done) else variant

    return run


def eps(variant: Variant) -> Iterator[Substitution]:
    """Of all norms, or of those in some blocks."""
    found = {eps_of(m, m.weight) for m in variant.model.modules() if isinstance(m, NORMS)}
    for value in EPS:
        if found == {value}:
            continue

        def change(variant: Variant, blocks: Blocks, value: float = value) -> Variant:
            model: Any = variant.model
            for holder in [model] if blocks is None else [model.blocks[i] for i in blocks]:
                for module in holder.modules():
                    if isinstance(module, NORMS):
                        module.eps = value
            return variant

        had = ", ".join(f"{each:g}" for each in sorted(found))
        yield Substitution("eps", f"norms with an eps of {value:g} in place of {had}", change, by_block=True)


def eps_of_norms(variant: Variant, *names: str) -> Iterator[Substitution]:
    """Of some norms around the blocks alone; names of those that are not there are passed over."""
    modules = dict(variant.model.named_modules())
    for name in names:
        norm = modules.get(name)
        for value in EPS if isinstance(norm, NORMS) else ():
            had = norm.eps  # type: ignore[union-attr]  # a norm
            if had != value:
                change = on_model(lambda model, n=name, v=value: setattr(model.get_submodule(n), "eps", v))
                yield Substitution("eps", f"{name} with an eps of {value:g} in place of {had:g}", change)


def rewrite_rows(linear: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Weight and bias of a linear layer, each with its rows changed."""
    set_parameter(linear, "weight", change(linear.weight))
    if linear.bias is not None:
        set_parameter(linear, "bias", change(linear.bias))


def no_bias(linear: Any) -> bool:
    """Zero the bias of a layer; False where it has none."""
    if getattr(linear, "bias", None) is None:
        return False
    set_parameter(linear, "bias", torch.zeros_like(linear.bias))
    return True


def removed(holder: Any, name: str) -> bool:
    """Put nothing in the place of a norm; False where nothing is there."""
    if isinstance(getattr(holder, name), nn.Identity):
        return False
    setattr(holder, name, nn.Identity())
    return True
