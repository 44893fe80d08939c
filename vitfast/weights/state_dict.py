"""Whether weights fit a model, said once and completely."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def check_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
    """Compare keys and shapes before anything is copied.

    Args:
        strict: missing and unexpected keys are errors too; wrong shapes always are.

    Raises:
        RuntimeError: one error with all missing, unexpected and wrongly shaped keys, and values that are no tensors.
    """
    own = nn.Module.state_dict(model)
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
        raise RuntimeError(
            f"load_state_dict: {len(problems)} keys do not fit {type(model).__name__}; nothing was loaded.\n  "
            + "\n  ".join(problems)
        )
