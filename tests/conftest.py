"""What every test gets: a fixed seed, its share of the cores, and a device."""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vitfast.kernels import plans
from vitfast.ops import _on_cpu

# for `benchmarks`; last, so that a process that was given another copy of the package has that one
sys.path.append(str(Path(__file__).parent.parent))


def pytest_configure(config):
    # what is compared with fp64 at fp32's accuracy is meant to be fp32
    torch.backends.cudnn.allow_tf32 = False
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, (os.cpu_count() or 1) // workers)
        # for the processes that tests start
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="with the tests marked `full`: what `make test-all` adds")


def pytest_collection_modifyitems(config, items):
    # on a GPU, where kernels take no time to speak of, all are run
    for_later = [] if config.getoption("--all") else [item for item in items if is_full(item)]
    if for_later:
        config.hook.pytest_deselected(items=for_later)
        items[:] = [item for item in items if not is_full(item)]
    # long ones first: workers that have nothing left to take wait for the last of them
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def is_full(item):
    return item.get_closest_marker("full") is not None and item.get_closest_marker("gpu") is None


@pytest.fixture(autouse=True)
def seed():
    """The same numbers whichever tests ran before, in whichever worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def ops_whatever_the_size(request, monkeypatch):
    """Ops at sizes where a CPU would run stock operators, since models in tests are small.

    test_on_cpu.py is without it, and so are all programs that tests start.
    """
    if request.node.get_closest_marker("as_users") is None:
        monkeypatch.setattr(_on_cpu, "HOST_BOUND", 0)
        monkeypatch.setattr(_on_cpu, "TRAINING_BOUND", 0)
        monkeypatch.setattr(_on_cpu, "WEIGHTS_IN_HALF", False)
        monkeypatch.setattr(_on_cpu, "LIMITS", dict.fromkeys(_on_cpu.LIMITS, 0))


@pytest.fixture(autouse=True)
def no_plans():
    """Tests replace what launchers ask and start; only tests of plans are about calls that are made again."""
    plans.forget()


DEVICES = ["cpu"] + [pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device of this machine in turn."""
    return torch.device(request.param)
