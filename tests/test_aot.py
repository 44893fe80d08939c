"""Kernels compiled for four architectures with no GPU: what is refused, and what the committed record says."""

import functools
import json
import re
import shutil
from pathlib import Path

import aot_samples as samples
import pytest
import triton

from benchmarks.aot import __main__ as aot
from benchmarks.aot import compiled as aot_compile
from benchmarks.aot import machine_code as aot_machine
from benchmarks.aot.addresses import narrow_rows
from benchmarks.aot.compiled import (
    ARCHS,
    CUDA_ARCHS,
    NO_NVCC,
    SHARED_LIMITS,
    compilations,
    compile_one,
    cuda_rows,
    gate,
)
from benchmarks.aot.machine_code import BARRIER, barriers, epilogue, programs, serialised, unguarded

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc")
RERUN = "`make aot` renews benchmarks/aot.json; look at what it prints"


@functools.cache
def found_in(name, arch=90):
    return compile_one(getattr(samples, name), arch)


def refused(name, arch=90):
    return gate(getattr(samples, name), arch, found_in(name, arch))


# kernels of the package


def test_the_record_is_of_other_source():
    """All of it is compiled by `make aot`, which takes minutes, and a sample of it below."""
    assert aot.read(aot.RECORD)["sources"] == aot.sources(), RERUN


# by Triton, what is refused of another one than the record's: its register allocator is a little worse there
REFUSED = {"3.8": {"linear/finish_rows slope sm_80": ["spills: 8 bytes of stack"]}}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch if arch == 90 else pytest.param(arch, marks=pytest.mark.full) for arch in ARCHS])
@pytest.mark.parametrize("module", aot.KERNEL_MODULES)
def test_a_default_configuration_is_refused_or_not_the_recorded_one(module, arch):
    """Another Triton than the record's allots other registers, so that only what is refused is compared there."""
    recorded = aot.read(aot.RECORD)
    rows, kernels = {}, set()
    listed = compilations(module, arch)
    for job in aot.kernel_jobs([module], [arch]):
        # the first of each kernel in each dtype
        kernel = tuple(job.key.split()[:2])
        if listed[job.key].default and kernel not in kernels:
            kernels.add(kernel)
            rows |= job.work(*job.arguments)
    known = REFUSED.get(triton.__version__.rpartition(".")[0], {})
    assert {key: row["refused"] for key, row in rows.items() if "refused" in row} == {
        key: why for key, why in known.items() if key in rows
    }
    if recorded["triton"] == triton.__version__:
        assert aot.differences(recorded["rows"], rows, gone=False) == [], RERUN


def test_the_record_is_of_another_triton_than_is_tested():
    """Nothing would be compared with it."""
    assert f"triton=={aot.read(aot.RECORD)['triton']}" in (ROOT / "constraints.txt").read_text().splitlines(), RERUN


def test_a_kernel_module_is_left_out():
    files = (ROOT / "vitfast/kernels/triton").glob("*.py")
    written = {path.stem for path in files if "def compilations(" in path.read_text()}
    assert {f"vitfast.kernels.triton.{name}" for name in written} == set(aot.KERNEL_MODULES)


def test_the_record_is_of_other_configurations_or_has_refused_ones():
    rows = aot.read(aot.RECORD)["rows"]
    listed = [job.key for job in aot.kernel_jobs(aot.KERNEL_MODULES, ARCHS)]
    assert [key for key in rows if not key.startswith("csrc/")] == listed, RERUN
    assert [key for key, row in rows.items() if "refused" in row or "skipped" in row] == []


