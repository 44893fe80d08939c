"""`benchmarks/gpu/tests.py`, pytest's plugin: what is known of tests when the time is up, or a process is gone."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from bench_runs import do, runs_in, written

from benchmarks.core.harness import NO_TIME_LEFT
from benchmarks.gpu import profile, stages
from benchmarks.gpu.tests import stage_of as a_stage

ROOT = Path(__file__).parent.parent
PROCESS = """
import sys
from pathlib import Path
import torch
from benchmarks.gpu import stages, tests
from benchmarks.core import record
tests.STATE, path, out = map(Path, sys.argv[1:4])
tests.SHARE = {share}
run = stages.Run(torch.device("cpu"), stages.Kept(path, record.read(path), out))
stage = tests.stage_of("tests", {budget_s}, of=({file!r}, "-c", "/dev/null"), marked="not gpu", **{how})
sys.exit(stages.perform(run, stage, {budget_s}))
"""


@pytest.fixture
def stage_of(tmp_path, monkeypatch):
    """Runs a file of tests as a stage: (what is left, the stage's facts in the output folder)."""
    make_run, file, known = runs_in(tmp_path, monkeypatch), tmp_path / "test_them.py", []

    def call(code, budget_s=60.0, share=0.9, ends_s=None, **how):
        file.write_text(textwrap.dedent(code))
        run = make_run(data=known.pop() if known else None)
        process = PROCESS.format(share=share, budget_s=budget_s, file=str(file), how=how)

        def start(stage, budget_s):
            given = (tmp_path / "state", run.record.path, run.record.out)
            begun = stages.begun([sys.executable, "-c", process, *map(str, given)])
            try:
                return begun.wait(ends_s or budget_s)
            except subprocess.TimeoutExpired:
                return NO_TIME_LEFT
            finally:
                stages.killed(begun)

        do(run, a_stage("tests", budget_s, of=()), start=start)
        known.append(written(run))
        facts = known[0]["stages"]["tests"]
        return facts["calls"][-1]["left"], facts["failed"], facts["tests"]

    return call


def names(ids):
    return sorted(each.split("::")[-1] for each in ids)


HANGS = """
    import time

    def test_right():
        pass

    def test_wrong():
        x = 3
        assert x == 4, "three is not four"

    def test_hangs():
        time.sleep(600)

    def test_last():
        pass
"""


@pytest.mark.full
def test_time_out_forgets_what_failed_before(stage_of):
    """Names, messages and tracebacks; what was running; how many were not run."""
    left, failed, tests = stage_of(HANGS, ends_s=25.0, workers=1)
    assert left == NO_TIME_LEFT and len(failed) == 1 and failed[0].endswith("AssertionError: three is not four\n"
        "assert 3 == 4")  # fmt: skip
    assert names(tests["passed"]) == ["test_right"] and names(tests["running"]) == ["test_hangs"]
    ((name, why),) = tests["failed"].items()
    assert name.endswith("::test_wrong") and why["phase"] == "call" and "assert x == 4" in why["traceback"]
    assert (tests["collected"], tests["not_run"]) == (4, 2)
    # the next call does what is left, and does not blame what the time was up for, whatever ends its process
    left, failed, tests = stage_of(HANGS.replace("600", "0"), workers=1)
    assert left == "" and names(tests["passed"]) == ["test_hangs", "test_last", "test_right"]
    assert len(failed) == len(tests["failed"]) == 1 and not tests["running"] and not tests["not_run"]


def test_what_hangs_longer_than_its_stage_may_take_costs_the_tests_behind_it(stage_of):
    """In every call again: it was not there long enough to have no end."""
    # the rest of the budget is for the start of processes, which takes its time on a busy machine
    left, failed, tests = stage_of(HANGS, budget_s=60.0, share=0.05, workers=1)
    assert "no end after 3 s" in " ".join(failed) and len(failed) == 2
    assert names(tests["passed"]) == ["test_last", "test_right"] and not left


WORKERS = pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.full), 2])


@WORKERS
def test_what_hangs_or_loses_the_device_costs_other_tests(workers, stage_of):
    """Whoever hangs, with Python's lock or without it: as an extension does that does not give it away."""
    left, failed, tests = stage_of(
        """
        import ctypes
        import time

        def test_hangs():
            time.sleep(600)

        def test_hangs_and_lets_no_other_thread_run():
            ctypes.PyDLL(None).sleep(600)

        broken = []

        def test_breaks():
            broken.append(1)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        def test_right():
            assert not broken

        def test_dies():
            import os
            os._exit(3)

        def test_too_large():
            raise RuntimeError("CUDA out of memory")
        """,
        workers=workers, each_s=2.0,
    )  # fmt: skip
    found = {name.split("::")[-1]: why for name, why in tests["failed"].items()}
    assert names(tests["passed"]) == ["test_right"] and not left and len(failed) == len(found) == 5
    for name in ("test_hangs", "test_hangs_and_lets_no_other_thread_run"):
        assert found[name]["message"] == "no end after 2 s" and name in found[name]["traceback"]
    assert "illegal memory access" in found["test_breaks"]["message"]
    assert "out of memory" in found["test_too_large"]["message"]
    assert "crashed" in found["test_dies"]["message"]


