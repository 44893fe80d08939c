"""What the programs of a split sum count in: zeros before and after every product, and nobody else's."""

import pytest
import torch
from attention_cases import draw
from linear_cases import MECHANISMS, multiprocessors

from vitfast.kernels.triton import counters, linear
from vitfast.kernels.triton.linear import After

DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, device):
    monkeypatch.setattr(counters, "_shared", {})
    monkeypatch.setattr(counters, "_for_graphs", {})


def split_product(mechanism, M, N, device):
    x, weight, bias = (draw(*shape, dtype=torch.float32, device=device) for shape in ((M, 192), (N, 192), (N,)))
    with multiprocessors(64):
        out, *_ = linear.product(x, weight, After(x.dtype, bias), MECHANISMS[mechanism])
    near = (out.double() - torch.nn.functional.linear(x.double(), weight.double(), bias.double())).abs().max()
    return out, near < 1e-3


def as_if_captured(monkeypatch, *streams):
    """The next calls are on these streams, each a pair of its number and whether a graph is captured."""
    left = iter(streams)
    monkeypatch.setattr(counters, "_stream", lambda device: next(left))


@pytest.mark.parametrize("mechanism", ("split", "swap"))
def test_next_product_counts_on(mechanism, device):
    """From what the one before has left: several tiles, more of them than before, and fewer."""
    buffers = []
    for M, N in ((5, 72), (69, 136), (130, 200), (1, 64)):
        out, right = split_product(mechanism, M, N, device)
        (buffer,) = counters._shared.values()
        assert right and not buffer.any()
        buffers.append(buffer.data_ptr())
        assert torch.equal(out, split_product(mechanism, M, N, device)[0])
    assert len(set(buffers)) == 1


def test_number_that_was_left_in_a_counter_is_not_noticed(device):
    """So that the tests above and below see what they are for."""
    assert split_product("split", 5, 72, device)[1]
    (buffer,) = counters._shared.values()
    buffer[1] = 1
    assert not split_product("split", 5, 72, device)[1]


def test_product_that_failed_spoils_the_next(monkeypatch, device):
    def fails(kernel, grid, tensors, *rest, **more):
        tensors[-1].fill_(3)
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(linear, "launch", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            split_product("split", 5, 72, device)
    assert split_product("split", 5, 72, device)[1]


def test_two_streams_share_counters(monkeypatch):
    as_if_captured(monkeypatch, (1, False), (2, False), (1, False), (1, False))
    one, other, again, more = (counters.counters(DEVICE, tiles) for tiles in (8, 8, 300, 4))
    assert one.data_ptr() != other.data_ptr() and again.numel() == 300 and not again.any()
    assert more.data_ptr() == again.data_ptr()


def test_graph_shares_counters(monkeypatch):
    """With its stream, with another product of its own, or with another graph; and none are left at last."""
    as_if_captured(monkeypatch, *[(1, True)] * 5, (1, False))
    assert counters.counters(DEVICE, 8).tolist() == [0] * 8
    counters._for_graphs[DEVICE] = torch.zeros(20, dtype=torch.int32), 0
    found = [counters.counters(DEVICE, 8) for _ in range(3)]
    # those of the third are zeroed in the graph
    inside = counters._for_graphs[DEVICE][0].data_ptr()
    assert [t.data_ptr() - inside for t in found[:2]] == [0, 32] and not inside <= found[2].data_ptr() < inside + 80
    # fewer still find room
    assert counters.counters(DEVICE, 4).data_ptr() == inside + 64
    assert (
        counters.counters(DEVICE, 8).data_ptr() not in {t.data_ptr() for t in found}
        and not counters._for_graphs[DEVICE][0].any()
    )
