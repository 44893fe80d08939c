"""CUDA graphs that a prepared model captures by itself; `tests/test_graphs.py` has what a device is not needed for."""

import threading

import pytest
import torch
from test_gpu_block import model_of

import vitfast
from vitfast.inference import arguments, graphs


@pytest.fixture
def pair(monkeypatch):
    """A prepared model with graphs, and one without."""
    monkeypatch.setattr(arguments, "graphs_of", graphs.graphs_of)
    torch.manual_seed(0)
    model = model_of(torch.bfloat16, "cuda", layer_scale=0.5)
    return vitfast.prepare(model), vitfast.prepare(model, graphs=False)


def images_of(batch, size=24):
    return torch.randn(batch, 3, size, size, device="cuda", dtype=torch.bfloat16)


def expected_of(eager, x, method="forward"):
    rows = torch.zeros(graphs.bucket(len(x)), *x.shape[1:], device="cuda", dtype=x.dtype)
    rows[: len(x)] = x
    return getattr(eager, method)(rows)[: len(x)]


def test_replay_differs_or_a_result_changes_later(pair):
    prepared, eager = pair
    held = []
    for n in (9, 1, 10, 3, 9, 2, 1, 64):
        x = images_of(n)
        for method in ("forward", "forward_features"):
            held.append((getattr(prepared, method)(x), expected_of(eager, x, method)))
    torch.cuda.synchronize()
    assert all(torch.equal(*each) for each in held)
    report = prepared.graph_report()
    assert report.refused == {} and report.eager == {} and len(report.graphs) == 10, str(report)
    assert 0 < report.bytes < 2**30


def test_memory_is_kept_when_graphs_are_dropped(pair):
    prepared, _ = pair
    prepared(images_of(4))
    prepared.drop_graphs()
    assert prepared.graph_report().bytes == 0
    prepared.graphs.most_bytes = 1
    x = images_of(4)
    assert prepared(x).isfinite().all() and prepared.graph_report().bytes == 0
    assert "more than" in str(prepared.graph_report().refused)


def test_buffer_is_copied_or_a_view_is_not_one(pair, monkeypatch):
    prepared, eager = pair
    buffer = prepared.input_buffer(4)
    buffer.normal_()
    version = buffer._version
    assert torch.equal(prepared(buffer), expected_of(eager, buffer)) and buffer._version == version


def test_threads_and_streams_see_one_another(pair):
    prepared, eager = pair
    given = [(x, expected_of(eager, x)) for n in range(1, 9) for x in [images_of(n)]]
    torch.cuda.synchronize()
    found, problems = [], []

    def work(seed):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(20):
                    x, expected = given[(seed * 7 + i * 3) % 8]
                    found.append((prepared(x), expected))
        except Exception as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert problems == [] and len(found) == 80 and all(torch.equal(*each) for each in found)
    assert prepared.graph_report().refused == {}


def test_failed_capture_breaks_the_next(monkeypatch):
    monkeypatch.setattr(arguments, "graphs_of", graphs.graphs_of)
    model = model_of(torch.bfloat16, "cuda")

    class Waits(torch.nn.Module):
        def forward(self, x):
            return x if len(x) > 2 or x.sum().item() else -x

    model.head = torch.nn.Sequential(model.head, Waits()).eval()
    prepared, eager = vitfast.prepare(model, graphs=True), vitfast.prepare(model, graphs=False)
    kept = images_of(4)
    for x in (kept, images_of(2), kept, images_of(3)):
        assert torch.equal(prepared(x), eager(x))
    report = prepared.graph_report()
    assert len(report.refused) == 1 and len(report.graphs) >= 1, str(report)
    torch.randn(4, device="cuda").sum().item()


def test_users_graph_holds_another_one(pair):
    prepared, eager = pair
    x = images_of(2)
    prepared(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prepared(x)
    out.zero_()
    graph.replay()
    assert torch.equal(out, eager(x)) and "captured by the caller" in str(prepared.graph_report().eager)
