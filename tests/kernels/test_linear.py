"""The kernels of linear layers and MLPs against fp64, by the rule that stock operators set."""

import pytest
import torch
from attention_cases import DTYPES, INTERPRETED, draw, every_dtype
from launches import Launches
from linear_cases import (
    ACTIVATIONS,
    LAYOUTS,
    MECHANISMS,
    all_of_a_block,
    as_double,
    check_forward,
    far_apart,
    grouped,
    judge,
    last_rows_alone,
    layer,
    mlp_layer,
    multiprocessors,
    padded_by_nan,
    shared,
    wide,
    yardsticks,
)
from pairwise import covering

import vitfast
from vitfast import ops, reference
from vitfast.choose import config_tables, dispatch
from vitfast.choose.config_tables import Product, ProductRow
from vitfast.kernels.triton import layer_norm, linear, mlp, mlp_gated
from vitfast.kernels.triton.launch import architecture, device_reasons
from vitfast.kernels.triton.linear import After

every_mechanism = pytest.mark.parametrize("mechanism", MECHANISMS)
every_activation = pytest.mark.parametrize("act", ACTIVATIONS[1:])
# images, tokens, K, N
SIZES = [
    (1, 1, 64, 72), (2, 1, 192, 64), (1, 63, 72, 192), (4, 16, 64, 64), (5, 13, 197, 72), (1, 197, 64, 192),
    (2, 197, 72, 72), (1, 2, 384, 768), (3, 1, 768, 384), (1, 65, 192, 197), (1, 1, 1000, 1280), (2, 1, 1280, 1000),
]  # fmt: skip


@every_mechanism
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_size_leaves_a_tail_out_or_reads_past_the_end(size, mechanism, device):
    """In each dtype half of the pairs of size and mechanism: all of both would take a minute."""
    config = MECHANISMS[mechanism] if max(size) < 384 else wide(MECHANISMS[mechanism])
    turn = SIZES.index(size) + list(MECHANISMS).index(mechanism)
    dtype = list(DTYPES.values())[turn % len(DTYPES)]
    # folding a thousand rows takes the interpreter seconds, and a thousand columns are a norm's test, not this one's
    norm = "layer" if turn % 4 < 2 and max(size) < 1000 else "none"
    check_forward(config, layer(*size, dtype, device, norm=norm, act="gelu", residual="same"), saves=True)


FLAGS = {
    "norm": ("none", "layer", "rms"),
    "act": ACTIVATIONS,
    "gamma": (False, True),
    "row_scale": (False, True),
    "residual": ("none", "same", "wide"),
    "bias": (True, False),
    "wide_x": (False, True),
    "saves": (False, True),
    "mechanism": tuple(MECHANISMS),
    "dtype": tuple(DTYPES),
}


def makes_sense(case):
    """wide_x: for norms. A layer with activation and LayerScale has no backward here."""
    return not (case["wide_x"] and case["norm"] == "none") and not (
        case["saves"] and case["gamma"] and case["act"] != "none"
    )


CASES = list(covering(FLAGS, makes_sense))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_two_things_around_a_product_do_not_go_together(case, device):
    case = dict(case)
    dtype, config, saves = DTYPES[case.pop("dtype")], MECHANISMS[case.pop("mechanism")], case.pop("saves")
    check_forward(config, layer(3, 23, 64, 72, dtype, device, **case), saves)


@every_mechanism
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_residual_and_scales_are_forgotten_in_one_way_to_share_the_work(mechanism, dtype, device):
    """All of them together, after sums of which each part is missed."""
    how = {"gamma": True, "row_scale": True, "residual": "same"}
    given = layer(3, 23, 192, 72, dtype, device, norm="layer", **how)
    out, *_ = check_forward(MECHANISMS[mechanism], given, saves=True)
    # an image whose branch was dropped is its residual, to the bit
    assert torch.equal(out[1], given["residual"][1]) and not torch.equal(out[0], given["residual"][0])


def count(mechanism, M, N, K):
    """(programs that take part, programs a tile) of a product."""
    config, found = MECHANISMS[mechanism], []

    def launch(kernel, grid, tensors, numbers, constants, *rest, **more):
        found.append((grid[0], constants["SPLIT"]))

    x, weight = torch.empty(M, K, device="meta"), torch.empty(N, K, device="meta")
    with pytest.MonkeyPatch.context() as patch, multiprocessors(3 if config.persistent else 64):
        patch.setattr(linear, "launch", launch)
        patch.setattr(linear, "_aligned", lambda *tensors: True)
        linear.product(x, weight, After(x.dtype), config)
    return found[0]


