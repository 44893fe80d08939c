"""`benchmarks/gpu_stages.py` and `workers.py`: the sweep, tables made from it, and compilation by many processes."""

import json
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import ahead_process
import gpu_stages
import plans
import pytest
import stages
import torch
import workers
from bench_cases import layer_norm, make, named, variant
from bench_runs import SWEEP, runs_in, written

from vitfast.check.case import Variant


@pytest.fixture
def a_run(tmp_path, monkeypatch):
    return runs_in(tmp_path, monkeypatch)


@pytest.mark.parametrize("statuses, done, failed", [
    ((4, 4, 0), 3, 0), ((4, 0), 2, 0), ((1, 0), 1, 1), ((3, 0), 2, 1), ((2,), 1, 1),
])  # fmt: skip
def test_sweep_is_not_gone_on_with_or_its_failure_not_told(statuses, done, failed, a_run, tmp_path, monkeypatch):
    script = tmp_path / "sweep.py"
    script.write_text(SWEEP.format(statuses=(*statuses, 9)))
    monkeypatch.setattr(gpu_stages, "SWEEP", script)
    run, plan = a_run(), [plans.PLANS["tune"][1]]
    told = [line for _ in range(4) for line in stages.go(plan, run)]
    assert len(told) == failed and all(line.startswith("sweep: exit status") for line in told)
    assert len(json.loads((run.out / "x-tune.json").read_text())["rows"]) == done


def test_tables_of_the_sweep_are_not_those_of_the_models(a_run, tmp_path, monkeypatch):
    """This process has loaded the old ones."""
    begun, digests = [], ["a", "b"]
    script = tmp_path / "defaults.py"
    script.write_text("import sys; print(sys.argv[1:]); sys.exit(1)")
    monkeypatch.setattr(gpu_stages, "DEFAULTS", script)
    monkeypatch.setattr(gpu_stages, "tables", lambda: digests.pop(0))
    run = a_run(restart=lambda: begun.append(1))
    stages.go([plans.DEFAULTS], run)
    assert "no sweep" in written(run)["run"]["defaults"] and not begun
    run.tuned.write_text("{}")
    assert stages.go([plans.DEFAULTS], run) == []
    noted = written(run)["run"]["defaults"]
    assert noted["status"] == 1 and str(run.tuned) in noted["last"] and begun


REFUSES = """
import json, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
if out.exists() and json.loads(out.read_text())["kernels"] != "new":
    sys.exit(2)
out.write_text(json.dumps({"kernels": "new"}))
"""


def test_sweep_of_kernels_that_were_mended_is_never_made(a_run, tmp_path, monkeypatch):
    """Its record is of others, or of another driver: it was refused, and the stage counted as done."""
    script = tmp_path / "sweep.py"
    script.write_text(REFUSES)
    monkeypatch.setattr(gpu_stages, "SWEEP", script)
    run = a_run()
    run.tuned.parent.mkdir()
    run.tuned.write_text('{"kernels": "old"}')
    assert stages.go([plans.PLANS["tune"][1]], run) == []
    assert json.loads((run.out / run.tuned.name).read_text()) == {"kernels": "new"}
    assert json.loads(run.tuned.with_name(f"{run.tuned.name}.before").read_text()) == {"kernels": "old"}


def test_row_does_not_say_which_tables_it_was_timed_with(a_run, monkeypatch):
    """Rows that are there are not timed again when a later part of the sweep makes others."""
    run = a_run()
    for digest, name in (("old", "first"), ("new", "second")):
        monkeypatch.setattr(gpu_stages, "tables", lambda digest=digest: digest)
        cases = named(name)
        stage = stages.Stage(name, 60, 9, gpu_stages.rows, makers=lambda run, cases=cases: [lambda: cases[0]])
        stages.go([stage], run)
    assert [row["notes"]["tables"] for row in written(run)["rows"]] == ["old", "new"]


@pytest.mark.parametrize("source", ["a.cpp", "cuda/a.cu"])
def test_extension_of_sources_that_were_changed_is_kept(source, a_run, tmp_path, monkeypatch):
    """What is built stays in the tree when a later call brings other sources."""
    built, sources = [], tmp_path / "csrc" / source
    library = tmp_path / "vitfast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    for file in (sources, library):
        file.parent.mkdir(parents=True)
        file.write_text("one")
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(gpu_stages, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_stages, "started", lambda *_, **__: built.append(1) or (0, 1.0, "vitfast: built"))
    run = a_run()
    run.tiny = False
    library.unlink()
    stages.go([plans.EXTENSION], run)
    library.write_text("made")
    stages.go([plans.EXTENSION], run)
    assert len(built) == 1
    sources.write_text("two")
    stages.go([plans.EXTENSION], run)
    assert len(built) == 2


