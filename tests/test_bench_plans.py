"""`benchmarks/run.py`: plans, budgets, what goes on where, and all stages of a plan on small sizes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_stages
import plans
import pytest
import run as program
import stages
import torch
from bench_cases import layer_norm, make, named, variant
from bench_runs import SWEEP, runs_in, written
from simulated_device import SimulatedDevice

from benchmarks.core.harness import DeviceLost
from benchmarks.core.record import read

ROOT = Path(__file__).parent.parent


class Clock:
    """Seconds that pass only when a stage says so."""

    now = 100.0

    def __call__(self):
        return self.now


def plan_of(clock, seen, *of, **how):
    def work(name, takes):
        def run(_, stage, budget_s):
            seen[name] = budget_s
            clock.now += takes
            return stages.Outcome([f"{name} failed"] if takes > 50 else [])

        return run

    return [stages.Stage(name, budget, takes, work(name, takes), **how) for name, budget, takes in of]


@pytest.fixture
def a_run(tmp_path, monkeypatch):
    return runs_in(tmp_path, monkeypatch)


# budgets


def test_time_that_a_stage_leaves_is_lost_or_the_limit_passed(a_run):
    """A budget that does not grow by what was left, or goes past the run's end."""
    clock, seen = Clock(), {}
    plan = plan_of(clock, seen, ("one", 30, 10), ("two", 20, 30), ("three", 30, 5), ("four", 50, 5), ("five", 40, 1))
    run = a_run(ends=200.0)
    assert stages.go(plan, run, clock) == []
    # 20 s left by the first, of which the second takes 10; 35 by the third; never past second 200
    assert seen == {"one": 30, "two": 40, "three": 40, "four": 55, "five": 50}
    run = a_run(ends=1000.0, patience=10.0)
    stages.go(plan_of(clock, seen, ("one", 30, 10)), run, clock)
    assert seen["one"] == 300


def test_stage_that_overran_costs_later_ones_that_fit(a_run):
    """200 s of 80, and three behind it for which there is time."""
    clock, seen = Clock(), {}
    plan = plan_of(clock, seen, ("slow", 80, 200), ("one", 40, 30), ("two", 40, 30), ("three", 40, 30))
    run = a_run(ends=500.0)
    assert stages.go(plan, run, clock) == ["slow failed"]
    assert seen == {"slow": 80, "one": 40, "two": 50, "three": 60} and not run.record.data["skipped"]


def test_stage_without_time_is_not_listed_or_stays_so(a_run):
    clock, seen = Clock(), {}
    plan = plan_of(clock, seen, ("one", 30, 99.0), ("two", 30, 1), least_s=20.0)
    run = a_run(ends=200.0)
    run.tiny = False
    stages.go(plan, run, clock)
    assert list(seen) == ["one"]
    assert [(each["stage"], each["why"]) for each in run.record.data["skipped"]] == [("two", "no time left")]
    run.ends = 1000.0
    stages.go(plan, run, clock)
    assert list(seen) == ["one", "two"] and run.record.data["skipped"] == []


def test_budgets_of_a_plan_exceed_its_time():
    """The extension needs more than it usually takes only where all else has to wait for it."""
    for name, plan in plans.PLANS.items():
        budgets = sum(stage.typical_s if stage is plans.EXTENSION else stage.budget_s for stage in plan)
        assert budgets <= plans.LIMITS_S[name] - program.GRACE_S, name
        assert len({stage.name for stage in plan}) == len(plan)
    assert max(plans.LIMITS_S[name] for name in plans.ORDER) <= 540
    assert set(plans.ORDER) == plans.PLANS.keys() - {"cpu"}


def test_plans_leave_more_than_eight_files(tmp_path):
    call = program.Call(told_of(tmp_path))
    names = [name for plan in plans.ORDER for name in call.files(plan)]
    assert len(names) == len({*names}) <= 8


def test_plan_measures_without_the_extension():
    for name in plans.ORDER:
        assert plans.PLANS[name][0] is plans.EXTENSION and plans.EXTENSION.always, name


@pytest.mark.parametrize("name", plans.PLANS)
def test_row_cannot_be_made_or_is_there_twice(name, a_run):
    """A typing error in a stage that would show on a GPU only: every row of every stage, made for CUDA."""
    run = a_run()
    run.device, run.tiny, keys = torch.device("cpu" if name == "cpu" else "cuda"), False, []
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

    seen = {}
    plan = [stages.Stage("fails", 9, 9, fails), *plan_of(Clock(), seen, ("next", 9, 1))]
    run = a_run()
    assert stages.go(plan, run) == ["fails: KeyError: 'a bug'"] and seen
    found = written(run)["stages"]["fails"]
    assert found["failed"] == ["fails: KeyError: 'a bug'"] and "in fails" in found["traceback"] and found["done"]


