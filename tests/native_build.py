"""C++ test programs under the address and undefined-behaviour sanitizers, for each instruction set of the kernels."""

import ast
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest

from vitfast.kernels import extension

ROOT = Path(__file__).parent.parent
CSRC, PROGRAMS = ROOT / "csrc", ROOT / "tests" / "native"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def instruction_sets():
    """Names of those that this CPU runs; without the extension, which would know, only the one that every CPU has."""
    module, _ = extension.load()
    return ["portable"] if module is None else [kernels.name for kernels in module.usable_kernels()]


def flags_of(isa):
    """The compiler's options for an instruction set, out of setup.py."""
    wanted = ("AVX512", "X86_FLAGS")
    tree = ast.parse((ROOT / "setup.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id in wanted]
    values = {}
    exec(compile(tree, "setup.py", "exec"), values)
    return values["X86_FLAGS"].get(isa, [])


def find_compiler():
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("no C++ compiler")
    return compiler


def run_sanitized(program, folder, isa="portable", sources=()):
    """Compile tests/native/<program> and `sources` of csrc/ for one instruction set, run it; its output."""
    compiler = find_compiler()
    files = [PROGRAMS / program, *(CSRC / name for name in sources)]
    # kept scratch memory would hide what is written beside it; optimising takes four times as long, and may drop a read
    # that has no use
    flags = ["-std=c++20", "-O0", "-g", "-Wall", "-DVITFAST_KEPT_BYTES=0"]
    flags += [*SANITIZE, *flags_of(isa)]
    command = [*compiler.split(), *flags, f"-DVITFAST_ISA={isa}", f"-I{CSRC}"]
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n")
    if _run([*compiler.split(), *SANITIZE, empty, "-o", folder / "empty"]).returncode:
        pytest.skip(f"{compiler} has no sanitizers")
    built = _run([*command, *files, "-o", folder / "program"])
    assert built.returncode == 0, built.stderr
    done = _run([folder / "program"])
    assert done.returncode == 0, f"{program} for {isa}:\n{done.stdout}{done.stderr}"
    return done.stdout


def _run(command):
    # the sanitizer's runtime has to be the first library
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)


def run_kernels_on_host(folder, sanitizers, trials, csrc=CSRC):
    """Compile tests/native/check_patch_embed.cpp, which runs kernels for GPUs on the host; what running it gives."""
    command = [*find_compiler().split(), *HOST_FLAGS, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    source, target = PROGRAMS / "check_patch_embed.cpp", folder / "program"
    built = _run([*command, "-O1", "-g1", f"-I{csrc}", f"-I{PROGRAMS}", source, "-o", target])
    assert built.returncode == 0, built.stderr
    return _run([target, trials])


# _Float16 and the compilers' own pragmas for loops
HOST_FLAGS = ["-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"]


def kernels_on_host(folder):
    """The module with the kernels for GPUs that run on the host; built once for all processes that share `folder`."""
    target = folder / f"cuda_kernels_on_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            includes = [pybind11.get_include(), sysconfig.get_path("include"), CSRC, PROGRAMS]
            sources = [PROGRAMS / "cuda_kernels_on_host.cpp", CSRC / "cuda" / "bindings.cpp"]
            flags = [*HOST_FLAGS, "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-x", "c++"]
            flags += [f"-I{path}" for path in includes]
            built = _run([*find_compiler().split(), *flags, *sources, "-o", target])
            assert built.returncode == 0, built.stderr
    spec = importlib.util.spec_from_file_location("cuda_kernels_on_host", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
