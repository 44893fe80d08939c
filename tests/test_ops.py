"""Every op against fp64, against stock operators, and against itself: strides, gradients, autocast, errors."""

import re
import sys

import pytest
import torch
import torch.nn.functional as F
from numerics import RMS_RATIO, YARDSTICK_EPS, accept
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vitfast
from vitfast import ops, reference

attention_module = sys.modules["vitfast.ops.attention"]

# (N, C, head_dim): one token; fewer channels than a vector register; padded tiles; head dims that are no power
# of two, whose scale doesn't round to the one of 64
SIZES = [(1, 192, 64), (2, 17, 72), (17, 3, 80), (197, 192, 16)]
NO_NORM = dict(norm_weight=None, norm_bias=None)

# shapes in letters: B images, N tokens, C channels, F = 2 C hidden, H heads, D head_dim, M = N + 3 keys,
# P prefix tokens, T = P + N, I image channels, images of N patches of a x b pixels in one row: a x w
VARIANTS = {
    "layer_norm": ("layer_norm", dict(x="BNC", weight="C", bias="C"), dict(eps=1e-6)),
    "layer_norm bare": ("layer_norm", dict(x="BNC"), dict(weight=None, bias=None, eps=1e-5)),
    "layer_norm rms": ("layer_norm", dict(x="BNC", weight="C"), dict(bias=None, eps=1e-6, kind="rms")),
    "add_layer_norm": (
        "add_layer_norm",
        dict(residual="BNC", branch="BNC", weight="C", bias="C", gamma="C", row_scale="B"),
        dict(eps=1e-6),
    ),
    "add_layer_norm rms": (
        "add_layer_norm", dict(residual="BNC", branch="BNC"), dict(weight=None, bias=None, eps=1e-5, kind="rms"),
    ),
    "linear": ("linear", dict(x="BNC", weight="FC", bias="F"), {}),
    "linear bare": ("linear", dict(x="BNC", weight="FC", gamma="F"), dict(act="silu")),
    "linear full": (
        "linear",
        dict(x="BNC", weight="FC", bias="F", norm_weight="C", norm_bias="C", gamma="F", row_scale="B", residual="BNF"),
        dict(norm="layer", act="gelu"),
    ),
    "linear rms": (
        "linear",
        dict(x="BNC", weight="FC", norm_weight="C", row_scale="B", residual="BNF"),
        dict(norm="rms", act="quick_gelu", norm_eps=1e-5),
    ),
    "attention": ("attention", dict(q="BNHD", k="BMHD", v="BMHD"), {}),
    "attention_qkv": ("attention_qkv", dict(qkv="BN3HD"), {}),
    "mlp": (
        "mlp",
        dict(x="BNC", norm_weight="C", norm_bias="C", w1="FC", b1="F", w2="CF", b2="C", gamma="C", row_scale="B"),
        dict(norm="layer", norm_eps=1e-6),
    ),
    "mlp bare": (
        "mlp", dict(x="BNC", w1="FC", w2="CF"),
        dict(b1=None, b2=None, norm="rms", norm_eps=1e-6, act="gelu_tanh", **NO_NORM),
    ),
    "mlp gated": (
        "mlp", dict(x="BNC", norm_weight="C", norm_bias="C", w1="FC", b1="F", w2="CC", b2="C"),
        dict(norm="layer", norm_eps=1e-6, act="silu", gated=True),
    ),
    "patch_embed": ("patch_embed", dict(images="BIaw", weight="CIab", bias="C", pos_embed="TC", prefix="PC"), {}),
    "patch_embed patches": ("patch_embed", dict(images="BIaw", weight="CIab", pos_embed="NC", prefix="PC"), dict(bias=None)),
    "patch_embed bare": ("patch_embed", dict(images="BIaw", weight="CIab"), dict(bias=None)),
}  # fmt: skip
FULL = ["layer_norm", "add_layer_norm", "linear full", "attention", "attention_qkv", "mlp", "patch_embed"]
NORMED = [name for name, (_, shapes, _) in VARIANTS.items() if "norm" in name or "mlp" in name or "norm_weight" in shapes]
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def build(variant, size=SIZES[1], *, dtype=torch.float32, device="cpu", B=2):
    """The tensors of a variant; row_scale drops the last image, as stochastic depth does."""
    N, C, D = size
    letters = dict(B=B, N=N, C=C, F=2 * C, H=3, D=D, M=N + 3, P=2, T=N + 2, I=3, a=2, b=3, w=3 * N, **{"3": 3})
    tensors = {}
    for name, shape in VARIANTS[variant][1].items():
        t = torch.randn([letters[letter] for letter in shape], dtype=torch.float64)
        if name in ("weight", "w1", "w2") and t.dim() > 1:
            t *= t[0].numel() ** -0.5
        if name == "row_scale":
            t = torch.full((B,), 1.25, dtype=torch.float64)
            t[-1:] = 0
        tensors[name] = t.to(device, dtype)
    return tensors


