"""What comes after the blocks, and may be done otherwise: norm, pooling, classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from vitfast.config import ViTConfig
from vitfast.parity.substitutions.substitution import (
    Blocks,
    Substitution,
    eps,
    eps_of_norms,
    no_bias,
    on_model,
    removed,
)
from vitfast.parity.variant import Variant


def of_tokens(variant: Variant) -> Iterator[Substitution]:
    yield from eps(variant)
    yield from eps_of_norms(variant, "norm")
    yield from final_norm(variant)


def of_pooled(variant: Variant) -> Iterator[Substitution]:
    yield from pooling(variant)
    yield from eps(variant)
    yield from eps_of_norms(variant, "fc_norm", "attn_pool.norm")
    yield from final_norm(variant)


def final_norm(variant: Variant) -> Iterator[Substitution]:
    """Where it is, and whether it is there."""

    def after(model: Any) -> Any:
        if isinstance(model.norm, nn.Identity):
            return False
        model.norm, model.fc_norm = nn.Identity(), model.norm
        return None

    def before(model: Any) -> Any:
        if isinstance(model.fc_norm, nn.Identity) or not isinstance(model.norm, nn.Identity):
            return False
        model.norm, model.fc_norm = model.fc_norm, nn.Identity()
        return None

    yield Substitution("norm and pooling", "the final norm after pooling", on_model(after))
    yield Substitution("norm and pooling", "the final norm before pooling", on_model(before))
    yield Substitution("norm", "without the final norm", on_model(lambda model: removed(model, "norm")))


def pooling(variant: Variant) -> Iterator[Substitution]:
    config = variant.model.config
    names = {
        ("token", False): "the class token", ("mean", False): "the mean of the patches",
        ("mean", True): "the mean of all tokens",
    }  # fmt: skip
    for (pool, prefix), told in names.items():
        if (pool, prefix) == (config.pool, config.pool == "mean" and config.pool_prefix) or config.pool == "map":
            continue
        if (pool == "token" and not config.class_token) or (prefix and not config.num_prefix_tokens):
            continue
        yield Substitution("pooling", f"pooling by {told}", on_model(lambda m, p=pool, q=prefix: _pool(m, p, q)))
    if not isinstance(variant.model.fc_norm, nn.Identity):
        yield Substitution("norm", "without the norm after pooling", on_model(lambda model: removed(model, "fc_norm")))


def _pool(model: Any, pool: str, prefix: bool) -> None:
    config: ViTConfig = model.config
    model.config = config.replace(pool=pool, pool_prefix=prefix, distillation_token=False)


def of_logits(variant: Variant) -> Iterator[Substitution]:
    yield Substitution("bias", "without the bias of the classifier", on_model(lambda model: no_bias(model.head)))
    for row, name in ((0, "head"), (1, "head_dist")) if variant.model.config.distillation_token else ():

        def alone(variant: Variant, _: Blocks, row: int = row, name: str = name) -> Variant:
            def wrapper(stage: str, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
                return (lambda x: getattr(variant.model, name)(x[:, row])) if stage == "logits" else run

            return variant.wrapped(wrapper)

        yield Substitution("distillation", f"{name} alone, not the mean of two classifiers", alone)
