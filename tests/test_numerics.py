"""The comparator itself: each mistake below passes somebody's tolerance, and must not pass ours."""

import pytest
import torch
import torch.nn.functional as F
from textbook import Textbook

from vitfast.check.acceptance import accept, accept_model, error_ratio

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF = [torch.float16, torch.bfloat16]


def layer_norm_case(dtype, rows=512, dim=768, mean=0.0, std=1.0):
    x = (torch.randn(rows, dim) * std + mean).to(dtype)
    weight, bias = torch.rand(dim).add(0.5).to(dtype), torch.randn(dim).to(dtype)
    ref = F.layer_norm(x.double(), (dim,), weight.double(), bias.double(), 1e-6)
    low = F.layer_norm(x, (dim,), weight, bias, 1e-6)
    return x, weight, bias, ref, low


def attention_case(dtype, tokens=197, head_dim=64):
    q, k, v = torch.randn(3, 2, 3, tokens, head_dim).to(dtype)
    ref = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    with Textbook():
        return q, k, v, ref, F.scaled_dot_product_attention(q, k, v)


def gelu_case(dtype):
    x = torch.randn(512, 768).to(dtype)
    return x, F.gelu(x.double()), F.gelu(x)


def violated(out, ref, low, **options):
    """Letters of the clauses that reject `out`."""
    try:
        accept(out, ref, low, **options)
    except AssertionError as error:
        return {line.strip()[0] for line in str(error).splitlines()[1:]}
    return set()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [layer_norm_case, attention_case, gelu_case])
def test_stock_op_is_accepted(case, dtype):
    """A rule that rejects right results, here and below, would be widened until it rejects nothing."""
    *_, ref, low = case(dtype)
    accept(low.clone(), ref, low)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_layer_norm_in_another_order_is_accepted(dtype, mean):
    x, weight, bias, ref, low = layer_norm_case(dtype, mean=mean)
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = centred.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    accept((centred * (rstd * weight.float()) + bias.float()).to(dtype), ref, low)


@pytest.mark.parametrize("dtype", DTYPES)
# 72 and 80 besides 64: a scale of 1/8 is exact in every dtype and hides the rounding of a pre-scaled q
@pytest.mark.parametrize("head_dim", [64, 72, 80])
def test_blockwise_softmax_is_accepted(dtype, head_dim):
    q, k, v, ref, low = attention_case(dtype, head_dim=head_dim)
    q, k, v = q.float(), k.float(), v.float()
    peak = torch.full((*q.shape[:-1], 1), -torch.inf)
    total, acc = torch.zeros_like(peak), torch.zeros_like(q)
    for keys, values in zip(k.split(64, dim=-2), v.split(64, dim=-2), strict=True):
        logits = q @ keys.mT * head_dim**-0.5
        new_peak = torch.maximum(peak, logits.amax(-1, keepdim=True))
        p, decay = (logits - new_peak).exp(), (peak - new_peak).exp()
        total, acc, peak = total * decay + p.sum(-1, keepdim=True), acc * decay + p @ values, new_peak
    accept((acc / total).to(dtype), ref, low)


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_k_weight_gradient_is_accepted(dtype):
    x, g = torch.randn(400, 96).to(dtype), torch.randn(400, 64).to(dtype)
    halves = g[:200].mT.float() @ x[:200].float() + g[200:].mT.float() @ x[200:].float()
    with Textbook():
        low = g.mT @ x
    accept(halves.to(dtype), g.double().mT @ x.double(), low, grad=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_non_finite_value_is_rejected(dtype, value):
    """NaN makes every `error > bound` false, so a comparator written that way passes it."""
    *_, ref, low = gelu_case(dtype)
    out = low.clone()
    out[311, 5] = value
    assert violated(out, ref, low) == {"0"}
    with pytest.raises(AssertionError, match=r"first difference at \(311, 5\)"):
        accept(out, ref, low)


@pytest.mark.parametrize("wrong", [0.0, torch.inf, torch.nan])
def test_non_finite_value_of_the_reference_must_be_there(wrong):
    """+Inf where the reference has -Inf, or a number where it has NaN, has equal `isfinite` masks or none."""
    *_, ref, low = gelu_case(torch.float32)
    ref[3, 4] = low[3, 4] = -torch.inf
    ref[5, 6] = low[5, 6] = torch.nan
    accept(low.clone(), ref, low)
    for place in [(3, 4), (5, 6)]:
        out = low.clone()
        out[place] = wrong
        assert violated(out, ref, low) == (set() if place == (5, 6) and wrong != wrong else {"0"})


def test_values_beside_a_nan_are_compared():
    """A NaN row that turned every maximum into NaN would switch the rest of the comparison off."""
    *_, ref, low = gelu_case(torch.bfloat16)
    ref[7] = low[7] = torch.nan
    accept(low.clone(), ref, low)
    out = low.clone()
    out[8] = 0
    assert violated(out, ref, low) >= {"A", "B", "C"}


def test_overflow_of_the_output_dtype_is_expected():
    """70,000 is finite in fp64 and Inf in fp16; saturating to the largest fp16 number is an error."""
    ref = torch.tensor([[1.0, 70000.0], [2.0, -70000.0]], dtype=torch.float64)
    accept(ref.half(), ref, ref.half())
    assert violated(ref.half().clamp(-65504, 65504), ref, ref.half()) == {"0"}


@pytest.mark.parametrize("shape", [(1, 768), (512, 1), (768, 512), (1, 512, 768), (0, 768)])
def test_wrong_shape_is_rejected(shape):
    """The first two broadcast against the reference and give a difference of the right shape."""
    *_, ref, low = gelu_case(torch.float32)
    assert violated(torch.zeros(shape), ref, low) == {"0"}


@pytest.mark.parametrize("low_dtype", HALF)
def test_wrong_dtype_or_device_is_rejected(low_dtype):
    """An fp32 result where half precision was promised is closer to the reference, and doubles the memory."""
    *_, ref, low = gelu_case(low_dtype)
    assert violated(ref.float(), ref, low) == {"0"}
    assert violated(low.to("meta"), ref, low) == {"0"}


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)])
def test_empty(shape):
    empty = torch.empty(shape)
    accept(empty, empty.double(), empty)
    accept_model(empty, empty.double(), empty)
    assert violated(empty.half(), empty.double(), empty) == {"0"}


