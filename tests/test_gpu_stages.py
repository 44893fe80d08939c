"""`benchmarks/gpu`: stages before rows, tables made from the sweep, and compilation by many processes."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_cases import layer_norm, make, named, variant
from bench_runs import do, runs_in, written

from benchmarks.gpu import plans, rows, stages, workers
from vitfast.check.case import Variant


@pytest.fixture
def a_run(tmp_path, monkeypatch):
    return runs_in(tmp_path, monkeypatch)


def test_tables_of_the_sweep_are_not_made(a_run, monkeypatch):
    told, digests = [], ["a", "b", "b"]
    monkeypatch.setattr(rows, "printed", lambda command, limit_s: told.append(command) or (1, "it failed"))
    monkeypatch.setattr(rows, "tables", lambda: digests.pop(0))
    run = a_run()
    do(run, plans.DEFAULTS)
    assert "no sweep" in written(run)["run"]["defaults"] and not told
    run.tuned.write_text("{}")
    do(run, plans.DEFAULTS)
    assert written(run)["run"]["defaults"] == {"status": 1, "changed": True, "last": "it failed"}
    assert str(run.tuned) in told[0] and "--write" in told[0]


def test_row_does_not_say_which_tables_it_was_timed_with(a_run, monkeypatch):
    """Rows that are there are not timed again when a later part of the sweep makes others."""
    run = a_run()
    for digest, name in (("old", "first"), ("new", "second")):
        monkeypatch.setattr(rows, "tables", lambda digest=digest: digest)
        cases = named(name)
        do(run, stages.Stage(name, 60, rows.rows, makers=lambda run, cases=cases: [lambda: cases[0]]))
    assert [row["notes"]["tables"] for row in written(run)["rows"]] == ["old", "new"]


@pytest.fixture
def builds(a_run, tmp_path, monkeypatch):
    """(a run on a card, sources of an extension, how often it was built so far)."""
    built, source = [], tmp_path / "csrc" / "cuda" / "a.cu"
    source.parent.mkdir(parents=True)
    source.write_text("one")
    (tmp_path / "setup.py").touch()

    def build(*given, **_):
        built.append(given)
        return 0, "vitfast: built, no CUDA part: nvcc failed"

    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setattr(rows, "printed", build)
    monkeypatch.setattr(rows.compiled_half, "cuda_status", lambda: {"why": "no CUDA part: nvcc failed"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    run = a_run(tiny=False)
    run.device = torch.device("cuda")
    return run, source, built


def test_extension_of_sources_that_were_changed_is_kept(builds):
    """What is built stays in the tree when a later call brings other sources."""
    run, source, built = builds
    for text, count in (("one", 1), ("one", 1), ("two", 2)):
        source.write_text(text)
        do(run, plans.EXTENSION)
        assert len(built) == count


def test_extension_that_cannot_be_built_is_built_again_in_every_plan(builds, monkeypatch):
    """Where there is no nvcc, or where it fails: half a minute in each of six plans."""
    run, _, built = builds
    for _ in range(3):
        do(run, plans.EXTENSION)
    assert len(built) == 1 and written(run)["run"]["extension"] == "absent: no CUDA part: nvcc failed"
    # somebody puts it there
    monkeypatch.setattr(rows.shutil, "which", lambda name: "/opt/nvcc")
    do(run, plans.EXTENSION)
    assert len(built) == 2


def test_extension_that_cannot_be_built_stops_the_plan(builds, monkeypatch):
    """On a card: told is that it is absent, and why."""
    run, _, _ = builds
    said = "vitfast: VITFAST_BUILD_CUDA=1, but nvcc failed"
    monkeypatch.setattr(rows, "printed", lambda *_, **__: (1, said))
    failed = do(run, plans.EXTENSION, stages.Stage("next", 60, lambda *_: stages.Outcome()))
    assert len(failed) == 1 and "nvcc failed" in failed[0]
    assert written(run)["run"]["extension"] == "absent: no CUDA part: nvcc failed"
    assert written(run)["stages"]["next"]["done"]


def test_nvcc_that_is_where_the_toolkit_puts_it_is_not_found(monkeypatch):
    """As compute-sanitizer and ncu are."""
    there = "/usr/local/cuda/bin/nvcc"
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setattr(rows.shutil, "which", lambda name: name if name == there else None)
    assert rows.nvcc() == there
    monkeypatch.setattr(rows.shutil, "which", lambda name: f"/opt/{name}" if name == "nvcc" else None)
    assert rows.nvcc() == "/opt/nvcc"


def test_process_that_a_stage_waits_for_takes_all_its_time():
    assert stages.printed([sys.executable, "-c", "print('said'); raise SystemExit(3)"], 60.0) == (3, "said")
    began = time.perf_counter()
    assert stages.printed(["sleep", "600"], 0.2) == (None, "") and time.perf_counter() - began < 30


# workers


def model_case(batch, mode, name):
    return make({"torch": variant(layer_norm), "vitfast": variant(layer_norm, ours=True)}, kind="model", mode=mode,
                name=name, batch=batch, shape={"tokens": 197, "dim": 768, "depth": 12})  # fmt: skip


def test_variant_is_compiled_twice_or_by_who_has_no_memory(a_run, monkeypatch):
    taken = {}
    cases = [model_case(1, "inference", "light"), model_case(256, "training", "heavy")]
    built = {case.name: [] for case in cases}

    def counting(case):
        def build():
            built[case.name].append(1)
            raise ValueError("it does not compile")

        return replace(case, inputs=lambda generator: (), variants={
            name: Variant(build, ours=each.ours) for name, each in case.variants.items()
        })  # fmt: skip

    monkeypatch.setattr(rows, "SHARE", 2e-8)  # of what stands for a CPU's memory: for one heavy one
    plan = [stages.Stage("rows", 9, rows.rows, makers=lambda run: [lambda c=c: counting(c) for c in cases])]
    for number in (3, 0, 1):
        monkeypatch.setenv(workers.NUMBER, str(number))
        taken[number] = []
        # as `workers.work` claims them
        for task, call in rows.compilable(plan, a_run()):
            if task not in {each for tasks in taken.values() for each in tasks}:
                taken[number].append(task)
                with pytest.raises(ValueError, match="does not compile"):
                    call()
    assert taken == {3: [f"{cases[0].key}: vitfast"], 0: [f"{cases[1].key}: vitfast"], 1: []}
    assert {name: len(times) for name, times in built.items()} == {"light": 1, "heavy": 1}
    assert not rows.compiles("timm max-autotune", Variant(layer_norm))
    assert rows.compiles("timm reduce-overhead", Variant(layer_norm))


def test_shape_in_which_gradients_are_judged_is_compiled_by_who_times():
    batches = []
    case = make({}, batch=64, mode="forward+backward", per_image=(True, False))
    rows.call_once(case, variant(lambda x, *_: batches.append(len(x))))
    assert batches == [64, case.check_images]
    rows.call_once(replace(case, per_image=(True,)), variant(lambda x, *_: batches.append(len(x))))
    assert batches[2:] == [64]


WORKER = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu import workers
def say(name):
    with open(sys.argv[1], "a") as file: file.write(name + "\\n")
def fail(): raise ValueError("first line\\nsecond line")
tasks = [("fine", lambda: say("fine")), ("raises", fail), ("dies", lambda: os._exit(7)),
         ("later", lambda: say("later")), ("hangs", lambda: time.sleep(1000)), ("hangs too", lambda: time.sleep(1000)),
         ("not reached", lambda: None)]
workers.work(Path(sys.argv[sys.argv.index(workers.FLAG) + 1]), tasks)
"""


