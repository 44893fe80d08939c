"""Where a model has what `vitfast.patch` looks for: blocks that are known, stems, and blocks that are not known."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn

from vitfast.model.plain import why_changed
from vitfast.model.vit import ViT
from vitfast.patching.known import KNOWN, LIBRARIES, class_of, learn, name_of
from vitfast.patching.stem import STEMS


def outside_vits(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` but those of a `vitfast.ViT`, which runs ops of its own."""
    inside = {id(inner) for vit in model.modules() if isinstance(vit, ViT) for inner in vit.modules()}
    return ((name, module) for name, module in model.named_modules() if id(module) not in inside)


def known_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules for whose class vitfast has a forward: blocks, and attentions or MLPs that run alone too."""
    for name, module in outside_vits(model):
        known = LIBRARIES.get(name_of(class_of(module)))
        if known is not None and known.forward is not None:
            yield name, module


def unknown_blocks(model: nn.Module) -> list[tuple[str, str]]:
    """(name, what it is) of modules with attention right inside that are not patched and hold nothing that is."""
    found, perhaps, above = {}, dict[str, str](), set[str]()
    inside_patched = set[int]()
    for name, module in outside_vits(model):
        if id(module) in inside_patched:
            continue
        patch = module.__dict__.get("_vitfast")
        # what another process has patched may be unknown here
        if patch is not None and patch.kind in KNOWN:
            inside_patched |= {id(inner) for inner in module.modules()}
        elif (
            class_of(module) in KNOWN and KNOWN[class_of(module)].role != "block" and type(module) is not nn.ModuleList
        ):
            continue
        elif (attention := _attention_in(module)) is not None:
            # a list of an attention and an MLP has no forward that could be known
            block = attention if isinstance(module, nn.ModuleList) else module
            unknown = learn(class_of(block)) or why_changed(block)
            found[name] = unknown or "was not there when the model was patched"
        else:
            # attention of its own, or a block that is all of one piece
            if "attn_drop" in module._modules:
                perhaps[name] = learn(class_of(module))
            continue
        steps = name.split(".")
        above |= {".".join(steps[:i]) for i in range(len(steps))} - {name}
    for name, what in perhaps.items():
        if name not in above and not any(name.startswith(f"{outer}." if outer else "") for outer in found):
            found[name] = what
    return [(name, what) for name, what in found.items() if name not in above]


def _attention_in(module: nn.Module) -> nn.Module | None:
    # what pools, or drops weights, makes no block
    for name, inner in module.named_children():
        word = f"{name} {type(inner).__name__}".lower()
        if (
            "pool" not in word
            and ("attention" in word or "attn" in word)
            and next(inner.parameters(), None) is not None
        ):
            return inner
    return None


def stems(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What cuts the patches in models of other libraries, a convolution in most, by name.

    Only beside blocks that are known: models that are not known are left as they are.
    """
    known = [name for name, module in known_blocks(model) if "_vitfast" in module.__dict__]
    blocks = [(name, True) for name in known] + [(name, False) for name, _ in unknown_blocks(model)]
    for name, module in outside_vits(model):
        inner = STEMS.get(name_of(class_of(module)))
        if inner is not None and _beside_known(name, blocks):
            found = module._modules.get(inner) if inner else module
            if found is not None:
                yield f"{name}.{inner}".strip("."), found


def _beside_known(name: str, blocks: list[tuple[str, bool]]) -> bool:
    """Whether the smallest part of the model that has this module and blocks has blocks that are known."""
    steps = name.split(".") if name else []
    for i in range(len(steps), -1, -1):
        prefix = "".join(f"{step}." for step in steps[:i])
        below = [patched for block, patched in blocks if block.startswith(prefix)]
        if below:
            return any(below)
    return False


def has_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 is at work somewhere in the model."""
    sharded = sys.modules.get("torch.distributed.fsdp")
    return sharded is not None and any(isinstance(module, sharded.FSDPModule) for module in model.modules())
