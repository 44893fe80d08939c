"""`benchmarks/gpu_tests.py` and its pytest plugin: what is known of tests when the time is up, or a process is gone."""

import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import gpu_tests
import profile_kernels
import pytest
import stages
import torch
from outcomes import Outcomes, is_lost

from benchmarks.core.record import read

ROOT = Path(__file__).parent.parent


@pytest.fixture
def stage_of(tmp_path, monkeypatch):
    """Runs a file of tests as a stage: (what failed, what is left, the stage's facts in the output folder)."""
    for module in (stages, gpu_tests):
        monkeypatch.setattr(module, "STATE", tmp_path / "state")
    data = {"schema": 1, "run": {"device": "x"}, "earlier": [], "ceilings": {}, "rows": [], "skipped": []}
    kept = stages.Kept(tmp_path / "state" / "x-run.json", data, tmp_path / "out")
    run = stages.Run(torch.device("cpu"), kept, 1e9, False, "x-run")
    file = tmp_path / "test_them.py"

    def call(code, budget_s=60.0, ends_s=1e9, **how):
        file.write_text(textwrap.dedent(code))
        run.ends = time.perf_counter() + ends_s
        stage = gpu_tests.stage_of("tests", budget_s, 1, of=(str(file), "-c", "/dev/null"), marked="not gpu", **how)
        failed = stages.go([stage], run)
        facts = read(tmp_path / "out" / "x-run.json")["stages"]["tests"]
        return failed, facts["calls"][-1]["left"], facts["tests"]

    stage = stages.Stage
    monkeypatch.setattr(gpu_tests, "Stage", lambda *of, **how: stage(*of, **how | {"least_s": 0.0}))
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


def test_time_out_forgets_what_failed_before(stage_of):
    """Names, messages and tracebacks; what was running; how many were not run."""
    failed, left, tests = stage_of(HANGS, ends_s=12.0, workers=1)
    assert left == "no time left" and len(failed) == 1 and failed[0].endswith("AssertionError: three is not four\n"
        "assert 3 == 4")  # fmt: skip
    assert names(tests["passed"]) == ["test_right"] and names(tests["running"]) == ["test_hangs"]
    ((name, why),) = tests["failed"].items()
    assert name.endswith("::test_wrong") and why["phase"] == "call" and "assert x == 4" in why["traceback"]
    assert (tests["collected"], tests["not_run"]) == (4, 2)
    # the next call does what is left, and tells of what is new only
    failed, left, tests = stage_of(HANGS.replace("600", "0"), workers=1)
    assert (failed, left) == ([], "") and names(tests["passed"]) == ["test_hangs", "test_last", "test_right"]
    assert len(tests["failed"]) == 1 and not tests["running"] and not tests["not_run"]


def test_what_hangs_longer_than_its_stage_may_take_costs_the_tests_behind_it(stage_of, monkeypatch):
    """In every call again: it was not there long enough to have no end."""
    # the rest of the budget is for the start of processes, which takes its time on a busy machine
    monkeypatch.setattr(gpu_tests, "SHARE", 0.1)
    failed, left, tests = stage_of(HANGS, budget_s=40.0, workers=1)
    assert "no end after 4 s" in " ".join(failed) and len(failed) == 2
    failed, left, tests = stage_of(HANGS, budget_s=40.0, workers=1)
    assert names(tests["passed"]) == ["test_last", "test_right"] and not left


def test_what_hangs_and_lets_no_other_thread_run_has_no_end(stage_of):
    """As an extension does that does not give Python's lock away."""
    code = """
        import ctypes

        def test_hangs():
            ctypes.PyDLL(None).sleep(600)

        def test_right():
            pass
        """
    failed, left, tests = stage_of(code, budget_s=40.0, workers=1, each_s=2.0)
    assert len(failed) == 1 and "test_hangs" in failed[0]
    assert names(tests["passed"]) == ["test_right"] and not left


def test_what_the_time_was_up_for_is_blamed_for_what_ends_the_next_process(stage_of):
    stage_of(HANGS, ends_s=12.0, workers=1)
    dies = HANGS + "\n    import os\n    os._exit(3)\n"
    failed, left, tests = stage_of(dies, workers=1)
    assert names(tests["failed"]) == ["test_wrong"]


WORKERS = pytest.mark.parametrize("workers", [1, 2])