@pytest.mark.slow
def test_a_cuda_kernel_is_refused_or_not_the_recorded_one():
    """For one architecture: the others take as long again, and the record's digest holds them to these sources."""
    recorded = aot.read(aot.RECORD)
    rows = {}
    for job in aot.cuda_jobs(aot.CUDA_SOURCES, [80]):
        rows |= job.work(*job.arguments)
    assert {key.split()[0] for key in rows} == {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cu")}
    if NVCC is None:
        assert all(row == {"skipped": NO_NVCC} for row in rows.values())
        return
    assert {key: row["refused"] for key, row in rows.items() if "refused" in row} == {}
    if recorded["nvcc"] == aot.nvcc_release():
        assert aot.differences(recorded["rows"], rows, gone=False) == [], RERUN


# what is refused


@pytest.mark.parametrize("arch", ARCHS)
def test_a_good_kernel_is_refused(arch):
    found = found_in("FINE", arch)
    assert gate(samples.FINE, arch, found) == []
    assert 32 < found.registers <= 255 and found.stack == 0 and 0 < found.shared < SHARED_LIMITS[arch]
    unit = {80: "mma.sync m16n8k16", 89: "mma.sync m16n8k16", 90: "wgmma m64n64k16", 100: "tcgen05 f16"}[arch]
    assert unit in found.mma and not found.tf32
    assert found.dots == {(64, 64, 64, "bf16"): 2}


def test_a_default_that_spills_passes():
    spills, serialised = refused("SPILLING")
    assert re.fullmatch(r"spills: \d+ bytes of stack", spills) and "C7511" in serialised


@pytest.mark.full
def test_a_configuration_that_only_tuning_may_choose_must_not_spill():
    assert found_in("NOT_TUNED_FOR").stack > 0 and refused("NOT_TUNED_FOR") == []


@pytest.mark.parametrize("arch", [80, 90])
def test_tf32_where_ieee_is_promised_passes(arch):
    assert refused("TF32_IN_IEEE", arch) == ["TF32 where IEEE products are promised"]
    assert refused("IEEE", arch) == [] and not found_in("IEEE", arch).tf32


def test_loads_of_two_bytes_pass():
    (why,) = refused("NARROW_LOADS")
    assert "no load from global memory is 16 bytes wide" in why and "ld 2" in why


def test_products_that_wgmma_does_not_take_pass_on_sm_90():
    (why,) = refused("TOO_FEW_WARPS")
    assert why.startswith("no wgmma for products of 64 rows or more") and "mma.sync" in why
    assert refused("SMALL_TILE") == []
    half = found_in("FINE")._replace(mma={"wgmma m64n64k16": 4, "mma.sync m16n8k16": 64})
    why = "some of its products are not wgmma: 4 wgmma m64n64k16, 64 mma.sync m16n8k16"
    assert gate(samples.FINE, 90, half) == [why]
    assert gate(samples.FINE, 100, half._replace(mma={})) == ["its products are not on tensor cores"]


def test_more_shared_memory_than_the_card_has_passes():
    needs = found_in("TOO_MUCH_SHARED", 89).shared
    assert SHARED_LIMITS[89] < needs <= SHARED_LIMITS[80]
    assert f"{needs} bytes of shared memory, sm_89 has 101376" in refused("TOO_MUCH_SHARED", 89)
    assert [why for why in refused("TOO_MUCH_SHARED", 80) if "shared" in why] == []
    large = found_in("FINE", 100)._replace(tensor_memory=1024)
    assert gate(samples.FINE, 100, large) == ["1024 columns of tensor memory, sm_100 has 512"]


def test_wgmma_one_after_the_other_passes():
    """What ptxas says of it; where it says nothing, the groups in machine code."""
    kernel = samples.SPILLING
    found = found_in("SPILLING")
    (why,) = found.serialised
    assert why.startswith("wgmma one after the other: ptxas: (C7511) Potential Performance Loss")
    assert [why for why in gate(kernel._replace(default=False), 90, found) if "wgmma" in why] == []
    assert found_in("FINE").serialised == ()
    ptx = 3 * "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 1;\n"
    ptx += "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
    product, wait = "  HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;\n", "  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
    together = 3 * product + wait
    assert serialised(ptx, together, "") == serialised(ptx, 2 * together, "") == []
    (why,) = serialised(ptx, 3 * (product + wait), "")
    assert why == "wgmma one after the other: 3 waits for 3 HGMMA, 1 for 3 were asked for"
    assert serialised(ptx, together, "ptxas info    : (C7515) Potential Performance Loss") != []
    assert serialised(ptx, together, "ptxas info    : (C7519) warpgroup.arrive is injected") == []


def without_barrier(ptx, number):
    """The PTX without its barrier of that number."""
    begin, end = list(BARRIER.finditer(ptx))[number].span()
    return ptx[:begin] + ptx[end:]


EIGHT_WARPS = {
    "cp.async.cg.shared.global": samples.of_attention("copies", bm=128, warps=8),
    "st.shared": samples.of_attention("stores", bm=128, warps=8, stages=1),
    "mbarrier.arrive": compilations("vitfast.kernels.triton.linear", 90)[
        "linear/product 128x256x64 w8 s3 p4 desc persistent1 plain sm_90"
    ],
}


@pytest.mark.parametrize("what", EIGHT_WARPS)
def test_what_another_warpgroup_still_multiplies_is_overwritten(what, monkeypatch):
    """With one barrier deleted after the other, of a loop's the one that keeps copies or stores from the operands."""
    kept = []
    monkeypatch.setattr(aot_machine, "unguarded", lambda ptx: kept.append(ptx) or unguarded(ptx))
    assert gate(EIGHT_WARPS[what], 90, compile_one(EIGHT_WARPS[what], 90)) == []
    count = len(BARRIER.findall(kept[0]))
    found = [why for number in range(count) for why in unguarded(without_barrier(kept[0], number))]
    assert any(f"no barrier between a wait for wgmma and {what}" in why for why in found), found
    late = found_in("FINE")._replace(unguarded=("no barrier between a wait for wgmma and stmatrix",))
    assert gate(samples.FINE._replace(default=False), 90, late) == list(late.unguarded)


LOOP = """
.visible .entry k(
)
{
	mov.u32 %r1, %tid.x;
	bra.uni 	$L__BB0_2;
$L__BB0_1:
	FIRST
	wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 1;
	wgmma.wait_group.sync.aligned 0;
	MIDDLE
	wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 1;
	wgmma.wait_group.sync.aligned 0;
	LAST
	@%p1 bra 	$L__BB0_2;
	bra.uni 	$L__BB0_3;
$L__BB0_2:
	SECOND
	bra.uni 	$L__BB0_1;
$L__BB0_3:
	AFTER
	ret;
}
"""
STORE, COPY, SYNC = "st.shared.b32 [%r2], %r3;", "@%p2 cp.async.cg.shared.global [%r2], [%rd1], 16;", "bar.sync \t0;"


@pytest.mark.parametrize(
    "code, wrong",
    [
        ({"FIRST": STORE}, True), ({"FIRST": STORE, "SECOND": SYNC}, False), ({"FIRST": STORE, "LAST": SYNC}, False),
        ({"FIRST": COPY}, True), ({"SECOND": COPY, "FIRST": SYNC}, True), ({"SECOND": SYNC + "\n" + COPY}, False),
        ({"AFTER": STORE}, True), ({"AFTER": STORE, "LAST": SYNC}, False), ({"AFTER": STORE, "SECOND": SYNC}, True),
        ({"MIDDLE": STORE}, True), ({"MIDDLE": STORE, "FIRST": SYNC}, False), ({"MIDDLE": COPY, "FIRST": SYNC}, True),
        ({"MIDDLE": SYNC + "\n" + COPY}, False),
        ({"LAST": "bar.sync 1, 128;\n" + STORE}, True), ({"LAST": "mbarrier.arrive.shared.b64 _, [%r1];"}, True),
        ({"LAST": "ld.shared.b32 %r3, [%r2];"}, False), ({"SECOND": "// bar.sync 0;\n" + STORE}, True),
    ],
)  # fmt: skip
def test_a_way_round_a_barrier_is_not_found(code, wrong):
    """A round's end, the loop's end, barriers of some threads only, stores between two waits of one round."""
    ptx = LOOP
    for place in ("FIRST", "MIDDLE", "LAST", "SECOND", "AFTER"):
        ptx = ptx.replace(place, code.get(place, ""))
    assert (unguarded(ptx) != []) is wrong


@pytest.mark.parametrize(
    "arguments, expected",
    [
        # of CUDA's occupancy calculator
        ((90, 128, 49152, 4), 4), ((90, 32, 0, 8), 8), ((90, 255, 114688, 8), 1), ((90, 168, 40000, 4), 3),
        ((80, 64, 100 << 10, 4), 1), ((80, 64, 80 << 10, 4), 2), ((89, 40, 0, 4), 12), ((90, 16, 0, 1), 32),
        ((90, 255, 0, 16), 0), ((100, 64, 1024, 4, 256), 2), ((90, 24, 228 << 10, 4), 0),
    ],
)  # fmt: skip
def test_programs_of_a_multiprocessor_are_miscounted(arguments, expected):
    assert programs(*arguments) == expected


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;    /* 0x00000a00ff017b82 */
                                                             /* 0x000fe20000000f00 */
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/                   MOV R2, R3 ;
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/              @!P0 BRA 0x20 ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/               @P1 BRA 0x70 ;
        /*00a0*/               @P2 BRA 0x10 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0x40 ;
        /*00d0*/                   BRA 0xd0;
        /*00e0*/                   NOP;
"""


def test_epilogue_or_barriers_of_a_loop_are_miscounted():
    """In inner loops only, whatever lies behind the last exit, which are detours of a wait."""
    assert epilogue(SASS) == 5 and barriers(SASS) == [2, 1]
    plain = SASS.replace("HGMMA", "FADD").replace("HMMA", "FADD")
    assert epilogue(plain) is None and barriers(plain) == []
    row = aot_compile.kernel_row("aot_samples", "aot_samples/fine sm_90", 90)["aot_samples/fine sm_90"]
    assert row["barriers"] == "2" and row["epilogue"] > 100 and "serialised" not in row
    # as many as its registers leave room for, which another Triton needs more of
    assert row["programs"] == (4 if aot.read(aot.RECORD)["triton"] == triton.__version__ else 3)


HOW = [
    ("wide", 0),
    ("wide, divided", 0),
    ("wide, counter", 0),
    ("wide, programs in groups", 0),
    ("wide, only compared in 32 bits", 0),
    ("narrow", 1),
    ("narrow, cast too late", 1),
    ("narrow, as a tensor", 1),
    ("narrow, constant stride", 1),
    ("wide, counter times a constant", 0),
    ("narrow, counter of a persistent kernel", 1),
    ("narrow, whole images", 1),
    ("narrow, remainder", 1),
    ("narrow, one branch", 1),
    ("narrow, carried by a loop", 1),
    ("narrow, counter", 1),
    ("narrow, after a loop", 1),
    ("narrow, for the next round", 1),
    ("narrow, while", 1),
]


@pytest.mark.parametrize(("how", "count"), HOW)
def test_a_row_offset_in_32_bits_passes_or_one_in_64_does_not(how, count):
    compilation = samples.of_copy(how)
    reasons = gate(compilation, 90, compile_one(compilation, 90))
    assert len(reasons) == count
    assert all(re.match(r"aot_samples\.py:\d+: a program id (or loop counter )?times ", why) for why in reasons)


def test_a_sibling_region_with_the_same_names_hides_an_offset():
    """By hand, so that the text stays what the parser has to take."""
    found = narrow_rows(
        """
module {
  tt.func public @kernel(%x: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("x"(#loc)), %n: i32 loc("n"(#loc))) {
    %0 = tt.get_program_id x : i32 loc(#loc1)
    %1 = arith.cmpi slt, %0, %n : i32 loc(#loc1)
    %2:2 = scf.if %1 -> (i32, i64) {
      %3 = arith.muli %0, %n : i32 loc(#loc9)
      %4 = arith.extsi %n : i32 to i64 loc(#loc1)
      scf.yield %n, %4 : i32, i64 loc(#loc1)
    } else {
      %3 = arith.extsi %0 : i32 to i64 loc(#loc1)
      %4 = arith.muli %3, %3 : i64 loc(#loc1)
      scf.yield %0, %4 : i32, i64 loc(#loc1)
    } loc(#loc1)
    %5 = tt.addptr %x, %2#1 : !tt.ptr<f32>, i64 loc(#loc1)
    %6 = arith.muli %2#0, %n : i32 loc(#loc2)
    %7 = tt.addptr %5, %6 : !tt.ptr<f32>, i32 loc(#loc1)
    tt.return loc(#loc1)
  } loc(#loc)
} loc(#loc)
#loc = loc("/a/kernel.py":1:0)
#loc1 = loc("/a/kernel.py":5:4)
#loc2 = loc("offset"(#loc3))
#loc3 = loc(callsite(#loc4 at #loc1))
#loc4 = loc("/a/kernel.py":7:4)
#loc9 = loc("/a/kernel.py":9:4)
"""
    )
    assert found == ["kernel.py:7: a program id or loop counter times an argument in 32 bits reaches an address"]


def test_arguments_that_the_kernel_does_not_have_are_ignored():
    for wrong in (
        samples.FINE._replace(constants={**samples.FINE.constants, "BK": 8}),
        samples.FINE._replace(signature={}, divisible=()),
        samples.FINE._replace(divisible=("D",)),
    ):
        with pytest.raises(ValueError, match="fine: "):
            compile_one(wrong, 90)
    with pytest.raises(TypeError, match="got function"):
        compile_one(samples.FINE._replace(kernel=samples.attention.fn), 90)


def test_loads_and_products_are_counted_by_another_width():
    found = aot_compile._instructions(
        """
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.L1::evict_last.L2::cache_hint.v2.f32 { %r1, %r2 }, [ %rd1 + 0 ], %rd2;
        ld.global.nc.b16 { %rs1 }, [ %rd1 + 0 ];
        ld.global.v8.b32 {%r1, %r2}, [%rd1];
        ld.param.b64 %rd1, [kernel_param_0];
        ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
        cp.async.ca.shared.global.L2::128B [%r1], [%rd1], 4;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];
        cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r2, %r3}], [%r4];
        st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };
        wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, p, 1, 1, 0, 1;
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 { %f1 }, { %r1 }, { %r2 }, { %f1 };
        tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p1;
        """
    )
    mma, loads, tf32 = found
    expected = {"bulk": 1, "cp.async 4": 1, "cp.async 16": 1, "ld 2": 1, "ld 8": 1, "ld 16": 1, "ld 32": 1}
    assert loads == expected and tf32
    assert mma == {"wgmma m64n256k16": 1, "mma.sync m16n8k8": 1, "tcgen05 f16": 1}
    assert not aot_compile._instructions(".visible .entry attention_tf32(")[2]


# CUDA


def test_cuda_is_compiled_for_other_architectures_than_the_extension():
    built = re.search(r'^ARCHS = "(.*)"$', (ROOT / "setup.py").read_text(), re.MULTILINE).group(1)
    assert built.replace("+PTX", "").split(";") == list(CUDA_ARCHS.values())


@pytest.mark.slow
def test_a_cuda_kernel_that_spills_passes(tmp_path, monkeypatch):
    file = tmp_path / "sample.cu"
    file.write_text(
        "__global__ void fine(float4* x) { __shared__ float4 s[256]; s[threadIdx.x] = x[threadIdx.x]; __syncthreads();"
        " x[threadIdx.x] = s[255 - threadIdx.x]; }\n"
        "__global__ void __launch_bounds__(1024, 2) spilling(float* x) { float a[64];"
        "for (int i = 0; i < 64; ++i) a[i] = x[i * 1024 + threadIdx.x]; __syncthreads();"
        "for (int n = 0; n < 64; ++n) for (int i = 0; i < 64; ++i) a[i] = a[i] * a[(i + 7) % 64] + x[n];"
        "for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = a[i]; }\n"
    )
    if NVCC is None:
        (row,) = cuda_rows(str(file), "sample", 90).values()
        assert row == {"skipped": NO_NVCC}
        return
    for arch in CUDA_ARCHS:
        rows = {key.split()[-1]: row for key, row in cuda_rows(str(file), "sample", arch).items()}
        fine, spilling = rows["fine"], rows["spilling"]
        assert "refused" not in fine and fine["shared"] == 4096 and "1 ld 16" in fine["loads"]
        assert spilling["registers"] <= 32 and spilling["refused"][0].startswith("spills: ")
    file.write_text("__global__ void broken() { nothing; }")
    (row,) = cuda_rows(str(file), "sample", 80).values()
    assert 'identifier "nothing" is undefined' in row["refused"][0]
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    assert list(cuda_rows(str(file), "sample", 90).values()) == [{"skipped": NO_NVCC}]


# the command


@pytest.fixture
def of_samples(monkeypatch, tmp_path):
    """The command over the samples, with a record of its own; exit status and what it printed."""
    monkeypatch.setattr(aot, "KERNEL_MODULES", ("aot_samples",))
    monkeypatch.setattr(aot, "RECORD", tmp_path / "aot.json")
    monkeypatch.setattr(aot, "ROOT", tmp_path)
    monkeypatch.setattr(aot, "CUDA_SOURCES", ())
    return aot.main


@pytest.mark.slow
def test_one_configuration_that_fails_ends_the_command_or_is_not_named(of_samples, capsys):
    assert of_samples(["--arch", "80"]) == 1
    said = capsys.readouterr().out
    refusals = dict(re.findall(r"^(aot_samples/.*?) sm_80 .*?((?:\n    REFUSED .*)*)$", said, re.M))
    assert set(refusals) == {f"aot_samples/{each.name}" for each in samples.compilations(80)}
    assert refusals["aot_samples/fine"] == refusals["aot_samples/copy wide"] == ""
    assert "does not compile: " in refusals["aot_samples/does not compile"] and "C must be above 1" in said
    assert "the compiler took its process down" in refusals["aot_samples/takes the process down"]
    assert "in 32 bits reaches an address" in refusals["aot_samples/copy narrow"]
    assert "5 rows, 3 refused, 0 skipped" in said
    assert not aot.RECORD.exists(), "written without --write"


@pytest.mark.slow
@pytest.mark.full
def test_the_record_changes_from_run_to_run(of_samples, monkeypatch, capsys):
    monkeypatch.setattr(aot, "compilations", lambda module, arch: {f"aot_samples/fine sm_{arch}": samples.FINE})
    texts = []
    for _ in range(2):
        assert of_samples(["--write"]) == 0
        texts.append(aot.RECORD.read_text())
    assert texts[0] == texts[1]
    first, second = capsys.readouterr().out.split("compared with")[1:]
    assert first.count("new      aot_samples/fine sm_") == 4 and "no difference" in second
    rows = json.loads(texts[0])["rows"]
    assert list(rows) == [f"aot_samples/fine sm_{arch}" for arch in ARCHS]
    assert "wgmma" in rows["aot_samples/fine sm_90"]["mma"]


def test_a_part_of_the_configurations_takes_the_place_of_the_record(of_samples, capsys):
    for part in (["--arch", "80"], ["--only", "fine"]):
        assert of_samples([*part, "--write"]) == 2
    assert "--write takes all configurations" in capsys.readouterr().err and not aot.RECORD.exists()


def test_a_jump_does_not_show():
    row = {"registers": 128, "stack": 0, "shared": 40960, "mma": "8 wgmma m64n64k16", "loads": "16 cp.async 16"}
    before = {"a sm_90": row, "b sm_90": row, "c sm_90": row}
    after = {
        "a sm_90": row | {"registers": 168, "stack": 24, "mma": "64 mma.sync m16n8k16"},
        "b sm_90": row,
        "d sm_90": row | {"refused": ["spills: 8 bytes of stack"]},
    }
    new, gone, changed = aot.differences(before, after)
    assert new.startswith("new      d sm_90 ") and "registers 128" in new and "spills" in new
    assert gone.startswith("gone     c sm_90 ")
    assert changed == (
        "changed  a sm_90: registers 128 -> 168 (+40); stack 0 -> 24 (+24); "
        "lost wgmma: mma 8 wgmma m64n64k16 -> 64 mma.sync m16n8k16"
    )
    assert len(aot.differences(before, after, gone=False)) == 2


def test_rows_of_cuda_are_lost_where_there_is_no_nvcc(monkeypatch):
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    before = {"schema": 1, "nvcc": "13.0", "rows": {"csrc/a.cu sm_80 k": {"registers": 8}, "gone sm_80": {}}}
    after = aot.record_of({"k sm_80": {}, "csrc/a.cu sm_80": {"skipped": NO_NVCC}}, before)
    assert after["rows"] == {"k sm_80": {}, "csrc/a.cu sm_80 k": {"registers": 8}} and after["nvcc"] == "13.0"


def test_a_record_of_another_schema_is_read(of_samples, capsys):
    for text, why in (('{"schema": 2, "rows": {}}', "schema 2 is not known, expected 1"), ('{"sche', "no whole JSON")):
        aot.RECORD.write_text(text)
        assert of_samples([]) == 2
        assert f"aot.json: {why}" in capsys.readouterr().err


def test_two_blocks_of_keys_are_weighed_by_shifts_that_differ_by_a_rounding(monkeypatch):
    """A compiler that makes one operation of a product and the difference behind it takes the product unrounded."""
    kept = []
    monkeypatch.setattr(aot_machine, "unguarded", lambda ptx: kept.append(ptx) or [])
    online = next(each for name, each in compilations("vitfast.kernels.triton.attention", 90).items()
                  if name.startswith("attention/forward_online fp32 D64"))  # fmt: skip
    gate(online, 90, compile_one(online, 90))
    by = {register: operation for operation, register in re.findall(r"(\S+)\s+(%\w+),", kept[0])}
    arguments = re.findall(r"ex2\.approx\.ftz\.f32\s+%\w+,\s*(%\w+)", kept[0])
    # of a weight, and of what an earlier block has summed up
    assert {by[each] for each in arguments} == {"fma.rn.f32", "sub.f32"}
