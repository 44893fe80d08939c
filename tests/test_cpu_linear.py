"""Products of the C++ kernels with what surrounds them, for every instruction set, by the acceptance rule."""

import pytest
import torch
import torch.nn.functional as F
from textbook import Textbook

from vitfast import reference
from vitfast.check.acceptance import accept
from vitfast.kernels import cpu as cpu_kernels
from vitfast.kernels import extension

KERNELS = {kernels.name: kernels for kernels in extension.require().usable_kernels()}
CASES = [
    pytest.param(isa, dtype, id=f"{isa}-{str(dtype)[6:]}")
    for isa, kernels in KERNELS.items()
    for dtype in (torch.float32, torch.bfloat16)
    if cpu_kernels.multiplies(dtype, kernels)
]
every_case = pytest.mark.parametrize(("isa", "dtype"), CASES)
# rows, K, D: one row, tails of rows and columns, chains of sums in several pieces, rows a power of two apart
SHAPES = [(1, 8, 16), (5, 64, 34), (197, 192, 96), (30, 70, 250), (13, 3072, 50), (400, 130, 64), (23, 1024, 40)]


class Layers:
    """norm, fc1 [hidden, K] and fc2 [K, hidden] with what stock operators make of them in any dtype."""

    def __init__(self, K, hidden, dtype, eps=1e-6):
        draw = lambda *shape: torch.randn(shape)  # noqa: E731
        tensors = 1 + 0.1 * draw(K), draw(K), draw(hidden, K) * K**-0.5, draw(hidden), draw(K, hidden) * hidden**-0.5
        self.tensors, self.eps = [t.to(dtype) for t in (*tensors, draw(K))], eps

    def packed(self, isa):
        norm_weight, norm_bias, w1, b1, w2, b2 = self.tensors
        norm = cpu_kernels.Norm(norm_weight, norm_bias, self.eps)
        return norm, *(cpu_kernels.PackedWeight(w, b, KERNELS[isa]) for w, b in ((w1, b1), (w2, b2)))

    def linear(self, x, normalise, act, residual=None):
        norm_weight, norm_bias, w1, b1 = (t.to(x.dtype) for t in self.tensors[:4])
        h = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, self.eps) if normalise else x
        y = reference.activation(F.linear(h, w1, b1), act)
        return y if residual is None else residual + y

    def mlp(self, x, act):
        return x + F.linear(self.linear(x, True, act), *(t.to(x.dtype) for t in self.tensors[4:]))


@every_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_less_exact_than_stock(isa, dtype, shape):
    """A lost tail of rows or columns, a piece of K summed twice, bias or residual forgotten, another row's norm."""
    torch.manual_seed(0)
    rows, K, D = shape
    layers = Layers(K, D, dtype)
    norm, weight, _ = layers.packed(isa)
    x, residual = (3 + torch.randn(rows, K)).to(dtype), torch.randn(rows, D).to(dtype)
    for normalise, act, added in ((False, "none", None), (True, "gelu", None), (True, "silu", residual)):
        out = cpu_kernels.linear(
            x, weight, norm=norm if normalise else None, act=act, residual=added, using=KERNELS[isa]
        )
        exact = layers.linear(x.double(), normalise, act, None if added is None else added.double())
        with Textbook():
            stock = layers.linear(x, normalise, act, added)
        accept(out, exact, stock)


@every_case
@pytest.mark.parametrize("act", ["none", *cpu_kernels.ACTIVATIONS])
def test_mlp_is_less_exact_than_stock(isa, dtype, act):
    """Blocks of rows, few rows, which share columns, and a hidden width that fills no panel."""
    torch.manual_seed(0)
    for rows, K, hidden in ((1, 64, 256), (197, 64, 250), (400, 96, 130)):
        layers, x = Layers(K, hidden, dtype), torch.randn(rows, K).to(dtype)
        out = cpu_kernels.mlp(x, *layers.packed(isa), act, KERNELS[isa])
        with Textbook():
            stock = layers.mlp(x, act)
        accept(out, layers.mlp(x.double(), act), stock)