@WORKERS
def test_what_hangs_or_loses_the_device_costs_other_tests(workers, stage_of):
    """With workers, and in one process that is started again."""
    failed, left, tests = stage_of(
        """
        import time

        def test_hangs():
            time.sleep(600)

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
    assert names(tests["passed"]) == ["test_right"] and not left and len(failed) == len(found)
    assert found["test_hangs"]["message"] == "no end after 2 s" and "test_hangs" in found["test_hangs"]["traceback"]
    assert "illegal memory access" in found["test_breaks"]["message"]
    assert "out of memory" in found["test_too_large"]["message"]
    assert found["test_dies"]["message"]


@WORKERS
def test_kernel_that_does_not_compile_is_not_named(workers, stage_of, tmp_path):
    (tmp_path / "kernel.py").write_text("def kernel(:\n    pass\n")
    failed, left, tests = stage_of(
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
    failed, left, tests = stage_of("import no_such_module", workers=workers)
    assert any("no_such_module" in why["message"] + why["traceback"] for why in tests["failed"].values())
    assert failed and not left


def test_lines_of_a_journal_are_read_wrongly(tmp_path):
    """Of several words on one test; of a line that a kill cut short; of what an earlier call knew."""
    path = tmp_path / "journal"
    path.write_text(
        '{"collected": ["a", "b", "c", "d"]}\n{"id": "a", "is": "began"}\n{"id": "b", "is": "began"}\n'
        '{"id": "a", "is": "failed", "phase": "call", "message": "first", "traceback": ""}\n'
        '{"id": "a", "is": "failed", "phase": "???", "message": "worker crashed", "traceback": ""}\n'
        '{"id": "a", "is": "passed"}\n{"id": "b", "is": "pas'
    )
    found = Outcomes({"passed": ["c"], "collected": 4}).read(path).as_dict()
    assert found["failed"]["a"]["message"] == "first" and found["passed"] == ["c"]
    assert found["running"] == ["b"] and found["not_run"] == 2


@pytest.mark.parametrize("text, lost", [
    ("RuntimeError: Triton Error [CUDA]: an illegal memory access was encountered", True),
    ("torch.AcceleratorError: CUDA error: unspecified launch failure", True),
    ("torch.OutOfMemoryError: CUDA out of memory.", False), ("CUDA error: out of memory", False),
    ("AssertionError: 3 != 4", False),
])  # fmt: skip
def test_lost_device_is_taken_for_a_wrong_result(text, lost):
    assert is_lost(text) == lost


def test_test_that_needs_all_memory_runs_beside_others():
    """Or compute-sanitizer, for whose time a worker would keep the tests that it was given."""
    for file in (ROOT / "tests" / "kernels").glob("test_*.py"):
        for decorators, name in re.findall(r"((?:^@.*\n)*)^def (test_\w+)", file.read_text(), re.MULTILINE):
            if re.search("two_to_the_31|reads_beside_its_tensors", name):
                assert "@pytest.mark.alone" in decorators, (file.name, name)


PRECISIONS = """
import sys
sys.path.insert(0, sys.argv[1])
import stages, torch
stages.same_keys()
before = torch.backends.cuda.matmul.fp32_precision
torch.set_float32_matmul_precision("high")
torch.set_float32_matmul_precision("highest")
assert torch.backends.cuda.matmul.fp32_precision == before, before
"""


def test_what_many_compiled_is_compiled_again_after_ceilings():
    """Inductor's keys hold what a precision was set to."""
    command = [sys.executable, "-c", PRECISIONS, str(ROOT / "benchmarks")]
    done = subprocess.run(command, capture_output=True, text=True)
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
    first, second = profile_kernels.counted(NCU)
    assert first == {
        "kernel": "_product(long)", "gpu__time_duration.sum [us]": 612.5, "dram__bytes.sum [Mbyte]": 88.1,
        "sm__inst_executed_pipe_tensor.sum [inst]": 1234567.0,
    }  # fmt: skip
    assert second.keys() == first.keys() - {"sm__inst_executed_pipe_tensor.sum [inst]"}
    assert profile_kernels.counted("==ERROR== nothing") == []


@pytest.mark.parametrize("ncu, said, why", [
    (None, "", "no ncu on the PATH"),
    ("/opt/ncu", "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "only root"),
])  # fmt: skip
def test_profiler_that_may_not_count_fails_the_plan(ncu, said, why, stage_of, tmp_path, monkeypatch):
    monkeypatch.setattr(profile_kernels.shutil, "which", lambda name: ncu)
    monkeypatch.setattr(profile_kernels, "started", lambda *_: (1, 2.0, said))
    data = {"schema": 1, "run": {"device": "x"}, "rows": [], "skipped": []}
    run = stages.Run(torch.device("cuda"), stages.Kept(tmp_path / "a.json", data, tmp_path), 1e9, False, "x-profile")
    assert stages.go([stages.Stage("counters", 60, 1, profile_kernels.profile)], run) == []
    facts = read(tmp_path / "a.json")["stages"]["counters"]
    assert facts["done"] and why in facts["absent"]
