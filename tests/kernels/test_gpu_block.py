"""A prepared model through the kernels: norms and LayerScale in the weights, statistics from product to product."""

import warnings

import pytest
import torch
from attention_cases import DTYPES
from fake_kernel import restart
from launches import Launches
from pairwise import product
from prepared_cases import CONFIGS, model_of

import vitfast
from vitfast.check import calls, warmup
from vitfast.check.acceptance import accept_model
from vitfast.check.families import FAMILIES
from vitfast.choose import dispatch
from vitfast.choose.config_tables import Product
from vitfast.commands import info
from vitfast.kernels.triton import attention, layer_norm, linear
from vitfast.kernels.triton.linear import Folded
from vitfast.measure import device as devices


@product(config=tuple(CONFIGS), dtype=DTYPES, strength=1)
def test_prepared_model_is_less_exact_than_the_model(config, dtype, device):
    model = model_of(dtype, device, **CONFIGS[config])
    # the error of few images' logits is luck: of 3 images equally exact models differ by 0.7 to 1.5 times
    images = torch.randn(24, 3, 24, 24, device=device).to(dtype)
    wide = model_of(torch.float64, "cpu", **CONFIGS[config])
    wide.load_state_dict({name: t.double().cpu() for name, t in model.state_dict().items()})
    with torch.no_grad(), dispatch.backend("stock"):
        ref, low = wide(images.double().cpu()).to(device), model(images)
    prepared = vitfast.prepare(model)
    out = prepared(images)
    accept_model(out, ref, low, what=config)
    with torch.no_grad(), dispatch.backend("stock"):
        # features of all tokens, and the ops that take the kernels' place
        accept_model(prepared(images), ref, low, what="stock operators")
        ref, low = wide.forward_features(images.double().cpu()).to(device), model.forward_features(images)
    accept_model(prepared.forward_features(images), ref, low, what="features")


def test_prepared_model_has_no_intermediates(device):
    prepared = vitfast.prepare(model_of(torch.float16, device, mlp="swiglu_packed", activation="silu"))
    images = torch.randn(2, 3, 24, 24, device=device).half()
    taps, logits = prepared.intermediates(images), prepared(images)
    assert len(taps) == 2 * 3 + 4
    torch.testing.assert_close(taps["logits"], logits, rtol=0, atol=4e-3 * logits.abs().max().item())


def test_a_block_is_more_than_five_kernels(monkeypatch, device):
    """After the first norm, whose rows no product wrote."""
    prepared = vitfast.prepare(model_of(torch.float16, device, depth=2, pool="mean"))
    images = torch.randn(2, 3, 24, 24, device=device).to(torch.float16)
    launches = Launches(monkeypatch, attention, layer_norm, linear)
    prepared.forward_features(images)
    kernels = ["attention" if name.startswith("forward_") else name for name in launches.names]
    assert kernels == ["norm_forward", *["product", "attention", "product", "product", "product"] * 2]


@pytest.mark.parametrize("N", [64, 192])
def test_statistics_that_travel_are_those_of_other_rows(N, device):
    """Each row's mean and distance are in the pieces, and the next product reads them as it would compute them."""
    torch.manual_seed(1)
    x, residual = (torch.randn(2, 33, width, device=device).half() for width in (64, N))
    residual += 30 * torch.randn(2, 33, 1, device=device).half()
    w1, w2 = (torch.randn(*shape, device=device).half() / 8 for shape in ((N, 64), (64, N)))
    out, pieces = linear.forward_with_pieces(x, w1, None, residual)
    count, _, rows = pieces.shape
    assert rows == 66 and out.dtype is torch.float16
    parts = out.double().view(66, count, -1)
    torch.testing.assert_close(pieces[:, 0].double().T, parts.mean(-1), rtol=1e-5, atol=1e-5)
    squares = (parts - parts.mean(-1, keepdim=True)).square().sum(-1)
    torch.testing.assert_close(pieces[:, 1].double().T, squares, rtol=1e-4, atol=1e-4)
    sums, bias = w2.float().sum(1), torch.zeros(64, device=device)
    with_pieces, without = (
        linear.folded_forward(out, Folded(w2, sums, bias, "layer", pieces=each, eps=1e-6), "none")
        for each in (pieces, None)
    )
    ref = torch.nn.functional.layer_norm(out.double(), (N,)) @ w2.double().T
    for found in (with_pieces, without):
        torch.testing.assert_close(found.double(), ref, rtol=0, atol=4e-3 * ref.abs().max().item())


