"""What a library calls the weights of a ViT: how its files are recognised, and turned into ours and back.

A layout is data: `Rule`s, each with one of our weights and those that it comes from. The same rules read and write, so
what is written is what would be read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitfast.config import ViTConfig
from vitfast.timm_names.variants import VARIANTS

# heads of 64 channels where nobody published such a model
HEAD_DIM = 64
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

Join = Callable[[Sequence[Tensor], ViTConfig, Tensor], Tensor]
Split = Callable[[Tensor, ViTConfig], Sequence[Any]]


class View(dict[str, Tensor]):
    """Weights by their name in the backbone; '/' stands before names of what is around it, '//' before all others."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight that has to be there.

        Raises:
            ValueError: it is not there.
        """
        if name not in self:
            raise ValueError(f"there is no {name!r} among these weights")
        return tuple(self[name].shape)

    def blocks(self, pattern: str) -> int:
        """How many numbers the one group of the pattern has; they have to be 0, 1, 2 and so on.

        Raises:
            ValueError: there are gaps between them.
        """
        found = {int(m[1]) for name in self if (m := re.match(pattern, name))}
        if found != set(range(len(found))):
            # no more than there are blocks: a name may have any number
            gaps = [i for i in range(len(found)) if i not in found]
            raise ValueError(f"blocks {', '.join(map(str, gaps[:5]))} of {max(found) + 1} are missing")
        return len(found)


class Facts(NamedTuple):
    """What stands beside the weights; each may be empty.

    Attributes:
        hf: transformers' config.json.
        timm: timm's config.json: 'architecture', 'pretrained_cfg', 'model_args'.
        processor: transformers' preprocessor_config.json.
        open_clip: open_clip_config.json: 'model_cfg', 'preprocess_cfg'.
        fields: fields of ViTConfig that a live model's modules tell.
    """

    hf: Mapping[str, Any] = {}
    timm: Mapping[str, Any] = {}
    processor: Mapping[str, Any] = {}
    open_clip: Mapping[str, Any] = {}
    fields: Mapping[str, Any] = {}


class Known(NamedTuple):
    """What a layout says of the model that these weights are of.

    Attributes:
        fields: keywords of ViTConfig.
        assumed: field -> why it has that value, where neither weights nor facts tell.
        preprocessing: 'mean', 'std', 'interpolation', 'crop_pct', 'input_size' as timm names them.
        labels: class -> name.
    """

    fields: dict[str, Any]
    assumed: dict[str, str] = {}
    preprocessing: dict[str, Any] = {}
    labels: dict[int, str] = {}


class Rule(NamedTuple):
    """One of our weights and those it comes from.

    Attributes:
        ours: its name, with {i} for the number of the block, or {name} for any name.
        theirs: their names as in a `View`, with the same {i} or {name}.
        join: makes ours of theirs; the last argument has our shape and dtype.
        split: makes theirs, or a `Part` of theirs, of ours, with None for those that another rule makes; None where
            that cannot be undone.
    """

    ours: str
    theirs: tuple[str, ...]
    join: Join
    split: Split | None


class Part(NamedTuple):
    """What `Rule.split` gives of a weight that several of ours make together: its rows, and where they stand."""

    order: int
    rows: Tensor


class Layout(NamedTuple):
    """A library's names for the weights of a ViT.

    Attributes:
        name: 'hf-vit'; whose: "Hugging Face's ViT".
        anchor: regex of a name, to its end, that each of its files has once; what stands before it is the prefix.
        recognises: why these are its weights, in words; None where they are not.
        describe: the model that they are of; the last argument has fields that the user gave, which win.
        rules: of a model of this config.
        inner: the library's own prefixes of the backbone.
        ignored: regex of names that are no part of the model -> what they are.
        resampling: how the library resamples positions, as `resample_pos_embed` names it.
        rename: (regex, replacement) from other releases' names to those of the rules.
    """

    name: str
    whose: str
    anchor: str
    recognises: Callable[[View, Facts], str | None]
    describe: Callable[[View, Facts, Mapping[str, Any]], Known]
    rules: Callable[[ViTConfig], tuple[Rule, ...]]
    inner: tuple[str, ...] = ("",)
    ignored: Mapping[str, str] = {}
    resampling: str = "timm"
    rename: tuple[tuple[str, str], ...] = ()


class NeedsArgument(ValueError):
    """Weights do not tell a field on which their origins differ."""


def needs(field: str, choices: Sequence[Any], why: str) -> NeedsArgument:
    """The error that asks for a field of ViTConfig."""
    told = " or ".join(f"{field}={choice!r}" for choice in choices)
    return NeedsArgument(f"{field} must be given, {told}: {why}")


def first(tensors: Sequence[Tensor], *_: Any) -> Tensor:
    return tensors[0]


def alone(weight: Tensor, _: ViTConfig) -> tuple[Tensor]:
    return (weight,)


def cat(tensors: Sequence[Tensor], *_: Any) -> Tensor:
    return torch.cat(tuple(tensors))


def zeros(_: Sequence[Tensor], __: ViTConfig, own: Tensor) -> Tensor:
    """For a weight of ours that the library's models do not have."""
    return torch.zeros(own.shape, dtype=own.dtype, device="cpu")


