"""A run whose state and output are in folders of a test, and whose stages are done in this process."""

import time

import torch

from benchmarks.core.record import read
from benchmarks.gpu import rows, run, stages, tests


class Clock:
    """Seconds that pass only when a stage says so."""

    now = 100.0

    def __call__(self):
        return self.now


def runs_in(tmp_path, monkeypatch):
    """Makes runs that share one record."""
    for module in (stages, rows, tests):
        monkeypatch.setattr(module, "STATE", tmp_path / "state")
    # a call ends so many minutes after its process began, which here runs tests for longer than that
    monkeypatch.setattr(run, "BEGAN", time.perf_counter())

    def make_run(data=None, tiny=True):
        data = data or {"schema": 1, "run": {"device": "x"}, "earlier": [], "ceilings": {}, "rows": [], "skipped": []}
        kept = stages.Kept(tmp_path / "state" / "x-run.json", data, tmp_path / "out")
        return stages.Run(torch.device("cpu"), kept, tiny)

    return make_run


def here(a_run):
    return lambda stage, budget_s: stages.perform(a_run, stage, budget_s)


def do(a_run, *plan, ends=1e9, start=None, **how):
    """What of ours failed by the record in the output folder."""
    run.go(plan, a_run, ends, start or here(a_run), **how)
    return [line for stage in plan for line in written(a_run)["stages"].get(stage.name, {"failed": []})["failed"]]


def written(a_run):
    """The record as the output folder has it."""
    return read(a_run.record.out / a_run.record.path.name)


def rows_of(cases, name="rows"):
    return stages.Stage(name, 60, rows.rows, makers=lambda run: [lambda case=case: case for case in cases])
