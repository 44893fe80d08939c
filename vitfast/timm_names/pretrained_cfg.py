"""What timm says of the default weights under each name: facts of timm 1.0.31, tested against it.

timm's tools read them from `model.pretrained_cfg`: how images are prepared, where the classifier and the first
convolution are, whose weights they are. Where a model has none they take ImageNet's transforms without a word.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# `timm_cfgs.json` has what differs from its default entry; sizes and classes are those of `VARIANTS`
FILE = Path(__file__).parent / "timm_cfgs.json"
# of timm's PretrainedCfg
ENTRIES = {
    "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture", "tag", "custom_load",
    "input_size", "test_input_size", "min_input_size", "fixed_input_size", "interpolation", "crop_pct",
    "test_crop_pct", "crop_mode", "mean", "std", "num_classes", "label_offset", "label_names", "label_descriptions",
    "pool_size", "test_pool_size", "first_conv", "classifier", "license", "description", "origin_url", "paper_name",
    "paper_ids", "notes",
}  # fmt: skip
# of an entry that a caller gives
DEFAULTS: dict[str, Any] = {
    "custom_load": False, "input_size": (3, 224, 224), "fixed_input_size": False, "interpolation": "bicubic",
    "crop_pct": 0.875, "crop_mode": "center", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    "num_classes": 1000, "pool_size": None, "first_conv": None, "classifier": None,
}  # fmt: skip


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def pretrained_cfg(model_name: str, image_size: tuple[int, int], num_classes: int) -> dict[str, Any]:
    """timm's entries for the default weights of this name, a dict of the caller's own.

    Args:
        image_size, num_classes: of the weights: height and width, and classes.
    """
    table = _table()
    size = {"architecture": model_name, "input_size": (3, *image_size), "num_classes": num_classes}
    entries = table["default"] | table["models"][model_name] | size
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()}


def checked(argument: str, entries: Any) -> dict[str, Any]:
    """Entries that a caller gives, a dict or timm's PretrainedCfg, as a dict.

    Raises:
        TypeError: no mapping, or a name that timm's entries do not have.
    """
    if hasattr(entries, "to_dict"):
        entries = entries.to_dict()
    if not isinstance(entries, Mapping):
        raise TypeError(f"create_model: {argument} must be a dict of timm's entries, got {entries!r}")
    unknown = sorted(entries.keys() - ENTRIES)
    if unknown:
        raise TypeError(f"create_model: {argument} has {', '.join(map(repr, unknown))}, which timm's entries have not")
    return dict(entries)