@pytest.mark.parametrize("shape", [(), (64,)])
def test_scalars_and_vectors_are_one_row(shape):
    """Parameter gradients are 1-d; taking each element for a row would hold every one to its own bound."""
    ref = torch.randn(shape, dtype=torch.float64) + 3
    accept(ref.float(), ref, ref.float())
    assert violated(ref.float() * 1.01, ref, ref.float()) == {"A", "B", "C"}


def test_case_that_cannot_be_judged_is_an_error():
    """An fp32 reference has the very error that is to be measured; an fp64 result has no constants."""
    *_, ref, low = gelu_case(torch.float32)
    with pytest.raises(ValueError, match="float64"):
        accept(low, ref.float(), low)
    with pytest.raises(ValueError, match="same shape"):
        accept(low, ref[:1], low)
    with pytest.raises(ValueError, match="constants"):
        accept(ref, ref, ref)


def test_one_wrong_element_violates_a_only():
    """One element among four million: invisible in every mean."""
    *_, ref, low = layer_norm_case(torch.bfloat16, rows=4096, dim=1024)
    out = low.clone()
    out[2500, 77] += 0.25
    assert violated(out, ref, low) == {"A"}


def test_lost_row_is_rejected():
    """A tail tile that was never stored: one row of 9,456, which passes a global relative error of 1e-3."""
    *_, ref, low = layer_norm_case(torch.bfloat16, rows=9456, dim=192)
    out = low.clone()
    out[9455] = 0
    with pytest.raises(AssertionError, match=r"B: 1 of 9456 rows; worst \(9455,\)"):
        accept(out, ref, low)


def test_lost_row_beside_massive_activations_violates_b_only():
    """A channel of 1e3 in all rows but the lost one lifts the floors of A and C above that row's values."""
    x = torch.randn(4096, 768).bfloat16()
    x[1:, 0] = 1000
    ref, low = x.double() * 1.7, x * 1.7
    out = low.clone()
    out[0] = 0
    assert violated(out, ref, low) == {"B"}


def test_quick_gelu_in_bf16_violates_c_only():
    """x * sigmoid(1.702 x) stays within two bf16 errors of the erf form everywhere, on one side."""
    x, ref, low = gelu_case(torch.bfloat16)
    wide = x.float()
    assert violated((wide * torch.sigmoid(1.702 * wide)).bfloat16(), ref, low) == {"C"}


def test_sloppy_yardstick_violates_d_only():
    """fp32 attention that went through bf16 as `low` would excuse the same loss in the result."""
    q, k, v, ref, low = attention_case(torch.float32)
    sloppy = F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).float()
    assert violated(low, ref, sloppy) == {"D"}
    assert violated(sloppy, ref, low) == {"A", "B", "C"}


def test_yardstick_that_is_not_finite_violates_d():
    *_, ref, low = gelu_case(torch.float16)
    broken = low.clone()
    broken[0] = torch.inf
    assert violated(low, ref, broken) == {"D"}


@pytest.mark.parametrize("std", [1.0, 0.01])
def test_wrong_layer_norm_eps_in_fp32(std):
    """1e-5 (torch, CLIP, vit-pytorch) for 1e-6 (timm); in half precision no rule can see it at std 1."""
    x, weight, bias, ref, low = layer_norm_case(torch.float32, std=std)
    assert violated(F.layer_norm(x, (768,), weight, bias, 1e-5), ref, low) >= {"C"}