def test_work_is_not_shared_as_the_tests_believe():
    """Three programs for four tiles, and sums in two and four parts."""
    assert count("persistent", 69, 72, 192) == (3, 1)
    assert count("swap", 69, 72, 192)[1] == 2 and count("split", 69, 72, 192)[1] == 4
    assert count("descriptors", 69, 72, 192)[0] == 9


def configurations(arch):
    return [row.config for row in config_tables.PRODUCT[arch] if row.config.kernel == "tiles"]


OF_TABLES = list(dict.fromkeys(config for arch in config_tables.ARCHITECTURES for config in configurations(arch)))


@pytest.mark.parametrize("config", OF_TABLES, ids=lambda config: "-".join(map(str, config.as_dict().values())))
def test_configuration_of_a_table_is_wrong(config, device):
    """A tile and a part of the next one each way; on a GPU where it is of its architecture, and so sure to fit."""
    if not INTERPRETED and config not in configurations(architecture(device)):
        return
    # so long a sum that it is split
    M, N, K = config.block_m + 9, config.block_n + 40, 2 * config.block_k * min(config.split, 2) + 24
    given = layer(1, M, K, N, torch.float16, device, norm="layer", act="gelu")
    check_forward(config, given, saves=True)
    rows, w = given["x"].flatten(0, 1), given["weight"].t().contiguous()
    out, *_ = shared(config, linear.product, rows, w, After(torch.float16), across=True)
    judge(out, rows.double() @ w.double(), rows @ w, what="across")


@every_mechanism
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stride_is_ignored(layout, mechanism, device):
    """Rows, weight and residual as they come. Where descriptors cannot start, another configuration does it."""
    config, (place, aligned) = MECHANISMS[mechanism], LAYOUTS[layout]
    turn = list(LAYOUTS).index(layout) + list(MECHANISMS).index(mechanism)
    # a sum whose last part is cut: what lies behind it is NaN
    given = layer(3, 23, 72, 64, list(DTYPES.values())[turn % len(DTYPES)], device, act="silu", residual="same")
    plain = check_forward(config, given, saves=True)
    given["x"], given["residual"] = place(given["x"]), place(given["residual"])
    given["weight"] = padded_by_nan(given["weight"][:, None], after=8 if aligned else 1)[:, 0]
    found = check_forward(config, given, saves=True)
    if aligned or not config.descriptors:
        assert torch.equal(found[0], plain[0]) and torch.equal(found[3], plain[3])


@every_mechanism
def test_class_token_of_each_image_is_another_row(mechanism, device):
    given = layer(5, 7, 64, 72, torch.float16, device, residual="same", row_scale=True)
    for part in ((slice(None), slice(1)), (slice(None), slice(6, None)), (slice(None), slice(1, 6, 2))):
        few = given | {name: given[name][part] for name in ("x", "residual")}
        out, *_ = check_forward(MECHANISMS[mechanism], few)
        assert out.is_contiguous() and out.shape == few["residual"].shape


@every_mechanism
def test_one_row_for_all_images_or_a_transposed_weight_is_misread(mechanism, device):
    given = layer(3, 5, 64, 72, torch.float16, device, act="gelu", residual="same")
    given["x"], given["residual"] = given["x"][:1].expand(3, -1, -1), given["residual"][:, :1].expand(-1, 5, -1)
    given["weight"] = given["weight"].t().contiguous().t()
    check_forward(MECHANISMS[mechanism], given)
    given["x"] = given["x"][:, :1].expand(-1, 5, -1)
    check_forward(MECHANISMS[mechanism], given)


OVERLAPPING = {
    "one row for all": lambda t: t[:, :1].expand(-1, t.shape[1], -1),
    "windows": lambda t: t.flatten().unfold(0, t.shape[-1], 8)[None, : t.shape[1]],
}


