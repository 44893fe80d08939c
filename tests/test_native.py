"""The C++ sources under sanitizers, in programs of their own: a stray read changes no result in Python."""

import shutil

import pytest
from native_build import CSRC, instruction_sets, run_kernels_on_host, run_sanitized

every_isa = pytest.mark.parametrize("isa", instruction_sets())


def test_two_pixels_share_a_place_or_one_is_out_of_range(tmp_path):
    """patch_geometry.h: an off-by-one at the padding, channels and columns swapped, 32-bit products."""
    assert run_sanitized("check_patch_geometry.cpp", tmp_path) == "ok\n"


@pytest.mark.slow
@every_isa
def test_patch_rows_touches_a_byte_beside_its_image_or_rows(isa, tmp_path):
    """Whole vectors at the end of a view, a wrong line for some stride; also another result than the plain loop's."""
    assert run_sanitized("check_patch_rows.cpp", tmp_path, isa, ["cpu/kernels.cpp"]) == "ok\n"


@pytest.mark.slow
@every_isa
def test_kernel_touches_a_byte_beside_its_tensors(isa, tmp_path):
    """Whole vectors at the end of a view, sizes that fill no panel; also another result than plain loops in double."""
    assert run_sanitized("check_kernels.cpp", tmp_path, isa, ["cpu/kernels.cpp"]) == "ok\n"


SANITIZERS = ["address,undefined", "thread"]


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", SANITIZERS)
def test_kernel_for_gpus_races_or_touches_a_byte_beside_its_tensors(sanitizers, tmp_path):
    """Patch embedding on the host: also another result than plain loops in double, an address that is not aligned, a
    barrier that not all threads come to, a fence that is missing."""
    done = run_kernels_on_host(tmp_path, sanitizers, trials=4)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout[-2000:] + done.stderr[-4000:]


# file of csrc/cuda, what stands there, what is planted in its place, who sees it
PLANTED = {
    "barrier of a step": (
        "patch_embed.cuh", "      __syncthreads();\n      const int next", "      const int next", "thread"
    ),
    "barrier before the sums": ("patch_embed.cuh", "finish();\n    __syncthreads();", "finish();", "thread"),
    "wait for copies": ("patch_embed.cuh", "wait_for_copies<AHEAD - 1>()", "wait_for_copies<AHEAD>()", "address"),
    "wait for wgmma": ("patch_embed.cuh", "{ wait_for_wgmma<1>(); }", "{}", "thread"),
    "fence before wgmma": ("patch_embed.cuh", "show_to_wgmma();", ";", "address"),
    "stage filled too early": ("patch_embed.cuh", "STAGES<chunks> - 2", "STAGES<chunks> - 1", "thread"),
    "index of a fragment": ("patch_embed.cuh", "lane / 16 * 8 + lane % 8", "lane / 8 % 2 * 8 + lane % 8", "address"),
    "index of a transposed fragment": (
        "patch_gradient.cuh", "p + matrix / 2 * 8 + lane % 8", "p + matrix % 2 * 8 + lane % 8", "address"
    ),
    "rows found where they are read": (
        "patch_gradient.cuh", "rows[(next + 1) % 2].find", "rows[next % 2].find", "thread"
    ),
    "tail of the rows": ("patch_pixels.cuh", "if (m >= images.patches) continue;", "", "address"),
    "tail of the columns": ("patch_pixels.cuh", "column < images.K && rows.has", "rows.has", "address"),
    "tail of the tokens": ("patch_embed.cuh", "images.K && first + n < a.D;", "images.K;", "address"),
    "value of padding": ("patch_pixels.cuh", "inside[j] ? scaling[2 * c + 1] : 0", "scaling[2 * c + 1]", "address"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_in_a_kernel_for_gpus_is_not_seen(name, tmp_path):
    file, right, wrong, sanitizers = PLANTED[name]
    shutil.copytree(CSRC, tmp_path / "csrc")
    source = (tmp_path / "csrc" / "cuda" / file).read_text()
    assert source.count(right) == 1
    (tmp_path / "csrc" / "cuda" / file).write_text(source.replace(right, wrong))
    done = run_kernels_on_host(tmp_path, sanitizers, trials=4, csrc=tmp_path / "csrc")
    assert done.returncode, f"{name}: {done.stdout}"
