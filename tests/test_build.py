"""The build as pip runs it: from the sdist, with no torch, once isolated, with and without each compiler."""

import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools

from vitfast.kernels import extension

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.slow


# stands for the c++ and g++ of the PATH: what it compiled with the same options it has kept, for all builds are of one
# sdist; -I differs with the folder that pip works in. How fast the code would be does not matter here
COMPILER = """#!/bin/sh
key= output= before=
for option; do
    case $before in -o) output=$option;; esac
    case $option in -c) compiles=1;; esac
    case $before$option in -o* | -I*) ;; *) key="$key $option";; esac
    before=$option
done
[ "$compiles" ] || exec {real} "$@"
kept={folder}/$(echo "$key" | cksum | tr ' ' -).o
if ! [ -f "$kept" ]; then
    {real} "$@" -O0 || exit
    cp "$output" "$kept.$$" && mv "$kept.$$" "$kept"
fi
cp "$kept" "$output"
"""


def run(*command, **variables):
    """Exit code and output, in an environment without the variables that steer the build but for those given."""
    drop = ("VITFAST_BUILD_CUDA", "VITFAST_CUDA_ARCHS", "CXX", "NVCC", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment | variables, timeout=850
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    ignore = shutil.ignore_patterns("_C*", "_build.json", "__pycache__", "*.egg-info")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc", "vitfast"):
        source, copy = ROOT / name, folder / "source" / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copytree(source, copy, ignore=ignore) if source.is_dir() else shutil.copy(source, copy)
    code, said = run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, folder / "source")
    assert code == 0, said
    (file,) = folder.glob("*.tar.gz")
    return file


def test_source_is_not_in_the_sdist(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()} <= names


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    """A Python with what pip would install for each build, and a folder for the PATH."""
    folder = tmp_path_factory.mktemp("builder")
    venv.create(folder / "env", symlinks=True)
    python = folder / "env/bin/python"
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    code, said = run(sys.executable, "-m", "pip", "--python", python, "install", "-q", *needs)
    assert code == 0, said
    (folder / "bin").mkdir()
    for name in ("c++", "g++"):
        if real := shutil.which(name):
            (folder / "bin" / name).write_text(COMPILER.format(real=real, folder=folder))
            (folder / "bin" / name).chmod(0o755)
    return python, folder / "bin"


def build(builder, sdist, folder, **variables):
    """pip's exit code, what it said, and the wheel's content unpacked (None where there is no wheel)."""
    python, compilers = builder
    code, said = run(
        sys.executable, "-m", "pip", "--python", python, "wheel", "-v", "--no-deps", "--no-build-isolation",
        "-w", folder, sdist, **{"PATH": f"{compilers}{os.pathsep}{os.environ['PATH']}"} | variables,
    )  # fmt: skip
    (wheel,) = list(folder.glob("*.whl")) or (None,)
    if wheel is None:
        return code, said, None
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return code, said, folder / "unpacked" / "vitfast"


def line_of(said):
    """What the build itself said, once."""
    (line,) = {line.strip() for line in said.splitlines() if line.strip().startswith("vitfast: ")}
    return line


def report_of(package):
    return json.loads((package / "_build.json").read_text())


CALL = (
    "import importlib.machinery as m, importlib.util as u, json, sys; "
    "s = u.spec_from_file_location('vitfast._C', sys.argv[1]); c = u.module_from_spec(s); s.loader.exec_module(c); "
    "p = c.probe_cuda() if hasattr(c, 'probe_cuda') else None; "
    "v = 0, [1, 3, 2, 2], [12, 4, 2, 1], [2, 2], 0, 0, 0, 0, 0, 1, [], 0; "
    "e = c.cuda.patch_rows(v, (0, 0), (0, 0)) if p and p['error'] else 0; "
    "print(json.dumps([c.cpu_features(), p, e, c.cuda.cuda_error_text(e) if e else '']))"
)


def call_extension(package):
    """cpu_features() and probe_cuda() in a bare interpreter: no torch, no site-packages.

    And what a kernel says that cannot start, for want of a device: an error, and its text.
    """
    (file,) = package.glob("_C*.so")
    code, said = run(sys.executable, "-I", "-S", "-c", CALL, file)
    assert code == 0, said
    return json.loads(said)