def test_stage_that_is_done_is_run_again_or_one_that_is_not_is_left_out(a_run):
    left = ["no time left", ""]
    plan = [
        stages.Stage("goes on", 9, 9, lambda *_: stages.Outcome([], left.pop(0))),
        *plan_of(Clock(), seen := {}, ("done", 9, 1)),
    ]
    run = a_run()
    stages.go(plan, run)
    assert not stages.is_finished(plan, written(run)["stages"]) and seen.pop("done")
    stages.go(plan, run)
    assert stages.is_finished(plan, written(run)["stages"]) and not left and not seen
    assert [call["left"] for call in written(run)["stages"]["goes on"]["calls"]] == ["no time left", ""]


def test_interrupted_stage_counts_as_done(a_run):
    def interrupted(*_):
        raise KeyboardInterrupt

    run = a_run()
    with pytest.raises(KeyboardInterrupt):
        stages.go([stages.Stage("rows", 9, 9, interrupted)], run)
    found = written(run)["stages"]["rows"]
    assert not found["done"] and found["calls"][0]["left"] == "interrupted"


def test_what_hangs_takes_all_the_time_or_is_tried_again(a_run, monkeypatch):
    monkeypatch.setattr(stages, "OVERRUN_S", 0.05)
    begun = []
    run = a_run(restart=lambda: begun.append(1))

    def hangs(run, stage, budget_s):
        run.record.running = "model/b"
        while not begun:
            time.sleep(0.01)
        return stages.Outcome([], "x")

    stages.go([stages.Stage("rows", 0.1, 9, hangs, least_s=0.0)], run)
    assert "no end after 0 s" in written(run)["stages"]["rows"]["failed"][0]
    assert written(run)["lost"] == {"model/b": {"*": "no end after 0 s"}}


def rows_of(cases, name="rows"):
    return stages.Stage(name, 60, 9, gpu_stages.rows, makers=lambda run: [lambda case=case: case for case in cases])


def test_lost_device_is_lost_again_or_costs_the_other_rows(a_run, monkeypatch):
    """The variant that broke it is left out by the process that goes on, and named."""
    place = SimulatedDevice()
    monkeypatch.setattr(gpu_stages, "Hasty", lambda: place)

    def breaks(*_):
        place.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    variants = {"breaks": variant(breaks, ours=True), "vitfast": variant(layer_norm)}
    cases = [make(variants, name="first"), *named("second")]
    run = a_run()
    with pytest.raises(DeviceLost, match="after breaks"):
        stages.go([rows_of(cases)], run)
    found = written(run)
    assert "after breaks: RuntimeError: CUDA error" in found["stages"]["rows"]["failed"][0]
    assert list(found["lost"][cases[0].key]) == ["breaks"]
    place.lost = False
    run = a_run(data=found)
    stages.go([rows_of(cases)], run)
    first, second = written(run)["rows"]
    assert "breaks" not in first["variants"] and first["variants"]["vitfast"]["ms"] > 0
    assert second["variants"]["vitfast"]["ms"] > 0 and run.record.data["stages"]["rows"]["done"]


def test_row_of_a_broken_baseline_is_tried_again(a_run):
    (case,) = named("first")
    run = a_run()
    run.record.data["lost"] = {case.key: {case.baseline: "CUDA error: misaligned address"}}
    stages.go([rows_of([case])], run)
    assert not run.record.rows and "CUDA error: misaligned" in run.record.data["skipped"][0]["why"]


def test_row_without_the_extension_does_not_say_so(a_run):
    run = a_run(no_extension="no nvcc")
    stages.go([rows_of(named("first"))], run)
    run.no_extension = ""
    stages.go([rows_of(named("second"), "more rows")], run)
    assert [row["notes"].get("extension") for row in written(run)["rows"]] == ["absent: no nvcc", None]


