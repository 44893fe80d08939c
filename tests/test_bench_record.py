"""The file of a run: whole at any time, continued, merged."""

import importlib.machinery
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.core import record
from benchmarks.core.record import SCHEMA, Record, merge, open_for_resume, read, write_json
from vitfast.measure import machine

H200 = {"device": "NVIDIA H200", "date": "2026-01-01T00:00:00Z", "commit": "aaaa"}


def row(key, ms=1.0, **more):
    variant = {"not_timed": "no time left"} if ms is None else {"ms": ms, "ours": True}
    return {"key": key, "variants": {"vitfast": variant}} | more


def written(path, run=H200, rows=(), **more):
    write_json(path, {"schema": SCHEMA, "run": run, "rows": list(rows), **more})
    return path


def times(data):
    return {each["key"]: each["variants"]["vitfast"].get("ms") for each in data["rows"]}


# whole at any time


def test_a_row_is_not_on_disk_when_the_next_begins(tmp_path, monkeypatch):
    # a file from another folder may be on another file system, where renaming is not atomic
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    file = Record(tmp_path / "new" / "run.json", H200)
    for n in range(3):
        file.add(row(f"row {n}"))
        assert list(times(read(file.path))) == [f"row {i}" for i in range(n + 1)]
    file.add(row("row 1", 9.0))
    assert times(read(file.path)) == {"row 0": 1.0, "row 1": 9.0, "row 2": 1.0}
    assert all(each["commit"] == "aaaa" and each["date"] > "2026" for each in read(file.path)["rows"])
    assert os.listdir(file.path.parent) == ["run.json"]


def test_a_write_that_is_cut_short_destroys_what_was_there(tmp_path, monkeypatch):
    file = Record(tmp_path / "run.json", H200)
    file.add(row("first"))

    def cut_short(_):
        """With all or a part of the text written."""
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", cut_short)
    with pytest.raises(KeyboardInterrupt):
        file.add(row("second"))
    assert times(read(file.path)) == {"first": 1.0} and os.listdir(tmp_path) == ["run.json"]


