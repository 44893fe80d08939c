"""The norm kernels against fp64, by the rule that stock norms set: widths, layouts, kinds, sums, extreme rows."""

import pytest
import torch
from attention_cases import DTYPES, INTERPRETED, draw, every_dtype
from launches import Launches
from linear_cases import (
    LAYOUTS,
    Steps,
    differentiated,
    far_apart,
    few_programs,
    judge,
    judge_all,
    padded_by_nan,
    yardsticks,
)

from vitfast import ops, reference
from vitfast.choose import dispatch
from vitfast.kernels.operands import Norm, Tail
from vitfast.kernels.triton import layer_norm

WIDTHS = (64, 72, 192, 197, 384, 768, 1000, 1024, 1280, 8192)
KINDS = ("layer", "rms")
EPS = 1e-6
# gradients of x, weight and bias, where these are there
ALL = (True, True, True)
every_kind = pytest.mark.parametrize("kind", KINDS)
NAMES = ("x", "branch", "gamma", "weight", "bias")


def images_of(C):
    """So many rows that a program of the backward takes more than a tile, the last one cut."""
    return (7, 23) if C <= 128 else (3, 19) if C <= 512 else (3, 5) if C <= 2048 else (3, 1)


def parts(C, dtype, device, kind, *, of_sum=False, wide=False, shape=None):
    """Tensors by name; wide: the residual and the parameters in fp32 beside a branch in `dtype`."""
    B, T = shape or images_of(C)
    high = torch.float32 if wide else dtype
    new = lambda *shape, seed, to=high: draw(*shape, dtype=to, device=device, seed=seed)  # noqa: E731
    return {
        "x": new(B, T, C, seed=1) + 3,
        "branch": new(B, T, C, seed=2, to=dtype) if of_sum else None,
        "gamma": new(C, seed=3, to=dtype) if of_sum else None,
        "weight": 1 + new(C, seed=4) / 4,
        "bias": new(C, seed=5) if kind == "layer" else None,
    }


def factors(B, dtype, device):
    return torch.tensor([2.0, 0.0, 1.25]).repeat(B)[:B].to(dtype).to(device)


def normed(x, branch, gamma, weight, bias, *, kind, row_scale=None, steps=None):
    """What is true: the norm, or the sum and its norm. steps: `Steps` of the dtype in which the sum is written."""
    if branch is None:
        return reference.layer_norm(x, weight, bias, EPS, kind)
    row_scale = None if row_scale is None else row_scale.to(branch.dtype)
    total = x + reference.scale_branch(branch, gamma, row_scale)
    if steps is not None:
        total = steps.rounded(total)
    # as wide as the inputs are in fp64, else the branch's
    out_dtype = None if branch.dtype is torch.float64 else branch.dtype
    return total, reference.layer_norm(total, weight, bias, EPS, kind, out_dtype)


def by_kernels(given, kind, cotangents, row_scale=None):
    """(results, gradients) in the order of `differentiated`."""
    x, branch, gamma, weight, bias = given.values()
    norm, more = Norm(weight, bias, EPS, kind), {"branch": branch, "tail": Tail(gamma, row_scale)}
    out_dtype = x.dtype if branch is None else branch.dtype
    total, out, *_ = layer_norm.forward(x, norm, out_dtype, **more)
    with few_programs():
        if branch is None:
            dx, dweight, dbias, *_ = layer_norm.backward(*cotangents, x, norm, ALL)
            return [out], [dx, None, None, dweight, dbias]
        dx, dweight, dbias, dbranch, dgamma = layer_norm.backward_of_sum(
            cotangents[1], total, norm, ALL, total_grad=cotangents[0], branch_dtype=branch.dtype,
            need_gamma=gamma is not None, **more,
        )  # fmt: skip
    return [total, out], [dx, dbranch, dgamma, dweight, dbias]


