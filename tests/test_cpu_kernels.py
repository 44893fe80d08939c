"""The C++ kernels of every instruction set this CPU has, by the acceptance rule, on odd sizes, strides and values."""

import math

import pytest
import torch
import torch.nn.functional as F
from textbook import Textbook

from vitfast import reference
from vitfast.check.acceptance import accept
from vitfast.kernels import cpu as cpu_kernels
from vitfast.kernels import extension

KERNELS = {kernels.name: kernels for kernels in extension.require().usable_kernels()}
every_isa = pytest.mark.parametrize("isa", KERNELS)
every_dtype = pytest.mark.parametrize("dtype", cpu_kernels.FLOATS, ids=["fp32", "bf16", "fp16"])
# B, Nq, Nk, H, D: one and few keys, whole and broken panels, head dims in use and odd ones
SHAPES = [
    (2, 197, 197, 3, 64), (1, 1, 1, 1, 8), (2, 1, 50, 3, 80), (1, 13, 33, 2, 72), (3, 5, 7, 2, 13), (1, 12, 16, 1, 16),
    (1, 25, 257, 2, 96), (1, 40, 65, 1, 128), (1, 3, 1030, 2, 64),
]  # fmt: skip


def heads(B, N, H, D, dtype, packed):
    """[B, N, H, D], as a part of a packed projection or with gaps between all."""
    if packed:
        return torch.randn(B, N, 3, H, D).to(dtype)[:, :, 1]
    return torch.randn(B, H, N + 2, D + 3).to(dtype)[:, :, 1:-1, :D].transpose(1, 2)


def stock_attention(q, k, v, scale):
    with Textbook():
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale)
    return out.transpose(1, 2).flatten(2)


@every_isa
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_attention_is_less_exact_than_stock(isa, dtype, shape, sharpness):
    """A key too many or too few, a panel's padding that counts, a lost row, rounding of weights or sums."""
    torch.manual_seed(0)
    B, Nq, Nk, H, D = shape
    q, k, v = (heads(B, n, H, D, dtype, packed=n == Nq) for n in (Nq, Nk, Nk))
    q, scale = (q * sharpness).to(dtype), D**-0.5
    out, lse = cpu_kernels.attention(q, k, v, scale, True, KERNELS[isa])
    accept(out, reference.attention(q.double(), k.double(), v.double(), scale), stock_attention(q, k, v, scale))
    exact = reference.attention_lse(q.double(), k.double(), scale)
    assert (lse - exact).abs().max() <= 2e-6 * max(exact.abs().max().item(), 1.0)
    without, nothing = cpu_kernels.attention(q, k, v, scale, False, KERNELS[isa])
    assert nothing is None and torch.equal(without, out)


@every_isa
@every_dtype
def test_result_depends_on_strides_or_threads(isa, dtype):
    """Other bits for the same numbers elsewhere, for another split of the work, for an image in another batch."""
    B, N, H, D = 2, 77, 3, 64
    qkv = torch.randn(B, N, 3, H, D).to(dtype)
    out, lse = cpu_kernels.attention_qkv(qkv, 0.125, True, KERNELS[isa])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            q, k, v = (t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for t in qkv.unbind(2))
            for found in (
                cpu_kernels.attention(q, k, v, 0.125, True, KERNELS[isa]),
                cpu_kernels.attention_qkv(qkv, 0.125, True, KERNELS[isa]),
            ):
                assert torch.equal(found[0], out) and torch.equal(found[1], lse)
            alone, _ = cpu_kernels.attention_qkv(qkv[1:], 0.125, True, KERNELS[isa])
            assert torch.equal(alone, out[1:])
    finally:
        torch.set_num_threads(before)


@every_isa
@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-45])
def test_scale_is_taken_for_positive(isa, scale):
    """Padding that counts, or NaN, for a scale that is not above zero."""
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    out, lse = cpu_kernels.attention(q, k, v, scale, True, KERNELS[isa])
    torch.testing.assert_close(out, reference.attention(q, k, v, scale))
    torch.testing.assert_close(lse, reference.attention_lse(q, k, scale))


@every_isa
@every_dtype
def test_special_values_are_lost_or_spread(isa, dtype):
    """NaN and infinity stay in their query's row, or reach all rows from a key, as in stock attention."""
    q, k, v = (torch.randn(1, 30, 2, 16).to(dtype) for _ in range(3))
    q[0, 3, 0, 5], q[0, 7, 1, 2] = torch.nan, torch.inf
    out, _ = cpu_kernels.attention(q, k, v, 0.25, False, KERNELS[isa])
    bad = out.isnan().view(1, 30, 2, 16)
    assert bad[0, 3, 0].all() and bad[0, 7, 1].all() and bad.sum() == 32
    k[0, 29, 1, 0] = torch.nan
    out, _ = cpu_kernels.attention(q, k, v, 0.25, False, KERNELS[isa])
    assert out.view(1, 30, 2, 16)[:, :, 1].isnan().all()
    flat = torch.zeros(1, 5, 1, 8, dtype=dtype)
    out, lse = cpu_kernels.attention(flat, flat, torch.ones_like(flat), 1.0, True, KERNELS[isa])
    assert torch.equal(out, torch.ones(1, 5, 8, dtype=dtype)) and torch.allclose(lse, torch.tensor(5.0).log())
    # 40 keys: whole vectors of logits, and a last one that is not
    huge = torch.full((1, 40, 1, 8), 1e4 if dtype is torch.float16 else 1e18, dtype=dtype)
    for scale in (1.0, 0.7, 3e-9):
        out, _ = cpu_kernels.attention(huge, huge, torch.full_like(huge, 2), scale, False, KERNELS[isa])
        assert torch.equal(out, torch.full((1, 40, 8), 2.0, dtype=dtype))


