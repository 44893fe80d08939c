"""What only a GPU shows of the kernels of norms, linear layers and MLPs: real sizes, streams, graphs, faults."""

import pytest
import torch
from attention_cases import draw, every_dtype
from launches import SANITIZER, sanitized
from linear_cases import (
    MECHANISMS,
    all_of_a_block,
    check_forward,
    check_mlp,
    grouped,
    judge,
    last_rows_alone,
    layer,
    mlp_layer,
)

from vitfast import ops
from vitfast.choose import config_tables
from vitfast.kernels.triton import linear
from vitfast.kernels.triton.launch import architecture

WIDTHS = (384, 768, 1024, 1280)


@every_dtype
@pytest.mark.parametrize("D", WIDTHS)
def test_layer_of_a_real_model_is_wrong(D, dtype, device):
    """The four products of a block as the table computes them, at sizes at which programs take tiles in turn."""
    how = {"gamma": True, "row_scale": True, "residual": "same"}
    for K, N, around in (
        (D, 3 * D, {"norm": "layer"}), (D, D, how), (D, 4 * D, {"norm": "layer", "act": "gelu"}), (4 * D, D, how),
    ):  # fmt: skip
        given = layer(24, 197, K, N, dtype, device, **around)
        config = linear.config_for(given["x"], given["weight"])
        check_forward(config, given, saves=True, what=f"{config} {around}", as_it_is=True)


@every_dtype
@pytest.mark.parametrize("B", (1, 8, 64))
def test_gradient_of_a_real_mlp_is_wrong(B, dtype, device):
    check_mlp(None, dtype, device, "act", size=(B, 197, 384, 1536), gamma=True, row_scale=True)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_configuration_of_this_device_is_wrong(dtype, device):
    """Each with as many tiles as fill the device more than once, and with a few."""
    for M in (16, 197, 128 * 197):
        given = layer(1, M, 768, 768, dtype, device, norm="layer", act="gelu", residual="same")
        for config in config_tables.product_candidates(architecture(device), 16, M, 768, 768, 132, True):
            check_forward(config, given, saves=True, what=f"{config}, {M} rows", as_it_is=True)


@pytest.mark.alone
@pytest.mark.parametrize("D", (768, 1024))
def test_last_of_more_than_two_to_the_31_numbers_is_another(D, device):
    """Rows past 2**31 numbers against the same rows alone, in every kernel of an MLP and its backward."""
    last_rows_alone((1 << 31) // D + 300, D, torch.bfloat16, device, alone=40_000)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_runs_differ(mechanism, device):
    """Programs that share a tile arrive in another order each time."""
    config = MECHANISMS[mechanism]
    for B in (1, 30):
        given = layer(B, 197, 768, 384, torch.float16, device, norm="layer", act="gelu", residual="same")
        first = linear.forward(*grouped(given), True, config=config)
        for _ in range(250):
            again = linear.forward(*grouped(given), True, config=config)
            assert torch.equal(again[0], first[0]) and torch.equal(again[3], first[3])


@pytest.mark.parametrize("B", (1, 30))
def test_gradients_of_two_runs_differ(B, device):
    step = all_of_a_block(B, 197, 384, torch.bfloat16, device)
    first = step()
    for _ in range(250):
        assert all(map(torch.equal, step(), first))


@pytest.mark.parametrize("B", (1, 8))
def test_kernel_runs_before_what_its_stream_waits_for(B, device):
    x = draw(B, 197, 384, dtype=torch.bfloat16, device=device, seed=5)
    late = torch.zeros_like(x)
    step = all_of_a_block(B, 197, 384, torch.bfloat16, device, x=late)
    late.copy_(x)
    expected = step()
    late.zero_()
    step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        found = step()
    stream.synchronize()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("B", (1, 8))
def test_replayed_graph_computes_something_else(B, device):
    """Counters of split sums are zeroed in the graph, and not only when it is captured."""
    x = draw(B, 197, 384, dtype=torch.bfloat16, device=device)
    step = all_of_a_block(B, 197, 384, torch.bfloat16, device, x=x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2, 3):
        x.copy_(draw(*x.shape, dtype=x.dtype, device=device, seed=seed))
        graph.replay()
        assert all(map(torch.equal, captured, step()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one device only")
def test_kernel_runs_on_the_current_device_and_not_on_its_tensors():
    found = [all_of_a_block(2, 197, 384, torch.bfloat16, torch.device(f"cuda:{i}"))() for i in range(2)]
    assert torch.cuda.current_device() == 0 and all(t.device.index == 1 for t in found[1])
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*found, strict=True))


def test_aligned_call_before_one_that_is_not_leaves_its_compilation_behind(device):
    """Aligned, from the second number on, aligned again: by the same shape."""
    tensors, others = mlp_layer(4, 197, 384, 1536, torch.bfloat16, device)
    whole = torch.empty(4 * 197 * 384 + 1, dtype=torch.bfloat16, device=device)
    shifted = whole[1:].view(4, 197, 384)
    shifted.copy_(tensors["x"])
    first = ops.mlp(**tensors, **others)
    second = ops.mlp(**tensors | {"x": shifted}, **others)
    assert torch.equal(ops.mlp(**tensors, **others), first)
    judge(second, first.double(), first, what="shifted")


SANITIZED = """
import torch
from linear_cases import MECHANISMS, all_of_a_block, check_forward, check_mlp, layer
for mechanism in MECHANISMS.values():
    for dtype in (torch.float16, torch.float32):
        for K, N in ((192, 72), (72, 197)):
            given = layer(2, 67, K, N, dtype, "cuda", norm="layer", act="gelu", residual="same")
            check_forward(mechanism, given, saves=True)
    check_mlp(mechanism, torch.float16, "cuda", "act", size=(2, 67, 72, 160), gamma=True, row_scale=True)
all_of_a_block(2, 67, 192, torch.bfloat16, "cuda")()
"""


@pytest.mark.alone
@pytest.mark.skipif(SANITIZER is None, reason="there is no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernel_reads_beside_its_tensors_or_races(tool):
    sanitized(tool, SANITIZED)
