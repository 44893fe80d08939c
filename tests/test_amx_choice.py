"""What runs on a CPU with AMX, which may not be this one: its feature, kernels and times are injected."""

import contextlib
import multiprocessing
import os
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from cpu_with_amx import counted, cpu, draw
from small_models import images_for, tiny
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import vitfast
from vitfast import ops
from vitfast.commands import info
from vitfast.kernels import cpu as cpu_kernels
from vitfast.kernels import extension
from vitfast.kernels.cpu import choice
from vitfast.ops import _register

UNITS = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16", torch.float32: None}
# a CPU without AVX-512 prepares no bf16
PREPARED = [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()
every_dtype = pytest.mark.parametrize("dtype", UNITS, ids=str)


@pytest.fixture(params=[False, True], ids=["without AMX", "with AMX"])
def amx(request, monkeypatch):
    """Whether torch says that the CPU has it; the kernels have not."""
    with cpu(monkeypatch, request.param, tiles=False):
        yield request.param


@pytest.fixture
def calls(monkeypatch):
    return counted(monkeypatch)


def heads(dtype):
    return [torch.randn(2, 9, 2, 16).to(dtype) for _ in range(3)]


@every_dtype
def test_attention_runs_where_stock_is_twice_as_fast(dtype, amx, calls):
    """The op, the packed op and packed sequences: ours without AMX for the dtype, torch's with it."""
    q, k, v = heads(dtype)
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    outs = [
        ops.attention(q, k, v), ops.attention(q, k, v, return_lse=True)[0],
        ops.attention_qkv(torch.stack([q, k, v], 2)),
        torch.stack([ops.attention_varlen(q[i], k[i], v[i], starts) for i in range(2)]),
    ]  # fmt: skip
    assert bool(calls) is not (amx and UNITS[dtype] is not None)
    exact = F.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
    for out in outs[:3]:
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)
    for rows in (slice(0, 4), slice(4, 9)):
        part = ops.attention(*(t[:, rows] for t in (q, k, v)))
        torch.testing.assert_close(outs[3][:, rows], part, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", PREPARED, ids=str)
def test_prepared_model_multiplies_without_amx(dtype, amx, calls):
    """Blocks in C++ kernels of AVX-512 where oneDNN and torch have AMX."""
    model = tiny().to(dtype)
    images = images_for(model).to(dtype)
    prepared = vitfast.prepare(model, dtype)
    with torch.no_grad():
        exact = tiny().double()(images.double())
    found = prepared(images)
    assert (found.double() - exact).norm() <= 0.05 * exact.norm()
    if amx and dtype is torch.bfloat16:
        assert not calls and "by=oneDNN" in str(prepared) and "by=vitfast" not in str(prepared)
    elif "by=vitfast" in str(prepared):
        assert "block" in calls
    else:
        assert "_attention" in calls


def test_table_names_a_kernel_that_does_not_run(amx):
    """`vitfast info` on such a CPU."""
    for name, found in _register.implementations().items():
        assert ("AMX" in found["cpu"].path) is (amx and name.startswith("attention"))


@torch.no_grad()
def test_process_without_permission_waits_for_stock_with_amx(monkeypatch, calls):
    """Stock operators have none there either, and without it the kernels are faster."""
    extension.require()
    with cpu(monkeypatch, amx=True, tiles=False, why_no_tiles="the system refuses them"):
        EAGER["attention"][1](draw(2, 9, 64))
        assert calls == ["_attention"]
        if torch.bfloat16 in PREPARED and cpu_kernels.kernels().name.startswith("avx512"):
            model = tiny().bfloat16()
            found = vitfast.prepare(model)
            assert ("by=vitfast" in str(found)) is cpu_kernels.multiplies(torch.bfloat16)


class Clock:
    """In place of measuring: `ratio` is how many times as fast as stock the kernels are, `asked` what was measured."""

    def __init__(self):
        self.ratio, self.asked = 2.0, []

    def __call__(self, ours, stock, args):
        ours(*args), stock(*args)
        self.asked.append(args)
        ratio = self.ratio(*args) if callable(self.ratio) else self.ratio
        return choice.Timed(1.0, ratio, ratio)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(choice, "time_both", clock)
    return clock


@pytest.fixture
def tiles(monkeypatch, clock):
    """A CPU with AMX and kernels for it, and an injected clock."""
    with cpu(monkeypatch, amx=True, tiles=True):
        yield clock


W1, W2 = draw(96, 64), draw(64, 96)
# what is called in an eager block: the kernel behind it, and the call with x [2, N, 64]
EAGER = {
    "attention": ("_attention", lambda x: ops.attention(*[x.unflatten(-1, (2, -1))] * 3)),
    "attention_qkv": ("_attention", lambda x: ops.attention_qkv(torch.stack([x.unflatten(-1, (2, -1))] * 3, 2))),
    "linear": ("linear_unpacked", lambda x: ops.linear(x, W1, act="gelu")),
    "mlp": ("linear_unpacked", lambda x: ops.mlp(x, None, None, W1, None, W2, None)),
}
every_op = pytest.mark.parametrize("op", EAGER)


def runs_kernel(op, calls, x):
    """Whether the op's kernel runs, once what had to be measured was."""
    kernel, call = EAGER[op]
    call(x)
    del calls[:]
    call(x)
    return kernel in calls


@every_op
@pytest.mark.parametrize("ratio, ours", [(2.0, True), (1.06, True), (1.04, False), (1.0, False), (0.5, False)])
@torch.no_grad()
def test_op_runs_where_the_other_way_is_faster(op, ratio, ours, tiles, calls):
    """The margin forgotten, or the choice turned round."""
    tiles.ratio = ratio
    assert runs_kernel(op, calls, draw(2, 9, 64)) is ours
    assert len(tiles.asked) == 1


@every_op
@torch.no_grad()
def test_op_is_measured_again(op, tiles):
    """Once for each power of two of tokens and number of threads, in whichever thread."""
    call = EAGER[op][1]
    for tokens in (9, 10, 9, 15):
        call(draw(2, tokens, 64))
    assert len(tiles.asked) == 1
    call(draw(2, 16, 64))
    assert len(tiles.asked) == 2
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        call(draw(2, 16, 64)), call(draw(2, 16, 64))
    finally:
        torch.set_num_threads(before)
    assert len(tiles.asked) == 3


def kinds():
    """By op calls of which each is another kind than the first, by one thing."""
    x, residual, gamma = draw(2, 9, 64), draw(2, 9, 96), draw(96)
    q, longer = draw(2, 9, 2, 32), draw(2, 40, 2, 32)
    linear = lambda x=x, weight=W1, **how: lambda: ops.linear(x, weight, **how)  # noqa: E731
    mlp = lambda w1=W1, w2=W2, **how: lambda: ops.mlp(x, None, None, w1, None, w2, None, **how)  # noqa: E731
    attention = lambda q=q, k=q: lambda: ops.attention(q, k, k)  # noqa: E731
    return {
        "linear": [
            linear(), linear(act="gelu"), linear(act="silu"), linear(norm="layer"), linear(norm="rms"),
            linear(residual=residual), linear(gamma=gamma), linear(weight=draw(48, 64)),
            linear(draw(2, 9, 32), draw(96, 32)), linear(draw(2, 16, 64)),
        ],
        "mlp": [
            mlp(), mlp(act="silu"), mlp(norm="rms"), mlp(gamma=draw(64)), mlp(draw(128, 64), draw(64, 128)),
            mlp(draw(128, 64), draw(64, 64), gated=True),
        ],
        "attention": [
            attention(), attention(k=longer), attention(draw(5, 9, 2, 32), draw(5, 9, 2, 32)),
            attention(*[draw(2, 9, 4, 32)] * 2), attention(*[draw(2, 9, 2, 16)] * 2),
        ],
    }  # fmt: skip


@pytest.mark.parametrize("op", ["linear", "mlp", "attention"])
@torch.no_grad()
def test_answer_for_one_kind_of_call_serves_another(op, tiles):
    """What is fused, widths, heads, keys: each takes another time."""
    for count, call in enumerate(kinds()[op], 1):
        call(), call()
        assert len(tiles.asked) == count, f"call {count}"


@pytest.mark.skipif(torch.bfloat16 not in PREPARED, reason="this CPU prepares no bf16")
@pytest.mark.parametrize(
    "changes", [dict(img_size=64), dict(embed_dim=96), dict(num_heads=1), dict(mlp_ratio=2.0), dict(act_layer="silu")],
    ids=str,
)  # fmt: skip
def test_answer_for_one_kind_of_block_serves_another(changes, tiles):
    vitfast.prepare(tiny().bfloat16())
    before = len(tiles.asked)
    vitfast.prepare(tiny(**changes).bfloat16())
    # a part of the block may be measured too
    assert [len(args) for args in tiles.asked[before:]].count(1) == 2


@torch.no_grad()
def test_two_threads_measure_the_same(tiles, monkeypatch):
    """Both measured: they slow each other down, and one of them may compute by another way than the other."""
    x, outs = draw(2, 9, 64), []
    monkeypatch.setattr(choice, "time_both", lambda *args: (time.sleep(0.2), tiles(*args))[1])
    # grad mode is a thread's own
    threads = [threading.Thread(target=lambda: outs.append(torch.no_grad()(EAGER["linear"][1])(x))) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(tiles.asked) == 1 and len(outs) == 4 and all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_process_waits_for_a_thread_that_it_has_not():
    held, done = threading.Event(), threading.Event()

    def hold():
        with choice._lock:
            held.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        child = multiprocessing.get_context("fork").Process(target=lambda: choice._lock.acquire())
        child.start()
        child.join(20)
        assert child.exitcode == 0
    finally:
        child.kill()
        done.set()
        holder.join()


def dual():
    stack = contextlib.ExitStack()
    stack.enter_context(forward_ad.dual_level())
    return stack


TRACED = {
    "fake tensors": FakeTensorMode, "forward mode": dual,
    "exportable": vitfast.choose.exportable.stock_operators,
}  # fmt: skip


@pytest.mark.parametrize("how", TRACED)
def test_measures_what_is_not_computed(how, tiles):
    """What was measured before holds there too."""
    ours, stock = (lambda: "ours"), (lambda: "stock")
    with TRACED[how]():
        assert choice.faster_of("it", (1,), ours, stock) is stock and not tiles.asked
    assert choice.faster_of("it", (1,), ours, stock) is ours and len(tiles.asked) == 1
    with TRACED[how]():
        assert choice.faster_of("it", (1,), ours, stock) is ours


@every_op
@torch.no_grad()
def test_tracing_measures(op, tiles):
    """By torch.compile, torch.export, torch.jit.trace, torch.func, of meta and fake tensors; a compiled graph's first
    run may."""
    call, x = EAGER[op][1], draw(2, 9, 64)

    class Model(torch.nn.Module):
        def forward(self, x):
            return call(x)

    torch.export.export(Model(), (x,))
    torch.jit.trace(call, x, check_trace=False)
    torch.func.vmap(call)(x.unsqueeze(0))
    if op.startswith("attention"):
        # others have weights on the CPU
        call(x.to("meta")), call(FakeTensorMode().from_tensor(x))
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(call, backend=lambda graph, _: graphs.append(len(tiles.asked)) or graph, fullgraph=True)
    compiled(x)
    assert graphs == [0] and len(tiles.asked) == 1
    assert all(type(t) is torch.Tensor for t in tiles.asked[0] if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("op", ["linear", "mlp"])
@pytest.mark.parametrize("how", ["training", "fp32", "width in no tiles", "strided weight"])
def test_op_takes_what_the_kernel_does_not(op, how, tiles, calls):
    dtype, K = torch.float32 if "fp32" in how else torch.bfloat16, 40 if how == "width in no tiles" else 64
    w1, w2, x = draw(96, K, dtype=dtype), draw(K, 96, dtype=dtype), draw(2, 9, K, dtype=dtype)
    if how == "strided weight":
        w1 = w1.t().contiguous().t()
    w1.requires_grad_(how == "training")
    out = ops.mlp(x, None, None, w1, None, w2, None) if op == "mlp" else ops.linear(x, w1, norm="layer")
    if how == "training":
        out.float().sum().backward()
    assert not tiles.asked and "linear_unpacked" not in calls


@torch.no_grad()
def test_failing_kernel_is_replaced_in_silence(tiles, monkeypatch):
    """While it is measured and after; and what failed is not taken for measured."""

    def fails(*args, **kwargs):
        raise RuntimeError("broken")

    x, call = draw(2, 9, 64), EAGER["linear"][1]
    with monkeypatch.context() as patch:
        patch.setattr(cpu_kernels, "linear_unpacked", fails)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="broken"):
                call(x)
        assert not choice._timed
    call(x)
    monkeypatch.setattr(cpu_kernels, "linear_unpacked", fails)
    with pytest.raises(RuntimeError, match="broken"):
        call(x)


@pytest.mark.parametrize("isa", choice.TILES)
@pytest.mark.parametrize("amx_is_there", [False, True])
@torch.no_grad()
def test_kernels_that_were_asked_for_are_measured(isa, amx_is_there, monkeypatch, clock, calls):
    """VITFAST_CPU_ISA means them, also where they are slower."""
    clock.ratio = 0.1
    with cpu(monkeypatch, amx_is_there, tiles=True, VITFAST_CPU_ISA=isa):
        for op in EAGER:
            assert runs_kernel(op, calls, draw(2, 9, 64))
        if torch.bfloat16 in PREPARED:
            model = tiny().bfloat16()
            prepared = vitfast.prepare(model)
            del calls[:]
            prepared(images_for(model).bfloat16())
            assert "by=oneDNN" not in str(prepared) and {"block", "embed"} <= {*calls}
        assert not clock.asked


@torch.no_grad()
def test_other_instruction_sets_are_measured(amx, clock):
    for op in EAGER:
        EAGER[op][1](draw(2, 9, 64))
    if torch.bfloat16 in PREPARED:
        model = tiny().bfloat16()
        vitfast.prepare(model)(images_for(model).bfloat16())
    assert not clock.asked and not cpu_kernels.measured()


# by the number of images how many times as fast the kernels are
BLOCKS = {
    "faster": (lambda images: 2.0, True), "slower": (lambda images: 0.5, False), "equal": (lambda images: 1.0, False),
    "slower with one": (lambda images: 0.9 if images == 1 else 3.0, False),
    "slower with many": (lambda images: 3.0 if images == 1 else 0.9, False),
}  # fmt: skip


@pytest.mark.skipif(torch.bfloat16 not in PREPARED, reason="this CPU prepares no bf16")
@pytest.mark.parametrize("case", BLOCKS)
@torch.no_grad()
def test_prepared_blocks_are_the_slower_ones(case, tiles, calls):
    """A choice of all the packed weights by the time of a whole block, once a process."""
    ratio, ours = BLOCKS[case]
    tiles.ratio = lambda first, *others: 1.0 if others else ratio(first)
    model = tiny().bfloat16()
    state = torch.get_rng_state()
    prepared = vitfast.prepare(model)
    assert torch.equal(torch.get_rng_state(), state)
    asked = [args[0] for args in tiles.asked if len(args) == 1]
    assert asked == ([1] if not ours and case != "slower with many" else [1, 8])
    assert ("by=vitfast" in str(prepared)) is ours and ("by=oneDNN" in str(prepared)) is not ours
    del calls[:]
    found = prepared(images_for(model).bfloat16())
    assert ("block" in calls) is ours is ("embed" in calls)
    exact = tiny().double()(images_for(model).bfloat16().double())
    assert found.shape == exact.shape
    before = len(tiles.asked)
    vitfast.prepare(model), vitfast.prepare(tiny().bfloat16())
    assert len(tiles.asked) == before
    # another kind of block is another question
    vitfast.prepare(tiny(num_heads=1).bfloat16())
    assert len(tiles.asked) > before
    # and fp32 none
    before = len(tiles.asked)
    vitfast.prepare(tiny())
    assert len(tiles.asked) == before


@pytest.mark.skipif(torch.bfloat16 not in PREPARED, reason="this CPU prepares no bf16")
@pytest.mark.parametrize(
    "changes", [dict(norm_layer="rmsnorm"), dict(scale_attn_norm=True), dict(scale_mlp_norm=True)], ids=str
)
def test_answer_for_whole_blocks_serves_blocks_in_parts(changes, tiles):
    """A norm that one call for all of a block does not compute makes it several, of another time."""
    vitfast.prepare(tiny().bfloat16())
    before = len(tiles.asked)
    assert vitfast.prepare(tiny(**changes).bfloat16()).blocks[0].whole is None
    assert len(tiles.asked) == before + 2


@pytest.mark.skipif(torch.bfloat16 not in PREPARED, reason="this CPU prepares no bf16")
def test_prepare_takes_longer_for_large_images(tiles):
    """Many tokens are timed as one image."""
    vitfast.prepare(tiny(img_size=640).bfloat16())
    assert {args[0] for args in tiles.asked if len(args) == 1} == {1}


def test_explain_and_info_say_nothing_of_what_was_measured(tiles):
    model = tiny().bfloat16()
    with torch.no_grad():
        model(images_for(model).bfloat16())
    notes = [note for note in vitfast.explain(model).notes if note.startswith("measured on this CPU: ")]
    assert len(notes) == len(tiles.asked) == len(choice._timed) > 1
    assert all("amx_bf16 (vitfast 1 ms, stock 2 ms)" in note for note in notes)
    assert all(any(f": {op} " in note for note in notes) for op in ("attention", "mlp", "linear"))
    N, D = model.config.num_patches + model.config.num_prefix_tokens, model.embed_dim
    timed = f"linear bfloat16 bfloat16 layer none {(len(images_for(model)), N, D)} {(3 * D, D)}, "
    assert any(f": {timed}" in note for note in notes), notes
    told = {op: kinds["cpu"]["runs_as"] for op, kinds in info.collect()["ops"].items()}
    assert {op for op, words in told.items() if "by measurement in each process" in words} == {
        "attention", "attention_qkv", "attention_varlen", "linear", "mlp",
    }  # fmt: skip


def test_the_faster_one_is_measured_as_the_slower():
    """The real clock, and that it takes no longer than a user waits."""
    slow, fast = (lambda seconds: time.sleep(seconds)), (lambda seconds: None)
    began = time.perf_counter()
    assert choice.time_both(fast, slow, (0.005,)).ours and not choice.time_both(slow, fast, (0.005,)).ours
    assert not choice.time_both(slow, slow, (0.005,)).ours
    assert time.perf_counter() - began < 2