@pytest.mark.parametrize("rows", OVERLAPPING)
@pytest.mark.parametrize("which", ("x", "residual", "weight"))
@pytest.mark.parametrize("mechanism", [name for name, config in MECHANISMS.items() if config.descriptors])
def test_descriptor_is_made_of_rows_that_overlap(mechanism, which, rows, described, device):
    """Bulk copies are for rows of which none lies in another."""
    given = layer(1, 5, 64, 64, torch.float16, device, residual="same")
    plain = check_forward(MECHANISMS[mechanism], given)
    # x, weight, result and, unless it is read by pointers, residual; there is no second output
    assert len(described) == 4 - MECHANISMS[mechanism].ahead
    given[which] = OVERLAPPING[rows](given[which][None] if which == "weight" else given[which])
    if which == "weight":
        given[which] = given[which][0]
    described.clear()
    out, *_ = check_forward(MECHANISMS[mechanism], given)
    assert described == [] and not torch.equal(out, plain[0])


EXTREME = {
    "a channel of 1e3": lambda t: t + 1e3 * (torch.arange(t.shape[-1], device=t.device) == 17),
    "mean 30": lambda t: 30 + 0.05 * t,
    "6e4": lambda t: 6e4 * t.sign(),
    "tiny": lambda t: 1e-4 * t,
    "scaled rows": lambda t: t * torch.logspace(-3, 3, t.shape[1], device=t.device)[:, None],
}


@pytest.mark.parametrize("norm", ("layer", "rms"))
@pytest.mark.parametrize("rows", EXTREME)
@pytest.mark.parametrize("mechanism", ("persistent", "blas"))
def test_folded_norm_is_further_off_than_one_before_the_product(mechanism, rows, norm, device):
    """Massive activations and large means, which the fold takes away after the product only."""
    for dtype in DTYPES.values():
        given = layer(3, 23, 192, 72, dtype, device, norm=norm)
        given["x"] = EXTREME[rows](given["x"].float()).to(dtype)
        if dtype is not torch.float32:
            check_forward(MECHANISMS[mechanism], given, saves=True)
            continue
        # the mean, and with it all of a row, is uncertain by some 1e-7 * 30 / 0.05, in stock operators as well
        out, *_ = shared(MECHANISMS[mechanism], linear.forward, *grouped(given), False)
        ref = reference.linear(**as_double(given))
        error, stock = ((t - ref).norm() / ref.norm() for t in (out, reference.linear(**given)))
        assert error <= max(2 * stock, 3e-5 if rows == "mean 30" else 1e-6)


def test_norm_of_wide_rows_is_rounded_before_its_mean_is_gone(device):
    """An fp32 residual stream before a product in half precision, rows of mean 30."""
    dtype = list(DTYPES.values())[-1]
    given = layer(3, 23, 192, 72, dtype, device, norm="layer", act="gelu", wide_x=True)
    given["x"] = 30 + given["x"] * 0.05
    for mechanism in ("pointers", "blas"):
        check_forward(MECHANISMS[mechanism], given, saves=True)


def special_values(dtype, device):
    """As rows of 16: what overflows or underflows inside activations, and ordinary values."""
    most = torch.finfo(dtype).max / 2
    values = [0.0, 1e-30, 1e-8, 1e-3, 1.0, 5.0, 10.0, 17.0, 88.0, 89.0, 1e4, most, -0.5, 2.0, 3.0, 4.0]
    return torch.tensor([values, [-v for v in values]], device=device).to(dtype)


@every_dtype
@every_activation
def test_activation_overflows_or_its_slope_does(act, dtype, device):
    y = special_values(dtype, device)
    true = y.double().requires_grad_()
    ref = reference.activation(true, act)
    (slope,) = torch.autograd.grad(ref.sum(), true)
    eps = torch.finfo(dtype).eps
    # erf to 1.5e-7, as far as fp32 has it; nothing at all where x is tiny
    near = eps * (2 * ref.abs() + torch.where(y.abs() > 1e-20, 4 * 2.0**-23 / eps, 0.0)) + 1e-45
    out, *_ = linear.finish(y, After(dtype, act=act))
    back, again, _ = linear.finish(torch.ones_like(y), After(dtype, act=act, slope=True, beside=y, aside=True))
    for values in (out, again):
        assert ((values.double() - ref).abs() <= near * (1 + y.abs().double().clamp(max=8))).all(), (values, ref)
    assert ((back.double() - slope).abs() <= 2 * eps * slope.abs() + 8 * 2.0**-23).all(), (back, slope)


