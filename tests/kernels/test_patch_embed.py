"""The CUDA kernels of patch embedding beside fp64 and stock operators: on a GPU, or run on the host."""

import itertools

import pytest
import torch
from attention_cases import INTERPRETED, draw
from pairwise import product
from patch_cases import DTYPES, LAYOUTS, exactly, given, judge, kernels, pixels  # noqa: F401

import vitfast
from vitfast import ops, reference
from vitfast.check.acceptance import NotAccepted
from vitfast.check.calls import Call, Like
from vitfast.check.families import FAMILIES
from vitfast.check.warmup import check as check_family
from vitfast.choose import dispatch
from vitfast.kernels.cuda.patch_embed import code_for
from vitfast.measure import device as devices

BY_NAME = dict(zip(("fp16", "bf16", "fp32"), DTYPES, strict=True))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=BY_NAME)
halves = {"dtype": {name: BY_NAME[name] for name in ("fp16", "bf16")}}


def by_op(args, backend, **more):
    images, weight, bias, pos, prefix, mean, std = args
    with dispatch.backend(backend):
        return ops.patch_embed(images, weight, bias, pos_embed=pos, prefix=prefix, mean=mean, std=std, **more)


def check(args, what="", **more):
    out, low = by_op(args, "kernel", **more), by_op(args, "stock", **more)
    judge(out, exactly(*args), low, dtype=args[1].dtype, what=what)
    return out


def tiles_of(kernels, dtype, device):  # noqa: F811
    return kernels.configs(torch.device(device), dtype, 1000, 768)


# B, C, H, W, patch, D: the usual; of no whole vectors; wide; one pixel; one channel; many; several tiles each way
SHAPES = [
    (2, 3, 32, 48, (16, 16), 72), (1, 3, 28, 42, (14, 14), 40), (3, 4, 6, 96, (3, 32), 8), (2, 3, 4, 4, (1, 1), 7),
    (1, 1, 16, 24, (8, 8), 130), (2, 7, 9, 8, (3, 4), 24), (2, 3, 160, 96, (16, 8), 264),
]  # fmt: skip


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_are_less_exact_than_stock(shape, dtype, kernels, device):  # noqa: F811
    """Every tile, with pixels of every number type."""
    for image_dtype in dict.fromkeys((dtype, torch.uint8)):
        args = given(*shape, dtype=dtype, image_dtype=image_dtype, device=device)
        true, low = exactly(*args), by_op(args, "stock")
        for tile in tiles_of(kernels, dtype, device):
            images, weight, bias, pos, prefix, mean, std = args
            out = kernels.embed(images, weight, bias, pos[1:], prefix, pos[:1], mean, std, dtype, tile.as_dict())
            judge(out, true, low, dtype=dtype, what=f"{image_dtype} {tile}")


@product(image_dtype=("same", torch.uint8), layout=tuple(LAYOUTS), dtype=BY_NAME)
def test_layout_of_the_images_changes_a_token(image_dtype, layout, dtype, kernels, device):  # noqa: F811
    """A wrong stride, a load that is not aligned, a pixel from beside the image."""
    image_dtype = dtype if image_dtype == "same" else image_dtype
    for H, W, patch in ((32, 48, (16, 16)), (28, 28, (14, 14)), (16, 16, (8, 4))):
        args = given(2, 3, H, W, patch, 24, dtype=dtype, image_dtype=image_dtype, device=device, layout=layout)
        out = by_op(args, "kernel")
        plain = by_op((args[0].contiguous().clone(), *args[1:]), "kernel")
        # chunks are added in another order where the channels are side by side
        torch.testing.assert_close(out, plain, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=2e-2)
        judge(out, exactly(*args), by_op(args, "stock"), dtype=dtype)


@pytest.mark.parametrize("padded", [(32, 48), (30, 48), (32, 33), (17, 40)], ids=str)
@pytest.mark.parametrize("layout", ["planar", "channels last", "offset by one"])
@pytest.mark.parametrize("image_dtype", [torch.float16, torch.uint8], ids=str)
def test_padding_is_more_than_zeros(padded, layout, image_dtype, kernels, device):  # noqa: F811
    """Zeros that are normalised, a pixel of the next line, a patch that is lost."""
    how = {"dtype": torch.float16, "image_dtype": image_dtype, "device": device, "layout": layout}
    args = given(2, 3, *padded, (16, 16), 40, **how)
    check(args, pad=True)
    if padded != (32, 48):
        with pytest.raises(ValueError, match="multiple of the patch"):
            by_op(args, "kernel")


