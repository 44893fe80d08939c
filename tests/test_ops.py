"""Every op against fp64, against stock operators, and against itself: strides, gradients, autocast, errors."""

import pytest
import torch
import torch.nn.functional as F
from test_reference import SIZES, VARIANTS, build, draw, every_variant, reference_of
from textbook import Textbook
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vitfast import ops, reference
from vitfast.check.acceptance import RMS_RATIO, YARDSTICK_EPS, accept
from vitfast.choose import builtin
from vitfast.ops.attention import draw_seed

FULL = ["layer_norm", "add_layer_norm", "linear full", "attention", "attention_qkv", "mlp", "patch_embed"]
NORMED = [name for name, (op, shapes, _) in VARIANTS.items() if "norm" in op or op == "mlp" or "norm_weight" in shapes]


def op_of(variant):
    name, _, options = VARIANTS[variant]
    return lambda **tensors: getattr(ops, name)(**tensors, **options)


def outs_of(result):
    return result if isinstance(result, tuple) else (result,)


def run(fn, tensors, cotangents=None, frozen=("row_scale",)):
    """Results and gradients by name; cotangents are fp64 and rounded to the dtype of the results."""
    leaves = {name: t.detach().requires_grad_(name not in frozen) for name, t in tensors.items()}
    outs = outs_of(fn(**leaves))
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    cotangents = [c.to(o.dtype) for c, o in zip(cotangents or cotangents_of(outs), outs, strict=True)]
    grads = torch.autograd.grad(outs, list(wanted.values()), cotangents)
    results = {f"out {i}": o.detach() for i, o in enumerate(outs)}
    return results | {f"grad {name}": g for name, g in zip(wanted, grads, strict=True)}


def cotangents_of(outs):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device) for o in outs]


def judge(name, out, ref, low, dtype):
    """`accept`; where stock itself is too far off to be its yardstick, only: no further off than stock."""
    # the ratio of two rms errors over n numbers fluctuates by chance, much where n is small
    k = RMS_RATIO[dtype] * (1 + 8 * out.numel() ** -0.5)
    scale, error, stock = (t.square().mean().sqrt() for t in (ref, out - ref, low - ref))
    if stock <= YARDSTICK_EPS[dtype] * torch.finfo(dtype).eps * scale:
        accept(out, ref, low, grad=name.startswith("grad"), k=k, what=name)
    else:
        assert out.dtype == low.dtype and error <= k * stock, f"{name}: {error:.3e} is {error / stock:.2f} x stock's"


def bitwise(got, expected, what=""):
    assert got.keys() == expected.keys()
    for name in got:
        message = lambda text, name=name: f"{what} {name}: {text}"  # noqa: E731
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=message)