def class_token_with_position(tensors: Sequence[Tensor], *_: Any) -> Tensor:
    """Of a library whose class token has a position and whose registers, which come after it, have none."""
    token, positions = tensors
    return token + positions[:, :1]


def with_zero_position(positions: Tensor, _: ViTConfig) -> tuple[Tensor]:
    """The class token holds its position already."""
    return (torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1),)


def one(ours: str, theirs: str, join: Join = first, split: Split | None = alone) -> Rule:
    """A weight under another name."""
    return Rule(ours, (theirs,), join, split)


def same(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """Weight and bias of a module under another name."""
    return one(f"{ours}.weight", f"{theirs}.weight"), one(f"{ours}.bias", f"{theirs}.bias")


def joined(ours: str, *theirs: str) -> tuple[Rule, Rule]:
    """Weight and bias of a module whose rows are several modules' there."""
    split = lambda weight, _: weight.chunk(len(theirs))  # noqa: E731
    weight, bias = (tuple(f"{name}.{kind}" for name in theirs) for kind in ("weight", "bias"))
    return Rule(f"{ours}.weight", weight, cat, split), Rule(f"{ours}.bias", bias, cat, split)


def grid_side(patches: int) -> int | None:
    """Rows of a square grid of so many patches, None where no square has as many."""
    side = math.isqrt(max(patches, 0))
    return side if side and side * side == patches else None


def grid_of(positions: int, prefix: int, given: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of `positions` learned positions, of which `prefix` are no patches'.

    Args:
        given: `grid` where positions are of no square.

    Raises:
        ValueError: the grid that was given has another number of patches, or none was and it is not square.
    """
    patches = positions - prefix
    if (grid := given.get("grid")) is not None:
        if grid[0] * grid[1] != patches:
            raise ValueError(f"grid must have the {patches} patches of these positions, got {tuple(grid)}")
        return grid[0], grid[1]
    side = grid_side(patches)
    if side is None:
        raise needs("grid", ["(rows, columns)"], f"there are positions of {patches} patches, which is no square")
    return side, side


def heads_of(dim: int, depth: int, given: Mapping[str, Any], family: str = "") -> tuple[int, str]:
    """Heads: those given, of a published model of this width and depth, or of 64 channels each; and why.

    Args:
        family: a part of the names of the models that count, '_clip_'.

    Raises:
        NeedsArgument: published models differ, or 64 does not divide the width.
    """
    if "heads" in given:
        return given["heads"], "given"
    found: dict[int, str] = {}
    variants = {name: fields for name, fields in VARIANTS.items() if family in name}
    for name, fields in variants.items():
        fields = {"dim": ViTConfig.dim, "depth": ViTConfig.depth, "heads": ViTConfig.heads} | fields
        if (fields["dim"], fields["depth"]) == (dim, depth):
            found.setdefault(fields["heads"], name)
    if not found:
        found = {
            heads: name
            for name, fields in variants.items()
            if fields.get("dim") == dim and (heads := fields.get("heads"))
        }
    if len(found) == 1:
        heads, name = found.popitem()
        return heads, f"as {name} has it; the shapes do not tell"
    if dim % HEAD_DIM == 0:
        others = ", ".join(f"{heads} in {name}" for heads, name in found.items() if heads != dim // HEAD_DIM)
        return (
            dim // HEAD_DIM,
            f"heads of {HEAD_DIM} channels; the shapes do not tell{f' ({others})' if others else ''}",
        )
    raise needs("heads", sorted(found) or ["..."], f"the shapes do not tell, and {dim} is no multiple of {HEAD_DIM}")


def views(layout: Layout, state: Mapping[str, Tensor]) -> list[tuple[str, View]]:
    """(prefix, weights as seen from there) for each place in which the layout's anchor stands."""
    anchor = re.compile(f"(?:^|(?<=[./]))(?:{layout.anchor})$")
    prefixes = [name[: m.start()] for name in state if (m := anchor.search(_renamed(layout, name)))]
    return [(prefix, _view(layout, state, prefix)) for prefix in dict.fromkeys(prefixes)]


def _renamed(layout: Layout, name: str) -> str:
    for pattern, replacement in layout.rename:
        name = re.sub(pattern, replacement, name)
    return name


def _view(layout: Layout, state: Mapping[str, Tensor], prefix: str) -> View:
    inner = max((inner for inner in layout.inner if prefix.endswith(inner)), key=len, default="")
    outer = prefix[: len(prefix) - len(inner)]
    view = View()
    for name, value in state.items():
        if name.startswith(prefix):
            name = name[len(prefix) :]
        elif name.startswith(outer):
            name = "/" + name[len(outer) :]
        else:
            name = "//" + name
        renamed = _renamed(layout, name)
        # of two that get one name neither is lost: the second is left over, and said
        view[name if renamed in view else renamed] = value
    return view


def _rules_by_name(layout: Layout, config: ViTConfig) -> Callable[[str], tuple[Rule, tuple[str, ...]] | None]:
    """The first rule for one of our names, with their names filled in."""
    groups = ((r"\{i\}", r"(\d+)"), (r"\{name\}", "(.+)"))
    compiled = []
    for rule in layout.rules(config):
        pattern = re.escape(rule.ours)
        for group, regex in groups:
            pattern = pattern.replace(group, regex)
        compiled.append((re.compile(pattern), rule))

    def rule_of(name: str) -> tuple[Rule, tuple[str, ...]] | None:
        for pattern, rule in compiled:
            if m := pattern.fullmatch(name):
                number = m[1] if m.groups() else ""
                return rule, tuple(each.replace("{i}", number).replace("{name}", number) for each in rule.theirs)
        return None

    return rule_of


class Sources(NamedTuple):
    """Where each of a model's weights comes from, and what is passed over."""

    rules: dict[str, tuple[Rule, tuple[str, ...]]]
    ignored: dict[str, str]


def sources_of(layout: Layout, view: View, config: ViTConfig, own: Mapping[str, Tensor]) -> Sources:
    """Where each weight of a model comes from.

    Args:
        own: the weights of a model of this config, on the meta device.

    Raises:
        RuntimeError: weights that are missing, left over or of another shape; one error with all.
    """
    found: dict[str, tuple[Rule, tuple[str, ...]]] = {}
    problems = []
    rule_of = _rules_by_name(layout, config)
    for name, weight in own.items():
        match = rule_of(name)
        if match is None:
            problems.append(f"{name}: {layout.whose} has no name for it")
            continue
        rule, theirs = match
        missing = [each for each in theirs if each not in view]
        if missing:
            problems += [f"missing: {each} (our {name} {list(weight.shape)})" for each in missing]
            continue
        problem = _shape_problem(rule, [view[each] for each in theirs], config, name, weight)
        problems += [f"wrong shape: {', '.join(theirs)} {problem}"] if problem else []
        found[name] = rule, theirs
    used = {each for _, theirs in found.values() for each in theirs}
    ignored: dict[str, str] = {}
    for name in view.keys() - used:
        what = next((what for pattern, what in layout.ignored.items() if re.match(pattern, name)), None)
        if what is None:
            problems.append(f"unexpected: {name.lstrip('/')} {list(view[name].shape)}")
        else:
            ignored[name] = what
    if problems:
        more = [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        raise RuntimeError(
            "\n  ".join([f"{len(problems)} weights do not fit {layout.whose}:", *sorted(problems)[:20], *more])
        )
    return Sources(found, ignored)


def _shape_problem(rule: Rule, tensors: list[Tensor], config: ViTConfig, name: str, own: Tensor) -> str | None:
    shapes = " and ".join(str(list(t.shape)) for t in tensors)
    try:
        made = rule.join([torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors], config, own)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        return f"{shapes} cannot become {name} {list(own.shape)} ({error})"
    return None if made.shape == own.shape else f"{shapes} must become {name} {list(own.shape)}, got {list(made.shape)}"


def converted(
    sources: Sources, view: View, config: ViTConfig, own: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(our name, weight) one by one. The view is emptied meanwhile, so that each is freed once it is used."""
    uses = Counter(each for _, theirs in sources.rules.values() for each in theirs)
    for name in view.keys() - uses.keys():
        del view[name]
    for name, (rule, theirs) in sources.rules.items():
        tensors = [view[each] for each in theirs]
        made = rule.join(tensors, config, own[name])
        del tensors
        uses.subtract(theirs)
        for each in theirs:
            if not uses[each]:
                view.pop(each, None)
        yield name, made


def written(layout: Layout, weights: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Our weights under the layout's names, as in a `View`.

    Raises:
        NotImplementedError: it has no name for a weight, or what was joined cannot be taken apart; names them.
    """
    state: dict[str, Tensor] = {}
    parts: dict[str, list[Part]] = {}
    refused = []
    rule_of = _rules_by_name(layout, config)
    for name, weight in weights.items():
        match = rule_of(name)
        if match is None or match[0].split is None:
            refused.append(name)
            continue
        rule, theirs = match
        for each, made in zip(theirs, rule.split(weight, config), strict=True):  # type: ignore[misc]  # not None
            if made is None:
                continue
            if isinstance(made, Part):
                parts.setdefault(each, []).append(made)
            else:
                state[each] = made
    if refused:
        raise NotImplementedError(
            f"{layout.whose} has no name for {', '.join(refused[:8])}{' and others' * (len(refused) > 8)}"
        )
    return state | {
        name: torch.cat([part.rows for part in sorted(found, key=lambda part: part.order)])
        for name, found in parts.items()
    }