def op_of(variant):
    name, _, options = VARIANTS[variant]
    return lambda **tensors: getattr(ops, name)(**tensors, **options)


def reference_of(variant):
    """The function of vitfast.reference behind the op; in dtype T it is the chain of stock operators in T."""
    name, _, options = VARIANTS[variant]
    if name == "attention_qkv":
        return lambda qkv: reference.attention(*qkv.unbind(2), qkv.shape[-1] ** -0.5)
    if name == "attention":
        return lambda q, k, v: reference.attention(q, k, v, q.shape[-1] ** -0.5)
    unset = dict(gamma=None, row_scale=None) if name == "add_layer_norm" else {}
    return lambda **tensors: getattr(reference, name)(**{**unset, **options, **tensors})


def run(fn, tensors, cotangents=None, frozen=("row_scale",)):
    """Results and gradients by name; cotangents are fp64 and rounded to the dtype of the results."""
    leaves = {name: t.detach().requires_grad_(name not in frozen) for name, t in tensors.items()}
    out = fn(**leaves)
    outs = out if isinstance(out, tuple) else (out,)
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    cotangents = [c.to(o.dtype) for c, o in zip(cotangents or cotangents_of(outs), outs, strict=True)]
    grads = torch.autograd.grad(outs, list(wanted.values()), cotangents)
    return {f"out {i}": o.detach() for i, o in enumerate(outs)} | {f"grad {n}": g for n, g in zip(wanted, grads, strict=True)}


def cotangents_of(outs):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device) for o in outs]


def judge(name, out, ref, low, dtype):
    """`accept`; where stock itself is too far off to be its yardstick, only: no further off than stock."""
    # the ratio of two rms errors over n numbers fluctuates by chance, much where n is small
    k = RMS_RATIO[dtype] * (1 + 8 * out.numel() ** -0.5)
    eps, scale, error, stock = torch.finfo(dtype).eps, *(t.square().mean().sqrt() for t in (ref, out - ref, low - ref))
    if stock <= YARDSTICK_EPS[dtype] * eps * scale:
        accept(out, ref, low, grad=name.startswith("grad"), k=k, what=name)
    else:
        assert out.dtype == low.dtype and error <= k * stock, f"{name}: {error:.3e} is {error / stock:.2f} x stock's"


def bitwise(got, expected, what=""):
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{what} {n}: {m}")


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
    """Results and gradients as (name, op's, reference's in fp64, stock operators' in the same dtype)."""
    outs = reference_of(variant)(**tensors)
    cotangents = [c.to(dtype).double() for c in cotangents_of(outs if isinstance(outs, tuple) else (outs,))]
    ref = run(reference_of(variant), {name: t.double() for name, t in tensors.items()}, cotangents)
    low = run(stock_of(variant), tensors, cotangents)
    out = run(op_of(variant), tensors, cotangents)
    return [(name, out[name], ref[name], low[name]) for name in ref]


# --- values


@every_variant
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fp64_result_or_gradient_differs_from_the_reference(variant, size, device):
    """A wrong formula, a wrong formula of the gradient, a lost row or tile at an odd size."""
    tensors = build(variant, size, dtype=torch.float64, device=device)
    out, ref = run(op_of(variant), tensors), run(reference_of(variant), tensors)
    for name in ref:
        torch.testing.assert_close(out[name], ref[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


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
    "constant rows": lambda t: torch.arange(t[..., 0].numel(), dtype=t.dtype).remainder(7).view(*t.shape[:-1], 1).expand_as(t).clone(),
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
