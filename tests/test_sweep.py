"""`benchmarks/gpu/sweep.py`: what its record promises, on a CPU and on a simulated device."""

import dataclasses
import json
import time

import pytest
import torch
from bench_runs import do, runs_in, written
from simulated_device import SimulatedDevice
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.core.harness import DeviceLost
from benchmarks.gpu import plans, stages, sweep, sweep_rows, sweep_time, workers
from vitfast.check.families import FAMILIES
from vitfast.choose import dispatch
from vitfast.kernels.triton import attention, linear

ROOT = stages.ROOT
CPU = torch.device("cpu")
FACTS = {"device": "made up", "driver": None, "torch": torch.__version__, "triton": None, "kernels": "made up"}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def record(path):
    return json.loads(path.read_text())


# rows


@pytest.fixture
def like_hopper(monkeypatch):
    for module in (attention, linear, sweep_rows):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)


def test_rows_or_variants_have_the_same_name(like_hopper):
    rows = sweep_rows.rows(CPU)
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert {variant.role for variant in row.variants.values()} == {sweep_rows.STOCK, sweep_rows.OURS}


def test_the_most_valuable_rows_are_not_first_or_a_form_is_missing(like_hopper):
    calls = [row.call for row in sweep_rows.rows(CPU)]
    images = [call.likes()[0].shape[0] for call in calls]
    first = calls[: images.index(8)]
    assert all("attention" in call.op for call in first[:12])
    assert {call.likes()[0].shape[0] for call in first} == {256, 64, 1}
    ops = ("attention_qkv", "attention_qkv_backward", "patch_embed", "linear", "mlp", "folded_linear", "added_linear")
    ops += ("prepared_block",)
    expected = {(op, B) for op in ops for B in (256, 64, 1)}
    expected |= {(op, B) for op in ("linear_backward", "mlp_backward", "patch_embed_backward") for B in (256, 64)}
    assert {(call.op, call.likes()[0].shape[0]) for call in first} == expected
    with_pieces = [call.args[5] is not None for call in first if call.op == "folded_linear"]
    assert len(with_pieces) == 36 and sum(with_pieces) == 18


# the record


@pytest.fixture
def a_run(tmp_path, monkeypatch):
    return runs_in(tmp_path, monkeypatch)()


def compiled(monkeypatch, answer=lambda task: "", take=slice(-4, None)):
    """The last rows of the tiny ones, for whose tasks workers answer so; None: nobody began it."""
    rows = sweep_rows.rows(CPU, tiny=True)[take]
    monkeypatch.setattr(sweep, "rows", lambda device, tiny: rows)
    tasks = [sweep.task_of(row, name) for row in rows for name in sweep.of_ours(row)]
    done = {task: answer(task) for task in tasks if answer(task) is not None}
    monkeypatch.setattr(workers, "run_by_many", lambda *given: done)
    return rows


def swept(run, budget_s=60.0):
    """The sweep as a stage: its record in the output folder."""
    do(run, dataclasses.replace(plans.PLANS["tune"][1], budget_s=budget_s))
    return record(run.record.out / run.tuned.name)


def left(run):
    return written(run)["stages"]["sweep"]["calls"][-1]["left"]


