"""What models of one architecture differ in: the substitutions that `diagnosis` tries.

Each is said from the side of the model that is changed: 'GELU tanh in place of erf' is what the other one has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from vitfast.parity.substitutions import blocks, heads, images
from vitfast.parity.substitutions.substitution import Substitution
from vitfast.parity.variant import Variant

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
ROUNDINGS = {"tf32": "TF32", "bf16": "bf16", "fp16": "fp16"}


def precision() -> list[Substitution]:
    """Products in fewer bits, which any stage may have."""
    return [
        Substitution(
            "precision", f"operands of products rounded to {told}", lambda v, _, to=to: replace(v, rounding=to)
        )
        for to, told in ROUNDINGS.items()
    ]
