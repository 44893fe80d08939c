"""A prepared block with deferred biases through the kernels: the norm of rows and a vector, the activation in place."""

import warnings

import deferred_biases
import pytest
import torch
from attention_cases import DTYPES
from deferred_biases import forms  # noqa: F401
from fake_kernel import restart
from launches import Launches
from pairwise import product
from prepared_cases import CONFIGS, model_of

import vitfast
from vitfast.check import warmup
from vitfast.check.acceptance import accept
from vitfast.check.calls import Prepared
from vitfast.check.families import FAMILIES
from vitfast.choose import builtin, dispatch
from vitfast.choose.config_tables import BLAS, Product
from vitfast.kernels.operands import Norm
from vitfast.kernels.triton import attention, layer_norm, linear
from vitfast.measure import device as devices
from vitfast.ops import prepared_block

EPS = 1e-6


# tests/test_deferred_biases.py has all of it, with stock operators in the kernels' place
QUICK = "plain", "mean of all tokens, tanh", "qk norm, RMS", "gated"


@pytest.mark.parametrize(
    "config, dtype",
    [
        pytest.param(
            config, dtype, id=f"{config}-{name}", marks=[pytest.mark.full] * (config not in QUICK or i != j % 2)
        )
        for i, (name, dtype) in enumerate(DTYPES.items())
        for j, config in enumerate(CONFIGS)
    ],
)
def test_deferred_biases_are_lost_or_added_twice(config, dtype, device, forms):  # noqa: F811
    deferred_biases.results(config, dtype, device, forms)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "what",
    [
        "deep", "aligned_biases",
        *(pytest.param(what, marks=pytest.mark.full) for what in ("masked", "intermediates", "mixed", "huge_biases")),
    ],
)  # fmt: skip
def test_deferred_biases_change_a_model(what, dtype, device, forms):  # noqa: F811
    getattr(deferred_biases, what)(dtype, device, forms)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["fp16"])
@pytest.mark.parametrize("what", ["foreign_tensors", "replaced_stem", "strange_calls"])
def test_tensor_of_somebody_else_is_written_to(what, dtype, device, forms):  # noqa: F811
    getattr(deferred_biases, what)(dtype, device, forms)


def test_a_deferred_block_is_more_than_three_kernels(monkeypatch, device):
    """Beside cuBLAS's products; tanh GELU on a GPU is one of those."""
    prepared = vitfast.prepare(model_of(torch.float16, device, depth=2))
    images = torch.randn(2, 3, 24, 24, device=device).to(torch.float16)
    launches = Launches(monkeypatch, attention, layer_norm, linear)
    with dispatch.backend("kernel", op="prepared_block"):
        prepared.forward_features(images)
    kernels = ["attention" if name.startswith("forward_") else name for name in launches.names]
    assert kernels == [*["norm_forward", "attention", "norm_forward", "finish_rows"] * 2, "norm_forward"]


