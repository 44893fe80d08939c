"""`benchmarks/run.py`: budgets, what a cut-off leaves behind, and all stages of all runs on small sizes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import run as plans
import torch

from vitfast.bench.record import Record

ROOT = Path(__file__).parent.parent


class Clock:
    """Seconds that pass only when a stage says so."""

    now = 100.0

    def __call__(self):
        return self.now


def plan_of(clock, seen, *stages):
    def work(name, takes):
        def run(_, budget_s):
            seen[name] = budget_s
            clock.now += takes
            return [f"{name} failed"] if takes > 50 else []

        return run

    return [plans.Stage(name, budget, work(name, takes)) for name, budget, takes in stages]


def a_run(tmp_path, ends):
    return plans.Run(torch.device("cpu"), Record(tmp_path / "run.json", {"device": "x"}), ends, True, tmp_path, "run")


def test_time_that_a_stage_leaves_is_lost_or_the_limit_passed(tmp_path):
    """A budget that does not grow by what was left, does not shrink by what was overrun, or goes past the run's end."""
    clock, seen = Clock(), {}
    plan = plan_of(clock, seen, ("one", 30, 10), ("two", 20, 60), ("three", 30, 5), ("four", 50, 5), ("five", 40, 1))
    run = a_run(tmp_path, ends=200.0)
    assert plans.go(plan, run, clock) == ["two failed"]
    # 20 s left by the first; 20 s too many by the second; never past second 200
    assert seen == {"one": 30, "two": 40, "three": 10, "four": 25, "five": 20}


def test_stage_without_time_is_not_listed(tmp_path):
    clock, seen = Clock(), {}
    plan = plan_of(clock, seen, ("one", 30, 99.0), ("two", 30, 1))
    run = a_run(tmp_path, ends=200.0)
    plans.go(plan, run, clock)
    assert list(seen) == ["one"]
    assert [(each["stage"], each["why"]) for each in run.record.data["skipped"]] == [("two", "no time left")]


def test_budgets_of_a_run_exceed_nine_minutes():
    for name, plan in plans.PLANS.items():
        assert sum(stage.budget_s for stage in plan) <= plans.LIMITS_S[name] + 10, name
        assert len({stage.name for stage in plan}) == len(plan)
        assert name == "cpu" or plans.LIMITS_S[name] + plans.GRACE_S < 540


@pytest.mark.parametrize("name", plans.PLANS)
def test_row_cannot_be_made_or_is_there_twice(name, tmp_path):
    """A typing error in a stage that would show on a GPU only: every row of every stage, made for CUDA."""
    run = a_run(tmp_path, ends=0.0)
    run.device, run.tiny, keys = torch.device("cpu" if name == "cpu" else "cuda"), False, []
    for stage in plans.PLANS[name]:
        if getattr(stage.work, "func", None) is plans.rows:
            made = [maker() for maker in stage.work.args[0](run)]
            assert made, stage.name
            keys += [case.key for case in made]
    assert len(keys) == len(set(keys)) and len(keys) > 10


def command(tmp_path, *arguments):
    return [
        sys.executable, str(ROOT / "benchmarks" / "run.py"), *arguments, "--device", "cpu", "--tiny",
        "--out", str(tmp_path),
    ]  # fmt: skip


def ran(tmp_path, *arguments, **variables):
    # from elsewhere, as a plain copy of the tree, with nothing of it installed; what one run compiled serves the next
    variables |= {"PYTHONPATH": "", "VITFAST_CACHE_DIR": str(tmp_path.parent / "cache")}
    # two threads wait for each other on a busy machine, for a hundred times as long as small sizes take
    variables["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        command(tmp_path, *arguments), capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **variables}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a", "b"])  # c and cpu have their stages with other rows
def test_stage_fails_on_its_first_gpu(name, tmp_path):
    """Every stage on a CPU: wrong arguments, a result that is not right, too many files, a second run that repeats."""
    # models are compiled, in b; compiling every op as well would take most of the time
    done = ran(tmp_path, name, TORCH_COMPILE_DISABLE=str(int(name == "a")))
    assert done.returncode == 0, done.stdout + done.stderr
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert 1 <= len(files) <= 6 and sum(path.stat().st_size for path in files) < 30e6
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["rows"] and not record["skipped"] and record["ceilings"]["copy"]["gbps"] > 0
    for row in record["rows"]:
        for variant, found in row["variants"].items():
            assert not found["ours"] or "ms" in found or "absent" in found, (row["key"], variant, found)
    if name != "b":
        return
    again = ran(tmp_path, name, "--limit", "0")
    before = path.with_name(f"{path.name}.before")
    assert str(before) in again.stdout and json.loads(before.read_text()) == record
    before.replace(path)
    resumed = ran(tmp_path, name, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    after = json.loads(path.read_text())
    assert [row["date"] for row in after["rows"]] == [row["date"] for row in record["rows"]]
    assert len(after["earlier"]) == 1


@pytest.mark.slow
def test_cut_off_loses_rows_or_is_not_said(tmp_path):
    """A limit in the middle of the rows: those that are there stay, the others are listed, all is a whole file."""
    done = ran(tmp_path, "a", "--limit", "14")
    assert done.returncode in (0, 1, 3), done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
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
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "benchmarks")], capture_output=True, text=True
    )
    assert done.returncode == 3 and "x.json has all finished rows" in done.stderr


def test_file_of_gpu_tests_is_not_run():
    files = [path.name for path in Path(__file__).parent.glob("test_*.py")
             if re.search(r"^def test_.*\bdevice\b", path.read_text(), re.MULTILINE)]  # fmt: skip
    assert sorted([*files, "kernels"]) == sorted(plans.GPU_TESTS)


def test_machine_without_a_gpu_is_not_told_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plans.main(["a", "--out", str(tmp_path)]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())