def test_the_record_lacks_something(a_run, monkeypatch):
    rows = compiled(monkeypatch, take=slice(None))
    data = swept(a_run)
    assert left(a_run) == "" and data["schema"] == 2 and data["skipped"] == []
    assert data["machine"].keys() >= {"device", "kernels"}
    counts = {"compile_s", "compiled", "failed_to_compile", "compiled_while_timing", "seconds"}
    assert [run.keys() for run in data["runs"]] == [{"command", "date", *counts}]
    assert list(data["rows"]) == [row.name for row in rows]
    for row in data["rows"].values():
        assert {"kernel", "shape", "variants"} == row.keys()
        for found in row["variants"].values():
            assert found.keys() >= {"role", "config"} and found["role"] in ("stock", "ours")
            if "ms" in found:
                assert found["lowest"] <= found["ms"] <= found["highest"] and found["rounds"] > 0
                assert found["accepted"] is True and found["graph"] is False
            else:
                assert found["failed"]
    # stock operators are not timed under the name of a kernel that did not run
    found = [each for row in data["rows"].values() for each in row["variants"].values()]
    ours = [each for each in found if each["role"] == "ours"]
    assert len(ours) > 100 and all(each["failed"].startswith("NotImplementedError") for each in ours)
    stock = [each for each in found if each["role"] == "stock" and not each["config"]]
    assert stock and all("ms" in each for each in stock)
    assert {each["config"]["backend"] for each in found if each["role"] == "stock" and each["config"]} == {
        "flash", "cudnn", "efficient",
    }  # fmt: skip


def test_a_row_of_the_committed_record_has_neither_time_nor_reason():
    for path in (ROOT / "benchmarks" / "results").glob("*-tune.json"):
        data = record(path)
        assert data["schema"] == sweep.SCHEMA and data["machine"]["commit"] and data["rows"] and data["runs"]
        for name, row in data["rows"].items():
            variants = row["variants"].values()
            assert all({"ms", "failed", "why_not_accepted"} & each.keys() for each in variants), name
            assert any("ms" in each for each in variants if each["role"] != "ours"), name


# ends, and what goes on after them


def test_rows_that_the_time_was_not_enough_for_are_not_named_or_run_twice(a_run, monkeypatch):
    rows = compiled(monkeypatch)
    now = [0.0]

    def ten_seconds(making):
        now[0] += 10.0
        for found in making.found.values():
            found["ms"] = now[0]

    monkeypatch.setattr(sweep_time.RowInMaking, "run", ten_seconds)
    monkeypatch.setattr(sweep.time, "perf_counter", lambda: now[0])
    before = swept(a_run, budget_s=25.0)
    names = [row.name for row in rows]
    assert list(before["rows"]) == names[:2] and before["skipped"] == names[2:] and left(a_run) == "no time left"
    after = swept(a_run, budget_s=100.0)
    # times of a second run would be others
    assert {name: after["rows"][name] for name in before["rows"]} == before["rows"]
    assert list(after["rows"]) == names and after["skipped"] == [] and len(after["runs"]) == 2 and left(a_run) == ""


@pytest.mark.parametrize("fact", [*sweep.SAME, "schema", "cut short"])
def test_rows_of_two_machines_or_kernels_are_put_in_one_record_or_stop_the_sweep(fact, tmp_path):
    """One of kernels that were mended since, or of another driver, is kept, and another begun."""
    a_sweep(tmp_path, [], SimulatedDevice()).write()
    path = tmp_path / "sweep.json"
    data = record(path)
    if fact == "schema":
        data["schema"] = 1
    else:
        data["machine"][fact] = "another"
    text = json.dumps(data)[: -9 if fact == "cut short" else None]
    path.write_text(text)
    assert a_sweep(tmp_path, [], SimulatedDevice()).data["machine"] == FACTS
    assert (tmp_path / "sweep.json.before").read_text() == text
    assert json.loads((tmp_path / "out" / "sweep.json.before").read_text())["machine"] == FACTS


# compiling


def test_a_variant_that_does_not_compile_is_not_named_or_ends_its_row(a_run, monkeypatch):
    why = "CompilationError: at 1:1"
    compiled(monkeypatch, lambda task: why if "split=8" in task else "", slice(1, 5))
    data = swept(a_run)
    failed = [
        name for row in data["rows"].values() for name, found in row["variants"].items() if found.get("failed") == why
    ]
    assert failed and all("split=8" in name for name in failed) and len(failed) == data["runs"][0]["failed_to_compile"]
    assert all("ms" in row["variants"]["stock"] for row in data["rows"].values())