@every_dtype
@pytest.mark.parametrize("P, positions", [*itertools.product((0, 1, 5), (None, "all", "patches"))])
def test_prefix_or_positions_are_at_another_row(P, positions, dtype, kernels, device):  # noqa: F811
    # 6 patches an image, so that a tile begins within an image, and has several
    args = given(40, 3, 8, 12, (4, 4), 20, dtype=dtype, device=device, P=P, positions=positions)
    out = check(args)
    assert out.shape == (40, P + 6, 20)
    bare = (*args[:2], None, *args[3:])
    check(bare)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["fp16", "bf16"])
def test_autocast_rounds_images_or_positions_before(dtype, kernels, device):  # noqa: F811
    """fp32 parameters and images, half-precision products, and tokens in fp32."""
    args = given(2, 3, 32, 32, (16, 16), 40, dtype=torch.float32, device=device)
    with torch.autocast(device.type, dtype=dtype):
        out, low = by_op(args, "kernel"), by_op(args, "stock")
    assert out.dtype == low.dtype == torch.float32
    rounded = (args[0].to(dtype), args[1].to(dtype), args[2].to(dtype), *args[3:])
    judge(out, exactly(*rounded), low, dtype=dtype)


def results_of(function, leaves, cotangent):
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = function(*leaves)
    return torch.autograd.grad(out, leaves, cotangent.to(out.dtype))


