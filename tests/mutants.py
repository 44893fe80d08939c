"""Copies of the package with one change in its source, and the tests that are run on them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import vitfast

PACKAGE = Path(vitfast.__file__).parent
KERNELS = PACKAGE / "kernels/triton"
TESTS = Path(__file__).parent
CODE = (
    "import sys, pytest, vitfast; assert vitfast.__file__.startswith(sys.argv[1]), vitfast.__file__;"
    "sys.exit(pytest.main(sys.argv[2:]))"
)


def run_on_mutant(folder, name, text, *chosen, timeout=None, room="kernels/triton"):
    """Run tests up to the first that fails, of kernels in Triton's interpreter, on a copy of the package in `folder`.

    Args:
        name: of a file, as seen from the room.
        text: all of its source, changed.
        chosen: pytest's arguments that choose tests.
        timeout: seconds, after which it raises subprocess.TimeoutExpired.
    """
    if not (folder / "vitfast").exists():
        shutil.copytree(PACKAGE, folder / "vitfast", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "vitfast" / room / name).write_text(text)
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    if room == "kernels/triton":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-c", CODE, folder, "-x", "-q", "-p", "no:cacheprovider", "-p", "no:warnings"]
    command += ["-c", TESTS.parent / "pyproject.toml", *chosen]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, cwd=folder, timeout=timeout
    )


def is_seen(done):
    """Whether a test failed; a crash by a signal, as of an address far away, is seen as well."""
    assert "AssertionError: /" not in done.stderr, done.stderr
    # 5 would be: no test was chosen
    assert done.returncode in (0, 1) or done.returncode < 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode != 0
