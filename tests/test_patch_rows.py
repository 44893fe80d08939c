"""Images cut into rows by the C++ kernel, and the packed patch embedding that is made of them."""

import pytest
import torch
import torch.nn.functional as F
from native_build import instruction_sets
from test_ops import Recorder, judge
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

import vitfast
from vitfast import ops, reference
from vitfast.kernels import cpu as cpu_kernels
from vitfast.kernels import extension

MEAN, STD = torch.tensor([0.485, 0.456, 0.406, 0.3]), torch.tensor([0.229, 0.224, 0.225, 0.5])
every_isa = pytest.mark.parametrize("isa", instruction_sets())
every_order = pytest.mark.parametrize("order", cpu_kernels.PATCH_ORDERS)
# (C, H, W, ph, pw): the usual; a patch of no whole vectors; wide and odd; one pixel; one channel; many
SIZES = [(3, 32, 48, 16, 16), (3, 28, 42, 14, 14), (4, 6, 99, 3, 33), (2, 3, 5, 1, 1), (1, 20, 44, 5, 11),
         (7, 9, 8, 3, 4)]  # fmt: skip


def using(isa):
    """The kernels of an instruction set, as the argument of that name."""
    return {kernels.name: kernels for kernels in extension.require().usable_kernels()}[isa]


def drawn(*shape, dtype):
    return torch.randint(0, 256, shape).to(dtype) if dtype == torch.uint8 else torch.randn(shape).to(dtype)


def unfolded(images, patch, order, prefix=0):
    """Rows by F.unfold, whose columns are in the order chw; the zeros at right and bottom are added before."""
    (ph, pw), (C, H, W) = patch, images.shape[1:]
    rows = F.unfold(F.pad(images.float(), (0, -W % pw, 0, -H % ph)), patch, stride=patch).transpose(1, 2)
    if order == "hwc":
        rows = rows.unflatten(2, (C, ph * pw)).transpose(2, 3).flatten(2)
    return F.pad(rows, (0, 0, prefix, 0)).contiguous()


def among_others(images):
    """A view into larger images: a kernel that takes its strides for those of a dense tensor reads the neighbours."""
    B, C, H, W = images.shape
    wide = torch.full((B, C + 1, H + 3, W + 5), 77, dtype=images.dtype)
    wide[:, 1:, 1:-2, 2:-3] = images
    return wide[:, 1:, 1:-2, 2:-3]


