"""CUDA graphs of prepared models where limits are odd and parts change, on a device that only pretends."""

import threading
import time

import pytest
import torch
from fake_graphs import Pair, on_cpu
from small_models import tiny
from torch import nn

from vitfast.inference import graphs


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """The devices of the models that a test prepares, in their order."""
    with on_cpu(monkeypatch) as made:
        yield made


class Centred(nn.Module):
    """Reads all images of a batch."""

    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize("insist", ["auto", True])
def test_forward_that_is_patched_later_is_not_called(insist):
    pair = Pair(graphs=insist)
    x = pair.images(2)
    pair.check(x)
    pair.prepared.head.forward = lambda tokens: tokens.new_full((2, 10), 7)
    assert (pair.prepared(x) == 7).all() and "patched forward" in str(pair.prepared.graph_report())
    del pair.prepared.head.forward
    pair.check(x)
    assert pair.device.count("capture") == 1


@pytest.mark.parametrize("most", [0, -1])
def test_call_fails_where_no_graph_is_allowed(most):
    pair = Pair()
    pair.prepared.graphs.most_graphs = most
    for _ in range(3):
        pair.check(pair.images(3), padded=False)
    assert pair.device.log == [] and f"at most {most} graphs" in str(pair.prepared.graph_report())
    with pytest.raises(graphs.NoGraph, match=f"at most {most} graphs"):
        pair.prepared.input_buffer(3)


def test_kinds_of_calls_are_remembered_without_end(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_KINDS", 2)
    pair = Pair(tiny(dynamic_img_size=True))
    for height in range(32, 128, 16):
        pair.check(pair.images(1, (height, 32)))
    own = pair.prepared.graphs
    assert pair.device.count("capture") == 2 and len(own._captured) + len(own._refused) == 2
    assert "2 other kinds" in str(pair.prepared.graph_report())
    # those that have a graph keep it
    pair.check(pair.images(1, (32, 32)))
    assert pair.device.count("replay") == 3


def test_weights_of_inference_mode_have_no_graphs():
    """Whoever prepares in inference mode, or puts a part there that was made in it: torch counts no writes to these."""
    model = tiny()
    with torch.inference_mode():
        pair = Pair(model)
        x = pair.images(2)
        pair.check(x)
        pair.prepared.head = pair.eager.head = nn.Linear(192, 10)
    pair.held.clear()
    pair.check(x)
    pair.check(x)
    assert pair.device.count("capture") == 2 and pair.prepared.graph_report().eager == {}


def test_thread_captures_while_another_looks_at_a_new_part(monkeypatch):
    pair, looking, look = Pair(), threading.Event(), graphs.strange
    x = pair.images(9)
    pair.check(x)
    for model in (pair.prepared, pair.eager):
        model.head = nn.Sequential(model.head, Centred()).eval()

    def slowly(model):
        looking.set()
        time.sleep(0.2)
        return look(model)

    monkeypatch.setattr(graphs, "strange", slowly)
    results = []
    other = threading.Thread(target=lambda: results.append(pair.prepared(x)))
    other.start()
    looking.wait()
    results.append(pair.prepared(x))
    other.join()
    assert len(results) == 2 and all(torch.equal(each, pair.expected(x, padded=False)) for each in results)
    report = pair.prepared.graph_report()
    assert report.refused == {} and sum(report.eager.values()) == 2 and pair.device.count("renew") == 1


def test_weight_of_one_number_is_replaced_by_an_equal_one_unseen():
    """Which a comparison of numbers does not tell, and for which each call would wait for the device."""
    pair = Pair(tiny(num_classes=1))
    x = pair.images(2)
    pair.check(x)
    pair.prepared.head.bias = nn.Parameter(pair.prepared.head.bias.clone(), requires_grad=False)
    pair.check(x)
    assert pair.device.count("capture") == 2
    pair.model.head.bias = nn.Parameter(pair.model.head.bias.detach().clone())
    with pytest.raises(RuntimeError, match="head.bias of the original was replaced"):
        pair.prepared(x)
