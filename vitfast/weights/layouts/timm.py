"""timm's names, which are ours: of its own files, and of vitfast's, DINO's, MAE's and DeiT's.

What shapes do not tell (heads, activation, eps, pooling) is what all models of timm with such weights have.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from vitfast.config import ViTConfig
from vitfast.timm_names.pretrained_cfg import pretrained_cfg
from vitfast.timm_names.variants import VARIANTS, config_for
from vitfast.weights.layouts.layout import (
    Facts,
    Known,
    Layout,
    Rule,
    View,
    grid_of,
    grid_side,
    heads_of,
    needs,
    one,
)

INPUT = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "input_size")
# fields that shapes tell, by which timm's models are found that have such weights
TOLD = (
    "dim", "depth", "patch_size", "mlp", "mlp_dim", "qkv_bias", "proj_bias", "norm", "qk_norm", "attn_norm",
    "mlp_norm", "class_token", "distillation_token", "register_tokens", "pre_norm", "patch_norm", "final_norm",
    "pos_embed", "norm_after_pool",
)  # fmt: skip
# fields on which timm's models with equal shapes may differ
OPEN = ("heads", "activation", "norm_eps", "pool", "pool_prefix")


def _recognises(view: View, facts: Facts) -> str | None:
    if "blocks.0.norm1.weight" in view or ("blocks.0.attn.qkv.weight" in view):
        return "patch_embed.proj and blocks.0.attn.qkv are there"
    return None


def _describe(view: View, facts: Facts, given: Mapping[str, Any]) -> Known:
    seen = _seen(view)
    if facts.fields:
        return _with_facts(view, seen, facts, given)
    if architecture := str(facts.timm.get("architecture", "")):
        return _of_architecture(architecture.partition(".")[0], view, seen, facts, given)
    assumed: dict[str, str] = {}
    seen["pos_embed"], grid, why = _positions(view, seen, given)
    assumed |= {"pos_embed": why} if why else {}
    candidates = _like(seen)
    fields = dict(seen)
    for field in OPEN:
        if field in given:
            fields[field] = given[field]
        elif field not in seen:
            fields[field], assumed[field] = _open(field, seen, candidates)
    fields.setdefault("norm_after_pool", fields["pool"] == "mean" and "norm.weight" not in view)
    fields.setdefault("head_dim", view.shape("blocks.0.attn.qkv.weight")[0] // 3 // given.get("heads", fields["heads"]))
    fields["image_size"] = tuple(g * p for g, p in zip(grid, seen["patch_size"], strict=True))
    preprocessing = _agreed_input(candidates)
    if preprocessing:
        assumed["preprocessing"] = f"as {candidates[0]} has it; weights do not tell"
    return Known(fields, assumed, preprocessing)


def _seen(view: View) -> dict[str, Any]:
    """Fields that names and shapes tell."""
    D, *patch = view.shape("patch_embed.proj.weight")
    depth = view.blocks(r"blocks\.(\d+)\.")
    has = view.__contains__
    seen: dict[str, Any] = {"dim": D, "depth": depth}
    if len(patch) == 3:
        seen |= {"channels": patch[0], "patch_size": (patch[1], patch[2])}
    else:
        # vit-pytorch's, over pixels in a row; a patch of three channels is taken for square
        side = grid_side(patch[0] // 3) if patch[0] % 3 == 0 else None
        if side is None:
            raise needs("patch_size", ["..."], f"{patch[0]} pixels of a patch are no square of three channels")
        seen |= {"channels": 3, "patch_size": (side, side), "input_norm": True, "dynamic_image_size": True}
    block = "blocks.0"
    if has(f"{block}.mlp.fc1_g.weight"):
        seen |= {"mlp": "swiglu", "mlp_dim": view.shape(f"{block}.mlp.fc1_g.weight")[0]}
    elif has(f"{block}.mlp.fc1.weight"):
        rows, columns = view.shape(f"{block}.mlp.fc1.weight")[0], view.shape(f"{block}.mlp.fc2.weight")[1]
        seen |= {"mlp": "mlp" if rows == columns else "swiglu_packed", "mlp_dim": rows}
    inner = view.shape(f"{block}.attn.qkv.weight")[0] // 3
    seen |= {
        "qkv_bias": has(f"{block}.attn.qkv.bias"),
        "proj_bias": has(f"{block}.mlp.fc2.bias"),
        "out_proj": has(f"{block}.attn.proj.weight"),
        "qk_norm": has(f"{block}.attn.q_norm.weight"),
        "attn_norm": has(f"{block}.attn.norm.weight"),
        "mlp_norm": has(f"{block}.mlp.norm.weight"),
        "norm": "layer" if has(f"{block}.norm1.bias") else "rms",
        # the initial value; which it was nobody can tell by now
        "layer_scale": 1e-5 if has(f"{block}.ls1.gamma") else None,
        "class_token": has("cls_token") and view["cls_token"].numel() > 0,
        "distillation_token": has("dist_token"),
        "register_tokens": view.shape("reg_token")[1] if has("reg_token") else 0,
        "pre_norm": has("norm_pre.weight"),
        "patch_norm": has("patch_embed.norm.weight") and "input_norm" not in seen,
        "final_norm": has("norm.weight") or has("fc_norm.weight"),
        "num_classes": view.shape("head.weight")[0] if has("head.weight") else 0,
    }
    if seen["qk_norm"]:
        head_dim = view.shape(f"{block}.attn.q_norm.weight")[0]
        seen |= {"head_dim": head_dim, "heads": inner // head_dim}
    if has("attn_pool.latent"):
        seen |= {"pool": "map", "norm_after_pool": False}
    elif has("fc_norm.weight"):
        seen |= {"pool": "mean", "norm_after_pool": True}
    if "input_norm" in seen:
        mean = not seen["class_token"] or seen.get("pool") == "mean"
        seen |= {"norm_eps": 1e-5, "activation": "gelu", "pool": "mean" if mean else "token", "pool_prefix": False}
        seen.setdefault("norm_after_pool", False)
    return seen


def _positions(view: View, seen: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[str, tuple[int, int], str]:
    """The field pos_embed, the grid, and why where that is not sure."""
    if "pos_embed" not in view:
        if given.get("pos_embed") != "none":
            why = "there are no learned positions, and ViTConfig does not have rotary ones, which leave no weights"
            raise needs("pos_embed", ["none"], why)
        size, patch = given.get("image_size", 224), seen["patch_size"]
        size = (size, size) if isinstance(size, int) else size
        return "none", (size[0] // patch[0], size[1] // patch[1]), ""
    shape = view.shape("pos_embed")
    rows = shape[-2]
    prefix = int(seen["class_token"]) + int(seen["distillation_token"]) + seen["register_tokens"]
    if not prefix or "input_norm" in seen or given.get("pos_embed") == "all":
        return "all", grid_of(rows, prefix, given), ""
    if given.get("pos_embed") == "patches":
        return "patches", grid_of(rows, 0, given), ""
    if (size := given.get("image_size")) is not None and "grid" not in given:
        size = (size, size) if isinstance(size, int) else size
        asked = tuple(n // p for n, p in zip(size, seen["patch_size"], strict=True))
        if math.prod(asked) == rows - prefix and asked[0] != asked[1]:
            given = {**given, "grid": asked}
    fits = lambda patches: (  # noqa: E731
        math.prod(given["grid"]) == patches if "grid" in given else grid_side(patches) is not None
    )
    to_all, to_patches = fits(rows - prefix), fits(rows)
    if to_all and to_patches and seen["register_tokens"]:
        return "patches", grid_of(rows, 0, given), "timm's models with registers have positions for patches alone"
    if to_patches and not to_all:
        if "grid" in given or seen["register_tokens"]:
            return "patches", grid_of(rows, 0, given), ""
        alike = _like({**seen, "pos_embed": "patches"})
        told = f"{rows} positions are a square of patches, or a rectangle of {rows - prefix} and {prefix} prefix tokens"
        if not alike:
            raise needs("pos_embed", ["patches", "all"], f"{told}: with 'all' give grid=(rows, columns) too")
        return "patches", grid_of(rows, 0, given), f"as {alike[0]} has it; {told}"
    return "all", grid_of(rows, prefix, given), ""


@functools.cache
def _configs() -> dict[str, ViTConfig]:
    return {name: config_for(name) for name in VARIANTS}


def _like(seen: Mapping[str, Any]) -> list[str]:
    """timm's models with such weights; of other depths where there is none of this one."""
    shallower = {field: value for field, value in seen.items() if field != "depth"}
    fitting = ([n for n, config in _configs().items() if _fits(told, config)] for told in (seen, shallower))
    return next(filter(None, fitting), [])


