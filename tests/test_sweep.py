"""`benchmarks/sweep.py`: what its record promises, on a CPU and on a simulated device."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweep
import sweep_rows
import sweep_time
import torch
import workers
from simulated_device import SimulatedDevice

from benchmarks.core.harness import DeviceLost
from vitfast.check.families import FAMILIES
from vitfast.choose import dispatch
from vitfast.kernels.triton import attention, linear

ROOT = Path(sweep.__file__).parents[1]
CPU = torch.device("cpu")
QUICK = sweep_time.Phases(first_ms=20.0, last_ms=40.0, rounds=4)
FACTS = {"device": "made up", "driver": None, "torch": torch.__version__, "triton": None, "kernels": "made up"}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def command(out, *more):
    return ["--tiny", "--device", "cpu", "--workers", "0", "--out", str(out), *more]


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
    assert {row.group for row in rows} == set(sweep_rows.SETS)
    for row in rows:
        roles = {variant.role for variant in row.variants.values()}
        assert roles == {sweep_rows.OTHER} if row.call is None else roles >= {sweep_rows.STOCK, sweep_rows.OURS}


def test_the_most_valuable_rows_are_not_first_or_a_form_is_missing(like_hopper):
    calls = [row.call for row in sweep_rows.rows(CPU) if row.call is not None]
    images = [call.likes()[0].shape[0] for call in calls]
    first = calls[: images.index(8)]
    assert all("attention" in call.op for call in first[:12])
    assert {call.likes()[0].shape[0] for call in first} == {256, 64, 1}
    ops = ("attention_qkv", "attention_qkv_backward", "patch_embed", "linear", "mlp", "folded_linear", "added_linear")
    expected = {(op, B) for op in ops for B in (256, 64, 1)}
    expected |= {(op, B) for op in ("linear_backward", "mlp_backward", "patch_embed_backward") for B in (256, 64)}
    assert {(call.op, call.likes()[0].shape[0]) for call in first} == expected
    with_pieces = [call.args[5] is not None for call in first if call.op == "folded_linear"]
    assert len(with_pieces) == 36 and sum(with_pieces) == 18


def test_a_comparison_that_is_given_a_part_of_the_work_counts_as_a_choice(like_hopper):
    for row in sweep_rows.rows(CPU, ["prepared"]):
        assert {name for name, variant in row.variants.items() if variant.role == sweep_rows.OTHER} == {
            name for name in row.variants if name.startswith("(")
        }


# the record


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "sweep.json"
    return sweep.main(command(out)), record(out)


def test_the_record_lacks_something(tiny):
    status, data = tiny
    assert status == 0 and data["schema"] == 2 and data["skipped"] == []
    assert data["machine"].keys() >= {"device", "torch", "triton", "commit", "kernels"}
    counts = {"compile_s", "compiled", "failed_to_compile", "compiled_while_timing", "seconds"}
    assert [run.keys() for run in data["runs"]] == [{"command", "date", *counts}]
    assert list(data["rows"]) == [row.name for row in sweep_rows.rows(CPU, tiny=True)]
    for row in data["rows"].values():
        assert {"kernel", "shape", "variants"} == row.keys()
        for found in row["variants"].values():
            assert found.keys() >= {"role", "config"} and found["role"] in ("stock", "ours", "other")
            if "ms" in found:
                assert found["lowest"] <= found["ms"] <= found["highest"] and found["rounds"] > 0
                assert found["role"] == "other" or found["accepted"] is True
            else:
                assert found["failed"]


def test_stock_operators_are_timed_under_the_name_of_a_kernel_that_did_not_run(tiny):
    found = [each for row in tiny[1]["rows"].values() for each in row["variants"].values()]
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


def test_without_a_gpu_it_does_not_say_so(tmp_path):
    out = tmp_path / "sweep.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "sweep.py", "models", "--out", out],
        capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2 and "no GPU" in done.stderr and not out.exists()


# ends, and what goes on after them


def test_a_killed_sweep_loses_a_row_or_runs_one_twice(tmp_path):
    out = tmp_path / "sweep.json"
    path = [sys.executable, str(ROOT / "benchmarks" / "sweep.py")]
    killed = subprocess.Popen([*path, *command(out)], stdout=subprocess.DEVNULL, start_new_session=True)
    while not (out.exists() and len(record(out)["rows"]) >= 2) and killed.poll() is None:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    before = record(out)
    assert len(before["rows"]) >= 2 and len(before["rows"]) + len(before["skipped"]) == 15
    assert sweep.main(command(out, "--resume")) == 0
    after = record(out)
    # times of a second run would be others
    assert {name: after["rows"][name] for name in before["rows"]} == before["rows"]
    assert len(after["rows"]) == 15 and after["skipped"] == [] and len(after["runs"]) == 2


def test_rows_that_the_time_was_not_enough_for_are_not_named_or_not_done_later(tmp_path):
    out = tmp_path / "sweep.json"
    assert sweep.main(command(out, "layers", "--limit", "0")) == 4
    names = record(out)["skipped"]
    assert len(names) == 4 and record(out)["rows"] == {}
    assert sweep.main(command(out, "layers", "--resume")) == 0
    assert list(record(out)["rows"]) == names and record(out)["skipped"] == []


def test_a_new_sweep_overwrites_an_earlier_one(tmp_path):
    out = tmp_path / "sweep.json"
    out.write_text("an earlier one")
    assert sweep.main(command(out, "layers", "--limit", "0")) == 4
    assert (tmp_path / "sweep.json.before").read_text() == "an earlier one"


@pytest.mark.parametrize("fact", sweep.SAME)
def test_rows_of_two_machines_or_kernels_are_put_in_one_record(fact, tmp_path, capsys):
    out = tmp_path / "sweep.json"
    sweep.main(command(out, "layers", "--limit", "0"))
    data = record(out)
    data["machine"][fact] = "another"
    out.write_text(json.dumps(data))
    assert sweep.main(command(out, "layers", "--resume")) == 2
    assert f"{fact} 'another'" in capsys.readouterr().err and record(out) == data


def test_a_record_of_another_schema_is_continued(tmp_path, capsys):
    out = tmp_path / "sweep.json"
    out.write_text('{"schema": 1, "rows": {}}')
    assert sweep.main(command(out, "layers", "--resume")) == 2
    assert "schema 1 is not known, expected 2" in capsys.readouterr().err


# compiling


def compiled(monkeypatch, answer):
    """Let workers answer for each task of the rows of layers; None: nobody began it."""
    rows = sweep_rows.rows(CPU, ["layers"], tiny=True)
    tasks = [task for task, _ in sweep.tasks(rows, sweep.devices.Cpu())]
    done = {task: answer(task) for task in tasks if answer(task) is not None}
    monkeypatch.setattr(workers, "run_by_many", lambda *given: done)
    return rows


def test_a_variant_that_does_not_compile_is_not_named_or_ends_its_row(tmp_path, monkeypatch):
    out, why = tmp_path / "sweep.json", "CompilationError: at 1:1"
    compiled(monkeypatch, lambda task: why if "split=8" in task else "")
    assert sweep.main([*command(out, "layers"), "--workers", "1"]) == 0
    data = record(out)
    failed = [
        name for row in data["rows"].values() for name, found in row["variants"].items() if found.get("failed") == why
    ]
    assert failed and all("split=8" in name for name in failed) and len(failed) == data["runs"][0]["failed_to_compile"]
    assert all("ms" in row["variants"]["stock"] for row in data["rows"].values())


def test_what_was_not_compiled_in_time_is_given_up_at_once_or_tried_for_ever(tmp_path, monkeypatch):
    out = tmp_path / "sweep.json"
    rows = compiled(monkeypatch, lambda task: workers.NOT_FINISHED if "mlp" in task and "blas" in task else "")
    [name] = [name for name in rows[0].variants if "blas" in name]
    for tries, status, more in ((1, 4, ()), (2, 0, ("--resume",))):
        assert sweep.main([*command(out, "layers", *more), "--workers", "1"]) == status
        found = record(out)["rows"][rows[0].name]["variants"][name]
        assert found["failed"] == workers.NOT_FINISHED and found["tries"] == tries


def test_a_row_that_nobody_began_to_compile_is_compiled_by_who_times(tmp_path, monkeypatch):
    out = tmp_path / "sweep.json"
    rows = compiled(monkeypatch, lambda task: None if "mlp" in task else "")
    assert sweep.main([*command(out, "layers"), "--workers", "1"]) == 4
    assert record(out)["skipped"] == [rows[0].name] and len(record(out)["rows"]) == len(rows) - 1


def test_a_worker_without_memory_condemns_a_variant(tmp_path, monkeypatch):
    out = tmp_path / "sweep.json"
    compiled(monkeypatch, lambda task: "OutOfMemoryError: CUDA out of memory")
    assert sweep.main([*command(out, "layers"), "--workers", "1"]) == 0
    found = [each for row in record(out)["rows"].values() for each in row["variants"].values()]
    assert not any("memory" in each.get("failed", "") for each in found)
    assert record(out)["runs"][0]["failed_to_compile"] == 0


def test_compilations_while_timing_are_not_counted(monkeypatch):
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setattr(knobs.compilation, "listener", None)
    counted = sweep_time.CountedCompilations()
    for cache_hit in (False, True, False):
        knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=cache_hit)
    assert counted.compiled == 2


WORKER = """
import os, sys, time
from pathlib import Path
import workers
def say(name):
    with open(sys.argv[1], "a") as file: file.write(name + "\\n")
