"""The products that results are measured by: their error, and that no machine's products change what is accepted."""

import os
import subprocess
import sys

import pytest
import test_cpu_linear
import test_ops
import torch
import torch.nn.functional as F
from textbook import HALF, PIECE, Textbook

from vitfast.check.acceptance import ROUNDING

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def error_of(dtype, rows, K):
    """Of a linear layer in eps, relative."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, K).to(dtype), torch.randn(100, K).to(dtype)
    ref = x.double() @ weight.double().T
    return ((F.linear(x, weight).double() - ref).norm() / ref.norm()).item() / EPS[dtype]


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("rows, K", [(400, 64), (400, 192), (50, 3072), (4, 3072)])
def test_error_is_not_what_rounding_makes_inevitable(rows, K, dtype):
    """A yardstick that is too exact or not exact enough: the arithmetic of `vitfast.check.acceptance`, in half
    precision
    of one rounding."""
    chain = 1 if dtype in HALF else min(K, PIECE) + K / PIECE
    with Textbook():
        found = error_of(dtype, rows, K)
    assert found == pytest.approx(ROUNDING * ((chain + 1) / 2) ** 0.5, rel=0.12)


@pytest.mark.full
def test_error_depends_on_the_instructions_that_products_use():
    """As on a CPU without AVX: MKL, oneDNN and torch itself."""
    cases = [(torch.float32, 4, 192), (torch.float32, 400, 192), (torch.bfloat16, 40, 192), (torch.float16, 40, 192)]
    code = (
        f"import test_textbook as t\nwith t.Textbook():\n    print(*(t.error_of(*case) for case in {cases}))".replace(
            "torch.", "t.torch."
        )
    )
    old = {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "DNNL_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"}
    paths = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths, **old}
    )
    assert done.returncode == 0, done.stderr
    with Textbook():
        here = [error_of(*case) for case in cases]
    assert list(map(float, done.stdout.split())) == pytest.approx(here, rel=0.1)


class Exact(Textbook):
    """A CPU whose products have one rounding, and attention too."""

    def multiply(self, a, b):
        return a.double() @ b.double()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # as elsewhere: what an operator of ours calls is not seen
        if func.namespace == "vitfast":
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


class Sloppy(Textbook):
    """A CPU that rounds sums in half precision on the way, in an operator of ours as elsewhere."""

    def multiply(self, a, b):
        if a.dtype not in HALF:
            return a @ b
        total = torch.zeros((), dtype=a.dtype)
        for one, other in zip(a.split(32, -1), b.split(32, -2), strict=True):
            total = (total.float() + one.float() @ other.float()).to(a.dtype)
        return total.float()


@pytest.mark.parametrize("isa", test_cpu_linear.KERNELS)
def test_fp32_kernel_is_refused_where_stock_products_are_more_exact(isa):
    """By MKL's AVX-512 products of few rows, 2 to 4 times as exact as one accumulator; here by exact ones."""
    with Exact():
        assert error_of(torch.float32, 4, 192) < 0.25
        for shape in ((1, 8, 16), (13, 3072, 50), (197, 192, 96)):
            test_cpu_linear.test_linear_is_less_exact_than_stock(isa, torch.float32, shape)
        test_cpu_linear.test_mlp_is_less_exact_than_stock(isa, torch.float32, "gelu_tanh")
        test_cpu_linear.test_block_is_not_its_parts(isa, torch.float32)
        test_cpu_linear.test_stem_loses_a_position_or_a_pixel(isa, torch.float32, 2)


@pytest.mark.parametrize("mode, dtype", [(Exact, torch.float32), (Sloppy, torch.bfloat16), (Sloppy, torch.float16)])
@pytest.mark.parametrize("variant", ["linear full", "mlp", "attention", "patch_embed"])
def test_op_is_refused_where_stock_products_are_other_ones(variant, mode, dtype):
    with mode():
        for size in ((1, 192, 64), (197, 192, 16)):
            test_ops.test_error_is_larger_than_that_of_the_stock_operators(variant, size, dtype, torch.device("cpu"))
