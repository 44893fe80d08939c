"""Names of weights: what wrappers put into them, and the same weights under other names."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

# of DataParallel and DDP before all keys; of torch.compile, FSDP and checkpointing wherever a part was wrapped
LEADING = "module."
INSIDE = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


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
        vars(state)["_metadata"] = {rename(f"{module}.")[:-1]: version for module, version in versions.items()}
    return state


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers under the names that torch loads them by; a state-dict hook may leave some out."""
    return {
        f"{at}.{name}" if at else name: value
        for at, module in model.named_modules(remove_duplicate=False)
        for name, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None and name not in module._non_persistent_buffers_set
    }
