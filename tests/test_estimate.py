"""benchmarks/estimate.py: the pipes of a product against counts by hand, and against what a card has measured."""

import pytest

from benchmarks import estimate
from benchmarks.estimate import Device, Layer
from vitfast.choose.config_tables import Product

DEVICE = Device("made up", 10, flops=10e12, bandwidth=1e12, clock=1e9)
KERNELS = {"attention", "qkv", "proj", "fc1", "fc2"}
CONFIG = Product("tiles", 128, 128, 64, warps=4, persistent=True, programs=2)


def test_pipes_are_charged_with_something_else_than_what_tiles_do():
    layer = Layer("fc1", 1000, 256, 100, "pieces gelu", "gelu")
    us = estimate.pipes(layer, CONFIG, 500, DEVICE)
    # 8 x 2 tiles, of which the busiest of 10 multiprocessors has 2; depth 128
    assert us["tiles"] == 16 and us["waves"] == 16 / 20
    assert us["tensor"] == pytest.approx(2 * 2 * 128 * 128 * 128 / 1e12 * 1e6)
    assert us["issue"] == pytest.approx(2 * 500 * 4 / 4 / 1e9 * 1e6)
    assert us["special"] == pytest.approx(2 * 128 * 128 / 16 / 1e9 * 1e6)
    assert us["l2"] == pytest.approx(2 * (256 * 128 + 128 * 128) * 2 / 64 / 1e9 * 1e6)
    assert us["dram"] == pytest.approx(2 * (1000 * 100 + 256 * 100 + 1000 * 256) / 1e12 * 1e6)
    assert us["overlap"] == max(us[name] for name in ("tensor", "issue", "special", "l2", "dram"))
    assert us["serial"] == pytest.approx(max(us["tensor"], us["l2"], us["dram"]) + max(us["issue"], us["special"]))
    more = estimate.pipes(Layer("fc2", 1000, 256, 100, "residual pieces", residual=True), CONFIG, 500, DEVICE)
    assert more["dram"] - us["dram"] == pytest.approx(2 * 1000 * 256 / 1e12 * 1e6) and more["special"] == 0


def test_attention_of_a_few_tiles_is_charged_as_if_all_multiprocessors_shared_them():
    us = estimate.attention(1, 100, 3, 64, DEVICE)
    # 3 heads with 2 tiles each, 112 keys
    assert us["tiles"] == 6 and us["waves"] == 6 / 10
    assert us["tensor"] == pytest.approx(4 * 64 * 112 * 64 / 1e12 * 1e6)
    assert us["special"] == pytest.approx(64 * 112 / 16 / 1e9 * 1e6)
    assert us["dram"] == pytest.approx(2 * 4 * 100 * 3 * 64 / 1e12 * 1e6)
    # 12 heads: the busiest has 3 of 24
    more = estimate.attention(1, 100, 12, 64, DEVICE)
    assert more["tensor"] == pytest.approx(3 * us["tensor"]) and more["special"] == pytest.approx(3 * us["special"])
    # nobody counted them
    assert "issue" not in us and "l2" not in us


@pytest.mark.parametrize("batch", (64, 256))
def test_a_kernel_was_faster_than_its_floor(batch):
    device = estimate.read_device(estimate.CEILINGS)
    rows = estimate.table("vit_base_patch16_224", batch, None, device, estimate.TUNED)
    *rows, block = rows
    known = [row for row in rows if row["floor"] and row["measured"]]
    assert block["kernel"] == "block"
    for name in ("floor", "overlap", "serial", "measured"):
        each = {
            kernel: [r[name] for r in rows if r["kernel"] == kernel and r["floor"] and r[name]] for kernel in KERNELS
        }
        assert block[name] == pytest.approx(sum(map(min, each.values())))
    assert len(known) > 10 and {row["kernel"] for row in known} == KERNELS
    for row in known:
        assert row["floor"] <= row["overlap"] <= row["serial"] and row["floor"] <= row["measured"], row


def test_a_size_that_was_never_measured_has_no_estimate():
    device = estimate.read_device(estimate.CEILINGS)
    rows = estimate.table("vit_small_patch16_224", 7, 50, device, estimate.TUNED)
    assert rows and not any(row["measured"] for row in rows)


@pytest.mark.parametrize(
    "given", (["--batch", "0"], ["--model", "no_such_model"], ["--record", "nowhere.json"], ["--ceilings", "README.md"])
)
def test_what_cannot_be_estimated_is_told(given, capsys):
    assert estimate.main(given) == 1
    assert capsys.readouterr().err.startswith("estimate: ")
