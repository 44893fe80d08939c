"""The instructions of AMX in csrc/cpu/tiles.h. On CPUs that have none they trap, and tests/native/amx_by_trap.cpp
carries them out as the manual has it.
"""

import os
import platform
import shutil
import subprocess
import sys

import pytest
from native_build import CSRC, PROGRAMS, SANITIZE, built_once, flags_of, instruction_sets, must_have_sanitizers

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux", reason="AMX is of x86 on Linux"
)
FLAGS = ["-std=c++20", "-Wall", "-Wno-unused-function", f"-I{CSRC}", f"-I{PROGRAMS}"]
AMX = ["-mamx-tile", "-mamx-bf16"]
BODIES = {"real": AMX, "plain": ["-DVITFAST_PLAIN_TILES"]}
OPTIMISED = ["-O3", "-ffp-contract=fast", "-fopenmp"]  # as in setup.py
# that tiles are used, and no thread's are left configured; threads that wait leave the cores to those that work
CHECKS = {"AMX_BY_TRAP": "used", "OMP_WAIT_POLICY": "passive"}
BUILDS = {
    f"{compiler} {options}": (compiler, options.split())
    for compiler in ("g++", "clang++")
    for options in ("-O0", "-O2", "-O3", "-O3 -flto")
}


def compiled(tmp_path_factory, source, name, *flags, **how):
    return built_once(tmp_path_factory, f"{name}.o", *FLAGS, *flags, "-c", source, **how)


def trap(tmp_path_factory, *sanitizers):
    name = "amx_by_trap-sanitized" if sanitizers else "amx_by_trap"
    return compiled(tmp_path_factory, PROGRAMS / "amx_by_trap.cpp", name, "-O2", *sanitizers)


def check_tiles(tmp_path_factory, name, *options, compiler=None, bug=None):
    """The program, of which one body may be compiled with a bug: (body, right, wrong)."""

    def with_bug(folder):
        body, right, wrong = bug
        text = (CSRC / "cpu" / "tiles.h").read_text()
        parts = text.split("#else\n")
        assert len(parts) == 2
        changed = 0 if body == "real" else 1
        assert parts[changed].count(right) == 1, f"tiles.h has no {right!r} any more"
        parts[changed] = parts[changed].replace(right, wrong)
        csrc = folder / f"{name}-csrc"
        (csrc / "cpu").mkdir(parents=True, exist_ok=True)
        (csrc / "cpu" / "tiles.h").write_text("#else\n".join(parts))
        return [f"-I{csrc}"]

    how = {"compiler": compiler}
    shared = "-".join(["tiles", *([compiler] if compiler else []), *options])
    parts = [trap(tmp_path_factory, *(option for option in options if option in SANITIZE))]
    if len(options) > 1:  # of a whole program
        parts.append(compiled(tmp_path_factory, PROGRAMS / "check_tiles.cpp", f"{shared}-check", *options, **how))
    else:
        parts.append(compiled(tmp_path_factory, PROGRAMS / "check_tiles.cpp", "check_tiles", "-O1"))
    for body, flags in BODIES.items():
        flags = [*options, *flags, f"-DBODY={body}_body"]
        if bug and bug[0] == body:
            # its folder comes before that of the right header
            target = built_once(
                tmp_path_factory, f"{name}.o", *FLAGS[:3], f"-I{PROGRAMS}", *flags, "-c", PROGRAMS / "tiles_body.cpp",
                sources=lambda folder: [*with_bug(folder), f"-I{CSRC}"], **how,
            )  # fmt: skip
        else:
            target = compiled(tmp_path_factory, PROGRAMS / "tiles_body.cpp", f"{shared}-{body}", *flags, **how)
        parts.append(target)
    return built_once(tmp_path_factory, name, *options, *parts, "-pthread", **how)


def run(program, *arguments, **variables):
    # a sanitizer's runtime has to be the first library
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | variables
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300)
    if done.stdout.startswith("skipped"):
        pytest.skip(done.stdout.strip())
    return done


def passed(done):
    return done.returncode == 0 and done.stdout == "ok\n"