@WORKERS
def test_kernel_that_does_not_compile_is_not_named(workers, stage_of, tmp_path):
    (tmp_path / "kernel.py").write_text("def kernel(:\n    pass\n")
    left, failed, tests = stage_of(
        f"""
        import runpy
        import pytest

        @pytest.fixture
        def kernel():
            return runpy.run_path({str(tmp_path / "kernel.py")!r})

        def test_of_it(kernel):
            pass

        @pytest.mark.skip(reason="there is no compute-sanitizer")
        def test_sanitized():
            pass

        def test_other():
            pass
        """,
        workers=workers,
    )
    ((name, why),) = tests["failed"].items()
    assert name.endswith("test_of_it") and why["phase"] == "setup" and "SyntaxError" in why["message"]
    assert names(tests["passed"]) == ["test_other"] and not left
    assert [*tests["skipped"].values()] == ["Skipped: there is no compute-sanitizer"]


@WORKERS
def test_file_that_cannot_be_imported_is_not_named(workers, stage_of):
    left, failed, tests = stage_of("import no_such_module", workers=workers)
    assert any("no_such_module" in why["message"] + why["traceback"] for why in tests["failed"].values())
    assert failed and not left


@pytest.mark.parametrize("text, lost", [
    ("RuntimeError: Triton Error [CUDA]: an illegal memory access was encountered", True),
    ("torch.AcceleratorError: CUDA error: unspecified launch failure", True),
    ("torch.OutOfMemoryError: CUDA out of memory.", False), ("CUDA error: out of memory", False),
    ("AssertionError: 3 != 4", False),
])  # fmt: skip
def test_lost_device_is_taken_for_a_wrong_result(text, lost):
    assert stages.is_lost(text) == lost


def test_test_that_needs_all_memory_runs_beside_others():
    """Or compute-sanitizer, for whose time a worker would keep the tests that it was given."""
    for file in (ROOT / "tests" / "kernels").glob("test_*.py"):
        for decorators, name in re.findall(r"((?:^@.*\n)*)^def (test_\w+)", file.read_text(), re.MULTILINE):
            if re.search("two_to_the_31|reads_beside_its_tensors", name):
                assert "@pytest.mark.alone" in decorators, (file.name, name)


PRECISIONS = """
import torch
from benchmarks.gpu import stages
stages.same_keys()
before = torch.backends.cuda.matmul.fp32_precision
torch.set_float32_matmul_precision("high")
torch.set_float32_matmul_precision("highest")
assert torch.backends.cuda.matmul.fp32_precision == before, before
"""


def test_what_many_compiled_is_compiled_again_after_ceilings():
    """Inductor's keys hold what a precision was set to."""
    done = subprocess.run([sys.executable, "-c", PRECISIONS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# ncu


NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","gpu__time_duration.sum","sm__inst_executed_pipe_tensor.sum","dram__bytes.sum","x"
"","","","us","inst","Mbyte","y"
"0","7","_product(long)","612.5","1,234,567","88.1","5"
"1","7","other","7.0","n/a","3.0","5"
==PROF== Disconnected
"""


def test_counters_of_a_kernel_are_lost():
    first, second = profile.counted(NCU)
    assert first == {
        "kernel": "_product(long)", "gpu__time_duration.sum [us]": 612.5, "dram__bytes.sum [Mbyte]": 88.1,
        "sm__inst_executed_pipe_tensor.sum [inst]": 1234567.0,
    }  # fmt: skip
    assert second.keys() == first.keys() - {"sm__inst_executed_pipe_tensor.sum [inst]"}
    assert profile.counted("==ERROR== nothing") == []


@pytest.mark.parametrize("ncu, said, why", [
    (None, "", "no ncu on the PATH"),
    ("/opt/ncu", "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "only root"),
])  # fmt: skip
def test_profiler_that_may_not_count_fails_the_plan(ncu, said, why, tmp_path, monkeypatch):
    monkeypatch.setattr(profile.shutil, "which", lambda name: ncu)
    monkeypatch.setattr(profile, "printed", lambda *_: (1, said))
    run = runs_in(tmp_path, monkeypatch)()
    run.device = torch.device("cuda")
    assert do(run, stages.Stage("counters", 60, profile.profile)) == []
    facts = written(run)["stages"]["counters"]
    assert facts["done"] and why in facts["absent"]


def test_kernel_is_profiled_in_every_call_or_what_ncu_said_is_lost(tmp_path, monkeypatch):
    """With time for the first only; then the others, one of which fails."""
    answers = [(0, NCU), (None, ""), (0, NCU), (9, "==ERROR== no such kernel")]
    monkeypatch.setattr(profile.shutil, "which", lambda name: "/opt/ncu")
    monkeypatch.setattr(profile, "printed", lambda *_: answers.pop(0))
    run = runs_in(tmp_path, monkeypatch)()
    run.device, stage = torch.device("cuda"), stages.Stage("counters", 60, profile.profile)
    do(run, stage)
    assert written(run)["stages"]["counters"]["calls"][-1]["left"] == NO_TIME_LEFT
    do(run, stage)
    counters = written(run)["stages"]["counters"]["counters"]
    assert counters["fc1"] == counters["attention_backward"] == profile.counted(NCU) and not answers
    assert counters["patch_embed"] == {"status": 9, "said": "==ERROR== no such kernel"}