def fail(): raise ValueError("first line\\nsecond line")
tasks = [("fine", lambda: say("fine")), ("raises", fail), ("dies", lambda: os._exit(7)),
         ("later", lambda: say("later")), ("hangs", lambda: time.sleep(1000)), ("hangs too", lambda: time.sleep(1000)),
         ("not reached", lambda: None)]
workers.work(Path(sys.argv[sys.argv.index(workers.FLAG) + 1]), tasks)
"""


def test_a_task_is_done_twice_or_one_that_ends_its_process_or_hangs_ends_the_others(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]))
    began = time.perf_counter()
    done = workers.run_by_many([sys.executable, str(tmp_path / "worker.py"), str(tmp_path / "said")], 2, 15.0)
    assert done == {
        "fine": "", "raises": "ValueError: first line", "dies": "its process ended with status 7", "later": "",
        "hangs": workers.NOT_FINISHED, "hangs too": workers.NOT_FINISHED,
    }  # fmt: skip
    assert sorted((tmp_path / "said").read_text().split()) == ["fine", "later"] and time.perf_counter() - began < 25


def test_workers_that_cannot_begin_are_started_for_ever(tmp_path):
    with pytest.raises(RuntimeError, match="no such module"):
        workers.run_by_many([sys.executable, "-c", "raise ImportError('no such module')"], 2, 20.0)


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

    return sweep_rows.Variant(role, make, None if role == sweep_rows.OTHER else family, None)


def run(row, place, failed=()):
    making = sweep_time.RowInMaking(row, place, dict(failed), QUICK)
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


def test_a_wrong_result_is_no_failure_of_the_sweep(tmp_path, capsys):
    place = SimulatedDevice()
    row = row_of({"stock": variant(place, role=sweep_rows.STOCK), "wrong": variant(place, times=1.01)})
    made = a_sweep(tmp_path, [row], place)
    made.time(None, time.perf_counter() + 60)
    assert made.status() == 1 and "wrong" in capsys.readouterr().err


def test_the_last_phase_is_not_for_the_best_three_and_stock():
    place = SimulatedDevice()
    variants = {f"stock {i}": variant(place, 1e-5 * i, sweep_rows.STOCK) for i in (3, 9)}
    variants |= {f"ours {i}": variant(place, 1e-5 * i) for i in (6, 2, 8, 1, 4, 7)}
    variants |= {"(alone)": variant(place, 1e-6, sweep_rows.OTHER)}
    found = run(row_of(variants), place)["variants"]
    last = {name for name, each in found.items() if each["rounds"] == QUICK.rounds}
    assert last == {"stock 3", "stock 9", "ours 1", "ours 2", "ours 4"}
    assert all(each["rounds"] == 5 for name, each in found.items() if name not in last)
    assert all(each["graph"] for each in found.values())
    assert found["ours 8"]["ms"] == pytest.approx(0.08, rel=0.05)
    assert "accepted" not in found["(alone)"]


def test_variants_are_always_timed_in_the_same_order(monkeypatch):
    place, order = SimulatedDevice(), []
    variants = {"stock": variant(place, 1e-4, sweep_rows.STOCK), "ours": variant(place, 2e-4)}
    sampled = sweep_time._Timed.sample
    monkeypatch.setattr(
        sweep_time._Timed, "sample", lambda timed, *how: order.append(timed.once_ms) or sampled(timed, *how)
    )
    run(row_of(variants), place)
    slow_first = [first > second for first, second in zip(order[10::2], order[11::2], strict=True)]
    assert slow_first == [False, True] * (QUICK.rounds // 2)


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
    data = sweep.new("made up", FACTS)
    data["runs"].append({"compile_s": 0.0})
    data["skipped"] = [row.name for row in rows]
    return sweep.Sweep(tmp_path / "sweep.json", data, rows, place, QUICK)


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
    assert status == sweep.LOST and data["rows"][rows[0].name]["variants"]["bad"]["failed"] == "no end after 0 s"
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
