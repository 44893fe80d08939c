"""Where the kernels run: on a GPU, or in Triton's interpreter, which has to be on before Triton is imported.

    TRITON_INTERPRET=1 pytest tests/kernels      on a CPU, fp32 and fp16 (the interpreter's bf16 is wrong)
    pytest tests/kernels                         on a GPU, and bf16
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = ["test_attention_gpu.py", "test_linear_gpu.py"] if INTERPRETED else []
if not INTERPRETED and not torch.cuda.is_available():
    raise pytest.UsageError("tests/kernels need a GPU, or TRITON_INTERPRET=1 in a process of their own")


def pytest_collection_modifyitems(items):
    if not INTERPRETED:
        for item in items:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")
