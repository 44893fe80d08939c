"""Many cases: budgets, records that are continued, runs that are killed, and compilers in processes of their own."""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_cases import QuickCpu, layer_norm, make, named, on_device, run, variant
from simulated_device import SimulatedDevice

from benchmarks.core import harness
from benchmarks.core.harness import DeviceLost, run_case, run_cases
from benchmarks.core.record import Record, open_for_resume, read

TESTS = Path(__file__).parent


# a process of its own


FACTORY = """
    import time, torch
    from bench_cases import layer_norm, make
    from vitfast.check.case import Variant

    def case(seconds, status=None):
        def build():
            time.sleep(seconds)
            if status is not None:
                raise SystemExit(status)
            assert torch.get_num_threads() == 1
            return layer_norm
        notes = {"factory": "made_elsewhere.case", "arguments": {"seconds": seconds, "status": status}}
        return make({"slow compiler": Variant(build, apart=9.0), "left out": Variant(build)}, notes=notes)
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "made_elsewhere.py").write_text(textwrap.dedent(FACTORY))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(TESTS)]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_elsewhere", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    import made_elsewhere

    yield lambda *arguments, limit: replace(
        case := made_elsewhere.case(*arguments),
        variants={
            "torch": case.variants["torch"], "slow compiler": replace(case.variants["slow compiler"], apart=limit),
        },
    )  # fmt: skip
    torch.set_num_threads(threads)


def test_a_variant_apart_is_not_timed_or_not_checked(elsewhere):
    row = run_case(elsewhere(0.3, limit=250.0), seconds=0.01, place=QuickCpu())
    found = row["variants"]["slow compiler"]
    assert found["apart"] and found["accepted"] and found["ms"] > 0 and found["ratio"] > 0 and found["baseline_ms"] > 0
    assert found["compile_s"] >= 0.3 and found["tflops"] > 0


def test_a_variant_apart_goes_on_after_its_time(elsewhere):
    found = run_case(elsewhere(10**9, limit=1.0), seconds=0.01, place=QuickCpu())["variants"]
    assert found["slow compiler"]["not_timed"] == "time limit: not ready after 1 s" and found["torch"]["ms"] > 0


def test_a_run_cut_short_while_a_compiler_works_loses_the_row(elsewhere, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(harness.apart, "run", interrupted)
    record = Record(tmp_path / "run.json", {})
    with pytest.raises(KeyboardInterrupt):
        quietly([elsewhere(0, limit=9.0)], record)
    data = read(record.path)
    (row,) = data["rows"]
    assert data["skipped"] == []
    assert row["variants"]["torch"]["ms"] > 0 and row["variants"]["slow compiler"]["not_timed"] == harness.CUT_SHORT


def test_a_process_that_dies_takes_the_row_with_it(elsewhere):
    found = run_case(elsewhere(0, 3, limit=250.0), seconds=0.01, place=QuickCpu())["variants"]["slow compiler"]
    assert found["not_timed"].startswith("its process ended with status 3")


def test_a_case_that_nobody_else_can_make_is_run_apart():
    found = run({"apart": variant(layer_norm, apart=9.0)})["variants"]["apart"]
    assert "nothing in the case's notes" in found["not_timed"]


# many cases


def quietly(cases, record, **options):
    told = []
    options = {"budget_s": 600, "stage": "ops", "seconds": 0.0, "place": QuickCpu(), "progress": told.append} | options
    return run_cases(cases, record, **options), told


def test_rows_that_do_not_fit_the_budget_are_run_or_go_unmentioned(tmp_path, monkeypatch):
    now = [0.0]

    def ten_seconds(case, **options):
        now[0] += 10.0
        return {"key": case.key, "variants": {"torch": {"ms": 1.0, "ours": False}}, "kind": "op"}

    monkeypatch.setattr(harness, "run_case", ten_seconds)
    record = Record(tmp_path / "run.json", {})
    cases = named("a", "b", "c", "d", "e")
    _, told = quietly(cases, record, budget_s=35, clock=lambda: now[0])
    data = read(record.path)
    assert [row["key"] for row in data["rows"]] == [case.key for case in cases[:3]] and now[0] == 30.0
    assert [each["key"] for each in data["skipped"]] == [case.key for case in cases[3:]]
    assert all("no time left: 5 s of 35, a row takes about 10" in each["why"] for each in data["skipped"])
    assert "1/5, 25 s left" in told[0] and "2 of 5 rows skipped" in told[-1]


def test_one_slow_compiled_row_costs_the_cheap_ones_behind_it(tmp_path, monkeypatch):
    """A compiler that took 230 s, at the front of a stage of 300."""
    now, ran = [0.0], []

    def timed(case, **options):
        ran.append(case.name)
        now[0] += 230.0 if "torch compiled" in case.variants else 5.0
        return {"key": case.key, "variants": {"torch": {"ms": 1.0, "ours": False}}, "kind": "op"}

    monkeypatch.setattr(harness, "run_case", timed)
    record = Record(tmp_path / "run.json", {})
    slow = [make({"torch compiled": variant(layer_norm)}, name=name) for name in ("slow", "slower")]
    training = make({}, name="training", mode="forward+backward")
    _, told = quietly([*slow, *named("a", "b", "c"), training], record, budget_s=300, clock=lambda: now[0])
    assert ran == ["a", "b", "c", "training", "slow"]
    (skipped,) = read(record.path)["skipped"]
    assert skipped["key"] == slow[1].key and "50 s of 300, a row takes about 230" in skipped["why"]


def test_what_is_there_is_run_again_or_what_is_not_is_left_out(tmp_path):
    path = tmp_path / "run.json"
    cases = named("done", "failed", "skipped", "new")
    record = Record(path, {"device": "here"})
    run_done = {"key": cases[0].key, "variants": {"torch": {"ms": 123.0}}}
    record.add(run_done)
    record.add({"key": cases[1].key, "variants": {"torch": {"not_timed": harness.NO_TIME_LEFT}}})
    record.skip("ops", [cases[2].key], "no time left")
    resumed = open_for_resume(path, {"device": "here"})
    # a case may also be made when it is wanted
    _, told = quietly([*cases[:3], lambda: cases[3]], resumed)
    data = read(path)
    rows = {row["key"]: row for row in data["rows"]}
    assert "1 of 4 rows are there already" in told[0] and len(told) == 4
    assert rows[cases[0].key]["variants"] == run_done["variants"]
    assert all(rows[case.key]["variants"]["vitfast"]["ms"] > 0 for case in cases[1:]) and data["skipped"] == []
    assert data["earlier"] == [{"device": "here"}]


def test_variant_for_which_there_was_no_time_is_given_up_or_costs_the_others(tmp_path, monkeypatch):
    """Of two measurements the one that has more stays."""
    cases, given = named("row"), []

    def measured(case, **options):
        return {"key": case.key, "stage": "ops", "variants": given.pop(0)}

    monkeypatch.setattr(harness, "run_case", measured)
    record = Record(tmp_path / "run.json", {})
    timed, late = {"ms": 1.0, "ours": False}, {"not_timed": harness.NO_TIME_LEFT, "ours": False}
    wanted = [{"a": timed, "b": late}, {"a": late, "b": late}, {"a": timed, "b": timed}]
    for variants in wanted:
        given.append(variants)
        quietly(cases, record)
        assert not given
    assert read(record.path)["rows"][0]["variants"] == wanted[-1]
    quietly(cases, record)


def test_a_case_that_cannot_be_made_costs_the_others(tmp_path):
    def needs_timm(model, batch):
        raise ModuleNotFoundError("No module named 'timm'")

    record = Record(tmp_path / "run.json", {})
    _, told = quietly([partial(needs_timm, model="resnet50", batch=8), *named("right")], record)
    data = read(record.path)
    assert [row["name"] for row in data["rows"]] == ["right"] and "needs_timm resnet50 8 skipped" in told[0]
    assert data["skipped"][0]["why"] == "ModuleNotFoundError: No module named 'timm'"


def test_what_of_ours_is_wrong_is_not_told(tmp_path):
    wrong = make({"vitfast": variant(lambda *i: layer_norm(*i) + 1, ours=True)})
    red, told = quietly([wrong, *named("right")], Record(tmp_path / "run.json", {}))
    assert len(red) == 1 and red[0].startswith(f"{wrong.key}: vitfast: result 0 (torch.float32) not accepted")
    assert "vitfast: result 0 (torch.float32) not accepted" in told[0] and "ms (" in told[1]


KILLED = """
    import sys, time
    from bench_cases import QuickCpu, layer_norm, make, named
    from vitfast.check.case import Variant
    from benchmarks.core.harness import run_cases
    from benchmarks.core.record import Record

    def build():
        print("building", flush=True)
        {end}

    cases = [*named("first", "second"), make({{"hangs": Variant(build)}}, name="third"), *named("fourth")]
    run_cases(cases, Record(sys.argv[1], {{"device": "here"}}), budget_s=600, stage="ops", seconds=0.0,
              place=QuickCpu(), progress=lambda text: None)
