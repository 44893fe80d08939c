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

# the same of the product by turns: it ends with another result, or never
PLANTED_IN_PRODUCT = {
    "arrival when a stage is read": (
        "product.cuh", "if (step > 0) ring.leave", "if (!BUG && step > 0) ring.leave", "address"
    ),
    "stage left while it is multiplied": (
        "product.cuh", "      wait_for_wgmma<1>();", "      if (!BUG) wait_for_wgmma<1>();", "thread"
    ),
    "parity of an empty stage": ("product.cuh", "ring.parity(at) ^ 1", "ring.parity(at) ^ !BUG", "address"),
    "parity of a full stage": (
        "product.cuh", "wait_for(ring.full(at), ring.parity(at));", "wait_for(ring.full(at), ring.parity(at) ^ BUG);",
        "address",
    ),
    "wait for a full stage": (
        "product.cuh", "      wait_for(ring.full(at)", "      if (!BUG) wait_for(ring.full(at)", "thread"
    ),
    "fewer bytes expected": (
        "product.cuh", "expect(ring.full(at), P::STAGE)", "expect(ring.full(at), P::STAGE - BUG * P::OF_WEIGHT)",
        "address",
    ),
    "more bytes expected than come": (
        "product.cuh", "      copy_box<1>(ring.rows(at)", "      if (!BUG) copy_box<1>(ring.rows(at)", "address"
    ),
    "lanes that a warp has left behind": (
        "product.cuh", "__syncwarp();\n    if (threadIdx", "if (!BUG) __syncwarp();\n    if (threadIdx", "thread"
    ),
    "turn that is not passed on": (
        "product.cuh", "== 0) arrive(ring.turn", "< !BUG) arrive(ring.turn", "address"
    ),
    "stage left in its own block only": (
        "product.cuh", "arrive_in_block(empty(at), rank)", "arrive_in_block(empty(at), BUG ? cluster_rank() : rank)",
        "thread",
    ),
    "end before the others of the cluster": (
        "product.cuh", "if constexpr (P::CLUSTER > 1) meet", "if constexpr (P::CLUSTER > 1) if (!BUG) meet", "address"
    ),
    "barriers that no fence shows": (
        "product.cuh", "i), GROUP_WARPS);\n    show_barriers();", "i), GROUP_WARPS);\n    if (!BUG) show_barriers();",
        "address",
    ),
    "other half of the weight's tile": (
        "product.cuh", "weight(at) + tiles.rank * SHARE", "weight(at) + (BUG ? 1 - tiles.rank : tiles.rank) * SHARE",
        "address",
    ),
    "statistics of another row": (
        "product.cuh", "row = first + 64 * d + 8 * h;", "row = first + 64 * d + 8 * (BUG ? 1 - h : h);", "address"
    ),
    "statistics of pieces without their distance": (
        "product_math.cuh", "static_cast<float>(length) * away", "static_cast<float>(length * !BUG) * away", "address"
    ),
    "tail of the rows": (
        "product.cuh", "if (row >= a.M || column >= a.N)", "if ((!BUG && row >= a.M) || column >= a.N)", "address"
    ),
    "tail of the columns": (
        "product.cuh", "      if (column >= a.N) continue;", "      if (!BUG && column >= a.N) continue;", "address"
    ),
    "words of another lane": (
        "product.cuh", "const bool upper = lane & distance;", "const bool upper = (lane ^ BUG) & distance;", "address"
    ),
    "GELU without its tail": ("product_math.cuh", "- a * exp2_about", "- (BUG ? 0 : a) * exp2_about", "address"),
}  # fmt: skip

PLANTS = {"check_patch_embed": PLANTED, "check_product": PLANTED_IN_PRODUCT}


def bugs_in(program):
    return [bug[:3] for bug in PLANTS[program].values()]


@pytest.mark.slow
@pytest.mark.parametrize("program", PLANTS)
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
@pytest.mark.parametrize(
    "planted", [pytest.param(True, id="no bug is there"), pytest.param(False, marks=pytest.mark.full, id="as it is")]
)
def test_kernel_for_gpus_races_or_touches_a_byte_beside_its_tensors(planted, sanitizers, program, tmp_path_factory):
    """Patch embedding and the product by turns on the host: also another result than plain loops in double, an address
    that is not aligned, a barrier that not all come to, bytes that nobody announced, a fence that is missing."""
    done = run_kernels_on_host(tmp_path_factory, program, sanitizers, bugs_in(program) if planted else ())
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize(("program", "name"), [(program, name) for program in PLANTS for name in PLANTS[program]])
def test_planted_bug_in_a_kernel_for_gpus_is_not_seen(program, name, tmp_path_factory):
    sanitizers = {"address": "address,undefined"}.get(PLANTS[program][name][3], "thread")
    number = [*PLANTS[program]].index(name)
    done = run_kernels_on_host(tmp_path_factory, program, sanitizers, bugs_in(program), number)
    assert done.returncode, f"{name}: {done.stdout}"


@pytest.mark.slow
def test_deadlock_says_nothing_of_its_barriers(tmp_path_factory):
    """Who waits, for which, and what is missing there."""
    number = [*PLANTED_IN_PRODUCT].index("arrival when a stage is read")
    done = run_kernels_on_host(tmp_path_factory, "check_product", "address,undefined", bugs_in("check_product"), number)
    assert "threads 0 to 0: wait for parity" in done.stderr, done.stderr[-2000:]
    assert "barrier at byte" in done.stderr and "4 of 4 arrivals" in done.stderr


@pytest.mark.full
@pytest.mark.slow
def test_stage_filled_too_early_is_not_seen(tmp_path_factory):
    """A constant, of which a program has one."""
    bug = ("patch_embed.cuh", "STAGES<chunks> - 2", "STAGES<chunks> - 1")
    done = run_kernels_on_host(tmp_path_factory, "check_patch_embed", "thread", [bug])
    assert done.returncode, done.stdout