def test_what_was_not_compiled_in_time_is_given_up_at_once_or_tried_for_ever(a_run, monkeypatch):
    rows = compiled(monkeypatch, lambda task: workers.NOT_FINISHED if "mlp" in task and "blas" in task else "",
                    slice(1, 2))  # fmt: skip
    [name] = [name for name in rows[0].variants if "blas" in name]
    for tries, why in ((1, "no time left"), (2, "")):
        found = swept(a_run)["rows"][rows[0].name]["variants"][name]
        assert left(a_run) == why and found["failed"] == workers.NOT_FINISHED and found["tries"] == tries


def test_a_row_that_nobody_began_to_compile_is_compiled_by_who_times(a_run, monkeypatch):
    rows = compiled(monkeypatch, lambda task: None if "mlp" in task else "", slice(1, 3))
    data = swept(a_run)
    assert left(a_run) == "no time left" and data["skipped"] == [rows[0].name] and list(data["rows"]) == [rows[1].name]


def test_a_worker_without_memory_condemns_a_variant(a_run, monkeypatch):
    compiled(monkeypatch, lambda task: "OutOfMemoryError: CUDA out of memory")
    data = swept(a_run)
    found = [each for row in data["rows"].values() for each in row["variants"].values()]
    assert not any("memory" in each.get("failed", "") for each in found)
    assert data["runs"][0]["failed_to_compile"] == 0


def test_row_that_is_finished_is_compiled_again(a_run, monkeypatch):
    rows = compiled(monkeypatch)
    swept(a_run)
    data = record(a_run.tuned)
    del data["rows"][rows[1].name]
    a_run.tuned.write_text(json.dumps(data))
    assert [task for task, _ in sweep.to_compile(a_run)] == [
        sweep.task_of(rows[1], name) for name in sweep.of_ours(rows[1])
    ]


def test_compilations_while_timing_are_not_counted(monkeypatch):
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setattr(knobs.compilation, "listener", None)
    with stages.compilations() as counted:
        for cache_hit in (False, True, False):
            knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=cache_hit)
    assert counted["triton"] == 2


# checked, then timed


def row_of(variants, form=sweep_rows.INFERENCE, op="linear", B=2):
    """A row of a small linear layer, whose variants run on a CPU."""
    found = sweep_rows.calls(sweep_rows.TINY, B, form, CPU, torch.float32, img_size=32)
    call = next(call for call in found if call.op == op)
    return dataclasses.replace(sweep_rows.row_of(call, form, CPU), variants=variants)


def variant(place, device_s=1e-5, role=sweep_rows.OURS, op="linear", times=1.0, problem=None, log=None):
    """Stock operators, `times` what is right, that take a simulated device `device_s`."""
    family = FAMILIES[op]

    def make(args):
        def call():
            place.work(1e-6, device_s)
            if log is not None:
                log.append(args)
            if problem is not None:
                raise problem
            results = family.stock(args)
            if role == sweep_rows.OURS:
                dispatch.choose(family.kernel, ("made", "up", 1), None, ())
            return tuple(t if t is None else t * times for t in results)

        return call

    return sweep_rows.Variant(role, make, family)


def run(row, place, failed=()):
    making = sweep_time.RowInMaking(row, place, dict(failed))
    making.run()
    return making.data


def test_a_wrong_result_is_timed_or_gives_no_reason():
    place = SimulatedDevice()
    variants = {
        "stock": variant(place, role=sweep_rows.STOCK), "right": variant(place), "wrong": variant(place, times=1.01),
        "nan": variant(place, times=float("nan")),
    }  # fmt: skip
    data = run(row_of(variants), place)
    assert data["kernel"] == "linear" and data["shape"] == ["made", "up", 1]
    found = data["variants"]
    assert found["right"]["accepted"] and "ms" in found["right"] and found["stock"]["accepted"]
    for name, why in (("wrong", "rms error"), ("nan", "not finite")):
        assert found[name]["accepted"] is False and why in found[name]["why_not_accepted"], name
        assert not {"ms", "failed"} & found[name].keys()


