"""Which implementation an op runs on a GPU: this package's kernel, or the stock PyTorch operators.

Every call of an op asks `choose`. What decides, the first that applies:

1. what the user forces, with `set_backend` or `backend`;
2. whether the kernel can run here at all, and passed `vitfast.warmup`'s check;
3. what `vitfast tune` or `vitfast.warmup` measured on this card for this shape;
4. `vitfast.choose.builtin`: what was measured on cards of this architecture, or where nothing was, a careful choice.

Nothing here imports triton or asks a device for anything until an op runs on one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from vitfast.choose import builtin, config_tables, tuning_cache
from vitfast.choose.builtin import Builtin
from vitfast.choose.tuning_cache import Choice, Table

BACKENDS = ("auto", "kernel", "stock")

Config = Mapping[str, int | str]


# by the name of the torch op whose work it is, its source. A backward is chosen apart from its forward
KERNELS: dict[str, str] = {
    "attention": "vitfast/kernels/triton/attention_forward.py",
    "attention_backward": "vitfast/kernels/triton/attention_backward.py",
    "layer_norm": "vitfast/kernels/triton/layer_norm_rows.py",
    "layer_norm_backward": "vitfast/kernels/triton/layer_norm_rows.py",
    "linear": "vitfast/kernels/triton/linear_product.py",
    "linear_backward": "vitfast/kernels/triton/linear_product.py",
    "folded_linear": "vitfast/kernels/triton/linear_product.py",
    "added_linear": "vitfast/kernels/triton/linear_product.py",
    "prepared_block": "vitfast/kernels/triton/layer_norm_rows.py",
    "mlp": "vitfast/kernels/triton/linear_product.py",
    "mlp_backward": "vitfast/kernels/triton/linear_product.py",
    "patch_embed": "csrc/cuda/patch_embed.cuh",
    "patch_embed_backward": "csrc/cuda/patch_gradient.cuh",
}


class Seen(NamedTuple):
    """What `choose` was asked, and what it answered."""

    kernel: str
    shape: tuple[Hashable, ...]
    device: Hashable
    taken: bool


class Trial(NamedTuple):
    """What one kernel is to do in this thread, whatever anybody else decided."""

    kernel: str
    backend: str
    config: Config | None


class _ThisThread(threading.local):
    trial: Trial | None = None
    seen: list[Seen] | None = None


_thread = _ThisThread()
_forced: dict[str, str] = {}
_off: dict[str, str] = {}
_tables: dict[Hashable, Table] = {}
# how often this process learned
_lessons = 0


def language(kernel: str) -> str:
    """What a kernel is written in, "Triton" or "CUDA"."""
    return "CUDA" if KERNELS[kernel].startswith("csrc/") else "Triton"


def set_backend(backend: str, op: str | None = None) -> None:
    """Choose who computes on GPUs, for the whole process and from the next call on.

    Compiled models follow without being compiled again, CUDA graphs stay as they were captured.

    Args:
        backend: "auto", the default: the faster one as far as it was measured, else a careful choice; "kernel": the
            kernel, or an error where it cannot run; "stock": stock PyTorch operators.
        op: a name from `vitfast info`'s list of kernels; an op includes its backward. None: all of them; "kernel" then
            leaves `prepared_block` as it is, both of whose forms are made of kernels.

    Raises:
        ValueError: unknown backend or op.
    """
    if backend not in BACKENDS:
        raise ValueError(f"set_backend: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    for name in _names(op):
        if op is not None or backend != "kernel" or name not in builtin.FORMS:
            _force(name, backend)


@contextlib.contextmanager
def backend(name: str, op: str | None = None) -> Iterator[None]:
    """`set_backend` inside a `with`, for all threads; afterwards the earlier choice holds again."""
    before = {each: _forced.get(each, "auto") for each in _names(op)}
    set_backend(name, op)
    try:
        yield
    finally:
        for each, earlier in before.items():
            _force(each, earlier)


def _force(name: str, backend: str) -> None:
    if backend == "auto":
        _forced.pop(name, None)
    else:
        _forced[name] = backend


def _names(op: str | None) -> list[str]:
    names = [name for name in KERNELS if op is None or name in (op, f"{op}_backward")]
    if not names:
        raise ValueError(f"set_backend: op must be one of {', '.join(KERNELS)}, or None for all, got {op!r}")
    return names


def choose(kernel: str, shape: tuple[Hashable, ...], device: Hashable, why_not: Sequence[str]) -> bool:
    """Whether the kernel runs this call: True for the kernel, False for stock operators.

    Args:
        kernel: a name of `KERNELS`.
        shape: what choices are kept under: strings and ints, as coarse as the kernel's own choices are.
        device: index of the CUDA device; None in Triton's interpreter.
        why_not: reasons why the kernel cannot run this call; empty where it can.

    Raises:
        NotImplementedError: the kernel was asked for and cannot run; with all the reasons.
    """
    trial = _thread.trial
    tried = trial is not None and trial.kernel == kernel
    wanted = trial.backend if trial is not None and tried else _forced.get(kernel)
    if wanted == "stock":
        taken = False
    elif wanted == "kernel":
        reasons = list(why_not)
        if kernel in _off and not tried:
            reasons.append(f"switched off: {_off[kernel]}")
        if reasons:
            raise NotImplementedError(f"{kernel}: the kernel was asked for and cannot run: {'; '.join(reasons)}")
        taken = True
    elif why_not or kernel in _off:
        taken = False
    else:
        choice = _table(device).get((kernel, shape))
        taken = built_in(kernel, shape, device).kernel if choice is None else choice.kernel
    if _thread.seen is not None:
        _thread.seen.append(Seen(kernel, shape, device, taken))
    return taken


def config_for(kernel: str, shape: tuple[Hashable, ...], device: Hashable) -> Config | None:
    """The configuration that the kernel shall run this shape with; None where its launcher is to choose."""
    trial = _thread.trial
    if trial is not None and trial.kernel == kernel:
        return trial.config
    choice = _table(device).get((kernel, shape))
    if choice is not None and choice.config is not None:
        return choice.config
    found = built_in(kernel, shape, device)
    return found.config if found.kernel else None


def stock_config(kernel: str, shape: tuple[Hashable, ...], device: Hashable) -> Config | None:
    """Which stock operators shall run this shape where the kernel does not; None for the usual ones.

    Where they were tuned against a kernel these are the ones that were the fastest.
    """
    trial = _thread.trial
    if trial is not None and trial.kernel == kernel:
        return trial.config if trial.backend == "stock" else None
    choice = None if kernel in _forced else _table(device).get((kernel, shape))
    if choice is not None and choice.stock is not None:
        return choice.stock
    found = built_in(kernel, shape, device)
    return None if found.kernel or kernel in _forced else found.config


def built_in(kernel: str, shape: tuple[Hashable, ...], device: Hashable) -> Builtin:
    """What `vitfast.choose.builtin` says for this device."""
    # without a device it is Triton's interpreter, which is there to test kernels
    if (device is None or builtin.EVERYWHERE) and kernel not in builtin.FORMS:
        return builtin.ALWAYS
    if device is None:
        return builtin.careful(kernel, shape, 0)
    return builtin.builtin(kernel, shape, _architecture(device))


@functools.cache
def _architecture(device: Any) -> int:
    return config_tables.architecture_of(torch.cuda.get_device_capability(device))


def _table(device: Hashable) -> Table:
    table = _tables.get(device)
    if device is None or builtin.EVERYWHERE:
        # tests of kernels, in Triton's interpreter or not
        return {}
    if table is None:
        table = _tables[device] = tuning_cache.load(device)
    return table


def cached(kernel: str, shape: tuple[Hashable, ...], device: Hashable) -> Choice | None:
    """What was tuned or measured for this shape, None where nothing was."""
    return _table(device).get((kernel, shape))


def learn(device: Hashable, choices: Table) -> None:
    """Let `choices` hold from now on, in this process."""
    global _lessons
    _tables[device] = {**_table(device), **choices}
    _lessons += 1


def decided() -> Hashable:
    """What a call of an op would be answered by: another value where some call may be answered otherwise.

    For whoever keeps what a call launched, as CUDA graphs do.
    """
    return _lessons, len(_off), tuple(_forced.items())


def observed() -> bool:
    """Whether this thread tries a kernel or watches what is asked, so that every op has to run."""
    return _thread.trial is not None or _thread.seen is not None


def tuned(kernel: str, device: Hashable) -> dict[tuple[Hashable, ...], Choice]:
    """What was tuned for this kernel on this device, by shape."""
    return {shape: choice for (name, shape), choice in _table(device).items() if name == kernel}


def switch_off(kernel: str, why: str) -> None:
    """Use stock operators in place of this kernel until the process ends, and say so, once."""
    if kernel in _off:
        return
    _off[kernel] = why
    warnings.warn(
        f"vitfast's {kernel} kernel ({KERNELS[kernel]}) is switched off for this process: {why}. Stock PyTorch "
        "operators take its place: right, and usually slower. Please report this with what `vitfast info` prints; "
        f"vitfast.set_backend('stock', op={kernel!r}) avoids the kernel and this warning",
        RuntimeWarning,
        stacklevel=2,
    )


# of a driver that loads a kernel, and of cuBLAS when it is first asked
FULL = ("out of memory", "STATUS_ALLOC_FAILED")
# after these nothing runs in this process (CUDA's documentation of cudaError_t)
LOST = (
    "illegal memory access", "illegal instruction", "misaligned address", "launch timed out", "context is destroyed",
    "device-side assert", "hardware stack error", "on global/shared address space", "invalid program counter",
    "unspecified launch failure", "uncorrectable",
)  # fmt: skip


def out_of_memory(problem: BaseException) -> bool:
    """Whether memory of the device or the host is full, whoever says so."""
    full = isinstance(problem, (torch.OutOfMemoryError, MemoryError))
    return full or any(text in str(problem) for text in FULL)


def _capturing() -> bool:
    try:
        return torch.cuda.is_current_stream_capturing()
    # no driver, or a device that is lost
    except RuntimeError:
        return False


def spare(kernel: str, problem: Exception) -> None:
    """Raise what is wrong where `problem` says nothing about the kernel that it came out of; return where it does.

    Raises:
        torch.OutOfMemoryError: memory is full.
        RuntimeError: a CUDA graph is being captured, into which no kernel can be loaded; chains `problem`.
        Exception: `problem`, where the device is lost or one of torch's own operators failed.
    """
    said = str(problem)
    if isinstance(problem, torch.OutOfMemoryError):
        raise problem
    if out_of_memory(problem):
        raise torch.OutOfMemoryError(f"{kernel}: {said}") from problem
    of_cuda = "CUDA" in said
    # the stream of another thread may be the one
    if _capturing() or (of_cuda and "captur" in said):
        raise RuntimeError(
            f"{kernel}: the first call of a kernel compiles and loads it, which must not happen while a CUDA graph is "
            f"captured: call once before capturing, with the same shapes and dtypes ({type(problem).__name__}: {said})"
        ) from problem
    # torch's operators begin so; kernels' launchers do not
    of_torch = isinstance(problem, torch.AcceleratorError) or said.startswith("CUDA error: ")
    if of_torch or (of_cuda and any(text in said for text in LOST)):
        raise problem


def see_device(kernel: str, synchronize: Callable[[], Any], why: str) -> None:
    """Raise RuntimeError where the device is lost after a kernel failed, for `why`."""
    try:
        synchronize()
    except Exception as lost:
        raise RuntimeError(
            f"warmup: the {kernel} kernel broke the device ({why}), and nothing will run on it in this process. "
            f"Start again with vitfast.set_backend('stock', op={kernel!r}), and please report this"
        ) from lost


def asked_for(kernel: str) -> bool:
    """Whether somebody forces this kernel, in this thread or for the process."""
    trial = _thread.trial
    if trial is not None and trial.kernel == kernel:
        return trial.backend == "kernel"
    return _forced.get(kernel) == "kernel"


def switched_off(kernel: str) -> str | None:
    """Why the kernel is switched off, None where it is not."""
    return _off.get(kernel)


@contextlib.contextmanager
def trying(kernel: str, backend: str, config: Config | None = None) -> Iterator[None]:
    """Force one kernel in this thread only, with this configuration, and even where it is switched off.

    For whoever checks and measures kernels: other threads' calls go on as they were.
    """
    before, _thread.trial = _thread.trial, Trial(kernel, backend, config)
    try:
        yield
    finally:
        _thread.trial = before


@contextlib.contextmanager
def watching() -> Iterator[list[Seen]]:
    """Collects what this thread's calls of `choose` were asked and answered."""
    before, _thread.seen = _thread.seen, []
    try:
        yield _thread.seen
    finally:
        _thread.seen = before


