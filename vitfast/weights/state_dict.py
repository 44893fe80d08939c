"""Whether weights fit a model, said once and completely."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from torch.nn.parameter import is_lazy

PREFIXES = ("module.", "_orig_mod.")


def check_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
    """Compare keys and shapes before anything is copied.

    Args:
        strict: missing and unexpected keys are errors too; wrong shapes always are.

    Raises:
        RuntimeError: one error with all missing, unexpected and wrongly shaped keys, and values that are no tensors.
    """
    # a module's extra state may be anything, and torch hands it on unread
    entries = lambda state: {k: v for k, v in state.items() if not k.endswith(_EXTRA_STATE_KEY_SUFFIX)}  # noqa: E731
    own, state_dict = entries(nn.Module.state_dict(model)), entries(state_dict)
    problems = []
    if strict:
        problems += [f"missing: {key} {list(own[key].shape)}" for key in own if key not in state_dict]
        problems += [f"unexpected: {key}" for key in state_dict if key not in own]
    for key, value in own.items():
        if key not in state_dict or is_lazy(value):
            continue
        given = state_dict[key]
        if not isinstance(given, Tensor):
            problems.append(f"no tensor: {key} must be a torch.Tensor, got {type(given).__name__}")
        elif tuple(given.shape) != tuple(value.shape):
            problems.append(f"wrong shape: {key} must be {list(value.shape)}, got {list(given.shape)}")
    if problems:
        count = len(problems)
        prefix = next((p for p in PREFIXES if state_dict and all(key.startswith(p) for key in state_dict)), None)
        if prefix:
            problems.append(f"(every key starts with {prefix!r}, which a wrapper put there: take it off)")
        raise RuntimeError(
            f"load_state_dict: {count} keys do not fit {type(model).__name__}; nothing was loaded.\n  "
            + "\n  ".join(problems)
        )
