"""Weights that are no numbers: they load, with a word."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NAMES = 5


def not_finite(state: Mapping[str, Any]) -> list[str]:
    """The names of tensors with NaN or Inf in them, found without memory of their size."""
    return [name for name, value in state.items() if isinstance(value, Tensor) and not _is_finite(value.detach())]


def _is_finite(weight: Tensor) -> bool:
    if weight.is_complex():
        weight = torch.view_as_real(weight)
    if not weight.is_floating_point() or not weight.numel() or weight.is_meta:
        return True
    # of eight bits, which no reduction takes
    weight = weight.float() if weight.element_size() == 1 else weight
    return bool(torch.stack(torch.aminmax(weight)).isfinite().all())


def warn_not_finite(state: Mapping[str, Any], of: str, stacklevel: int = 1) -> list[str]:
    """One warning that names the tensors with NaN or Inf, none where there are none; returns their names.

    Args:
        state: tensors by their names; what is no tensor is passed over.
        of: the file or model, as the warning names it.
        stacklevel: 1 for a warning at the line that calls this, 2 at the one that called that.
    """
    names = not_finite(state)
    if names:
        more = f" and {len(names) - NAMES} more" * (len(names) > NAMES)
        warnings.warn(f"{of} has NaN or Inf in {', '.join(names[:NAMES])}{more}", stacklevel=stacklevel + 1)
    return names
