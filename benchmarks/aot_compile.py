"""Compiles a kernel for a card that is not there, and reads out of the result what can be wrong with it.

Every compile starts from an empty cache of its own: what is reported was made now, by these versions.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aot_machine
import triton
from aot_addresses import narrow_rows
from aot_machine import TENSOR_MEMORY
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vitfast.kernels.triton.compilation import Compilation

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHS = (80, 89, 90, 100)
# bytes that one block may have, by CUDA's programming guide
SHARED_LIMITS = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
WIDE = 16
# of setup.py's architectures, by ours; code for sm_80 runs on sm_89
CUDA_ARCHS = {80: "80", 90: "90a", 100: "100"}
NVCC_FLAGS = ("-O3", "-std=c++20", "-Xptxas", "-v", "-Werror", "all-warnings")
# instructions of the machine that say where a kernel spends its time
SASS = {
    "HGMMA": r"HGMMA", "HMMA": r"HMMA", "LDG 16": r"LDG\.E\S*\.128", "LDGSTS 16": r"LDGSTS\.E\S*\.128",
    "local": r"(?:LDL|STL)\b",
}  # fmt: skip
NO_NVCC = "nvcc was not found (NVCC names it, or put it on the PATH)"

Row = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What a compiled kernel is like.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread; above 0 it spills.
        shared: bytes of a block.
        mma: how often which tensor core instruction stands in the code: "wgmma m64n128k16", "mma.sync m16n8k16".
        loads: how often which load from global memory, with its bytes: "ld 16", "cp.async 16"; "bulk" has no width.
        tf32: whether an operand is rounded to TF32.
        dots: how often which `tl.dot`: (m, n, k, type of the operands).
        narrow_rows: 32-bit row arithmetic, see `aot_addresses`.
        tensor_memory: columns, on sm_100.
        programs, epilogue, barriers: a multiprocessor; instructions behind the last one for tensor cores; barriers in
            each innermost loop with such: see `aot_machine`.
        serialised, unguarded: what is wrong with its wgmma, see `aot_machine`.
        seconds: compiling it.
    """

    registers: int
    stack: int
    shared: int
    mma: dict[str, int]
    loads: dict[str, int]
    tf32: bool
    dots: dict[tuple[int, int, int, str], int] = field(default_factory=dict)
    narrow_rows: tuple[str, ...] = ()
    tensor_memory: int = 0
    programs: int | None = None
    epilogue: int | None = None
    barriers: tuple[int, ...] = ()
    serialised: tuple[str, ...] = ()
    unguarded: tuple[str, ...] = ()
    seconds: float = 0.0


