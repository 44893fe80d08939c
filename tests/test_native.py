"""The C++ sources under sanitizers, in programs of their own: a stray read changes no result in Python."""

import pytest
from native_build import instruction_sets, run_sanitized

every_isa = pytest.mark.parametrize("isa", instruction_sets())


def test_two_pixels_share_a_place_or_one_is_out_of_range(tmp_path):
    """patch_geometry.h: an off-by-one at the padding, channels and columns swapped, 32-bit products."""
    assert run_sanitized("check_patch_geometry.cpp", tmp_path) == "ok\n"


@pytest.mark.slow
@every_isa
def test_patch_rows_touches_a_byte_beside_its_image_or_rows(isa, tmp_path):
    """Whole vectors at the end of a view, a wrong line for some stride; also another result than the plain loop's."""
    assert run_sanitized("check_patch_rows.cpp", tmp_path, isa, ["cpu_kernels.cpp"]) == "ok\n"


@pytest.mark.slow
@every_isa
def test_kernel_touches_a_byte_beside_its_tensors(isa, tmp_path):
    """Whole vectors at the end of a view, sizes that fill no panel; also another result than plain loops in double."""
    assert run_sanitized("check_kernels.cpp", tmp_path, isa, ["cpu_kernels.cpp"]) == "ok\n"
