"""What stands beside weights: the config files of transformers, timm and open_clip."""

from __future__ import annotations

import os
from pathlib import Path

from vitfast.checkpoints.files import read_json
from vitfast.weights.layouts.layout import Facts

# of transformers and of timm's hub, and of open_clip's
CONFIG, PROCESSOR, OPEN_CLIP = "config.json", "preprocessor_config.json", "open_clip_config.json"


def facts_of(path: str | os.PathLike[str]) -> Facts:
    """What the config files in a folder, or in that of a file, say; empty where there are none.

    timm's config has an 'architecture'. transformers' TimmWrapper keeps timm's entries among its own, so that both
    `timm` and `hf` have them.

    Raises:
        ValueError: one of them is no JSON object, or longer than such files are.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    config, processor, open_clip = (
        read_json(folder / name) if (folder / name).is_file() else {} for name in (CONFIG, PROCESSOR, OPEN_CLIP)
    )
    of_timm = isinstance(config.get("architecture"), str)
    of_transformers = "model_type" in config or "transformers_version" in config or "architectures" in config
    return Facts(
        hf=config if of_transformers else {}, timm=config if of_timm else {}, processor=processor, open_clip=open_clip
    )  # fmt: skip
