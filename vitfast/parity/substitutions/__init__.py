"""What models of one architecture differ in: the substitutions that `diagnosis` tries.

Each is said from the side of the model that is changed: 'GELU tanh in place of erf' is what the other one has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from vitfast.parity.substitutions import blocks, heads, images
from vitfast.parity.substitutions.substitution import Change, Substitution
from vitfast.parity.variant import Rounded, Variant

# kind of the first stage that differs -> what may explain it, the likeliest first
TABLE: dict[str, Callable[[Variant], Iterator[Substitution]]] = {
    "patches": images.of_patches,
    "patch_tokens": images.of_patch_tokens,
    "attn": blocks.of_attention,
    "mlp": blocks.of_mlp,
    "tokens": heads.of_tokens,
    "pooled": heads.of_pooled,
    "logits": heads.of_logits,
}
ROUNDINGS = {
    "operands of products rounded to TF32": ("tf32", False), "operands of products rounded to bf16": ("bf16", False),
    "operands of products rounded to fp16": ("fp16", False), "products in bf16": ("bf16", True),
    "products in fp16": ("fp16", True),
}  # fmt: skip


def precision(stage: str) -> list[Substitution]:
    """Products in fewer bits: in all stages, in those of the kind of this one, or in this one alone."""
    kind = stage.rpartition(".")[2]
    scopes: dict[str, Callable[[str], bool]] = {"": lambda _: True}
    if kind != stage:
        scopes[f" in blocks.*.{kind}"] = lambda name: name.startswith("blocks.") and name.endswith(kind)
    scopes[f" in {stage} only"] = lambda name: name == stage
    return [
        Substitution("precision", what, _rounding(*how, within), scope=scope)
        for scope, within in scopes.items()
        for what, how in ROUNDINGS.items()
    ]


def _rounding(to: str, results: bool, within: Callable[[str], bool]) -> Change:
    def wrapper(name: str, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        if not within(name):
            return run

        def rounded(x: Tensor) -> Tensor:
            with Rounded(to, results):
                return run(x)

        return rounded

    return lambda variant, _: variant.wrapped(wrapper)
