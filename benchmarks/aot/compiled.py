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
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.aot import machine_code
from benchmarks.aot.addresses import narrow_rows
from vitfast.kernels.triton.compilation import Compilation

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ARCHS = (80, 89, 90, 100)
# bytes that one block may have, by CUDA's programming guide
SHARED_LIMITS = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
WIDE = 16
# of setup.py's architectures, by ours; code for sm_80 runs on sm_89
CUDA_ARCHS = {80: "80", 90: "90a", 100: "100"}
NVCC_FLAGS = ("-O3", "-std=c++20", "-Xptxas", "-v", "-Werror", "all-warnings", f"-I{CSRC}", "-cubin", "--keep")
# instructions of the machine that say where a kernel spends its time
SASS = {
    "HGMMA": r"HGMMA", "HMMA": r"HMMA", "LDG 16": r"LDG\.E\S*\.128", "LDGSTS 16": r"LDGSTS\.E\S*\.128",
    "local": r"(?:LDL|STL)\b",
}  # fmt: skip
MMA = {
    "wgmma": r"\bwgmma\.mma_async\.[\w.]*?(m\d+n\d+k\d+)", "mma.sync": r"(?<!\w)mma\.sync\.[\w.]*?(m\d+n\d+k\d+)",
    "tcgen05": r"\btcgen05\.mma\.[\w.:]*?kind::(\w+)",
}  # fmt: skip
NO_NVCC = "nvcc was not found (NVCC names it, or put it on the PATH)"

Row = dict[str, Any]


class Found(NamedTuple):
    """What a compiled kernel is like.

    Attributes:
        registers, stack: of a thread, the stack in bytes; above 0 it spills.
        shared: bytes of a block.
        mma: how often which tensor core instruction stands in the code: "wgmma m64n128k16", "mma.sync m16n8k16".
        loads: how often which load from global memory, with its bytes: "ld 16", "cp.async 16"; "bulk" has no width.
        tf32: whether an operand is rounded to TF32.
        dots: how often which `tl.dot`: (m, n, k, type of the operands).
        narrow_rows: 32-bit row arithmetic, see `addresses`.
        tensor_memory: columns, on sm_100.
        programs, epilogue, barriers: a multiprocessor; instructions behind the last one for tensor cores; barriers in
            each innermost loop with such: see `machine_code`.
        serialised, unguarded: what is wrong with its wgmma, see `machine_code`.
    """

    registers: int
    stack: int
    shared: int
    mma: dict[str, int]
    loads: dict[str, int]
    tf32: bool
    dots: dict[tuple[int, int, int, str], int] = {}
    narrow_rows: tuple[str, ...] = ()
    tensor_memory: int = 0
    programs: int | None = None
    epilogue: int | None = None
    barriers: tuple[int, ...] = ()
    serialised: tuple[str, ...] = ()
    unguarded: tuple[str, ...] = ()

    def row(self, refused: list[str]) -> Row:
        """As the record has it: of what most kernels do not have only what there is."""
        row: Row = {name: getattr(self, name) for name in ("registers", "stack", "shared")}
        row |= {"tensor_memory": self.tensor_memory or None, "programs": self.programs, "mma": _listed(self.mma)}
        row |= {"loads": _listed(self.loads), "tf32": self.tf32, "epilogue": self.epilogue}
        row |= {"barriers": ", ".join(map(str, self.barriers)) or None, "serialised": bool(self.serialised) or None}
        row |= {"refused": refused or None}
        return {name: value for name, value in row.items() if value is not None}


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
    if sorted(names) != sorted(described) or not {*compilation.divisible} <= compilation.signature.keys():
        raise ValueError(
            f"{compilation.name}: signature and constants must be the kernel's arguments {', '.join(names)}, and what "
            f"is divisible of the signature; got {', '.join(described)}, and {', '.join(compilation.divisible)}"
        )
    source = ASTSource(
        kernel,
        signature={name: compilation.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in compilation.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in compilation.divisible},
    )
    options = {"num_warps": compilation.warps, "num_stages": compilation.stages}
    options |= {"maxnreg": compilation.registers} if compilation.registers else {}
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = folder, True
        with contextlib.redirect_stdout(said):
            made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        registers, stack, _ = map(max, zip(*_usage(cubin).values(), strict=True))
        sass = _cuobjdump("--dump-sass", cubin)
    ttir, ptx, shared, warps = made.asm["ttir"], made.asm["ptx"], made.metadata.shared, made.metadata.num_warps
    tensor_memory = getattr(made.metadata, "tmem_size", None) or 0
    return Found(
        registers, stack, shared, *_instructions(ptx), _dots(ttir), tuple(narrow_rows(ttir)), tensor_memory,
        programs=machine_code.programs(arch, registers, shared, warps, tensor_memory),
        epilogue=machine_code.epilogue(sass),
        barriers=tuple(machine_code.barriers(sass)),
        serialised=tuple(machine_code.serialised(ptx, sass, said.getvalue())),
        unguarded=tuple(machine_code.unguarded(ptx)) if warps > machine_code.WARPGROUP else (),
    )  # fmt: skip