@every_dtype
@every_activation
def test_activation_is_of_another_flavour(act, dtype, device):
    """Between -12 and 12, where the flavours of GELU differ by up to 2e-2; and what bad numbers become."""
    y = torch.linspace(-12, 12, 72 * 41, device=device).view(41, 72).to(dtype)
    grad = draw(41, 72, dtype=dtype, device=device)
    call = lambda y: reference.activation(y, act)  # noqa: E731
    (ref, slope), (low, low_slope), (tight, tight_slope) = yardsticks(call, {"y": y}, [grad])
    out, *_ = linear.finish(y, After(dtype, act=act))
    back, again, sums = linear.finish(grad, After(dtype, act=act, slope=True, beside=y, aside=True, sums=True))
    judge(out, ref[0], low[0], tight=tight[0], what="value")
    judge(again, ref[0], low[0], tight=tight[0], what="value, again in the backward")
    judge(back, slope[0], low_slope[0], tight=tight_slope[0], grad=True, what="slope")
    torch.testing.assert_close(sums.double(), slope[0].sum(0), rtol=1e-5, atol=41 * torch.finfo(dtype).eps)
    bad = torch.tensor([[float("nan"), float("inf"), float("-inf")]], device=device).to(dtype)
    for_bad, *_ = linear.finish(bad, After(dtype, act=act))
    expected = reference.activation(bad.double(), act)
    assert torch.equal(for_bad.isnan(), expected.isnan()) and torch.equal(for_bad.isinf(), expected.isinf())


@every_dtype
def test_gelu_is_further_off_than_its_polynomial(dtype, device):
    """Before the result is rounded: the one for fp32 no more than its arithmetic, the other by what its fit left."""
    y = torch.linspace(-10, 10, 64 * 1024, device=device).view(64, 1024).to(dtype)
    ref, eps = reference.activation(y.double(), "gelu"), torch.finfo(dtype).eps
    out, *_ = linear.finish(y, After(dtype, act="gelu"))
    # of numbers below the smallest normal one half the distance between them
    rounding = (eps / 2 * ref.abs()).clamp(min=torch.finfo(dtype).tiny * eps / 2)
    limit = 1.3e-8 if dtype is torch.float32 else 5.4e-7
    excess = (out.double() - ref).abs() - rounding - limit - 2 * 2.0**-24 * y.double().abs().clamp(max=4)
    assert excess.max() <= 0


@pytest.mark.alone
def test_row_past_two_to_the_31_is_read_elsewhere(device):
    """Rows and residual whose offsets need 64 bits, in every way to share the work that takes such strides."""
    K = N = 32
    weight = draw(N, K, dtype=torch.float16, device=device)
    x, residual = (far_apart(K, torch.float16, device) for _ in range(2))
    near = [t.contiguous() for t in (x, residual)]
    for config in (MECHANISMS["pointers"], MECHANISMS["persistent"], MECHANISMS["split"]):
        far, found = (
            shared(config, linear.product, rows, weight, After(torch.float16, act="gelu", aside=True, beside=beside))
            for rows, beside in ((x, residual), near)
        )
        assert torch.equal(far[0], found[0]) and torch.equal(far[1], found[1])
    slope = {"act": "gelu", "slope": True, "sums": True}
    far, found = (linear.finish(y, After(torch.float16, beside=b, **slope)) for y, b in ((x, residual), near))
    assert torch.equal(far[0], found[0]) and torch.equal(far[2], found[2])
    far, found = (mlp.mlp_gated.forward(t, "silu") for t in (x, near[0]))
    assert torch.equal(far, found)


@every_mechanism
@pytest.mark.parametrize("bad, dtype", [(float("nan"), torch.float32), (float("inf"), torch.float16)], ids=str)
def test_one_bad_row_spoils_another(bad, dtype, mechanism, device):
    """And is not lost itself: in rows, weight and residual, with tails in all directions."""
    config = MECHANISMS[mechanism]
    given = layer(1, 37, 72, 40, dtype, device, norm="layer", act="gelu", residual="same")
    clean, *_ = shared(config, linear.forward, *grouped(given), False)
    for name, at in (("x", (0, 0, 5)), ("x", (0, 36, 71)), ("residual", (0, 0, 39)), ("weight", (0, 3))):
        spoilt = given | {name: given[name].clone()}
        spoilt[name][at] = bad
        out, *_ = shared(config, linear.forward, *grouped(spoilt), False)
        ref = reference.linear(**as_double(spoilt)).to(dtype)
        assert torch.equal(out.isfinite(), ref.isfinite()), name
        same = ref.isfinite() if name != "weight" else torch.arange(40, device=device).expand_as(ref) > 0
        assert torch.equal(out[same], clean[same]), name


