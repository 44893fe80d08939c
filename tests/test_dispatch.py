"""Who runs an op: what is forced, what was measured, what is switched off; and the file that tuning is kept in."""

import json
import multiprocessing
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from fake_kernel import DEVICE, KEY, prepared, restart

import vitfast
from vitfast.check.families import FAMILIES
from vitfast.choose import builtin, dispatch, tuning_cache
from vitfast.choose.builtin import Builtin
from vitfast.choose.tuning_cache import Choice
from vitfast.commands import info
from vitfast.ops import _register

fake_fixture = pytest.fixture(prepared, name="fake")

REASONS = ["head_dim 7 is not a multiple of 8", "float64"]


@pytest.mark.parametrize(
    "forced, why_not, off, tuned, builtin, kernel",
    [
        ("auto", [], False, None, True, True),
        ("auto", [], False, None, False, False),
        ("auto", [], False, False, True, False),
        ("auto", [], False, True, False, True),
        ("auto", REASONS, False, True, True, False),
        ("auto", [], True, True, True, False),
        ("stock", [], False, True, True, False),
        ("kernel", [], False, False, False, True),
    ],
)
def test_another_implementation_runs_than_was_decided(fake, forced, why_not, off, tuned, builtin, kernel):
    fake.why_not, fake.builtin = why_not, builtin
    if tuned is not None:
        dispatch.learn(DEVICE, {("fake", ("rows", 2, 3)): Choice(tuned)})
    if off:
        with pytest.warns(RuntimeWarning):
            dispatch.switch_off("fake", "it was wrong")
    vitfast.set_backend(forced)
    assert fake.who(2, 3) == ("kernel" if kernel else "stock")


def test_a_forced_kernel_that_cannot_run_falls_back_or_hides_a_reason(fake):
    fake.why_not = REASONS
    vitfast.set_backend("kernel", op="fake")
    with pytest.raises(NotImplementedError) as problem:
        fake.who(2, 3)
    assert str(problem.value).startswith("fake: ") and all(reason in str(problem.value) for reason in REASONS)
    with pytest.warns(RuntimeWarning):
        dispatch.switch_off("fake", "wrong by 3 %")
    with pytest.raises(NotImplementedError, match="float64; switched off: wrong by 3 %"):
        fake.who(2, 3)
    fake.why_not = []
    with pytest.raises(NotImplementedError, match="cannot run: switched off: wrong by 3 %"):
        fake.who(2, 3)


