"""The formulas of `vitfast.reference` against independent maths, and their gradients against finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from vitfast import reference
from vitfast.ops import _attention_stock

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
    "patch_embed patches": (
        "patch_embed", dict(images="BIaw", weight="CIab", pos_embed="NC", prefix="PC"), dict(bias=None),
    ),
    "patch_embed bare": ("patch_embed", dict(images="BIaw", weight="CIab"), dict(bias=None)),
}  # fmt: skip
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


def reference_of(variant):
    """The function of vitfast.reference behind the op; in dtype T it is the chain of stock operators in T."""
    name, _, options = VARIANTS[variant]
    if name == "attention_qkv":
        return lambda qkv: reference.attention(*qkv.unbind(2), qkv.shape[-1] ** -0.5)
    if name == "attention":
        return lambda q, k, v: reference.attention(q, k, v, q.shape[-1] ** -0.5)
    unset = dict(gamma=None, row_scale=None) if name == "add_layer_norm" else {}
    return lambda **tensors: getattr(reference, name)(**{**unset, **options, **tensors})


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


close = torch.testing.assert_close

BY_HAND = {
    "none": lambda x: x,
    "gelu": lambda x: x * (1 + torch.special.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_activation_is_another_one(name):
    """The GELU of another checkpoint: they differ by 5e-4 and 2e-2 at most."""
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    close(reference.activation(x, name), BY_HAND[name](x), rtol=1e-12, atol=1e-14)
    others = [BY_HAND[other](x) for other in BY_HAND if other != name]
    assert all((reference.activation(x, name) - other).abs().max() > 1e-4 for other in others)
    assert torch.autograd.gradcheck(reference.activation, (draw(7).requires_grad_(), name))


def test_unknown_activation_passes():
    """A misspelled name that falls through to some activation."""
    with pytest.raises(ValueError, match="'gelu_tanh'.*got 'relu'"):
        reference.activation(draw(3), "relu")


def test_layer_norm_has_another_eps_or_variance():
    """Eps outside the root, the variance over C - 1, an RMS norm that subtracts the mean."""
    x, weight, bias = 0.1 * draw(4, 5) + 3, draw(5), draw(5)
    centred = x - x.sum(-1, keepdim=True) / 5
    layer = centred / ((centred**2).sum(-1, keepdim=True) / 5 + 0.01).sqrt() * weight + bias
    close(reference.layer_norm(x, weight, bias, 0.01), layer)
    rms = x / ((x**2).sum(-1, keepdim=True) / 5 + 0.01).sqrt() * weight
    close(reference.layer_norm(x, weight, None, 0.01, "rms"), rms)
    assert reference.layer_norm(x, None, None, 0.01, out_dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_needs_weights_of_its_input_dtype(kind):
    """float32 parameters beside a half-precision input, which torch takes on CPUs only; rounded once, or not at all."""
    x, weight = draw(4, 8, dtype=torch.bfloat16), draw(8, dtype=torch.float32)
    exact = reference.layer_norm(x.double(), weight.double(), None, 1e-6, kind)
    close(reference.layer_norm(x, weight, None, 1e-6, kind), exact.bfloat16(), rtol=2**-7, atol=0)
    close(reference.layer_norm(x, weight, None, 1e-6, kind, torch.float32), exact.float())


def test_query_without_keys_has_a_gradient_that_is_nan():
    """The softmax of a row of -inf: zeros in the result hide a NaN that comes back."""
    q, k, v = (draw(1, 2, 1, 4).requires_grad_() for _ in range(3))
    mask = torch.tensor([[0.0, 0.0], [-math.inf, -math.inf]], dtype=torch.float64)
    out = reference.attention_visibly(q, k, v, 0.5, mask, lambda weights: weights)
    assert (out[0, 1] == 0).all()
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads) and (grads[0][0, 1] == 0).all()


def test_add_layer_norm_norms_the_wrong_tensor():
    """The residual or the branch normed in place of their sum; row_scale along the tokens."""
    residual, branch, gamma, weight, bias = draw(2, 2, 5), draw(2, 2, 5), draw(5), draw(5), draw(5)
    row_scale = torch.tensor([0.0, 2.0], dtype=torch.float64)
    total, normed = reference.add_layer_norm(residual, branch, gamma, row_scale, weight, bias, 1e-3)
    close(total, torch.stack([residual[0], residual[1] + 2 * branch[1] * gamma]))
    close(normed, reference.layer_norm(total, weight, bias, 1e-3))


def test_linear_applies_its_parts_in_another_order():
    """The activation after LayerScale, the bias after the activation, the residual scaled too."""
    x, weight, bias, gamma, residual = draw(2, 3, 4), draw(5, 4), draw(5), draw(5), draw(2, 3, 5)
    norm_weight, norm_bias = draw(4), draw(4)
    row_scale = torch.tensor([0.0, 1.25], dtype=torch.float64)
    got = reference.linear(x, weight, bias, norm_weight, norm_bias, 1e-2, "layer", "gelu", gamma, row_scale, residual)
    for b in range(2):
        for n in range(3):
            h = (x[b, n] - x[b, n].mean()) / (x[b, n].var(correction=0) + 1e-2).sqrt() * norm_weight + norm_bias
            y = BY_HAND["gelu"](torch.stack([(h * row).sum() for row in weight]) + bias)
            close(got[b, n], residual[b, n] + row_scale[b] * gamma * y)


def test_mlp_takes_the_value_for_the_gate():
    """Gate and value swapped; no residual; the norm on the residual path."""
    x, w1, b1, w2, b2, gamma = draw(2, 3, 4), draw(6, 4), draw(6), draw(4, 3), draw(4), draw(4)
    h = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-3).sqrt()
    gate, value = h @ w1[:3].T + b1[:3], h @ w1[3:].T + b1[3:]
    expected = x + gamma * ((BY_HAND["silu"](gate) * value) @ w2.T + b2)
    close(reference.mlp(x, None, None, 1e-3, "layer", w1, b1, w2, b2, "silu", True, gamma), expected)
    plain = reference.mlp(x, None, None, 1e-3, "layer", w1, b1, draw(4, 6) * 0, b2, "gelu")
    close(plain, x + b2)


@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_attention_is_another_softmax(masked):
    """Softmax over the queries, the scale applied twice, a mask inverted or multiplied; heads in another order."""
    q, k, v = draw(2, 3, 4, 5), draw(2, 6, 4, 5), draw(2, 6, 4, 5)
    keep = draw(2, 1, 3, 6) > -0.5
    mask = {None: None, "bool": keep, "float": torch.where(keep, draw(2, 1, 3, 6), -math.inf)}[masked]
    added = {None: torch.zeros(()), "bool": torch.where(keep, 0.0, -math.inf), "float": mask}[masked]
    logits = 0.3 * torch.stack([q[:, :, h] @ k[:, :, h].transpose(1, 2) for h in range(4)], 1) + added
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    by_hand = torch.cat([weights[:, h] @ v[:, :, h] for h in range(4)], dim=-1)
    close(reference.attention(q, k, v, 0.3, mask), by_hand)
    leaves = tuple(t[:, :, :2].clone().requires_grad_() for t in (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: reference.attention(q, k, v, 0.3, mask), leaves, fast_mode=True)
    if masked is None:
        close(reference.attention_lse(q, k, 0.3), logits.exp().sum(-1).log())


def test_a_query_with_every_key_masked_gives_nan():
    """0 / 0 where the docstring says zeros."""
    q, k, v = draw(1, 2, 1, 4), draw(1, 3, 1, 4), draw(1, 3, 1, 4)
    mask = torch.tensor([[False] * 3, [True] * 3])
    out = reference.attention(q, k, v, 0.5, mask)
    assert not out[0, 0].any() and out[0, 1].abs().min() > 0


def test_dropout_is_off_or_unscaled():
    """A dropout_p that goes nowhere, or weights that aren't scaled up to keep their mean."""
    q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 4000, 1, 2), torch.ones(1, 4000, 1, 2)
    out = reference.attention(q, k, v, 1.0, None, 0.5)
    assert (out != 1).all() and (out - 1).abs().max() < 0.1


