"""An MLP in one kernel: the same numbers as two products, for the widths and calls that it takes."""

import pytest
import torch
from attention_cases import INTERPRETED, draw

from vitfast import ops, reference
from vitfast.check.acceptance import accept, rms_ratio_of_few
from vitfast.choose import dispatch
from vitfast.choose.config_tables import Product
from vitfast.kernels.operands import Norm, Projections, Tail
from vitfast.kernels.triton import mlp

CONFIGS = {
    "pointers": Product("whole", 32, 32, warps=4, stages=2),
    "descriptors": Product("whole", 64, 32, warps=8, stages=2, descriptors=True),
}
every_config = pytest.mark.parametrize("config", CONFIGS)
every_half = pytest.mark.parametrize(
    "dtype", [torch.float16] + ([] if INTERPRETED else [torch.bfloat16]), ids=str
)  # fmt: skip


def arguments(B, N, C, F, dtype, device, *, norm="layer", act="gelu", scaled=False, biases=True):
    """All that the op takes before `saves`."""
    vector = lambda n, seed: draw(n, dtype=dtype, device=device, seed=seed)  # noqa: E731
    x = draw(B, N, C, dtype=dtype, device=device) + 2
    w1 = draw(F, C, dtype=dtype, device=device, scale=C**-0.5, seed=1)
    w2 = draw(C, F, dtype=dtype, device=device, scale=F**-0.5, seed=2)
    gamma = vector(C, 7) if scaled else None
    row_scale = torch.tensor([0.0, 2.0, 2.0], dtype=dtype, device=device)[:B] if scaled else None
    return (
        x, vector(C, 3) / 8 + 1, vector(C, 4) if norm == "layer" else None, 1e-6, norm, w1,
        vector(F, 5) if biases else None, w2, vector(C, 6) if biases else None, act, False, gamma, row_scale,
    )  # fmt: skip


def grouped(x, norm_weight, norm_bias, eps, norm, w1, b1, w2, b2, act, gated, gamma, row_scale):
    """The same for `mlp.forward`."""
    return (
        x, Norm(norm_weight, norm_bias, eps, norm), Projections(w1, b1, w2, b2, act, gated), Tail(gamma, row_scale, x),
    )  # fmt: skip


def check(args, out):
    ref = reference.mlp(*(t.double() if isinstance(t, torch.Tensor) else t for t in args))
    with dispatch.backend("stock"):
        low = torch.ops.vitfast.mlp(*args, "")[0]
    accept(out, ref, low, k=rms_ratio_of_few(out.numel(), out.dtype))


@every_half
@every_config
@pytest.mark.parametrize("C, F", [(192, 768), (64, 96), (96, 192), (384, 64), (128, 512)])
def test_part_of_a_row_or_of_the_hidden_numbers_is_lost(C, F, config, dtype, device):
    args = arguments(2, 37, C, F, dtype, device)
    check(args, mlp.forward(*grouped(*args), "", config=CONFIGS[config])[0])


@every_half
@every_config
@pytest.mark.parametrize(
    "how",
    [{"norm": "rms", "act": "silu"}, {"scaled": True, "act": "gelu_tanh"}, {"biases": False, "act": "quick_gelu"}],
    ids=str,
)
def test_norm_activation_or_scale_is_another(how, config, dtype, device):
    args = arguments(3, 23, 192, 64, dtype, device, **how)
    check(args, mlp.forward(*grouped(*args), "", config=CONFIGS[config])[0])


@every_config
def test_rows_of_another_stride_or_past_the_end_are_read(config, device):
    """The class tokens of images, in memory that holds NaN elsewhere; and rows that fill no tile."""
    args = list(arguments(3, 1, 192, 64, torch.float16, device))
    expected = mlp.forward(*grouped(*args), "", config=CONFIGS[config])[0]
    around = torch.full((3, 5, 192), float("nan"), dtype=torch.float16, device=device)
    around[:, :1] = args[0]
    args[0] = around[:, :1]
    assert torch.equal(mlp.forward(*grouped(*args), "", config=CONFIGS[config])[0], expected)


@pytest.mark.parametrize("rows", ("one row for all", "windows", "odd start"))
@pytest.mark.parametrize("which", ("x", "w2"))
def test_tuned_choice_gets_rows_that_it_does_not_take(which, rows, described, device):
    """It was measured for a shape, whatever the strides; bulk copies are for rows of which none lies in another."""
    args = list(arguments(1, 40, 64, 64, torch.float16, device))
    at = 0 if which == "x" else 7
    t = args[at].reshape(-1, 64)
    memory = torch.cat([t.flatten(), t.flatten()])
    step, first = {"one row for all": (0, 0), "windows": (8, 0), "odd start": (64, 1)}[rows]
    args[at] = memory.as_strided(t.shape, (step, 1), first).view(args[at].shape)
    check(args, mlp.forward(*grouped(*args), "", config=CONFIGS["descriptors"])[0])
    assert (described == []) is (which == "x")


@every_config
def test_bad_row_spoils_another(config, device):
    args = arguments(2, 33, 192, 64, torch.float16, device)
    expected = mlp.forward(*grouped(*args), "", config=CONFIGS[config])[0]
    args[0][1, 7, 5] = float("nan")
    out = mlp.forward(*grouped(*args), "", config=CONFIGS[config])[0]
    assert out[1, 7].isnan().all()
    out[1, 7] = expected[1, 7]
    assert torch.equal(out, expected)


def test_gradients_differ_where_the_forward_kept_nothing(device, monkeypatch):
    """With 'fc1' computed again the forward may be one kernel."""
    ran = []
    whole = mlp.whole
    monkeypatch.setattr(mlp, "whole", lambda *args: ran.append(1) or whole(*args))
    x, nw, nb, _, _, w1, b1, w2, b2, *_ = arguments(2, 37, 192, 64, torch.float16, device)
    leaves = [t.requires_grad_() for t in (x, nw, nb, w1, b1, w2, b2)]
    cotangent = draw(2, 37, 192, dtype=torch.float16, device=device, seed=9)
    found = {}
    for recompute, config in (("fc1", CONFIGS["descriptors"].as_dict()), ("act", None)):
        with dispatch.trying("mlp", "kernel", config):
            out = ops.mlp(*leaves, recompute=recompute)
        found[recompute] = torch.autograd.grad(out, leaves, cotangent)
    assert len(ran) == 1
    wide = [t.detach().double().requires_grad_() for t in leaves]
    x, nw, nb, w1, b1, w2, b2 = wide
    truth = torch.autograd.grad(reference.mlp(x, nw, nb, 1e-6, "layer", w1, b1, w2, b2), wide, cotangent.double())
    # the two products of the other way are held to stock operators in test_linear_gradients.py
    for out, ref, low in zip(found["fc1"], truth, found["act"], strict=True):
        accept(out, ref, low, grad=True, k=rms_ratio_of_few(out.numel(), out.dtype))


def test_call_that_it_cannot_run_gets_wrong_numbers(device):
    config = CONFIGS["pointers"]
    for shape, dtype, saves, reason in (
        ((1, 5, 200, 64), torch.float16, "", "width 200"),
        ((1, 5, 192, 72), torch.float16, "", "72 hidden numbers"),
        ((1, 5, 192, 64), torch.float32, "", "one half precision only"),
        ((1, 5, 192, 64), torch.float16, "act", "what its backward keeps"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            mlp.forward(*grouped(*arguments(*shape, dtype, device)), saves, config=config)
