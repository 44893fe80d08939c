"""The C++ kernels of every instruction set this CPU has on guarded memory: run by test_cpu_guarded.py, in a process.

What they keep for themselves the sanitizers see (tests/native); here it is tensors, whose addresses Python hands on.
"""

import pytest
import torch
from guarded_memory import MODELS, PLACES, cases, columns, finite, model_of, shifted

import vitfast
from vitfast.kernels import cpu as cpu_kernels
from vitfast.kernels import extension

KERNELS = {kernels.name: kernels for kernels in extension.require().usable_kernels()}
every_isa = {"isa": tuple(KERNELS)}
every_dtype = {"dtype": cpu_kernels.FLOATS}


def multiplies(case):
    """The dtypes of products, of which not every instruction set has all."""
    return cpu_kernels.multiplies(case["dtype"], KERNELS[case["isa"]])


def packed(D, K, dtype, isa, bias=True):
    return cpu_kernels.PackedWeight(torch.randn(D, K).to(dtype), torch.randn(D) if bias else None, KERNELS[isa])


def norm_of(C, dtype, bias=True):
    return cpu_kernels.Norm(torch.randn(C).to(dtype), torch.randn(C).to(dtype) if bias else None, 1e-6)


HEADS = {
    "separate": lambda t: t.clone(),
    "packed": None,
    "shifted": shifted,
    "first columns": lambda t: columns(t, 0, 3),
    "last columns": lambda t: columns(t, 8, 0),
    "one image for all": lambda t: t[:1].clone().expand_as(t),
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
}


@cases(
    lengths=((1, 1), (17, 5), (33, 65), (197, 197), (3, 1030)), D=(8, 13, 16, 64, 72, 128), heads=tuple(HEADS),
    with_lse=(True, False), **every_isa, **every_dtype, together=("lengths", "D", "heads", "isa", "dtype"),
    allowed=lambda case: case["heads"] != "packed" or case["lengths"][0] == case["lengths"][1],
)  # fmt: skip
def test_attention(lengths, D, heads, with_lse, isa, dtype, placement):
    """Vectors and panels past the end of rows, of keys and of queries."""
    q, k, v = (torch.randn(2, n, 3, D).to(dtype) for n in (lengths[0], lengths[1], lengths[1]))
    if heads == "packed":
        found = cpu_kernels.attention_qkv(torch.stack([q, k, v], 2), D**-0.5, with_lse, KERNELS[isa])
    else:
        found = cpu_kernels.attention(*(HEADS[heads](t) for t in (q, k, v)), D**-0.5, with_lse, KERNELS[isa])
    finite(found=found)


NAMES = tuple(cpu_kernels.ACTIVATIONS)


@cases(n=(1, 7, 16, 33, 1000, 40_003), name=NAMES, at=("start", "odd"), **every_isa, **every_dtype)
def test_activation(n, name, at, isa, dtype, placement):
    """A vector past the last number."""
    x = torch.randn(n).to(dtype)
    x = shifted(x) if at == "odd" else x
    finite(out=cpu_kernels.activation(x, name, torch.empty_like(x), KERNELS[isa]))
    finite(out=cpu_kernels.activation(x, name, x, KERNELS[isa]))


@cases(
    rows=(1, 2, 17, 200), D=(1, 13, 64, 192, 197, 1152), vectors=("both", "weight", "none"), at=("start", "odd"),
    **every_isa, **every_dtype,
)  # fmt: skip
def test_layer_norm(rows, D, vectors, at, isa, dtype, placement):
    """A vector past the end of the last row, of weight or bias."""
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, D), (D,), (D,)))
    x, weight, bias = (shifted(t) if at == "odd" else t for t in (x, weight, bias))
    given = {"both": (weight, bias), "weight": (weight, None), "none": (None, None)}[vectors]
    finite(out=cpu_kernels.layer_norm(x, *given, 1e-6, KERNELS[isa]))


@cases(
    M=(1, 5, 64, 130), K=(2, 64, 198, 768), D=(1, 10, 72, 192, 1152), norm=("none", "weight", "both"),
    act=("none", *NAMES), residual=(False, True), bias=(False, True), at=("start", "odd"), **every_isa,
    dtype=(torch.float32, torch.bfloat16), allowed=multiplies, together=("M", "K", "D", "norm", "isa", "dtype"),
)  # fmt: skip
def test_linear(M, K, D, norm, act, residual, bias, at, isa, dtype, placement):
    """Rows, columns or depth of a tile past the end; packed weights whose last panel is broken."""
    x, beside = torch.randn(M, K).to(dtype), torch.randn(M, D).to(dtype)
    x, beside = (shifted(t) if at == "odd" else t for t in (x, beside))
    before = None if norm == "none" else norm_of(K, dtype, norm == "both")
    weight = packed(D, K, dtype, isa, bias)
    finite(out=cpu_kernels.linear(x, weight, norm=before, act=act, residual=beside if residual else None))


@cases(
    M=(1, 5, 40, 130), K=(32, 96, 768), D=(16, 48, 192), norm=("none", "weight", "both"), act=("none", *NAMES),
    residual=(False, True), bias=(False, True), at=("start", "odd"), isa=("plain_tiles", "amx_bf16"),
    allowed=lambda case: case["isa"] in KERNELS, together=("M", "K", "D", "norm", "isa"),
)  # fmt: skip
def test_linear_unpacked(M, K, D, norm, act, residual, bias, at, isa, placement):
    """Rows of a tile past the last of the activations, columns past the last of the weight itself."""
    x, beside, weight = (torch.randn(*shape).to(torch.bfloat16) for shape in ((M, K), (M, D), (D, K)))
    x, beside, weight = (shifted(t) if at == "odd" else t for t in (x, beside, weight))
    before = None if norm == "none" else norm_of(K, torch.bfloat16, norm == "both")
    out = cpu_kernels.linear_unpacked(
        x, weight, torch.randn(D).to(torch.bfloat16) if bias else None, norm=before, act=act,
        residual=beside if residual else None, using=KERNELS[isa],
    )  # fmt: skip
    finite(out=out)