def why_no_kernels() -> str:
    """Why no Triton kernel can run in this installation at all, "" where they can. Asks for devices."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    return "" if torch.cuda.is_available() else "no CUDA device or driver was found"


def state(kernel: str) -> str:
    """What was decided about a kernel apart from any shape, in words."""
    why = _off.get(kernel)
    forced = _forced.get(kernel)
    if forced is not None:
        return f"{forced}, by set_backend" + (f" (switched off: {why})" if why and forced == "kernel" else "")
    return f"switched off: {why}" if why else "auto"


def _archs(device: int | None) -> Sequence[int]:
    """The architecture of a device, or where there is none all that were measured."""
    if device is not None:
        return [_architecture(device)]
    return [arch for arch in config_tables.ARCHITECTURES if builtin.table(arch)]


def facts(kernel: str, device: int | None) -> dict[str, Any]:
    """What `vitfast info` says of a kernel; device None where there is none."""
    choices = {} if device is None else tuned(kernel, device)
    return {
        "file": KERNELS[kernel],
        "backend": _forced.get(kernel, "auto"),
        "switched_off": _off.get(kernel),
        "state": state(kernel),
        "builtin": {f"sm_{arch}": builtin.summary(kernel, arch) for arch in _archs(device)},
        "tuned_shapes": len(choices),
        "tuned_to_stock": [list(shape) for shape, choice in choices.items() if not choice.kernel],
    }
