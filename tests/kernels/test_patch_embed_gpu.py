"""What only a GPU shows of the kernels of patch embedding: real sizes, streams, graphs, devices, faults."""

import itertools

import pytest
import torch
from attention_cases import draw
from launches import SANITIZER, sanitized
from patch_cases import DTYPES, exactly, given, judge
from test_patch_embed import by_op

from vitfast import ops
from vitfast.choose import dispatch
from vitfast.kernels.cuda import patch_embed

# B, H, patch, D
REAL = [(64, 224, 16, 768), (64, 224, 16, 384), (3, 518, 14, 1024), (32, 224, 14, 1280), (1, 224, 16, 192)]


@pytest.fixture(autouse=True)
def ieee(monkeypatch):
    """Stock products of fp32 in fp32: TF32 is no yardstick."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, H, patch, D", REAL)
def test_tokens_of_a_real_model_are_wrong(B, H, patch, D, dtype, device):
    """Every tile, with more of them than the device has multiprocessors; every way to read pixels."""
    for image_dtype, layout in itertools.product((dtype, torch.uint8), ("planar", "channels last", "offset by one")):
        args = given(B, 3, H, H, (patch, patch), D, dtype=dtype, image_dtype=image_dtype, device=device, layout=layout)
        images, weight, bias, pos, prefix, mean, std = args
        true, low = exactly(*args), by_op(args, "stock")
        for tile in patch_embed.configs(device, dtype, B * (H // patch) ** 2, D):
            out = patch_embed.embed(
                images, weight, bias, pos[1:], prefix, pos[:1], mean, std, dtype, tile.as_dict()
            )  # fmt: skip
            judge(out, true, low, dtype=dtype, what=f"{image_dtype} {layout} {tile}")


def step_of(B, device, images=None, dtype=torch.bfloat16):
    """A forward and backward whose results it returns."""
    raw, *leaves, mean, std = given(
        B, 3, 224, 224, (16, 16), 384, dtype=dtype, image_dtype=torch.uint8, device=device, layout="channels last"
    )
    images = raw if images is None else images
    cotangent = draw(B, 197, 384, dtype=dtype, device=device)

    def step():
        weight, bias, pos, prefix = (t.detach().requires_grad_() for t in leaves)
        with dispatch.backend("kernel"):
            out = ops.patch_embed(images, weight, bias, pos_embed=pos, prefix=prefix, mean=mean, std=std)
            return out.detach(), *torch.autograd.grad(out, (weight, bias, pos, prefix), cotangent)

    return step


@pytest.mark.parametrize("B", (1, 60))
def test_runs_differ(B, device):
    step = step_of(B, device)
    first = step()
    for _ in range(250):
        assert all(map(torch.equal, step(), first))


def test_kernel_runs_before_what_its_stream_waits_for(device):
    images = given(8, 3, 224, 224, (16, 16), 384, dtype=torch.bfloat16, image_dtype=torch.uint8, device=device)[0]
    late = torch.zeros_like(images)
    step = step_of(8, device, images=late)
    late.copy_(images)
    expected = step()
    late.zero_()
    step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(images)
        found = step()
    stream.synchronize()
    assert all(map(torch.equal, found, expected))


def test_replayed_graph_computes_something_else(device):
    images = given(8, 3, 224, 224, (16, 16), 384, dtype=torch.bfloat16, image_dtype=torch.uint8, device=device)[0]
    step = step_of(8, device, images=images)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        images.copy_(torch.randint_like(images, 256))
        graph.replay()
        assert all(map(torch.equal, captured, step()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one device only")
def test_kernel_runs_on_the_current_device_and_not_on_its_tensors():
    found = [step_of(2, torch.device(f"cuda:{i}"))() for i in range(2)]
    assert torch.cuda.current_device() == 0 and all(t.device.index == 1 for t in found[1])
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*found, strict=True))


@pytest.mark.alone
@pytest.mark.parametrize("layout", ["planar", "channels last"])
def test_last_of_more_than_two_to_the_31_pixels_is_another(layout, device):
    """The last images against the same images alone; tokens past 2**31 numbers too."""
    B, D, dtype = (1 << 31) // (3 * 64 * 64) + 100, 1024, torch.bfloat16
    images = torch.zeros(B, 3, 64, 64, dtype=torch.uint8, device=device)
    if layout == "channels last":
        images = images.contiguous(memory_format=torch.channels_last)
    last, weight, bias, pos, prefix, mean, std = given(
        50, 3, 64, 64, (16, 16), D, dtype=dtype, image_dtype=torch.uint8, device=device, layout=layout
    )
    images[-50:] = last
    assert B * 17 * D > 1 << 31
    for tile in patch_embed.configs(device, dtype, B * 16, D):
        how = weight, bias, pos[1:], prefix, pos[:1], mean, std, dtype, tile.as_dict()
        whole = patch_embed.embed(images, *how)
        assert torch.equal(whole[-50:], patch_embed.embed(last, *how)), tile
        del whole
    grad = torch.zeros(B, 17, D, dtype=dtype, device=device)
    grad[-50:] = draw(50, 17, D, dtype=dtype, device=device)
    found = [patch_embed.weight_gradient(i, weight, g, 1, mean, std, {"way": "fused"})
             for i, g in ((images, grad), (last, grad[-50:].clone()))]  # fmt: skip
    # split elsewhere
    torch.testing.assert_close(*found, rtol=2e-2, atol=1e-2)
    del grad
    rows = patch_embed.rows(images[:, :, :16], (16, 16), dtype, mean, std)
    assert torch.equal(rows[-200:], patch_embed.rows(last[:, :, :16], (16, 16), dtype, mean, std))


def test_kernel_that_does_not_start_leaves_an_error_to_torch(device, monkeypatch):
    monkeypatch.setattr(patch_embed, "why_not", lambda *_: [])
    wide = given(1, 60_000, 2, 2, (2, 2), 8, dtype=torch.float16, device=device)
    with pytest.raises(RuntimeError, match=r"patch_embed did not start: CUDA error \d+"):
        by_op(wide, "kernel")
    assert (torch.ones(3, device=device) + 1).sum().item() == 6
    torch.cuda.synchronize()


SANITIZED = """
import torch
from patch_cases import LAYOUTS, given
from vitfast import dispatch, ops
from vitfast.kernels import patch_embed
device = torch.device("cuda")
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    for layout in LAYOUTS:
        for image_dtype in (dtype, torch.uint8):
            for H, W, patch in ((32, 48, (16, 16)), (28, 28, (14, 14)), (9, 10, (3, 5))):
                args = given(5, 3, H, W, patch, 72, dtype=dtype, image_dtype=image_dtype, device=device, layout=layout)
                images, weight, bias, pos, prefix, mean, std = args
                for tile in patch_embed.configs(device, dtype, 30, 72):
                    patch_embed.embed(images, weight, bias, pos[1:], prefix, pos[:1], mean, std, dtype, tile.as_dict())
                patch_embed.rows(images, patch, dtype, mean, std)
                grad = torch.randn(5, 1 + len(pos[1:]), 72, device=device).to(dtype)
                for config in patch_embed.gradient_configs(device, dtype):
                    patch_embed.weight_gradient(images, weight, grad, 1, mean, std, config)
                with dispatch.backend("kernel"):
                    more = dict(prefix=prefix, mean=mean, std=std)
                    ops.patch_embed_packed([*images], weight, bias, pos_embed=[pos] * 5, **more)
                    cut = images[:, :, 1:]
                    ops.patch_embed(cut, weight, bias, pos_embed=pos, pad=True, **more)
torch.cuda.synchronize()
"""


@pytest.mark.alone
@pytest.mark.skipif(SANITIZER is None, reason="there is no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_kernel_reads_beside_its_tensors_or_races(tool):
    sanitized(tool, SANITIZED)