def test_a_wrong_result_is_no_failure_of_the_sweep(tmp_path):
    place = SimulatedDevice()
    row = row_of({"stock": variant(place, role=sweep_rows.STOCK), "wrong": variant(place, times=1.01)})
    made = a_sweep(tmp_path, [row], place)
    made.time(None, time.perf_counter() + 60)
    (line,) = made.wrong()
    assert "wrong" in line and made.open() == []


def test_the_last_phase_is_not_for_the_best_three_and_stock():
    place = SimulatedDevice()
    variants = {f"stock {i}": variant(place, 1e-5 * i, sweep_rows.STOCK) for i in (3, 9)}
    variants |= {f"ours {i}": variant(place, 1e-5 * i) for i in (6, 2, 8, 1, 4, 7)}
    found = run(row_of(variants), place)["variants"]
    last = {name for name, each in found.items() if each["rounds"] == sweep_time.ROUNDS}
    assert last == {"stock 3", "stock 9", "ours 1", "ours 2", "ours 4"}
    assert all(each["rounds"] == 5 for name, each in found.items() if name not in last)
    assert all(each["graph"] for each in found.values())
    assert found["ours 8"]["ms"] == pytest.approx(0.08, rel=0.05)


def test_a_variant_that_fails_in_the_end_ends_its_row_or_keeps_its_times():
    """With what else is timed in turns with it, at any number of calls."""
    place, calls = SimulatedDevice(), []

    def make(args):
        call = variant(place).make(args)

        def fails():
            calls.append(1)
            if len(calls) > 900:
                raise ValueError("not any more")
            return call()

        return fails

    bad = dataclasses.replace(variant(place), make=make)
    place.graphs = False
    found = run(row_of({"stock": variant(place, role=sweep_rows.STOCK), "bad": bad, "good": variant(place)}), place)
    last = {name: each.get("rounds") for name, each in found["variants"].items()}
    assert last == {"stock": 8, "bad": None, "good": 8}, len(calls)
    assert found["variants"]["bad"]["failed"] == "ValueError: not any more"


def test_why_a_call_is_in_no_graph_is_not_said():
    place = SimulatedDevice()
    made = variant(place, role=sweep_rows.STOCK)

    def make(args):
        call = made.make(args)
        return lambda: (place.work(1e-6, 1e-5, can_be_captured=False), call())[1]

    variants = {"stock": dataclasses.replace(made, make=make), "ours": variant(place)}
    found = run(row_of(variants), place)["variants"]
    assert (found["stock"]["graph"], found["stock"]["why_no_graph"]) == (False, "it synchronises")
    assert found["ours"]["graph"] and "why_no_graph" not in found["ours"] and "ms" in found["stock"]


@pytest.mark.parametrize("backend", sweep_rows.BACKENDS)
def test_stock_backward_needs_autograd_or_is_given_something_else(backend):
    """Autograd's work is the host's too, and no graph holds it whose forward ran on another stream."""
    with FakeTensorMode(), torch.no_grad():
        qkv, grad = (torch.empty(2, 197, *n, dtype=torch.bfloat16, device="cuda") for n in ((3, 12, 64), (768,)))
        call = sweep_rows._sdpa_backward(sweep_rows.BACKENDS[backend], (grad, qkv, None, None, 0.125))
        found = call()
    assert (found.shape, found.dtype) == (qkv.shape, qkv.dtype) and found.is_contiguous()


def test_gradients_that_are_mostly_0_are_timed():
    place, log = SimulatedDevice(), []
    variants = {"stock": variant(place, role=sweep_rows.STOCK, op="linear_backward", log=log)}
    row = row_of(variants, sweep_rows.TRAINING, "linear_backward", B=128)
    found = run(row, place)["variants"]["stock"]
    zeros = [(args[0] == 0).float().mean().item() for args in log]
    assert found["accepted"] and zeros[0] > 0.02 and zeros[-1] == 0.0


