"""`vitfast.prepare`: as exact as timm in every family, whatever images and tokens come."""

import copy
import functools
import threading

import pytest
import torch
import vit_pytorch
from pairwise import product
from small_models import images_for, tiny
from textbook import Textbook
from timm_pair import FAMILIES, build_pair, pair_of, taps_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import vitfast
from vitfast.check.acceptance import accept_stages
from vitfast.inference import arguments, cpu_block, prepare
from vitfast.inference.cpu_block import PackedLinear
from vitfast.kernels import cpu as cpu_kernels

# what oneDNN multiplies on this CPU: bf16 wants AVX-512
DTYPES = [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()
BY_NAME = dict(zip(("fp32", "bf16"), DTYPES, strict=False))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=BY_NAME)


def relative(value, ref):
    return ((value.double() - ref).norm() / ref.norm()).item()


PRODUCTS = ("vitfast", "oneDNN")


@pytest.fixture(params=PRODUCTS)
def products(request, monkeypatch):
    """Whose products a prepared model computes; vitfast's are chosen only on CPUs where they are faster."""
    choose_products(request.param, monkeypatch)
    return request.param


def choose_products(whose, monkeypatch):
    if whose == "vitfast" and not cpu_kernels.multiplies(torch.float32):
        pytest.skip("no extension")
    for module in (prepare, cpu_block):
        choose = lambda dtype, K: whose == "vitfast" and cpu_kernels.multiplies(dtype)  # noqa: E731
        monkeypatch.setattr(module, "own_product", choose)
    monkeypatch.setattr(prepare, "own_blocks", lambda model, dtype: True)
    if cpu_kernels.tiled(torch.bfloat16):  # the same attention in all calls, whatever a clock says
        monkeypatch.setenv("VITFAST_CPU_ISA", cpu_kernels.kernels().name)


# oneDNN adds up all of a packed fp32 product in one chain, where MKL adds up pieces: the op rule's k for fp32
TYPICAL = {torch.float32: 2.0, torch.bfloat16: 1.25}
SHORT = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@functools.lru_cache(maxsize=1)
def kept_pair(family):
    torch.manual_seed(0)
    theirs, ours, images = build_pair(family, batch=3)
    return theirs.eval(), ours.eval(), images


@product(family=tuple(FAMILIES), dtype=BY_NAME, products=PRODUCTS)
@torch.no_grad()
def test_prepared_model_is_less_exact_than_timms(family, dtype, products, monkeypatch):
    """A part packed, folded or rounded wrongly: every stage and the logits of every family."""
    theirs, ours, images = kept_pair(family)
    choose_products(products, monkeypatch)
    prepared = vitfast.prepare(ours, dtype)
    assert f"by={products}" in str(prepared.blocks) or (dtype is torch.bfloat16 and not cpu_kernels.multiplies(dtype))
    ref = taps_of(copy.deepcopy(theirs).double(), images.double())
    with Textbook():
        low = taps_of(copy.deepcopy(theirs).to(dtype), images.to(dtype))
    taps = prepared.intermediates(images)
    accept_stages(taps, ref, low, typical=TYPICAL[dtype])
    # the short way through the last block adds up in another order
    torch.testing.assert_close(prepared(images), taps["logits"], rtol=0, atol=SHORT[dtype] * taps["logits"].abs().max())
    assert torch.equal(prepared.forward_features(images), taps["tokens"])


@every_dtype
@pytest.mark.parametrize("name, keywords", [
    ("vit_small_patch16_224", {}), ("vit_base_patch16_224", {"depth": 4}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 518, "depth": 3, "num_classes": 10}),
])  # fmt: skip
@torch.no_grad()
def test_error_grows_with_depth_or_tokens(name, keywords, dtype):
    theirs, ours, images = pair_of(name, 1, **keywords)
    theirs, ours = theirs.eval(), ours.eval()
    ref = taps_of(copy.deepcopy(theirs).double(), images.double())
    low = taps_of(copy.deepcopy(theirs).to(dtype), images.to(dtype))
    accept_stages(vitfast.prepare(ours, dtype).intermediates(images), ref, low, typical=TYPICAL[dtype])