@pytest.mark.parametrize("order", ["chw", "hwc"])
def test_patch_rows_are_in_another_order(order):
    """Rows and columns of the grid or of the patch swapped: square patches and images hide that."""
    images, (ph, pw) = draw(2, 3, 4, 9), (2, 3)
    rows = reference.patch_rows(images, (ph, pw), order)
    if order == "chw":
        close(rows, F.unfold(images, (ph, pw), stride=(ph, pw)).transpose(1, 2), rtol=0, atol=0)
    patch = images[:, :, 2:4, 3:6]  # row 1, column 1 of a 2 x 3 grid
    close(rows[:, 4], (patch if order == "chw" else patch.permute(0, 2, 3, 1)).flatten(1), rtol=0, atol=0)


def test_patch_embed_is_no_convolution():
    """Pixels in another order than the weights of a Conv2d; positions or prefix tokens in the wrong place."""
    images, weight, bias, prefix = draw(2, 3, 4, 9), draw(5, 3, 2, 3), draw(5), draw(2, 5)
    x = F.conv2d(images, weight, bias, stride=(2, 3)).flatten(2).transpose(1, 2)
    on_patches, on_all = draw(6, 5), draw(8, 5)
    front = prefix.expand(2, 2, 5)
    embed = lambda *args: reference.patch_embed(images, weight, bias, *args)  # noqa: E731
    close(embed(), x)
    close(embed(on_patches), x + on_patches)
    close(embed(None, prefix), torch.cat([front, x], 1))
    close(embed(on_patches, prefix), torch.cat([front, x + on_patches], 1))
    close(embed(on_all, prefix), torch.cat([front, x], 1) + on_all)


