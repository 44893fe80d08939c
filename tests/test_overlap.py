"""Programmatic dependent launch: off by default; where it is on every kernel waits for the one before, and first."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vitfast

ROOM = Path(vitfast.__file__).parent / "kernels" / "triton"
LAUNCHERS = ("attention", "layer_norm", "linear", "mlp")
# compiles what its first argument names for sm_90 and sm_80, and prints where PTX waits and where it first uses memory
COMPILES = """
import importlib, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

class Driver:
    def get_current_target(self):
        return self.target

driver = triton.runtime.driver._active = Driver()
done = set()
for each in importlib.import_module(f"vitfast.kernels.triton.{sys.argv[1]}").compilations(90):
    names = each.kernel.arg_names
    if each.kernel.__name__ in done:
        continue
    done.add(each.kernel.__name__)
    source = ASTSource(
        each.kernel,
        signature={name: each.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in each.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in each.divisible},
    )
    for arch in (80, 90):
        driver.target = GPUTarget("cuda", arch, 32)
        options = {"num_warps": each.warps, "num_stages": each.stages}
        ptx = triton.compile(source, target=driver.target, options=options).asm["ptx"]
        memory = re.search(r"\\b(ld|st|atom|red|cp[.]async[.a-z]*|prefetch)[.](global|shared::cluster|bulk|L2)", ptx)
        wait, early = ptx.find("griddepcontrol.wait"), ptx.find("griddepcontrol.launch_dependents")
        print(each.kernel.__name__, arch, wait, early, memory.start())
"""


def kernels():
    """(file, function) of all that launchers start."""
    for name in LAUNCHERS:
        module = importlib.import_module(f"vitfast.kernels.triton.{name}")
        started = {each.kernel.__name__: each.kernel.fn for each in module.compilations(90)}
        yield from {(Path(function.__code__.co_filename), name) for name, function in started.items()}


def test_a_kernel_does_something_before_it_waits():
    found = set(kernels())
    assert len(found) > 12
    for path, name in found:
        (body,) = (node.body for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == name)
        first = body[1] if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) else body[0]
        assert ast.unparse(first) == "after_kernel_before()", name


@pytest.mark.parametrize(("launcher", "wanted"), (("layer_norm", "0"), ("layer_norm", "1"), ("linear", "1")))
def test_memory_is_used_before_the_wait(launcher, wanted, tmp_path):
    environment = os.environ | {"VITFAST_OVERLAP": wanted, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILES, launcher]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) >= 6
    for kernel, arch, *places in rows:
        wait, early, memory = map(int, places)
        if wanted == "1" and arch == "90":
            assert 0 < wait < memory and wait < early, kernel
        else:
            assert wait == early == -1, kernel


def test_kernels_are_launched_early_where_nobody_asked(monkeypatch):
    from vitfast.kernels.triton import overlap

    assert not overlap.overlaps(-1)
    for wanted, capability, early in ((False, (9, 0), False), (True, (8, 9), False), (True, (10, 0), True)):
        monkeypatch.setattr(overlap, "WANTED", wanted)
        monkeypatch.setattr(overlap.torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert overlap.overlaps(0) is early
    assert not overlap.overlaps(-1)
