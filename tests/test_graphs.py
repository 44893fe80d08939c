"""CUDA graphs of prepared models, on a device that only pretends: `tests/fake_graphs.py`."""

import contextlib
import gc
import threading
import weakref

import pytest
import torch
from fake_graphs import Pair, on_cpu
from small_models import images_for, tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vitfast
from vitfast.choose import dispatch
from vitfast.inference import arguments, graphs, prepare
from vitfast.inference.graphs import bucket


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """The devices of the models that a test prepares, in their order."""
    with on_cpu(monkeypatch) as made:
        yield made
        # what a test has put over the pretended device goes first: undone later it would put that device back
        monkeypatch.undo()


def test_batch_is_padded_by_more_than_a_fifth_or_cut():
    found = [bucket(n) for n in range(1, 2000)]
    assert all(n <= b and (b - n) / b <= 0.2 and bucket(b) == b for n, b in enumerate(found, 1))
    assert sorted(set(found))[:16] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32] and bucket(256) == 256


def test_same_kind_of_call_is_captured_twice_or_another_replayed():
    pair = Pair(tiny(dynamic_img_size=True), mean=(0.5, 0.4, 0.6), std=(0.2, 0.3, 0.25))
    x = pair.images(9)
    for _ in range(3):
        pair.check(x)
    pair.check(pair.images(10))
    assert pair.device.count("capture") == 1 and pair.device.count("replay") == 4
    others = [
        (pair.images(12), "forward"), (x, "forward_features"), (pair.images(9, (48, 32)), "forward"),
        (x.to(memory_format=torch.channels_last), "forward"),
        (torch.randint(256, x.shape, dtype=torch.uint8), "forward"),
    ]  # fmt: skip
    for i, (images, method) in enumerate(others):
        pair.check(images, method)
        pair.check(images, method)
        assert pair.device.count("capture") == 2 + i
    assert len(pair.prepared.graph_report().graphs) == 6 and "graphs=6" in str(pair.prepared)
    assert pair.prepared.graph_report().eager == {}


@pytest.mark.parametrize("convert", [torch.Tensor.double, torch.Tensor.half, lambda x: x[:, :, ::2, ::2]])
def test_images_of_another_dtype_or_stride_are_misread(convert):
    pair = Pair(tiny(img_size=16))
    x = convert(pair.images(3, (32, 32)) if "lambda" in convert.__name__ else pair.images(3))
    for _ in range(2):
        assert torch.equal(pair.prepared(x), pair.expected(x.float().contiguous()))
    assert pair.device.count("capture") == 1


def test_rows_of_an_earlier_call_reach_a_padded_one():
    pair = Pair()
    pair.check(pair.images(10))
    pair.prepared(torch.full((10, 3, 32, 32), torch.nan))
    pair.check(pair.images(9))
    pair.check(pair.images(9))
    assert pair.device.count("capture") == 1


def test_views_are_copies_or_unasked_for():
    pair = Pair(views=True)
    x, y = pair.images(2), pair.images(2)
    first = pair.prepared(x)
    assert torch.equal(first, pair.expected(x))
    second = pair.prepared(y)
    assert first.data_ptr() == second.data_ptr() and torch.equal(first, pair.expected(y))
    other = Pair().prepared
    assert other(x).data_ptr() != other(x).data_ptr()


def test_more_graphs_than_allowed_are_kept_or_the_wrong_ones_dropped():
    pair = Pair()
    pair.prepared.graphs.most_graphs = 2
    for n in (1, 2, 1, 3):
        pair.check(pair.images(n))
    assert list(pair.prepared.graph_report().graphs) == [f"forward [{n}, 3, 32, 32] float32" for n in (1, 3)]
    pair.check(pair.images(2))
    assert pair.device.count("capture") == 4 and "forward [1" not in str(pair.prepared.graph_report())
    # sizes that take turns must not be captured at every call
    for _ in range(3):
        for n in (1, 2, 3):
            pair.check(pair.images(n), padded=False)
    assert pair.device.count("capture") == 6
    assert "captured before and dropped" in str(pair.prepared.graph_report().refused)