def test_two_runs_differ(device):
    for config in MECHANISMS.values():
        given = layer(2, 23, 192, 72, torch.float16, device, norm="layer", act="gelu", residual="same")
        first = shared(config, linear.forward, *grouped(given), True)
        for _ in range(1 if INTERPRETED else 20):
            again = shared(config, linear.forward, *grouped(given), True)
            assert torch.equal(again[0], first[0]) and torch.equal(again[3], first[3])


# ops


def test_op_runs_something_else(monkeypatch, device):
    launches = Launches(monkeypatch, layer_norm, linear, mlp_gated)
    dtype = torch.float16
    given = layer(2, 9, 64, 72, dtype, device, norm="layer", act="gelu")
    tensors, others = mlp_layer(2, 9, 64, 128, dtype, device, gamma=True, row_scale=True)
    leaves = [given.pop("x"), given.pop("weight"), given.pop("bias")]
    calls = {
        "linear": (lambda: ops.linear(*leaves, **given), ["norm_forward", "fold_norm", "product"], "finish_rows"),
        "mlp": (lambda: ops.mlp(**tensors, **others), ["norm_forward", "fold_norm", "product", "product"], "product"),
    }
    for t in (*leaves, *tensors.values()):
        t.requires_grad_()
    for name, (call, forward, backward) in calls.items():
        launches.names.clear()
        out = call()
        assert launches.names == forward, name
        launches.names.clear()
        out.float().square().sum().backward()
        assert backward in launches.names and "norm_backward" in launches.names, name
        with torch.no_grad(), dispatch.backend("stock"):
            launches.names.clear()
            stock = call()
        assert not launches.names, name
        assert (out - stock).abs().max() < 2e-2 and not torch.equal(out, torch.zeros_like(out))
        with dispatch.backend("stock"):
            call().float().square().sum().backward()
        assert not launches.names, name
    launches.names.clear()
    ops.linear(leaves[0].double(), leaves[1].double(), norm="layer")
    assert not launches.names


# in half precision stock norms on CPUs have statistics in half precision, kernels in fp32, as on GPUs
@pytest.mark.parametrize("dtype", [t for t in DTYPES.values() if not INTERPRETED or t is torch.float32], ids=str)
def test_torch_sees_another_op_than_there_is(dtype, device):
    given = layer(2, 5, 32, 40, dtype, device, norm="layer", act="gelu", residual="same")
    for t in (given["x"], given["weight"], given["norm_weight"], given["residual"]):
        t.requires_grad_()
    torch.library.opcheck(torch.ops.vitfast.linear.default, (*given.values(), True))
    given = layer(2, 5, 32, 40, dtype, device, norm="rms", gamma=True, row_scale=True)
    given["gamma"].requires_grad_()
    torch.library.opcheck(torch.ops.vitfast.linear.default, (*given.values(), True))
    for recompute, gated in (("none", False), ("act", True), ("fc1", False)):
        tensors, others = mlp_layer(2, 5, 32, 48, dtype, device, gated=gated, gamma=True)
        x, norm_weight, norm_bias, w1, b1, w2, b2, gamma = (t.requires_grad_() for t in tensors.values())
        args = (x, norm_weight, norm_bias, 1e-6, "layer", w1, b1, w2, b2, "gelu", gated, gamma, None, recompute)
        torch.library.opcheck(torch.ops.vitfast.mlp.default, args)


def test_empty_batch_is_refused(device):
    given = layer(2, 5, 32, 40, torch.float32, device, norm="layer", act="gelu", residual="same")
    weight = given["weight"].requires_grad_()
    for shape in ((0, 5), (2, 0)):
        few = given | {name: given[name][: shape[0], : shape[1]] for name in ("x", "residual")}
        out = ops.linear(few.pop("x"), **few)
        assert out.shape == (*shape, 40)
        (grad,) = torch.autograd.grad(out.sum(), weight)
        assert not grad.any()