def test_extension_that_cannot_be_built_stops_the_plan(a_run, tmp_path, monkeypatch):
    """On a card: told is that it is absent, and why."""
    run = a_run()
    # where it notes from what it was built
    monkeypatch.setattr(gpu_stages, "ROOT", tmp_path)
    (tmp_path / "setup.py").touch()
    run.tiny, run.device = False, torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    said = "vitfast: VITFAST_BUILD_CUDA=1, but nvcc failed"
    monkeypatch.setattr(gpu_stages, "started", lambda *_, **__: (1, 2.0, said))
    monkeypatch.setattr(gpu_stages.compiled_half, "cuda_status", lambda: {"why": "no CUDA part: nvcc failed"})
    monkeypatch.setattr(gpu_stages.compiled_half, "build_report", lambda: {"cuda": False})
    monkeypatch.setenv("VITFAST_CUDA_ARCHS", "90a")
    failed = stages.go([plans.EXTENSION, rows_of(named("first"))], run)
    assert len(failed) == 1 and "nvcc failed" in failed[0]
    assert written(run)["run"]["extension"] == "absent: no CUDA part: nvcc failed"
    assert written(run)["rows"][0]["notes"]["extension"] == "absent: no CUDA part: nvcc failed"


# going on


def test_record_of_another_place_is_not_gone_on_with(tmp_path, monkeypatch, a_run):
    """The newer of state and output folder, of another commit none; and what is not gone on with is kept."""
    monkeypatch.setattr(program.machine, "commit", lambda: {"commit": "abc", "dirty": False})
    out, state = tmp_path / "out", program.STATE
    (name,) = program.Call(told_of(out)).files("check")

    def put(folder, marker, commit="abc", when=0):
        folder.mkdir(exist_ok=True)
        facts = program.machine.describe(torch.device("cpu")) | {"commit": commit}
        data = {"schema": 1, "run": facts, "rows": [], "marker": marker}
        (folder / name).write_text(json.dumps(data))
        os.utime(folder / name, (when, when))

    def opened(**more):
        return program.Call(told_of(out, **more)).open("check").data.get("marker")

    assert opened() is None
    put(out, "out", when=1000)
    assert opened() == "out" and (state / name).exists()
    put(state, "state", when=2000)
    assert opened() == "state"
    put(out, "newer", when=3000)
    assert opened() == "newer"
    put(out, "other", commit="def", when=4000)
    assert opened() == "newer"
    (state / name).unlink()
    assert opened() is None and read(out / f"{name}.before")["marker"] == "other"
    put(out, "other", commit="def", when=4000)
    assert opened(run="check", resume=True) == "other"
    assert opened(run="check") is None and read(state / f"{name}.before")["marker"] == "other"


@pytest.mark.parametrize("text", ['{"schema": 1, "ru', '{"schema": 7}', "[]"])
@pytest.mark.parametrize("where", ["out", "state"])
def test_file_that_was_cut_short_stops_every_plan(where, text, tmp_path, a_run):
    """It is told and kept, and the plan begins anew."""
    out = tmp_path / "out"
    call = program.Call(told_of(out))
    for name in call.files("tune"):
        file = {"out": out, "state": program.STATE}[where] / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert call.open("tune").rows == []
    for name in call.files("tune"):
        file = {"out": out, "state": program.STATE}[where] / name
        if not text.endswith("}"):
            assert file.with_name(f"{file.name}.before").read_text() == text


def told_of(out, **more):
    told = {"run": "next", "resume": False, "out": out, "device": "cpu", "minutes": 1.0, "tiny": True}
    return program.argparse.Namespace(**told | more)


def test_next_forgets_what_an_earlier_call_left(tmp_path, monkeypatch, a_run):
    """Plans in their order, one that is finished no more, one that ran out of time again as long as that helps."""
    ran, parts = [], {"a": ["", "x"], "b": ["", "left"], "c": [""] * 2}

    def stage_of(plan, name):
        def work(run, stage, budget_s):
            ran.append(plan + name)
            return stages.Outcome([], parts[plan].pop() if name == "1" and parts[plan] else "")

        return stages.Stage(name, 9, 9, work)

    monkeypatch.setattr(program, "PLANS", {plan: [stage_of(plan, "1"), stage_of(plan, "2")] for plan in "abc"})
    monkeypatch.setattr(program, "ORDER", ("a", "b", "c"))
    call = program.Call(told_of(tmp_path / "out", minutes=1000.0))
    call.run_all()
    assert ran == ["a1", "a2", "b1", "b2", "c1", "c2", "a1", "b1"] and call.report() == 0
    again = program.Call(told_of(tmp_path / "out", minutes=1000.0))
    again.run_all()
    assert len(ran) == 8