LAYOUTS = {
    "nchw": lambda t: t.contiguous(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "slice": among_others,
    "channels-last slice": lambda t: among_others(t.permute(0, 3, 1, 2)).permute(0, 2, 3, 1),
    "columns outermost": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "channels of the batch": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every second pixel": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    "expanded images": lambda t: t[:1].expand_as(t),
    "expanded channels": lambda t: t[:, :1].expand_as(t),
    "expanded columns": lambda t: t[..., :1].expand_as(t),
}


@every_isa
@every_order
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_differ_from_unfold(isa, order, layout, size):
    """A pixel in a wrong place, a stride that is ignored, a conversion that rounds otherwise than torch's."""
    C, H, W, *patch = size
    for dtype in cpu_kernels.DTYPES:
        images = LAYOUTS[layout](drawn(2, C, H, W, dtype=dtype))
        for to in cpu_kernels.FLOATS:
            rows = cpu_kernels.patch_rows(images, patch, order=order, dtype=to, using=using(isa))
            expected = unfolded(images, patch, order).to(to)
            torch.testing.assert_close(rows, expected, rtol=0, atol=0, msg=f"{dtype} to {to}")


@every_isa
@every_order
@pytest.mark.parametrize("layout", ["nchw", "channels last", "slice"])
@pytest.mark.parametrize("patch", [(4, 5), (3, 16), (7, 3)], ids=str)
def test_prefix_or_padding_is_not_zero(isa, order, layout, patch):
    """Zeros that are normalised as if they were black, garbage in `out` that stays, runs that spill over."""
    images, C = drawn(2, 3, 10, 33, dtype=torch.uint8), 3
    mean, std = MEAN[:C], STD[:C]
    normalised = (images / 255 - mean[:, None, None]) / std[:, None, None]
    for prefix in (0, 1, 5):
        expected = unfolded(normalised, patch, order, prefix)
        out = torch.full_like(expected, float("nan"))
        options = dict(order=order, mean=mean, std=std, prefix=prefix, pad=True, out=out, using=using(isa))
        rows = cpu_kernels.patch_rows(LAYOUTS[layout](images), patch, **options)
        assert rows is out
        torch.testing.assert_close(rows, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(rows == 0, expected == 0) or (normalised == 0).any()


@every_isa
@every_order
@pytest.mark.parametrize("dtype", cpu_kernels.FLOATS, ids=str)
def test_normalised_pixel_is_rounded_more_than_once(isa, order, dtype):
    """Mean or std of another channel, 256 in place of 255, mean and std rounded to half precision."""
    images = torch.arange(256, dtype=torch.uint8).expand(1, 4, 4, 256).contiguous()
    exact = (images.double() / 255 - MEAN.double()[:, None, None]) / STD.double()[:, None, None]
    for layout in ("nchw", "channels last"):
        rows = cpu_kernels.patch_rows(LAYOUTS[layout](images), (2, 32), order=order, dtype=dtype, mean=MEAN, std=STD,
                                 using=using(isa))  # fmt: skip
        expected = torch.empty_like(rows, dtype=torch.float64)
        place = unfolded(torch.arange(4 * 256 * 4).view(1, 4, 4, 256), (2, 32), order).long()
        expected.copy_(exact.flatten()[place])
        error = (rows.double() - expected).abs()
        # half an ulp of the result, and the fp32 product's error where the mean takes most of it away
        assert (error <= 0.501 * torch.finfo(dtype).eps * expected.abs() + 3e-7).all(), error.max()


@every_order
def test_threads_write_over_each_other(order):
    """A run that spills into the rows of another thread: 14 pixels are no whole vector."""
    images = torch.randn(5, 3, 56, 70)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for layout in ("nchw", "channels last", "columns outermost"):
                for _ in range(5):
                    rows = cpu_kernels.patch_rows(LAYOUTS[layout](images), (14, 14), order=order)
                    assert torch.equal(rows, unfolded(images, (14, 14), order)), (count, layout)
    finally:
        torch.set_num_threads(threads)


BAD = {
    "dtype": (dict(dtype=torch.float64), "dtype one of .*float64"),
    "order": (dict(order="cwh"), "order one of .*'cwh'"),
    "size": (dict(patch_size=(3, 4)), "multiple of the patch 3x4 in size, got 4x8"),
    "out": (dict(out=torch.empty(2, 4, 12)), r"contiguous \[1, 4, 24\] in float32, got \[2, 4, 12\]"),
    "out's strides": (dict(out=torch.empty(1, 24, 4).mT), r"contiguous .* strides \(96, 1, 4\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_argument_reaches_the_kernel(name):
    changed, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        cpu_kernels.patch_rows(torch.zeros(1, 3, 4, 8), **dict(patch_size=(2, 4)) | changed)


def embedding(D=40, dtype=torch.float32):
    """Weight, bias and prefix of 3 x 4 patches."""
    return [t.to(dtype) for t in (torch.randn(D, 3, 3, 4) * 36**-0.5, torch.randn(D), torch.randn(2, D))]


@pytest.mark.parametrize("layout", ["nchw", "channels last", "slice"])
@pytest.mark.parametrize("dtype", cpu_kernels.FLOATS, ids=str)
def test_uint8_images_lose_more_than_stock(layout, dtype):
    """The normalisation before the projection, in patch_embed and its gradients, beside fp64 and stock operators."""
    images = LAYOUTS[layout](drawn(2, 3, 6, 20, dtype=torch.uint8))
    weight, bias, prefix = embedding(dtype=dtype)
    pos, cotangent = torch.randn(12, 40).to(dtype), torch.randn(2, 12, 40).to(dtype)
    mean, std = MEAN[:3].to(dtype), STD[:3].to(dtype)

    def results(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (weight, bias, pos, prefix)]
        out = function(images, *leaves, mean.to(dtype), std.to(dtype))
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype))]

    fused = lambda i, w, b, pos, pre, m, s: ops.patch_embed(i, w, b, pos_embed=pos, prefix=pre, mean=m, std=s)  # noqa: E731
    out, ref, low = (
        results(fused, dtype),
        results(reference.patch_embed, torch.float64),
        results(reference.patch_embed, dtype),
    )
    for name, *three in zip(["out", "grad weight", "grad bias", "grad pos", "grad prefix"], out, ref, low, strict=True):
        judge(name, *three, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bias_that_cancels_the_product_leaves_its_rounding(dtype):
    """The bias added to the positions first, or to a product that is rounded already."""
    images, (weight, _, prefix) = (torch.randn(2, 3, 6, 20) + 9).to(dtype), embedding(dtype=dtype)
    bias, pos = (-9 * weight.double().sum((1, 2, 3))).to(dtype), torch.randn(12, 40).to(dtype)
    args = [images, weight, bias, pos, prefix]
    out = ops.patch_embed(images, weight, bias, pos_embed=pos, prefix=prefix)
    low = F.conv2d(images, weight, bias, stride=(3, 4)).flatten(2).transpose(1, 2)
    low = reference.with_prefix(low, pos, prefix)
    judge("out", out, reference.patch_embed(*(t.double() for t in args)), low, dtype)


def test_stock_path_or_an_instruction_set_tells_another_story(monkeypatch):
    """The path without the extension, where it is not built, and every instruction set where it is."""
    images, (weight, bias, prefix) = torch.randn(2, 3, 6, 20), embedding()
    pos = torch.randn(12, 40)
    call = lambda: ops.patch_embed(images, weight, bias, pos_embed=pos, prefix=prefix)  # noqa: E731
    expected = reference.patch_embed(images.double(), weight.double(), bias.double(), pos.double(), prefix.double())
    for kernels in [None, *(using(isa) for isa in instruction_sets())]:
        monkeypatch.setattr(cpu_kernels, "kernels", lambda kernels=kernels: kernels)
        torch.testing.assert_close(call().double(), expected, rtol=1e-5, atol=1e-5)


GRIDS = [(6, 20), (3, 4), (9, 8)]


def packed(dtype=torch.float32, positions="all"):
    images = [torch.randn(3, H, W).to(dtype) for H, W in GRIDS]
    weight, bias, prefix = embedding(dtype=dtype)
    extra = {"all": 2, "patches": 0}.get(positions)
    lengths = [(H // 3) * (W // 4) for H, W in GRIDS]
    pos = None if extra is None else [torch.randn(N + extra, 40).to(dtype) for N in lengths]
    return images, weight, bias, pos, prefix


@pytest.mark.parametrize("positions", ["all", "patches", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, *cpu_kernels.FLOATS], ids=str)
def test_packed_tokens_differ_from_those_of_each_image(dtype, positions):
    """Rows of one image under the positions of another, a wrong boundary, a gradient that gets lost in the packing."""
    images, weight, bias, pos, prefix = packed(dtype, positions)

    def results(together, dtype):
        cast = lambda ts: [t.detach().to(dtype).requires_grad_() for t in ts]  # noqa: E731
        x, (w, b, pre), positions = cast(images), cast((weight, bias, prefix)), pos and cast(pos)
        if together:
            tokens, _ = ops.patch_embed_packed(x, w, b, pos_embed=positions, prefix=pre)
        else:
            each = [None] * len(x) if positions is None else positions
            alone = [ops.patch_embed(i[None], w, b, pos_embed=p, prefix=pre)[0] for i, p in zip(x, each, strict=True)]
            tokens = torch.cat(alone)
        cotangent = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        grads = torch.autograd.grad(tokens, [*x, w, b, pre, *(positions or [])], cotangent)
        return [tokens.detach(), *grads]

    lengths = torch.tensor([0] + [2 + (H // 3) * (W // 4) for H, W in GRIDS])
    with torch.no_grad():
        tokens, cu_seqlens = ops.patch_embed_packed(images, weight, bias, pos_embed=pos, prefix=prefix)
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == lengths.cumsum(0).tolist()
    got, ref, low = results(True, dtype), results(False, torch.float64), results(False, dtype)
    torch.testing.assert_close(tokens, got[0], rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    for i, three in enumerate(zip(got, ref, low, strict=True)):
        if dtype == torch.float64:
            torch.testing.assert_close(three[0], three[1], rtol=1e-10, atol=1e-11)
        else:
            judge(f"grad {i}" if i else "out", *three, dtype)


def test_packed_uint8_images_or_autocast_differ():
    """Normalisation or the autocast dtype that patch_embed has and its packed twin has not."""
    images = [drawn(3, H, W, dtype=torch.uint8) for H, W in GRIDS]
    weight, bias, prefix = embedding()
    kw = dict(prefix=prefix, mean=MEAN[:3], std=STD[:3])
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            tokens, _ = ops.patch_embed_packed(images, weight, bias, **kw)
            alone = torch.cat([ops.patch_embed(image[None], weight, bias, **kw)[0] for image in images])
            assert tokens.dtype == alone.dtype == torch.float32
            tol = 0.02 if enabled else 1e-5
            torch.testing.assert_close(tokens, alone, rtol=tol, atol=tol)
            bare, _ = ops.patch_embed_packed(images, weight, mean=MEAN[:3], std=STD[:3])
            assert bare.dtype == (torch.bfloat16 if enabled else torch.float32)


def test_packed_rows_are_not_an_op_or_exportable_mode_runs_it():
    """torch.compile that cannot trace the packing, a shape function of other sizes, an exporter that meets the op."""
    images, weight, bias, pos, prefix = packed()
    call = lambda: ops.patch_embed_packed(images, weight, bias, pos_embed=pos, prefix=prefix)[0]  # noqa: E731
    with Recorder() as recorder:
        expected = call()
    func, args, _ = next(each for each in recorder.calls if "patch_embed_packed" in str(each[0]))
    torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))
    with FakeTensorMode() as mode:
        fake = func(*tree_map_only(torch.Tensor, mode.from_tensor, args))
    assert (fake.shape, fake.stride()) == (func(*args).shape, func(*args).stride())
    compiled = torch.compile(lambda *args: ops.patch_embed_packed(*args)[0], backend="aot_eager", fullgraph=True)
    plain = ops.patch_embed_packed(images, weight, bias)[0]
    torch.testing.assert_close(compiled(images, weight, bias), plain)
    vitfast.set_exportable(True)
    try:
        with Recorder() as recorder:
            torch.testing.assert_close(call(), expected)
    finally:
        vitfast.set_exportable(False)
    assert not recorder.calls


PACKED_BAD = {
    "none": (dict(images=[]), "at least one image .* got 0 images"),
    "positions": (dict(pos_embed=[torch.zeros(2, 40)]), "got 3 images and pos_embed for 1"),
    "size": (dict(images=[torch.zeros(3, 3, 4), torch.zeros(3, 4, 4)]), r"images\[1\]: .*multiple of .* 3x4.*4x4"),
    "dims": (dict(images=[torch.zeros(2, 3, 3, 4)]), r"images\[0\]: images must be \[C, H, W\], got \[2, 3, 3, 4\]"),
    "uint8": (dict(images=[torch.zeros(3, 3, 4).byte()]), r"images\[0\]: uint8 images need mean and std"),
}


@pytest.mark.parametrize("name", PACKED_BAD)
def test_packed_error_does_not_name_the_image(name):
    changed, message = PACKED_BAD[name]
    images, weight, *_ = packed()
    with pytest.raises(ValueError, match=message):
        ops.patch_embed_packed(**dict(images=images, weight=weight) | changed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("patch", [(1, 1), (2, 4), (3, 4)], ids=str)
def test_rows_of_pixels_are_the_images_memory(patch, dtype):
    """Channels-last images and a patch as wide as they are: their rows may be a view, which no op may return."""
    images = torch.randn(4, 3, 6, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)[::2]
    args = images, list(patch), dtype, None, None, "hwc"
    torch.library.opcheck(torch.ops.vitfast.image_rows.default, args)
    rows = torch.ops.vitfast.image_rows(*args)
    assert torch.equal(rows, reference.patch_rows(images, patch, "hwc")) and rows.is_contiguous()


@pytest.mark.parametrize("wants_grad", [False, True])
def test_normed_pixels_break_a_graph_or_lose_a_gradient(wants_grad):
    """vit-pytorch's stem compiled, exportable, and in fp64, with padding and gradients of all."""
    images = torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=wants_grad)
    weight, bias, scale, shift = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4, 4, 3), (5,), (48,), (48,))
    )
    run = lambda *t: ops.patch_embed(t[0], t[1], t[2], pad=True, input_norm=(t[3], t[4], 1e-5))  # noqa: E731
    given = [images, weight, bias, scale, shift]
    wanted = [t for t in given if t.requires_grad]
    rows = reference.patch_rows(F.pad(images, (0, 0, 0, 1)), (4, 4), "hwc")
    true = F.linear(F.layer_norm(rows, (48,), scale, shift, 1e-5), weight.flatten(1), bias)
    cotangent = torch.randn_like(true)
    expected = [true, *torch.autograd.grad(true, wanted, cotangent)]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for function in (run, compiled):
        out = function(*given)
        torch.testing.assert_close([out, *torch.autograd.grad(out, wanted, cotangent)], expected)
    vitfast.set_exportable(True)
    try:
        torch.testing.assert_close(run(*given), true)
    finally:
        vitfast.set_exportable(False)


def test_mean_that_wants_a_gradient_gets_none_without_a_word():
    images, weight = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.randn(5, 3, 4, 4)
    mean = MEAN[:3].clone().requires_grad_()
    with pytest.raises(ValueError, match="mean and std are constants"):
        ops.patch_embed(images, weight, mean=mean, std=STD[:3])
    with pytest.raises(TypeError, match="images must be a list .* got Tensor"):
        ops.patch_embed_packed(images, weight, mean=MEAN[:3], std=STD[:3])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stock_operators_round_pixels_more_than_once(dtype, packed, monkeypatch):
    """What a GPU without the kernel runs: normalised in half precision, pixels would be rounded three times."""
    monkeypatch.setattr(cpu_kernels, "kernels", lambda: None)
    images = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    weight = (torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1)) / 28).to(dtype)
    mean, std = MEAN[:3], STD[:3]
    embed = lambda x, w: F.conv2d(x, w, stride=16).flatten(2).transpose(1, 2)  # noqa: E731
    true = embed(reference.normalise(images, mean, std, torch.float64), weight.double())
    low = embed(reference.normalise(images, mean, std, torch.float32).to(dtype), weight)
    if packed:
        out = ops.patch_embed_packed([*images], weight, mean=mean, std=std)[0].view(4, 16, 64)
    else:
        out = ops.patch_embed(images, weight, mean=mean, std=std)
    judge("tokens", out, true, low, dtype)