def test_graphs_hold_more_memory_than_allowed():
    pair = Pair()
    pair.check(pair.images(4))
    one = pair.prepared.graph_report().bytes
    pair.prepared.graphs.most_bytes = int(one * 1.3)
    for n in (3, 2, 1):
        pair.check(pair.images(n))
        assert pair.prepared.graph_report().bytes <= one * 1.3
    assert len(pair.prepared.graph_report().graphs) >= 2
    pair.check(pair.images(5))
    report = pair.prepared.graph_report()
    assert list(report.graphs) == ["forward [5, 3, 32, 32] float32"] and report.bytes <= one * 1.3
    # alone it is too much
    pair.check(pair.images(16), padded=False)
    pair.check(pair.images(16), padded=False)
    report = pair.prepared.graph_report()
    assert report.bytes == 0 and not report.graphs and "more than" in report.refused["forward [16, 3, 32, 32] float32"]
    assert report.eager == {next(iter(report.refused.values())): 1}
    pair.check(pair.images(1))


def test_images_memory_is_not_shared_or_shared_by_other_images():
    """Graphs that differ in the number of images read the same memory, captured from the largest down."""
    pair = Pair()
    pair.prepared.capture((1, 4, 2))
    buffers = [pair.prepared.input_buffer(n) for n in (1, 2, 4)]
    assert len({b.data_ptr() for b in buffers}) == 1 and [len(b) for b in buffers] == [1, 2, 4]
    assert pair.device.count("capture") == 3
    others = [pair.prepared.input_buffer(1, channels_last=True), pair.prepared.input_buffer(1, features=True)]
    assert others[0].data_ptr() != buffers[0].data_ptr() == others[1].data_ptr()
    assert others[0].stride() == (3072, 1, 96, 3) and buffers[0].stride() == (3072, 1024, 32, 1)


def test_buffer_is_copied_or_what_overlaps_it_is_misread():
    pair = Pair()
    buffer = pair.prepared.input_buffer(3)
    x = pair.images(3)
    buffer.copy_(x)
    version = buffer._version
    assert torch.equal(pair.prepared(buffer), pair.expected(x))
    assert torch.equal(pair.prepared(buffer[:3]), pair.expected(x)) and buffer._version == version
    # captured when the caller's images are there, and before
    for capture in ((), (4, 3, 2)):
        pair.prepared.drop_graphs()
        pair.prepared.capture(capture)
        buffer, y = pair.prepared.input_buffer(4), pair.images(4)
        for part in (lambda t: t[1:4], lambda t: t[::2], lambda t: t[:3], lambda t: t[:3].transpose(2, 3)):
            buffer.copy_(y)
            assert torch.equal(pair.prepared(part(buffer)), pair.expected(part(y).contiguous()))
    assert pair.prepared.input_buffer(2, (32, 32), torch.float64).dtype is torch.float32


@pytest.mark.parametrize("most", [3, 32])
def test_threads_see_one_another(most):
    """Sizes that are captured, replayed and dropped while others call: every result is the caller's own."""
    pair = Pair(tiny(depth=1))
    pair.prepared.graphs.most_graphs = most
    given = [(x, pair.expected(x), pair.expected(x, padded=False)) for n in range(1, 9) for x in [pair.images(n)]]
    wrong, start = [], threading.Barrier(8)

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        start.wait()
        for _ in range(25):
            x, expected, alone = given[torch.randint(8, (), generator=generator)]
            try:
                result = pair.prepared(x)
            except BaseException as problem:
                wrong.append(problem)
                return
            threading.Event().wait(0)
            if not (torch.equal(result, expected) or torch.equal(result, alone)):
                wrong.append(len(x))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    captures, replays = pair.device.count("capture"), pair.device.count("replay")
    assert (captures, replays) == (8, 200) if most == 32 else 8 < captures <= 16 and replays < 200