def test_a_variant_that_raises_ends_the_row_or_is_not_named():
    place = SimulatedDevice()
    variants = {
        "stock": variant(place, role=sweep_rows.STOCK), "bad": variant(place, problem=ValueError("no room")),
        "good": variant(place),
    }  # fmt: skip
    found = run(row_of(variants), place)["variants"]
    assert found["bad"]["failed"] == "ValueError: no room" and "ms" in found["good"]


def a_sweep(tmp_path, rows, place):
    kept = stages.Kept(tmp_path / "plan.json", {"schema": 1, "run": {}, "rows": []}, tmp_path / "out")
    return sweep.Sweep(tmp_path / "sweep.json", kept, FACTS, rows, place)


def test_row_that_ends_its_process_is_run_for_ever_or_not_at_all(tmp_path):
    """Which of its variants did nobody knows: stock operators are timed alone."""
    place = SimulatedDevice()
    rows = [row_of({"stock": variant(place, role=sweep_rows.STOCK), "bad": variant(place)})]
    made = a_sweep(tmp_path, rows, place)
    made.kept.data["lost"] = {rows[0].name: {"*": "its process ended with status -11"}}
    made.time(None, 1e9)
    found = record(made.path)["rows"][rows[0].name]["variants"]
    assert found["bad"]["failed"] == "its process ended with status -11" and "ms" in found["stock"]
    assert made.open() == []


def test_what_hangs_while_it_is_timed_ends_every_call_at_the_same_row(tmp_path, monkeypatch):
    """As a kernel may that waits for another program, in a graph and not in the one call that compiled it."""
    monkeypatch.setattr(sweep, "ROW_S", 0.3, raising=False)
    ended, place, path = [], SimulatedDevice(), tmp_path / "sweep.json"

    def end(status):
        ended.append((status, record(path)))

    def hangs(args):
        def call():
            until = time.perf_counter() + 5
            while not ended and time.perf_counter() < until:
                time.sleep(0.01)

        return call

    monkeypatch.setattr(sweep.os, "_exit", end)
    bad = dataclasses.replace(variant(place), make=hangs)
    rows = [row_of({"stock": variant(place, role=sweep_rows.STOCK), "bad": bad, "good": variant(place)})]
    a_sweep(tmp_path, rows, place).time({f"{rows[0].name}: {name}": "" for name in rows[0].variants}, 1e9)
    ((status, data),) = ended
    assert status == stages.LOST and data["rows"][rows[0].name]["variants"]["bad"]["failed"] == "no end after 0 s"
    assert not any("failed" in each for name, each in data["rows"][rows[0].name]["variants"].items() if name != "bad")


def test_who_broke_the_device_is_not_named_or_breaks_it_again(tmp_path):
    place, log = SimulatedDevice(), []

    class Broken(RuntimeError):
        def __init__(self):
            super().__init__("CUDA error: an illegal memory access was encountered")
            log.append(self)

    def breaks(args):
        def call():
            place.lost = True
            raise Broken

        return call

    bad = dataclasses.replace(variant(place), make=breaks)
    rows = [row_of({"stock": variant(place, role=sweep_rows.STOCK), "bad": bad, "good": variant(place)})]
    made = a_sweep(tmp_path, rows, place)
    with pytest.raises(DeviceLost, match="after bad"):
        made.time(None, time.perf_counter() + 60)
    kept = record(made.path)["rows"][rows[0].name]["variants"]
    assert "illegal memory access" in kept["bad"]["failed"] and "ms" not in kept["good"]
    place.lost = False
    assert made.open() == rows
    made.time(None, time.perf_counter() + 60)
    found = record(made.path)["rows"][rows[0].name]["variants"]
    assert len(log) == 1 and found["bad"] == kept["bad"] and "ms" in found["good"] and made.open() == []
