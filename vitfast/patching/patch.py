"""`vitfast.patch`, `unpatch` and `patched`: other forwards for the blocks of a model, in place, and back."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from vitfast.model.plain import IN_PLACE, why_changed
from vitfast.model.plain import patched as patched_method
from vitfast.patching import families as families
from vitfast.patching.engine import Patch
from vitfast.patching.find import known_blocks, stems
from vitfast.patching.known import KNOWN, LIBRARIES, class_of, learn
from vitfast.patching.report import PatchReport, report_of
from vitfast.patching.stem import cuts_otherwise

IN_PLACE |= {known.forward for known in (*LIBRARIES.values(), *KNOWN.values()) if known.forward is not None}


def patch(
    model: nn.Module, *, attention: bool = True, norm: bool = True, mlp: bool = True, patch_embed: bool = True
) -> PatchReport:
    """Let the blocks of a model of timm, Hugging Face, torchvision or vit-pytorch run vitfast's ops, in place.

    Only what the blocks compute with changes. Parameters, buffers, modules, their names and classes, hooks and the
    state dict stay; copies and pickles of the model stay patched. A part runs as an op where every module that the op
    stands in for is what the library built: that is asked at every call, so a hook, an adapter, a parametrization or a
    quantised weight that is put there later is run. What is not known is left as it is and named. Patching again
    changes what is fused to what is asked for then.

    Args:
        model: any module; changed in place. Before or after `torch.compile`, DDP, `fully_shard` and peft.
        attention: fuse attention with its projections and its residual.
        norm: fuse the norms, in the products that follow where there is one.
        mlp: fuse the MLP with its residual.
        patch_embed: run the convolution that cuts the patches as a product.

    Returns:
        What is fused and what is left, and why: a `PatchReport`.

    Raises:
        TypeError: model is no `nn.Module`, for example a name or a class.
        NotImplementedError: it is, or holds, an `nn.DataParallel`: its copies would run the weights of the original.
    """
    _check("patch", model)
    wanted = (bool(attention), bool(norm), bool(mlp), bool(patch_embed))
    skipped: dict[str, str] = {}
    for name, module in list(known_blocks(model)):
        kind = class_of(module)
        why = learn(kind) or _taken(module)
        if why:
            skipped[name] = why
            continue
        learnt = {type(inner) for inner in module.modules() if not learn(type(inner))}
        _put(module, Patch(*wanted, kind, tuple(sorted(learnt - {kind}, key=lambda each: each.__qualname__)), {}))
    for _, stem in list(stems(model)):
        if not cuts_otherwise(stem) and not _taken(stem):
            _put(stem, Patch(*wanted, nn.Conv2d, (), {}))
    return report_of(model, skipped)


def unpatch(model: nn.Module) -> None:
    """Take back what `patch` did: the model computes what it did before, bit for bit.

    Where something else was put on top of a patched forward since (accelerate's hooks), that stays, and what is
    below it runs the library's forward again.

    Raises:
        TypeError: model is no `nn.Module`.
    """
    _check("unpatch", model)
    for module in model.modules():
        module.__dict__.pop("_vitfast", None)
        for name in ("forward", *BESIDE):
            if _is_ours(module.__dict__.get(name)):
                del module.__dict__[name]


@contextlib.contextmanager
def patched(model: nn.Module, **parts: bool) -> Iterator[PatchReport]:
    """`patch` for a while: `with vitfast.patched(model) as report:`; parts as there.

    Afterwards the model is what it was before, patched where it was patched.
    """
    _check("patched", model)
    before = [(module, module.__dict__.get("_vitfast")) for module in model.modules()]
    try:
        yield patch(model, **parts)
    finally:
        unpatch(model)
        for module, held in before:
            # read in a process whose library has another forward, it did nothing
            if held is not None and held.kind in KNOWN:
                _put(module, held)


def _check(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"{type(model).__name__} {model!r:.60}"
        raise TypeError(f"{function}: model must be a module (an instance of torch.nn.Module), got {got}")
    if function == "patch" and any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise NotImplementedError(
            "patch: nn.DataParallel copies modules at each call, and a patched copy would run the original's weights, "
            "got a model with one; use DistributedDataParallel"
        )


def _taken(module: nn.Module) -> str:
    """Why this module cannot be patched."""
    why = why_changed(module) if "forward" in module.__dict__ and "_vitfast" not in module.__dict__ else None
    return why if why == "has a patched forward" else ""


def _put(module: nn.Module, patch: Patch) -> None:
    held = module.__dict__
    held["_vitfast"] = patch
    for name, function in (("forward", KNOWN[patch.kind].forward), *BESIDE.items()):
        found: Any = held.get(name)
        # what somebody has put over a patched forward calls that; a shallow copy has the original's
        if _owner(found) is not module if _is_ours(found) else not patched_method(module, name):
            # of a method Dynamo asks what code it is, of a partial which one: no two blocks would share a graph
            held[name] = types.MethodType(function, module)


def _is_ours(found: Any) -> bool:
    function = found.__func__ if isinstance(found, types.MethodType) else getattr(found, "func", None)
    return isinstance(found, (types.MethodType, functools.partial)) and function in IN_PLACE


def _owner(found: Any) -> Any:
    return found.__self__ if isinstance(found, types.MethodType) else found.args[0]


class _Method(functools.partial):
    """A method as it is saved and copied: pickle would look for one of its name in the class."""

    def __reduce__(self) -> tuple:
        return _bound, (self.func, *self.args)


def _bound(function: Any, module: nn.Module) -> types.MethodType:
    return types.MethodType(function, module)


def _state(module: nn.Module) -> dict[str, Any]:
    """What is saved and copied of a patched module."""
    state = type(module).__getstate__(module)
    methods = {name: held for name, held in state.items() if isinstance(held, types.MethodType) and _is_ours(held)}
    return state | {name: _Method(held.__func__, held.__self__) for name, held in methods.items()}


def _extra_repr(module: nn.Module) -> str:
    own, patch = type(module).extra_repr(module), module.__dict__.get("_vitfast")
    if patch is None:
        return own
    wanted = [name for name, on in zip(patch._fields, patch[:4], strict=False) if on]
    return ", ".join([*([own] if own else []), f"vitfast.patch: {' '.join(wanted) or 'nothing'}"])


def _refuse_replica(module: nn.Module) -> nn.Module:
    if module.__dict__.get("_vitfast") is None:
        return type(module)._replicate_for_data_parallel(module)
    raise NotImplementedError(
        f"nn.DataParallel cannot copy a {type(module).__name__} that vitfast.patch has changed: the copy would run the "
        "original's weights; use DistributedDataParallel, or vitfast.unpatch(model)"
    )


def _refuse_script(module: nn.Module) -> nn.Module:
    if module.__dict__.get("_vitfast") is None:
        return module
    raise NotImplementedError(
        f"torch.jit.script cannot compile a {type(module).__name__} that vitfast.patch has changed; use "
        "torch.jit.trace or torch.export.export, or vitfast.unpatch(model) before"
    )


# what a patched module has of its own beside its forward
BESIDE = {
    "extra_repr": _extra_repr,
    "__getstate__": _state,
    "__prepare_scriptable__": _refuse_script,
    "_replicate_for_data_parallel": _refuse_replica,
}
IN_PLACE |= {*BESIDE.values()}