@every_case
def test_block_is_not_its_parts(isa, dtype):
    """q, k and v at wrong offsets, a branch added to the wrong tokens; other bits than the kernels one by one."""
    torch.manual_seed(0)
    B, N, H, D = 3, 37, 3, 16
    attention, mlp = Layers(48, 144, dtype), Layers(48, 192, dtype)
    (norm1, qkv, _), (norm2, fc1, fc2) = attention.packed(isa), mlp.packed(isa)
    proj = cpu_kernels.PackedWeight(*(torch.randn(48, 48).to(dtype) / 7, torch.randn(48).to(dtype)), KERNELS[isa])
    x, using = torch.randn(B, N, 48).to(dtype), KERNELS[isa]
    block = cpu_kernels.Block(norm1, qkv, proj, norm2, fc1, fc2, "gelu", H, D, D**-0.5)
    projected = cpu_kernels.linear(x, qkv, norm=norm1, using=using).view(B, N, 3, H, D)
    attended, _ = cpu_kernels.attention_qkv(projected, D**-0.5, False, using)
    y = cpu_kernels.linear(attended, proj, residual=x, using=using)
    assert torch.equal(cpu_kernels.block(x, block, using), cpu_kernels.mlp(y, norm2, fc1, fc2, "gelu", using))
    with Textbook():
        stock = F.scaled_dot_product_attention(*projected.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
    accept(attended, reference.attention(*projected.double().unbind(2), D**-0.5), stock)


@every_case
def test_result_depends_on_threads_or_other_rows(isa, dtype):
    """Another split of the work, of which there are three, must give the same bits."""
    norm, fc1, fc2 = Layers(64, 256, dtype).packed(isa)
    x, using = torch.randn(300, 64).to(dtype), KERNELS[isa]
    linear, mlp = cpu_kernels.linear(x, fc1, norm=norm, using=using), cpu_kernels.mlp(x, norm, fc1, fc2, "gelu", using)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            for first, last in ((0, 300), (299, 300), (100, 111)):
                rows = x[first:last]
                assert torch.equal(cpu_kernels.linear(rows, fc1, norm=norm, using=using), linear[first:last])
                assert torch.equal(cpu_kernels.mlp(rows, norm, fc1, fc2, "gelu", using), mlp[first:last])
    finally:
        torch.set_num_threads(before)


@every_case
def test_number_of_rows_changes_a_row(isa, dtype):
    """Tiles of all heights, in wide panels and a narrow one."""
    _, fc1, _ = Layers(40, 3 * 16, dtype).packed(isa)
    x, using = torch.randn(40, 40).to(dtype), KERNELS[isa]
    whole = cpu_kernels.linear(x, fc1, using=using)
    for rows in range(1, 40):
        assert torch.equal(cpu_kernels.linear(x[:rows], fc1, using=using), whole[:rows]), rows


@every_case
def test_rows_of_a_wide_mlp_are_lost_between_its_products(isa, dtype):
    """Hidden rows in memory, all of them or some at a time."""
    norm, fc1, fc2 = Layers(16, 8192, dtype).packed(isa)
    x, using = torch.randn(3300 // dtype.itemsize, 16).to(dtype), KERNELS[isa]
    hidden = cpu_kernels.linear(x, fc1, norm=norm, act="gelu", using=using)
    assert hidden.nbytes > 24 << 20
    expected = cpu_kernels.linear(hidden, fc2, residual=x, using=using)
    for rows in (x, x[:200]):
        assert torch.equal(cpu_kernels.mlp(rows, norm, fc1, fc2, "gelu", using), expected[: len(rows)])


@every_case
def test_scratch_memory_is_shared_or_lost(isa, dtype):
    """A small call, one that wants more than is kept, and a small one again, from two threads at once."""
    import concurrent.futures

    layers, using = Layers(64, 256, dtype), KERNELS[isa]
    norm, fc1, fc2 = layers.packed(isa)
    qkv = cpu_kernels.PackedWeight(torch.randn(192, 64).to(dtype), None, using)
    proj = cpu_kernels.PackedWeight(torch.randn(64, 64).to(dtype), None, using)
    block = cpu_kernels.Block(norm, qkv, proj, norm, fc1, fc2, "gelu", 4, 16, 0.25)
    inputs = [torch.randn(B, 50, 64).to(dtype) for B in (1, 1500, 2, 1)]
    expected = [cpu_kernels.block(x, block, using) for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            outs = pool.map(lambda x: cpu_kernels.block(x, block, using), inputs)
            for out, wanted in zip(outs, expected, strict=True):
                assert torch.equal(out, wanted)


@pytest.mark.parametrize("isa", [isa for isa, kernels in KERNELS.items() if kernels.takes_unpacked(16, 64, 1)])
def test_zero_of_a_product_depends_on_who_packs(isa):
    """Nothing added in place of a missing bias: what is left below the smallest normal number may be -0."""
    x, weight = torch.ones(3, 64).bfloat16(), torch.zeros(16, 64).bfloat16()
    weight[:, 0], weight[:, 32] = -1.5 * 2.0**-126, 2.0**-126
    packed = cpu_kernels.linear(x, cpu_kernels.PackedWeight(weight, None, KERNELS[isa]), using=KERNELS[isa])
    unpacked = cpu_kernels.linear_unpacked(x, weight, None, using=KERNELS[isa])
    assert torch.equal(packed.view(torch.int16), unpacked.view(torch.int16)) and packed.signbit().all()


@every_case
def test_calls_of_torch_between_ours_find_other_registers(isa, dtype):
    """Tiles that are left configured, or released from under oneDNN, on threads that both use; also after a fork."""
    import os

    layers, using = Layers(64, 256, dtype), KERNELS[isa]
    norm, fc1, fc2 = layers.packed(isa)
    x, qkv = torch.randn(300, 64).to(dtype), torch.randn(2, 50, 3, 4, 16).to(dtype)
    weight, heads = torch.randn(96, 64).to(dtype), qkv.permute(2, 0, 3, 1, 4)
    calls = [
        lambda: cpu_kernels.mlp(x, norm, fc1, fc2, "gelu", using),
        lambda: F.linear(x, weight),
        lambda: cpu_kernels.attention_qkv(qkv, 0.25, False, using)[0],
        lambda: F.scaled_dot_product_attention(*heads),
        lambda: cpu_kernels.linear(x[:5], fc1, using=using),
    ]
    alone = [call() for call in calls]

    def differ(compared):
        order = (0, 1, 2, 3, 4, 0, 3, 1, 4, 2, 1, 0) * 3
        return any(not torch.equal(calls[i](), alone[i]) and i in compared for i in order)

    assert not differ(range(5))
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # the parent's OpenMP threads are not there
        os._exit(differ((0, 2, 4)))
    assert os.waitpid(child, 0)[1] == 0


@every_case
def test_x_of_another_kind_is_read(isa, dtype):
    """Another dtype or width than the weight's, gaps, a residual that is broadcast, an activation nobody knows."""
    norm, fc1, fc2 = Layers(16, 32, dtype).packed(isa)
    x, using = torch.randn(4, 16).to(dtype), KERNELS[isa]
    for wrong in (x.half(), x.double(), x[:, :14].contiguous(), torch.randn(4, 32).to(dtype)[:, ::2]):
        with pytest.raises(ValueError, match="x must be contiguous"):
            cpu_kernels.linear(wrong, fc1, using=using)
        with pytest.raises(ValueError, match="x must be contiguous"):
            cpu_kernels.mlp(wrong, norm, fc1, fc2, "gelu", using)
    for residual in (torch.randn(4, 1).to(dtype), torch.randn(4, 32).half(), torch.randn(4, 64).to(dtype)[:, ::2]):
        with pytest.raises(ValueError, match="residual must be contiguous"):
            cpu_kernels.linear(x, fc1, residual=residual, using=using)
    with pytest.raises(KeyError):
        cpu_kernels.linear(x, fc1, act="relu", using=using)


@pytest.mark.skipif("avx512_bf16" not in KERNELS, reason="this CPU multiplies no bf16")
def test_odd_rows_of_pairs_are_read():
    with pytest.raises(ValueError, match="K must be even in bfloat16, got 7"):
        cpu_kernels.PackedWeight(torch.randn(4, 7).bfloat16(), None, KERNELS["avx512_bf16"])


@every_case
@pytest.mark.parametrize("P", [0, 2])
def test_stem_loses_a_position_or_a_pixel(isa, dtype, P):
    """Positions of the image before, prefix rows that keep what was added to zeros, padding, channels last."""
    torch.manual_seed(0)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    weight, bias = (torch.randn(50, 3 * 64) / 14).to(dtype), torch.randn(50).to(dtype)
    packed, using = cpu_kernels.PackedWeight(weight, bias, KERNELS[isa]), KERNELS[isa]
    for B, H, W in ((1, 8, 8), (4, 8, 8), (3, 40, 29), (20, 64, 64)):
        images = torch.randint(256, (B, H, W, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        rows = cpu_kernels.patch_rows(images, (8, 8), dtype=dtype, mean=mean, std=std, pad=True, using=using)
        tokens = P + rows.shape[1]
        positions, prefix = torch.randn(tokens, 50).to(dtype), torch.randn(P, 50).to(dtype) if P else None
        out = cpu_kernels.embed(images, (8, 8), packed, positions, prefix, mean, std, using)
        exact = F.linear(rows.double(), weight.double(), bias.double()) + positions[P:].double()
        with Textbook():
            stock = F.linear(rows, weight, bias)
        accept(out[:, P:], exact, stock + positions[P:])
        assert not P or torch.equal(out[:, :P], prefix.expand(B, -1, -1))
        without = cpu_kernels.embed(images, (8, 8), packed, None, prefix, mean, std, using)
        accept(without[:, P:], exact - positions[P:].double(), stock)
    for wrong in (positions[1:], positions.double(), positions.T.contiguous()):
        with pytest.raises(ValueError, match="positions must be contiguous"):
            cpu_kernels.embed(images, (8, 8), packed, wrong, prefix, mean, std, using)
    with pytest.raises(ValueError, match="images must have 3 channels"):
        cpu_kernels.embed(images[:, :2], (8, 8), packed, positions, prefix, mean, std, using)
