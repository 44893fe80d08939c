"""Whether a part of a block may run as one op, and why not: decided at every call, from the modules as they are.

An op reads the weights of the modules it absorbs and skips their forwards. That is right only where nobody has
changed what those forwards do: a LoRA adapter, a hook, a parametrization or a quantised weight must never be ignored.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.nn.modules import module as torch_module

from vitfast.choose.exportable import exporting

# the methods of the model's class as they were when vitfast was imported
METHODS: dict[str, Any] = {}
PLAIN_TENSORS = (Parameter, Tensor)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# each class an op may stand in for, and the forward that it had when vitfast was imported, or learnt of the class
FORWARDS: dict[type, Callable] = {}
# what `vitfast.patch` puts in the place of forwards: it computes the same
IN_PLACE: set[Callable] = set()


def stands_for(*kinds: type[nn.Module]) -> None:
    """Note the forward that ops compute in place of these classes."""
    FORWARDS.update({kind: kind.forward for kind in kinds})


stands_for(nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Conv2d, nn.Dropout, nn.Identity, nn.GELU, nn.SiLU)
stands_for(nn.Softmax, nn.Sequential)


def plain(module: nn.Module | None, *kinds: type) -> bool:
    """Whether `module` is exactly one of `kinds` and does what its class says: no hook, no patch, plain weights."""
    if module is None:
        return False
    kind = type(module)
    return kind in kinds and does_what_its_class_says(module, kind)


def does_what_its_class_says(module: nn.Module, kind: type) -> bool:
    """No hook, no patch, plain weights; kind: its class, one of `FORWARDS`."""
    held = module.__dict__
    return (
        kind.forward is FORWARDS[kind]  # type: ignore[attr-defined]
        and not held["_forward_hooks"]
        and not held["_forward_pre_hooks"]
        and not held["_backward_hooks"]
        and not held["_backward_pre_hooks"]
        and not ("forward" in held and patched(module))
        # of what is not in a `__dict__` a compiler's graph does not ask again, of attributes it does
        and (not is_compiling() or module.forward is not None)
        and ("_views" not in held or not any(map(why_changed, held["_views"].values())))
        and (not held["_parameters"] or plain_weights(module))
    )


def patched(module: nn.Module, method: str = "forward") -> bool:
    """Whether the instance has another method than its class. Its own, put back by who took a wrapper off, is none."""
    if method not in module.__dict__:
        return False
    found = module.__dict__[method]
    # by its class: Dynamo does not find `__self__` by a getattr with a default
    if isinstance(found, types.MethodType):
        own = found.__func__ in IN_PLACE or found.__func__ is getattr(type(module), method)
        return not own or found.__self__ is not module
    return not (isinstance(found, functools.partial) and found.func in IN_PLACE and found.args == (module,))


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


def plain_weights(module: nn.Module) -> bool:
    """Whether no parameter is of a class that computes otherwise, as quantised ones are."""
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