@pytest.mark.parametrize("N", [64, 192])
def test_statistics_are_written_past_their_end(N, monkeypatch, device):
    """By the last tile's second part, where the first one ends the rows: into memory of somebody else."""
    made, empty = [], torch.empty

    def with_more(*shape, **how):
        shape = torch.Size(shape[0] if isinstance(shape[0], (tuple, list)) else shape)
        made.append((torch.full((shape.numel() + 4096,), 7, **how), shape.numel()))
        return made[-1][0][: shape.numel()].view(shape)

    x, weight, residual = (torch.randn(n, k, device=device).half() for n, k in ((130, 64), (N, 64), (130, N)))
    config = Product("tiles", 128, 128, 64, warps=8, stages=4, parts=2)
    monkeypatch.setattr(torch, "empty", with_more)
    _, pieces = linear.forward_with_pieces(x, weight, None, residual, config)
    monkeypatch.setattr(torch, "empty", empty)
    assert pieces.shape == (N // 64, 2, 130) and made
    assert all((memory[numbers:] == 7).all() for memory, numbers in made)


PRODUCTS = ("folded_linear", "added_linear")


def warm_up_of(prepared, device):
    """`vitfast.warmup`, which in Triton's interpreter has no device."""
    described = warmup.description(prepared, device)
    found = warmup.kernel_calls([described], (3,), torch.float32, False)
    return warmup.warm(found, devices.of(device), lambda line: None)


@pytest.mark.usefixtures("stock_norms_of_a_gpu")
def test_warm_up_passes_over_a_prepared_model(device, monkeypatch):
    """Every call that it makes is checked, as it makes it: those products too, with statistics that travel."""
    restart(monkeypatch)
    model = model_of(torch.float16, device, depth=2)
    prepared, images = vitfast.prepare(model), torch.randn(3, 3, 24, 24, device=device).half()
    recorder = calls._Recorder()
    with torch.no_grad(), recorder:
        prepared._forward(images)
    made = [str(call) for call in recorder.calls if call.op in FAMILIES]
    with warnings.catch_warnings(action="error", category=RuntimeWarning):
        report = warm_up_of(prepared, device)
    named = [row.call for row in report.rows if row.kernel != "prepared_block"]
    # which form the block takes is asked once, after its parts; the careful one is not the kernel
    assert [row.runs for row in report.rows if row.call not in named] == ["stock operators"]
    assert named == made and all(row.seconds > 0 for row in report.rows)
    checked = {row.call: row.check for row in report.rows if row.runs == "kernel"}
    assert set(checked.values()) == {"right"} and set(made) - set(checked) <= {made[0]}
    # one number more a row of its statistics: that of pieces
    assert sum(call.startswith("folded_linear") and ", 2, " in call for call in made) == 3


@pytest.mark.usefixtures("stock_norms_of_a_gpu")
@pytest.mark.parametrize(
    "kernel, launcher", [("folded_linear", "folded_forward"), ("added_linear", "forward_with_pieces")]
)
def test_wrong_product_of_a_prepared_model_stays_on(kernel, launcher, device, monkeypatch):
    """And the product of any other model stays: only what is wrong is switched off."""
    restart(monkeypatch)
    model = model_of(torch.float16, device, depth=2)
    prepared, images = vitfast.prepare(model), torch.randn(3, 3, 24, 24, device=device).half()
    right, expected = getattr(linear, launcher), prepared(images)

    def wrong(x, *args):
        found = right(x, *args)
        out = found if isinstance(found, torch.Tensor) else found[0]
        # the last row, where there is more than a small input has
        out.view(-1, out.shape[-1])[-1] *= 1.0 if x.shape[0] < 3 or x.shape[1] == 17 else 1.1
        return found

    monkeypatch.setattr(linear, launcher, wrong)
    with pytest.warns(RuntimeWarning, match=f"{kernel} kernel .*is switched off.*result 0.*not accepted: A: max error"):
        report = warm_up_of(prepared, device)
    assert {row.runs for row in report.rows if row.kernel == kernel} == {"stock operators"}
    assert {row.kernel for row in report.rows if "switched off" in row.check} == {kernel}
    assert f"{kernel} kernel" not in str(vitfast.explain(prepared)) and dispatch.switched_off("linear") is None
    torch.testing.assert_close(prepared(images), expected, rtol=0, atol=4e-3 * expected.abs().max().item())
    assert any(line.split()[0] == kernel and "switched off" in line for line in info.report().splitlines() if line)


def test_choice_for_a_product_holds_for_one_of_another_kind(device, monkeypatch):
    """Their keys were one: what was tuned for a norm before a layer held for a norm in its weights."""
    restart(monkeypatch)
    model = model_of(torch.float16, device, depth=2)
    images = torch.randn(2, 3, 24, 24, device=device).half()
    with dispatch.watching() as plainly, torch.no_grad():
        model(images)
    with dispatch.watching() as seen:
        vitfast.prepare(model)(images)
    keys, others = ({(each.kernel, each.shape) for each in found} for found in (seen, plainly))
    assert {kernel for kernel, _ in keys - others} >= set(PRODUCTS)
    assert not {kernel for kernel, _ in keys & others} & {*PRODUCTS, "linear", "mlp"}
    # nor do those with statistics, which are other work, share one with those that take their own
    assert {shape[-1].split()[-1] == "pieces" for kernel, shape in keys if kernel == "folded_linear"} == {True, False}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_product_of_a_prepared_model_is_no_op_to_torch(dtype, device):
    x, residual = torch.randn(2, 5, 64, device=device).to(dtype), torch.randn(2, 5, 128, device=device).to(dtype)
    weight, bias = torch.randn(128, 64, device=device).to(dtype) / 8, torch.randn(128, device=device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    pieces = linear.forward_with_pieces(x, weight[:64].contiguous(), None, x)[1]
    assert (pieces is None) is (dtype is torch.float32)
    for given in (pieces, None):
        args = (x, weight, weight.float().sum(1), bias, bias.to(dtype), given, 1e-6, "layer", "gelu")
        torch.library.opcheck(torch.ops.vitfast.folded_linear.default, args, test_utils=tests)
    torch.library.opcheck(torch.ops.vitfast.added_linear.default, (x, weight, None, residual), test_utils=tests)
    with pytest.raises(NotImplementedError, match="vitfast::added_linear has neither gradient nor tangent"):
        torch.ops.vitfast.added_linear(x.requires_grad_(), weight, None, residual)


def test_statistics_are_foreseen_where_the_kernel_is_off(device, monkeypatch):
    """Whoever asks for shapes alone is told what comes now, not what once came."""
    restart(monkeypatch)
    described = calls.Prepared(model_of(torch.float16, device).config, torch.float16, device)

    def with_pieces():
        found = [call for call in calls.calls_of_prepared(described, 2) if call.op == "folded_linear"]
        return sum(len(call.likes()) == 6 for call in found)

    assert with_pieces() == 3
    with dispatch.backend("stock", op="added_linear"):
        assert with_pieces() == 0
    assert with_pieces() == 3


def test_explanation_names_other_ops_than_a_prepared_model_calls(device):
    prepared = vitfast.prepare(model_of(torch.float16, device, qk_norm=True, mlp="swiglu_packed", depth=1))
    rows = {row.part: row.path for row in vitfast.explain(prepared).rows}
    assert {part.removeprefix("blocks.0: "): path for part, path in rows.items() if part.startswith("blocks")} == {
        "norm1 + attn.qkv": "op folded_linear", "attn.q_norm": "op layer_norm", "attn.k_norm": "op layer_norm",
        "attn softmax": "op attention", "attn.proj + residual": "op added_linear",
        "norm2 + mlp.fc1": "op folded_linear", "mlp gate": "its modules' own forward",
        "mlp.fc2 + residual": "op added_linear",
    }  # fmt: skip
    assert set(PRODUCTS) <= set(info.collect()["kernels"]) & set(info.collect()["ops"])


def test_prepared_model_takes_images_from_another_device(device):
    prepared = vitfast.prepare(model_of(torch.float16, device))
    with pytest.raises(ValueError, match="images must be on the"):
        prepared(torch.randn(1, 3, 24, 24, device="meta", dtype=torch.float16))
    model = model_of(torch.float16, device)
    prepared = vitfast.prepare(model)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.add_(1)
    with pytest.raises(RuntimeError, match="was written to after vitfast.prepare"):
        prepared(torch.randn(1, 3, 24, 24, device=device, dtype=torch.float16))