@pytest.mark.parametrize("changes", [
    {}, {"pool": "mean"}, {"num_classes": 0}, {"heads": 1, "dim_head": 64}, {"dim_head": 24},
    {"channels": 1},
])  # fmt: skip
@torch.no_grad()
def test_vit_pytorchs_architecture_differs(changes):
    """LayerNorms around the patch projection, no output projection, an inner width of its own."""
    keywords = dict(image_size=32, patch_size=8, num_classes=40, dim=64, depth=2, heads=4, mlp_dim=128, dim_head=16)
    keywords |= changes
    theirs, ours = vit_pytorch.ViT(**keywords).eval(), vitfast.ViT(**keywords).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(3, keywords.get("channels", 3), 32, 32)
    prepared = vitfast.prepare(ours)
    assert relative(prepared(images), theirs(images).double()) < 1e-5
    assert relative(prepared(images[..., :16]), ours(images[..., :16]).double()) < 1e-5


@torch.no_grad()
def test_methods_of_the_model_differ():
    """Every way to features that training and dense prediction use, and other batch sizes and image sizes."""
    model = tiny(dynamic_img_size=True, reg_tokens=2, class_token=True)
    prepared = vitfast.prepare(model)
    calls = (
        lambda m, x: m(x), lambda m, x: m.forward_features(x), lambda m, x: m.forward_head(m.forward_features(x)),
        lambda m, x: m.forward_intermediates(x, 1, intermediates_only=True, norm=True)[0],
        lambda m, x: m.get_intermediate_layers(x, 1)[0], lambda m, x: m.forward_head(m.forward_features(x), True),
        lambda m, x: m(x, attn_mask=(torch.arange(x.shape[2] * x.shape[3] // 256 + 3) != 1)[None, None, None]),
    )  # fmt: skip
    for size, batch in (((32, 32), 2), ((48, 64), 1), ((32, 32), 5), ((48, 64), 3)):
        x = torch.randn(batch, 3, *size)
        for call in calls:
            torch.testing.assert_close(call(prepared, x), call(model, x), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="mask must be broadcastable"):
        prepared(torch.randn(1, 3, 32, 32), attn_mask=torch.ones(1, 1, 1, 5, dtype=torch.bool))
    nothing = torch.randn(0, 3, 32, 32)
    assert prepared(nothing).shape == (0, 10) and prepared.forward_features(nothing).shape == (0, 7, 192)


def test_gradient_or_autocast_leaks_in():
    """Features of a frozen backbone train a head; an ambient autocast changes nothing."""
    model = tiny()
    prepared, x = vitfast.prepare(model), images_for(model)
    plain = prepared(x)
    assert not plain.requires_grad and not plain.is_inference()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prepared(x), plain)
    with torch.inference_mode():
        assert torch.equal(prepared(x), plain)
    head = nn.Linear(10, 2)
    head(prepared(x)).sum().backward()
    assert head.weight.grad is not None


def test_dropout_in_train_mode_is_left_out_without_a_word():
    """A model that was not put into eval mode, or Monte-Carlo dropout: parts of it that are left in train mode."""
    model = tiny(drop_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5, reg_tokens=1)
    for name, module in model.named_modules():
        module.training = True
        message = f"{name or 'it'} is in train mode.*prepare\\(model.eval"
        with pytest.raises(NotImplementedError, match=message):
            vitfast.prepare(model)
        module.training = False
    with pytest.raises(NotImplementedError, match="it is in train mode"):
        vitfast.prepare(model.train())
    prepared = vitfast.prepare(model.eval())
    assert not prepared.training and not any(m.training for m in prepared.modules())


@torch.no_grad()
def test_uint8_images_are_normalised_otherwise():
    """By timm's numbers of that name, by given ones, in channels-last memory; and never silently by none."""
    model = tiny("deit3_small_patch16_224")
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    for given in ({}, {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}):
        mean, std = (given or model.pretrained_cfg)["mean"], (given or model.pretrained_cfg)["std"]
        mean, std = (torch.tensor(v)[:, None, None] for v in (mean, std))
        expected = model((pixels / 255 - mean) / std)
        torch.testing.assert_close(vitfast.prepare(model, **given)(pixels), expected, rtol=0, atol=1e-5)
    nameless = vitfast.ViT.from_config(model.config).eval()
    with pytest.raises(ValueError, match="mean and std"):
        vitfast.prepare(nameless)(pixels)


def test_tokens_of_another_dtype_or_width_are_misread(products):
    """Memory beside that of the tokens, or beside the result."""
    prepared = vitfast.prepare(tiny(), DTYPES[-1])
    tokens = prepared.forward_features(torch.randn(2, 3, 32, 32))
    logits = prepared.forward_head(tokens)
    other = torch.float32 if tokens.dtype is torch.bfloat16 else torch.bfloat16
    for wrong in (tokens.to(other), tokens.half(), torch.cat([tokens, tokens], -1), tokens[..., ::2]):
        with pytest.raises((ValueError, RuntimeError)):
            prepared.forward_head(wrong)
        with pytest.raises((ValueError, RuntimeError)):
            prepared.blocks[0](wrong)
    assert torch.equal(prepared.forward_head(torch._neg_view(-tokens)), logits)


def test_images_that_have_no_address_are_read():
    """On another device, fake, traced, transformed: kernels would read from nowhere, or the tracer record nothing."""
    prepared, x = vitfast.prepare(tiny()), torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="must be on the cpu.*got meta"):
        prepared(x.to("meta"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(NotImplementedError, match="plain tensors"):
        prepared(mode.from_tensor(x))
    for transformed in (lambda: make_fx(prepared)(x), lambda: torch.func.vmap(prepared)(x[None])):
        with pytest.raises(NotImplementedError, match="cannot be traced"):
            transformed()
    with pytest.raises(TypeError, match="must be a floating point tensor.*got list"):
        prepared([x])


def test_negated_view_or_stem_of_another_dtype_is_misread():
    """Lazy negation is a bit of the tensor, not of its memory; a stem may return fp32 in a bf16 model."""
    model = tiny()
    prepared, x = vitfast.prepare(model), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(prepared(torch._neg_view(x)), prepared(-x))

    class Wide(nn.Module):
        def forward(self, x):
            return x.float().flatten(2).transpose(1, 2)[:, :4].repeat(1, 1, 64)

    model.patch_embed = Wide()
    assert vitfast.prepare(model.eval(), DTYPES[-1])(x).isfinite().all()

    class WideNorm(nn.Module):
        def forward(self, x):
            return x.float() * 2 if x.dtype is not torch.float64 else x * 2

    model = tiny()
    model.norm_pre = WideNorm()
    found = vitfast.prepare(model.eval(), DTYPES[-1])(x)
    assert relative(found, model.double()(x.double())) < 0.1


@pytest.mark.slow
def test_compiler_stumbles_over_packed_weights():
    """As a part of a compiled model it runs as it is."""
    prepared = vitfast.prepare(tiny())
    x, head = images_for(prepared), nn.Linear(10, 2)
    both = lambda x: head(prepared(x))  # noqa: E731
    torch.testing.assert_close(torch.compile(both)(x), both(x))
    assert torch.equal(torch.compile(prepared)(x), prepared(x))


def test_replaced_stem_or_head_is_ignored():
    """What is outside the blocks may be anything: it runs as it is."""
    model, x = tiny(), torch.randn(2, 3, 32, 32)
    model.patch_embed = nn.Sequential(nn.Conv2d(3, 192, 16, 16), nn.Flatten(2), nn.Softmax(-1), Transposed())
    model.head = nn.Sequential(nn.Linear(192, 7), nn.Tanh())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(vitfast.prepare(model)(x), model(x), rtol=0, atol=1e-5)


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_dtype_is_another_than_asked():
    """The model's own by default; 'auto' is bf16 exactly where the CPU multiplies it."""
    cpu = torch.cpu.get_capabilities()
    fast = DTYPES[-1] if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else torch.float32
    for model, dtype, expected in (
        (tiny(), None, torch.float32), (tiny().to(DTYPES[-1]), None, DTYPES[-1]), (tiny(), "auto", fast),
        (tiny().half(), torch.float32, torch.float32),
    ):  # fmt: skip
        prepared = vitfast.prepare(model, dtype)
        assert prepared.dtype is expected
        for given in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            assert prepared(images_for(model).to(given)).dtype is expected


def test_bf16_without_bf16_products_fails_somewhere_inside(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(NotImplementedError, match="no bfloat16 on this CPU.*take float32"):
        vitfast.prepare(tiny(), torch.bfloat16)


def test_memory_is_not_reported():
    """Packed bytes are those of the weights, or a little more where rows are padded."""
    model = tiny()
    prepared = vitfast.prepare(model)
    weights = sum(p.nbytes for p in (*model.blocks.parameters(), model.patch_embed.proj.weight) if p.dim() > 1)
    assert weights <= prepared.packed_bytes <= 1.1 * weights
    assert prepared.copied_bytes >= model.head.weight.nbytes
    assert f"packed={prepared.packed_bytes / 2**20:.1f} MiB" in str(prepared)


def test_class_token_only_block_is_not_used():
    """Less work in the last block where only its class token is read, and nowhere else."""
    assert "qkv" not in vitfast.prepare(tiny()).blocks[-1]._modules
    assert "qkv" in vitfast.prepare(tiny()).blocks[0]._modules
    assert "qkv" in vitfast.prepare(tiny(global_pool="avg")).blocks[-1]._modules


def test_quota_of_a_container_is_ignored(tmp_path):
    """More threads than cores run many times slower; torch counts the machine's cores, not the container's."""
    affinity = arguments.usable_cores(tmp_path)
    assert affinity >= 1
    for text, expected in (("max 100000", affinity), ("100000 100000", 1), ("50000 100000", 1), ("nonsense", affinity)):
        (tmp_path / "cpu.max").write_text(text)
        assert arguments.usable_cores(tmp_path) == expected


def test_threads_are_not_set():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        vitfast.prepare(tiny(), threads=None)
        assert torch.get_num_threads() == 3
        vitfast.prepare(tiny())
        assert torch.get_num_threads() == min(3, arguments.usable_cores())
        vitfast.prepare(tiny(), threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_padded_images_or_prefix_tokens_differ():
    """Sizes that the patch does not divide; several prefix tokens, with and without positions."""
    for name, changes in (
        ("vit_tiny_patch16_224", dict(dynamic_img_size=True, dynamic_img_pad=True)),
        ("vit_small_patch14_reg4_dinov2", dict(dynamic_img_size=True, img_size=28)),
        ("vit_base_patch16_radio_v3", dict(dynamic_img_size=True)),
    ):
        model = tiny(name, **changes)
        patch = model.config.patch_size[0]
        odd = 5 if changes.get("dynamic_img_pad") else 0
        channels_last = torch.randn(2, 2 * patch, 4 * patch, 3).permute(0, 3, 1, 2)
        for x in (torch.randn(2, 3, 3 * patch + odd, 2 * patch), channels_last):
            torch.testing.assert_close(vitfast.prepare(model)(x), model(x), rtol=0, atol=1e-4)


@torch.no_grad()
def test_packed_linear_adds_or_activates_wrongly(products):
    """Odd sizes, no bias, few rows, a scale folded in."""
    for K, D, rows in ((13, 7, (1,)), (64, 96, (3, 5)), (72, 33, (2, 1))):
        weight, bias, gamma = torch.randn(D, K), torch.randn(D), torch.randn(D)
        x, residual = torch.randn(*rows, K), torch.randn(*rows, D)
        for b, g in ((bias, gamma), (None, gamma), (bias, None)):
            linear = PackedLinear(weight, b, torch.float32, g)
            plain = nn.functional.linear(x, weight, b) * (1 if g is None else g)
            torch.testing.assert_close(linear(x), plain, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(linear.add_to(residual, x), residual + plain, rtol=1e-4, atol=1e-4)
            for act in ("gelu", "gelu_tanh", "quick_gelu", "silu"):
                expected = vitfast.reference.activation(plain, act)
                torch.testing.assert_close(linear(x, act), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_soak_gives_a_wrong_result_or_grows():
    """2,000 calls with changing batch and image sizes from four threads: results stay, memory stays."""
    model = tiny("vit_tiny_patch16_224", dynamic_img_size=True)
    prepared = {dtype: vitfast.prepare(model, dtype) for dtype in DTYPES}
    cases = []
    for batch, size in ((1, (32, 32)), (3, (48, 32)), (8, (32, 32)), (2, (64, 80)), (5, (16, 16)), (1, (96, 96))):
        x = torch.randn(batch, 3, *size)
        cases += [(each, x, each(x)) for each in prepared.values()]
    wrong, calls = [], iter(range(2000))

    def work(seed):
        order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(seed)).tolist()
        for i in calls:
            each, x, expected = cases[order[i % len(order)]]
            if not torch.equal(each(x), expected):
                wrong.append((i, each.dtype, tuple(x.shape)))

    def run(n):
        nonlocal calls
        calls = Shared(n)
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run(400)
    before = resident_mib()
    run(2000)
    assert not wrong, f"{len(wrong)} of 2,000 calls: {wrong[:5]}"
    assert resident_mib() - before < 20


class Shared:
    """0 ... n - 1, each to one thread."""

    def __init__(self, n):
        self.rest, self.lock = iter(range(n)), threading.Lock()

    def __iter__(self):
        return self

    def __next__(self):
        with self.lock:
            return next(self.rest)


def resident_mib():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))
