"""What stands beside weights: the config files of transformers and timm."""

from __future__ import annotations

import os
from pathlib import Path

from vitfast.checkpoints.files import read_json
from vitfast.weights.layouts.layout import Facts

# of transformers and of timm's hub; of OpenCLIP's hub nothing is taken
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"


def facts_of(path: str | os.PathLike[str]) -> Facts:
    """What the config files in a folder, or in that of a file, say; empty where there are none.

    timm's config has an 'architecture'. transformers' TimmWrapper keeps timm's entries among its own, so that both
    `timm` and `hf` have them.

    Raises:
        ValueError: one of them is no JSON object, or longer than such files are.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    processor = read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
    of_timm = isinstance(config.get("architecture"), str)
    of_transformers = "model_type" in config or "transformers_version" in config or "architectures" in config
    return Facts(
        hf=config if of_transformers else {}, timm=config if of_timm else {}, processor=processor
    )  # fmt: skip