def compile_one(compilation: Compilation, arch: int) -> Found:
    """Compile for `arch`, one of `ARCHS`; no GPU is needed.

    Raises:
        TypeError: the kernel is not under `triton.jit`, or the interpreter took its place.
        ValueError: signature and constants are not together the kernel's arguments.
        Exception: whatever the compiler has to say.
    """
    kernel = compilation.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError(
            f"{compilation.name}: kernel must be a function under triton.jit, got {type(kernel).__name__}"
            " (TRITON_INTERPRET must not be set)"
        )
    names, described = kernel.arg_names, [*compilation.signature, *compilation.constants]
    if sorted(names) != sorted(described):
        wrong = ", ".join(sorted(set(names) ^ set(described))) or "an argument in both"
        raise ValueError(f"{compilation.name}: signature and constants must be the kernel's arguments, got {wrong}")
    if odd := set(compilation.divisible) - set(compilation.signature):
        raise ValueError(f"{compilation.name}: divisible must be in the signature, got {', '.join(sorted(odd))}")
    source = ASTSource(
        kernel,
        signature={name: compilation.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in compilation.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in compilation.divisible},
    )
    options = {"num_warps": compilation.warps, "num_stages": compilation.stages}
    options |= {"maxnreg": compilation.registers} if compilation.registers else {}
    began, said = time.perf_counter(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = folder, True
        with contextlib.redirect_stdout(said):
            made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        seconds = time.perf_counter() - began
        file = Path(folder) / "kernel.cubin"
        usage, sass = _usage(made.asm["cubin"], file), _disassembled(file)
    ttir, ptx, shared, warps = made.asm["ttir"], made.asm["ptx"], made.metadata.shared, made.metadata.num_warps
    tensor_memory = getattr(made.metadata, "tmem_size", None) or 0
    return Found(
        **usage,
        shared=shared,
        **_instructions(ptx),
        dots=_dots(ttir),
        narrow_rows=tuple(narrow_rows(ttir)),
        tensor_memory=tensor_memory,
        programs=aot_machine.programs(arch, usage["registers"], shared, warps, tensor_memory),
        epilogue=aot_machine.epilogue(sass),
        barriers=tuple(aot_machine.barriers(sass)),
        serialised=tuple(aot_machine.serialised(ptx, sass, said.getvalue())),
        unguarded=tuple(aot_machine.unguarded(ptx)) if warps > aot_machine.WARPGROUP else (),
        seconds=seconds,
    )


def gate(compilation: Compilation, arch: int, found: Found) -> list[str]:
    """Why this configuration is refused; nothing where it is not."""
    reasons = _memory(found, arch, may_spill=not compilation.default)
    if found.tensor_memory > TENSOR_MEMORY:
        reasons.append(f"{found.tensor_memory} columns of tensor memory, sm_{arch} has {TENSOR_MEMORY}")
    if compilation.ieee and found.tf32:
        reasons.append("TF32 where IEEE products are promised")
    if found.dots and not any(kind == "bulk" or int(kind.split()[1]) >= WIDE for kind in found.loads):
        reasons.append(f"no load from global memory is {WIDE} bytes wide: {_listed(found.loads)}")
    halves = [dot for dot in found.dots if dot[3] in ("bf16", "f16")]
    if halves and not found.mma:
        reasons.append("its products are not on tensor cores")
    elif arch == 90:
        # wgmma takes 64 rows
        large = [dot for dot in halves if dot[0] >= 64]
        kinds = {kind.split()[0] for kind in found.mma}
        if large and "wgmma" not in kinds:
            reasons.append(f"no wgmma for products of 64 rows or more: {_listed(found.mma)}")
        elif large and len(large) == len(found.dots) and "mma.sync" in kinds:
            reasons.append(f"some of its products are not wgmma: {_listed(found.mma)}")
    if compilation.default:
        reasons += found.serialised
    return reasons + list(found.unguarded + found.narrow_rows)


def _memory(found: Found, arch: int, *, may_spill: bool = False) -> list[str]:
    reasons = []
    if found.stack and not may_spill:
        reasons.append(f"spills: {found.stack} bytes of stack")
    if found.shared > SHARED_LIMITS[arch]:
        reasons.append(f"{found.shared} bytes of shared memory, sm_{arch} has {SHARED_LIMITS[arch]}")
    return reasons


# rows of the record


def compilations(module: str, arch: int) -> dict[str, Compilation]:
    """Those of a module by their key in the record, sorted.

    Raises:
        ImportError, AttributeError: there is no such module, or it lists no compilations.
        ValueError: two have one name.
    """
    found = list(importlib.import_module(module).compilations(arch))
    names = Counter(each.name for each in found)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{module}: names of compilations must be unique, got twice: {', '.join(twice)}")
    stem = module.rpartition(".")[2]
    return {f"{stem}/{each.name} sm_{arch}": each for each in sorted(found, key=lambda each: each.name)}


def kernel_row(module: str, key: str, arch: int) -> dict[str, Row]:
    """Compile the configuration of that key; its row, by key. One that does not compile is refused with the error."""
    compilation = compilations(module, arch)[key]
    row: Row = {"default": compilation.default}
    try:
        found = compile_one(compilation, arch)
    except Exception as error:
        return {key: row | _failed(f"{type(error).__name__}: {error}")}
    return {key: row | _described(found, gate(compilation, arch, found))}


def cuda_rows(source: str, key: str, arch: int) -> dict[str, Row]:
    """Compile a .cu file for the architecture that setup.py has in the place of `arch`; a row for each kernel in it.

    A row's key is `key` and the kernel's name. Where there is no nvcc, the one of `key` says "skipped".
    """
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    if nvcc is None:
        return {key: {"skipped": NO_NVCC}}
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *NVCC_FLAGS, f"-I{CSRC}", f"-arch=sm_{CUDA_ARCHS[arch]}", "-cubin", source]
        command += ["-o", f"{folder}/kernels.cubin"]
        done = subprocess.run([*command, "--keep", "--keep-dir", folder], capture_output=True, text=True)
        if done.returncode:
            said = done.stderr or done.stdout
            # below an error nvcc shows the source
            return {key: _failed("\n".join(re.findall(r".*\berror\b.*", said)[:1]) or said)}
        (ptx,) = Path(folder).glob("*.ptx")
        # what comes before the first kernel is none
        parts = re.split(r"\.entry (\w+)", ptx.read_text())[1:]
        sass = _sass(Path(folder) / "kernels.cubin")
    code = dict(zip(parts[::2], parts[1::2], strict=True))
    rows = {}
    for kernel, memory in sorted(_said_by_ptxas(done.stderr).items()):
        if STUB.search(code[kernel]):
            continue
        if dynamic := re.search(r"// dynamic shared memory: (\d+)", code[kernel]):
            memory["shared"] += int(dynamic.group(1))
        found = Found(**memory, **_instructions(code[kernel]))
        slow = [f"ptxas: {line}" for line in re.findall(rf".*\bC75(?!19)\d\d\b.*\b{kernel}\b.*", done.stderr)]
        row = _described(found, _memory(found, arch) + _refused_sass(sass[kernel]) + slow)
        rows[f"{key} {readable(kernel)}"] = row | {"sass": _listed(sass[kernel])}
    return rows or {key: {"kernels": 0}}


# a kernel for another architecture
STUB = re.compile(r"\btrap;")


