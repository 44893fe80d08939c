"""Builds the extension `vitfast._C` where it can, and installs vitfast without it where it cannot.

All metadata is in pyproject.toml. Environment variables:

    VITFAST_BUILD_CUDA   1: with the CUDA part, else an error; 0: without it; auto (default): where there is nvcc
    VITFAST_CUDA_ARCHS   what nvcc compiles for, "80+PTX;90a;100+PTX" by default; +PTX adds code for newer cards
    CXX, NVCC            compilers to use

A compiler that is missing or fails costs one clear line and the part it would have built. What was built, and why the
rest was not, goes into vitfast/_build.json beside the extension, where `vitfast info` reads it.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
SOURCES = ["bindings.cpp", "cpu/features.cpp"]
# compiled once for each instruction set that the machine's architecture has; the CPU's best is chosen at run time
KERNELS = "cpu/kernels.cpp"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx_bf16": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
}
# the second computes what amx_bf16 does, for tests on any CPU
PORTABLE_FLAGS = {"portable": [], "plain_tiles": ["-DVITFAST_PLAIN_TILES"]}
CUDA_SOURCES = ["cuda/patch_embed.cu", "cuda/product.cu", "cuda/probe.cu"]
CUDA_BINDINGS = "cuda/bindings.cpp"
# sm_80 runs on 8.6 and 8.9 too; PTX of 90a would not run on anything newer, so compute_80 and compute_100 are kept
ARCHS = "80+PTX;90a;100+PTX"


class Missing(Exception):
    """Why a part cannot be built."""


def wanted_cuda() -> str:
    wanted = os.environ.get("VITFAST_BUILD_CUDA", "auto").lower()
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"vitfast: VITFAST_BUILD_CUDA must be 0, 1 or auto, got {wanted!r}")
    return wanted


def gencodes() -> list[str]:
    """nvcc's options for VITFAST_CUDA_ARCHS."""
    options = []
    for arch in re.split(r"[;, ]+", os.environ.get("VITFAST_CUDA_ARCHS", ARCHS).strip()):
        match = re.fullmatch(r"(\d+[af]?)(\+PTX)?", arch.replace(".", "").removeprefix("sm_"))
        if not match:
            sys.exit(f"vitfast: VITFAST_CUDA_ARCHS must look like '80;90a;100+PTX', got {arch!r}")
        number, ptx = match.groups()
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    chosen = {option.rpartition("code=sm_")[2] for option in options}
    if {"90", "90a"} <= chosen:
        sys.exit("vitfast: VITFAST_CUDA_ARCHS has 90 and 90a, of which a card would run either; 90a is for all of 9.0")
    return options


