"""The process that `apart` runs one variant of a case in.

python -m vitfast.bench.apart_process --factory package.module.function --arguments JSON --variant NAME ...
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import torch

from vitfast.bench.harness import run_case
from vitfast.measure.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vitfast.bench.apart_process")
    parser.add_argument("--factory", required=True)
    parser.add_argument("--arguments", type=json.loads, required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--precision", required=True, help="for torch.set_float32_matmul_precision")
    parser.add_argument("--json", type=Path, required=True)
    told = parser.parse_args()
    threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()
    torch.set_num_threads(told.threads)
    torch.set_float32_matmul_precision(told.precision)
    module, _, function = told.factory.rpartition(".")
    case = getattr(importlib.import_module(module), function)(**told.arguments)
    kept = dict.fromkeys([case.baseline, case.yardstick, told.variant])
    variants = {name: dataclasses.replace(case.variants[name], apart=None) for name in kept}
    write_json(told.json, run_case(dataclasses.replace(case, variants=variants), seconds=told.seconds))


def _end_with_parent(parent: int) -> None:
    """A parent that is killed ends nobody."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
