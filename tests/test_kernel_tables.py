"""The tables of the attention kernels: a configuration for every call, and parts that hold all keys and columns."""

import itertools
from pathlib import Path

import pytest
import torch

from vitfast.kernels import attention, tuning

TABLES = {"forward": tuning.FORWARD, "backward": tuning.BACKWARD}


@pytest.mark.parametrize("direction", TABLES)
@pytest.mark.parametrize("arch", tuning.ARCHITECTURES)
def test_a_call_has_no_configuration_or_one_that_cannot_run_it(arch, direction):
    table = TABLES[direction][arch]
    lengths, programs_of = (1, 256, 272, 273, 1 << 30), (0.1, 4.0, 1e4)
    sizes = itertools.product((16, 32), (16, 64, 80, 96, 128), lengths, programs_of, (True, False))
    for bits, width, keys, programs, dropout in sizes:
        config = tuning.choose(table, bits, width, keys, programs, dropout)
        assert config.kernel != "short" or keys <= (272 if direction == "forward" else 256)
        assert config.kernel != "blocks" or config.keys_m and config.keys_n and config.keys_warps
        listed = tuning.candidates(table, bits, width, keys, programs)
        assert listed[0] == tuning.choose(table, bits, width, keys, programs, False)
        assert len(listed) == len(set(listed))


@pytest.mark.parametrize("direction", TABLES)
def test_warm_up_checks_another_configuration_than_runs(direction):
    """One image, whose tiles are few, and a large batch."""
    configs = getattr(attention, f"{direction}_configs")
    for B, dtype, N in itertools.product((1, 600), (torch.bfloat16, torch.float32), (197, 577)):
        q, k, v = torch.empty(B, N, 3, 12, 64, dtype=dtype, device="meta").unbind(2)
        call = attention._Call(q, k, v, 0.125, None, 0.0, None, None)
        runs = getattr(attention, f"{direction}_config")(call)
        assert configs(q.device, dtype, 12 * B, 64, N, N)[0] == runs


def test_parts_leave_a_key_out_or_read_one_past_the_end_unmasked():
    for keys in range(1, 513):
        parts = [part for part in attention.key_parts(keys) if part]
        assert all(part >= 16 and part & (part - 1) == 0 for part in parts)
        assert sum(parts) >= keys > sum(parts) - parts[-1]
    assert attention.key_parts(197) == (128, 64, 16) and attention.key_parts(257) == (256, 16, 0)


def test_parts_leave_a_column_out():
    for D in range(16, 129, 8):
        first, second = attention.widths(D)
        assert first + second >= D and second < first
        assert all(part == 0 or (part >= 16 and part & (part - 1) == 0) for part in (first, second))
    assert [attention.widths(D) for D in (64, 72, 80, 96, 112)] == [(64, 0), (64, 16), (64, 16), (64, 32), (128, 0)]


def test_a_kernel_has_warps_with_tasks_of_their_own():
    """`warp_specialize`: Triton 3.6 ignores it at eight warps, and crashes or spills at four."""
    folder = Path(attention.__file__).parent
    assert [path.name for path in folder.glob("*.py") if "warp_specialize" in path.read_text()] == []
