"""`benchmarks/host.py`: what its tables hold, and that a wrong model is never timed."""

import pytest

from benchmarks import host
from vitfast.check.acceptance import NotAccepted

pytestmark = pytest.mark.as_users
HERE = host.ROOT


@pytest.fixture
def one_model(monkeypatch):
    monkeypatch.setattr(host, "MODELS", {"tiny": host.TINY | {"depth": 1}})


@pytest.mark.slow
def test_an_op_or_a_checkout_is_left_out():
    heading, *rows = host.ops_table([HERE, HERE], 1)
    assert " ".join(heading.split()) == "op and mode before, us after, us before / after"
    names = {row[:36].strip() for row in rows}
    assert names == set(host.all_calls()) and len(names) == 26
    assert all(float(cell) > 0 for row in rows for cell in row[36:].split())


def test_a_mode_is_left_out(one_model):
    _, *rows = host.models_table(0.05)
    assert [row[:36].strip() for row in rows] == ["tiny, inference", "tiny, training"]


def test_wrong_model_is_timed(one_model, monkeypatch):
    forward = host.vitfast.ViT.forward
    monkeypatch.setattr(host.vitfast.ViT, "forward", lambda self, x: forward(self, x) * 1.001)
    with pytest.raises(NotAccepted):
        host.models_table(0.05)


def test_op_by_op_is_stock_operators_or_stays_so():
    limits = dict(host.ops._on_cpu.LIMITS)
    with host.by_op():
        assert not any(host.ops._on_cpu.LIMITS.values()) and not host.ops._on_cpu.HOST_BOUND
    assert limits == host.ops._on_cpu.LIMITS and limits["linear"]
