"""Kernels touch nothing but what is theirs: guarded_kernels.py in processes, on memory whose ends fault."""

from pathlib import Path

import pytest
import torch
from attention_cases import INTERPRETED, draw
from guarded_memory import CASE, run_guarded

from vitfast import ops
from vitfast.kernels.triton import attention, layer_norm, linear, mlp, mlp_gated

in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="compute-sanitizer is there for kernels on a GPU")

CASES = Path(__file__).parent / "guarded_kernels.py"
GROUPS = ("attention", "prepared_model", "mlp", "linear", "statistics", "norm", "far")


@in_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_kernel_touches_what_is_not_its_own(group, request, tmp_path_factory):
    """Reads and writes past either end of any tensor, also those of no consequence, and results that nobody wrote."""
    more = ["--all"] * request.config.getoption("--all")
    wrong = run_guarded(tmp_path_factory, CASES, "-k", f"test_{group}", *more)
    assert wrong is None, wrong


def test_group_of_cases_is_left_out():
    names = {line.split("(")[0][9:] for line in CASES.read_text().splitlines() if line.startswith("def test_")}
    assert names == set(GROUPS)


PLANTED = """
import ctypes
import pytest
import torch

@pytest.mark.parametrize("placement", ["end", "begin"])
def test_planted(placement):
    t = torch.empty(24, dtype=torch.float16)
    assert t.isnan().all()
    number = ctypes.c_int16.from_address(t.data_ptr() + {at})
    {what}
"""
READ, WRITE = "assert number.value", "number.value = 5"
BOTH = {"end", "begin"}


@in_interpreter
@pytest.mark.parametrize(
    "what, at, seen",
    [
        (READ, 64, {"end"}), (READ, -2, {"begin"}), pytest.param(READ, 48 << 20, BOTH, marks=pytest.mark.full),
        # between the end and what it is aligned to
        (WRITE, 48, BOTH), pytest.param(WRITE, 46, set(), marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_memory_has_no_guard(what, at, seen, tmp_path, tmp_path_factory):
    """Around a tensor of 48 bytes, which ends 16 bytes before the memory that faults or begins behind it."""
    planted = tmp_path / "planted.py"
    planted.write_text(PLANTED.format(what=what, at=at))
    for placement in BOTH:
        wrong = run_guarded(tmp_path_factory, planted, "-k", placement)
        assert (wrong is not None) == (placement in seen), wrong
        assert wrong is None or wrong.startswith(f"{CASE}test_planted[{placement}]"), wrong


def test_what_no_kernel_wrote_is_right_by_luck(monkeypatch, device):
    """Of ops whose kernels do nothing all is NaN, on every device: they have made the memory themselves."""
    x, w1, w2 = (draw(*shape, device=device).half() for shape in ((2, 5, 64), (128, 64), (64, 64)))
    x.requires_grad_()
    for module in (attention, mlp_gated, layer_norm, linear, mlp):
        monkeypatch.setattr(module, "launch", lambda *given, **more: None)
    results = {
        "layer_norm": ops.layer_norm(x, w2[0], None, 1e-6),
        "linear": ops.linear(x, w1, norm="rms", act="gelu"),
        "mlp": ops.mlp(x, None, None, w1, None, w2, None, gated=True),
        "attention": ops.attention(*(x.unflatten(2, (2, 32)),) * 3),
    }
    for name, out in results.items():
        assert out.isnan().all(), name
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
        assert grad.isnan().all(), name