@pytest.mark.parametrize("extension", [True, False])
def test_extension_without_a_cuda_part_is_built_again_in_every_plan(extension, a_run, tmp_path, monkeypatch):
    """Where there is no nvcc, or where it fails: half a minute in each of six plans."""
    built = []
    library = tmp_path / "vitfast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    for folder in ("csrc", "vitfast"):
        (tmp_path / folder).mkdir()
    (tmp_path / "setup.py").touch()

    def build(*_, **__):
        built.append(1)
        if extension:
            library.touch()
        return 0, 1.0, "vitfast: built, no CUDA part: nvcc failed"

    monkeypatch.setattr(gpu_stages, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_stages, "started", build)
    monkeypatch.setattr(gpu_stages.compiled_half, "cuda_status", lambda: {"why": "no CUDA part: nvcc failed"})
    monkeypatch.setattr(gpu_stages.compiled_half, "build_report", lambda: {"cuda": False})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("VITFAST_CUDA_ARCHS", "90a")
    run = a_run()
    run.tiny, run.device = False, torch.device("cuda")
    for _ in range(3):
        stages.go([plans.EXTENSION], run)
    assert len(built) == 1 and run.no_extension
    # somebody puts it there
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: "/opt/nvcc")
    stages.go([plans.EXTENSION], run)
    assert len(built) == 2


def test_nvcc_that_is_where_the_toolkit_puts_it_is_not_found(monkeypatch):
    """As compute-sanitizer and ncu are."""
    there = "/usr/local/cuda/bin/nvcc"
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: name if name == there else None)
    assert gpu_stages.nvcc() == there
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: f"/opt/{name}" if name == "nvcc" else None)
    assert gpu_stages.nvcc() == "/opt/nvcc"


# workers


def model_case(batch, mode, name):
    return make({"torch": variant(layer_norm), "vitfast": variant(layer_norm, ours=True)}, kind="model", mode=mode,
                name=name, batch=batch, shape={"tokens": 197, "dim": 768, "depth": 12})  # fmt: skip


def test_variant_is_compiled_twice_or_by_who_has_no_memory(tmp_path, monkeypatch):
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

    monkeypatch.setattr(ahead_process, "cases", lambda plan, run: map(counting, cases))
    monkeypatch.setattr(ahead_process, "SHARE", 2e-8)  # of what stands for a CPU's memory: for one heavy one
    run = stages.Run(torch.device("cpu"), None, 0.0, True, "x")
    for number in (3, 0, 1):
        monkeypatch.setenv(workers.NUMBER, str(number))
        taken[number] = []
        # as `workers.work` claims them
        for task, call in ahead_process.tasks("models", run):
            if task not in {each for tasks in taken.values() for each in tasks}:
                taken[number].append(task)
                with pytest.raises(ValueError, match="does not compile"):
                    call()
    assert taken == {3: [f"{cases[0].key}: vitfast"], 0: [f"{cases[1].key}: vitfast"], 1: []}
    assert {name: len(times) for name, times in built.items()} == {"light": 1, "heavy": 1}
    assert not ahead_process.compiles("timm max-autotune", Variant(layer_norm))
    assert ahead_process.compiles("timm reduce-overhead", Variant(layer_norm))


def test_shape_in_which_gradients_are_judged_is_compiled_by_who_times():
    batches = []
    case = make({}, batch=64, mode="forward+backward", per_image=(True, False))
    ahead_process.call_once(case, variant(lambda x, *_: batches.append(len(x))))
    assert batches == [64, case.check_images]
    ahead_process.call_once(replace(case, per_image=(True,)), variant(lambda x, *_: batches.append(len(x))))
    assert batches[2:] == [64]


ORPHAN = """
import os, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {benchmarks!r}]
if "--claims" in sys.argv:
    begun = Path({begun!r} + ".tmp")
    begun.write_text(str(os.getpid()))
    begun.rename({begun!r})
    while not Path({go!r}).exists():  # as long as it imports
        time.sleep(0.05)
    import workers
    workers.work(Path({claims!r}), [("a", lambda: time.sleep(3)), ("b", lambda: Path({done!r}).touch())])
else:
    import workers
    workers.run_by_many([sys.executable, __file__], 1, 60.0)
"""


def test_worker_whose_parent_was_killed_while_it_imported_compiles_all_there_is(tmp_path):
    paths = {name: str(tmp_path / name) for name in ("begun", "go", "done", "claims")}
    (tmp_path / "claims").mkdir()
    script, root = tmp_path / "script.py", stages.ROOT
    script.write_text(ORPHAN.format(root=str(root), benchmarks=str(root / "benchmarks"), **paths))
    parent = subprocess.Popen([sys.executable, str(script)])
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