@cases(
    M=(1, 5, 64, 130), C=(2, 64, 198, 384), F=(2, 90, 256, 768), act=("none", *cpu_kernels.ACTIVATIONS), **every_isa,
    dtype=(torch.float32, torch.bfloat16), allowed=multiplies,
)  # fmt: skip
def test_mlp(M, C, F, act, isa, dtype, placement):
    fc1, fc2 = packed(F, C, dtype, isa), packed(C, F, dtype, isa)
    finite(out=cpu_kernels.mlp(torch.randn(M, C).to(dtype), norm_of(C, dtype), fc1, fc2, act))


@cases(
    B=(1, 3), N=(1, 17, 65), C=(16, 64, 198), head_dim=(13, 16, 64), heads=(2, 3), **every_isa,
    dtype=(torch.float32, torch.bfloat16),
    allowed=lambda case: multiplies(case) and case["head_dim"] * case["heads"] % 2 == 0,
)  # fmt: skip
def test_block(B, N, C, head_dim, heads, isa, dtype, placement):
    inner = head_dim * heads
    qkv, proj, fc1, fc2 = (
        packed(D, K, dtype, isa) for D, K in ((3 * inner, C), (C, inner), (2 * C, C), (C, 2 * C))
    )  # fmt: skip
    parts = norm_of(C, dtype), qkv, proj, norm_of(C, dtype), fc1, fc2
    block = cpu_kernels.Block(*parts, "gelu", heads, head_dim, head_dim**-0.5)
    finite(out=cpu_kernels.block(torch.randn(B, N, C).to(dtype), block))


IMAGES = PLACES | {"channels last": lambda t: t.contiguous(memory_format=torch.channels_last)}
patches = {
    "B": (1, 3), "C": (1, 3, 4), "size": ((8, 8), (16, 24), (13, 21), (50, 33)), "patch": ((8, 8), (4, 7), (1, 5)),
    "place": tuple(IMAGES), "image_dtype": tuple(cpu_kernels.DTYPES), "scaled": (False, True),
    "together": ("size", "patch", "place", "image_dtype", "isa", "dtype"),
}  # fmt: skip


def images_of(B, C, size, place, dtype):
    return IMAGES[place]((128 + 30 * torch.randn(B, C, *size)).to(dtype))


def scaling(C, scaled):
    return (torch.full((C,), 0.5), torch.full((C,), 0.25)) if scaled else (None, None)


@cases(order=tuple(cpu_kernels.PATCH_ORDERS), prefix=(0, 2), **patches, **every_isa, **every_dtype)
def test_patch_rows(B, C, size, patch, place, image_dtype, scaled, order, prefix, isa, dtype, placement):
    """Pixels past the end of an image whose last patches are cut, or of rows at other distances."""
    images = images_of(B, C, size, place, image_dtype)
    mean, std = scaling(C, scaled)
    how = {"order": order, "dtype": dtype, "prefix": prefix, "pad": True, "using": KERNELS[isa]}
    finite(rows=cpu_kernels.patch_rows(images, patch, mean=mean, std=std, **how))


@cases(
    D=(1, 24, 197), tokens=("none", "positions", "prefix", "both"), **patches, **every_isa,
    dtype=(torch.float32, torch.bfloat16),
    allowed=lambda case: multiplies(case)
    and (case["dtype"] is torch.float32 or case["C"] * case["patch"][0] * case["patch"][1] % 2 == 0),
)  # fmt: skip
def test_embed(B, C, size, patch, place, image_dtype, scaled, D, tokens, isa, dtype, placement):
    P = 2 if tokens in ("prefix", "both") else 0
    N = P + -(-size[0] // patch[0]) * -(-size[1] // patch[1])
    weight = packed(D, C * patch[0] * patch[1], dtype, isa)
    positions = torch.randn(N, D).to(dtype) if tokens in ("positions", "both") else None
    prefix = torch.randn(P, D).to(dtype) if P else None
    images = images_of(B, C, size, place, image_dtype)
    finite(out=cpu_kernels.embed(images, patch, weight, positions, prefix, *scaling(C, scaled)))


@cases(
    width=(64, 192, 384, 768, 1152), changes=tuple(MODELS), how=("prepared", "as it is", "training"), **every_isa,
    **every_dtype, allowed=lambda case: case["how"] != "prepared" or case["dtype"] is not torch.float16,
)  # fmt: skip
def test_model(width, changes, how, isa, dtype, placement, monkeypatch):
    """What a model hands from kernel to kernel."""
    monkeypatch.setenv("VITFAST_CPU_ISA", isa)
    cpu_kernels.kernels.cache_clear()
    model = model_of(width, changes).to(dtype).train(how == "training")
    images = torch.randn(3, 3, 24, 24).to(dtype)
    if how == "training":
        out = model(images)
        finite(out=out, gradients=torch.autograd.grad(out.sum(), list(model.parameters())))
        return
    with torch.no_grad():
        finite(out=(vitfast.prepare(model) if how == "prepared" else model)(images))


@pytest.fixture(autouse=True)
def kernels_are_chosen_again():
    yield
    cpu_kernels.kernels.cache_clear()
