"""Where weights come from: a file, a folder, a name on the hub, a state dict, a model in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from vitfast.checkpoints.checkpoint import read_config
from vitfast.checkpoints.files import FOLDER_FILES, INDEX
from vitfast.checkpoints.hub import hub_file, is_hub_name
from vitfast.checkpoints.reading import read
from vitfast.loading.live import of_live
from vitfast.weights.layouts.layout import Facts
from vitfast.weights.names import rename_keys, without_wrappers

# whose config files are those beside it
CONFIGURED = {*FOLDER_FILES, *(name + INDEX for name in FOLDER_FILES)}


class Source(NamedTuple):
    """Weights and what is known of where they stood.

    Attributes:
        state: by name; emptied by whoever converts them.
        facts: what stands beside them.
        name: the path, or the class of a model.
        has_config: whether `facts.fields` are those of a whole ViTConfig.
        note: which of several sets of weights these are.
    """

    state: dict[str, Tensor]
    facts: Facts
    name: str
    has_config: bool = False
    note: str = ""


def source_of(source: Any, *, allow_pickle: bool = False, key: str | None = None) -> Source:
    """Read a source.

    Raises:
        TypeError: none of these.
        FileNotFoundError, ValueError: as `read_checkpoint`; a name on the hub that is not in the cache, offline.
        NotImplementedError: a model that no ViTConfig describes.
    """
    if isinstance(source, nn.Module):
        return Source(*of_live(source))
    if isinstance(source, Mapping):
        strange = [name for name in source if not isinstance(name, str)]
        if strange:
            raise TypeError(f"source must map names to tensors, got {strange[0]!r}")
        return Source(rename_keys(source, without_wrappers), Facts(), "state dict")
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source must be a path, a state dict or a model, got {type(source).__name__}")
    path = hub_file(str(source)) if is_hub_name(source) else source
    found = read(path, allow_pickle=allow_pickle, key=key)
    passed_over = f", not {', '.join(found.others)} beside them" if found.others else ""
    note = f"those under {found.chosen!r}{passed_over}" if found.chosen else ""
    config = read_config(path)
    if config is not None:
        return Source(found.state, Facts(fields=config.to_dict()), os.fspath(source), True, note)
    facts = found.facts if found.file.name in CONFIGURED or is_hub_name(source) else Facts()
    return Source(found.state, facts, os.fspath(source), False, note)