def check(given, kind, *, row_scale=None, scale=1.0):
    """Forward and backward with random cotangents, held to the rule; what the kernels gave."""
    of_sum = given["branch"] is not None
    like = [given["x"]] if not of_sum else [given["x"], given["branch"]]
    cotangents = [draw(*t.shape, dtype=t.dtype, device=t.device, scale=scale, seed=11 + i) for i, t in enumerate(like)]
    how = {"kind": kind, "row_scale": row_scale}
    beside = yardsticks(
        lambda **given: normed(**given, **how), given, cotangents,
        lambda **leaves: normed(**leaves, **how, steps=Steps(given["x"].dtype)),
    )  # fmt: skip
    outs, grads = zip(*beside, strict=True)
    out, out_grads = by_kernels(given, kind, cotangents, row_scale)
    judge_all(("sum", "normed") if of_sum else ("normed",), out, *outs, grad=False)
    judge_all(NAMES, out_grads, *grads)
    return [*out, *out_grads]


@every_dtype
@every_kind
@pytest.mark.parametrize("C", WIDTHS)
def test_width_is_padded_wrongly_or_eps_is_another(C, kind, dtype, device):
    check(parts(C, dtype, device, kind), kind)


@every_dtype
@pytest.mark.parametrize("C, kind", [(72, "layer"), (72, "rms"), (197, "layer"), (8192, "layer")])
def test_sum_is_scaled_wrongly_or_its_gradient_is(C, kind, dtype, device):
    """LayerScale and stochastic depth. 8192 is past the width up to which one kernel does all of the backward."""
    given = parts(C, dtype, device, kind, of_sum=True)
    check(given, kind, row_scale=factors(given["x"].shape[0], dtype, device))


@every_dtype
@pytest.mark.parametrize("left_out", ["gamma", "row_scale", "weight", "bias"])
def test_part_that_was_not_given_is_needed(left_out, dtype, device):
    given = parts(192, dtype, device, "layer", of_sum=True)
    row_scale = None if left_out == "row_scale" else factors(3, dtype, device)
    if left_out == "weight":
        given |= {"weight": None, "bias": None}
    check(given | {left_out: None} if left_out in given else given, "layer", row_scale=row_scale)


@pytest.mark.parametrize("dtype", [t for t in DTYPES.values() if t is not torch.float32], ids=str)
@every_kind
def test_residual_is_rounded_to_the_branch(kind, dtype, device):
    """An fp32 residual stream beside a branch in half precision, as under autocast."""
    given = parts(192, dtype, device, kind, of_sum=True, wide=True)
    given["x"] += 1e-4
    total, out, dx, dbranch, *_ = check(given, kind, row_scale=factors(3, dtype, device))
    assert (total.dtype, out.dtype, dx.dtype, dbranch.dtype) == (torch.float32, dtype, torch.float32, dtype)