@product(
    C=(64, 197, 768), dtype=DTYPES, kind=("layer", "rms"), added=(True, False), total=("none", "itself", "another"),
    rows=("contiguous", "cut"),
    allowed=lambda case: not (case["total"] == "itself" and case["rows"] == "cut"),
)  # fmt: skip
def test_norm_of_rows_and_a_vector_is_wrong(C, dtype, kind, added, total, rows, device):
    generator = torch.Generator().manual_seed(C)
    x = torch.randn(3, 7, C, generator=generator).to(device, dtype)
    x = x if rows == "contiguous" else torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, :7]
    vector = (3 * torch.randn(C, generator=generator)).to(device) if added else None
    weight, bias = ((torch.randn(C, generator=generator)).to(device, dtype) for _ in range(2))
    bias = bias if kind == "layer" else None
    written = {"none": None, "itself": x, "another": torch.empty(3, 7, C, dtype=dtype, device=device)}[total]
    whole = x.double() if vector is None else x.double() + vector.double()
    expected, before = (x.float() if vector is None else x + vector).to(dtype), x.clone()
    found, out, *_ = layer_norm.forward(
        x, Norm(weight, bias, EPS, kind), dtype, added=vector, total=written, statistics=False
    )
    assert out.is_contiguous() and found is written
    if written is not None:
        # the norm is of what was written
        assert torch.equal(written, expected)
        whole = expected.double()
    if written is not x:
        assert torch.equal(x, before)
    ref, low = (
        vitfast.reference.layer_norm(
            whole.to(to), weight.to(to), None if bias is None else bias.to(to), EPS, kind, out_dtype
        )
        for to, out_dtype in ((torch.float64, torch.float64), (torch.float32, dtype))
    )
    accept(out, ref, low, what=f"{kind} {C}")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_activation_in_place_differs_or_goes_past_its_end(dtype, device):
    memory = torch.randn(40 * 96, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    u = memory[: 37 * 96].view(37, 96)
    tail, apart = memory[37 * 96 :].clone(), u.clone()
    expected, *_ = linear.finish(apart, linear.After(dtype, act="gelu"))
    found, *_ = linear.finish(u, linear.After(dtype, act="gelu"), u)
    assert found.data_ptr() == u.data_ptr() and torch.equal(u, expected)
    assert torch.equal(memory[37 * 96 :], tail)


# the choice


def described(device, dtype=torch.float16, **config):
    return Prepared(model_of(dtype, device, **config).config, dtype, device)


def block_calls(device, dtype=torch.float16, **config):
    found = warmup.kernel_calls([described(device, dtype, **config)], (3,), dtype, False)
    return [call for call in found if call.op == "prepared_block"]


def test_unmeasured_form_is_taken(device):
    prepared = vitfast.prepare(model_of(torch.float16, device))
    images = torch.randn(2, 3, 24, 24, device=device).half()
    with dispatch.watching() as seen:
        prepared(images)
    asked = [each for each in seen if each.kernel == "prepared_block"]
    assert len(asked) == 1 and not any(each.taken for each in asked)
    choice = builtin.builtin("prepared_block", asked[0].shape, 90)
    assert not choice.kernel and choice.reason == "unmeasured: the five kernels of a prepared block"


@pytest.mark.parametrize(
    "config", [{}, {"mlp": "swiglu_packed", "activation": "silu"}, {"proj_bias": False}, {"activation": "gelu_tanh"}]
)
def test_a_right_form_is_not_accepted(config, device, monkeypatch):
    """Of the block as tuning times it: both are the same numbers, of small images and of the call's own."""
    (call,) = block_calls(device, **config)
    family = FAMILIES["prepared_block"]
    # a product before it has left statistics of its rows, which the other form reads
    assert call.args[1] is not None and len(family.smaller(call)) == 2
    for each in (call, *family.smaller(call)):
        assert warmup.check(family, each, None, devices.of(device)) == "right"
    # cuBLAS for fc1, the choice where there is none, or a product of ours that activates before it writes
    first, *others = family.configs(call, device)
    assert Product(**first) == BLAS and bool(others) is ("mlp" not in config)
    ran = Launches(monkeypatch, linear)
    for chosen in (first, *others[:2]):
        assert warmup.check(family, family.smaller(call)[1], chosen, devices.of(device)) == "right"
        # and those of the other form, next to which it is judged
        assert ran.names.count("finish_rows") == (chosen is first and "mlp" not in config)
        assert ran.names.count("product") == 4 + (chosen is not first) and not ran.names.clear()


@pytest.mark.usefixtures("stock_norms_of_a_gpu")
def test_wrong_form_stays_on(device, monkeypatch):
    """The norm forgets what is pending; where it was taken the other form takes its place."""
    restart(monkeypatch)
    model = model_of(torch.float16, device, depth=3, pool="mean")
    prepared, images = vitfast.prepare(model), torch.randn(3, 3, 24, 24, device=device).half()
    expected, normed = prepared(images), prepared_block.normed
    calls = block_calls(device, pool="mean")
    monkeypatch.setattr(dispatch, "built_in", lambda *asked: builtin.ALWAYS)
    with warnings.catch_warnings(action="error", category=RuntimeWarning):
        report = warmup.warm(calls, devices.of(device), lambda line: None)
    assert [(row.runs, row.check) for row in report.rows] == [("kernel", "right")]
    monkeypatch.setattr(prepared_block, "normed", lambda h, added, *rest: normed(h, None, *rest))
    with pytest.warns(RuntimeWarning, match="prepared_block kernel .*is switched off.*not accepted"):
        report = warmup.warm(calls, devices.of(device), lambda line: None)
    assert {row.runs for row in report.rows} == {"stock operators"}
    assert torch.equal(prepared(images), expected)


def test_form_is_forced_by_who_wants_kernels(device):
    """The five are kernels too; and what somebody forced by its name stays forced."""
    block = vitfast.prepare(model_of(torch.float16, device)).blocks[0]
    tokens = torch.randn(1, 5, 64, device=device).half()

    def taken():
        with dispatch.watching() as seen:
            block(tokens)
        return {each.taken for each in seen if each.kernel == "prepared_block"}

    with dispatch.backend("kernel"):
        assert taken() == {False}
    with dispatch.backend("kernel", op="prepared_block"):
        with dispatch.backend("kernel"):
            assert taken() == {True}
        with dispatch.backend("stock"):
            assert taken() == {False}
        assert taken() == {True}
    assert taken() == {False}


def test_form_that_cannot_run_is_forced_in_silence(device):
    prepared = vitfast.prepare(model_of(torch.float16, device))
    with (
        dispatch.backend("kernel", op="prepared_block"),
        pytest.raises(NotImplementedError, match="prepared_block: .*tokens of float32 beside weights of float16"),
    ):
        prepared.blocks[0](torch.randn(1, 4, 64, device=device))


def test_failing_kernel_leaves_a_block_half_done(device, monkeypatch):
    """The norm starts, the activation does not: stock operators finish what cuBLAS has begun to write."""
    restart(monkeypatch)
    prepared = vitfast.prepare(model_of(torch.float16, device, pool="mean"))
    images = torch.randn(2, 3, 24, 24, device=device).half()
    expected = prepared(images)
    monkeypatch.setattr(dispatch, "built_in", lambda *asked: builtin.ALWAYS)
    monkeypatch.setattr("vitfast.ops._launch.INTERPRETED", False)
    monkeypatch.setattr("vitfast.ops._launch.may_be_kernels", lambda t: True)
    monkeypatch.setattr("vitfast.ops._launch.why_no_triton", lambda: "")

    def fails(*given):
        raise ValueError("no such instruction")

    monkeypatch.setattr(linear, "finish", fails)
    with pytest.warns(RuntimeWarning, match="prepared_block kernel .*is switched off.*no such instruction"):
        out = prepared(images)
    torch.testing.assert_close(out, expected, rtol=0, atol=4e-3 * expected.abs().max().item())
    assert dispatch.switched_off("prepared_block")


def test_prepared_block_is_no_op_to_torch(device):
    (call,) = block_calls(device)
    args = FAMILIES["prepared_block"].draw(call, torch.Generator(device).manual_seed(0))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for backend in ("stock", "kernel"):
        with dispatch.backend(backend, op="prepared_block"):
            torch.library.opcheck(torch.ops.vitfast.prepared_block.default, args, test_utils=tests)
    with pytest.raises(NotImplementedError, match="prepared_block has neither gradient nor tangent"):
        torch.ops.vitfast.prepared_block(args[0].requires_grad_(), *args[1:])
