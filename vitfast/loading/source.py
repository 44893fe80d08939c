"""Where weights come from: a file, a folder, a state dict, a model in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from vitfast.checkpoints.checkpoint import read_checkpoint, read_config
from vitfast.loading.live import of_live
from vitfast.weights.layouts.layout import Facts


class Source(NamedTuple):
    """Weights, what stands beside them, where they are from, and whether a ViTConfig of theirs is in `facts.fields`."""

    state: dict[str, Tensor]
    facts: Facts
    name: str
    has_config: bool


def source_of(source: Any, *, allow_pickle: bool = False, key: str | None = None) -> Source:
    """Read a source.

    Raises:
        TypeError: none of these.
        FileNotFoundError, ValueError: as `read_checkpoint`.
        NotImplementedError: a model that no ViTConfig describes.
    """
    if isinstance(source, nn.Module):
        return Source(*of_live(source), False)
    if isinstance(source, Mapping):
        return Source(dict(source), Facts(), "state dict", False)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source must be a path, a state dict or a model, got {type(source).__name__}")
    state = read_checkpoint(source, allow_pickle=allow_pickle, key=key)
    config = read_config(source)
    return Source(state, Facts(fields=config.to_dict() if config else {}), os.fspath(source), config is not None)