def readable(kernel: str) -> str:
    """The name of a kernel as its source has it; as the compiler has it where there is no c++filt."""
    if shutil.which("c++filt") is None:
        return kernel
    name = subprocess.run(["c++filt", kernel], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"vitfast::|\(anonymous namespace\)::|^void ", "", name)
    return re.sub(r"\([^()]*\)$", "", name).replace(" >", ">").replace("unsigned char", "uint8_t")


def _sass(cubin: Path) -> dict[str, dict[str, int]]:
    """How often which of `SASS` stands in the machine code of each kernel."""
    parts = re.split(r"Function : (\w+)", _disassembled(cubin))[1:]
    return {
        kernel: {name: n for name, pattern in SASS.items() if (n := len(re.findall(pattern, text)))}
        for kernel, text in zip(parts[::2], parts[1::2], strict=True)
    }


def _disassembled(cubin: Path) -> str:
    command = [knobs.nvidia.cuobjdump.path, "--dump-sass", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True).stdout


def _refused_sass(counts: dict[str, int]) -> list[str]:
    return [f"{counts['local']} accesses to local memory"] if "local" in counts else []


def nvcc_release() -> str | None:
    """ "13.0"; None where there is no nvcc."""
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", said)
    return release.group(1) if release else None


def _described(found: Found, refused: list[str]) -> Row:
    row: Row = {"registers": found.registers, "stack": found.stack, "shared": found.shared}
    if found.tensor_memory:
        row["tensor_memory"] = found.tensor_memory
    if found.programs is not None:
        row["programs"] = found.programs
    row |= {"mma": _listed(found.mma), "loads": _listed(found.loads), "tf32": found.tf32}
    if found.epilogue is not None:
        row["epilogue"] = found.epilogue
    if found.barriers:
        row["barriers"] = ", ".join(map(str, found.barriers))
    if found.serialised:
        row["serialised"] = True
    return row | ({"refused": refused} if refused else {}) | {"seconds": found.seconds}


def _failed(said: str) -> Row:
    lines = [line.strip() for line in said.strip().splitlines() if line.strip()] or ["no output"]
    # compilers begin with a copy of the source, which the last lines are about
    return {"refused": [f"does not compile: {' | '.join(lines[-3:])[:400]}"]}


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"


# out of what compilers write


def _usage(cubin: bytes, file: Path) -> dict[str, int]:
    file.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    said = subprocess.run(command, capture_output=True, text=True)
    used = re.findall(r"REG:(\d+) STACK:(\d+)", said.stdout)
    if not used:
        raise RuntimeError(f"cuobjdump did not tell registers and stack: {said.stdout[-200:]}{said.stderr[-200:]}")
    return {"registers": max(int(each) for each, _ in used), "stack": max(int(each) for _, each in used)}


def _said_by_ptxas(text: str) -> dict[str, dict[str, int]]:
    """Registers, stack and static shared memory of each kernel, out of what `ptxas -v` prints."""
    kernels = {}
    for part in text.split("Compiling entry function '")[1:]:
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        shared = re.search(r"(\d+) bytes smem", part)
        kernels[part.partition("'")[0]] = {
            "registers": int(re.search(r"Used (\d+) registers", part).group(1)),
            "stack": max(int(number) for frame in frames for number in frame),
            "shared": int(shared.group(1)) if shared else 0,
        }
    return kernels


def _instructions(ptx: str) -> dict[str, Any]:
    """The fields of `Found` that stand in PTX."""
    mma: Counter[str] = Counter()
    for kind, pattern in (
        ("wgmma", r"\bwgmma\.mma_async\.[\w.]*?(m\d+n\d+k\d+)"),
        ("mma.sync", r"(?<!\w)mma\.sync\.[\w.]*?(m\d+n\d+k\d+)"),
        ("tcgen05", r"\btcgen05\.mma\.[\w.:]*?kind::(\w+)"),
    ):
        mma.update(f"{kind} {shape}" for shape in re.findall(pattern, ptx))
    loads: Counter[tuple[str, int]] = Counter()
    for load in re.findall(r"\bld\.[\w.:]*\bglobal[\w.:]*", ptx):
        lanes, bits = re.search(r"\.v(\d)\b", load), re.search(r"\.[bsuf](\d+)$", load)
        loads["ld", int(lanes.group(1) if lanes else 1) * int(bits.group(1)) // 8] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\S* *\[[^\]]*\], *\[[^\]]*\], *(\w+)", ptx):
        loads["cp.async", int(size, 0)] += 1
    bulk = len(re.findall(r"\bcp\.async\.bulk\.(?:tensor\.\dd\.)?shared", ptx))
    return {
        "mma": dict(sorted(mma.items())),
        "loads": {f"{kind} {size}": count for (kind, size), count in sorted(loads.items())}
        | ({"bulk": bulk} if bulk else {}),
        # not as part of a name
        "tf32": re.search(r"[.:]tf32\b", ptx) is not None,
    }


def _dots(ttir: str) -> dict[tuple[int, int, int, str], int]:
    dots: Counter[tuple[int, int, int, str]] = Counter()
    shape = r"tt\.dot .*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>"
    for m, k, kind, n in re.findall(shape, ttir):
        dots[int(m), int(n), int(k), kind] += 1
    return dict(dots)
