"""Whether a part of a block may run as one op, and why not: decided at every call, from the modules as they are.

An op reads the weights of the modules it absorbs and skips their forwards. That is right only where nobody has
changed what those forwards do: a LoRA adapter, a hook, a parametrization or a quantised weight must never be ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules import module as torch_module

from vitfast.switches import exporting

# the methods of the model's class as they were when vitfast was imported
METHODS: dict[str, Any] = {}
PLAIN_TENSORS = (Parameter, Tensor)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# each class an op may stand in for, and the forward that it had when vitfast was imported
FORWARDS: dict[type, Callable] = {}


def stands_for(*kinds: type[nn.Module]) -> None:
    """Note the forward that ops compute in place of these classes."""
    FORWARDS.update({kind: kind.forward for kind in kinds})


stands_for(nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Conv2d, nn.Dropout, nn.Identity, nn.GELU, nn.SiLU)
stands_for(nn.Softmax, nn.Sequential)


def plain(module: nn.Module | None, *kinds: type) -> bool:
    """Whether `module` is exactly one of `kinds` and does what its class says: no hook, no patch, plain weights."""
    kind = type(module)
    return (
        module is not None
        and kind in kinds
        and type(module).forward is FORWARDS[kind]
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not ("forward" in module.__dict__ and patched(module))
        and ("_views" not in module.__dict__ or not any(map(why_changed, module.__dict__["_views"].values())))
        and (not module._parameters or _plain_weights(module))
    )


def patched(module: nn.Module, method: str = "forward") -> bool:
    """Whether the instance has another method than its class. Its own, put back by who took a wrapper off, is none."""
    if method not in module.__dict__:
        return False
    found = module.__dict__[method]
    own = getattr(found, "__self__", None) is module
    return not own or getattr(found, "__func__", None) is not getattr(type(module), method)


def note_methods(*kinds: type) -> None:
    """Note the methods that a model calls of itself: what somebody puts in their place is to be asked."""
    for kind in kinds:
        for name, member in vars(kind).items():
            if not name.startswith("__") and (callable(member) or isinstance(member, (property, staticmethod))):
                METHODS[name] = getattr(kind, name)


def replaced(model: nn.Module, name: str) -> bool:
    """Whether the model's class, or the model itself, has another method of this name than ViT has."""
    of_class = getattr(type(model), name) is not METHODS[name]
    return of_class or (callable(model.__dict__.get(name)) and patched(model, name))


def _plain_weights(module: nn.Module) -> bool:
    for parameter in module._parameters.values():
        if parameter is not None and type(parameter) not in PLAIN_TENSORS:
            # torch.export puts stand-ins of other classes in the place of parameters
            return exporting()
    return True


def why_not_plain(module: nn.Module, *kinds: type) -> str | None:
    """The reason for which `plain` is False, in words; None where it is True."""
    if type(module) not in kinds:
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        expected = " or ".join(kind.__name__ for kind in kinds)
        return f"is parametrized ({name})" if hasattr(module, "parametrizations") else f"is {name}, not {expected}"
    if type(module).forward is not FORWARDS[type(module)]:
        return f"is a {type(module).__name__}, whose forward was patched"
    return why_changed(module)


def why_changed(module: nn.Module) -> str | None:
    """What somebody did to this one module, whatever its class is, in words; None for nothing."""
    for hooks in HOOKS:
        if getattr(module, hooks):
            return f"has {hooks.strip('_').replace('_', ' ')}"
    if patched(module):
        return "has a patched forward"
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) not in PLAIN_TENSORS:
            return f"has a {name} of class {type(parameter).__name__}"
    for name, view in module.__dict__.get("_views", {}).items():
        if why := why_changed(view):
            return f"has a vit-pytorch {name!r} that {why}"
    return None


def watched_view(module: nn.Module, name: str) -> nn.Module | None:
    """What is `name` of `module` in vit-pytorch and no part of it here, where somebody watches that."""
    view = module.__dict__.get("_views", {}).get(name)
    return None if view is None or why_changed(view) is None else view


def any_global_hook() -> bool:
    """Whether a hook for all modules is registered (profilers, FLOP counters): then every module must run."""
    return bool(torch_module._has_any_global_hook())


class Row(NamedTuple):
    """One part of the model: what runs it, and why nothing better does."""

    part: str
    path: str
    reason: str


class Explanation:
    """What `explain` found; `str()` is a table."""

    def __init__(self, rows: list[Row], notes: list[str]):
        self.rows = rows
        self.notes = notes

    @property
    def all_fused(self) -> bool:
        return all(row.path.startswith("op") for row in self.rows)

    def __str__(self) -> str:
        rows = [Row("part", "runs as", "because"), *self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{row.part:<{widths[0]}}  {row.path:<{widths[1]}}  {row.reason}".rstrip() for row in rows]
        return "\n".join([*lines, *self.notes])

    __repr__ = __str__


def explain(model: nn.Module) -> Explanation:
    """Which part of the model runs as which op at the next call, and where not, why.

    Args:
        model: a `vitfast.ViT`, or a module that contains one.

    Returns:
        An `Explanation`: `str()` prints a table, `.rows` has (part, path, reason).

    Raises:
        TypeError: there is no vitfast model inside.
    """
    from vitfast import switches
    from vitfast.ops._register import implementations
    from vitfast.vit import ViT

    vits = [(name, m) for name, m in model.named_modules() if isinstance(m, ViT)]
    if not vits:
        raise TypeError(f"explain: model must be or contain a vitfast.ViT, got {type(model).__name__}")
    rows = []
    for prefix, vit in vits:
        for part, op_name, reasons in vit.fusion_report():
            name = f"{prefix}.{part}" if prefix else part
            if switches.stock_only() or vit.exportable:
                why = "its exportable is True" if vit.exportable else "set_exportable(True) is on"
                rows.append(Row(name, "stock operators", why))
            elif reasons:
                rows.append(Row(name, "its modules' own forward", "; ".join(reasons)))
            else:
                rows.append(Row(name, f"op {op_name}", ""))
    device = next(vits[0][1].parameters()).device
    without: dict[tuple[str, str], list[str]] = {}
    for op, devices in implementations().items():
        here = devices.get(device.type)
        if here is not None and here.kernel is None:
            without.setdefault((here.path, here.why_no_kernel), []).append(op)
    notes = [f"on {device.type}, {path} ({why}): {', '.join(found)}" for (path, why), found in without.items()]
    return Explanation(rows, notes + (_built_in(rows, device) if device.type == "cuda" else []))


def _built_in(rows: list[Row], device: torch.device) -> list[str]:
    """What was measured, on cards like this one, of each kernel that may run a part."""
    from vitfast import dispatch

    ops = {row.path.removeprefix("op ") for row in rows}
    return [
        f"built in, {name}: {words}"
        for name in dispatch.KERNELS
        if name.removesuffix("_backward") in ops
        for words in dispatch.facts(name, device.index or 0)["builtin"].values()
    ]
