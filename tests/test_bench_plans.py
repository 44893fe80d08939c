"""`benchmarks/gpu/run.py`: plans, budgets, what goes on where, and all stages of a plan on small sizes."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_cases import layer_norm, make, named, variant
from bench_runs import Clock, do, here, rows_of, runs_in, written
from simulated_device import SimulatedDevice

from benchmarks.core.harness import NO_TIME_LEFT
from benchmarks.core.record import read
from benchmarks.gpu import plans, rows, stages
from benchmarks.gpu import run as program
from benchmarks.gpu.tests import KERNELS, OF_DEVICES
from vitfast.check.case import Variant

ROOT = Path(__file__).parent.parent


def plan_of(clock, seen, *of, **how):
    def work(name, takes):
        def run(_, stage, budget_s):
            seen[name] = budget_s
            clock.now += takes
            return stages.Outcome([f"{name} failed"] if takes > 50 else [])

        return run

    return [stages.Stage(name, budget, work(name, takes), **how) for name, budget, takes in of]


@pytest.fixture
def a_run(tmp_path, monkeypatch):
    return runs_in(tmp_path, monkeypatch)


# budgets


def test_time_that_a_stage_leaves_is_lost_or_the_limit_passed(a_run):
    """A budget that does not grow by what was left, or goes past the run's end."""
    clock, seen = Clock(), {}
    plan = plan_of(clock, seen, ("one", 30, 10), ("two", 20, 30), ("three", 30, 5), ("four", 50, 5), ("five", 40, 1))
    assert do(a_run(), *plan, ends=200.0, clock=clock) == []
    # 20 s left by the first, of which the second takes 10; 35 by the third; never past second 200
    assert seen == {"one": 30, "two": 40, "three": 40, "four": 55, "five": 50}
    do(a_run(), *plan_of(clock, seen, ("one", 30, 10)), ends=1000.0, clock=clock, patience=10.0)
    assert seen["one"] == 300


def test_stage_of_every_call_takes_what_others_left(a_run):
    """As the compilation of a kernel does that hangs the compiler."""
    clock, seen = Clock(), {}
    (first,), (second,) = plan_of(clock, seen, ("one", 99, 1)), plan_of(clock, seen, ("two", 20, 1), always=True)
    do(a_run(), first, second, ends=1000.0, clock=clock)
    assert seen == {"one": 99, "two": 20}


def test_stage_that_overran_costs_later_ones_that_fit(a_run):
    """200 s of 80, and three behind it for which there is time."""
    clock, seen = Clock(), {}
    plan, run = plan_of(clock, seen, ("slow", 80, 200), ("one", 40, 30), ("two", 40, 30), ("three", 40, 30)), a_run()
    assert do(run, *plan, ends=500.0, clock=clock) == ["slow failed"]
    assert seen == {"slow": 80, "one": 40, "two": 50, "three": 60} and not run.record.data["skipped"]


def test_stage_without_time_is_not_listed_or_stays_so(a_run):
    clock, seen = Clock(), {}
    plan, run = plan_of(clock, seen, ("one", 30, 99.0), ("two", 30, 1), least_s=20.0), a_run(tiny=False)
    do(run, *plan, ends=200.0, clock=clock)
    assert list(seen) == ["one"]
    assert [(each["stage"], each["why"]) for each in run.record.data["skipped"]] == [("two", "no time left")]
    do(run, *plan, ends=1000.0, clock=clock)
    assert list(seen) == ["one", "two"] and run.record.data["skipped"] == []


def test_budgets_of_a_plan_exceed_its_time():
    """The extension needs more than the 50 s it usually takes only where all else has to wait for it."""
    for name, plan in plans.PLANS.items():
        budgets = sum(50 if stage is plans.EXTENSION else stage.budget_s for stage in plan)
        assert budgets <= plans.LIMITS_S[name] - program.GRACE_S - program.LAST_S, name
        assert len({stage.name for stage in plan}) == len(plan)
    assert max(plans.LIMITS_S[name] for name in plans.ORDER) <= 540
    # a last row that takes longer than it may costs no goals
    most = sum(stage.budget_s for stage in plans.PLANS["amx"]) + stages.OVERRUN_S
    assert most <= plans.LIMITS_S["amx"] - program.GRACE_S - program.LAST_S
    assert set(plans.ORDER) == plans.PLANS.keys() - {*plans.ON_CPU}