def test_graph_is_replayed_into_the_callers_own():
    pair = Pair()
    x = pair.images(2)
    pair.check(x)
    log = len(pair.device.log)
    pair.device.captured_by_caller = True
    pair.check(x, padded=False)
    with pytest.raises(RuntimeError, match="captured by the caller"):
        pair.prepared.capture(2)
    assert len(pair.device.log) == log
    pair.device.captured_by_caller = False
    pair.check(x)
    assert "captured by the caller" in str(vitfast.explain(pair.prepared))


FAILURES = [
    RuntimeError("operation not permitted"),
    torch.OutOfMemoryError("CUDA out of memory. Tried"),
    MemoryError("host memory"),
]


@pytest.mark.parametrize("problem", FAILURES, ids=lambda problem: type(problem).__name__)
def test_failed_capture_ends_the_call_or_is_tried_again(problem):
    pair = Pair()
    pair.check(pair.images(4))
    pair.device.fails = problem
    for _ in range(3):
        pair.check(pair.images(2), padded=False)
    assert pair.device.count("failed") == 1
    report = pair.prepared.graph_report()
    why = str(problem).split("\n")[0]
    assert why in report.refused["forward [2, 3, 32, 32] float32"] and why in str(vitfast.explain(pair.prepared))
    # what the pool has grown by is given back, if not otherwise then with the other graphs
    assert len(report.graphs) == (not isinstance(problem, torch.OutOfMemoryError))
    pair.check(pair.images(4))
    with pytest.raises(RuntimeError, match=why):
        pair.prepared.capture(2)
    pair.prepared.drop_graphs()
    pair.check(pair.images(2))
    assert pair.device.count("capture") == 3 - len(report.graphs)


def test_failed_capture_keeps_memory():
    pair = Pair()
    pair.device.fails = torch.OutOfMemoryError("CUDA out of memory")
    there = []
    features = type(pair.prepared)._features

    def watched(self, x, *rest, **how):
        there.append(weakref.ref(x))
        return features(self, x, *rest, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pair.prepared), "_features", watched)
        pair.prepared(pair.images(2))
    assert len(there) == 4 and pair.device.log[-1] == "renew" and pair.prepared.graph_report().bytes == 0
    assert not any(ref() is not None for ref in there)


class Waits(nn.Module):
    def forward(self, x):
        return x * (2.0 if x.sum().item() else 1.0)


class Centred(nn.Module):
    """Reads all images of a batch."""

    def forward(self, x):
        return x - x.mean(0)


def test_part_that_needs_its_python_or_all_images_is_captured():
    for part, why in ((Waits(), "operation not permitted"), (Centred(), None)):
        model = tiny()
        model.head = nn.Sequential(model.head, part).eval()
        x = images_for(model, 9)
        pair = Pair(model)
        pair.check(x, padded=False)
        assert pair.device.log == [] and type(part).__name__ in str(pair.prepared.graph_report())
        # each number of images has its own graph where somebody insists
        pair = Pair(model, graphs=True)
        pair.check(x, padded=False)
        pair.check(x, padded=False)
        assert pair.device.count("capture") == (why is None)
        report = str(pair.prepared.graph_report())
        assert (why is None or why in report) and "[10" not in report


def test_choice_is_changed_and_the_graph_stays():
    pair = Pair()
    x = pair.images(2)
    pair.check(x)
    with vitfast.backend("stock"):
        pair.check(x)
        assert pair.device.count("capture") == 2
    pair.check(x)
    assert pair.device.count("capture") == 2
    dispatch.learn("nowhere", {})
    pair.check(x)
    assert pair.device.count("capture") == 3
    with dispatch.watching():
        pair.check(x, padded=False)
    torch.set_float32_matmul_precision("high")
    try:
        pair.check(x)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert pair.device.count("capture") == 4