class Recorder(TorchDispatchMode):
    """Collects the calls of vitfast's own ops, forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "vitfast":
            self.calls.append((func, args, out))
        return out


def stock_of(variant):
    """The best stock operators, in the dtype of the tensors: the reference, but a convolution cuts the patches."""
    if VARIANTS[variant][0] != "patch_embed":
        return reference_of(variant)

    def convolution(images, weight, bias=None, pos_embed=None, prefix=None):
        x = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
        return reference.with_prefix(x, pos_embed, prefix)

    return convolution


def judged(variant, tensors, dtype):
    """Results and gradients as (name, op's, reference's in fp64, stock operators' in the same dtype).

    On a CPU the stock products in the op are the textbook's as well: what they round is no fault of the op.
    """
    cotangents = [c.to(dtype).double() for c in cotangents_of(outs_of(reference_of(variant)(**tensors)))]
    ref = run(reference_of(variant), {name: t.double() for name, t in tensors.items()}, cotangents)
    with Textbook():
        low, out = (run(fn, tensors, cotangents) for fn in (stock_of(variant), op_of(variant)))
    return [(name, out[name], ref[name], low[name]) for name in ref]


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch):
    """For tensors as small as these stock operators are the choice on a GPU, and no kernel would be tested."""
    monkeypatch.setattr(builtin, "EVERYWHERE", True)


@every_variant
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fp64_result_or_gradient_differs_from_the_reference(variant, size, device):
    """A wrong formula, a wrong formula of the gradient, a lost row or tile at an odd size."""
    tensors = build(variant, size, dtype=torch.float64, device=device)
    out, ref = run(op_of(variant), tensors), run(reference_of(variant), tensors)
    for name in ref:
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(out[name], ref[name], rtol=1e-10, atol=1e-11, msg=message)


@every_variant
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_larger_than_that_of_the_stock_operators(variant, size, dtype, device):
    """Rounding in a place where stock doesn't round, statistics in half precision, a wrong eps or GELU."""
    for name, out, ref, low in judged(variant, build(variant, size, dtype=dtype, device=device), dtype):
        judge(name, out, ref, low, dtype)


DATA = {
    "mean 30, sd 0.05": lambda t: 30 + 0.05 * t,
    "massive channel": lambda t: torch.cat([t[..., :-1], 1e3 + t[..., -1:]], dim=-1),
    # a small integer a row: its mean is exact whatever the order of summation, and the variance is zero
    "constant rows": lambda t: t[..., :1].mul(3).round().expand_as(t).clone(),
}


@pytest.mark.parametrize("variant", NORMED)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hard_rows_lose_digits(variant, data, dtype, device):
    """E[x^2] - E[x]^2, eps lost or at the wrong place, a channel that drowns the others."""
    tensors = build(variant, (17, 192, 64), dtype=torch.float64)
    first = next(iter(tensors))
    tensors[first] = DATA[data](tensors[first])
    for name, out, ref, low in judged(variant, {name: t.to(device, dtype) for name, t in tensors.items()}, dtype):
        # these rows are ill-conditioned, and the sums over them in half precision more so
        if name.startswith("out") or name == f"grad {first}":
            judge(name, out, ref, low, dtype)


def of_nans(t, shape):
    return torch.full(shape, float("nan"), dtype=t.dtype, device=t.device)


def among_nans(t):
    """A slice of a wider tensor, as q is of the packed projection; anything read beside it is NaN."""
    wide = of_nans(t, (*t.shape[:-1], 3, t.shape[-1]))
    wide[..., 1, :] = t
    return wide[..., 1, :]


def padded(t):
    """Rows of NaNs' neighbours: the last dim of a wider one, the start not aligned."""
    wide = of_nans(t, (*t.shape[:-1], t.shape[-1] + 3))
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


LAYOUTS = {
    "slice of packed": among_nans,
    "padded last dim": padded,
    "last dim outermost": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "expanded": lambda t: t[:1].expand_as(t),
    "storage offset 1": lambda t: torch.cat([of_nans(t, (1,)), t.flatten()])[1:].view(t.shape),
}


@every_variant
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_change_the_result(variant, layout, dtype, device):
    """A stride taken for that of a contiguous tensor, in the inputs or in the incoming gradient."""
    tensors = build(variant, (17, 17, 72), dtype=dtype, device=device)
    view = lambda t: LAYOUTS[layout](t) if t.dim() > 2 else t  # noqa: E731
    views = {name: view(t) for name, t in tensors.items() if t.dim() > 0}
    dense = {name: t.contiguous() for name, t in views.items()}
    cotangents = cotangents_of(outs_of(op_of(variant)(**dense)))
    got = run(op_of(variant), views, [view(c) for c in cotangents])
    expected = run(op_of(variant), dense, [view(c).contiguous() for c in cotangents])
    assert any(not t.is_contiguous() or t.storage_offset() for t in views.values())
    bitwise(got, expected)


@every_variant
def test_a_nan_spreads_to_other_images(variant, device):
    """An image or a row that reads from its neighbours."""
    clean = build(variant, (17, 17, 72), device=device, B=3)
    first = next(iter(clean))
    dirty = {**clean, first: clean[first].clone()}
    dirty[first][1].flatten()[0] = float("nan")
    got, expected = run(op_of(variant), dirty), run(op_of(variant), clean)
    assert got["out 0"][1].isnan().any()
    per_image = {name for name in got if name[:3] == "out" or VARIANTS[variant][1][name[5:]][0] == "B"}
    for others in [0, 2] if "attention" in variant else [0, 2, (1, -1)]:
        bitwise(*({name: ts[name][others] for name in per_image} for ts in (got, expected)))


@every_variant
def test_an_empty_batch_fails_or_has_another_gradient(variant, device):
    """A kernel launched on nothing, a reshape(-1) of nothing, gradients of weights that aren't zero."""
    tensors = build(variant, device=device, B=0)
    bitwise(run(op_of(variant), tensors), run(reference_of(variant), tensors))


@every_variant
def test_two_runs_differ(variant, device):
    """Atomics or uninitialised memory; an input or a saved tensor overwritten by forward or backward."""
    tensors = build(variant, (197, 17, 72), device=device)
    versions = {name: t._version for name, t in tensors.items()}
    expected = run(op_of(variant), tensors)
    bitwise(run(op_of(variant), tensors), expected)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        if device.type == "cuda":
            # cuDNN may choose another algorithm now
            expected = run(op_of(variant), tensors)
        bitwise(run(op_of(variant), tensors), expected)
    finally:
        torch.use_deterministic_algorithms(before)
    leaves = {name: t.requires_grad_(name != "row_scale") for name, t in tensors.items()}
    total = sum(o.sum() for o in outs_of(op_of(variant)(**leaves)))
    wanted = [t for t in leaves.values() if t.requires_grad]
    first, second = (torch.autograd.grad(total, wanted, retain_graph=True) for _ in range(2))
    bitwise(dict(enumerate(second)), dict(enumerate(first)), "second backward")
    assert {name: t._version for name, t in tensors.items()} == versions


@every_variant
def test_frozen_inputs_cost_or_change_gradients(variant):
    """A linear probe or LoRA that pays for gradients nobody wants, or gets wrong ones for the rest."""
    tensors = build(variant)
    everything = run(op_of(variant), tensors)
    for name in tensors.keys() - {"row_scale"}:
        with Recorder() as recorder:
            got = run(op_of(variant), tensors, frozen=tensors.keys() - {name})
        bitwise({name: got[f"grad {name}"]}, {name: everything[f"grad {name}"]}, "alone")
        computed = [g for func, _, out in recorder.calls if "backward" in str(func) for g in outs_of(out)]
        if variant != "attention":  # whose stock kernel makes all three at once
            assert sum(g is not None for g in computed) <= 1, f"{name} alone: {len(computed)} gradients"


@pytest.mark.parametrize(
    ("variant", "wanted", "products"),
    [
        ("linear full", ["x", "weight"], 2), ("linear full", ["x"], 1), ("linear full", ["weight"], 1),
        ("linear full", ["norm_bias"], 1), ("linear full", ["bias", "gamma", "residual"], 0),
        ("mlp", ["x", "w1", "w2"], 4), ("mlp", ["x"], 2), ("mlp", ["w1"], 2), ("mlp", ["w2"], 1),
        ("mlp", ["b2", "gamma"], 0),
    ],
)  # fmt: skip
def test_frozen_weights_cost_matrix_products(variant, wanted, products):
    """A mask that is handed on but not obeyed."""
    leaves = {name: t.requires_grad_(name in wanted) for name, t in build(variant).items()}
    total = op_of(variant)(**leaves).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        total.backward()
    kernels = ("aten::mm", "aten::addmm", "aten::bmm")
    assert sum(e.count for e in profile.key_averages() if e.key in kernels) == products


# the others keep their result for the backward, as stock attention does; torch says so then
@pytest.mark.parametrize("variant", ["layer_norm", "linear full", "mlp", "patch_embed"])
def test_result_cannot_be_changed_in_place(variant):
    """Hooks that do `out.mul_(2)`, in-place dropout: autograd refuses them on what looks like a view."""
    tensors = {name: t.requires_grad_(name != "row_scale") for name, t in build(variant).items()}
    wanted = [t for t in tensors.values() if t.requires_grad]
    expected = torch.autograd.grad(sum((3 * o).sum() for o in outs_of(op_of(variant)(**tensors))), wanted)
    outs = outs_of(op_of(variant)(**tensors))
    found = torch.autograd.grad(sum(o.mul_(3).sum() for o in outs), wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wide", ["weights", "gamma"])
@pytest.mark.parametrize("variant", ["linear full", "mlp"])
def test_gradient_has_another_dtype_than_its_input(variant, wide):
    """Compiled code reads a gradient in the dtype of its input, as the shape function says."""
    names = ("gamma",) if wide == "gamma" else ("weight", "bias", "w1", "b1", "w2", "b2", "gamma")
    tensors = {name: t.to(torch.float32 if name in names else torch.bfloat16) for name, t in build(variant).items()}
    leaves = {name: t.requires_grad_(name != "row_scale") for name, t in tensors.items()}
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    with Recorder() as recorder:
        out = op_of(variant)(**leaves)
        grads = torch.autograd.grad(out.float().square().sum(), list(wanted.values()))
    assert {name: g.dtype for name, g in zip(wanted, grads, strict=True)} == {n: t.dtype for n, t in wanted.items()}
    for func, args, result in recorder.calls:
        with FakeTensorMode() as mode:
            fakes = func(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args))
        for real, fake in zip(outs_of(result), outs_of(fakes), strict=True):
            assert (real is None) == (fake is None) and (real is None or real.dtype == fake.dtype), func


@pytest.mark.parametrize(("norm", "ignored"), [("rms", "norm_bias"), ("none", "norm_weight"), ("none", "norm_bias")])
def test_argument_without_effect_is_accepted(norm, ignored):
    x, weight, vector = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(4)
    given = {"norm_weight": vector} if norm == "rms" else {}
    with pytest.raises(ValueError, match=f"{ignored} must be None for norm '{norm}'"):
        ops.linear(x, weight, norm=norm, **given | {ignored: vector})
    if norm == "rms":
        with pytest.raises(ValueError, match="norm_bias must be None for norm 'rms'"):
            ops.mlp(x, vector, vector, torch.randn(8, 4), None, torch.randn(4, 8), None, norm="rms")


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_changes_where_no_backward_may_follow(variant, dtype):
    """Without gradients ops compute in place: other bits, or an input that is overwritten."""
    tensors = build(variant, dtype=dtype)
    copies = {name: t.clone() for name, t in tensors.items()}
    expected = run(op_of(variant), tensors)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            outs = outs_of(op_of(variant)(**tensors))
        assert not any(out.requires_grad for out in outs)
        bitwise({f"out {i}": out for i, out in enumerate(outs)}, {k: v for k, v in expected.items() if k[:3] == "out"})
    bitwise(tensors, copies, "overwritten:")


@pytest.mark.parametrize("variant", ["linear full", "mlp"])
def test_inference_keeps_what_only_a_backward_needs(variant):
    """The MLP's hidden activation twice in memory; a backward of a raw op call that kept nothing."""
    tensors = build(variant)
    with Recorder() as recorder, torch.no_grad():
        op_of(variant)(**tensors)
    ((func, args, outs),) = recorder.calls
    assert not args[-1] and [out is None for out in outs] == [False] + [True] * (len(outs) - 1)
    leaves = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in args]
    with pytest.raises(RuntimeError, match="was called without saves"):
        func(*leaves)[0].sum().backward()