def test_plans_leave_more_than_eight_files(tmp_path):
    call = program.Call(told_of(tmp_path))
    names = [name for plan in plans.ORDER for name in call.files(plan)]
    assert len(names) == len({*names}) <= 8


def test_sweep_has_another_name_than_its_plan_knows(tmp_path, a_run):
    call = program.Call(told_of(tmp_path))
    run = stages.Run(call.device, call.open("tune"), call.told.tiny)
    assert run.tuned.name == call.files("tune")[1] and run.record.path.name == call.files("tune")[0]


def test_plan_measures_without_the_extension():
    for name in plans.ORDER:
        assert plans.PLANS[name][0] is plans.EXTENSION and plans.EXTENSION.always, name


@pytest.mark.parametrize("name", plans.PLANS)
def test_row_cannot_be_made_or_is_there_twice(name, a_run):
    """A typing error in a stage that would show on a GPU only: every row of every stage, made for CUDA."""
    run, keys = a_run(tiny=False), []
    run.device = torch.device("cpu" if name in plans.ON_CPU else "cuda")
    for stage in plans.PLANS[name]:
        if stage.makers:
            made = [maker() for maker in stage.makers(run)]
            assert made, stage.name
            keys += [case.key for case in made]
    assert len(keys) == len(set(keys)) and (len(keys) > 10 or name in ("check", "tune", "tests", "profile"))


# what goes wrong


def test_stage_that_fails_costs_the_others_or_is_not_told(a_run):
    def fails(run, stage, budget_s):
        raise KeyError("a bug")

    seen, run = {}, a_run()
    assert do(run, stages.Stage("fails", 9, fails), *plan_of(Clock(), seen, ("next", 9, 1))) == [
        "fails: KeyError: 'a bug'"
    ]
    found = written(run)["stages"]["fails"]
    assert seen and "in fails" in found["traceback"] and found["done"]


def test_stage_that_is_done_is_run_again_or_one_that_is_not_is_left_out(a_run):
    left, seen = ["no time left", ""], {}
    goes_on = stages.Stage("goes on", 9, lambda *_: stages.Outcome([], left.pop(0)))
    plan, run = [goes_on, *plan_of(Clock(), seen, ("done", 9, 1))], a_run()
    do(run, *plan)
    assert not program.is_finished(plan, written(run)["stages"]) and seen.pop("done")
    do(run, *plan)
    assert program.is_finished(plan, written(run)["stages"]) and not left and not seen
    assert [call["left"] for call in written(run)["stages"]["goes on"]["calls"]] == ["no time left", ""]


def test_interrupted_stage_counts_as_done(a_run):
    def interrupted(*_):
        raise KeyboardInterrupt

    run = a_run()
    with pytest.raises(KeyboardInterrupt):
        do(run, stages.Stage("rows", 9, interrupted))
    found = written(run)["stages"]["rows"]
    assert not found["done"] and found["calls"][0]["left"] == "interrupted"