@pytest.mark.parametrize("C, dtype", [(192, torch.float32), (197, torch.float16)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stride_is_ignored(layout, C, dtype, device):
    """On a GPU loads of another width add up in another order, so that only aligned rows give the same bits."""
    place, aligned = LAYOUTS[layout]
    given, row_scale = parts(C, dtype, device, "layer", of_sum=True, shape=(3, 7)), factors(3, dtype, device)
    apart = given | {name: place(given[name]) for name in ("x", "branch")}
    assert not apart["x"].is_contiguous()
    found = check(apart, "layer", row_scale=row_scale)
    cotangents = [place(draw(*given["x"].shape, dtype=dtype, device=device, seed=i)) for i in (11, 12)]
    for grads in (cotangents, [t.contiguous() for t in cotangents]):
        results, gradients = by_kernels(given, "layer", grads, row_scale)
        if INTERPRETED or (aligned and C % 8 == 0):
            assert all(map(torch.equal, found, results + gradients))


def test_one_number_for_all_rows_is_read_once(device):
    """An image or token that is expanded, and gradients that are: of .sum(), whose strides are all 0."""
    x, weight, bias = (draw(*shape, device=device, seed=i) for i, shape in enumerate(((1, 5, 72), (72,), (72,))))
    for rows in (x.expand(3, -1, -1), x[:, :1].expand(-1, 4, -1), x[:, :, :1].expand(-1, -1, 72)):
        for grad in (torch.ones(1, 1, 1, device=device), draw(1, 1, 72, device=device)):
            grad = grad.expand(rows.shape)

            def call(t, g):
                norm = Norm(weight, bias, EPS, "layer")
                return layer_norm.forward(t, norm, torch.float32)[1], *layer_norm.backward(g, t, norm, ALL)[:3]

            assert all(map(torch.equal, call(rows, grad), call(rows.contiguous(), grad.contiguous())))


@every_dtype
def test_class_token_of_each_image_is_another_row(dtype, device):
    x, weight = draw(5, 7, 72, dtype=dtype, device=device), draw(72, dtype=dtype, device=device)
    for part in (x[:, :1], x[:, 0], x[:, -1:], x[::2, 1:6:2]):
        found = layer_norm.forward(part, Norm(weight, None, EPS, "layer"), dtype)
        assert found[1].is_contiguous() and found[1].shape == part.shape
        plain = layer_norm.forward(part.contiguous(), Norm(weight, None, EPS, "layer"), dtype)
        assert all(map(torch.equal, found[1:], plain[1:]))


@every_kind
@pytest.mark.parametrize("C", (197, 768))
def test_variance_is_a_difference_of_large_numbers(C, kind, device):
    """Rows of mean 30 and standard deviation 0.05, in fp32, where E[x^2] - E[x]^2 has three digits left."""
    given = parts(C, torch.float32, device, kind) | {"x": 30 + draw(3, 5, C, device=device, scale=0.05)}
    cotangent = [draw(3, 5, C, device=device, seed=4)]
    call = lambda **given: normed(**given, kind=kind)  # noqa: E731
    (ref, ref_grads), (low, low_grads), _ = yardsticks(call, given, cotangent)
    out, out_grads = by_kernels(given, kind, cotangent)
    for name, got, true, stock in zip(("out", *NAMES), out + out_grads, ref + ref_grads, low + low_grads, strict=True):
        if true is not None:
            error, beside = ((t - true).norm() / true.norm() for t in (got, stock))
            # the mean, and with it all of a row, is uncertain by some 1e-7 * 30 / 0.05
            assert error <= max(2 * beside, 3e-5), f"{name}: {error:.1e}, stock's {beside:.1e}"


ROWS = {
    "6e4": lambda t: 6e4 * t.sign(),
    "largest": lambda t: torch.finfo(torch.float16).max * t.sign(),
    "tiny": lambda t: 1e-4 * t,
    "a channel of 1e3": lambda t: t + 1e3 * (torch.arange(t.shape[-1], device=t.device) == 17),
    "mean 30": lambda t: 30 + 0.05 * t,
    "denormal": lambda t: t * 2.0**-20,
}


@every_kind
@pytest.mark.parametrize("rows", ROWS)
def test_statistics_are_not_fp32(rows, kind, device):
    """Rows in fp16 whose squares or sums are no fp16 numbers; gradients so large that those of x are."""
    given = parts(768, torch.float16, device, kind)
    x = ROWS[rows](draw(3, 5, 768, device=device)).half()
    check(given | {"x": x}, kind, scale=x.float().std().clamp(min=1).sqrt().item())


@every_dtype
@every_kind
def test_rows_past_the_end_are_divided_by_nothing(kind, dtype, device):
    """Without eps the deviation of what is not there is 0, and the sums over all rows hold it."""
    given = parts(768, dtype, device, kind, of_sum=True, shape=(1, 5))
    x, branch, gamma, weight, bias = given.values()
    grads = [draw(1, 5, 768, dtype=dtype, device=device, seed=seed) for seed in (6, 7)]
    found = layer_norm.backward(
        grads[0], x, Norm(weight, bias, 0.0, kind), ALL, total_grad=grads[1], branch=branch, branch_dtype=dtype,
        tail=Tail(gamma), need_gamma=True,
    )  # fmt: skip
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    out = reference.layer_norm(leaves[0], leaves[1], None, 0.0, kind)
    (dweight,) = torch.autograd.grad(out, leaves[1:], grads[0].double())
    assert all(t is None or t.isfinite().all() for t in found)
    torch.testing.assert_close(found[1].double(), dweight, rtol=2e-2, atol=2e-2)


@every_dtype
@pytest.mark.parametrize("value", (0.0, 3.0, -0.5, 1024.0))
def test_constant_row_is_divided_by_nothing(value, dtype, device):
    """Sums that every order has exactly: the normed row is the bias, and no gradient is infinite."""
    x = torch.full((2, 3, 768), value, dtype=dtype, device=device)
    weight, bias, grad = (draw(*s, dtype=dtype, device=device, seed=i) for i, s in enumerate(((768,), (768,), x.shape)))
    norm = Norm(weight, bias, EPS, "layer")
    _, out, mean, rstd = layer_norm.forward(x, norm, dtype)
    # a GPU divides by 768 to within two units in the last place
    near = {"rtol": 0, "atol": 0 if INTERPRETED else 1e-2}
    torch.testing.assert_close(out, bias.expand_as(out), **near)
    torch.testing.assert_close(mean, torch.full_like(mean, value), rtol=0 if INTERPRETED else 3e-7, atol=0)
    grads = layer_norm.backward(grad, x, norm, ALL)
    assert all(g.isfinite().all() for g in grads[:3])


@every_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_one_bad_row_spoils_another(bad, kind, device):
    given = parts(72, torch.float32, device, kind, of_sum=True)
    cotangents = [draw(*given["x"].shape, device=device, seed=i) for i in (1, 2)]
    (total, out), (dx, dbranch, *_) = by_kernels(given, kind, cotangents)
    given["x"][1, 3, 5] = bad
    (total_now, out_now), (dx_now, dbranch_now, *vectors) = by_kernels(given, kind, cotangents)
    call = lambda **given: normed(**given, kind=kind)  # noqa: E731
    # on a CPU: what a row of an infinity is on a GPU depends on the operator that torch takes
    there = {name: t.cpu() if isinstance(t, torch.Tensor) else t for name, t in given.items()}
    (_, true), _ = differentiated(call, there, [t.cpu() for t in cotangents], lambda t: t.double())
    assert torch.equal(out_now.isnan().cpu(), true.isnan()) and out_now[1, 3].isnan().any()
    rows = torch.ones(given["x"].shape[:2], dtype=torch.bool, device=device)
    rows[1, 3] = False
    for now, before in ((total_now, total), (out_now, out), (dx_now, dx), (dbranch_now, dbranch)):
        assert torch.equal(now[rows], before[rows])
    assert dx_now[1, 3].isnan().any()
    # a weight sees every row
    assert all(v.isnan().any() for v in vectors[:2] if v is not None)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_empty_batch_is_refused_or_leaves_garbage(shape, device):
    given = parts(72, torch.float32, device, "layer", of_sum=True, shape=shape)
    cotangents = [torch.empty_like(given["x"])] * 2
    results, (dx, dbranch, *vectors) = by_kernels(given, "layer", cotangents)
    assert all(t.shape == given["x"].shape for t in (*results, dx, dbranch))
    assert all(torch.equal(v, torch.zeros_like(v)) for v in vectors)


@pytest.mark.alone
def test_row_past_two_to_the_31_is_read_elsewhere(device):
    C = 64
    far = far_apart(C, torch.float16, device)
    near, norm = far.contiguous(), Norm(draw(C, dtype=torch.float16, device=device), None, EPS, "layer")
    assert torch.equal(*(layer_norm.forward(t, norm, torch.float16)[1] for t in (far, near)))
    with few_programs():
        for grad, x in ((far, near), (near, far), (far, far)):
            found = layer_norm.backward(grad, x, norm, ALL)
            plain = layer_norm.backward(near, near, norm, ALL)
            assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])