def gate(compilation: Compilation, arch: int, found: Found) -> list[str]:
    """Why this configuration is refused; nothing where it is not."""
    reasons = _memory(found, arch, may_spill=not compilation.default)
    if found.tensor_memory > machine_code.TENSOR_MEMORY:
        reasons.append(f"{found.tensor_memory} columns of tensor memory, sm_{arch} has {machine_code.TENSOR_MEMORY}")
    if compilation.ieee and found.tf32:
        reasons.append("TF32 where IEEE products are promised")
    if found.dots and not any(kind == "bulk" or int(kind.split()[1]) >= WIDE for kind in found.loads):
        reasons.append(f"no load from global memory is {WIDE} bytes wide: {_listed(found.loads)}")
    halves = [dot for dot in found.dots if dot[3] in ("bf16", "f16")]
    # wgmma takes 64 rows
    large, kinds = [dot for dot in halves if dot[0] >= 64], {kind.split()[0] for kind in found.mma}
    if halves and not found.mma:
        reasons.append("its products are not on tensor cores")
    elif arch == 90 and large and "wgmma" not in kinds:
        reasons.append(f"no wgmma for products of 64 rows or more: {_listed(found.mma)}")
    elif arch == 90 and large and len(large) == len(found.dots) and "mma.sync" in kinds:
        reasons.append(f"some of its products are not wgmma: {_listed(found.mma)}")
    return [*reasons, *(found.serialised if compilation.default else ()), *found.unguarded, *found.narrow_rows]


def _memory(found: Found, arch: int, may_spill: bool = False) -> list[str]:
    reasons = [f"spills: {found.stack} bytes of stack"] if found.stack and not may_spill else []
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
    found = sorted(importlib.import_module(module).compilations(arch), key=lambda each: each.name)
    if twice := [name for name, count in Counter(each.name for each in found).items() if count > 1]:
        raise ValueError(f"{module}: names of compilations must be unique, got twice: {', '.join(twice)}")
    return {f"{module.rpartition('.')[2]}/{each.name} sm_{arch}": each for each in found}


def kernel_row(module: str, key: str, arch: int) -> dict[str, Row]:
    """Compile the configuration of that key; its row, by key. One that does not compile is refused with the error."""
    compilation = compilations(module, arch)[key]
    try:
        found = compile_one(compilation, arch)
        row = found.row(gate(compilation, arch, found))
    except Exception as error:
        row = _failed(f"{type(error).__name__}: {error}")
    return {key: {"default": compilation.default} | row}