@pytest.mark.parametrize("ended, why", [
    ("no end after 54 s", "no end after 54 s"), (-11, "its process ended with status -11"),
])  # fmt: skip
def test_what_hangs_or_ends_its_process_is_not_named_or_is_tried_again(ended, why, a_run):
    begun, run = [], a_run()

    def start(stage, budget_s):
        begun.append(budget_s)
        if len(begun) > 1:
            return stages.perform(run, stage, budget_s)
        run.record.running = "model/b"
        return ended

    assert do(run, stages.Stage("rows", 9, lambda *_: stages.Outcome()), start=start) == [f"rows: model/b: {why}"]
    found = written(run)
    assert len(begun) == 2 and found["lost"] == {"model/b": {"*": why}} and found["running"] is None
    assert found["stages"]["rows"]["done"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_rival_that_ends_its_process_costs_the_row(a_run):
    """As a compiler does that uses an instruction which the CPU has not, or all of the memory. What ends a process
    while it is timed costs the row all the same: nobody knows which one did."""
    run, calls = a_run(), []

    def ends_later(*given):
        calls.append(given)
        return layer_norm(*given) if len(calls) == 1 else os._exit(4)

    def start(stage, budget_s):
        if not (pid := os.fork()):
            # the threads of an earlier test are not in this process, and more than one would wait for them
            torch.set_num_threads(1)
            stages.perform(run, stage, budget_s)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    ours = {"vitfast": variant(layer_norm, ours=True)}
    first, second = make({"rival": Variant(lambda: os._exit(4))} | ours), make({"rival": variant(ends_later)}, name="b")
    failed, why = do(run, rows_of([first, second]), start=start), "its process ended with status 4"
    assert failed == [f"rows: {first.key}: rival: {why}", f"rows: {second.key}: {why}"]
    found = written(run)
    assert found["lost"] == {first.key: {"rival": why}, second.key: {"*": why}} and found["building"] is None
    (row,) = found["rows"]
    assert row["variants"].keys() == {"torch", "vitfast"} and row["variants"]["vitfast"]["ms"] > 0
    assert found["stages"]["rows"]["done"]


def test_stage_that_hangs_before_its_first_row_is_tried_for_ever_or_an_earlier_row_is_blamed(a_run):
    run = a_run()
    # as a call leaves it that was killed
    run.record.running = "model/a"
    for done in (False, True):
        failed = do(run, stages.Stage("ceilings", 9, None), start=lambda *_: "no end after 54 s")
        assert set(failed) == {"ceilings: the stage: no end after 54 s"}
        assert written(run)["stages"]["ceilings"]["done"] is done


def test_what_its_time_was_up_for_counts_as_hung_or_done(a_run):
    for why in (program.TIME_UP, NO_TIME_LEFT):
        run = a_run()

        def start(stage, budget_s, run=run, why=why):
            run.record.running = "model/b"
            return why

        assert do(run, stages.Stage("rows", 9, None), start=start) == []
        facts = written(run)["stages"]["rows"]
        assert not facts["done"] and facts["calls"][-1]["left"] == why and not written(run)["lost"]


def test_process_that_hangs_is_waited_for_or_outlives_its_end(tmp_path, a_run, monkeypatch):
    begun, real = [], program.begun
    monkeypatch.setattr(program, "begun", lambda command: begun.append(real(["sleep", "600"])) or begun[-1])
    call = program.Call(told_of(tmp_path / "out"))
    call.open("check")
    for overrun_s, ends_s, why in ((0.1, 60, "no end after 0 s"), (0.0, 60, NO_TIME_LEFT), (9.0, 0.1, program.TIME_UP)):
        call.ends = time.perf_counter() + ends_s - program.GRACE_S
        assert not call.cut
        assert call.start("check", stages.Stage("rows", 9, None, overrun_s=overrun_s), 0.1) == why
        assert begun[-1].poll() is not None
    assert call.cut and call.report() == 3


def test_lost_device_is_lost_again_or_costs_the_other_rows(a_run, monkeypatch):
    """The variant that broke it is left out by the process that goes on, and named."""
    place, begun, run = SimulatedDevice(), [], a_run()
    monkeypatch.setattr(rows, "Hasty", lambda: place)

    def breaks(*_):
        place.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def start(stage, budget_s):
        begun.append(budget_s)
        place.lost = False
        return here(run)(stage, budget_s)

    variants = {"breaks": variant(breaks, ours=True), "vitfast": variant(layer_norm)}
    cases = [make(variants, name="first"), *named("second")]
    (failed,) = do(run, rows_of(cases), start=start)
    assert "after breaks: RuntimeError: CUDA error" in failed and len(begun) == 2
    found = written(run)
    assert list(found["lost"][cases[0].key]) == ["breaks"] and found["running"] is None
    first, second = found["rows"]
    assert "breaks" not in first["variants"] and first["variants"]["vitfast"]["ms"] > 0
    assert second["variants"]["vitfast"]["ms"] > 0 and found["stages"]["rows"]["done"]


def test_device_that_is_always_lost_is_begun_on_for_ever(a_run):
    begun = []
    do(a_run(), stages.Stage("rows", 9, None), start=lambda *_: begun.append(1) or stages.LOST)
    assert len(begun) == program.MOST_STARTS


def test_row_of_a_broken_baseline_is_tried_again_or_listed_under_another_s_name(a_run):
    cases, run = named("first", "second", "third"), a_run()
    first, second = (case.key for case in cases[:2])
    whys = {first: {cases[0].baseline: "CUDA error: misaligned address"}, second: {"*": "no end after 9 s"}}
    run.record.data["lost"] = whys
    do(run, rows_of(cases))
    assert [row["name"] for row in written(run)["rows"]] == ["third"]
    assert {each["key"]: each["why"] for each in written(run)["skipped"]} == {
        key: f"ValueError: {'; '.join(lost.values())}" for key, lost in whys.items()
    }


def test_rows_that_cannot_be_made_are_listed_as_one(a_run):
    def needs_timm(model):
        raise ModuleNotFoundError("No module named 'timm'")

    makers = [plans.without(partial(needs_timm, model=name), "compiled") for name in ("vit", "resnet")]
    run = a_run()
    do(run, stages.Stage("rows", 60, rows.rows, makers=lambda run: makers))
    assert [each["key"] for each in written(run)["skipped"]] == ["needs_timm vit", "needs_timm resnet"]


def test_row_without_the_extension_does_not_say_so(a_run, monkeypatch):
    run = a_run()
    for name, why in (("first", "no nvcc"), ("second", "")):
        monkeypatch.setattr(rows, "no_extension", lambda run, why=why: why)
        do(run, rows_of(named(name), name))
    assert [row["notes"].get("extension") for row in written(run)["rows"]] == ["absent: no nvcc", None]


# going on


def test_record_that_is_not_gone_on_with_is_lost(tmp_path, a_run):
    """In state or output folder, or of a run that is begun anew; the sweep's is its own affair, but for that."""
    out, state = tmp_path / "out", stages.STATE
    plan, sweep = program.Call(told_of(out)).files("tune")

    def put(folder, name, marker):
        folder.mkdir(exist_ok=True)
        facts = program.machine.describe(torch.device("cpu"))
        (folder / name).write_text(json.dumps({"schema": 1, "run": facts, "rows": [], "marker": marker}))

    def opened(**more):
        return program.Call(told_of(out, **more)).open("tune").data.get("marker")

    put(state, plan, "state")
    put(state, sweep, "sweep")
    put(out, plan, "a copy")
    assert opened() == opened(run="tune", resume=True) == "state"
    assert not list(tmp_path.glob("*/*.before"))
    (state / plan).unlink()
    assert opened() is None and read(out / f"{plan}.before")["marker"] == "a copy" and (state / sweep).exists()
    put(state, plan, "state")
    assert opened(run="tune") is None
    assert [read(state / f"{name}.before")["marker"] for name in (plan, sweep)] == ["state", "sweep"]


@pytest.mark.parametrize("text", ['{"schema": 1, "ru', '{"schema": 7}', "[]"])
def test_file_that_was_cut_short_stops_every_plan(text, tmp_path, a_run):
    """It is told and kept, and the plan begins anew."""
    call = program.Call(told_of(tmp_path / "out"))
    file = stages.STATE / call.files("check")[0]
    file.parent.mkdir()
    file.write_text(text)
    assert call.open("check").rows == [] and file.with_name(f"{file.name}.before").read_text() == text


def told_of(out, **more):
    told = {"run": "next", "resume": False, "out": out, "device": torch.device("cpu"), "minutes": 1.0, "tiny": True}
    return argparse.Namespace(**told | more)


def test_rows_of_small_sizes_pass_for_the_real_ones_or_displace_them(tmp_path, monkeypatch, a_run):
    """A plan that was tried with --tiny is finished, or its record is where tables and choices are made from."""
    tiny, real = (program.Call(told_of(tmp_path / "out", tiny=tiny)) for tiny in (True, False))
    for plan in plans.ORDER:
        assert not {*tiny.files(plan)} & {*real.files(plan)}
        tiny.open(plan).data["stages"]["extension"] = {"done": True}
        tiny.open(plan).write()
        assert not real.open(plan).data["stages"]
    for call in (tiny, real):
        run = stages.Run(call.device, call.open("tune"), call.told.tiny)
        assert run.tuned == stages.STATE / call.files("tune")[1]
    assert program.main(["profile", "--device", "cpu", "--tiny"]) == 0
    results = ROOT / "benchmarks" / "results"
    assert (stages.STATE / tiny.files("profile")[0]).exists() and not list(results.glob("*tiny*"))


def test_next_forgets_what_an_earlier_call_left(tmp_path, monkeypatch, a_run):
    """Plans in their order, one that is finished no more, one that ran out of time again."""
    ran, parts = [], {"a": ["", "x"], "b": ["", "left"], "c": [""] * 2}

    def stage_of(plan, name):
        def work(run, stage, budget_s):
            ran.append(plan + name)
            return stages.Outcome([], parts[plan].pop() if name == "1" and parts[plan] else "")

        return stages.Stage(name, 9, work)

    monkeypatch.setattr(program, "PLANS", {plan: [stage_of(plan, "1"), stage_of(plan, "2")] for plan in "abc"})
    monkeypatch.setattr(program, "ORDER", ("a", "b", "c"))

    def start(call, plan, stage, budget_s):
        return here(stages.Run(call.device, call.records[plan]))(stage, budget_s)

    monkeypatch.setattr(program.Call, "start", start)
    call = program.Call(told_of(tmp_path / "out", minutes=1000.0))
    call.run_all()
    assert ran == ["a1", "a2", "b1", "b2", "c1", "c2", "a1", "b1"] and call.report() == 0
    program.Call(told_of(tmp_path / "out", minutes=1000.0)).run_all()
    assert len(ran) == 8


@pytest.fixture
def copy(tmp_path):
    """A plain copy of the tree."""
    ignore = shutil.ignore_patterns("__pycache__", "state", "results", "_C*")
    for name in ("vitfast", "benchmarks", "tests", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    return tmp_path / "tree"


def command(tree, *arguments):
    return [
        sys.executable, "-m", "benchmarks.gpu.run", *arguments, "--device", "cpu", "--tiny",
        "--out", str(tree.parent / "out"),
    ]  # fmt: skip


def variables(tree, **more):
    # with nothing of it installed; what one run compiled serves the next
    more |= {"PYTHONPATH": "", "VITFAST_CACHE_DIR": str(tree.parent.parent / "cache")}
    # two threads wait for each other on a busy machine, for a hundred times as long as small sizes take
    return os.environ | more | {"OMP_NUM_THREADS": "1"}


def ran(tree, *arguments, **more):
    return subprocess.run(
        command(tree, *arguments), capture_output=True, text=True, cwd=tree, env=variables(tree, **more)
    )


@pytest.mark.slow
# the others have their stages with no rows
@pytest.mark.parametrize(
    "name", ["tune", *(pytest.param(name, marks=pytest.mark.full) for name in ("models", "patched", "rest"))]
)
def test_stage_fails_on_its_first_gpu(name, copy):
    """Every stage on a CPU: wrong arguments, a result that is not right, too many files, a second run that repeats."""
    # compiling would take most of the time
    done = ran(copy, name, TORCH_COMPILE_DISABLE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    made = sorted((copy.parent / "out").iterdir())
    record = json.loads(made[0].read_text())
    assert all(stage.name in record["stages"] for stage in plans.PLANS[name]) and not record["skipped"]
    if name == "tune":
        sweep = json.loads(made[1].read_text())
        assert sweep["runs"][0]["compiled"] > 100 and len(sweep["rows"]) == 14 and len(made) == 2
        assert record["run"]["defaults"]["status"] == 0
        return
    assert record["rows"] and record["ceilings"]["copy"]["gbps"] > 0 and len(made) == 1
    for row in record["rows"]:
        for variant_, found in row["variants"].items():
            assert not found["ours"] or "ms" in found or "absent" in found, (row["key"], variant_, found)
    if name == "models":
        assert record["run"]["compiled"]["compiled"] > 4
        assert record["stages"]["inference, compiled"]["calls"][0]["compiled"] == {"triton": 0, "graphs": 0}
        resumed = ran(copy, name, "--resume", TORCH_COMPILE_DISABLE="1")
        assert resumed.returncode == 0 and "finished" in resumed.stdout, resumed.stdout + resumed.stderr
        assert json.loads(made[0].read_text()) == record


TESTS = """
import time
from pathlib import Path

def test_stock_op_is_right():
    log("right")

def test_stock_op_is_wrong():
    log("wrong")
    assert 1 + 1 == 3, "two and two"

def test_stock_op_is_slow():
    log("slow")
    while not Path({go!r}).exists():
        time.sleep(0.05)

def log(what):
    with open({log!r}, "a") as file:
        print(what, file=file)
"""


@pytest.mark.slow
@pytest.mark.full
def test_killed_run_forgets_which_tests_failed_or_runs_them_again(copy):
    """Killed so that it can do nothing any more, in the middle of the tests; then carried on elsewhere."""
    log, go = copy.parent / "log", copy.parent / "go"
    (copy / "tests" / "test_numerics.py").write_text(TESTS.format(go=str(go), log=str(log)))
    process = subprocess.Popen(command(copy, "next", "--minutes", "1.5"), cwd=copy, env=variables(copy))
    out = copy.parent / "out"
    deadline = time.time() + 60
    while not (found := outcomes_in(out)).get("running") and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [name.split("::")[1] for name in found["passed"]] == ["test_stock_op_is_right"]
    (failed,) = found["failed"].values()
    assert "two and two" in failed["message"] and "assert (1 + 1) == 3" in failed["traceback"]
    assert found["not_run"] == 1 and found["collected"] == 3
    state = copy / "benchmarks" / "state"
    shutil.rmtree(state)
    shutil.copytree(out, state)
    go.touch()
    resumed = ran(copy, "check", "--resume")
    assert resumed.returncode == 1, resumed.stdout + resumed.stderr
    assert "two and two" in resumed.stderr
    assert len(outcomes_in(out)["passed"]) == 2 and len(outcomes_in(out)["failed"]) == 1
    # those of the second stage of tests too
    assert log.read_text().split() == ["right", "wrong", "slow", "slow", "right", "wrong", "slow"]


def outcomes_in(out):
    for path in out.glob("*-check.json"):
        return json.loads(path.read_text())["stages"].get("smoke", {}).get("tests", {})
    return {}


@pytest.mark.slow
@pytest.mark.full
def test_cut_off_loses_rows_or_is_not_said(copy):
    """A limit in the middle of the rows: those that are there stay, the others are listed, all is a whole file."""
    done = ran(copy, "rest", "--minutes", "0.4", TORCH_COMPILE_DISABLE="1")
    assert done.returncode in (0, 1, 3), done.stdout + done.stderr
    (path,) = (copy.parent / "out").glob("*.json")
    record = json.loads(path.read_text())
    assert record["schema"] == 1
    if done.returncode != 3:
        assert record["skipped"] and all("no time left" in each["why"] for each in record["skipped"])


def test_file_of_gpu_tests_is_not_run():
    files = [f"tests/{path.name}" for path in Path(__file__).parent.glob("test_*.py")
             if re.search(r"^def test_.*\bdevice\b", path.read_text(), re.MULTILINE)]  # fmt: skip
    assert sorted([*files, "tests/kernels"]) == sorted((*OF_DEVICES, *KERNELS))


def test_products_autotuned_on_another_cpu_or_for_other_threads_are_taken(tmp_path, monkeypatch):
    """From a home folder that several machines have, and of an earlier call."""

    def folder(cpu, threads):
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        monkeypatch.setattr(program, "cpu_name", lambda: cpu)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        program.keep_caches(torch.device("cpu"))
        return os.environ["TORCHINDUCTOR_CACHE_DIR"]

    monkeypatch.setenv("VITFAST_CACHE_DIR", str(tmp_path))
    assert len({folder("Xeon", 2), folder("EPYC", 2), folder("Xeon", 4)}) == 3
    assert folder("Xeon", 2) == folder("Xeon", 2)


def test_two_runs_of_a_tree_write_each_other_s_records_or_disturb_each_other_s_times(tmp_path, a_run, capsys):
    """And one that ended, whichever way, keeps nobody out."""
    stages.STATE.mkdir()
    given = ["profile", "--device", "cpu", "--tiny", "--out", str(tmp_path / "out")]
    with open(stages.STATE / ".lock", "w") as file:
        program.fcntl.flock(file, program.fcntl.LOCK_EX)
        assert program.main(given) == 2
    assert "another run" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert program.main(given) == 0


def test_output_folder_that_cannot_be_written_is_a_failed_test(tmp_path, a_run, capsys):
    """Exit status 1, with a traceback."""
    (tmp_path / "out").touch()
    assert program.main(["profile", "--device", "cpu", "--tiny", "--out", str(tmp_path / "out")]) == 2
    assert "File exists" in capsys.readouterr().err


def test_machine_without_a_gpu_is_not_told_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main(["next", "--out", str(tmp_path)]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())