# the folders of the package, as they are installed
ROOMS = {
    ".", "check", "check/families", "checkpoints", "choose", "commands", "inference", "kernels",
    "kernels/cpu", "kernels/cuda", "kernels/triton", "loading", "measure", "model", "ops", "parity", "parity/adapters",
    "parity/substitutions", "patching", "patching/families", "reference", "timm_names", "weights", "weights/layouts",
}  # fmt: skip


@pytest.mark.parametrize(
    # one of the architectures: all of them take a minute more
    "variables",
    [
        pytest.param({"VITFAST_BUILD_CUDA": "0"}, id="C++"),
        pytest.param({"VITFAST_CUDA_ARCHS": "80+PTX"}, marks=pytest.mark.full, id="CUDA"),
    ],
)
def test_plain_install_in_an_empty_environment_fails_or_lacks_a_part(variables, builder, sdist, tmp_path):
    """No torch at build time, build isolation on, nothing but pip in the environment."""
    venv.create(tmp_path / "env", with_pip=True)
    cuda = bool(NVCC) and "VITFAST_CUDA_ARCHS" in variables
    install = "-m", "pip", "install", "-v", "--no-deps", sdist
    compilers = f"{builder[1]}{os.pathsep}{os.environ['PATH']}"
    code, said = run(tmp_path / "env/bin/python", *install, **variables, PATH=compilers)
    assert code == 0, said
    assert "built vitfast._C (" in line_of(said)
    (package,) = (tmp_path / "env").glob("lib/python*/site-packages/vitfast")
    assert report_of(package)["extension"] and report_of(package)["cuda"] == cuda
    installed = {file.relative_to(package) for file in package.rglob("*") if file.is_file()}
    installed = {file for file in installed if "__pycache__" not in file.parts}
    source = ROOT / "vitfast"
    needed = {file.relative_to(source) for file in source.rglob("*") if file.suffix in (".py", ".json", ".typed")}
    (extension,) = package.glob("_C*.so")
    assert installed == needed | {Path("_build.json"), extension.relative_to(package)}
    assert {str(file.parent) for file in installed} == ROOMS
    (record,) = package.parent.glob("vitfast-*.dist-info/RECORD")
    tops = {line.partition("/")[0] for line in record.read_text().splitlines()}
    assert tops == {"vitfast", record.parent.name, ".."}, "beside the command, in bin"
    features, probe, error, text = call_extension(package)
    if Path("/proc/cpuinfo").exists():
        flags = Path("/proc/cpuinfo").read_text().split()
        for name, flag in (("avx2", "avx2"), ("avx512", "avx512bw"), ("avx512_bf16", "avx512_bf16"),
                           ("avx512_vnni", "avx512_vnni"), ("amx_bf16", "amx_bf16")):  # fmt: skip
            assert features.get(name, False) == (flag in flags), name
    assert (probe is None) == (not cuda)
    if cuda:
        assert report_of(package)["archs"] == ["sm_80", "compute_80"]
        assert probe["runtime_version"] > 0
        assert bool(probe["devices"]) == (probe["error"] == 0)
        assert (error, text) == (probe["error"], probe["error_text"] if error else "")
    code, said = run(tmp_path / "env/bin/python", "-m", "pip", "uninstall", "-y", "vitfast")
    assert code == 0 and not package.exists(), "files stay behind"


