"""A model as stages that run one after the other, each from a value that is handed to it.

The names are those of `ViT.intermediates`, with 'patches' before them: tokens of the patches alone, without positions
and prefix tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

IMAGES = "images"


class Stage(NamedTuple):
    """A step of a model.

    Attributes:
        name: 'patches', 'patch_tokens', 'blocks.{i}.attn', 'blocks.{i}.mlp', 'tokens', 'pooled' or 'logits'.
        source: the stage whose value it takes, 'images' for the first.
        run: from the value of `source` to that of this stage.
    """

    name: str
    source: str
    run: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Chain:
    """A model that can be run from any of its stages, or where `stages` is empty one whose values can be read only.

    Attributes:
        whose: the class of the model.
        stages: in the order in which they run.
        read: images -> the values of the stages in a run of the model itself; with stages only of the last one.
        notes: what a reader of the comparison has to know of this model.
    """

    whose: str
    stages: tuple[Stage, ...]
    read: Callable[[Tensor], Mapping[str, Tensor]]
    notes: tuple[str, ...] = ()

    def staged(self, images: Tensor) -> dict[str, Tensor]:
        """The value of each stage, run one after the other."""
        values = {IMAGES: images}
        for stage in self.stages:
            values[stage.name] = stage.run(values[stage.source])
        del values[IMAGES]
        return values

    def values(self, images: Tensor) -> dict[str, Tensor]:
        """The value of each stage; of the last one that of the model's own forward."""
        return self.staged(images) | dict(self.read(images))

    def before(self, name: str) -> list[str]:
        """What the stage `name` is computed of, the nearest first, 'images' last."""
        sources = {stage.name: stage.source for stage in self.stages}
        found = []
        while name != IMAGES:
            name = sources[name]
            found.append(name)
        return found

    def span(self, start: str, stop: str, value: Tensor) -> Tensor:
        """The value of stage `stop` where that of stage `start` is `value`."""
        path = [stop, *self.before(stop)]
        wanted = set(path[: path.index(start)])
        for stage in self.stages:
            if stage.name in wanted:
                value = stage.run(value)
        return value


@dataclass(frozen=True)
class Outside:
    """A model that is no module, or one that cannot be run in another dtype: its values can be read, and that is all.

    Attributes:
        whose: what it is.
        read: images -> values by the name of their stage, 'logits' among them.
        dtype: of the images that it takes.
        pretrained_cfg: how its images are prepared, as timm says it; empty where nobody knows.
    """

    whose: str
    read: Callable[[Tensor], Mapping[str, Tensor]]
    dtype: torch.dtype
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)


def in_turn(*steps: tuple[str, Callable[[Tensor], Tensor]]) -> tuple[Stage, ...]:
    """Stages of which each takes the value of the one before it."""
    sources = [IMAGES, *(name for name, _ in steps)]
    return tuple(Stage(name, source, run) for (name, run), source in zip(steps, sources, strict=False))


@torch.no_grad()
def clone_in(model: nn.Module, dtype: torch.dtype, device: torch.device, rounded: torch.dtype) -> nn.Module:
    """A copy for evaluation whose weights are rounded to `rounded` and kept in `dtype`.

    A weight that is as wanted already is shared with `model`, and each of the others is converted on its own, so that
    there is never a second copy of the model.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or id(tensor) in memo:
                continue
            value = tensor.detach()
            value = value.to(rounded).to(device, dtype) if value.is_floating_point() else value.to(device)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
    return copy.deepcopy(model, memo).eval()