def run(command: list[str]) -> str:
    """Output of `command`; Missing with the end of what it said when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Missing(f"{command[0]} did not start: {error.strerror}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in said if "error" in line.lower()] or said[-1:] or ["no output"]
        raise Missing(f"{Path(command[0]).name} failed: {errors[0][:300]}")
    return done.stdout + done.stderr


class BuildWhatIsPossible(build_ext):
    """Compiles with the C++ compiler and, where it is wanted, nvcc; never fails for the lack of either."""

    def run(self):
        wanted, options = wanted_cuda(), gencodes()
        report = {"extension": False, "cuda": False, "why_no_extension": "", "why_no_cuda": ""}
        report |= {"isas": [], "why_no_isa": {}, "openmp": [], "why_no_openmp": ""}
        target = Path(self.get_ext_fullpath(self.extensions[0].name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            compiler = self.find_compiler()
            report["compiler"] = run([*compiler, "--version"]).splitlines()[0]
            self.compile_and_link(compiler, wanted, options, target, report)
            report["extension"] = True
        except Missing as reason:
            if wanted == "1":
                sys.exit(f"vitfast: VITFAST_BUILD_CUDA=1, but {reason}")
            report["why_no_extension"] = str(reason)
            report["cuda"], report["why_no_cuda"] = False, "the extension was not built"
            target.unlink(missing_ok=True)  # of an earlier build in the source tree
        self.say(report)
        (target.parent / "_build.json").write_text(json.dumps(report, indent=1) + "\n")

    def find_compiler(self) -> list[str]:
        if "CXX" in os.environ:
            compiler = shlex.split(os.environ["CXX"])
            if not compiler or not shutil.which(compiler[0]):
                raise Missing(f"CXX={os.environ['CXX']!r} was not found")
            return compiler
        for name in ("c++", "g++", "clang++"):
            if shutil.which(name):
                return [name]
        raise Missing("no C++ compiler (c++, g++, clang++) was found")

    def start_cuda(
        self, wanted: str, options: list[str], pool: ThreadPoolExecutor, report: dict
    ) -> tuple[list[Future[str]], list[str]]:
        """Object files in the making and linker options of the CUDA part; none, with the reason in `report`, where
        there can be none. nvcc compiles for the architectures side by side.
        """
        if wanted == "0":
            report["why_no_cuda"] = "built with VITFAST_BUILD_CUDA=0"
            return [], []
        try:
            nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
            if nvcc is None:
                raise Missing("nvcc was not found (NVCC names it, or put it on the PATH)")
            # what is on the PATH may be a wrapper, so nvcc is asked where its libraries are
            dry = run([nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull])
            libraries = re.search(r"^#\$ LIBRARIES=(.*)$", dry, re.MULTILINE)
            if libraries is None:
                raise Missing("nvcc --dryrun did not name its libraries")
            release = re.search(r"release ([\d.]+)", run([nvcc, "--version"])).group(1)
        except Missing as reason:
            if wanted == "1":
                raise
            report["why_no_cuda"] = str(reason)
            return [], []
        report["nvcc"], report["archs"] = release, [option.rpartition("code=")[2] for option in options]
        flags = ["-O3", "-std=c++20", "-Xcompiler", "-fPIC", "-Xcompiler", "-fvisibility=hidden", "--threads", "0"]
        objects = [
            pool.submit(self.compile, [nvcc], source, f"{source}.o", [*flags, *options]) for source in CUDA_SOURCES
        ]
        # static, and without symbols of its own: it does not meet torch's runtime
        return objects, [*shlex.split(libraries.group(1)), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]

    def compile_and_link(
        self, compiler: list[str], wanted: str, options: list[str], target: Path, report: dict
    ) -> None:
        try:
            import pybind11
        except ImportError:
            raise Missing("pybind11 is not installed (pip installs it unless --no-build-isolation is given)") from None
        import sysconfig

        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
            raise Missing("Python's headers are not installed (Debian: python3-dev)")
        flags = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall"]
        # gcc's own header of AVX-512 warns of itself
        flags += ["-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
        flags += self.openmp(compiler, report)
        sets = {**PORTABLE_FLAGS, **(X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else {})}
        # a compiler each: the longest takes as long as all others together
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            of_cuda, link = self.start_cuda(wanted, options, pool, report)
            made = {
                isa: pool.submit(
                    self.compile, compiler, KERNELS, f"{KERNELS}.{isa}.o", [*flags, f"-DVITFAST_ISA={isa}", *more]
                )
                for isa, more in sets.items()
            }

            def bindings(isas: Iterable[str], cuda: bool) -> list[Future[str]]:
                defines = [f"-DVITFAST_HAS_{isa.upper()}" for isa in isas] + ["-DVITFAST_CUDA"] * cuda
                return [
                    pool.submit(self.compile, compiler, name, f"{name}.o", [*flags, *includes, *defines])
                    for name in (*SOURCES, *[CUDA_BINDINGS] * cuda)
                ]

            # beside what they bind, as if all of that would be there
            bound = bindings(sets, bool(of_cuda))
            objects = []
            for isa in made:
                try:
                    objects.append(made[isa].result())
                    report["isas"].append(isa)
                except Missing as reason:  # an older compiler
                    if isa in PORTABLE_FLAGS:
                        raise
                    report["why_no_isa"][isa] = str(reason)
            try:
                objects += [one.result() for one in of_cuda]
                report["cuda"] = bool(of_cuda)
            except Missing as reason:
                if wanted == "1":
                    raise
                link, report["why_no_cuda"] = [], str(reason)
            # what these say counts only if they are the last
            wait(bound)
            if report["isas"] != [*sets] or report["cuda"] != bool(of_cuda):
                bound = bindings(report["isas"], report["cuda"])
            objects += [one.result() for one in bound]
        link = [*link, *report["openmp"]]
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-s"]
        # under another name first: a process that has the old one loaded keeps it
        temporary = target.with_suffix(".tmp")
        run([*compiler, *shared, *objects, "-o", str(temporary), *link])
        os.replace(temporary, target)

    def openmp(self, compiler: list[str], report: dict) -> list[str]:
        """The option for OpenMP where the compiler has it; without it the kernels run on one thread."""
        probe = self.object_dir() / "openmp.cpp"
        probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        try:
            run([*compiler, "-fopenmp", str(probe), "-o", str(probe.with_suffix(".out"))])
            report["openmp"] = ["-fopenmp"]
        except Missing as reason:
            report["openmp"], report["why_no_openmp"] = [], str(reason)
        return report["openmp"]

    def compile(self, compiler: list[str], source: str, name: str, flags: list[str]) -> str:
        """The object file of one source, in the folder that its source is in: two sources may have one name."""
        target = self.object_dir() / name
        target.parent.mkdir(exist_ok=True)
        run([*compiler, "-c", str(CSRC / source), "-o", str(target), f"-I{CSRC}", *flags])
        return str(target)

    def object_dir(self) -> Path:
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def say(self, report: dict) -> None:
        if report["extension"]:
            cuda = f"no CUDA part: {report['why_no_cuda']}"
            if report["cuda"]:
                cuda = f"CUDA part: {', '.join(report['archs'])}"
            kernels = f"CPU kernels: {', '.join(report['isas'])}"
            kernels += "" if report["openmp"] else f" on one thread, no OpenMP: {report['why_no_openmp']}"
            line = f"built vitfast._C ({kernels}; {cuda})"
        else:
            line = f"installing without the compiled extension: {report['why_no_extension']}"
        # pip shows a build's output only with -v or when it fails; whoever builds otherwise sees it
        print(f"vitfast: {line}", file=sys.stderr, flush=True)

    def get_outputs(self):
        target = Path(self.get_ext_fullpath(self.extensions[0].name))
        return [str(path) for path in (target, target.parent / "_build.json") if path.exists()]

    def get_output_mapping(self):
        return {}


setup(
    ext_modules=[Extension("vitfast._C", sources=[str(CSRC / name) for name in SOURCES])],
    cmdclass={"build_ext": BuildWhatIsPossible},
)