def test_card_of_the_last_years_is_not_among_the_default_architectures(monkeypatch):
    """Code for 8.x, 9.0 and 10.x, and what newer and older cards can compile from."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    values = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.delenv("VITFAST_CUDA_ARCHS", raising=False)
    codes = [option.rpartition("code=")[2] for option in values["gencodes"]()]
    assert codes == ["sm_80", "compute_80", "sm_90a", "sm_100", "compute_100"]
    monkeypatch.setenv("VITFAST_CUDA_ARCHS", "90;90a")
    with pytest.raises(SystemExit, match="90 and 90a"):
        values["gencodes"]()


WITHOUT = {
    "CUDA switched off": ({"VITFAST_BUILD_CUDA": "0"}, "built with VITFAST_BUILD_CUDA=0"),
    "no nvcc": ({"NVCC": "/nowhere/nvcc"}, "nvcc was not found (NVCC names it, or put it on the PATH)"),
    "nvcc that fails": ({"NVCC": "/bin/false"}, "false failed: no output"),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_missing_nvcc_costs_more_than_the_cuda_part(name, builder, sdist, tmp_path):
    variables, why = WITHOUT[name]
    code, said, package = build(builder, sdist, tmp_path, **variables)
    assert code == 0, said
    line = line_of(said)
    assert line.startswith("vitfast: built vitfast._C (CPU kernels: portable"), line
    assert line.endswith(f"; no CUDA part: {why})"), line
    report = report_of(package)
    assert (report["extension"], report["cuda"], report["why_no_cuda"]) == (True, False, why)
    features, probe, *_ = call_extension(package)
    assert probe is None and isinstance(features, dict)


def test_older_compiler_costs_all_kernels_or_none(builder, sdist, tmp_path):
    """One that knows no AVX-512 with bf16 and no OpenMP: those kernels are left out, with the reasons."""
    compiler = tmp_path / "older"
    compiler.write_text(
        '#!/bin/sh\nfor option; do case "$option" in -mavx512bf16|-fopenmp)\n'
        'echo "error: unrecognized option $option" >&2; exit 1;; esac; done\n'
        f'exec {builder[1] / "g++"} "$@"\n'
    )
    compiler.chmod(0o755)
    code, said, package = build(builder, sdist, tmp_path, CXX=str(compiler), VITFAST_BUILD_CUDA="0")
    assert code == 0, said
    report = report_of(package)
    assert report["extension"] and "portable" in report["isas"] and "avx512_bf16" not in report["isas"]
    assert "-fopenmp" in report["why_no_openmp"] and "on one thread, no OpenMP" in line_of(said)
    if platform.machine() == "x86_64":
        assert report["isas"] == ["portable", "plain_tiles", "avx2", "avx512"]
        for isa in ("avx512_bf16", "amx_bf16"):
            assert "-mavx512bf16" in report["why_no_isa"][isa]
    call_extension(package)


NO_COMPILER = {
    "none": ({"PATH": "/nowhere"}, "no C++ compiler (c++, g++, clang++) was found"),
    "not there": ({"CXX": "/nowhere/c++"}, "CXX='/nowhere/c++' was not found"),
    "fails": ({"CXX": "broken"}, "c++ failed: c++: fatal error: cannot execute 'cc1plus'"),
}


@pytest.mark.parametrize("name", NO_COMPILER)
def test_missing_compiler_fails_the_install(name, builder, sdist, tmp_path):
    """Pure Python is what is left, and the reason is kept for `vitfast info`."""
    variables, why = NO_COMPILER[name]
    if variables.get("CXX") == "broken":
        compiler = tmp_path / "c++"
        compiler.write_text("#!/bin/sh\necho \"c++: fatal error: cannot execute 'cc1plus'\" >&2\nexit 1\n")
        compiler.chmod(0o755)
        variables = {"CXX": str(compiler)}
    code, said, package = build(builder, sdist, tmp_path, **variables)
    assert code == 0, said
    assert line_of(said) == f"vitfast: installing without the compiled extension: {why}"
    report = report_of(package)
    assert (report["extension"], report["cuda"], report["why_no_extension"]) == (False, False, why)
    assert not list(package.glob("_C*")) and (package / "model/vit.py").exists()


DEMANDED = {
    "no nvcc": ({"VITFAST_BUILD_CUDA": "1", "NVCC": "/nowhere/nvcc"}, "VITFAST_BUILD_CUDA=1, but nvcc was not found"),
    "no compiler": ({"VITFAST_BUILD_CUDA": "1", "CXX": "/nowhere/c++"}, "VITFAST_BUILD_CUDA=1, but CXX='/nowhere/c++'"),
    "bad switch": ({"VITFAST_BUILD_CUDA": "yes"}, "VITFAST_BUILD_CUDA must be 0, 1 or auto, got 'yes'"),
    "bad arch": ({"VITFAST_CUDA_ARCHS": "80;hopper"}, "ARCHS must look like '80;90a;100+PTX', got 'hopper'"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEMANDED)
def test_demand_that_cannot_be_met_is_dropped_silently(name, builder, sdist, tmp_path):
    variables, message = DEMANDED[name]
    code, said, package = build(builder, sdist, tmp_path, **variables)
    assert code != 0 and package is None
    assert message in said


@pytest.mark.full
def test_chosen_architectures_are_ignored(builder, sdist, tmp_path):
    """A user who builds for one card; also the C++ part beside an nvcc that knows no such card.

    The plain install chooses one too.
    """
    code, said, package = build(builder, sdist, tmp_path, VITFAST_CUDA_ARCHS="8.9+PTX")
    assert code == 0, said
    if NVCC:
        assert report_of(package)["archs"] == ["sm_89", "compute_89"]
    else:
        assert "nvcc was not found" in report_of(package)["why_no_cuda"]


# stands for nvcc and c++: notes when it began and ended a source, of which the longest takes two seconds
SLOW = """#!/bin/sh
case "$*" in *--version*) echo "release 13.0, V13.0";; *--dryrun*) echo '#$ LIBRARIES= ';; esac
source= output= before=
for option; do
    case $before in -o) output=$option;; -c) source=$option;; esac
    before=$option
