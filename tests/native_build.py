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
    wanted = ("AVX512", "AVX512_BF16", "X86_FLAGS", "PORTABLE_FLAGS")
    tree = ast.parse((ROOT / "setup.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id in wanted]
    values = {}
    exec(compile(tree, "setup.py", "exec"), values)
    return {**values["PORTABLE_FLAGS"], **values["X86_FLAGS"]}[isa]


def find_compiler():
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("no C++ compiler")
    return compiler


def built_once(tmp_path_factory, name, *arguments, sources=lambda folder: ()):
    """What the compiler makes of these arguments, once for all of xdist's processes.

    Args:
        name: of the file, by which the next one finds it.
        sources: gives more arguments, and may write files into the folder that it gets.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if folder.name.startswith("popen-") else folder
    target = folder / name
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            built = _run([*find_compiler().split(), *arguments, *sources(folder), "-o", target])
            assert built.returncode == 0, built.stderr
    return target


def _run(command, **variables):
    # the sanitizer's runtime has to be the first library
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | variables
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)


def run_sanitized(program, tmp_path_factory, isa="portable", sources=(), arguments=()):
    """Run tests/native/<program> with `sources` of csrc/, both compiled for one instruction set; its output."""
    # kept scratch memory would hide what is written beside it; optimising takes four times as long, and may drop a read
    # that has no use
    flags = ["-std=c++20", "-O0", "-g", "-Wall", "-DVITFAST_KEPT_BYTES=0", f"-DVITFAST_ISA={isa}", f"-I{CSRC}"]
    flags += [*SANITIZE, *flags_of(isa)]
    must_have_sanitizers(tmp_path_factory)
    parts = [
        built_once(tmp_path_factory, f"{file.stem}-{isa}.o", *flags, "-c", file)
        for file in (PROGRAMS / program, *(CSRC / name for name in sources))
    ]
    done = _run([built_once(tmp_path_factory, f"{parts[0].stem}", *SANITIZE, *parts), *arguments])
    assert done.returncode == 0, f"{program} for {isa}:\n{done.stdout}{done.stderr}"
    return done.stdout


def must_have_sanitizers(tmp_path_factory):
    def empty(folder):
        (folder / "empty.cpp").write_text("int main() {}\n")
        return [folder / "empty.cpp"]

    try:
        built_once(tmp_path_factory, "empty", *SANITIZE, sources=empty)
    except AssertionError:
        pytest.skip(f"{find_compiler()} has no sanitizers")


# _Float16 and the compilers' own pragmas for loops
HOST_FLAGS = ["-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"]
WHICH_BUG = '#include <cstdlib>\ninline const char* const planted = std::getenv("PLANTED");\n'
WHICH_BUG += "inline const int bug_number = planted ? std::atoi(planted) : -1;\n"


def planted(bugs, folder, room="cuda"):
    """The compiler's arguments for a csrc/ with all these bugs, of which the environment's PLANTED chooses one.

    Args:
        bugs: file of csrc/<room>, what stands there, and what takes its place, in which BUG is whether it is this one.
    """
    csrc = folder / "csrc-planted"
    folder.mkdir(exist_ok=True)
    shutil.copytree(CSRC, csrc, dirs_exist_ok=True)
    (folder / "which_bug.h").write_text(WHICH_BUG)
    for number, (file, right, wrong) in enumerate(bugs):
        text = (csrc / room / file).read_text()
        assert text.count(right) == 1, f"{file} has no {right!r} any more"
        (csrc / room / file).write_text(text.replace(right, wrong.replace("BUG", f"(bug_number == {number})")))
    return ["-include", folder / "which_bug.h", f"-I{csrc}"]


def run_kernels_on_host(tmp_path_factory, program, sanitizers, bugs=(), bug=-1):
    """Compile tests/native/<program>.cpp, which runs kernels for GPUs on the host; what running it gives.

    Args:
        bugs: planted ones, all in one program.
        bug: number of the one that is there.
    """
    flags = [*HOST_FLAGS, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-O1", "-g1", f"-I{PROGRAMS}"]
    name = f"{program}-{sanitizers}-{len(bugs)}"
    built = built_once(
        tmp_path_factory, name, *flags, PROGRAMS / f"{program}.cpp",
        sources=lambda folder: planted(bugs, folder / program) if bugs else [f"-I{CSRC}"],
    )  # fmt: skip
    # each report of a race takes time, and there may be thousands
    return _run([built, "4"], PLANTED=str(bug), TSAN_OPTIONS="halt_on_error=1")


def run_tiles_with_bug(tmp_path_factory, bugs, bug):
    """What tests/native/check_kernels.cpp gives, run on plain tiles with one of these bugs in csrc/cpu."""
    flags = ["-std=c++20", "-O1", "-g1", "-w", "-DVITFAST_KEPT_BYTES=0", "-DVITFAST_ISA=plain_tiles", *SANITIZE]
    program = built_once(
        tmp_path_factory, "check_kernels-planted", *flags, *flags_of("plain_tiles"), PROGRAMS / "check_kernels.cpp",
        sources=lambda folder: [
            *planted(bugs, folder / "planted-tiles", "cpu"), folder / "planted-tiles" / "csrc-planted/cpu/kernels.cpp",
        ],
    )  # fmt: skip
    # what nobody wrote is NaN
    return _run([program, "3"], PLANTED=str(bug), ASAN_OPTIONS="max_malloc_fill_size=1000000000:malloc_fill_byte=255")


def kernels_on_host(tmp_path_factory):
    """The module with the kernels for GPUs that run on the host."""
    includes = [pybind11.get_include(), sysconfig.get_path("include"), CSRC, PROGRAMS]
    sources = [PROGRAMS / "cuda_kernels_on_host.cpp", CSRC / "cuda" / "bindings.cpp"]
    flags = [*HOST_FLAGS, "-O1", "-fPIC", "-shared", "-fvisibility=hidden", *(f"-I{path}" for path in includes)]
    name = f"cuda_kernels_on_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    target = built_once(tmp_path_factory, name, *flags, "-x", "c++", *sources)
    spec = importlib.util.spec_from_file_location("cuda_kernels_on_host", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
