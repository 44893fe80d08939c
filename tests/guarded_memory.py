"""Tests on memory whose ends fault: each tensor ends, or begins, at 64 MiB that nobody may touch, and is NaN at first.

A parent runs the tests of a file in a process with tests/native/guarded_memory.cpp preloaded, where this module is a
plugin of pytest: on where a test's body begins, off where it ends. A test says by an argument `placement` which end it
is about, else the environment does.
"""

import ctypes
import fcntl
import os
import subprocess
import sys

import pytest
from native_build import PROGRAMS, ROOT, find_compiler

PLACEMENTS = {"end": 1, "begin": 2}
CASE = "on guarded memory: "


def library(tmp_path_factory):
    """Built once for all of xdist's processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if folder.name.startswith("popen-") else folder
    target = folder / "guarded_memory.so"
    with open(folder / "guarded_memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-fPIC", "-shared"]
            command = [*find_compiler().split(), *flags, PROGRAMS / "guarded_memory.cpp", "-o", target, "-ldl"]
            built = subprocess.run(command, capture_output=True, text=True)
            assert built.returncode == 0, built.stderr
    return target


def run_guarded(tmp_path_factory, file, *options, **environment):
    """Run tests of a file on guarded memory up to the first that fails: its name and why, or None where none does."""
    preloaded = library(tmp_path_factory)
    command = [sys.executable, "-m", "pytest", "-p", "guarded_memory", "-c", ROOT / "pyproject.toml", "-n", "0", "-x"]
    # what is written as the process dies must not be captured in it
    command += ["-q", "-s", "--tb", "short", "-p", "no:cacheprovider", "-p", "no:warnings", *options, file]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT / "tests")]))
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=preloaded.parent,
        env=os.environ | {"LD_PRELOAD": str(preloaded), "PYTHONPATH": path} | environment,
    )  # fmt: skip
    if done.returncode == 0:
        return None
    lines = [line for line in done.stdout.splitlines() if "/_pytest/" not in line and "/pluggy/" not in line]
    last = next((line for line in reversed(lines) if line.startswith(CASE)), "before any case")
    return "\n".join([last, *lines[-40:]])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    print(f"\n{CASE}{item.name}", flush=True)
    preloaded, wrong = ctypes.CDLL(None), ctypes.c_char_p()
    placement = getattr(item, "callspec", None) and item.callspec.params.get("placement")
    preloaded.guarded_memory(PLACEMENTS[placement or os.environ["VITFAST_GUARDED_MEMORY"]])
    try:
        return (yield)
    finally:
        preloaded.guarded_memory(0)
        preloaded.guarded_blocks(ctypes.byref(wrong))
        assert wrong.value is None, wrong.value.decode()