@pytest.fixture
def copy(tmp_path):
    """A plain copy of the tree, with a sweep and a test that take no time."""
    ignore = shutil.ignore_patterns("__pycache__", "state", "results", "_C*", "*.svg")
    for name in ("vitfast", "benchmarks", "tests", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    (tmp_path / "tree" / "benchmarks" / "sweep.py").write_text(SWEEP.format(statuses=(0,)))
    return tmp_path / "tree"


def command(tree, *arguments):
    return [
        sys.executable, str(tree / "benchmarks" / "run.py"), *arguments, "--device", "cpu", "--tiny",
        "--out", str(tree.parent / "out"),
    ]  # fmt: skip


def variables(tree, **more):
    # from elsewhere, with nothing of it installed; what one run compiled serves the next
    more |= {"PYTHONPATH": "", "VITFAST_CACHE_DIR": str(tree.parent.parent / "cache")}
    # two threads wait for each other on a busy machine, for a hundred times as long as small sizes take
    return os.environ | more | {"OMP_NUM_THREADS": "1"}


def ran(tree, *arguments, **more):
    return subprocess.run(
        command(tree, *arguments), capture_output=True, text=True, cwd=tree.parent, env=variables(tree, **more)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["models", "rest"])  # the others have their stages with no rows
def test_stage_fails_on_its_first_gpu(name, copy):
    """Every stage on a CPU: wrong arguments, a result that is not right, too many files, a second run that repeats."""
    # compiling would take most of the time
    done = ran(copy, name, TORCH_COMPILE_DISABLE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (copy.parent / "out").iterdir()
    record = json.loads(path.read_text())
    assert record["rows"] and not record["skipped"] and record["ceilings"]["copy"]["gbps"] > 0
    assert all(stage.name in record["stages"] for stage in plans.PLANS[name])
    for row in record["rows"]:
        for variant_, found in row["variants"].items():
            assert not found["ours"] or "ms" in found or "absent" in found, (row["key"], variant_, found)
    if name != "models":
        return
    assert record["run"]["compiled"]["compiled"] > 4
    assert record["stages"]["inference, compiled"]["calls"][0]["compiled"] == {"triton": 0, "graphs": 0}
    (copy / "benchmarks" / "state" / path.name).unlink()
    resumed = ran(copy, name, "--resume", TORCH_COMPILE_DISABLE="1")
    assert resumed.returncode == 0 and "finished" in resumed.stdout, resumed.stdout + resumed.stderr
    assert json.loads(path.read_text()) == record


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
def test_killed_run_forgets_which_tests_failed_or_runs_them_again(copy):
    """Killed so that it can do nothing any more, in the middle of the tests; then carried on elsewhere."""
    log, go = copy.parent / "log", copy.parent / "go"
    (copy / "tests" / "test_numerics.py").write_text(TESTS.format(go=str(go), log=str(log)))
    process = subprocess.Popen(command(copy, "next", "--minutes", "1.5"), cwd=copy.parent, env=variables(copy))
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
    shutil.rmtree(copy / "benchmarks" / "state")
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
def test_cut_off_loses_rows_or_is_not_said(copy):
    """A limit in the middle of the rows: those that are there stay, the others are listed, all is a whole file."""
    done = ran(copy, "rest", "--minutes", "0.4", TORCH_COMPILE_DISABLE="1")
    assert done.returncode in (0, 1, 3), done.stdout + done.stderr
    (path,) = (copy.parent / "out").glob("*.json")
    record = json.loads(path.read_text())
    assert record["schema"] == 1
    if done.returncode != 3:
        assert record["skipped"] and all("no time left" in each["why"] for each in record["skipped"])


def test_process_outlives_its_time(tmp_path):
    """What hangs, in a compiler or on a device, must end too."""
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import run;"
        "run.end_at(0.2, Path('x.json')); time.sleep(3600)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / "benchmarks")], capture_output=True, text=True)
    assert done.returncode == 3 and "x.json has all finished rows" in done.stderr


def test_file_of_gpu_tests_is_not_run():
    files = [f"tests/{path.name}" for path in Path(__file__).parent.glob("test_*.py")
             if re.search(r"^def test_.*\bdevice\b", path.read_text(), re.MULTILINE)]  # fmt: skip
    assert sorted([*files, "tests/kernels"]) == sorted((*plans.OF_DEVICES, *plans.KERNELS))


def test_two_runs_of_a_tree_write_each_other_s_records_or_disturb_each_other_s_times(tmp_path, a_run, capsys):
    """And one that ended, whichever way, keeps nobody out."""
    program.STATE.mkdir()
    given = ["profile", "--device", "cpu", "--tiny", "--out", str(tmp_path / "out")]
    with open(program.STATE / ".lock", "w") as file:
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