@pytest.mark.parametrize("variant", [*FULL, "linear", "patch_embed bare"])
def test_autocast_gives_another_dtype(variant, device):
    """A residual stream rounded to bf16, a product left in fp32, fp64 rounded down, gradients in another dtype."""
    tensors = build(variant, device=device)
    doubles = {name: t.double() for name, t in tensors.items()}
    with torch.autocast(device.type, torch.bfloat16):
        got, in_fp64 = run(op_of(variant), tensors), run(op_of(variant), doubles)
    fp32 = "norm" in variant or variant in ("linear full", "mlp", "patch_embed")
    assert got["out 0"].dtype == (torch.float32 if fp32 else torch.bfloat16)
    assert all(g.dtype == torch.float32 for name, g in got.items() if name.startswith("grad"))
    bitwise(in_fp64, run(op_of(variant), doubles))
    for name, ref in in_fp64.items():
        torch.testing.assert_close(got[name].double(), ref, rtol=0.05, atol=0.03 * ref.abs().max().item())


@pytest.mark.parametrize("variant", ["layer_norm", "add_layer_norm", "linear full", "mlp"])
def test_fp32_norms_and_residuals_need_autocast(variant, device):
    """bf16 rows with norm weights and a residual that stayed fp32: an error, or statistics in half precision."""
    tensors = build(variant, (17, 192, 64), device=device)
    wide = {"norm_weight", "norm_bias", "residual"} | ({"weight", "bias"} if "layer_norm" in variant else set())
    mixed = {name: t if name in wide else t.bfloat16() for name, t in tensors.items()}
    got = run(op_of(variant), mixed)
    ref = run(op_of(variant), {name: t.double() for name, t in mixed.items()})
    assert got["out 0"].dtype == (torch.float32 if "residual" in tensors else torch.bfloat16)
    assert variant != "add_layer_norm" or got["out 1"].dtype == torch.bfloat16
    for name in ref:
        assert name[:3] == "out" or got[name].dtype == mixed[name[5:]].dtype
        torch.testing.assert_close(got[name].double(), ref[name], rtol=0.03, atol=0.02 * ref[name].abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_lse_is_wrong(size, dtype, device):
    """The base of the logarithm, a forgotten scale, padded keys in the sum, lse rounded to half precision."""
    tensors = build("attention", size, dtype=dtype, device=device)
    out, lse = ops.attention(**{name: t.requires_grad_() for name, t in tensors.items()}, scale=0.3, return_lse=True)
    ref = reference.attention_lse(tensors["q"].double(), tensors["k"].double(), 0.3)
    assert lse.dtype == torch.promote_types(dtype, torch.float32) and not lse.requires_grad
    # the exponentials of half precision inputs may be cheaper ones; lse rounded to bf16 would be off by 1e-2
    tol = 1e-4 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(lse.double(), ref, rtol=tol, atol=tol)
    bitwise({"out": out}, {"out": ops.attention(**tensors, scale=0.3)})
    packed = build("attention_qkv", size, dtype=dtype, device=device)["qkv"]
    one, two = ops.attention_qkv(packed, return_lse=True), ops.attention(*packed.unbind(2), return_lse=True)
    bitwise(dict(enumerate(one)), dict(enumerate(two)))


def test_no_key_at_all_gives_nan(device):
    """0 / 0 in the softmax of an empty row."""
    q, k = (torch.randn(2, n, 3, 8, device=device, requires_grad=True) for n in (5, 0))
    out, lse = ops.attention(q, k, k, return_lse=True)
    assert out.shape == (2, 5, 24) and not out.any() and (lse == float("-inf")).all()
    assert not torch.autograd.grad(out.sum(), (q, k))[0].any()


class RandomRanges(TorchDispatchMode):
    """Notes the bounds that torch.randint is called with."""

    def __init__(self):
        super().__init__()
        self.bounds = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.randint:
            self.bounds += [bound for bound in args if isinstance(bound, int)]
        return function(*args, **kwargs or {})


def test_seed_of_dropout_is_drawn_from_a_range_that_compiled_code_cuts_off():
    """Bounds that do not fit the 32 bits in which Inductor's Triton code has them; a half of the seed that repeats."""
    with RandomRanges() as ranges:
        seeds = [draw_seed(torch.empty(1), 0.5) for _ in range(50)]
    assert ranges.bounds and max(map(abs, ranges.bounds)) < 1 << 31
    assert all(seed.shape == (1,) and seed.dtype is torch.int64 for seed in seeds)
    halves = [divmod(seed.item(), 1 << 32) for seed in seeds]
    assert all(len(set(half)) == len(seeds) for half in zip(*halves, strict=True))
    torch.manual_seed(0)
    first = draw_seed(torch.empty(1), 0.5)
    torch.manual_seed(0)
    assert torch.equal(first, draw_seed(torch.empty(1), 0.5)) and draw_seed(torch.empty(1), 0.0) is None


@pytest.mark.parametrize("how", ["bool mask", "float mask", "dropout"])
def test_mask_or_dropout_differs_from_sdpa(how):
    """A mask that is ignored, transposed or inverted; dropout with another random state; a made-up lse."""
    q, k, v = (draw(2, n, 3, 8) for n in (5, 7, 7))
    mask = {"bool mask": draw(2, 1, 5, 7) > -1, "float mask": draw(5, 7), "dropout": None}[how]
    dropout_p = 0.5 if how == "dropout" else 0.0
    torch.manual_seed(3)
    out = ops.attention(q, k, v, mask=mask, dropout_p=dropout_p)
    torch.manual_seed(3)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask, dropout_p)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2))
    assert not torch.allclose(out, ops.attention(q, k, v))
    with pytest.raises(NotImplementedError, match="return_lse"):
        ops.attention(q, k, v, mask=mask, dropout_p=dropout_p, return_lse=True)