@pytest.mark.parametrize("dtype", HALF)
def test_layer_norm_statistics_in_half_precision(dtype):
    x, weight, bias, ref, low = layer_norm_case(dtype)
    mean = x.mean(-1, keepdim=True)
    rstd = (x - mean).square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    assert violated((x - mean) * rstd * weight + bias, ref, low) >= {"C"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_variance_as_difference_of_squares(dtype):
    """E[x^2] - E[x]^2 cancels where the mean is large beside the deviation."""
    x, weight, bias, ref, low = layer_norm_case(dtype, mean=30, std=0.05)
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    rstd = (wide.square().mean(-1, keepdim=True) - mean.square()).add(1e-6).rsqrt()
    out = ((wide - mean) * rstd * weight.float() + bias.float()).to(dtype)
    assert violated(out, ref, low) >= {"C"}


def test_tanh_gelu_for_erf_in_fp32():
    """The two forms round to the same half-precision numbers, so only an fp32 test tells them apart."""
    x, ref, low = gelu_case(torch.float32)
    assert violated(F.gelu(x, approximate="tanh"), ref, low) == {"A", "B", "C"}


def test_softmax_scale_of_a_padded_head_in_bf16():
    """65^-0.5 for 64^-0.5 moves every probability by under 1 %."""
    q, k, v, ref, low = attention_case(torch.bfloat16)
    out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=65**-0.5).bfloat16()
    assert violated(out, ref, low) >= {"C"}


def test_gradients_get_a_wider_factor():
    """Backward passes add more roundings, but never so many that a forward error should be let off."""
    ref = torch.ones(8, 64, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    low, out = ((ref + n * eps).float() for n in (8, 20))
    accept(out, ref, low, k=3, grad=True)
    assert violated(out, ref, low, k=3) == {"A", "B"}


def test_k_is_replaced():
    """LayerNorm that rounds the normalised rows before the affine may pass 1.25; a tighter k excludes it."""
    x = torch.randn(512, 768).bfloat16()
    weight = torch.rand(768).add(0.5).bfloat16()
    ref = F.layer_norm(x.double(), (768,), weight.double())
    low = F.layer_norm(x, (768,), weight)
    out = F.layer_norm(x, (768,)) * weight
    assert violated(out, ref, low, k=1.15) == {"C"}


def test_precision_of_operands_replaces_that_of_the_output():
    """lse stays fp32 over bf16 operands: held to fp32's constants its yardstick would look broken."""
    ref = torch.randn(64, 32, dtype=torch.float64)
    low = ref.bfloat16().float()
    assert violated(low.clone(), ref, low) == {"D"}
    accept(low.clone(), ref, low, dtype=torch.bfloat16)


def test_message_names_case_and_all_clauses():
    x, ref, low = gelu_case(torch.float32)
    with pytest.raises(AssertionError, match=r"(?s)fc1 \(torch.float32\).*A: max error.*B: .*rows.*C: rms"):
        accept(x, ref, low, what="fc1")


@pytest.mark.parametrize("dtype", DTYPES)
def test_model_rule(dtype):
    *_, ref, low = gelu_case(dtype)
    error = low.double() - ref
    accept_model(low.clone(), ref, low)
    accept_model((ref + 1.1 * error).to(dtype), ref, low)
    out = low.clone()
    out[:, ::2] += (2 * error[:, ::2]).to(dtype)
    with pytest.raises(AssertionError, match="x eager's"):
        accept_model(out, ref, low, what="logits")


def test_model_rule_where_eager_is_exact():
    """Without a floor one rounding in a zero-initialised branch would fail against an exact eager model."""
    low = torch.randint(1, 9, (64, 10)).float()
    out = low.clone()
    out[0, 0] = torch.nextafter(out[0, 0], torch.tensor(torch.inf))
    accept_model(out, low.double(), low)
    with pytest.raises(AssertionError, match="x eager's"):
        accept_model(low * (1 + 1e-6), low.double(), low)


def test_model_rule_rejects_nan():
    *_, ref, low = gelu_case(torch.float32)
    out = low.clone()
    out[0, 0] = torch.nan
    with pytest.raises(AssertionError, match="0: NaN in 1 places, expected 0"):
        accept_model(out, ref, low)


def test_error_ratio_is_not_that_of_the_errors_or_hides_what_is_no_number():
    ref = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    low = (ref + 1e-3).float()
    assert error_ratio((ref - 3e-3).float(), ref, low) == pytest.approx(3, rel=1e-3)
    assert error_ratio(torch.full_like(low, torch.nan), ref, low) == float("inf")
    assert error_ratio(low[:, :2], ref, low) == float("inf")
    exact = ref.float()
    assert error_ratio(exact, ref, exact) == 1.0 and error_ratio(low, ref, exact) == float("inf")
