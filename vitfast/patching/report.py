"""What is fused in a patched model, and what is not, with all reasons."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn

from vitfast.model.plain import FORWARDS, any_global_hook, why_not_plain
from vitfast.model.vit import ViT
from vitfast.patching.engine import Patch, child
from vitfast.patching.find import has_sharded, outside_vits, stems, unknown_blocks
from vitfast.patching.known import ABSENT, KNOWN, USES, Known, learn, still_calls
from vitfast.patching.stem import why_not as why_no_stem

KINDS = ("attention", "norm", "mlp", "patch_embed")
# `ViT.fusion_report` names ops; this is the kind that each is of
KIND_OF_OP = {"attention": "attention", "layer_norm": "norm", "mlp": "mlp", "patch_embed": "patch_embed"}


class Part(NamedTuple):
    """A part of a model: its name in `named_modules`, its kind (one of `KINDS`, or 'block' for one that is not known),
    the ops that it runs as ('' for none), and why not.
    """

    name: str
    kind: str
    op: str
    reason: str


class PatchReport:
    """What `patch` did; `str()` is a table.

    Attributes:
        fused: the parts that run as ops, as `Part`s; left: those that do not, with the reasons.
    """

    def __init__(self, parts: list[Part], notes: list[str] | None = None):
        self.fused = [part for part in parts if part.op]
        self.left = [part for part in parts if not part.op]
        self.notes = notes or []

    def require(self, *kinds: str) -> PatchReport:
        """The report itself, so that a script can insist: `vitfast.patch(model).require("attention", "mlp")`.

        Args:
            kinds: 'attention', 'norm', 'mlp' or 'patch_embed'; all that are named have to be there.

        Raises:
            ValueError: another kind.
            RuntimeError: nothing of one of these kinds is fused; says why.
        """
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"require: kinds must be of {KINDS}, got {kind!r}")
            if not any(part.kind == kind for part in self.fused):
                why = "; ".join(_said(self.left, kind)) or "the model has no block or layer that vitfast knows"
                raise RuntimeError(f"patch: nothing of kind {kind!r} is fused: {why}")
        return self

    def __str__(self) -> str:
        rows = [("part", "kind", "runs as", "because"), *_grouped([*self.fused, *self.left])]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows]
        return "\n".join([*(line.rstrip() for line in lines), *self.notes])

    __repr__ = __str__


def _said(left: Iterable[Part], kind: str) -> list[str]:
    told = [(part.name, part.reason) for part in left if part.kind in (kind, "block")]
    first: dict[str, str] = {}
    for name, reason in told:
        first.setdefault(reason, name)
    return [f"{name} {reason}" for reason, name in first.items()]


def _grouped(parts: list[Part]) -> Iterator[tuple[str, str, str, str]]:
    """A row for all blocks of which the same holds: 'blocks.*.attn (12)'."""
    groups: dict[tuple, list[str]] = {}
    for part in parts:
        pattern = re.sub(r"\d+(?=[.:])|(?<=[.])\d+$|(?<=layer_)\d+$|^\d+$", "*", part.name)
        groups.setdefault((pattern, *part[1:]), []).append(part.name)
    for (pattern, kind, op, reason), names in groups.items():
        name = names[0] if len(names) == 1 else f"{pattern} ({len(names)})"
        yield name, kind, op or "its own modules", reason


def reasons_of(module: nn.Module | None, name: str, roles: tuple[str, ...], sharded: bool) -> list[str]:
    """Why an op may not stand in for a module where one of these roles is wanted: `absorbable`, in words."""
    if module is None:
        return [] if ABSENT in roles else [f"{name} is not there"]
    unknown = learn(type(module))
    if unknown:
        unknown = "is parametrized" if hasattr(module, "parametrizations") else unknown
        return [f"{name} {unknown}"]
    known = KNOWN[type(module)]
    if known.role not in roles:
        wanted = " or ".join(role or "nothing" for role in roles)
        return [f"{name} is {type(module).__name__}, not {wanted}"]
    why = why_not_plain(module, type(module))
    # FSDP2 has whole weights there while the block runs
    if why and not (sharded and why.endswith("of class DTensor")):
        return [f"{name} {why}"]
    if not still_calls(type(module)):
        return [f"{name} is a {type(module).__name__}, of which {' or '.join(known.calls)} was patched"]
    why = known.why_not(module) if known.why_not is not None else ""
    return [f"{name} {why}"] if why else []


def _inside(holder: nn.Module, name: str, known: Known, sharded: bool) -> list[str]:
    found = []
    for _, names, roles in known.paths:
        found += reasons_of(child(holder, names), ".".join((name, *names)), roles, sharded)
    return found


def parts_of_block(name: str, block: nn.Module, patch: Patch, sharded: bool) -> list[Part]:
    """Parts of a patched block as it is now."""
    names, whole = KNOWN[patch.kind].children, []
    at = f"{name}." if name else ""
    if any_global_hook():
        whole = ["a global module hook is registered"]
    if patch.kind.forward is not FORWARDS.get(patch.kind):  # type: ignore[attr-defined]
        whole.append(f"is in a {patch.kind.__name__}, whose forward was patched")
    rows = []
    for branch, kind in (("1", "attention"), ("2", "mlp")):
        use = "attn" if kind == "attention" else "mlp"
        if use not in names:
            continue
        holder, norm_name = child(block, names[use].split(".")), names.get(f"norm{branch}")
        reasons = list(whole)
        if not getattr(patch, kind):
            reasons.append(f"{kind}=False was asked for")
        found = reasons_of(holder, names[use], (kind,), sharded)
        known = None if holder is None else KNOWN.get(type(holder))
        called = []
        if holder is not None and known is not None and known.role == kind:
            if "_vitfast" in holder.__dict__:
                # its own forward runs ops, beside the hooks
                called = [why for why in found if why.endswith("hooks")]
                alone = known.why_not_alone(holder) if called and known.why_not_alone else ""
                found = [why for why in found if why not in called] + ([f"{names[use]} {alone}"] if alone else [])
            found += _inside(holder, names[use], known, sharded)
            norm_name = norm_name or f"{names[use]}.{known.children['norm']}"
        for outer in ("drop", "scale", "drop_path"):
            if (inner := names.get(outer + branch)) is not None:
                found += reasons_of(child(block, inner.split(".")), inner, USES[outer + branch], sharded)
        reasons += found
        ops, with_norm = ("", "layer_norm") if reasons else _ops_of(kind, holder)
        rows.append(Part(at + names[use], kind, ops, "; ".join(reasons + called)))
        if norm_name is not None:
            why = list(whole) + ([] if patch.norm else ["norm=False was asked for"])
            why += reasons_of(child(block, norm_name.split(".")), norm_name, USES["norm"], sharded)
            # a forward that is the library's own calls the norm
            if reasons and not why and f"norm{branch}" not in names:
                why.append(f"is in {names[use]}, which runs its own modules")
            rows.append(Part(at + norm_name, "norm", "" if why else with_norm, "; ".join(why)))
    return rows


def _alone(name: str, module: nn.Module, patch: Patch, known: Known, sharded: bool) -> Part:
    """Of a patched attention or MLP in a block that is not known, or in none."""
    reasons = [] if getattr(patch, known.role) else [f"{known.role}=False was asked for"]
    reasons += [why for why in reasons_of(module, "it", (known.role,), sharded) if not why.endswith("hooks")]
    if known.why_not_alone and (why := known.why_not_alone(module)):
        reasons.append(why)
    reasons += _inside(module, name, known, sharded)
    return Part(name, known.role, "" if reasons else _ops_of(known.role, module)[0], "; ".join(reasons))


def _blocks_of(name: str, module: nn.Module, known: Known) -> Iterator[tuple[str, nn.Module]]:
    """The blocks that a patched module runs: itself, or those of a list."""
    if not known.layers:
        yield name, module
        return
    at = f"{name}.{known.layers}" if name else known.layers
    for inner, block in module._modules[known.layers].named_children():  # type: ignore[union-attr]
        yield f"{at}.{inner}", block


def _ops_of(kind: str, holder: nn.Module | None) -> tuple[str, str]:
    """The ops that an attention or MLP runs as, and the one that has its norm inside."""
    children = {} if holder is None else KNOWN[type(holder)].children
    if kind == "attention":
        return ("attention, linear", "layer_norm") if "q" in children else ("linear, attention, linear", "linear")
    return ("linear (one a projection)", "linear") if "gate" in children else ("mlp", "mlp")


def parts_of_vit(name: str, vit: ViT) -> list[Part]:
    """Of a `vitfast.ViT`, which needs no patch."""
    rows = []
    for part, op, reasons in vit.fusion_report():
        kind = "norm" if part.endswith("norm1 + attn.qkv") else KIND_OF_OP.get(op.split(" ")[0])
        if kind is not None:
            at = f"{name}.{part}" if name else part
            rows.append(Part(at, kind, "" if reasons else op, "; ".join(reasons)))
    return rows


def parts_of_stems(model: nn.Module, sharded: bool) -> list[Part]:
    """Of what cuts the patches."""
    parts = []
    for name, stem in stems(model):
        patch, why = stem.__dict__.get("_vitfast"), why_no_stem(stem)
        why = "" if sharded and why.endswith("of class DTensor") else why
        if not why and (patch is None or not patch.patch_embed):
            why = "patch_embed=False was asked for" if patch is not None else "is not patched"
            why = "has a patched forward" if patch is None and "forward" in stem.__dict__ else why
        parts.append(Part(name, "patch_embed", "" if why else "patch_embed", why))
    return parts


def report_of(model: nn.Module, skipped: Mapping[str, str] | None = None, vits: bool = True) -> PatchReport:
    """Of the model as it is now.

    Args:
        model: any module.
        skipped: names of blocks that could not be patched, with the reason.
        vits: with each `vitfast.ViT` in it.
    """
    sharded, done = has_sharded(model), list[str]()
    notes, parts = list[str](), parts_of_stems(model, sharded)
    for name, module in outside_vits(model):
        patch: Patch | None = module.__dict__.get("_vitfast")
        # a block says it for the attention in it
        known = None if patch is None else KNOWN.get(patch.kind)
        if patch is not None and known is not None and known.role == "block" and not any(map(name.startswith, done)):
            for inner, block in _blocks_of(name, module, known):
                parts += parts_of_block(inner, block, patch, sharded)
            done.append(f"{name}." if name else "")
        elif patch is not None and known is not None and known.role in KINDS and not any(map(name.startswith, done)):
            parts.append(_alone(name, module, patch, known, sharded))
    parts += [Part(name, "block", "", (skipped or {}).get(name, what)) for name, what in unknown_blocks(model)]
    for name, module in model.named_modules() if vits else ():
        if isinstance(module, ViT):
            parts += parts_of_vit(name, module)
            notes.append(f"{name or 'the model'} is a vitfast.ViT, which runs ops of its own and needs no patch")
    return PatchReport(parts, notes)