def test_choice_that_falls_in_a_warm_up_is_taken_for_that_before():
    """As a kernel that is switched off when it is first compiled for the graph's batch."""
    pair, learned = Pair(), []
    x = pair.images(9)
    features = type(pair.prepared)._features

    def learns(self, x, *rest, **how):
        if len(x) == 10 and not learned:
            learned.append(dispatch.learn("nowhere", {}))
        return features(self, x, *rest, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pair.prepared), "_features", learns)
        pair.check(x, padded=False)
    assert learned and not pair.prepared.graph_report().graphs
    pair.check(x)
    assert list(pair.prepared.graph_report().graphs.values()) == [1]


def test_original_is_changed_and_the_graph_stays():
    pair = Pair()
    x = pair.images(2)
    pair.check(x)
    with torch.no_grad():
        pair.model.blocks[0].mlp.fc1.weight.mul_(2)
    for call in (pair.prepared, pair.prepared.forward_features, lambda _: pair.prepared.capture(2)):
        with pytest.raises(RuntimeError, match="was written to"):
            call(x)


CHANGES = {
    "a head": lambda m: setattr(m, "head", nn.Linear(192, 7).requires_grad_(False)),
    "weights": lambda m: setattr(m.head.weight, "data", torch.randn(10, 192)),
    "pooling": lambda m: (setattr(m, "_keep", None), setattr(m, "global_pool", "avg")),
    "a part": lambda m: setattr(m, "fc_norm", nn.LayerNorm(192).requires_grad_(False)),
    "numbers": lambda m: m.head.weight.mul_(2),
}


@pytest.mark.parametrize("what", CHANGES)
@torch.no_grad()
def test_part_of_the_prepared_model_is_replaced_and_the_graph_stays(what):
    pair = Pair()
    x = pair.images(2)
    pair.check(x)
    pair.held.clear()
    torch.manual_seed(1)
    CHANGES[what](pair.prepared)
    torch.manual_seed(1)
    CHANGES[what](pair.eager)
    pair.check(x)
    pair.check(x)
    assert pair.device.count("capture") == (1 if what == "numbers" else 2)


@pytest.mark.parametrize("part", ["blocks.0", "norm", "head"])
def test_hook_is_not_called(part):
    pair, seen = Pair(), []
    x = pair.images(2)
    pair.check(x)
    handle = pair.prepared.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    pair.prepared.forward_features(x) if part == "blocks.0" else pair.prepared(x)
    assert seen == [1]
    assert "have hooks" in str(pair.prepared.graph_report())
    handle.remove()
    pair.check(x)
    assert pair.device.count("capture") == 1


def test_who_watches_operators_sees_none():
    pair = Pair()
    x = pair.images(2)
    pair.check(x)
    with FlopCounterMode(display=False) as counter:
        pair.prepared(x)
    assert counter.get_total_flops() > 0


def test_masks_are_left_out():
    pair = Pair()
    x = pair.images(2)
    pair.check(x)
    with pytest.warns(UserWarning, match="attn_mask"):
        for how in ({"is_causal": True}, {"attn_mask": torch.eye(5, dtype=torch.bool)}):
            for method in ("forward", "forward_features"):
                found = [getattr(m, method)(x, **how) for m in (pair.prepared, pair.eager)]
                assert torch.equal(*found)
    assert pair.prepared.graph_report().eager == {"attn_mask or is_causal": 4} and pair.device.count("capture") == 1


def test_other_methods_are_captured():
    pair = Pair()
    x = pair.images(2)
    pair.prepared.forward_intermediates(x)
    pair.prepared.intermediates(x)
    pair.prepared.forward_head(pair.prepared.forward_features(x))
    assert list(pair.prepared.graph_report().graphs) == ["forward_features [2, 3, 32, 32] float32"]


CONTEXTS = {
    "inference": torch.inference_mode, "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no grad": torch.no_grad, "none": contextlib.nullcontext,
}  # fmt: skip