@product(layout=("planar", "channels last"), shape=SHAPES[:3] + SHAPES[5:], dtype=BY_NAME)
def test_gradients_are_less_exact_than_stock(layout, shape, dtype, kernels, device):  # noqa: F811
    """Of images, weight, bias, positions and prefix; from padded images too; the same bits in a second run."""
    B, C, H, W, patch, D = shape
    for cut in (0, patch[0] // 2):
        images, weight, bias, pos, prefix, *_ = given(
            B, C, H - cut, W, patch, D, dtype=dtype, device=device, layout=layout
        )
        N = pos.shape[0]
        cotangent = draw(B, N, D, dtype=dtype, device=device)
        run = lambda i, w, b, p, c: ops.patch_embed(i, w, b, pos_embed=p, prefix=c, pad=True)  # noqa: E731
        leaves = (images, weight, bias, pos, prefix)
        with dispatch.backend("kernel"):
            outs = results_of(run, leaves, cotangent)
            again = results_of(run, leaves, cotangent)
        assert all(torch.equal(a, b) for a, b in zip(outs, again, strict=True))
        with dispatch.backend("stock"):
            lows = results_of(run, leaves, cotangent)
        truth = lambda *given: exactly(*given, None, None)  # noqa: E731
        refs = results_of(truth, [t.double() for t in leaves], cotangent)
        for name, out, ref, low in zip(("images", "weight", "bias", "pos", "prefix"), outs, refs, lows, strict=True):
            judge(out, ref, low, dtype=dtype, grad=True, what=f"gradient of {name}")


@product(
    image_dtype=("same", torch.uint8, torch.float32), layout=("planar", "channels last", "offset by one"), **halves
)
def test_weight_gradient_depends_on_the_way_to_it(image_dtype, layout, dtype, kernels, device):  # noqa: F811
    """Each way, from few patches and from so many that they are split; D and K that fill no tile, and several."""
    image_dtype = dtype if image_dtype == "same" else image_dtype
    for B, H, W, patch, D in ((2, 32, 48, (16, 16), 40), (22, 32, 48, (8, 8), 136), (3, 28, 28, (14, 14), 7)):
        images, weight, *_, mean, std = given(
            B, 3, H, W, patch, D, dtype=dtype, image_dtype=image_dtype, device=device, layout=layout
        )
        N = H // patch[0] * (W // patch[1])
        grad = draw(B, 1 + N, D, dtype=dtype, device=device)
        x = images.double() if mean is None else reference.normalise(images, mean, std, torch.float64)
        true = grad[:, 1:].double().flatten(0, 1).t() @ reference.patch_rows(x, patch).flatten(0, 1)
        low = reference.patch_rows(x.to(dtype), patch).flatten(0, 1)
        low = grad[:, 1:].flatten(0, 1).t() @ low
        for config in kernels.gradient_configs(device, dtype):
            out = kernels.weight_gradient(images, weight, grad, 1, mean, std, config)
            judge(out.flatten(1), true, low, grad=True, what=str(config))
            assert torch.equal(out, kernels.weight_gradient(images, weight, grad, 1, mean, std, config))


def test_gradients_of_uint8_images_are_those_of_other_pixels(kernels, device):  # noqa: F811
    for layout in ("planar", "channels last", "offset by one"):
        images, weight, bias, pos, prefix, mean, std = given(
            2, 3, 32, 48, (16, 16), 24, dtype=torch.float16, image_dtype=torch.uint8, device=device, layout=layout
        )
        cotangent = draw(2, 7, 24, dtype=torch.float16, device=device)
        run = lambda w: ops.patch_embed(images, w, bias, pos_embed=pos, prefix=prefix, mean=mean, std=std)  # noqa: E731, B023
        found = {}
        for backend in ("kernel", "stock"):
            with dispatch.backend(backend):
                (found[backend],) = results_of(run, [weight], cotangent)
        rest = (t.double() for t in (bias, pos, prefix))
        b, p, c = rest
        (ref,) = results_of(lambda w: exactly(images, w, b, p, c, mean, std), [weight.double()], cotangent)  # noqa: B023
        judge(found["kernel"], ref, found["stock"], grad=True)


@product(image_dtype=("same", torch.uint8), positions=(None, "all", "patches"), dtype=BY_NAME)
def test_packed_images_differ_from_each_alone(image_dtype, positions, dtype, kernels, device):  # noqa: F811
    """A row of the image before, a stride or a size of another image."""
    image_dtype = dtype if image_dtype == "same" else image_dtype
    sizes, patch = [(32, 16), (16, 48), (64, 80), (16, 16)], (16, 16)
    images = [pixels(1, 3, *size, dtype=image_dtype, device=device)[0] for size in sizes]
    images[1] = images[1].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    _, weight, bias, _, prefix, mean, std = given(1, 3, 16, 16, patch, 40, dtype=dtype, image_dtype=image_dtype,
                                                  device=device, P=2)  # fmt: skip
    count = lambda size: size[0] // 16 * (size[1] // 16) + (2 if positions == "all" else 0)  # noqa: E731
    pos = positions and [draw(count(size), 40, dtype=dtype, device=device) for size in sizes]
    leaves = [weight, bias, prefix, *(pos or [])]

    def run(weight, bias, prefix, *pos):
        tokens, starts = ops.patch_embed_packed(
            images, weight, bias, pos_embed=list(pos) or None, prefix=prefix, mean=mean, std=std
        )  # fmt: skip
        assert starts.tolist() == [0, *itertools.accumulate(2 + h // 16 * (w // 16) for h, w in sizes)]
        return tokens

    def alone(weight, bias, prefix, *pos):
        each = zip(images, pos or [None] * 4, strict=True)
        return torch.cat([exactly(i[None], weight, bias, p, prefix, mean, std)[0] for i, p in each])

    found = {}
    for backend in ("kernel", "stock"):
        with dispatch.backend(backend):
            out = run(*leaves)
            cotangent = draw(*out.shape, device=device)
            found[backend] = [out, *results_of(run, leaves, cotangent)]
    wide = [t.double() for t in leaves]
    refs = [alone(*wide), *results_of(alone, wide, cotangent.to(dtype).double())]
    for i, (out, ref, low) in enumerate(zip(found["kernel"], refs, found["stock"], strict=True)):
        judge(out, ref, low, dtype=dtype, grad=i > 0, what=f"result {i}")


@every_dtype
@pytest.mark.parametrize("order", ["chw", "hwc"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_pixels_have_another_pixel(layout, order, dtype, kernels, device):  # noqa: F811
    """Bitwise: nothing is added up."""
    for (H, W), patch in (((32, 32), (16, 16)), ((28, 14), (14, 14)), ((9, 10), (3, 5))):
        images = LAYOUTS[layout](pixels(2, 3, H, W, dtype=dtype, device=device))
        rows = kernels.rows(images, patch, dtype, order=order)
        assert torch.equal(rows, reference.patch_rows(images, patch, order).flatten(0, 1))


def test_more_patches_than_a_grid_has_rows(kernels, device):  # noqa: F811
    """70,000 images of one patch; the prefix of each."""
    args = given(70_000, 1, 2, 2, (2, 2), 8, dtype=torch.float16, device=device)
    if INTERPRETED:
        # 547 blocks of threads are enough on the host
        args = (args[0][:4000], *args[1:])
    check(args)


def test_numbers_beside_a_tensor_are_read_or_written(kernels, device):  # noqa: F811
    """Parameters that begin at no multiple of 16 bytes, with NaN around them."""
    for shift in (0, 1, 3):
        args = given(2, 3, 12, 12, (4, 6), 40, dtype=torch.float16, device=device)
        moved = []
        for t in args[1:5]:
            room = torch.full((t.numel() + 8,), float("nan"), dtype=t.dtype, device=device)
            moved.append(room[shift : shift + t.numel()].view(t.shape).copy_(t))
        check((args[0], *moved, *args[5:]), what=f"shift {shift}")


def test_kernel_that_does_not_start_says_nothing_or_breaks_the_next(kernels, device):  # noqa: F811
    args = given(2, 300, 8, 8, (4, 4), 24, dtype=torch.float16, device=device)
    wide = given(1, 60_000, 2, 2, (2, 2), 8, dtype=torch.float16, device=device)
    # more constants than there is shared memory, which the op knows
    with pytest.raises(RuntimeError, match=r"patch_embed did not start: CUDA error \d+: invalid argument"):
        kernels.embed(*wide[:3], None, None, None, None, None, torch.float16)
    with pytest.raises(NotImplementedError, match="60000 channels in patches of 2x2"):
        by_op(wide, "kernel")
    check(args)


def test_op_runs_something_else(kernels, monkeypatch, device):  # noqa: F811
    """One kernel forward, one for the weight's gradient, none where the kernels are switched off."""
    real, ran = kernels.functions(), []

    class Counting:
        def __getattr__(self, name):
            if name in ("patch_embed", "patch_rows", "weight_gradient"):
                return lambda *args: (ran.append(name), getattr(real, name)(*args))[1]
            return getattr(real, name)

    counting = Counting()
    monkeypatch.setattr(kernels, "functions", lambda: counting)
    args = given(2, 3, 32, 32, (16, 16), 24, dtype=torch.float16, device=device)
    args[1].requires_grad_()
    by_op(args, "auto").sum().backward()
    # on compute capability 9.0 cuBLAS multiplies rows of pixels
    assert ran[0] == "patch_embed" and ran[1:] in (["weight_gradient"], ["patch_rows"])
    with dispatch.backend("stock"):
        by_op(args, "stock").sum().backward()
    assert len(ran) == 2
    with pytest.raises(NotImplementedError, match="weight in float64"):
        by_op(given(2, 3, 4, 4, (2, 2), 8, dtype=torch.float64, device=device), "kernel")


def like_call(op, args):
    like = lambda t: Like(tuple(t.shape), tuple(t.stride()), t.dtype) if isinstance(t, torch.Tensor) else t  # noqa: E731
    return Call(op, tuple(map(like, args)))


@product(op=("patch_embed", "image_rows", "patch_embed_backward"), layout=("planar", "channels last"), strength=1)
def test_warm_up_cannot_check_the_kernel(op, layout, kernels, device):  # noqa: F811
    """What `vitfast.warmup` and `vitfast tune` know of the op: small calls, what is true of them, configurations."""
    dtype = torch.float16
    args = given(2, 3, 32, 48, (16, 16), 24, dtype=dtype, device=device, layout=layout)
    if op == "image_rows":
        args = (args[0], (16, 16), dtype, None, None, "hwc")
    elif op == "patch_embed_backward":
        images, weight, _, pos, prefix, mean, std = args
        grad = draw(2, 7, 24, dtype=dtype, device=device)
        args = (grad, images, weight, pos, prefix, mean, std, (True,) * 5)
    call, family = like_call(op, args), FAMILIES[op]
    place = devices.of(torch.device(device))
    configs = family.configs(call, torch.device(device))
    assert len(configs) >= {"patch_embed": 3, "patch_embed_backward": 2}.get(op, 1)
    small = family.smaller(call)
    padded = call._replace(args=tuple(
        arg._replace(shape=(2, 3, 30, 40)) if isinstance(arg, Like) and arg.shape == (2, 3, 32, 48) else arg
        for arg in call.args
    ))  # fmt: skip
    assert family.smaller(padded) == small
    pixels_of = {each.likes()[1 if op == "patch_embed_backward" else 0].dtype for each in small}
    assert pixels_of == ({dtype} if op == "image_rows" else {dtype, torch.uint8})
    for config, each in itertools.product(configs, small):
        assert check_family(family, each, config, place) == "right"


@pytest.mark.parametrize("op, launcher", [("patch_embed", "embed"), ("patch_embed_backward", "weight_gradient")])
def test_a_wrong_result_passes_the_check(op, launcher, kernels, monkeypatch, device):  # noqa: F811
    """A pixel of every image that belongs elsewhere."""
    images, weight, _, pos, prefix, mean, std = given(2, 3, 32, 48, (16, 16), 24, dtype=torch.float16, device=device)
    grad = draw(2, 7, 24, dtype=torch.float16, device=device)
    args = (images, weight, None, pos, prefix, mean, std)
    if op == "patch_embed_backward":
        args = (grad, images, weight, pos, prefix, mean, std, (False, True, False, False, False))
    call, family, real = like_call(op, args), FAMILIES[op], getattr(kernels, launcher)
    monkeypatch.setattr(kernels, launcher, lambda *args, **more: real(args[0].roll(1, -1), *args[1:], **more))
    for small in family.smaller(call):
        with pytest.raises(NotAccepted):
            check_family(family, small, None, devices.of(torch.device(device)))


CODE = [
    ((8, 0), "sm_80"), ((8, 6), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90a"), ((10, 0), "sm_100"),
    ((10, 3), "sm_100"), ((12, 0), "compute_100"), ((7, 5), ""),
]  # fmt: skip


@pytest.mark.parametrize("capability, code", CODE, ids=str)
def test_card_is_said_to_run_other_code_than_it_does(capability, code):
    """Code for 9.0a runs nowhere else, code of a generation on its later cards; others compile the newest they know."""
    archs = ["sm_80", "compute_80", "sm_90a", "sm_100", "compute_100"]
    assert code_for(capability, archs) == code
    assert code_for((9, 0), ["sm_80", "compute_80"]) == "compute_80"
    assert code_for((8, 0), ["sm_86"]) == "" == code_for((10, 0), ["sm_90a", "compute_90a"])
    assert code_for((10, 0), ["sm_90"]) == ""
    assert code_for((8, 9), ["sm_89", "sm_80", "compute_80"]) == "sm_89"


@pytest.mark.parametrize("channels_last", [False, True])
def test_whole_model_is_another_one_on_kernels(channels_last, kernels, device):  # noqa: F811
    """Class and register tokens, positions, dynamic padding, images of either layout."""
    torch.manual_seed(0)
    model = vitfast.create_model(
        "vit_tiny_patch16_224", img_size=48, depth=1, num_classes=5, reg_tokens=2, dynamic_img_size=True,
        dynamic_img_pad=True,
    ).to(device)  # fmt: skip
    images = draw(2, 3, 40, 48, device=device)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    found = {}
    for backend in ("kernel", "stock"):
        with dispatch.backend(backend, op="patch_embed"):
            found[backend] = model.embed(images)
    torch.testing.assert_close(found["kernel"], found["stock"], rtol=1e-4, atol=1e-5)


def test_pixels_are_normed_elsewhere_than_in_vit_pytorch(kernels, device):  # noqa: F811
    """LayerNorm over the pixels of a patch in the order of channels-last images, from floats and from uint8."""
    for image_dtype in (torch.float32, torch.uint8):
        images, weight, bias, pos, prefix, mean, std = given(
            2, 3, 20, 24, (8, 8), 40, dtype=torch.float32, image_dtype=image_dtype, device=device
        )
        weight = weight.permute(0, 2, 3, 1).contiguous()
        norm = draw(192, device=device), draw(192, device=device), 1e-5
        x = images.double() if mean is None else reference.normalise(images, mean, std, torch.float64)
        rows = reference.patch_rows(torch.nn.functional.pad(x, (0, 0, 0, 4)), (8, 8), "hwc")
        rows = torch.nn.functional.layer_norm(rows, (192,), norm[0].double(), norm[1].double(), 1e-5)
        patches = torch.nn.functional.linear(rows, weight.double().flatten(1), bias.double())
        expected = reference.with_prefix(patches, pos.double(), prefix.double())
        for backend in ("kernel", "stock"):
            with dispatch.backend(backend, op="patch_embed"):
                out = ops.patch_embed(
                    images, weight, bias, pos_embed=pos, prefix=prefix, mean=mean, std=std, pad=True, input_norm=norm
                )
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["kernel", "stock"])
@pytest.mark.parametrize("dtype", DTYPES[:2] if not INTERPRETED else DTYPES[:1], ids=str)
def test_prepared_model_reads_uint8_images_less_exactly_than_floats(dtype, backend, kernels, device):  # noqa: F811
    """Channels-last pixels as decoders leave them, beside what is normalised in fp32 and rounded once."""
    torch.manual_seed(0)
    model = vitfast.create_model("vit_tiny_patch16_224", img_size=48, depth=1, num_classes=5, reg_tokens=1)
    model = model.to(device, dtype).eval()
    prepared = vitfast.prepare(model, mean=(0.5, 0.4, 0.6), std=(0.2, 0.3, 0.25))
    mean, std = torch.tensor([0.5, 0.4, 0.6]).to(device), torch.tensor([0.2, 0.3, 0.25]).to(device)
    images = pixels(2, 48, 48, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    given = [t.detach().squeeze(0) for t in (model.pos_embed, torch.cat([model.cls_token, model.reg_token], 1))]
    proj = model.patch_embed.proj
    exact = exactly(images, proj.weight.detach(), proj.bias.detach(), *given, mean, std)
    low = model.embed(reference.normalise(images, mean, std, torch.float32).to(dtype)).detach()
    with dispatch.backend(backend, op="patch_embed"):
        judge(prepared.embed(images), exact, low)


@pytest.mark.parametrize("name", ["weight", "bias", "positions", "prefix", "prefix_positions", "mean", "std", "grad"])
def test_memory_beside_a_tensor_is_read(name, kernels, device):  # noqa: F811
    """A tensor shorter than the kernel takes it for, in the launcher and from a raw op; nothing is switched off."""
    how = dict(dtype=torch.float16, image_dtype=torch.uint8, device=device)
    images, weight, bias, pos, prefix, mean, std = given(2, 3, 32, 32, (16, 16), 24, **how)
    P = len(prefix)
    args = {
        "weight": weight, "bias": bias, "positions": pos[P:], "prefix": prefix, "prefix_positions": pos[:P],
        "mean": mean, "std": std,
    }  # fmt: skip
    grad = torch.randn(2, P + 4, 24, device=device).half()
    kernels.embed(images, **args, out_dtype=torch.float16)
    kernels.weight_gradient(images, weight, grad, P, mean, std, {"way": "fused"})
    for change in (lambda t: t[..., :-1].contiguous(), lambda t: t[1:], lambda t: t.to("meta"), lambda t: t[None]):
        if name in ("mean", "std") and change(mean).is_meta:
            continue  # they are moved to where the images are
        with pytest.raises(ValueError, match="patch_embed: .* must be"):
            if name == "grad":
                kernels.weight_gradient(images, weight, change(grad), P, mean, std, {"way": "fused"})
            else:
                kernels.embed(images, **{**args, name: change(args[name])}, out_dtype=torch.float16)
    with dispatch.backend("auto"), pytest.raises(ValueError, match="mean must be"):
        torch.ops.vitfast.patch_embed(images, weight, bias, pos, prefix, mean[:2], std)
    assert dispatch.state("patch_embed").startswith(("auto", "kernel"))
