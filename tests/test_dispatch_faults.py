"""What happens where a kernel does not start: whose fault that is, and who runs the op then."""

import warnings

import pytest
import torch
from fake_kernel import restart
from triton.runtime.errors import OutOfResources

import vitfast
from vitfast.choose import dispatch
from vitfast.ops import _launch


def test_kernel_that_does_not_compile_ends_the_step(monkeypatch):
    """No C compiler, a card that the assembler does not know: stock operators take over, with a warning, once."""
    restart(monkeypatch)

    def broken(problem):
        raise problem

    failing = RuntimeError("Failed to find C compiler.\nPlease specify")
    with pytest.warns(RuntimeWarning, match="attention .*Failed to find C compiler"):
        assert _launch.launched("attention", lambda: broken(failing)) is None
    assert "C compiler" in dispatch.switched_off("attention")
    assert _launch.launched("attention_backward", lambda: 7) == 7
    with pytest.raises(torch.OutOfMemoryError):
        _launch.launched("attention_backward", lambda: broken(torch.OutOfMemoryError("full")))
    assert dispatch.switched_off("attention_backward") is None
    with vitfast.backend("kernel", op="attention"), pytest.raises(RuntimeError, match="C compiler"):
        _launch.launched("attention_backward", lambda: broken(failing))


def raising(problem):
    def launch():
        raise problem

    return launch


CAPTURED = RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")
NOT_STARTED = "patch_embed did not start: CUDA error 900: operation not permitted when stream is capturing"


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    "kernel, problem, capturing",
    [
        ("attention", CAPTURED, True),
        ("attention", OutOfResources(99, 98, "shared memory"), True),
        ("patch_embed", RuntimeError(NOT_STARTED), True),
        # a capture in another thread
        ("linear", CAPTURED, False),
        ("mlp", torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture"), False),
    ],
)
def test_a_first_call_inside_a_capture_switches_a_kernel_off(monkeypatch, kernel, problem, capturing, forced):
    restart(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with vitfast.backend("kernel" if forced else "auto", op=kernel), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match=f"^{kernel}: .*call once before capturing") as raised:
            _launch.launched(kernel, raising(problem))
    assert raised.value.__cause__ is problem and str(problem) in str(raised.value)
    assert dispatch.switched_off(kernel) is None
    assert _launch.launched(kernel, lambda: 7) == 7


FULL = {
    "of torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    "when a module is loaded": RuntimeError("Triton Error [CUDA]: out of memory"),
    "when the extension starts": RuntimeError("patch_embed did not start: CUDA error 2: out of memory"),
    "of cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "of the host": MemoryError(),
}
LOST = "an illegal memory access was encountered"
BROKEN = {
    "by torch": torch.AcceleratorError(f"CUDA error: {LOST}"),
    "by an older torch": RuntimeError(f"CUDA error: {LOST}"),
    "by Triton": RuntimeError(f"Triton Error [CUDA]: {LOST}"),
    "by the extension": RuntimeError("patch_rows did not start: CUDA error 719: unspecified launch failure"),
    "by cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"),
}


def stays_on(problem, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(kind) as raised:
            _launch.launched("attention", raising(problem))
    assert problem in (raised.value, raised.value.__cause__)
    assert dispatch.switched_off("attention") is None


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("problem", FULL.values(), ids=FULL)
def test_a_full_memory_switches_a_kernel_off_or_cannot_be_caught_as_torch_raises_it(monkeypatch, problem, capturing):
    restart(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    stays_on(problem, torch.OutOfMemoryError)


@pytest.mark.parametrize("problem", BROKEN.values(), ids=BROKEN)
def test_a_lost_device_switches_a_kernel_off(monkeypatch, problem):
    restart(monkeypatch)
    stays_on(problem, type(problem))


def test_an_interrupt_switches_a_kernel_off(monkeypatch):
    restart(monkeypatch)
    stays_on(KeyboardInterrupt(), KeyboardInterrupt)


@pytest.mark.parametrize(
    "problem",
    [
        OutOfResources(300000, 232448, "shared memory"),
        RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
        RuntimeError("patch_embed did not start: CUDA error 701: too many resources requested for launch"),
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
        ValueError("captured by no grammar: an illegal instruction"),
    ],
)
def test_a_kernel_that_a_card_has_no_room_for_ends_the_step(monkeypatch, problem):
    restart(monkeypatch)
    with pytest.warns(RuntimeWarning, match="attention kernel"):
        assert _launch.launched("attention", raising(problem)) is None
    assert dispatch.switched_off("attention")
