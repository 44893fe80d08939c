"""Every address that goes to C++ goes with memory that is long enough: one argument wrong at a time, raw ops too."""

import pytest
import torch

import vitfast
from vitfast.kernels import cpu as cpu_kernels
from vitfast.kernels import extension

K, D, N = 16, 32, 6
HEADS, HEAD_DIM = 2, 8


def good():
    """By name: a call of tensors, and these; every call is right as it stands."""
    draw = torch.randn
    weight = lambda D, K: cpu_kernels.PackedWeight(draw(D, K), draw(D))  # noqa: E731
    norm = lambda K: cpu_kernels.Norm(draw(K), draw(K), 1e-6)  # noqa: E731
    images, patch = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8), (4, 4)
    block = lambda **changed: cpu_kernels.Block(**{  # noqa: E731
        "norm1": norm(K), "qkv": weight(3 * K, K), "proj": weight(K, K), "norm2": norm(K), "fc1": weight(D, K),
        "fc2": weight(K, D), "act": "gelu", "num_heads": HEADS, "head_dim": HEAD_DIM, "scale": 0.3, **changed,
    })  # fmt: skip
    rows = dict(mean=draw(3), std=draw(3).abs() + 0.1)
    heads = {name: draw(2, N, HEADS, HEAD_DIM) for name in "qkv"}
    embed = dict(weight=weight(D, 48), positions=draw(1 + 4, D), prefix=draw(1, D))
    linear = dict(x=draw(N, K), weight=weight(D, K), norm=norm(K), residual=draw(N, D))
    return {
        "attention": (lambda **t: cpu_kernels.attention(**t, scale=0.3, with_lse=True), heads),
        "attention_qkv": (
            lambda **t: cpu_kernels.attention_qkv(**t, scale=0.3, with_lse=True),
            dict(qkv=draw(2, N, 3, HEADS, HEAD_DIM)),
        ),
        "activation": (lambda **t: cpu_kernels.activation(**t, name="gelu"), dict(x=draw(N, K), out=draw(N, K))),
        "layer_norm": (
            lambda **t: cpu_kernels.layer_norm(**t, eps=1e-6), dict(x=draw(N, K), weight=draw(K), bias=draw(K)),
        ),
        "PackedWeight": (cpu_kernels.PackedWeight, dict(weight=draw(D, K), bias=draw(D))),
        "Norm": (lambda **t: cpu_kernels.linear(draw(N, K), weight(D, K), norm=cpu_kernels.Norm(**t, eps=1e-6)),
                 dict(weight=draw(K), bias=draw(K))),
        "linear": (cpu_kernels.linear, linear),
        "mlp": (lambda **t: cpu_kernels.mlp(**t, act="gelu"),
                dict(x=draw(N, K), norm=norm(K), fc1=weight(D, K), fc2=weight(K, D))),
        "Block": (block, dict(norm1=norm(K), qkv=weight(3 * K, K), proj=weight(K, K), norm2=norm(K), fc1=weight(D, K),
                              fc2=weight(K, D))),
        "block": (lambda x, **t: cpu_kernels.block(x, block(), **t), dict(x=draw(2, N, K))),
        "patch_rows": (
            lambda **t: cpu_kernels.patch_rows(images, patch, **t), dict(**rows, out=draw(2, 4, 48)),
        ),
        "embed": (lambda **t: cpu_kernels.embed(images, patch, **embed | t), dict(**rows, **embed)),
    }  # fmt: skip


