"""Which dtypes weights may have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

NAMES = 5
# weights of eight bits or of integers mean something together with a scale, of which a ViT knows nothing
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_dtypes(weights: Mapping[str, Tensor], of: str) -> None:
    """Refuse what a copy into a model's weights would convert without a word.

    Args:
        weights: those that are taken, without counters and indices of other libraries.
        of: the file or model, as the error names it.

    Raises:
        ValueError: weights of another dtype than floating point of 16 bits or more; names them.
    """
    wrong = [f"{name} is {str(value.dtype)[6:]}" for name, value in weights.items() if value.dtype not in DTYPES]
    if wrong:
        more = f" and {len(wrong) - NAMES} more" * (len(wrong) > NAMES)
        raise ValueError(
            f"{of}: weights must be float64, float32, float16 or bfloat16: {', '.join(wrong[:NAMES])}{more}"
        )