done
if [ "$source" ]; then
    echo "begin $source" >> {log}
    case $source in *patch_embed.cu) sleep 2;; esac
    echo "end $source" >> {log}
fi
[ -z "$output" ] || touch "$output"
"""


def test_source_waits_for_the_longest_or_overwrites_another_object(tmp_path):
    """Folders have sources of one name."""
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(SLOW.format(log=log))
    compiler.chmod(0o755)
    code = "import os, runpy, sys; os.cpu_count = lambda: 16; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    status, said = run(
        sys.executable, "-c", code, ROOT / "setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp",
        tmp_path / "temp", CXX=str(compiler), NVCC=str(compiler), VITFAST_BUILD_CUDA="1", PYTHONPATH=str(ROOT),
    )  # fmt: skip
    assert status == 0, said
    lines = log.read_text().splitlines()
    assert lines.index("end csrc/cuda/patch_embed.cu") == len(lines) - 1
    assert {"begin csrc/cuda/probe.cu", "begin csrc/bindings.cpp", "begin csrc/cuda/bindings.cpp"} < {*lines}
    assert len([*(tmp_path / "temp").rglob("*.o")]) == sum(line.startswith("begin") for line in lines)


def test_cuda_source_that_does_not_compile_costs_more_than_the_cuda_part(builder, sdist, tmp_path):
    """Bindings were compiled for it already."""
    compiler = tmp_path / "nvcc"
    compiler.write_text(SLOW.format(log=tmp_path / "log").replace("sleep 2", "echo 'error: no such card' >&2; exit 1"))
    compiler.chmod(0o755)
    code, said, package = build(builder, sdist, tmp_path, NVCC=str(compiler))
    assert code == 0, said
    assert line_of(said).endswith("; no CUDA part: nvcc failed: error: no such card)")
    features, probe, *_ = call_extension(package)
    assert probe is None and isinstance(features, dict) and not report_of(package)["cuda"]


WORDS = [
    ((0, 13000, 35), "no NVIDIA driver is installed"),
    ((12040, 13000, 35), "driver is too old: it supports CUDA 12.4, vitfast was built with 13.0; driver 580 or newer"),
    ((13000, 13000, 100), "driver (CUDA 13.0) is there, but no device is visible (CUDA_VISIBLE_DEVICES?)"),
    ((13000, 13000, 999), "CUDA error 999: unknown error"),
]


@pytest.mark.parametrize(("probe", "words"), WORDS)
def test_old_driver_no_driver_and_no_device_read_the_same(probe, words):
    assert words in extension.why_no_device(*probe, "unknown error")
    assert extension.why_no_device(13000, 13000, 0, "no error") == ""


def test_missing_extension_is_used_silently(monkeypatch):
    """`require` says why there is none: not built, file gone, or a file that does not load."""

    def fail(error):
        def load(name):
            raise error

        extension.load.cache_clear()
        monkeypatch.setattr(extension.importlib, "import_module", load)
        with pytest.raises(NotImplementedError) as raised:
            extension.require()
        extension.load.cache_clear()
        return str(raised.value)

    monkeypatch.setattr(extension, "build_report", lambda: {"why_no_extension": "no C++ compiler was found"})
    assert "extension is not available: no C++ compiler was found" in fail(ModuleNotFoundError("vitfast._C"))
    monkeypatch.setattr(extension, "build_report", lambda: {"why_no_extension": ""})
    assert "its file is gone" in fail(ModuleNotFoundError("vitfast._C"))
    assert "does not load: libstdc++.so.6: version not found" in fail(ImportError("libstdc++.so.6: version not found"))
    monkeypatch.undo()
    extension.load.cache_clear()
    assert not extension.cuda_status()["usable"] or extension.load()[0] is not None