@every_dtype
def test_two_runs_differ(dtype, device):
    given = parts(384, dtype, device, "layer", of_sum=True, shape=(3, 19) if INTERPRETED else (64, 197))
    cotangents = [draw(*given["x"].shape, dtype=dtype, device=device, seed=i) for i in (1, 2)]
    row_scale = factors(given["x"].shape[0], dtype, device)
    first = by_kernels(given, "layer", cotangents, row_scale)
    for _ in range(1 if INTERPRETED else 250):
        again = by_kernels(given, "layer", cotangents, row_scale)
        assert all(map(torch.equal, again[0] + again[1], first[0] + first[1]))


@every_kind
def test_gradient_that_nobody_needs_is_made_or_one_that_is_needed_is_not(kind, device):
    given = parts(72, torch.float32, device, kind, of_sum=True)
    cotangents = [draw(*given["x"].shape, device=device, seed=i) for i in (1, 2)]
    (total, _), (dx, dbranch, dgamma, dweight, dbias) = by_kernels(given, kind, cotangents)
    x, branch, gamma, weight, bias = given.values()
    for only in range(5):
        need = [i == only for i in range(5)]
        if bias is None:
            need[2] = False
        with few_programs():
            found = layer_norm.backward_of_sum(
                cotangents[1], total, Norm(weight, bias, EPS, kind), need[:3], total_grad=cotangents[0],
                branch=branch if need[4] else None, branch_dtype=branch.dtype if need[3] else None, tail=Tail(gamma),
                need_gamma=need[4],
            )  # fmt: skip
        for got, needed, whole in zip(found, need, (dx, dweight, dbias, dbranch, dgamma), strict=True):
            assert (got is not None) == needed
            assert got is None or torch.equal(got, whole)