@pytest.mark.parametrize("first", CONTEXTS)
def test_context_of_the_first_call_is_that_of_the_others(first):
    pair = Pair()
    x = pair.images(2)
    expected = pair.expected(x)
    for context in (first, *CONTEXTS):
        with CONTEXTS[context]():
            result = pair.prepared(x)
            assert torch.equal(result, expected) and not result.requires_grad
            assert result.is_inference() == (context == "inference")
    pair.prepared.input_buffer(2).copy_(x)
    assert pair.device.count("capture") == 1
    (nn.Linear(10, 2)(pair.prepared(x)).sum()).backward()


def test_wrong_images_are_captured_or_named_otherwise():
    pair = Pair()
    for images, error, said in (
        (torch.zeros(9, 3, 30, 30), ValueError, r"30"), (torch.zeros(9, 1, 32, 32), ValueError, r"\[9, 1, 32, 32\]"),
        (torch.zeros(9, 3, 32, 32, dtype=torch.int64), TypeError, "floating point"), ([1], TypeError, "list"),
        (torch.zeros(9, 3, 32, 32, dtype=torch.uint8), ValueError, "mean and std"),
    ):  # fmt: skip
        if images is not None and pair.prepared.normalisation is not None and "mean" in said:
            pair.prepared.normalisation = None
        for _ in range(2):
            with pytest.raises(error, match=said):
                pair.prepared(images)
    assert pair.device.log == []
    assert pair.prepared(torch.zeros(0, 3, 32, 32)).shape == (0, 10)
    pair.prepared.graphs.largest_batch = 4
    pair.check(pair.images(5), padded=False)
    assert "more than 4 images" in str(pair.prepared.graph_report()) and pair.device.log == []


def test_positions_are_dropped_that_a_graph_reads(monkeypatch):
    """More sizes than positions are kept for; and none that were computed inside a capture, which hold nothing."""
    monkeypatch.setattr(prepare, "KEPT_GRIDS", 1)
    pair = Pair(tiny(dynamic_img_size=True))
    sizes = [(32, 32), (48, 32), (32, 48), (16, 64)]
    given = [pair.images(2, size) for size in sizes]
    for x in given + given:
        pair.check(x)
        torch.randn(4, 300, 192).fill_(torch.nan)
    assert pair.device.count("capture") == 4
    there = dict(pair.prepared._positions_of)
    monkeypatch.setattr(prepare, "capturing", lambda device: True)
    pair.prepared.forward_intermediates(pair.images(2, (80, 32)))
    assert pair.prepared._positions_of.keys() == there.keys()


def test_model_and_graphs_keep_one_another():
    pair = Pair()
    pair.prepared(pair.images(2))
    there = weakref.ref(pair.prepared)
    gc.disable()
    try:
        replays = pair.device.replays
        assert len(replays) == 1
        pair.prepared = None
        assert there() is None and len(replays) == 0
    finally:
        gc.enable()


def test_compiler_stumbles_over_graphs():
    pair = Pair()
    x = pair.images(2)
    assert torch.equal(torch.compile(pair.prepared, backend="eager")(x), pair.expected(x))
    pair.check(x)
    assert pair.device.count("capture") == 1


def test_argument_is_taken_that_means_nothing(devices, monkeypatch):
    model = tiny()
    assert vitfast.prepare(model, graphs=False).graph_report() is None and devices == []
    with pytest.raises(TypeError, match="graphs must be True, False or 'auto', got 'yes'"):
        vitfast.prepare(model, graphs="yes")
    with pytest.raises(ValueError, match="CUDA graphs are off"):
        vitfast.prepare(model, graphs=False).capture()
    for batch in (0, True, 1.5):
        with pytest.raises(ValueError, match="batch must be an int of at least 1"):
            vitfast.prepare(model).input_buffer(batch)
    monkeypatch.setattr(arguments, "graphs_of", graphs.graphs_of)
    assert vitfast.prepare(model).graphs is None
    vitfast.prepare(model).drop_graphs()
    for how in ({"graphs": True}, {"views": True}):
        with pytest.raises(ValueError, match="graphs"):
            vitfast.prepare(model, **how)