@pytest.mark.parametrize(
    "compiler,options",
    [pytest.param(*build, marks=[pytest.mark.slow] * ("-flto" in build[1])) for build in BUILDS.values()],
    ids=BUILDS,
)
def test_instructions_and_plain_tiles_differ_in_a_bit(compiler, options, tmp_path_factory):
    """Order of the sums, denormals, signs of zero, the edge of the normal numbers; a configuration that stays, is lost
    or was optimised away; threads, exceptions and fork.
    """
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    name = f"check_tiles-{compiler}{''.join(options)}"
    done = run(check_tiles(tmp_path_factory, name, *options, compiler=compiler))
    assert passed(done), done.stdout + done.stderr


def test_tiles_behave_as_c_plus_plus_does_not_define(tmp_path_factory):
    """Shifts and misaligned reads in the plain body, a row too far in what either body reads or writes."""
    must_have_sanitizers(tmp_path_factory)
    done = run(check_tiles(tmp_path_factory, "check_tiles-sanitized", "-O1", "-g", *SANITIZE), 300)
    assert passed(done), done.stdout + done.stderr


def kernels_by_trap(tmp_path_factory, name, *options):
    """check_kernels.cpp on the kernels of amx_bf16, compared with their twins of plain tiles."""
    if "avx512_bf16" not in instruction_sets():
        pytest.skip("the CPU lacks the vectors of amx_bf16")
    flags = flags_of("amx_bf16")
    program = [*options, "-DVITFAST_ISA=both", "-include", PROGRAMS / "kernels_of_both_bodies.h"]
    parts = [
        trap(tmp_path_factory, *(option for option in options if option in SANITIZE)),
        compiled(tmp_path_factory, PROGRAMS / "check_kernels.cpp", f"{name}-check", *program),
        compiled(tmp_path_factory, PROGRAMS / "kernels_of_both_bodies.cpp", f"{name}-both", *options),
    ]
    for isa, more in {"amx_bf16": [], "plain_tiles": ["-DVITFAST_PLAIN_TILES"]}.items():
        more = [*options, *flags, *more, f"-DVITFAST_ISA={isa}", "-w"]  # gcc's own header of AVX-512 warns of itself
        parts.append(compiled(tmp_path_factory, CSRC / "cpu" / "kernels.cpp", f"{name}-{isa}", *more))
    return built_once(tmp_path_factory, name, *options, *parts, "-pthread")


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_trap_is_more_lenient_than_the_cpu(compiler, tmp_path_factory):
    """An address decoded wrongly, a tile of another shape, unconfigured or misshapen operands that are let through."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    how = {"compiler": compiler}
    part = compiled(tmp_path_factory, PROGRAMS / "check_amx_by_trap.cpp", f"check_amx_by_trap-{compiler}", "-O1", **how)
    done = run(built_once(tmp_path_factory, f"check_amx_by_trap-{compiler}", part, trap(tmp_path_factory), **how))
    assert passed(done), done.stdout + done.stderr


def test_tiles_are_found_where_they_may_not_be_used(tmp_path_factory):
    """Without permission, as in a sandbox; not saved by the system, hidden by a hypervisor, or of another size."""
    part = compiled(tmp_path_factory, PROGRAMS / "check_features.cpp", "check_features", "-O1")
    done = run(built_once(tmp_path_factory, "check_features", part))
    assert passed(done), done.stdout + done.stderr


@pytest.mark.slow
def test_kernels_differ_by_the_body_of_tiles(tmp_path_factory):
    """A kernel that leaves a thread's tiles configured, uses them unconfigured, or stores rows that the compiler does
    not know to be read; compiled as the extension is.
    """
    done = run(kernels_by_trap(tmp_path_factory, "kernels_by_trap", *OPTIMISED), 3, **CHECKS)
    assert passed(done), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.full
def test_kernels_touch_a_byte_beside_their_tensors_by_tiles(tmp_path_factory):
    """As test_native.py has it, with the instructions."""
    must_have_sanitizers(tmp_path_factory)
    sanitized = ["-O0", "-g", "-DVITFAST_KEPT_BYTES=0", *SANITIZE]
    done = run(kernels_by_trap(tmp_path_factory, "kernels_by_trap-sanitized", *sanitized), 1, **CHECKS)
    assert passed(done), done.stdout + done.stderr


FIRST_MEMORY = '"i"(tile) : "memory");\n  }\n  template <int tile>\n  void store'
SECOND_MEMORY = '"i"(tile) : "memory");\n  }\n  // sum'
# what stands in this body of tiles.h, and what takes its place
PLANTED = {
    "operands in another order": ("real", "%%tmm%c2, %%tmm%c1, %%tmm%c0", "%%tmm%c1, %%tmm%c2, %%tmm%c0"),
    "no configuration": ("real", 'asm volatile("ldtilecfg %0" : : "m"(all) : "memory");', ""),
    "configuration without its rows": ("real", "all.rows[tile] = TILE;", "all.rows[tile] = TILE - 1;"),
    "configuration read as one byte": ("real", '"m"(all) : "memory"', '"m"(all.palette)'),
    "configuration is not restored": ("real", "if (before.palette)", "if (false)"),
    "tiles are not released": ("real", 'asm volatile("tilerelease"', 'asm volatile(""'),
    "memory of a load is not named": ("real", FIRST_MEMORY, FIRST_MEMORY.replace(' : "memory"', "")),
    "memory of a store is not named": ("real", SECOND_MEMORY, SECOND_MEMORY.replace(' : "memory"', "")),
    "rows twice as far apart": ("real", "tileloadd (%0,%1,1)", "tileloadd (%0,%1,2)"),
    "another tile is zeroed": ("real", "tilezero %%tmm%c0", "tilezero %%tmm0"),
    "even times odd": (
        "plain", "add_product(even[n], first, low(", "add_product(even[n], first, high("
    ),
    "one sum for even and odd": (
        "plain", "odd[n] = add_product(odd[n], second", "even[n] = add_product(even[n], second"
    ),
    "pairs from the last to the first": (
        "plain", "for (int64_t k = 0; k < TILE; ++k)", "for (int64_t k = TILE - 1; k >= 0; --k)"
    ),
    "sums added one by one": (
        "plain", "flushed(total) + flushed(even[n] + odd[n])", "flushed(flushed(total) + even[n]) + odd[n]"
    ),
    "denormal operand is kept": ("plain", "return flushed(x);", "return x;"),
    "denormal sum is kept as it is read": ("plain", "flushed(flushed(total) +", "flushed(total +"),
    "denormal sum is kept as it is written": (
        "plain", "flushed(flushed(total) + flushed(even[n] + odd[n]))", "flushed(total) + flushed(even[n] + odd[n])"
    ),
    "denormal sum of even and odd is kept": ("plain", "flushed(even[n] + odd[n])", "(even[n] + odd[n])"),
    "denormal sum of products is kept": ("plain", "0x1p-126 - 0x1p-151", "0"),
    "what rounds to a normal number is flushed": ("plain", "0x1p-126 - 0x1p-151", "0x1p-126"),
    "tie with the smallest normal number is flushed": ("plain", "< 0x1p-126 - 0x1p-151", "<= 0x1p-126 - 0x1p-151"),
    "negative numbers are flushed to zero": ("plain", "__builtin_copysignf(0, x)", "0"),
    "negative products are flushed to zero": ("plain", "__builtin_copysignf(0, (float)exact)", "0"),
    "product rounded before it is added": ("plain", "(double)a * (double)b", "(double)(a * b)"),
    "rows of a load side by side": ("plain", "from + row * row_bytes", "from + row * TILE_ROW_BYTES"),
    "another tile is stored": ("plain", "row * row_bytes, cells[tile][row], ", "row * row_bytes, cells[0][row], "),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_program_misses_a_planted_bug(bug, tmp_path_factory):
    """Those that the program above cannot see would pass in tiles.h."""
    name = f"check_tiles-bug-{list(PLANTED).index(bug)}"
    done = run(check_tiles(tmp_path_factory, name, "-O2", bug=PLANTED[bug]))
    assert not passed(done), done.stdout + done.stderr
