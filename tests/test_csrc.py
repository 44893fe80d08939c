"""The folders of csrc: what each may include, and that whoever has to know the sources knows all of them."""

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.aot import __main__ as aot
from benchmarks.gpu import sweep

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
FILES = {path for path in CSRC.rglob("*") if path.is_file()}


def included(path):
    """What a file of csrc includes of csrc, and what that includes."""
    names = re.findall(r'#include "(.*)"', path.read_text())
    # the host's stand-ins for CUDA are of the tests
    direct = {CSRC / name for name in names if not name.endswith("_on_host.h")}
    return direct.union(*map(included, direct))


def included_by(folder):
    return set().union(*(included(path) for path in FILES if path.is_relative_to(CSRC / folder)))


@pytest.mark.parametrize("folder, other", [("cpu", "cuda"), ("cuda", "cpu")])
def test_kernels_for_one_device_include_a_header_of_the_other(folder, other):
    assert not [path for path in included_by(folder) if path.is_relative_to(CSRC / other)]


def test_header_in_shared_is_of_one_device_only():
    assert {path for path in FILES if path.is_relative_to(CSRC / "shared")} == included_by("cpu") & included_by("cuda")


@pytest.fixture
def digested(monkeypatch):
    """Paths that a module's next digest is of."""
    paths = set()

    def digest_of(each):
        paths.update(each)
        return ""

    monkeypatch.setattr(sweep.tuning_cache, "digest_of", digest_of)
    monkeypatch.setattr(aot, "digest_of", digest_of)
    return paths


def test_sweep_of_other_sources_is_continued(digested):
    sweep.kernels_digest()
    assert not FILES - digested


def test_record_of_compiled_kernels_is_of_a_header_that_was_changed(digested):
    aot.sources()
    compiled = {path for path in FILES if path.suffix == ".cu"}
    assert {str(path) for path in compiled} == {*aot.CUDA_SOURCES}
    assert compiled.union(*map(included, compiled)) <= digested


def test_make_installs_nothing_where_a_source_was_changed():
    told = subprocess.run(
        ["make", "--eval", "inputs: ; @echo $(INPUTS)", "inputs"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {str(path.relative_to(ROOT)) for path in FILES} <= {*told.stdout.split()}