def others_of(t):
    """Of a tensor, a packed weight or a norm: others that C++ would read past, or take for numbers of another kind."""
    if isinstance(t, cpu_kernels.PackedWeight):
        others = [(t.D // 2, t.K), (t.D, t.K // 2), (2 * t.D, t.K), (t.D, 2 * t.K)]
        return [cpu_kernels.PackedWeight(torch.randn(D, K), torch.randn(D)) for D, K in others]
    if isinstance(t, cpu_kernels.Norm):
        return [
            cpu_kernels.Norm(torch.randn(K - 1), torch.randn(K - 1), 1e-6),
            cpu_kernels.Norm(torch.randn(K - 1), None, 1e-6),
            cpu_kernels.Norm(None, torch.randn(K + 1), 1e-6),
            cpu_kernels.Norm(torch.randn(K).double(), torch.randn(K), 1e-6),
        ]  # fmt: skip
    gaps = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2]
    return [t[..., :-1].contiguous(), t[:-1].contiguous(), t.double(), t.half(), t.to("meta"), t.unsqueeze(0), gaps]


CALLS = [(name, argument) for name, (_, tensors) in good().items() for argument in tensors]
# what a function takes beside the first: fewer rows or columns that are all its own, another dtype, strides it knows
TAKES = {
    ("attention_qkv", "qkv"): (0, 1, 3),
    ("layer_norm", "x"): (1, 5),
    ("PackedWeight", "weight"): (0, 6),
    ("mlp", "x"): (1, 5),
    ("PackedWeight", "bias"): (2, 3, 6),
    ("block", "x"): (1,),
    ("patch_rows", "mean"): (2, 3, 6), ("patch_rows", "std"): (2, 3, 6),
    ("embed", "mean"): (2, 3, 6), ("embed", "std"): (2, 3, 6),
}  # fmt: skip


@pytest.mark.parametrize(("name", "argument"), CALLS)
def test_memory_beside_a_tensor_is_read(name, argument):
    torch.manual_seed(0)
    call, tensors = good()[name]
    call(**tensors)
    for i, wrong in enumerate(others_of(tensors[argument])):
        given = {**tensors, argument: wrong}
        if i in TAKES.get((name, argument), ()):
            call(**given)
            continue
        with pytest.raises(ValueError, match=r"must"):
            call(**given)


RAW = torch.ops.vitfast


def in_fp64(*shapes):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize(
    "call",
    [
        lambda: RAW.attention(torch.randn(2, 5, 2, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8), 0.3),
        lambda: RAW.attention(torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 4, 2, 8), 0.3),
        lambda: RAW.attention(torch.randn(2, 5, 2, 8), *[torch.randn(2, 5, 2, 8).half()] * 2, 0.3),
        lambda: RAW.attention_qkv(torch.randn(2, 5, 2, 2, 8), 0.3),
        # fp64 is torch's kernel, which checks no more
        lambda: RAW.attention(*in_fp64((2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8)), 0.3),
        lambda: RAW.attention(*in_fp64((2, 5, 4, 8), (1, 5, 4, 8), (1, 5, 4, 8)), 0.3),
        lambda: RAW.attention(*in_fp64((2, 5, 4, 8), (2, 5, 4, 8), (2, 3, 4, 8)), 0.3),
        lambda: RAW.attention_backward(
            torch.randn(2, 5, 16), *[torch.randn(2, 5, 2, 8)] * 3, torch.randn(2, 5, 16), torch.randn(1, 2, 5), 0.3),
        lambda: RAW.attention_backward(
            torch.randn(2, 5, 16), torch.randn(2, 5, 2, 8), *[torch.randn(1, 5, 2, 8)] * 2, torch.randn(2, 5, 16),
            torch.randn(2, 2, 5), 0.3),
        lambda: RAW.patch_embed(
            torch.ones(1, 13, 8, 8, dtype=torch.uint8), torch.randn(4, 13, 4, 4), None, None, None, torch.ones(3),
            torch.ones(3)),
        lambda: RAW.image_rows(
            torch.ones(1, 13, 8, 8, dtype=torch.uint8), [4, 4], torch.float32, torch.ones(3), torch.ones(3), "chw"),
        lambda: RAW.patch_embed_packed(
            [torch.ones(13, 8, 8, dtype=torch.uint8)], torch.randn(4, 13, 4, 4), None, None, None, torch.ones(3),
            torch.ones(3)),
    ],
)  # fmt: skip
def test_raw_op_reads_memory_beside_a_tensor(call):
    """A call below the checks of `vitfast.ops`."""
    with pytest.raises(ValueError, match="must be"):
        call()


def with_bands(channels):
    torch.manual_seed(0)
    model = vitfast.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()
    model.patch_embed.proj = torch.nn.Conv2d(channels, 192, 16, 16).eval()
    return model, torch.randint(256, (2, channels, 32, 32), dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("hooked", [False, True])
def test_multi_band_images_are_normalised_by_numbers_from_nowhere(channels, hooked):
    """A projection for 13 bands: mean and std of three channels, and what lies behind them in memory."""
    model, images = with_bands(channels)
    mean, std = torch.rand(channels), torch.rand(channels) + 0.1
    if hooked:
        model.patch_embed.register_forward_hook(lambda *_: None)
    if channels != 3:
        with pytest.raises(ValueError, match="need mean and std"):
            vitfast.prepare(model)(images)
        with pytest.raises(ValueError, match=f"mean must be {channels} finite numbers"):
            vitfast.prepare(model, mean=[0.5] * 3, std=[0.5] * 3)
    prepared = vitfast.prepare(model, mean=mean.tolist(), std=std.tolist())
    pixels = (images / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    torch.testing.assert_close(prepared(images), model(pixels).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"images must be \[B"):
        prepared(images[:, :1] if channels > 1 else images.repeat(1, 3, 1, 1))


class OneChannel(torch.nn.Module):
    """A stem that somebody put there, which takes what it is given."""

    def forward(self, images):
        return images.mean(1, keepdim=True).expand(-1, 4, -1, -1).flatten(2)[:, :, :192]


def test_one_channel_is_stretched_to_the_three_of_mean_and_std():
    model, _ = with_bands(3)
    model.patch_embed = OneChannel().eval()
    prepared = vitfast.prepare(model, mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(ValueError, match=r"uint8 images must be \[B, 3, H, W\]"):
        prepared(torch.ones(1, 1, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["linear", "mlp", "block", "embed"])
def test_weights_packed_for_another_instruction_set_are_read(name):
    """The panels of another width are other numbers."""
    sets = extension.require().usable_kernels()
    call, tensors = good()[name]
    mine = cpu_kernels.kernels()
    for other in sets:
        if other.name == mine.name:
            call(**tensors, using=other)
        else:
            with pytest.raises(ValueError, match=f"packed for {mine.name}, got kernels of {other.name}"):
                call(**tensors, using=other)


@pytest.mark.parametrize("prefix", [-1, -4])
def test_rows_begin_before_their_memory(prefix):
    with pytest.raises(ValueError, match="prefix must be at least 0"):
        cpu_kernels.patch_rows(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), (4, 4), prefix=prefix)


def test_norm_reads_memory_that_was_given_back():
    """After `weight.data = ...` the address of before: what is there must still be the norm's own."""
    norm = torch.nn.LayerNorm(K)
    packed, weight = cpu_kernels.Norm(norm.weight, norm.bias, norm.eps), cpu_kernels.PackedWeight(torch.eye(K), None)
    x = torch.randn(N, K)
    expected = cpu_kernels.linear(x, weight, norm=packed)
    address = norm.weight.data_ptr()
    norm.weight.data, norm.bias.data = torch.full((K,), 7.0), torch.full((K,), 7.0)
    others = [torch.full((K,), 9.0) for _ in range(64)]
    assert address not in {t.data_ptr() for t in others}
    assert torch.equal(cpu_kernels.linear(x, weight, norm=packed), expected)
