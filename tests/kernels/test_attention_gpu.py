"""What only a GPU shows of the attention kernels: streams, graphs, devices, grids, sizes, and faults in memory."""

import pytest
import torch
from attention_cases import BACKWARD, check, draw, laid_out
from launches import SANITIZER, sanitized

from vitfast import ops
from vitfast.check.acceptance import accept
from vitfast.kernels.triton import attention
from vitfast.ops import _attention_stock


def both(q, k, v, grad):
    out, lse = attention.forward(q, k, v, 0.125)
    return out, lse, *attention.backward(grad, q, k, v, out, lse, 0.125)


@pytest.mark.parametrize("images", (65_536, 70_000))
def test_more_heads_than_a_grid_has_rows(images, device):
    check(torch.float16, 16, 9, 9, backward=BACKWARD["blocks"], B=images, H=1, device=device)


@pytest.mark.parametrize("B, H, N, D", ((64, 12, 197, 64), (16, 16, 729, 72), (2, 12, 577, 64)))
def test_attention_of_cudnn_leaves_another_lse(B, H, N, D, device):
    """Where it was measured to be fastest, our backward reads what it leaves."""
    q, k, v = draw(B, N, 3, H, D, dtype=torch.bfloat16, device=device).unbind(2)
    assert _attention_stock._cudnn_agrees("attention", q.device, q.dtype, D)
    found = _attention_stock.attention_cuda(q, k, v, D**-0.5, backend="cudnn")
    low = _attention_stock.attention_cuda(q, k, v, D**-0.5)
    truth = _attention_stock.attention_formula(q.double(), k.double(), v.double(), D**-0.5)
    for each, ref, theirs in zip(found, truth, low, strict=True):
        accept(each, ref, theirs)


@pytest.mark.parametrize("B, H, N, D", ((64, 12, 197, 64), (16, 16, 729, 72), (2, 12, 577, 64)))
def test_backward_of_cudnn_reads_another_lse(B, H, N, D, device):
    """Our forward's, and in a row of heads that lies in a packed projection."""
    q, k, v = draw(B, N, 3, H, D, dtype=torch.bfloat16, device=device).unbind(2)
    grad = draw(B, N, H * D, dtype=torch.bfloat16, device=device, seed=7)
    assert _attention_stock._cudnn_agrees("attention_backward", q.device, q.dtype, D)
    of_forward = attention.forward(q, k, v, D**-0.5)
    found = _attention_stock.attention_backward_cuda(grad, q, k, v, *of_forward, D**-0.5, backend="cudnn")
    low = _attention_stock.attention_backward_cuda(grad, q, k, v, *of_forward, D**-0.5)
    wide = [t.double() for t in (q, k, v)]
    truth = _attention_stock.attention_formula_backward(
        grad.double(), *wide, *_attention_stock.attention_formula(*wide, D**-0.5), D**-0.5
    )
    for each, ref, theirs in zip(found, truth, low, strict=True):
        accept(each, ref, theirs, grad=True)


@pytest.mark.parametrize("N", (197, 577))
def test_kernel_runs_before_what_its_stream_waits_for(N, device):
    q, k, v = laid_out("packed", 4, N, N, 3, 64, torch.float16, device)
    grad = draw(4, N, 192, dtype=torch.float16, device=device)
    expected, late = both(q, k, v, grad), torch.zeros_like(q)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(q)
        found = both(late, k, v, grad)
    stream.synchronize()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("N", (197, 577))
def test_replayed_graph_computes_something_else(N, device):
    qkv = draw(4, N, 3, 3, 64, dtype=torch.float16, device=device)
    grad = draw(4, N, 192, dtype=torch.float16, device=device)

    def step():
        leaf = qkv.detach().requires_grad_()
        out = ops.attention_qkv(leaf)
        return out.detach(), *torch.autograd.grad(out, leaf, grad)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        qkv.copy_(draw(*qkv.shape, dtype=torch.float16, device=device, seed=seed))
        graph.replay()
        assert all(map(torch.equal, captured, step()))


def test_replayed_graph_drops_the_same_weights_again(device):
    qkv = draw(2, 197, 3, 3, 64, dtype=torch.float16, device=device)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        ops.attention_qkv(qkv, dropout_p=0.5)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.attention_qkv(qkv, dropout_p=0.5)
    found = []
    for seed in (0, None, 0):
        if seed is not None:
            torch.manual_seed(seed)
        graph.replay()
        found.append(captured.clone())
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


@pytest.mark.alone
def test_last_of_more_than_two_to_the_31_numbers_is_another(device):
    """The last image of a whole that 32 bits do not count, against the same image alone."""
    B = (1 << 31) // (197 * 3 * 12 * 64) + 2
    qkv = torch.randn(B, 197, 3, 12, 64, dtype=torch.float16, device=device)
    grad = torch.randn(B, 197, 768, dtype=torch.float16, device=device)
    out, lse = attention.forward(*qkv.unbind(2), 0.125)
    whole = torch.empty_like(qkv)
    attention.backward(grad, *qkv.unbind(2), out, lse, 0.125, into=whole.unbind(2))
    # not so few images that another configuration is taken
    alone, last = qkv[-400:].clone(), slice(B - 400, B)
    out_alone, lse_alone = attention.forward(*alone.unbind(2), 0.125)
    packed = torch.empty_like(alone)
    attention.backward(grad[last].clone(), *alone.unbind(2), out_alone, lse_alone, 0.125, into=packed.unbind(2))
    assert torch.equal(out[last], out_alone) and torch.equal(lse[last], lse_alone)
    assert torch.equal(whole[last], packed)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one device only")
def test_kernel_runs_on_the_current_device_and_not_on_its_tensors():
    tensors = [draw(2, 197, 3, 3, 64, dtype=torch.float16, device=f"cuda:{i}") for i in range(2)]
    outs = [ops.attention_qkv(t) for t in tensors]
    assert torch.cuda.current_device() == 0 and outs[1].device.index == 1
    assert torch.equal(outs[0].cpu(), outs[1].cpu())


SANITIZED = """
import torch
from attention_cases import BACKWARD, FORWARD, PAIRS, check
for D in (64, 72):
    for forward, backward in PAIRS:
        for dtype in (torch.float16, torch.float32):
            check(dtype, D, 197, 197, forward=FORWARD[forward], backward=BACKWARD[backward], B=1, device="cuda")
"""


@pytest.mark.alone
@pytest.mark.skipif(SANITIZER is None, reason="there is no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernel_reads_beside_its_tensors_or_races(tool):
    sanitized(tool, SANITIZED)
