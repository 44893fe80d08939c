"""Whether weights fit a model, said once and completely."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from torch.nn.parameter import is_lazy
from torch.overrides import is_tensor_like

from vitfast.weights.hints import layout_hint, own_name, prefix_hints
from vitfast.weights.names import own_weights

# torch copies any of these to any other
COPIED = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool}


def check_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
    """Compare keys and shapes before anything is copied.

    Args:
        strict: missing and unexpected keys are errors too; wrong shapes always are.

    Raises:
        RuntimeError: one error with all missing, unexpected and wrongly shaped keys, and values that are no tensors.
    """
    own = own_weights(model)
    missing, unexpected, problems = [k for k in own if k not in state_dict], [k for k in state_dict if k not in own], []
    for key, value in own.items():
        if key not in state_dict or is_lazy(value):
            continue
        new = state_dict[key]
        if not is_tensor_like(new):
            problems.append(f"no tensor: {key} must be a torch.Tensor, got {type(new).__name__}")
        # torch takes one value for a scalar
        elif new.shape != value.shape and not (value.dim() == 0 and tuple(new.shape) == (1,)):
            problems.append(f"wrong shape: {key} must be {list(value.shape)}, got {list(new.shape)}")
    _refuse(model, state_dict, missing if strict else [], unexpected if strict else [], problems)


def translates(model: nn.Module, state_dict: Mapping[str, Any], *plain: Callable) -> bool:
    """Whether only loading tells which keys fit: a load hook, extra state, or a module that loads in its own way.

    Args:
        plain: implementations of `_load_from_state_dict` that do not, beside that of nn.Module.
    """
    plain = (nn.Module._load_from_state_dict, *plain)
    return any(key.endswith(_EXTRA_STATE_KEY_SUFFIX) for key in state_dict) or any(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or type(module).set_extra_state is not nn.Module.set_extra_state
        or getattr(module._load_from_state_dict, "__func__", None) not in plain
        for module in model.modules()
    )


def copies(model: nn.Module, state_dict: Mapping[str, Tensor]) -> bool:
    """Whether weights of the right shapes are sure to be copied; only trying tells of other kinds of tensors."""
    own = own_weights(model)
    pairs = [(own[key], value) for key, value in state_dict.items() if key in own]
    return not torch.__future__.get_swap_module_params_on_conversion() and all(
        _dense(held) and _dense(value) and not held.is_inference() and held.is_contiguous() for held, value in pairs
    )


def _dense(value: Tensor) -> bool:
    plain = type(value) in (Tensor, nn.Parameter) and not value.is_meta and value.layout is torch.strided
    return plain and value.dtype in COPIED


def load_or_put_back(model: nn.Module, state_dict: Mapping[str, Any], strict: bool, load: Callable[[], Any]) -> Any:
    """Let torch load with all hooks, once, and put everything back when anything does not fit.

    A copy of the weights is held meanwhile. What a hook did outside the model stays.

    Args:
        load: the loading itself, with strict=False; returns missing and unexpected keys.

    Raises:
        RuntimeError: as `check_state_dict`, of the keys that the hooks left.
        Exception: what a hook raised.
    """
    put_back, problems = _keep(model), []
    messages: list[list[str]] = []

    def take_messages(*_: Any) -> None:
        for found in messages:
            problems.extend(found)
            found.clear()

    # both run last of the model's own: torch hands its list of messages to the first, and raises after the second
    before = model._register_load_state_dict_pre_hook(lambda *args: messages.append(args[-1]))
    after = model.register_load_state_dict_post_hook(take_messages)
    try:
        result = load()
    except BaseException:
        put_back()
        raise
    finally:
        before.remove()
        after.remove()
    missing, unexpected = (result.missing_keys, result.unexpected_keys) if strict else ([], [])
    if missing or unexpected or problems:
        put_back()
    sizes = r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)\."
    problems = [re.sub(sizes, r"wrong shape: \1 must be \3, got \2", message) for message in problems]
    _refuse(model, state_dict, missing, unexpected, problems)
    return result


def load_most(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load what fits by name, unless most of the model and most of the weights would stay aside.

    Raises:
        RuntimeError: as `check_state_dict`; such weights have other names, and a generic one among them fits.
    """
    put_back = _keep(model)
    result = model.load_state_dict(state_dict, strict=False)
    fit = len(state_dict) - len(result.unexpected_keys)
    if not fit or 2 * fit < min(len(own_weights(model)), len(state_dict)):
        put_back()
        _refuse(model, state_dict, result.missing_keys, result.unexpected_keys, [])


def _keep(model: nn.Module) -> Callable[[], None]:
    """Remember all parts, attributes and weights; what is returned puts them back."""
    tables, tensors = [], {}
    for module in model.modules():
        held = vars(module)
        tables += [(table, dict(table)) for table in (held, *held.values()) if isinstance(table, dict)]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                place = tensor.data if is_lazy(tensor) else tensor.detach()
                tensors[id(tensor)] = tensor, type(tensor), place, place.clone()

    @torch.no_grad()
    def put_back() -> None:
        for table, copy in tables:
            table.clear()
            table.update(copy)
        for tensor, kind, place, value in tensors.values():
            with torch.inference_mode(place.is_inference()):
                # what torch could not write into cannot be written into here either
                if not (_dense(place) and torch.equal(place, value)):
                    place.copy_(value)
                tensor.data = place
            if type(tensor) is not kind:  # a lazy one that has its shape now
                tensor.__class__ = kind

    return put_back


def _refuse(
    model: nn.Module, state_dict: Mapping[str, Any], missing: list[str], unexpected: list[str], problems: list[str]
) -> None:
    if not (missing or unexpected or problems):
        return
    own = own_weights(model)
    rename = own_name(own)
    foreign = [key for key in state_dict if rename(key) not in own]
    shape = lambda key: f" {list(own[key].shape)}" if key in own and not is_lazy(own[key]) else ""  # noqa: E731
    problems = [f"missing: {k}{shape(k)}" for k in missing] + [f"unexpected: {k}" for k in unexpected] + problems
    raise RuntimeError(
        f"load_state_dict: {len(problems)} keys do not fit {type(model).__name__}; nothing was loaded."
        + "\n  ".join([layout_hint(foreign), *problems, *prefix_hints(state_dict, own)])
    )
