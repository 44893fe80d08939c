"""What stands beside weights: the config files of transformers, timm and open_clip."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitfast.checkpoints.files import read_json
from vitfast.weights.layouts.layout import Facts

# of transformers and of timm's hub, and of open_clip's
CONFIG, PROCESSOR, OPEN_CLIP = "config.json", "preprocessor_config.json", "open_clip_config.json"
# larger than any size or count in a model
MOST = 1 << 24


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def is_list(of: Callable[[Any], bool], *lengths: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(of, value)) and (not lengths or len(value) in lengths)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def is_size(value: Any) -> bool:
    return is_count(value) or is_list(is_count, 2)(value)


def is_sides(value: Any) -> bool:
    """As transformers' processors have them: height and width, or the shortest edge."""
    sides = value.values() if isinstance(value, dict) else []
    return is_size(value) or (isinstance(value, dict) and all(side is None or is_count(side) for side in sides))


def is_labels(value: Any) -> bool:
    return isinstance(value, dict) and all(label.isdecimal() and len(label) < 9 for label in value)


COUNT, NUMBER, TEXT, SWITCH = (is_count, "a count"), (is_number, "a number"), (is_text, "text"), (is_switch, "a switch")
SIZE, SIDES, LABELS = (is_size, "a size or two"), (is_sides, "a size or its sides"), (is_labels, "classes and names")
NUMBERS, NAMES = (is_list(is_number), "numbers"), (is_list(is_text), "names")
# what readers of these files ask for, and what it has to be; anything else is passed on as it is
TOWER: dict[str, Any] = {
    "hidden_act": TEXT, "layer_norm_eps": NUMBER, "num_attention_heads": COUNT, "image_size": SIZE,
    "hidden_dropout_prob": NUMBER, "attention_probs_dropout_prob": NUMBER, "attention_dropout": NUMBER,
    "layerscale_value": NUMBER, "id2label": LABELS, "model_type": TEXT,
}  # fmt: skip
PREPARED: dict[str, Any] = {
    "mean": NUMBERS, "std": NUMBERS, "interpolation": TEXT, "crop_pct": NUMBER, "crop_mode": TEXT, "resize_mode": TEXT,
    "input_size": (is_list(is_count, 3), "channels, rows and columns"), "label_names": NAMES,
}  # fmt: skip
TIMM: dict[str, Any] = {
    "architecture": TEXT, "model_args": {}, "global_pool": TEXT, "label_names": NAMES, "pretrained_cfg": PREPARED,
}  # fmt: skip
PROCESSED: dict[str, Any] = {
    "image_mean": NUMBERS, "image_std": NUMBERS, "do_normalize": SWITCH, "resample": COUNT, "size": SIDES,
    "crop_size": SIDES, "do_center_crop": SWITCH,
}  # fmt: skip
VISION: dict[str, Any] = {
    "ls_init_value": NUMBER, "norm_kwargs": {"eps": NUMBER}, "head_width": (lambda v: is_count(v) and v > 0, "a count"),
    "pool_type": TEXT, "final_ln_after_pool": SWITCH, "image_size": SIZE, "act_kwargs": {"approximate": TEXT},
    "timm_model_name": TEXT, "timm_model_kwargs": {}, "timm_pool": TEXT,
}  # fmt: skip
TOWERS: dict[str, Any] = {"model_cfg": {"vision_cfg": VISION, "quick_gelu": SWITCH}, "preprocess_cfg": PREPARED}


def facts_of(path: str | os.PathLike[str]) -> Facts:
    """What the config files in a folder, or in that of a file, say; empty where there are none.

    timm's config has an 'architecture'. transformers' TimmWrapper keeps timm's entries among its own, so that both
    `timm` and `hf` have them. What is null is left out.

    Raises:
        ValueError: one of them is no JSON object, longer than such files are, or an entry that is asked for is of
            another kind.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    config, processor, open_clip = (
        read_json(folder / name) if (folder / name).is_file() else {} for name in (CONFIG, PROCESSOR, OPEN_CLIP)
    )
    of_transformers = "model_type" in config or "transformers_version" in config or "architectures" in config
    return Facts(
        hf=_checked(config, TOWER | {"vision_config": TOWER}, folder / CONFIG) if of_transformers else {},
        timm=_checked(config, TIMM, folder / CONFIG) if "architecture" in config else {},
        processor=_checked(processor, PROCESSED, folder / PROCESSOR),
        open_clip=_checked(open_clip, TOWERS, folder / OPEN_CLIP),
    )


def _checked(entries: Mapping[str, Any], kinds: Mapping[str, Any], file: Path, at: str = "") -> dict[str, Any]:
    checked = {name: value for name, value in entries.items() if value is not None or name not in kinds}
    for name in checked.keys() & kinds.keys():
        value, kind = checked[name], kinds[name]
        is_kind, what = (is_mapping, "a mapping") if isinstance(kind, dict) else kind
        if not is_kind(value):
            raise ValueError(f"{str(file)!r}: {at}{name} must be {what}, got {repr(value)[:80]}")
        if isinstance(kind, dict):
            checked[name] = _checked(value, kind, file, f"{at}{name}.")
    return checked


def is_mapping(value: Any) -> bool:
    return isinstance(value, dict)