@pytest.mark.parametrize("unused", ["sum", "normed"])
def test_gradient_of_a_result_that_nobody_uses(unused, device):
    """None for what depends on it alone, in eager and as the shape function says."""
    given = parts(72, torch.float32, device, "layer", of_sum=True)
    call = lambda x, branch, gamma, weight, bias: ops.add_layer_norm(  # noqa: E731
        x, branch, weight, bias, EPS, "layer", gamma
    )
    cotangents = [draw(*given["x"].shape, device=device, seed=i) for i in (1, 2)]
    cotangents[("sum", "normed").index(unused)] = None
    true = lambda **given: normed(**given, kind="layer")  # noqa: E731
    (_, ref), (_, low), _ = yardsticks(true, given, cotangents)
    _, grads = differentiated(call, given, cotangents, lambda t: t.clone())
    judge_all(NAMES, grads, ref, low)


def test_op_runs_something_else(monkeypatch, device):
    launches = Launches(monkeypatch, layer_norm)
    given = parts(72, torch.float32, device, "layer", of_sum=True)
    x, branch, gamma, weight, bias = (t.requires_grad_() for t in given.values())
    alone = lambda: ops.layer_norm(x, weight, bias, EPS)  # noqa: E731
    summed = lambda: sum(ops.add_layer_norm(x, branch, weight, bias, EPS, "layer", gamma))  # noqa: E731
    for call in (alone, summed):
        launches.names.clear()
        out = call()
        assert launches.names == ["norm_forward"]
        out.square().sum().backward()
        assert launches.names[1] == "norm_backward" and set(launches.names[2:]) == {"add_up"}
        launches.names.clear()
        with dispatch.backend("stock"):
            stock = call()
            stock.square().sum().backward()
        assert not launches.names
        judge(out, call().double(), stock)
    ops.layer_norm(x.double(), weight.double(), bias.double(), EPS)
    assert launches.names == ["norm_forward"]


@pytest.mark.parametrize("kind", KINDS)
def test_torch_sees_another_op_than_there_is(kind, device):
    given = parts(72, torch.float32, device, kind, of_sum=True, shape=(2, 3))
    x, branch, gamma, weight, bias = (None if t is None else t.requires_grad_() for t in given.values())
    args = (padded_by_nan(x.detach(), after=1).requires_grad_(), weight, bias, EPS, kind, "float32")
    torch.library.opcheck(torch.ops.vitfast.layer_norm.default, args)
    args = (x, branch, weight, bias, EPS, kind, gamma, factors(2, torch.float32, device))
    torch.library.opcheck(torch.ops.vitfast.add_layer_norm.default, args)
