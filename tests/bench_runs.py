"""A run whose state and output are in folders of a test, and a sweep that takes no time."""

import time

import run as program
import stages
import torch

from benchmarks.core.record import read

SWEEP = """
import argparse, json, sys
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path)
for name in ("resume", "tiny"):
    parser.add_argument(f"--{{name}}", action="store_true")
for name in ("limit", "compile"):
    parser.add_argument(f"--{{name}}", type=float)
told = parser.parse_args()
rows = json.loads(told.out.read_text())["rows"] if told.resume and told.out.exists() else {{}}
rows[f"row {{len(rows)}}"] = {{"stock": {{"ms": 1.0}}}}
told.out.write_text(json.dumps({{"schema": 1, "rows": rows, "machine": {{"commit": None}}}}))
sys.exit(({statuses})[len(rows) - 1])
"""


def runs_in(tmp_path, monkeypatch):
    """Makes runs that share one record."""
    for module in (stages, program):
        monkeypatch.setattr(module, "STATE", tmp_path / "state")
    # a run ends so many minutes after its process began, which here runs tests for longer than that
    monkeypatch.setattr(program, "BEGAN", time.perf_counter())

    def make_run(ends=1e9, data=None, **more):
        data = data or {"schema": 1, "run": {"device": "x"}, "earlier": [], "ceilings": {}, "rows": [], "skipped": []}
        kept = stages.Kept(tmp_path / "state" / "x-run.json", data, tmp_path / "out")
        return stages.Run(torch.device("cpu"), kept, ends, True, "x-run", **more)

    return make_run


def written(run):
    """The record as the output folder has it."""
    return read(run.out / run.record.path.name)