@every_isa
@every_dtype
@pytest.mark.parametrize("name", cpu_kernels.ACTIVATIONS)
def test_activation_is_less_exact_than_stock(isa, dtype, name):
    """A wrong coefficient or constant, a tail that is cut off, the last numbers of a row left out."""
    for n, spread in ((1, 1.0), (1000, 0.1), (40_003, 1.0), (777, 10.0)):
        x = torch.randn(n).mul(spread).to(dtype)
        stock = reference.activation(x, name)
        out = cpu_kernels.activation(x, name, torch.empty_like(x), KERNELS[isa])
        accept(out, reference.activation(x.double(), name), stock)
        assert torch.equal(cpu_kernels.activation(x, name, x, KERNELS[isa]), out)


@every_isa
@every_dtype
@pytest.mark.parametrize("name", cpu_kernels.ACTIVATIONS)
def test_activation_far_from_zero_is_not_its_limit(isa, dtype, name):
    """x itself above, 0 below, NaN for NaN: overflow in the exponential or in the polynomial."""
    far = -6e4 if dtype is torch.float16 else -3e38
    x = torch.tensor([0.0, -0.0, 30.0, 1000.0, 6e4, torch.inf, -1000.0, far, torch.nan, -torch.inf]).to(dtype)
    out = cpu_kernels.activation(x, name, torch.empty_like(x), KERNELS[isa])
    assert torch.equal(out[:6], x[:6]) and out[8:].isnan().all()
    assert (out[6:8].float().abs() < 1e-30).all()


# x times this is the activation, in fp64 without cancellation far below zero
GATES = {
    "gelu": lambda x: torch.erfc(-x / math.sqrt(2)) / 2,
    "gelu_tanh": lambda x: torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "quick_gelu": lambda x: torch.sigmoid(1.702 * x),
    "silu": torch.sigmoid,
}


def in_order(x):
    """Neighbouring numbers of bf16 as neighbouring integers, both zeros as 0."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


@every_isa
@pytest.mark.parametrize("name", cpu_kernels.ACTIVATIONS)
def test_activation_in_bf16_is_off_by_more_than_its_rounding(isa, name):
    """A coefficient that is off by little, the tail below zero in which stock has no digit left, the sign of a zero."""
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    out = cpu_kernels.activation(x, name, torch.empty_like(x), KERNELS[isa])
    exact = (x.double() * GATES[name](x.double())).bfloat16()
    seen = exact.abs() >= 1e-30
    off = (in_order(out) - in_order(exact))[seen].abs()
    assert len(x) == 65_280
    assert off.max() <= 1 and (out[~seen].abs() < 1e-30).all()
    # a result beside the middle between two numbers may go to the other one: of gelu 42 did, of the others 16 at most
    assert (off > 0).sum() <= (50 if name == "gelu" else 20)
    assert torch.equal(out.signbit(), x.signbit())


@every_isa
@every_dtype
def test_layer_norm_is_less_exact_than_stock(isa, dtype):
    """Statistics over a padded row, a variance that cancels, eps left out."""
    for rows, D, mean, spread in ((3, 13, 0.0, 1.0), (21, 192, 5.0, 3.0), (2, 1280, 0.0, 1e-3), (5, 33, 30.0, 0.5)):
        x = torch.randn(rows, D).mul(spread).add(mean).to(dtype)
        weight, bias = torch.randn(D).to(dtype), torch.randn(D).to(dtype)
        for w, b in ((weight, bias), (weight, None), (None, None)):
            out = cpu_kernels.layer_norm(x, w, b, 1e-6, KERNELS[isa])
            exact = F.layer_norm(x.double(), (D,), *(None if t is None else t.double() for t in (w, b)), 1e-6)
            accept(out, exact, F.layer_norm(x, (D,), w, b, 1e-6))


def test_variable_of_the_environment_is_ignored(monkeypatch):
    """VITFAST_CPU_ISA chooses the kernels, and names the choice when it is none."""
    # what is called once a process
    choose = cpu_kernels.kernels.__wrapped__
    for isa in KERNELS:
        monkeypatch.setenv("VITFAST_CPU_ISA", isa)
        assert choose().name == isa
    monkeypatch.setenv("VITFAST_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="VITFAST_CPU_ISA must be one of .*portable.*got 'sse9'"):
        choose()
    monkeypatch.delenv("VITFAST_CPU_ISA")
    assert choose().name == list(KERNELS)[-1]
