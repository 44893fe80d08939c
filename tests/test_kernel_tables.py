"""The kernels' tables: a configuration for every call, and parts that hold all keys and columns."""

import itertools
from pathlib import Path

import pytest
import torch

from vitfast.choose import config_tables
from vitfast.kernels.triton import attention, linear
from vitfast.kernels.triton.launch import TILE

TABLES = {"forward": config_tables.FORWARD, "backward": config_tables.BACKWARD}


@pytest.mark.parametrize("direction", TABLES)
@pytest.mark.parametrize("arch", config_tables.ARCHITECTURES)
def test_a_call_has_no_configuration_or_one_that_cannot_run_it(arch, direction):
    table = TABLES[direction][arch]
    lengths, programs_of = (1, 256, 272, 273, 1 << 30), (0.1, 4.0, 1e4)
    sizes = itertools.product((16, 32), (16, 64, 80, 96, 128), lengths, programs_of, (True, False))
    for bits, width, keys, programs, dropout in sizes:
        config = config_tables.choose(table, bits, width, keys, programs, dropout)
        assert config.kernel != "short" or keys <= (272 if direction == "forward" else 256)
        assert config.kernel != "blocks" or config.keys_m and config.keys_n and config.keys_warps
        listed = config_tables.candidates(table, bits, width, keys, programs)
        assert listed[0] == config_tables.choose(table, bits, width, keys, programs, False)
        assert len(listed) == len(set(listed))


@pytest.mark.parametrize("direction", TABLES)
def test_warm_up_checks_another_configuration_than_runs(direction):
    """One image, whose tiles are few, and a large batch."""
    configs = getattr(attention, f"{direction}_configs")
    for B, dtype, N in itertools.product((1, 600), (torch.bfloat16, torch.float32), (197, 577)):
        q, k, v = torch.empty(B, N, 3, 12, 64, dtype=dtype, device="meta").unbind(2)
        call = attention._Call(q, k, v, 0.125, attention.NOTHING, None)
        runs = getattr(attention, f"{direction}_config")(call)
        assert configs(q.device, dtype, 12 * B, 64, N, N)[0] == runs


@pytest.mark.parametrize("arch", config_tables.ARCHITECTURES)
def test_a_choice_may_spill_as_one_that_no_shape_gets(arch):
    """`make aot` refuses spills of what `some_choice` names; from one row to many, and from one tile to thousands."""
    sizes = itertools.product((1, 16, 17, 197, 1576, 50_432), (64, 192, 768, 3072), (True, False))
    chosen = {config_tables.product_config(arch, 16, M, N, 768, 132, aligned) for M, N, aligned in sizes}
    listed = {row.config for row in config_tables.PRODUCT[arch] if row.bits == 16}
    assert chosen == {config for config in listed if config_tables.some_choice(arch, config)}


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
    files = [*Path(attention.__file__).parent.glob("*.py"), Path(config_tables.__file__)]
    assert len(files) > 10 and [path.name for path in files if "warp_specialize" in path.read_text()] == []


PRODUCTS = [(arch, row) for arch in config_tables.ARCHITECTURES for row in config_tables.PRODUCT[arch]]


@pytest.mark.parametrize("arch", config_tables.ARCHITECTURES)
def test_a_product_has_no_configuration_or_one_that_cannot_run_it(arch):
    rows, widths = (1, 2, 16, 17, 64, 197, 256 * 197, 1 << 31), (64, 72, 192, 197, 1000, 1024, 4096)
    for bits, M, N, aligned in itertools.product((16, 32), rows, widths, (True, False)):
        for multiprocessors in (1, 16, 132):
            sizes = (arch, bits, M, N, 768, multiprocessors, aligned)
            config, listed = config_tables.product_config(*sizes), config_tables.product_candidates(*sizes)
            assert listed[0] == config and len(listed) == len(set(listed)) and config_tables.BLAS in listed
            assert aligned or not any(each.descriptors for each in listed)
            # a folded norm is for tiles only, and rows that turn out not to be aligned leave it to another row
            assert bits == 32 or config.kernel == "tiles"


@pytest.mark.parametrize("arch, row", PRODUCTS, ids=str)
def test_a_product_is_shared_in_a_way_that_its_kernel_does_not_know(arch, row):
    config = row.config
    if config.kernel == "blas":
        return
    sizes = (config.block_m, config.block_n, config.block_k, config.split, config.parts, config.warps)
    assert all(size > 0 and size & (size - 1) == 0 for size in sizes)
    assert min(config.block_m, config.block_n // config.parts, config.block_k) >= 16
    # persistent programs neither share a tile nor turn it over
    assert not config.persistent or (config.split == 1 and not config.swap)
    assert config.block_m <= TILE and config.block_n <= TILE
    # two operands in each stage, of what the architecture's shared memory holds
    held = config.stages * (config.block_m + config.block_n) * config.block_k * row.bits // 8
    assert held <= {80: 163, 89: 99, 90: 227, 100: 227}[arch] * 1024


def test_a_sum_is_split_into_parts_that_are_empty_or_not_a_power_of_two():
    for config, tiles, K in itertools.product(
        dict.fromkeys(row.config for _, row in PRODUCTS), (0, 1, 3, 12, 132, 4000), (8, 64, 72, 192, 768, 1000, 4096)
    ):
        if config.kernel == "tiles":
            split = linear._split(config, tiles, K, 132)
            assert 1 <= split <= config.split and split & (split - 1) == 0
            assert split == 1 or (2 * config.block_k * split <= K and tiles * split <= 132)


def test_warm_up_checks_another_product_than_runs():
    for M, dtype, (K, N) in itertools.product(
        (1, 197, 50_432), (torch.bfloat16, torch.float32), ((768, 3072), (192, 197), (197, 192))
    ):
        x = torch.empty(1, M, K, dtype=dtype, device="meta")
        weight = torch.empty(N, K, dtype=dtype, device="meta")
        assert linear.configs(x.device, dtype, M, N, K)[0] == linear.config_for(x, weight)
        assert linear.config_for(x, weight.t(), across=True) == linear.config_for(x, weight)
