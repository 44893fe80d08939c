"""How kernels are started: what is compiled is kept, by all that decides how, and is loaded again where it was not."""

import types

import aot_samples
import pytest
import torch
import triton
from fake_kernel import restart
from triton.backends.compiler import GPUTarget

from vitfast.choose import dispatch
from vitfast.kernels.triton import launch
from vitfast.ops import _launch


class Driver:
    """Of a GPU that refuses to load kernels until it is told otherwise; `started` has what was started with which."""

    def __init__(self):
        self.problem, self.utils, self.started, self.loaded = None, self, [], 0
        self.launcher_cls = lambda source, metadata: lambda x, y, z, stream, function, *rest: self.start(function)

    def start(self, function):
        if function is None:
            raise TypeError("'NoneType' object cannot be interpreted as an integer")
        self.started.append(function)

    def load_binary(self, *_):
        if self.problem is not None:
            raise self.problem
        self.loaded += 1
        return "module", "function", 16, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 17}

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def driver(monkeypatch, tmp_path):
    found = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", found)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    return found


def tensor(at=64, dtype=torch.float32):
    return types.SimpleNamespace(get_device=lambda: -1, dtype=dtype, data_ptr=lambda: at)


ALIGNED = tensor()


def copy(sample, how="narrow", x=ALIGNED, warps=4, registers=0):
    constants = {"HOW": how, "BM": 16, "C": 32}
    launch.launch(sample, (1,), (x, ALIGNED), (32, 2), constants, warps, registers=registers)
    return "done"


def test_a_kernel_that_could_not_be_loaded_never_runs_again(driver, monkeypatch):
    """Triton keeps what it compiled, and has to try again to load it."""
    restart(monkeypatch)
    sample = triton.JITFunction(aot_samples.copy_rows.fn)
    run = lambda how: _launch.launched("attention", lambda: copy(sample, how))  # noqa: E731
    assert run("narrow") == "done"
    captured = RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")
    for driver.problem in (RuntimeError("Triton Error [CUDA]: out of memory"), captured):
        with pytest.raises(RuntimeError):
            run("wide")
    driver.problem = None
    assert run("wide") == run("narrow") == "done" and driver.started == ["function"] * 3
    assert dispatch.switched_off("attention") is None


OTHERS = {
    "a constant": {"how": "wide"}, "where a tensor begins": {"x": tensor(at=66)},
    "a dtype": {"x": tensor(dtype=torch.float16)}, "warps": {"warps": 8}, "registers": {"registers": 64},
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_a_kernel_is_started_that_was_compiled_for_something_else(what, driver):
    sample = triton.JITFunction(aot_samples.copy_rows.fn)
    copy(sample)
    copy(sample, **OTHERS[what])
    assert driver.loaded == 2


def test_a_kernel_is_compiled_or_loaded_twice(driver):
    sample = triton.JITFunction(aot_samples.copy_rows.fn)
    for at in (64, 160):
        copy(sample, x=tensor(at=at))
    assert driver.loaded == 1 and driver.started == ["function"] * 2


def test_numbers_past_31_bits_trade_places(driver):
    """Each whole number is compiled for its own width."""
    sample = triton.JITFunction(aot_samples.copy_rows.fn)
    for numbers in ((1 << 32, 32), (32, 1 << 32)):
        constants = {"HOW": "narrow", "BM": 16, "C": 32}
        launch.launch(sample, (1,), (ALIGNED, ALIGNED), numbers, constants, 4)
    assert driver.loaded == 2
