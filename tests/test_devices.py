"""Whole models on every device of the machine: values and gradients next to timm's, repeats, compilation, graphs."""

import copy

import pytest
import torch
from timm_pair import build_pair, pair_of, run

from vitfast.check.acceptance import accept_model, accept_stages

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
# on a CPU tests/test_parity_timm.py has all of them
FAMILIES = ["vit", "dinov2_reg4", "deit3", "siglip_gap", "huge", "qk_norm"] if torch.cuda.is_available() else ["vit"]


def on(device, dtype, *models):
    return [copy.deepcopy(model).to(device, dtype) for model in models]


@every_dtype
@pytest.mark.parametrize("family", FAMILIES)
def test_model_is_less_exact_than_timms(family, dtype, device):
    """A head dim, a length or a width that the device's implementation gets wrong, or rounds once more."""
    theirs, ours, images = build_pair(family, batch=8, massive=False)
    ref, grads_ref = run(theirs.double(), images.double())
    low, grads_low = run(*on(device, dtype, theirs), images.to(device, dtype))
    out, grads = run(*on(device, dtype, ours), images.to(device, dtype))
    accept_model(out, ref.to(device), low)
    watched = [name for name in grads_ref if name.endswith(("qkv.weight", "fc1.weight", "patch_embed.proj.weight"))]
    assert watched
    picked = [{name: each[name] for name in watched} for each in (grads, grads_ref, grads_low)]
    accept_stages(picked[0], {name: g.to(device) for name, g in picked[1].items()}, picked[2], typical=2.0)


@pytest.mark.full
def test_large_model_in_bf16_is_less_exact_than_timms(device):
    """Twelve blocks at 197 tokens: what small ones hide."""
    theirs, ours, images = pair_of("vit_base_patch16_224", 4, massive=False, depth=12, num_classes=100)
    with torch.no_grad():
        ref = theirs.eval().to(device).double()(images.to(device).double())
        low, out = (m.eval()(images.to(device).bfloat16()) for m in on(device, torch.bfloat16, theirs, ours))
    accept_model(out, ref, low)


def test_second_run_differs(device):
    """Atomics, or scratch memory that is read before it is written."""
    _, ours, images = build_pair("vit", batch=4)
    (model,) = on(device, torch.bfloat16, ours)
    first, grads = run(model, images.to(device).bfloat16())
    second, again = run(model, images.to(device).bfloat16())
    assert torch.equal(first, second)
    assert all(torch.equal(grads[name], again[name]) for name in grads)


def test_autocast_is_less_exact_than_timms(device):
    theirs, ours, images = build_pair("vit", batch=8, massive=False)
    with torch.no_grad():
        ref = theirs.eval().to(device).double()(images.to(device).double())
        models = on(device, torch.float32, theirs.float(), ours)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            low, out = (model.eval()(images.to(device)) for model in models)
    accept_model(out, ref, low)


# a CPU has neither graphs nor streams, so there these are no tests
if torch.cuda.is_available():

    @pytest.mark.gpu
    def test_graph_replays_something_else():
        """A kernel on another stream than the capturing one, a size or seed frozen at capture."""
        _, ours, images = build_pair("vit", batch=4)
        (model,) = on("cuda", torch.bfloat16, ours)
        still, model = images.cuda().bfloat16(), model.eval()
        with torch.inference_mode():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                model(still)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = model(still)
            for seed in (1, 2):
                torch.manual_seed(seed)
                still.copy_(torch.randn_like(still))
                graph.replay()
                torch.testing.assert_close(captured, model(still), rtol=0, atol=0)

    @pytest.mark.gpu
    def test_work_does_not_wait_for_its_stream():
        """A launch on the default stream, or on none."""
        _, ours, images = build_pair("vit", batch=4)
        (model,) = on("cuda", torch.bfloat16, ours)
        images = images.cuda().bfloat16()
        with torch.inference_mode():
            expected = model.eval()(images)
            stream, late = torch.cuda.Stream(), torch.zeros_like(images)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(50_000_000)
                late.copy_(images)
                out = model(late)
            stream.synchronize()
        assert torch.equal(out, expected)