"""


@pytest.mark.parametrize("end", [pytest.param("time.sleep(300)", marks=pytest.mark.full), "raise KeyboardInterrupt"])
def test_a_run_that_is_killed_loses_its_finished_rows(tmp_path, end):
    path = tmp_path / "run.json"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED).format(end=end), path], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(
            [str(TESTS.parent), str(TESTS)])},
    )  # fmt: skip
    assert process.stdout.readline() == "building\n"
    if "sleep" in end:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0
    data = read(path)
    assert [row["name"] for row in data["rows"]] == ["first", "second"]
    assert all(row["variants"]["vitfast"]["ms"] > 0 for row in data["rows"])
    assert [each["why"] for each in data["skipped"]] == ([] if "sleep" in end else ["interrupted"] * 2)
    resumed = open_for_resume(path, {"device": "here"})
    quietly(named("first", "second", "third", "fourth"), resumed)
    assert [row["name"] for row in read(path)["rows"]] == ["first", "second", "third", "fourth"]


def test_after_the_device_is_lost_other_variants_are_blamed(tmp_path):
    place = SimulatedDevice()

    def breaks(*_):
        place.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    cases = [
        make({"torch": on_device(place, 1e-6, 1e-4), "breaks": variant(breaks), "vitfast": variant(layer_norm)}),
        make({}, name="next"),
    ]
    record = Record(tmp_path / "run.json", {})
    with pytest.raises(DeviceLost, match="after breaks: RuntimeError: CUDA error"):
        run_cases(cases, record, budget_s=60, stage="ops", seconds=0.01, place=place, progress=lambda text: None)
    data = read(record.path)
    assert [row["key"] for row in data["rows"]] == [cases[0].key]
    assert data["rows"][0]["variants"]["vitfast"]["not_timed"] == "the device was lost"
    assert data["skipped"][0]["key"] == cases[1].key and "device was lost" in data["skipped"][0]["why"]