BAD = {
    "shape": (lambda t: torch.cat([t, t[..., :1]], dim=-1), r"\b{name}\b.*got"),
    "device": (lambda t: t.to("meta"), r"\b{name} on meta"),
    "int": (lambda t: t.long(), r"\b{name}\b.*int64"),
    "dtype": (lambda t: t.double(), r"\b{name} float64"),
}
# added or multiplied in the wider dtype, as torch does
ANY_FLOAT = ("residual", "branch", "gamma", "row_scale", "pos_embed", "prefix")
# nothing to differ from; a wider kernel doesn't divide the images, which is what the error says
ALLOWED = [("attention_qkv", "qkv", how) for how in ("shape", "device", "dtype")] + [("patch_embed", "weight", "shape")]
BAD_INPUTS = [
    (variant, name, how)
    for variant in FULL for name in VARIANTS[variant][1] for how in BAD
    if not (how == "dtype" and name in ANY_FLOAT) and (variant, name, how) not in ALLOWED
]  # fmt: skip


@pytest.mark.parametrize(("variant", "name", "how"), BAD_INPUTS)
def test_bad_input_is_no_clear_error(variant, name, how):
    """An index error, a crash inside torch or a result, in place of one ValueError that names the argument."""
    tensors, (spoil, message) = build(variant), BAD[how]
    with pytest.raises(ValueError, match=rf"^{VARIANTS[variant][0]}: .*{message.format(name=name)}"):
        op_of(variant)(**{**tensors, name: spoil(tensors[name])})


