"""Tests on memory whose ends fault: each tensor ends, or begins, at 64 MiB that nobody may touch, and is NaN at first.

A parent runs the tests of a file in a process with tests/native/guarded_memory.cpp preloaded, where this module is a
plugin of pytest: on where a test's body begins, off where it ends. A test says by an argument `placement` which end it
is about, else the environment does.
"""

import ctypes
import itertools
import os
import random
import subprocess
import sys

import pytest
import torch
from native_build import PROGRAMS, ROOT, built_once
from pairwise import covering, drawn

import vitfast

PLACEMENTS = {"end": 1, "begin": 2}
CASE = "on guarded memory: "
EVERY = os.environ.get("EVERY_CASE") == "1"


def library(tmp_path_factory):
    if sys.platform != "linux":
        pytest.skip("LD_PRELOAD, and the functions it is for, are Linux's")
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-fPIC", "-shared"]
    return built_once(tmp_path_factory, "guarded_memory.so", *flags, PROGRAMS / "guarded_memory.cpp", "-ldl")


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
    lines = [line for line in done.stdout.splitlines() if "/site-packages/" not in line]
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


def cases(allowed=lambda case: True, together=(), for_later=lambda case: False, **factors):
    """Parameters of a test: of `factors`, by name the values, each one at both ends of memory.

    Marked `full` are cases in which each pair is, and all `for_later`. In the matrix it is each combination of those
    `together`, and of all where these are none, with the others as drawn.
    """
    both = [{"placement": placement} for placement in PLACEMENTS]
    now = covering(factors, lambda case: allowed(case) and not for_later(case), strength=1)
    once = [case | end for case in now for end in both]
    factors |= {"placement": tuple(PLACEMENTS)}
    chosen = combinations(factors, allowed, together or tuple(factors)) if EVERY else covering(factors, allowed)
    later = [] if EVERY else [case for case in chosen if case not in once]
    values = [pytest.param(*case.values()) for case in (chosen if EVERY else once)]
    values += [pytest.param(*case.values(), marks=pytest.mark.full) for case in later]
    return pytest.mark.parametrize(", ".join(factors), values, ids=lambda value: str(value).replace(" ", "_"))


def combinations(factors, allowed, together):
    chance, together = random.Random(0), dict.fromkeys([*together, "placement"])
    for values in itertools.product(*(factors[name] for name in together)):
        yield from drawn(chance, factors, allowed, dict(zip(together, values, strict=True)), 1)


def finite(**tensors):
    for name, t in tensors.items():
        if isinstance(t, (tuple, list)):
            finite(**{f"{name}[{i}]": each for i, each in enumerate(t)})
        elif t is not None:
            assert t.isfinite().all(), f"{name} was not written, or of memory that is nobody's"


def nothing(dtype):
    """What nobody may read."""
    return float("nan") if dtype.is_floating_point else 255


def columns(t, before, after):
    """In rows of wider memory, which begins or ends with them."""
    whole = t.new_full((*t.shape[:-1], before + t.shape[-1] + after), nothing(t.dtype))
    return whole[..., before : before + t.shape[-1]].copy_(t)


def shifted(t):
    """One number behind the beginning of its memory, so that nothing is aligned, and up to the end of it."""
    return t.new_full((t.numel() + 1,), nothing(t.dtype))[1:].view(t.shape).copy_(t)


PLACES = {
    "whole": lambda t: t.clone(memory_format=torch.contiguous_format),
    "first columns": lambda t: columns(t, 0, 8),
    "last columns": lambda t: columns(t, 8, 0),
    "shifted": shifted,
    "one image for all": lambda t: t[:1].clone().expand_as(t),
    "one number for all": lambda t: t[..., :1].clone().expand_as(t),
    "images inside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}


MODELS = {
    "plain": {},
    "scaled, registers": {"layer_scale": 0.3, "register_tokens": 2},
    "rms, gated": {"norm": "rms", "mlp": "swiglu_packed", "activation": "silu"},
    "qk norm, mean": {"qk_norm": True, "pool": "mean"},
}


def model_of(width, changes):
    """Of this width with heads of 64, for images of 24 x 24."""
    sizes = {"image_size": 24, "patch_size": 8, "dim": width, "depth": 2, "heads": width // 64, "mlp_dim": width}
    return vitfast.ViT.from_config(vitfast.ViTConfig(**sizes, num_classes=7, **MODELS[changes]))