def _fits(seen: Mapping[str, Any], config: ViTConfig) -> bool:
    alike = (seen["layer_scale"] is None) == (config.layer_scale is None)
    alike &= (seen.get("pool") == "map") == (config.pool == "map")
    return alike and all(
        getattr(config, field) == seen[field] for field in (*TOLD, *OPEN) if field in seen and seen[field] is not None
    )


def _open(field: str, seen: Mapping[str, Any], candidates: list[str]) -> tuple[Any, str]:
    """A field that shapes do not tell: what all candidates have."""
    found: dict[Any, str] = {}
    for name in candidates:
        found.setdefault(getattr(_configs()[name], field), name)
    if len(found) == 1:
        value, name = next(iter(found.items()))
        others = len(candidates) - 1
        return value, f"as {name}{f' and {others} other models of timm' * bool(others)} with such weights"
    if field == "heads" and not found:
        return heads_of(seen["dim"], seen["depth"], {})
    if field == "heads" or (field == "activation" and (found or seen["pre_norm"])):
        told = "; ".join(f"{name} has {value}" for value, name in found.items()) or "CLIP's towers have either"
        raise needs(field, [*found] or ["gelu", "quick_gelu"], f"weights do not tell, and {told}")
    default: Any = getattr(ViTConfig, field)
    if field == "pool" and not seen["class_token"]:
        default = "mean"
    if field == "norm_eps" and seen["pre_norm"]:
        return 1e-5, "as timm's CLIP towers have it; its own default is 1e-6"
    differ = "; ".join(f"{name} has {value!r}" for value, name in found.items())
    return default, f"timm's default; {differ or 'no model of timm has such weights'}"