def test_uint8_images_are_normalised_by_another_channel():
    """A forgotten / 255; mean and std along the columns, which are as many as the channels here."""
    images = torch.randint(0, 256, (2, 3, 2, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.4])
    got = reference.normalise(images, mean, std, torch.float64)
    assert got.dtype == torch.float64
    for c in range(3):
        close(got[:, c], (images[:, c].double() / 255 - mean[c].double()) / std[c].double())
    token = reference.patch_embed(images, torch.ones(1, 3, 2, 3).double(), None, mean=mean, std=std)
    close(token[:, 0, 0], got.sum((1, 2, 3)))


@pytest.mark.parametrize("given", [{}, {"mean": torch.zeros(3)}, {"std": torch.ones(3)}])
def test_uint8_images_without_mean_or_std_end_in_an_attribute_error(given):
    images, weight = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, 3, 4, 4)
    with pytest.raises(ValueError, match="uint8 images need mean and std"):
        reference.patch_embed(images, weight, None, **given)


@every_variant
def test_gradient_of_the_reference_is_wrong(variant):
    """A detach, an in-place operation or a rounding to fp32 inside what everything else is measured by."""
    tensors = build(variant, (2, 3, 4), dtype=torch.float64)
    names = list(tensors)
    call = lambda *ts: reference_of(variant)(**dict(zip(names, ts, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(t.requires_grad_() for t in tensors.values()))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_formula_for_gpus_without_flash_is_wrong(autocast):
    """The path of fp32, of odd head dims and of old GPUs, which no CPU test runs; rounded to bf16 by autocast."""
    dtype, tol = (torch.float32, 1e-5) if autocast else (torch.float64, 1e-11)
    q, k, v = (draw(2, n, 3, 5, dtype=dtype).requires_grad_() for n in (4, 6, 6))
    ref, lse = reference.attention(q, k, v, 0.3), reference.attention_lse(q, k, 0.3)
    grad = draw(*ref.shape, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        got = _attention_stock.attention_formula(q, k, v, 0.3)
        grads = _attention_stock.attention_formula_backward(grad, q, k, v, *got, 0.3)
    torch.testing.assert_close(got, (ref, lse), rtol=tol, atol=tol)
    torch.testing.assert_close(grads, torch.autograd.grad(ref, (q, k, v), grad), rtol=tol, atol=tol)