def cuda_rows(source: str, key: str, arch: int) -> dict[str, Row]:
    """Compile a .cu file for the architecture that setup.py has in the place of `arch`; a row for each kernel in it.

    A row's key is `key` and the kernel's name. Where there is no nvcc, the one of `key` says "skipped".
    """
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    if nvcc is None:
        return {key: {"skipped": NO_NVCC}}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        target = [f"-arch=sm_{CUDA_ARCHS[arch]}", source, "--keep-dir", folder, "-o", str(cubin)]
        done = subprocess.run([nvcc, *NVCC_FLAGS, *target], capture_output=True, text=True)
        if done.returncode:
            said = done.stderr or done.stdout
            # below an error nvcc shows the source
            return {key: _failed("\n".join(re.findall(r".*\berror\b.*", said)[:1]) or said)}
        (ptx,) = Path(folder).glob("*.ptx")
        codes = _by_kernel(r"\.entry (\w+)", ptx.read_text())
        machine, usage = _by_kernel(r"Function : (\w+)", _cuobjdump("--dump-sass", cubin)), _usage(cubin)
    rows = {}
    for kernel, (registers, stack, shared) in sorted(usage.items()):
        if re.search(r"\btrap;", codes[kernel]):  # one for another architecture
            continue
        dynamic = re.search(r"// dynamic shared memory: (\d+)", codes[kernel])
        # from sm_90 on the system's part is counted in
        shared += int(dynamic.group(1)) if dynamic else 0
        found = Found(registers, stack, shared - machine_code.RESERVED * (arch >= 90), *_instructions(codes[kernel]))
        counts = {name: len(re.findall(pattern, machine[kernel])) for name, pattern in SASS.items()}
        refused = _memory(found, arch)
        refused += [f"{counts['local']} accesses to local memory"] if counts["local"] else []
        said = "\n".join(line for line in done.stderr.splitlines() if kernel in line)
        refused += machine_code.serialised(codes[kernel], machine[kernel], said)
        rows[f"{key} {readable(kernel)}"] = found.row(refused) | {"sass": _listed(counts)}
    return rows or {key: {"kernels": 0}}


def readable(kernel: str) -> str:
    """The name of a kernel as its source has it; as the compiler has it where there is no c++filt."""
    if shutil.which("c++filt") is None:
        return kernel
    name = subprocess.run(["c++filt", kernel], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"vitfast::|\(anonymous namespace\)::|^void ", "", name)
    return re.sub(r"\([^()]*\)$", "", name).replace(" >", ">").replace("unsigned char", "uint8_t")


def nvcc_release() -> str | None:
    """ "13.0"; None where there is no nvcc."""
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    release = re.search(r"release ([\d.]+)", said)
    return release.group(1) if release else None


def _failed(said: str) -> Row:
    lines = [line.strip() for line in said.strip().splitlines() if line.strip()] or ["no output"]
    # compilers begin with a copy of the source, which the last lines are about
    return {"refused": [f"does not compile: {' | '.join(lines[-3:])[:400]}"]}


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "none"


# out of what compilers write


def _by_kernel(name: str, text: str) -> dict[str, str]:
    """What stands behind each kernel's name; what comes before the first is of none."""
    parts = re.split(name, text)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _cuobjdump(what: str, cubin: Path) -> str:
    return subprocess.run([knobs.nvidia.cuobjdump.path, what, str(cubin)], capture_output=True, text=True).stdout


def _usage(cubin: Path) -> dict[str, tuple[int, int, int]]:
    """Registers, stack and static shared memory of each kernel."""
    said = _cuobjdump("--dump-resource-usage", cubin)
    if "Resource usage" not in said:
        raise RuntimeError(f"cuobjdump did not tell registers and stack: {said[-400:]}")
    used = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", said)
    return {kernel: tuple(map(int, numbers)) for kernel, *numbers in used}


def _instructions(ptx: str) -> tuple[dict[str, int], dict[str, int], bool]:
    """`Found.mma`, `Found.loads` and `Found.tf32`."""
    mma = Counter(f"{kind} {shape}" for kind, pattern in MMA.items() for shape in re.findall(pattern, ptx))
    loads: Counter[tuple[str, int]] = Counter()
    for load in re.findall(r"\bld\.[\w.:]*\bglobal[\w.:]*", ptx):
        lanes, bits = re.search(r"\.v(\d)\b", load), re.search(r"\.[bsuf](\d+)$", load)
        loads["ld", int(lanes.group(1) if lanes else 1) * int(bits.group(1)) // 8] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\S* *\[[^\]]*\], *\[[^\]]*\], *(\w+)", ptx):
        loads["cp.async", int(size, 0)] += 1
    bulk = len(re.findall(r"\bcp\.async\.bulk\.(?:tensor\.\dd\.)?shared", ptx))
    listed = {f"{kind} {size}": count for (kind, size), count in sorted(loads.items())} | (
        {"bulk": bulk} if bulk else {}
    )
    # not as part of a name
    return dict(sorted(mma.items())), listed, re.search(r"[.:]tf32\b", ptx) is not None


def _dots(ttir: str) -> dict[tuple[int, int, int, str], int]:
    shape = r"tt\.dot .*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>"
    return dict(Counter((int(m), int(n), int(k), kind) for m, k, kind, n in re.findall(shape, ttir)))