def test_reason_against_the_kernels_is_forgotten(device):
    x, weight = torch.empty(2, 8200, device=device), torch.empty(3, 8200, device=device)
    none = (None, "none", True)
    assert not linear.why_not(x, weight, "none", *none)
    assert "rows of 8200" in linear.why_not(x, weight, "layer", *none)[0]
    assert "float64" in linear.why_not(x, weight.double(), "none", *none)[0]
    assert "gamma" in linear.why_not(x, weight, "none", weight[0], "gelu", True)[0]
    assert not linear.why_not(x, weight, "none", weight[0], "gelu", False)
    assert "rows of 8200" in mlp.why_not(x, weight)[0] and "rows of 8200" in layer_norm.why_not(x)[0]
    assert device_reasons(torch.device("meta"), torch.float64)


def test_helper_of_the_tests_on_gpus_is_broken(monkeypatch, device):
    """A block's kernels in one function, and last rows against the same rows alone, small."""
    monkeypatch.setattr(config_tables, "PRODUCT", {arch: BY_TILES for arch in config_tables.ARCHITECTURES})
    step = all_of_a_block(2, 5, 32, torch.float32, device)
    assert all(map(torch.equal, step(), step()))
    # a whole tile: the interpreter's products are numpy's, in which a row's bits may depend on its place among others
    last_rows_alone(320, 32, torch.float32, device, alone=64)


BY_TILES = [ProductRow(Product("tiles", 64, 64, 32, parts=2), bits=32)]
SMALL = {"image_size": 32, "dim": 64, "depth": 2, "heads": 2, "mlp_dim": 96, "num_classes": 10}
MODELS = {
    "plain": {},
    "scaled and dropped, registers": {"layer_scale": 0.3, "drop_path": 0.4, "register_tokens": 2},
    "gated, rms": {"mlp": "swiglu_packed", "norm": "rms", "activation": "silu"},
}


@pytest.mark.parametrize(
    "changes, products", [*((name, "by tiles") for name in MODELS), ("scaled and dropped, registers", "by cuBLAS")]
)
def test_whole_model_is_another_one_on_kernels(changes, products, monkeypatch, device):
    """Logits and every gradient of a small ViT in training, against the same model without the kernels."""
    if products == "by tiles":
        # in fp32, where a difference is a bug; the table has cuBLAS multiply
        monkeypatch.setitem(config_tables.PRODUCT, architecture(device), BY_TILES)
    torch.manual_seed(0)
    model = vitfast.ViT.from_config(vitfast.ViTConfig(**SMALL, **MODELS[changes])).to(device).train()
    with torch.no_grad():
        for parameter in model.parameters():
            # nothing is left at the 0 or 1 of initialisation, which would hide it
            parameter.add_(0.02 * torch.randn_like(parameter))
    images = draw(4, 3, 32, 32, device=device)
    launches = Launches(monkeypatch, layer_norm, linear, mlp_gated)

    def run():
        torch.manual_seed(3)
        logits = model(images)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 7, 0, 3], device=device))
        return logits.detach(), *torch.autograd.grad(loss, list(model.parameters()))

    ours = run()
    assert ("product" in launches.names) == (products == "by tiles")
    assert "norm_forward" in launches.names and "norm_backward" in launches.names
    assert ("gated_backward" in launches.names) == ("gated" in changes)
    launches.names.clear()
    with dispatch.backend("stock"):
        expected = run()
    assert not launches.names
    names = ["logits", *(name for name, _ in model.named_parameters())]
    for name, got, true in zip(names, ours, expected, strict=True):
        near = 2e-5 * true.abs().max().item() + 1e-7
        torch.testing.assert_close(got, true, rtol=1e-4, atol=near, msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_nothing_around_a_product_of_cublas_takes_a_pass_of_its_own(monkeypatch, device):
    """The projection of fp32 models: a norm, and cuBLAS with the bias."""
    x, w, b, n = (draw(*shape, device=device) for shape in ((2, 5, 64), (96, 64), (96,), (64,)))
    launches = Launches(monkeypatch, layer_norm, linear, mlp_gated)
    ops.linear(x, w, b, norm="layer", norm_weight=n, norm_bias=n)
    assert launches.names == ["norm_forward"]
    ops.linear(x, w, b, act="gelu")
    assert launches.names == ["norm_forward", "finish_rows"]
