"""The C++ sources under sanitizers, in programs of their own: a stray read changes no result in Python."""

import pytest
from native_build import instruction_sets, run_kernels_on_host, run_sanitized

every_isa = pytest.mark.parametrize("isa", instruction_sets())


def test_two_pixels_share_a_place_or_one_is_out_of_range(tmp_path_factory):
    """patch_geometry.h: an off-by-one at the padding, channels and columns swapped, 32-bit products."""
    assert run_sanitized("check_patch_geometry.cpp", tmp_path_factory) == "ok\n"


@pytest.mark.slow
@every_isa
def test_patch_rows_touches_a_byte_beside_its_image_or_rows(isa, tmp_path_factory):
    """Whole vectors at the end of a view, a wrong line for some stride; also another result than the plain loop's."""
    assert run_sanitized("check_patch_rows.cpp", tmp_path_factory, isa, ["cpu/kernels.cpp"]) == "ok\n"


@pytest.mark.slow
@every_isa
@pytest.mark.parametrize("share", [3, pytest.param(1, marks=pytest.mark.full)], ids="one trial of {}".format)
def test_kernel_touches_a_byte_beside_its_tensors(isa, share, tmp_path_factory):
    """Whole vectors at the end of a view, sizes that fill no panel; also another result than plain loops in double."""
    assert run_sanitized("check_kernels.cpp", tmp_path_factory, isa, ["cpu/kernels.cpp"], [share]) == "ok\n"


# file of csrc/cuda, what stands there, what takes its place where BUG is true, who sees it
PLANTED = {
    "barrier of a step": (
        "patch_embed.cuh", "      __syncthreads();\n      const int next",
        "      if (!BUG) __syncthreads();\n      const int next", "thread",
    ),
    "barrier before the sums": (
        "patch_embed.cuh", "finish();\n    __syncthreads();", "finish();\n    if (!BUG) __syncthreads();", "thread"
    ),
    "wait for copies": (
        "patch_embed.cuh", "wait_for_copies<AHEAD - 1>()",
        "BUG ? wait_for_copies<AHEAD>() : wait_for_copies<AHEAD - 1>()", "address",
    ),
    "wait for wgmma": ("patch_embed.cuh", "{ wait_for_wgmma<1>(); }", "{ if (!BUG) wait_for_wgmma<1>(); }", "thread"),
    "fence before wgmma": ("patch_embed.cuh", "show_to_wgmma();", "if (!BUG) show_to_wgmma();", "address"),
    "index of a fragment": (
        "patch_embed.cuh", "lane / 16 * 8 + lane % 8", "(BUG ? lane / 8 % 2 : lane / 16) * 8 + lane % 8", "address"
    ),
    "index of a transposed fragment": (
        "patch_gradient.cuh", "p + matrix / 2 * 8 + lane % 8", "p + (BUG ? matrix % 2 : matrix / 2) * 8 + lane % 8",
        "address",
    ),
    "rows found where they are read": (
        "patch_gradient.cuh", "rows[(next + 1) % 2].find", "rows[(next + !BUG) % 2].find", "thread"
    ),
    "tail of the rows": (
        "patch_pixels.cuh", "if (m >= images.patches) continue;", "if (!BUG && m >= images.patches) continue;",
        "address",
    ),
    "tail of the columns": (
        "patch_pixels.cuh", "column < images.K && rows.has", "(BUG || column < images.K) && rows.has", "address"
    ),
    "tail of the tokens": (
        "patch_embed.cuh", "images.K && first + n < a.D;", "images.K && (BUG || first + n < a.D);", "address"
    ),
    "value of padding": (
        "patch_pixels.cuh", "inside[j] ? scaling[2 * c + 1] : 0", "BUG || inside[j] ? scaling[2 * c + 1] : 0", "address"
    ),
}  # fmt: skip

BUGS = [bug[:3] for bug in PLANTED.values()]


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
@pytest.mark.parametrize(
    "bugs", [pytest.param(BUGS, id="no bug is there"), pytest.param((), marks=pytest.mark.full, id="as it is")]
)
def test_kernel_for_gpus_races_or_touches_a_byte_beside_its_tensors(bugs, sanitizers, tmp_path_factory):
    """Patch embedding on the host: also another result than plain loops in double, an address that is not aligned, a
    barrier that not all threads come to, a fence that is missing."""
    done = run_kernels_on_host(tmp_path_factory, sanitizers, bugs)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_in_a_kernel_for_gpus_is_not_seen(name, tmp_path_factory):
    sanitizers = {"address": "address,undefined"}.get(PLANTED[name][3], "thread")
    done = run_kernels_on_host(tmp_path_factory, sanitizers, BUGS, list(PLANTED).index(name))
    assert done.returncode, f"{name}: {done.stdout}"


@pytest.mark.full
@pytest.mark.slow
def test_stage_filled_too_early_is_not_seen(tmp_path_factory):
    """A constant, of which a program has one."""
    bug = ("patch_embed.cuh", "STAGES<chunks> - 2", "STAGES<chunks> - 1")
    done = run_kernels_on_host(tmp_path_factory, "thread", [bug])
    assert done.returncode, done.stdout
