"""What is fused in a patched model, and what is not, with all reasons."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from vitfast.model.plain import any_global_hook, why_changed
from vitfast.model.vit import ViT
from vitfast.patching.engine import Patch, child
from vitfast.patching.known import ABSENT, KNOWN, USES, Known, class_of, learn

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
        pattern = ".".join("*" if step.isdigit() else step for step in part.name.split("."))
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
    why = why_changed(module)
    # FSDP2 has whole weights there while the block runs
    if why and not (sharded and why.endswith("of class DTensor")):
        return [f"{name} {why}"]
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
        if not found and holder is not None:
            known = KNOWN[type(holder)]
            found = _inside(holder, names[use], known, sharded)
            norm_name = norm_name or f"{names[use]}.{known.children['norm']}"
        for outer in ("drop", "scale", "drop_path"):
            if (inner := names.get(outer + branch)) is not None:
                found += reasons_of(child(block, inner.split(".")), inner, USES[outer + branch], sharded)
        reasons += found
        rows.append(Part(at + names[use], kind, "" if reasons else _op_of(kind, holder), "; ".join(reasons)))
        if norm_name is not None:
            why = list(whole) + ([] if patch.norm else ["norm=False was asked for"])
            why += reasons_of(child(block, norm_name.split(".")), norm_name, USES["norm"], sharded)
            op = "" if why else ("in " + rows[-1].op if rows[-1].op and not _alone(holder) else "layer_norm")
            rows.append(Part(at + norm_name, "norm", op, "; ".join(why)))
    return rows


def _op_of(kind: str, holder: Any) -> str:
    return "linear, attention, linear" if kind == "attention" else "mlp"


def _alone(holder: Any) -> bool:
    """Whether the norm before three projections is an op of its own."""
    return "q" in KNOWN[type(holder)].children


def parts_of_vit(name: str, vit: ViT) -> list[Part]:
    """Of a `vitfast.ViT`, which needs no patch."""
    rows = []
    for part, op, reasons in vit.fusion_report():
        kind = KIND_OF_OP.get(op.split(" ")[0])
        if kind is not None:
            at = f"{name}.{part}" if name else part
            rows.append(Part(at, kind, "" if reasons else op, "; ".join(reasons)))
    return rows


def has_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 is at work somewhere in the model."""
    sharded = sys.modules.get("torch.distributed.fsdp")
    return sharded is not None and any(isinstance(module, sharded.FSDPModule) for module in model.modules())


def looks_like_block(module: nn.Module) -> bool:
    """Whether a module that vitfast does not know has attention right inside."""
    words = [f"{name} {type(inner).__name__}".lower() for name, inner in module.named_children()]
    return any("attention" in word or "attn" in word for word in words)


def report_of(model: nn.Module, skipped: dict[str, str]) -> PatchReport:
    """Of the model as it is now; skipped: blocks that are not patched, with the reason."""
    sharded, done = has_sharded(model), list[str]()
    parts, notes = list[Part](), list[str]()
    for name, module in model.named_modules():
        if any(name == path or name.startswith(f"{path}." if path else "") for path in done):
            continue
        patch = module.__dict__.get("_vitfast")
        if isinstance(module, ViT):
            parts += parts_of_vit(name, module)
            notes.append(f"{name or 'the model'} is a vitfast.ViT, which runs ops of its own and needs no patch")
        elif patch is not None and KNOWN[patch.kind].role == "block":
            parts += parts_of_block(name, module, patch, sharded)
        elif name in skipped:
            parts.append(Part(name, "block", "", skipped[name]))
        elif class_of(module) not in KNOWN and looks_like_block(module):
            parts.append(Part(name, "block", "", learn(class_of(module))))
        else:
            continue
        done.append(name)
    return PatchReport(parts, notes)


def patched_parts(model: nn.Module) -> PatchReport | None:
    """The report of a model as it is now, without its `vitfast.ViT`s; None where no block of it is patched."""
    if not any("_vitfast" in module.__dict__ for module in model.modules()):
        return None
    report = report_of(model, {})
    vits = [name for name, module in model.named_modules() if isinstance(module, ViT)]
    own = lambda part: not any(part.name.startswith(f"{name}." if name else "") for name in vits)  # noqa: E731
    return PatchReport([part for part in (*report.fused, *report.left) if own(part)])
