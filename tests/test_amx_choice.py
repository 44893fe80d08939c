"""What runs on a CPU with AMX, which may not be this one: its feature is injected."""

import sys

import pytest
import torch
import torch.nn.functional as F
from small_models import images_for, tiny

import vitfast
from vitfast import ops
from vitfast.kernels import cpu as cpu_kernels
from vitfast.ops import _register

UNITS = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16", torch.float32: None}
# a CPU without AVX-512 prepares no bf16
PREPARED = [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()
every_dtype = pytest.mark.parametrize("dtype", UNITS, ids=str)


@pytest.fixture(params=[False, True], ids=["without AMX", "with AMX"])
def amx(request, monkeypatch):
    """Whether torch says that the CPU has it."""
    known = dict(torch.cpu.get_capabilities())
    given = known | {"amx_bf16": request.param, "amx_fp16": request.param}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: given)
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """Which C++ kernels for whole parts of a block were called."""
    seen = []
    for name in ("_attention", "linear", "mlp", "block", "embed"):
        # the one function behind both of attention's
        place = sys.modules["vitfast.kernels.cpu.attention"] if name == "_attention" else cpu_kernels
        function = getattr(place, name)
        counted = lambda *args, name=name, function=function, **kwargs: seen.append(name) or function(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(place, name, counted)
    return seen


def heads(dtype):
    return [torch.randn(2, 9, 2, 16).to(dtype) for _ in range(3)]


@every_dtype
def test_attention_runs_where_stock_is_twice_as_fast(dtype, amx, calls):
    """The op, the packed op and packed sequences: ours without AMX for the dtype, torch's with it."""
    q, k, v = heads(dtype)
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    outs = [
        ops.attention(q, k, v), ops.attention(q, k, v, return_lse=True)[0],
        ops.attention_qkv(torch.stack([q, k, v], 2)),
        torch.stack([ops.attention_varlen(q[i], k[i], v[i], starts) for i in range(2)]),
    ]  # fmt: skip
    assert bool(calls) is not (amx and UNITS[dtype] is not None)
    exact = F.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
    for out in outs[:3]:
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)
    for rows in (slice(0, 4), slice(4, 9)):
        part = ops.attention(*(t[:, rows] for t in (q, k, v)))
        torch.testing.assert_close(outs[3][:, rows], part, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", PREPARED, ids=str)
def test_prepared_model_multiplies_without_amx(dtype, amx, calls):
    """Blocks in C++ kernels of AVX-512 where oneDNN and torch have AMX."""
    model = tiny().to(dtype)
    images = images_for(model).to(dtype)
    prepared = vitfast.prepare(model, dtype)
    with torch.no_grad():
        exact = tiny().double()(images.double())
    found = prepared(images)
    assert (found.double() - exact).norm() <= 0.05 * exact.norm()
    if amx and dtype is torch.bfloat16:
        assert not calls and "by=oneDNN" in str(prepared) and "by=vitfast" not in str(prepared)
    elif "by=vitfast" in str(prepared):
        assert "block" in calls
    else:
        assert "_attention" in calls


def test_table_names_a_kernel_that_does_not_run(amx):
    """`vitfast info` on such a CPU."""
    for name, found in _register.implementations().items():
        assert ("AMX" in found["cpu"].path) is (amx and name.startswith("attention"))