def test_numbers_that_json_does_not_have_are_written(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": math.inf, "b": [math.nan, 1.5], "c": {"d": Path("x")}, 3: (True, None)})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5], "c": {"d": "x"}, "3": [True, None]}


# continued


def test_a_record_is_continued_that_this_version_does_not_know(tmp_path):
    path = tmp_path / "run.json"
    for schema, text in ((2, "schema 2 "), ("1", "schema '1' "), (None, "schema None ")):
        write_json(path, {"schema": schema, "run": {}, "rows": []})
        with pytest.raises(ValueError, match=f"run.json: {text}is not known, expected {SCHEMA}"):
            read(path)
    write_json(path, {"run": {}, "rows": []})
    with pytest.raises(ValueError, match="run.json: schema 'none' is not known"):
        open_for_resume(path, H200)


@pytest.mark.parametrize(
    "text, why",
    [
        ('{"schema": 1, "run": {}, "rows": [{"key": "a"', "cut short"),
        ("", "cut short"),
        ("\x00\x01", "not a record"),
        ("[1, 2]", "schema 'none'"),
        ('{"schema": 1, "run": {}}', "it lacks rows"),
        ('{"schema": 1, "run": {}, "rows": [{"ms": 1}]}', "rows with key and variants"),
    ],
)
def test_a_broken_file_is_taken_for_an_empty_one_or_not_named(tmp_path, text, why):
    path = tmp_path / "run.json"
    path.write_text(text)
    for use in (lambda: read(path), lambda: open_for_resume(path, H200), lambda: merge([path])):
        with pytest.raises(ValueError, match=f"run.json.*{why}"):
            use()
    assert path.read_text() == text


def test_bytes_that_are_no_text_end_in_another_error(tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match="run.json: not a record"):
        read(path)


def test_an_earlier_record_is_overwritten(tmp_path):
    path = written(tmp_path / "run.json", rows=[row("a")])
    before = record.set_aside(path)
    assert before.name == "run.json.before" and not path.exists() and times(read(before)) == {"a": 1.0}
    assert record.set_aside(path) is None and before.exists()


def test_a_continued_record_forgets_rows_or_runs_or_mixes_devices(tmp_path):
    path = written(tmp_path / "run.json", rows=[row("a"), row("b", None)], ceilings={"copy": {"gbps": 1.0}},
                   skipped=[{"stage": "ops", "key": "c", "why": "no time left"}])  # fmt: skip
    later = H200 | {"date": "2026-01-02T00:00:00Z", "commit": "bbbb"}
    resumed = open_for_resume(path, later)
    assert resumed.finished() == {"a"} and resumed.data["ceilings"] == {"copy": {"gbps": 1.0}}
    resumed.add(row("c"))
    data = read(path)
    assert data["run"] == later and data["earlier"] == [H200] and data["skipped"] == []
    assert [each.get("commit") for each in data["rows"]] == [None, None, "bbbb"]
    with pytest.raises(ValueError, match="run.json: NVIDIA H200; this run: NVIDIA A100"):
        open_for_resume(path, {"device": "NVIDIA A100"})
    assert open_for_resume(tmp_path / "none.json", later).finished() == set()


def test_rows_of_other_threads_or_another_instruction_set_are_gone_on_with(tmp_path, monkeypatch):
    """Of one CPU, and the record says of all of them what the last call had."""
    monkeypatch.delenv("VITFAST_CPU_ISA", raising=False)
    here = machine.describe()
    path = written(tmp_path / "run.json", run=here, rows=[row("a")])
    assert open_for_resume(path, machine.describe()).finished() == {"a"}
    # as records are that are older than the choice
    older = {name: value for name, value in here.items() if name != "cpu_isa"}
    assert open_for_resume(path, older).finished() == {"a"}
    with pytest.raises(ValueError, match=f"{here['threads']} threads; this run: .*, 77 threads"):
        open_for_resume(path, here | {"threads": 77})
    monkeypatch.setenv("VITFAST_CPU_ISA", "portable")
    with pytest.raises(ValueError, match="threads, VITFAST_CPU_ISA=portable"):
        open_for_resume(path, machine.describe())
    gpu = {"device": "NVIDIA H200", "device_type": "cuda", "threads": 2}
    path = written(tmp_path / "gpu.json", run=gpu, rows=[row("a")])
    assert open_for_resume(path, gpu | {"threads": 8}).finished() == {"a"}


def test_a_case_is_listed_as_skipped_twice(tmp_path):
    file = Record(tmp_path / "run.json", H200)
    file.skip("a", ["x", "y"], "first reason")
    file.skip("b", ["y", "z"], "second reason")
    assert [(each["stage"], each["key"]) for each in read(file.path)["skipped"]] == [("a", "x"), ("b", "y"), ("b", "z")]


# merged


def test_of_two_rows_the_older_or_the_empty_one_stays(tmp_path):
    old, new = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"
    later = H200 | {"date": "2026-01-15T00:00:00Z", "commit": "bbbb"}
    firsts = [row("a", 1.0, date=old), row("b", 1.0, date=new), row("c", 1.0, date=old)]
    seconds = [row("a", 2.0, date=new), row("b", 2.0, date=old), row("c", None, date=new), row("d", 2.0, date=new)]
    more = {"ceilings": {"copy": {"gbps": 1.0}}, "skipped": [{"key": "d"}, {"key": "e"}]}
    first, second = written(tmp_path / "1.json", H200, firsts, **more), written(tmp_path / "2.json", later, seconds)
    for order in ([first, second], [second, first]):
        data = merge(order)
        assert times(data) == {"a": 2.0, "b": 1.0, "c": 1.0, "d": 2.0}
        assert data["run"] == later and data["earlier"] == [H200] and data["ceilings"] == {"copy": {"gbps": 1.0}}
        assert data["skipped"] == [{"key": "e"}] and data["schema"] == SCHEMA
    write_json(tmp_path / "both.json", data)
    assert read(tmp_path / "both.json") == data


def test_rows_of_two_devices_are_merged_unasked(tmp_path):
    first = written(tmp_path / "1.json", rows=[row("a")])
    second = written(tmp_path / "2.json", H200 | {"device": "NVIDIA A100"}, [row("b")])
    with pytest.raises(ValueError, match="1.json: NVIDIA H200; .*2.json: NVIDIA A100"):
        merge([first, second])
    with pytest.raises(ValueError, match="at least one file"):
        merge([])


# what a run was


def git(folder, *command):
    subprocess.run(["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *command], check=True,
                   capture_output=True)  # fmt: skip


def test_the_commit_of_somebody_else_s_repository_is_given(tmp_path, monkeypatch):
    monkeypatch.delenv("VITFAST_COMMIT", raising=False)
    git(tmp_path, "init")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    found = machine.commit(tmp_path)
    assert len(found["commit"]) >= 7 and found["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert machine.commit(tmp_path)["dirty"] is True
    copied = tmp_path / "site-packages"
    copied.mkdir()
    assert machine.commit(copied)["commit"] is None and "VITFAST_COMMIT" in machine.commit(copied)["why_no_commit"]


def test_results_that_a_run_set_aside_count_as_local_changes(tmp_path):
    """A run that replaces the committed records says of itself that its source was changed; or hides real changes."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for path in (results / "a.json", results.parent / "run.py", tmp_path / "file"):
        path.write_text("one")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    (results / "a.json").rename(results / "a.json.before")
    assert machine.commit(tmp_path)["dirty"] is False
    (results.parent / "run.py").write_text("two")
    assert machine.commit(tmp_path)["dirty"] is True


def test_a_plain_copy_cannot_be_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.delenv("VITFAST_COMMIT", raising=False)
    (tmp_path / "COMMIT").write_text("1234abc-dirty\n")
    assert machine.commit(tmp_path) == {"commit": "1234abc", "dirty": True}
    monkeypatch.setenv("VITFAST_COMMIT", "5678def")
    assert machine.commit(tmp_path) == {"commit": "5678def", "dirty": False}


def test_a_run_does_not_say_what_its_times_depend_on():
    run = machine.describe(packages=("numpy", "no-such-package"))
    for name in ("command", "date", "commit", "dirty", "device", "cpu_capability", "threads", "torch", "triton", "timm",
                 "transformers", "vit-pytorch", "vitfast", "cuda", "tf32", "numpy"):  # fmt: skip
        assert name in run, name
    assert run["no-such-package"] is None and run["numpy"] and run["date"].endswith("Z") and run["threads"] > 0
    json.dumps(run)


@pytest.mark.parametrize("module, command", [
    ("benchmarks.__main__", "python -m benchmarks gpu check"),
    ("benchmarks.gpu.run", "python -m benchmarks.gpu.run gpu check"),
    (None, "python benchmarks/__main__.py gpu check"),
])  # fmt: skip
def test_command_of_a_record_cannot_be_run(module, command, monkeypatch):
    """The file of a module that finds its package only by -m, or arguments of another module."""
    spec = module and importlib.machinery.ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec, raising=False)
    monkeypatch.setattr(sys, "argv", [str(machine.ROOT / "benchmarks/__main__.py"), "gpu", "check"])
    assert machine.describe()["command"] == command


def test_record_holds_a_path_of_the_machine():
    """Of who ran it, and where: the command line of a run that was given whole paths."""
    inside, outside = machine.ROOT / "benchmarks" / "sweep.py", "/home/somebody/out/r.json"
    told = [str(inside), "--out", outside, f"--state={machine.ROOT}/benchmarks/state", "--sets=a,b", "-c", "x = 1 / 2"]
    found = machine.command_of(told)
    assert found == "python benchmarks/sweep.py --out r.json --state=benchmarks/state --sets=a,b -c 'x = 1 / 2'"
    for file in (machine.ROOT / machine.RESULTS).rglob("*.json"):
        commands = re.findall(r'"command": "(.*)"', file.read_text())
        assert [command for command in commands if re.search(r"(^|[\s=])/", command)] == [], file