ones = torch.ones
WRONG = {
    "rank of x": (lambda: ops.layer_norm(ones(()), None, None, 1e-6), r"layer_norm: x must be \[\.\.\., C\], got \[\]"),
    "kind": (lambda: ops.layer_norm(ones(2, 3), None, None, 1e-6, "batch"), "kind .*'layer'.*'batch'"),
    "no batch": (lambda: ops.linear(ones(3), ones(2, 3)), r"x must be \[B, \.\.\., K\], got \[3\]"),
    "parts": (lambda: ops.attention_qkv(ones(2, 5, 4, 3, 8)), r"\[B, N, 3, H, D\], got \[2, 5, 4, 3, 8\]"),
    "no heads": (lambda: ops.attention(*[ones(2, 5, 8)] * 3), r"q must be \[B, N, H, D\], got \[2, 5, 8\]; k must be"),
    "size": (lambda: ops.patch_embed(ones(1, 3, 5, 4), ones(8, 3, 2, 2)), "multiple of the patch 2x2.*5x4"),
    "channels": (lambda: ops.patch_embed(ones(1, 4, 4, 4), ones(8, 3, 2, 2)), "3 channels.*got 4"),
    "uint8": (lambda: ops.patch_embed(ones(1, 3, 4, 4).byte(), ones(8, 3, 2, 2)), "uint8 .* mean and std"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_rank_or_name_is_no_clear_error(wrong):
    """A wrong rank or name that passes, or fails inside torch."""
    call, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        call()


def test_only_the_first_of_several_faults_is_named():
    """A user who has to fix his call one error at a time."""
    x, weight = torch.zeros(2, 3, 4), torch.zeros(5, 4)
    with pytest.raises(ValueError) as error:
        ops.linear(x, weight, torch.zeros(4), gamma=torch.zeros(6), residual=torch.zeros(2, 3, 5).int(), act="relu")
    for part in ("act", "'relu'", "bias must be [5]", "got [4]", "gamma must be [5]", "got [6]", "residual", "int32"):
        assert part in str(error.value), part


def test_uint8_images_are_normalised_otherwise(device):
    """A forgotten / 255, mean and std of the wrong channel."""
    images = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8, device=device)
    mean, std = torch.tensor([0.1, 0.5, 0.9], device=device), torch.tensor([0.2, 0.3, 0.4], device=device)
    weight = torch.randn(8, 3, 2, 3, device=device)
    floats = (images.double() / 255 - mean.double()[:, None, None]) / std.double()[:, None, None]
    expected = ops.patch_embed(floats, weight.double())
    got = ops.patch_embed(images, weight, mean=mean, std=std)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