def test_a_task_is_done_twice_or_one_that_ends_its_process_or_hangs_ends_the_others(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    began = time.perf_counter()
    done = workers.run_by_many([sys.executable, str(tmp_path / "worker.py"), str(tmp_path / "said")], 20.0, 2)
    assert done == {
        "fine": "", "raises": "ValueError: first line", "dies": "its process ended with status 7", "later": "",
        "hangs": workers.NOT_FINISHED, "hangs too": workers.NOT_FINISHED,
    }  # fmt: skip
    assert sorted((tmp_path / "said").read_text().split()) == ["fine", "later"] and time.perf_counter() - began < 35


LOSES = """
import sys
from pathlib import Path
from benchmarks.gpu import workers
said = Path(sys.argv[1])
def loses(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def right():
    said.write_text(said.read_text() + " right" if said.exists() else "right")
    assert "begun" not in globals()
tasks = [("loses", lambda: (globals().update(begun=1), loses())), ("right", right)]
workers.work(Path(sys.argv[sys.argv.index(workers.FLAG) + 1]), tasks)
"""


def test_worker_whose_device_was_lost_fails_at_every_later_task(tmp_path):
    (tmp_path / "worker.py").write_text(LOSES)
    done = workers.run_by_many([sys.executable, str(tmp_path / "worker.py"), str(tmp_path / "said")], 60.0, 1)
    assert "illegal memory access" in done["loses"] and done["right"] == ""


def test_workers_that_cannot_begin_are_started_for_ever():
    with pytest.raises(RuntimeError, match="no such module"):
        workers.run_by_many([sys.executable, "-c", "raise ImportError('no such module')"], 20.0, 2)


ORPHAN = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu import stages, workers
if "--claims" in sys.argv:
    begun = Path({begun!r} + ".tmp")
    begun.write_text(str(os.getpid()))
    begun.rename({begun!r})
    while not Path({go!r}).exists():  # as long as it imports
        time.sleep(0.05)
    workers.work(Path({claims!r}), [("a", lambda: time.sleep(3)), ("b", lambda: Path({done!r}).touch())])
else:
    workers.run_by_many([sys.executable, __file__], 60.0, 1)
"""


def test_worker_whose_parent_was_killed_while_it_imported_compiles_all_there_is(tmp_path):
    paths = {name: str(tmp_path / name) for name in ("begun", "go", "done", "claims")}
    (tmp_path / "claims").mkdir()
    script = tmp_path / "script.py"
    script.write_text(ORPHAN.format(**paths))
    parent = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(stages.ROOT)})
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    (tmp_path / "go").touch()
    worker = int((tmp_path / "begun").read_text())
    ends = time.time() + 60
    # it ends by itself, or does all
    while is_alive(worker) and time.time() < ends:
        time.sleep(0.05)
    assert not is_alive(worker) and not (tmp_path / "done").exists()


def is_alive(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    # whoever adopted it may not have fetched its end
    return state != "Z"
