"""Whether weights fit a model, said once and completely."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from torch.nn.parameter import is_lazy
from torch.overrides import is_tensor_like

# of DataParallel and DDP before all keys; of torch.compile, FSDP and checkpointing wherever a part was wrapped
LEADING = "module."
INSIDE = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

CONVERTED = "timm.models.vision_transformer.checkpoint_filter_fn(state_dict, timm_model) gives them timm's"
RENAMED = "rename them, and join query, key and value to one attn.qkv"
# (a key that only this layout has, whose layout it is, how to get to ours)
LAYOUTS = (
    (r"(^|\.)embeddings\.patch_embeddings?\.", "Hugging Face's transformers", RENAMED),
    (r"(^|\.)transformer\.resblocks\.\d", "OpenAI's CLIP and open_clip", CONVERTED),
    (r"(^|\.)encoder\.layers\.encoder_layer_\d", "torchvision", RENAMED.replace("query, key and value", "in_proj")),
    (r"(^|/)Transformer/encoderblock_\d", "JAX", "timm.create_model(name, checkpoint_path=...) reads the .npz file"),
    (r"(^|\.)decoder_blocks\.\d", "masked autoencoders (MAE)", "leave out mask_token and what starts with decoder_"),
    (r"^mask_token$", "facebook's DINOv2", CONVERTED),
    (r"^(preprocessor\.patchifier|radio_model|beit3|encoder\.beit3)\.", "AIMv2, RADIO or BEiT-3", CONVERTED),
)


def without_wrappers(key: str) -> str:
    """The key as the model has it that torch.compile, DDP, FSDP or activation checkpointing wrapped."""
    key = INSIDE.sub("", key)
    return without_wrappers(key[len(LEADING) :]) if key.startswith(LEADING) else key


def rename_keys(state_dict: Mapping[str, Any], rename: Callable[[str], str]) -> OrderedDict[str, Any]:
    """The state dict under other keys, with the versions of the modules that wrote it.

    Raises:
        ValueError: two keys would become one; names them.
    """
    state: OrderedDict[str, Any] = OrderedDict()
    origin: dict[str, str] = {}
    for key, value in state_dict.items():
        new = rename(key)
        if new in state:
            raise ValueError(f"state dict: {origin[new]!r} and {key!r} are both {new!r}: leave one out")
        state[new], origin[new] = value, key
    versions = getattr(state_dict, "_metadata", None)
    if versions is not None:
        state._metadata = {rename(f"{module}.")[:-1]: version for module, version in versions.items()}
    return state


def check_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
    """Compare keys and shapes before anything is copied.

    Args:
        strict: missing and unexpected keys are errors too; wrong shapes always are.

    Raises:
        RuntimeError: one error with all missing, unexpected and wrongly shaped keys, and values that are no tensors.
    """
    own, given = entries(nn.Module.state_dict(model)), entries(state_dict)
    missing, unexpected, problems = [k for k in own if k not in given], [k for k in given if k not in own], []
    for key, value in own.items():
        if key not in given or is_lazy(value):
            continue
        new = given[key]
        if not is_tensor_like(new):
            problems.append(f"no tensor: {key} must be a torch.Tensor, got {type(new).__name__}")
        # torch takes one value for a scalar
        elif new.shape != value.shape and not (value.dim() == 0 and tuple(new.shape) == (1,)):
            problems.append(f"wrong shape: {key} must be {list(value.shape)}, got {list(new.shape)}")
    _refuse(model, state_dict, missing if strict else [], unexpected if strict else [], problems)


def entries(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Without modules' extra state, which may be anything, and which torch hands on unread."""
    return {key: value for key, value in state_dict.items() if not key.endswith(_EXTRA_STATE_KEY_SUFFIX)}


def translates(model: nn.Module, *plain: Callable) -> bool:
    """Whether only loading tells which keys fit: a load hook, or a module that translates what older releases wrote.

    Args:
        plain: implementations of `_load_from_state_dict` that do not, beside that of nn.Module.
    """
    plain = (nn.Module._load_from_state_dict, *plain)
    return any(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or getattr(module._load_from_state_dict, "__func__", None) not in plain
        for module in model.modules()
    )


def load_or_put_back(model: nn.Module, state_dict: Mapping[str, Any], strict: bool, load: Callable[[], Any]) -> Any:
    """Let torch load with all hooks, once, and put everything back when anything does not fit.

    A copy of the weights is held meanwhile. What a hook did outside the model stays.

    Args:
        load: the loading itself, with strict=False; returns missing and unexpected keys.

    Raises:
        RuntimeError: as `check_state_dict`, of the keys that the hooks left.
        Exception: what a hook raised.
    """
    put_back, messages, problems = _keep(model), [], []

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
    own = nn.Module.state_dict(model)
    foreign = [key for key in state_dict if key not in own]
    shape = lambda key: f" {list(own[key].shape)}" if key in own and not is_lazy(own[key]) else ""  # noqa: E731
    problems = [f"missing: {k}{shape(k)}" for k in missing] + [f"unexpected: {k}" for k in unexpected] + problems
    raise RuntimeError(
        f"load_state_dict: {len(problems)} keys do not fit {type(model).__name__}; nothing was loaded."
        + "\n  ".join([_layout_hint(foreign), *problems, *_prefix_hints(foreign, len(foreign) == len(state_dict), own)])
    )


def _layout_hint(keys: list[str]) -> str:
    """Whose names these are, where they are known."""
    for pattern, whose, how in LAYOUTS:
        if any(re.search(pattern, key) for key in keys):
            return f" These weights have the names of {whose}: {how}"
    return ""


def _prefix_hints(keys: list[str], every: bool, own: Mapping[str, Any]) -> Iterator[str]:
    """What stands before the model's keys, or within them, and would have to be taken off. every: no key fits."""
    take = "pass {}; load_checkpoint takes key={!r}"
    prefixes = [p for p, n in Counter(_prefixes(keys, own)).items() if 2 * n > len(own)]
    firsts = {f"{key.partition('.')[0]}." for key in keys}
    if not prefixes and len(firsts) == 1 and not any(key.startswith(*firsts) for key in own):
        prefixes = [*firsts]
    if len(prefixes) > 1:
        under = " and ".join(f"under {p!r}" for p in prefixes)
        yield f"(such weights stand {under}: {take.format('one of them', prefixes[0][:-1])})"
    elif prefixes and every and all(key.startswith(prefixes[0]) for key in keys):
        put = ", which a wrapper put there" if not without_wrappers(prefixes[0]) else ""
        yield f"(every key starts with {prefixes[0]!r}{put}: take it off)"
    elif prefixes:
        yield f"(such weights stand under {prefixes[0]!r}: {take.format('them alone', prefixes[0][:-1])})"
    else:
        inside = {f"{found[2]}." for key in keys if (found := INSIDE.search(key)) and INSIDE.sub("", key) in own}
        if inside:
            yield f"(keys hold {' and '.join(map(repr, sorted(inside)))}, which a wrapper put there: take it off)"


def _prefixes(keys: list[str], own: Mapping[str, Any]) -> Iterator[str]:
    for key in keys:
        for dot in re.finditer(r"\.", key):
            if INSIDE.sub("", key[dot.end() :]) in own:
                yield key[: dot.end()]
                break
