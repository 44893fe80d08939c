"""Which ViTConfig a model has come to be: what was exchanged in it after it was built, or why no config says so."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from inspect import getattr_static
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.config import ViTConfig
from vitfast.model.block import Attention, Mlp
from vitfast.model.layers import ACTIVATIONS, NORMS, DropPath, LayerScale, activation_name, eps_of, norm_kind
from vitfast.model.plain import METHODS, patched, replaced, why_changed, why_not_plain
from vitfast.model.vit import ViT

NORMED = (nn.Identity, *NORMS)
OWN = frozenset(vars(nn.Module()))
# how a model runs, not what it is; of `channels` and `init` the weights tell
NOT_SAVED = {
    "config", "feature_info", "distilled_training", "grad_checkpointing", "recompute", "subset_from", "inplace",
    "channels", "init_values", "fused_attn", "exportable", "_model_args", "_compiled_call_impl",
}  # fmt: skip

# (field, the parts that have it, the classes in which they can be asked, what they answer)
has_bias = lambda linear: linear.bias is not None  # noqa: E731
is_there = lambda module: type(module) is not nn.Identity  # noqa: E731
starts_at = lambda scale: (scale.init_values or 1.0) if is_there(scale) else None  # noqa: E731
rate = lambda module: getattr(module, "p", 0.0)  # noqa: E731
ANSWERS: tuple[tuple[str, str, tuple[type, ...], Callable[[Any], Any]], ...] = (
    ("num_classes", "head", (nn.Linear, nn.Identity), lambda m: m.out_features if is_there(m) else 0),
    ("heads", "blocks.*.attn", (Attention,), lambda m: m.num_heads),
    ("head_dim", "blocks.*.attn", (Attention,), lambda m: m.head_dim),
    ("mlp", "blocks.*.mlp", (Mlp,), lambda m: m.kind),
    ("mlp_dim", "blocks.*.mlp.fc1", (nn.Linear,), lambda m: m.out_features),
    ("mlp_dim", "blocks.*.mlp.fc1_g", (nn.Linear,), lambda m: m.out_features),
    ("activation", "*.act", ACTIVATIONS, activation_name),
    ("norm", "*", NORMS, norm_kind),
    ("norm_eps", "*", NORMS, lambda m: eps_of(m, m.weight)),
    ("qkv_bias", "blocks.*.attn.qkv", (nn.Linear,), has_bias),
    ("proj_bias", "blocks.*.mlp.fc*", (nn.Linear,), has_bias),
    ("out_proj", "blocks.*.attn.proj", (nn.Linear, nn.Identity), is_there),
    ("qk_norm", "blocks.*.attn.[qk]_norm", NORMED, is_there),
    ("attn_norm", "blocks.*.attn.norm", NORMED, is_there),
    ("mlp_norm", "blocks.*.mlp.norm", NORMED, is_there),
    ("layer_scale", "blocks.*.ls[12]", (nn.Identity, LayerScale), starts_at),
    ("pre_norm", "norm_pre", NORMED, is_there),
    ("pre_norm", "patch_embed.proj", (nn.Conv2d,), lambda m: m.bias is None),
    ("patch_norm", "patch_embed.norm", NORMED, is_there),
    ("channels", "patch_embed.proj", (nn.Conv2d,), lambda m: m.in_channels),
    ("emb_dropout", "pos_drop", (nn.Dropout, nn.Identity), rate),
    ("attn_dropout", "blocks.*.attn.attn_drop", (nn.Dropout, nn.Identity), rate),
    ("proj_dropout", "blocks.*.attn.proj_drop", (nn.Dropout, nn.Identity), rate),
    ("mlp_dropout", "blocks.*.mlp.drop[12]", (nn.Dropout, nn.Identity), rate),
    ("head_dropout", "head_drop", (nn.Dropout, nn.Identity), rate),
)


def config_of(model: ViT) -> ViTConfig:
    """The config whose model computes what this one does, in evaluation and in training, once it has the weights.

    `model.config` with the fields that the parts answer otherwise by now; what `ViT.from_config` builds of it is then
    compared with the model part by part. How a model runs (train mode, dtype, gradient checkpointing, distilled
    training, what a backward recomputes) is no part of a config.

    Raises:
        NotImplementedError: no config says what somebody made of the model; names the parts.
    """
    parts = {name.replace("._orig_mod", ""): inner(part) for name, part in model.named_modules(remove_duplicate=False)}
    config, reasons = model.config, []
    try:
        config = config.replace(**_answered(model, parts, config))
    except (TypeError, ValueError) as error:
        reasons.append(str(error))
    with torch.device("meta"):
        built = ViT.from_config(config)
    reasons += [*_overridden(model), *_differences(model, built, ""), *_shared(model)]
    if reasons:
        more = [f"and {len(reasons) - 8} more"] * (len(reasons) > 8)
        raise NotImplementedError(f"no ViTConfig describes this model: {'; '.join(reasons[:8] + more)}")
    return config


def inner(module: nn.Module) -> Any:
    """The module that torch.compile wrapped."""
    return module._modules.get("_orig_mod", module)


def _answered(model: ViT, parts: dict[str, nn.Module], config: ViTConfig) -> dict[str, Any]:
    """The fields as the parts have them; where they disagree what the config says, so that the odd one is named."""
    answers: dict[str, list] = {}
    for field, pattern, kinds, answer in ANSWERS:
        found = [answer(part) for name, part in parts.items() if type(part) in kinds and fnmatchcase(name, pattern)]
        answers.setdefault(field, []).extend(found)
    depth = len(blocks) if type(blocks := parts.get("blocks")) is nn.Sequential else config.depth
    # what the last block's rate would be, seen from each block but the first, whose rate is 0
    answers["drop_path"] = [
        getattr(parts[name], "drop_prob", 0.0) * (depth - 1) / i
        for i in range(1, depth)
        for name in (f"blocks.{i}.drop_path1", f"blocks.{i}.drop_path2")
        if type(parts.get(name)) in (DropPath, nn.Identity)
    ]
    if config.input_norm:
        proj, answers["patch_norm"] = parts.get("patch_embed.proj"), []
        pixels = math.prod(config.patch_size)  # type: ignore[arg-type]  # a pair since ViTConfig.__post_init__
        answers["channels"] = [proj.in_features // pixels] if type(proj) is nn.Linear else []
    after = is_there(model.fc_norm)
    answers["final_norm"] = [after or is_there(model.norm)]
    answers["norm_after_pool"] = [after] if after or is_there(model.norm) else []
    agreed = {field: _agreed(getattr(config, field), found) for field, found in answers.items()}
    return agreed | {"depth": depth}


def _agreed(own: Any, found: list) -> Any:
    return own if not found or any(_same(own, value) for value in found) else Counter(found).most_common(1)[0][0]


def _same(value: Any, expected: Any) -> bool:
    if isinstance(value, float) and isinstance(expected, float):
        # rates of a shorter or longer model, computed anew
        # another question than `check.acceptance`'s: whether this is the number that was written
        return math.isclose(value, expected, rel_tol=1e-12)
    return not isinstance(value, Tensor) and bool(value == expected)


def _overridden(model: ViT) -> Iterator[str]:
    """What a subclass computes that ViT does not, or a ViT whose class was patched."""
    for name in dir(ViT):
        of_class = getattr_static(type(model), name) is not getattr_static(ViT, name)
        if not name.startswith("__") and (of_class or (name in METHODS and replaced(model, name))):
            yield f"{type(model).__name__}.{name} is not ViT's"


def _differences(module: nn.Module, built: nn.Module, name: str) -> Iterator[str]:
    """Why `module` is not what `built` is, apart from the values of its weights."""
    module = inner(module)
    if type(module) is nn.Identity and type(built) in (nn.Dropout, DropPath):
        dropped = built.p if type(built) is nn.Dropout else built.drop_prob
        built = built if dropped else nn.Identity()
    why = why_not_plain(module, type(built)) if name else why_changed(module)
    if why:
        yield f"{name or 'ViT'} {why}"
    if name and type(module) is not type(built):
        return
    path = f"{name}." if name else ""
    for attribute, value in vars(built).items():
        if attribute in OWN or attribute in NOT_SAVED or attribute.startswith("_"):
            continue
        got = getattr(module, attribute, None)
        if attribute == "eps" and got is None:
            got = eps_of(module, getattr(module, "weight", None))
        if not _same(got, value):
            yield f"{path}{attribute} is {got!r} in place of {value!r}"
    for attribute in sorted(vars(module).keys() - vars(built).keys() - OWN - NOT_SAVED):
        if hasattr(type(module), attribute) and patched(module, attribute):
            yield f"{path}{attribute} was replaced"
    have, expected = _members(module), _members(built)
    for part in sorted(have.keys() ^ expected.keys()):
        yield f"{path}{part} is {'missing' if part in expected else 'no part of a ViT like this'}"
    if isinstance(built, nn.Sequential) and [*have] != [*expected]:
        yield f"{name} has its parts in another order"
    for part, other in expected.items():
        one = have.get(part, other)
        if isinstance(one, nn.Module) and isinstance(other, nn.Module):
            yield from _differences(one, other, path + part)
        elif one.shape != other.shape:
            yield f"{path}{part} is {list(one.shape)} in place of {list(other.shape)}"


def _members(module: nn.Module) -> dict[str, Any]:
    """The parts and weights that a state dict holds."""
    held, unsaved = module._modules | module._parameters | module._buffers, module._non_persistent_buffers_set
    return {name: value for name, value in held.items() if value is not None and name not in unsaved}


def _shared(model: nn.Module) -> Iterator[str]:
    """Weights in two places, which training would keep equal."""
    seen: dict[Any, str] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(weight.data_ptr() if weight.numel() and not weight.is_meta else name, name)
        if first != name:
            yield f"{name} is shared with {first}"