@pytest.mark.parametrize("call", [vitfast.set_backend, lambda *args: vitfast.backend(*args).__enter__()])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (("triton",), "backend must be one of auto, kernel, stock, got 'triton'"),
        (("stock", "softmax"), "op must be one of attention, .*got 'softmax'"),
        ((None,), "backend must be"),
    ],
)
def test_an_unknown_op_or_backend_is_taken(call, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(*arguments)


def test_an_ops_backward_is_forgotten_or_another_op_forced(fake):
    vitfast.set_backend("stock", op="attention")
    assert [dispatch.state(name) for name in ("attention", "attention_backward")] == ["stock, by set_backend"] * 2
    assert dispatch.state("fake") == "auto"
    vitfast.set_backend("auto", op="attention_backward")
    assert dispatch.state("attention") == "stock, by set_backend" and dispatch.state("attention_backward") == "auto"
    vitfast.set_backend("auto")
    assert all(dispatch.state(name) == "auto" for name in dispatch.KERNELS)


def test_the_context_manager_forgets_what_held_before(fake):
    vitfast.set_backend("kernel", op="attention_backward")
    with pytest.raises(KeyError), vitfast.backend("stock"):
        assert fake.who(2, 3) == "stock"
        with vitfast.backend("kernel", op="fake"):
            assert fake.who(2, 3) == "kernel"
        assert fake.who(2, 3) == "stock"
        raise KeyError
    assert fake.who(2, 3) == "kernel"
    assert dispatch.state("attention_backward") == "kernel, by set_backend" and dispatch.state("attention") == "auto"


def test_switching_off_is_silent_or_told_twice(fake):
    with pytest.warns(RuntimeWarning) as told:
        dispatch.switch_off("fake", "row 3 is wrong")
        dispatch.switch_off("fake", "row 4 is wrong")
    (warning,) = told
    for part in ("fake kernel", "vitfast/kernels/triton/fake.py", "row 3 is wrong", "set_backend('stock', op='fake')"):
        assert part in str(warning.message)
    assert dispatch.switched_off("fake") == "row 3 is wrong" and dispatch.switched_off("attention") is None


def test_a_trial_reaches_another_thread_or_stays(fake):
    config, elsewhere = {"block": 8}, []
    with dispatch.watching() as seen, dispatch.trying("fake", "kernel", config):
        thread = threading.Thread(target=lambda: elsewhere.append((fake.who(2, 3), fake.ran[-1])))
        fake.builtin = False
        thread.start()
        thread.join()
        assert elsewhere == [("stock", ("stock", None, (2, 3)))]
        assert fake.who(2, 3) == "kernel" and fake.ran[-1][1] == config
    assert fake.who(2, 3) == "stock" and [each.taken for each in seen] == [True]


def test_a_choice_takes_longer_than_a_few_microseconds(fake):
    dispatch.learn(DEVICE, {("fake", ("rows", n, 3)): Choice(True) for n in range(1000)})
    shape, took = ("rows", 500, 3), []
    for _ in range(5):
        began = time.process_time()
        for _ in range(10000):
            dispatch.choose("fake", shape, DEVICE, ())
        took.append((time.process_time() - began) / 10000)
    assert min(took) < 5e-6


def test_a_compiled_model_keeps_the_backend_that_it_was_compiled_with(fake):
    with torch.library._scoped_library("vitfast_test", "DEF") as library:
        library.define("softmax(Tensor x) -> Tensor")
        library.impl("softmax", fake.run, "CPU")
        torch.library.register_fake("vitfast_test::softmax", torch.empty_like, lib=library)
        compiled = torch.compile(lambda x: torch.ops.vitfast_test.softmax(x) + 1, backend="eager", fullgraph=True)
        x = torch.randn(2, 3)
        with torch.compiler.set_stance("default"):
            compiled(x)
            with vitfast.backend("stock", op="fake"):
                compiled(x)
            compiled(x)
    assert [who for who, *_ in fake.ran] == ["kernel", "stock", "kernel"]


def test_a_kernel_is_in_one_table_and_not_in_another():
    assert {family.kernel for family in FAMILIES.values()} == set(dispatch.KERNELS)
    # no model calls the packed ones
    called = {op: kernel for op, kernel in _register.CUDA_KERNELS.items() if "varlen" not in op and "packed" not in op}
    assert {op: family.kernel for op, family in FAMILIES.items()} == called


IMPORT = """
import sys; sys.path.insert(0, {root!r})
import torch
before = set(sys.modules)
import vitfast
print(sorted({{name.split(".")[0] for name in set(sys.modules) - before}} & {{"triton", "pynvml"}}))
rooms = ("benchmarks", "vitfast.commands", "vitfast.kernels.triton", "vitfast.check.families")
print([name for name in sys.modules if name.startswith(rooms)])
"""


def test_import_pulls_in_triton_or_the_benchmarks():
    root = str(Path(vitfast.__file__).resolve().parents[1])
    found = subprocess.run([sys.executable, "-c", IMPORT.format(root=root)], capture_output=True, text=True)
    assert found.stdout.splitlines() == ["[]", "[]"], found.stderr


# the cache

CHOICES = {
    ("fake", ("rows", "bf16", 2, 3)): Choice(True, {"block": 64, "kind": "wide"}, 1.0, 2.0),
    ("fake", ("rows", "bf16", 4, 3)): Choice(False, None, None, 2.0),
}


def test_a_stored_choice_is_lost_or_changed(fake, monkeypatch):
    path = tuning_cache.store(DEVICE, CHOICES)
    assert path.parent == tuning_cache.folder() and path.name.startswith("fake-gpu-9000-")
    tuning_cache.store(DEVICE, {("fake", ("rows", "bf16", 4, 3)): Choice(True, {"block": 8})})
    restart(monkeypatch)
    assert tuning_cache.load(DEVICE) == {
        ("fake", ("rows", "bf16", 2, 3)): CHOICES["fake", ("rows", "bf16", 2, 3)],
        ("fake", ("rows", "bf16", 4, 3)): Choice(True, {"block": 8}),
    }
    assert dispatch.config_for("fake", ("rows", "bf16", 4, 3), DEVICE) == {"block": 8}
    assert dispatch.config_for("fake", ("rows", "bf16", 5, 3), DEVICE) is None


def whole():
    return {"schema": 1, "key": KEY, "choices": [{"kernel": "fake", "shape": [2], "use": "kernel", "config": None}]}


def line(**changes):
    return json.dumps({**whole(), "choices": [{**whole()["choices"][0], **changes}]}).encode()


BAD = {
    "empty": b"",
    "truncated": json.dumps(whole()).encode()[:-20],
    "binary": bytes(range(256)) * 10,
    "nested too deep": b"[" * 100000,
    "a list": b"[]",
    "another schema": json.dumps({**whole(), "schema": 2}).encode(),
    "another card": json.dumps({**whole(), "key": {**KEY, "device": "Other GPU"}}).encode(),
    "another version": json.dumps({**whole(), "key": {**KEY, "vitfast": "9"}}).encode(),
    "no key": json.dumps({"schema": 1, "choices": []}).encode(),
    "no choices": json.dumps({"schema": 1, "key": KEY}).encode(),
    "a choice that is none": json.dumps({**whole(), "choices": [3]}).encode(),
    "another use": line(use="maybe"),
    "a nested shape": line(shape=[[1]]),
    "a config of floats": line(config={"block": 0.5}),
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_bad_file_stops_a_step_or_is_told_more_than_once(fake, monkeypatch, text):
    path = tuning_cache.path_of(KEY)
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    with pytest.warns(RuntimeWarning) as told:
        assert fake.who(2, 3) == fake.who(4, 3) == "kernel"
        assert tuning_cache.load(DEVICE) == {}
    (warning,) = told
    assert str(path) in str(warning.message) and "vitfast tune" in str(warning.message)
    # tuning writes it anew
    restart(monkeypatch)
    with pytest.warns(RuntimeWarning):
        tuning_cache.store(DEVICE, CHOICES)
    assert tuning_cache.load(DEVICE) == CHOICES


def test_the_whole_file_that_bad_ones_are_made_of_is_refused(fake):
    path = tuning_cache.path_of(KEY)
    path.parent.mkdir(parents=True)
    path.write_bytes(line())
    assert tuning_cache.load(DEVICE) == {("fake", (2,)): Choice(True)}


def test_a_file_that_cannot_be_read_stops_a_step(fake):
    tuning_cache.path_of(KEY).mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="IsADirectoryError"):
        assert fake.who(2, 3) == "kernel"


@pytest.mark.parametrize("there", [True, False], ids=["a file in its place", "no folder"])
def test_a_device_is_asked_for_where_nobody_tuned(fake, monkeypatch, tmp_path, there):
    monkeypatch.setattr(tuning_cache, "key_of", lambda device: pytest.fail("asked"))
    if there:
        (tmp_path / "tuning").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fake.who(2, 3) == "kernel"


def test_a_device_that_does_not_answer_stops_a_step(fake, monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: unknown error")

    monkeypatch.setattr(tuning_cache, "key_of", lost)
    tuning_cache.folder().mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="CUDA error"):
        assert fake.who(2, 3) == "kernel"


def test_a_shape_that_json_cannot_hold_is_stored(fake):
    with pytest.raises(TypeError, match="strings and ints"):
        tuning_cache.store(DEVICE, {("fake", (torch.bfloat16,)): Choice(True)})


def write_and_read(number, failed):
    """What one of several processes does; anything but whole files fails."""
    warnings.simplefilter("error")
    try:
        for i in range(20):
            tuning_cache.store(DEVICE, {("fake", ("rows", number, i)): Choice(True, {"block": i}, 0.1, 0.2)})
            if not tuning_cache.load(DEVICE):
                raise ValueError("the file has no choice")
    except BaseException as problem:
        failed.put(f"{number}: {problem!r}")


@pytest.mark.skipif(not hasattr(multiprocessing.get_context(), "Process"), reason="this system has no processes")
def test_processes_that_write_and_read_at_once_see_half_a_file(fake):
    tuning_cache.store(DEVICE, CHOICES)  # imports what the children need
    fork = multiprocessing.get_context("fork")
    failed = fork.SimpleQueue()
    children = [fork.Process(target=write_and_read, args=(n, failed)) for n in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert failed.empty(), failed.get()
    assert all(child.exitcode == 0 for child in children)
    # the last to write saw at least its own, and nobody left anything behind
    assert len(tuning_cache.load(DEVICE)) >= 20
    assert [path.name for path in tuning_cache.folder().iterdir()] == [tuning_cache.path_of(KEY).name]


# what is told about it


@pytest.fixture
def op_with_kernel(fake, monkeypatch):
    implementation = _register.Implementation("Triton", "vitfast/kernels/triton/fake.py", "")
    monkeypatch.setitem(_register.IMPLEMENTATIONS, "fake_op", {"cpu": implementation, "cuda": implementation})
    monkeypatch.setitem(_register.CUDA_KERNELS, "fake_op", "fake")
    monkeypatch.setattr(dispatch, "why_no_kernels", lambda: "")


def cuda_line():
    return next(found for found in info.report().splitlines() if found.split()[:2] == ["fake_op", "cuda"])


def test_info_hides_who_runs_an_op(op_with_kernel, monkeypatch):
    assert cuda_line().endswith("vitfast/kernels/triton/fake.py")
    with vitfast.backend("kernel"):
        assert cuda_line().endswith("vitfast/kernels/triton/fake.py")
        assert "kernel, by set_backend" in info.report()
    with vitfast.backend("stock", op="fake"):
        assert cuda_line().endswith("stock PyTorch operators (stock, by set_backend)")
    with pytest.warns(RuntimeWarning):
        dispatch.switch_off("fake", "row 3 is wrong")
    assert cuda_line().endswith("stock PyTorch operators (switched off: row 3 is wrong)")
    monkeypatch.setattr(dispatch, "why_no_kernels", lambda: "triton is not installed")
    assert cuda_line().endswith("stock PyTorch operators (triton is not installed)")
    facts = info.collect()["kernels"]["fake"]
    assert facts["backend"] == "auto" and facts["switched_off"] == "row 3 is wrong"


def test_info_hides_where_stock_operators_are_faster(fake, monkeypatch):
    monkeypatch.setitem(dispatch.KERNELS, "fake", "vitfast/kernels/triton/fake.py")
    tuning_cache.store(DEVICE, CHOICES)
    cuda = {"name": "Fake", "capability": "9.0", "memory_gib": 1.0, "runtime": "13", "devices": 1}
    real = info._device()
    monkeypatch.setattr(info, "_device", lambda: {**real, "cuda": cuda})
    row = builtin.Measured("fake", (), Builtin(True, None, ""), {"Fake": 1.5})
    monkeypatch.setattr(builtin, "table", lambda arch: [row, row._replace(choice=Builtin(False, None, ""))])
    text = info.report()
    assert (
        "auto; built in, sm_90: measured for 2 shapes on Fake: the kernel for 1 (1.50 to 1.50 x stock), stock for 1; "
        "tuned: 2 shapes, 1 of them to stock"
    ) in text
    assert "stock for rows bf16 4 3" in text
    assert f"tuned on this GPU: 2 shapes in {tuning_cache.path_of(KEY)}" in text
    assert info.collect()["kernels"]["fake"]["tuned_to_stock"] == [["rows", "bf16", 4, 3]]
