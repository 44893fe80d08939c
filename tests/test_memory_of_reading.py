"""How much memory loading takes: that of the weights, whatever the format, and no second copy of them."""

import sys

import numpy as np
import pytest
import timm
import torch
from peak_memory import peaks_of
from safetensors.torch import save_file
from test_layouts_google import npz_of

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's"), pytest.mark.slow]
MATRICES, SIDE = 24, 1000
WEIGHTS = 4 * MATRICES * SIDE**2

IN_TORCH = {
    "m.safetensors": save_file,
    "m.pth": torch.save,
    "old.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
}
WRITERS = IN_TORCH | {
    "m.npz": lambda state, path: np.savez(path, **{name: value.numpy() for name, value in state.items()}),
    "z.npz": lambda state, path: np.savez_compressed(path, **{name: value.numpy() for name, value in state.items()}),
}
FIRST = """
import mmap, numpy, zipfile
from vitfast.checkpoints.not_finite import not_finite
from vitfast.checkpoints.reading import read
"""
READ = "state = read(arg, allow_pickle=True, mapped={mapped}).state\n"
# as an engine does that fills a model
CONSUME = """
filled = {}
while state:
    name, value = state.popitem()
    filled[name] = value.clone()
    del value
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    state = {f"{i}.weight": torch.randn(SIDE, SIDE) for i in range(MATRICES)}
    for name, write in WRITERS.items():
        write(state, folder / name)
    return [folder / name for name in WRITERS]


def test_reading_takes_memory_where_it_is_a_view_or_twice_where_it_is_none(paths):
    mapped = peaks_of(READ.format(mapped=True), paths, FIRST)
    assert all(peak < limit * WEIGHTS for peak, limit in zip(mapped, (0.1, 0.1, 1.1, 1.1, 1.1), strict=True)), mapped
    copied = peaks_of(READ.format(mapped=False), paths, FIRST)
    assert all(peak < limit * WEIGHTS for peak, limit in zip(copied, (0.1, 1.1, 1.1, 1.1, 1.1), strict=True)), copied


def test_tensors_that_were_copied_and_let_go_stay_in_memory(paths):
    peaks = peaks_of(READ.format(mapped=True) + CONSUME, paths, FIRST)
    assert all(0.9 * WEIGHTS < peak < 1.1 * WEIGHTS for peak in peaks), peaks


def test_search_for_nan_takes_memory(paths):
    peaks = peaks_of("not_finite(read(arg).state)", paths[:1], FIRST)
    assert peaks[0] < 0.03 * WEIGHTS


def test_loading_takes_more_than_the_weights(tmp_path):
    """A tenth more; a small model before it brings in what any first call of an operator does."""
    files = [*IN_TORCH, "m.npz"]
    for name, variant in (("small", "vit_tiny_patch16_224"), ("large", "vit_base_patch16_224")):
        model = timm.create_model(variant, depth=2 if name == "small" else 8)
        state = model.state_dict()
        for file, write in IN_TORCH.items():
            write(state, tmp_path / f"{name}.{file}")
        npz_of(model, tmp_path / f"{name}.m.npz")
    total = sum(value.nbytes for value in state.values())
    load = "vitfast.load({}, activation='gelu', allow_pickle=True)"
    first = f"import mmap, zipfile, vitfast\nfor file in {files}: " + load.format(
        f"{str(tmp_path / 'small.')!r} + file"
    )
    peaks = peaks_of(load.format("arg"), [tmp_path / f"large.{file}" for file in files], first)
    assert all(0.9 * total < peak < 1.1 * total for peak in peaks), [peak / total for peak in peaks]
