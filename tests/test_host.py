"""`benchmarks/host.py`: what its tables hold, and that a wrong model is never timed."""

import sys
import time

import pytest
import torch

import vitfast
from benchmarks import host
from benchmarks.core import patched
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


# vitfast.patch


@pytest.fixture
def timm_alone(monkeypatch):
    monkeypatch.setattr(patched, "FAMILIES", {"timm": patched.FAMILIES["timm"]})


def test_patched_module_or_a_number_is_left_out(timm_alone, monkeypatch):
    monkeypatch.setattr(host, "SAMPLE_S", 1e-4)
    heading, *rows = host.patched_table(2)
    assert " ".join(heading.split()) == "patched module stock, us patched, us its ops, us beyond them, us"
    assert "timm Block" in {row[:36].strip() for row in rows}
    assert all(float(cell) > 0 for row in rows for cell in row[36:].split()[:3])
    heading, row = host.patching_table(2)
    assert row[:36].strip() == "timm" and all(float(cell) > 0 for cell in row[36:].split())


def test_model_in_which_nothing_is_fused_has_times(timm_alone, monkeypatch):
    monkeypatch.setattr(host.vitfast, "patch", lambda model: vitfast.patching.report.PatchReport([]))
    assert [row.strip() for row in host.patched_table(1)[1:]] == ["timm: nothing is fused"]


def recorded(model):
    vitfast.patch(model)
    return host.recorded_modules(model, torch.randn(1, 3, 32, 32))


def test_ops_of_a_patched_block_are_others_or_counted_twice(timm_alone):
    """What they cost is what a block's time is set against; and afterwards nothing is recorded any more."""
    before = [getattr(host.ops, name) for name in host.ops.__all__]
    with host.by_op(), torch.inference_mode():
        ((_, model),) = host.patched_models(32, 1, "Ti")
        found = recorded(model)
        (block,) = [each for each in found if each.module is model.blocks[0]]
        assert [call.func.__name__ for call in block.calls] == ["linear", "attention_qkv", "linear", "mlp"]
        assert torch.equal(block.calls[-1](), block.module(*block.args, **block.kwargs))
    assert before == [getattr(host.ops, name) for name in host.ops.__all__]
    assert not any(module._forward_pre_hooks for module in model.modules())


def python_calls(call):
    """How many functions written in Python it calls; the same on every machine, however busy."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event == "call"

    call()
    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


# a call takes 0.1 to 0.2 us
MOST_CALLS = 200


def test_patched_block_looks_at_its_modules_for_longer_than_it_may():
    """As with a search through all modules, or with what is decided once decided at each call."""
    seen = 0
    with host.by_op(), torch.inference_mode():
        for family, model in host.patched_models(32, 1, "Ti"):
            for each in recorded(model):
                beyond, seen = python_calls(each.run) - python_calls(each.run_ops), seen + 1
                assert beyond <= MOST_CALLS, (family, type(each.module).__name__, beyond)
    assert seen


def test_patching_a_base_model_takes_as_long_as_a_step(timm_alone):
    """50 ms at most. Of this process, at its best: what others do is not counted."""
    ((_, model),) = host.patched_models(None, None, "B")
    times = []
    for _ in range(5):
        began = time.process_time()
        vitfast.patch(model)
        times.append(time.process_time() - began)
        vitfast.unpatch(model)
    assert min(times) < 0.05
