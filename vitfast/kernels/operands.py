"""What belongs together in an op's flat schema, as implementations and launchers hand it on: small tuples with names.

The schemas stay flat, since saved programs hold them; an op builds these once, where its call arrives.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# of a class and its fields: where a call arrives, which it costs half of what calling the class does
new = tuple.__new__


class Norm(NamedTuple):
    """`reference.layer_norm` of rows: weight and bias [C] or None; kind 'layer', 'rms', or 'none' for no norm."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    kind: str


class Tail(NamedTuple):
    """What becomes of a branch [B, ..., D]: residual + row_scale * gamma * branch; [D], [B], the branch's shape."""

    gamma: Tensor | None = None
    row_scale: Tensor | None = None
    residual: Tensor | None = None


class Projections(NamedTuple):
    """Of an MLP, w2 act(w1 x + b1) + b2: [F, D], [F], [D, F], [D]; gated: w1 holds gate and value, w2 is [D, F / 2]."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    act: str
    gated: bool


class Saved(NamedTuple):
    """What a forward leaves for its backward, None where that computes it again.

    Attributes:
        mean, rstd: of the normed rows, as `torch.native_layer_norm` gives them; not read by kernels.
        pre: numbers in front of the activation.
        branch: what `Tail` scales, where there is a gamma.
        hidden: numbers behind the activation of an MLP.
    """

    mean: Tensor | None
    rstd: Tensor | None
    pre: Tensor | None = None
    branch: Tensor | None = None
    hidden: Tensor | None = None


class Extras(NamedTuple):
    """What attention has beside q, k, v and scale: int32 [B], a rate, and int64 [1] to draw by."""

    lengths: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None

    @property
    def wanted(self) -> bool:
        return bool(self.dropout_p) or self.lengths is not None


class Starts(NamedTuple):
    """Of packed sequences: int32 [images + 1], where each image begins in q and in k; the most of them in an image."""

    q: Tensor
    k: Tensor
    most_queries: int
    most_keys: int