def _of_architecture(name: str, view: View, seen: dict[str, Any], facts: Facts, given: Mapping[str, Any]) -> Known:
    """timm's config.json says which model it is."""
    own = {keyword: value for keyword, value in (facts.timm.get("model_args") or {}).items() if value is not None}
    config = config_for(name, **own)
    cfg = facts.timm.get("pretrained_cfg") or {}
    size = cfg.get("input_size")
    fields = config.to_dict() | {"channels": seen["channels"], "num_classes": seen["num_classes"]}
    if pool := facts.timm.get("global_pool"):
        pooled = config_for(name, **own | {"global_pool": pool})
        fields |= {"pool": pooled.pool, "norm_after_pool": pooled.norm_after_pool}
    grid = config.grid_size if not size else tuple(n // p for n, p in zip(size[1:], config.patch_size, strict=True))  # type: ignore[arg-type]
    if "pos_embed" in view:
        prefix = config.num_prefix_tokens if config.pos_embed == "all" else 0
        rows = view.shape("pos_embed")[-2]
        if rows != prefix + grid[0] * grid[1]:
            grid = grid_of(rows, prefix, given)
    fields["image_size"] = tuple(g * p for g, p in zip(grid, config.patch_size, strict=True))  # type: ignore[arg-type]
    return Known(fields, {}, {key: cfg[key] for key in INPUT if key in cfg}, _labels(facts, seen["num_classes"]))


def _with_facts(view: View, seen: dict[str, Any], facts: Facts, given: Mapping[str, Any]) -> Known:
    """A live model, or a file with a config, says all."""
    fields = seen | dict(facts.fields)
    cfg = facts.timm.get("pretrained_cfg") or {}
    return Known(fields, {}, {key: cfg[key] for key in INPUT if key in cfg}, _labels(facts, fields["num_classes"]))


def _labels(facts: Facts, num_classes: int) -> dict[int, str]:
    names = (facts.timm.get("pretrained_cfg") or {}).get("label_names") or facts.timm.get("label_names") or ()
    # of a model whose classifier was exchanged timm keeps the names of its first one
    return dict(enumerate(names)) if len(names) == num_classes else {}


def _agreed_input(candidates: Iterable[str]) -> dict[str, Any]:
    """How images are prepared for timm's weights under these names, where all agree."""
    found: list[dict[str, Any]] = []
    for name in candidates:
        config = _configs()[name]
        cfg = pretrained_cfg(name, config.image_size, config.num_classes)  # type: ignore[arg-type]  # a pair
        found.append({key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct") if key in cfg})
    return found[0] if found and all(cfg == found[0] for cfg in found) else {}


def _rules(config: ViTConfig) -> tuple[Rule, ...]:
    return (one("{name}", "{name}"),)


IGNORED = {
    r"mask_token$": "the token that stands for hidden patches in pretraining",
    r"decoder_(embed|blocks|norm|pred|pos_embed)\b": "the decoder of a masked autoencoder",
    r"/?/?head\.(mlp|last_layer)\.": "the projection head of DINO",
}

LAYOUTS = (Layout("timm", "timm", r"patch_embed\.proj\.weight", _recognises, _describe, _rules, ignored=IGNORED),)
