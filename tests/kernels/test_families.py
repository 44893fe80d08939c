"""What warm-up and tuning know of each op, against the real kernels: right ones pass its check, wrong ones do not."""

import functools
from dataclasses import replace

import pytest
import torch
from pairwise import product

from vitfast import config_for
from vitfast.check import warmup
from vitfast.check.acceptance import NotAccepted
from vitfast.check.calls import Call, Prepared, contiguous
from vitfast.check.families import FAMILIES, as_tuple
from vitfast.choose.config_tables import Product
from vitfast.choose.dispatch import KERNELS
from vitfast.kernels.triton import layer_norm, linear, linear_grads, mlp
from vitfast.measure import device as devices
from vitfast.ops._launch import INTERPRETED

DTYPES = {"fp32": torch.float32, "fp16": torch.float16} | ({} if INTERPRETED else {"bf16": torch.bfloat16})
# attention and patches have tests of their own
OPS = [op for op, family in FAMILIES.items() if not family.kernel.startswith(("attention", "patch"))]
TINY = {"img_size": 32, "embed_dim": 64, "num_heads": 1}
MODELS = [
    ("vit_tiny_patch16_224", TINY),
    ("vit_tiny_patch16_224", {**TINY, "init_values": 0.1, "drop_path_rate": 0.1}),
    # gated
    ("vit_giant_patch14_dinov2", {"img_size": 28, "embed_dim": 72, "num_heads": 1}),
]
# for fp32, whose table has nothing but cuBLAS
TILES = [Product("tiles", 32, 32, 32).as_dict(), Product("tiles", 64, 32, 16, persistent=True, parts=2).as_dict()]


pytestmark = pytest.mark.usefixtures("stock_norms_of_a_gpu")


@functools.cache
def calls_of_models(dtype):
    """The calls of tiny models, and those of norms of sums, which no model has."""
    configs = [config_for(name, **options) for name, options in MODELS]
    found = warmup.kernel_calls(configs, (2,), dtype, True) + warmup.kernel_calls(configs[:1], (2,), dtype, False)
    if dtype is not torch.float32:
        found += warmup.kernel_calls(configs, (2,), torch.float32, True, dtype)
    place = torch.device("cpu" if INTERPRETED else "cuda")
    found += warmup.kernel_calls([Prepared(config, dtype, place) for config in configs], (2,), dtype, False)
    rows, vector = contiguous(2, 5, 64, dtype=dtype), contiguous(64, dtype=dtype)
    images, statistic = contiguous(2, dtype=dtype), contiguous(2, 5, 1, dtype=torch.float32)
    name = str(dtype)[6:]
    for scaled in (False, True):
        scales = (vector, images) if scaled else (None, None)
        found.append(Call("add_layer_norm", (rows, rows, vector, vector, 1e-6, "layer", *scales)))
        saved = (rows, rows, rows, rows if scaled else None, statistic, statistic, vector, vector, *scales)
        mask = (True, True, True, True, scaled)
        found.append(Call("add_layer_norm_backward", (*saved, 1e-6, "layer", name, mask)))
    return list(dict.fromkeys(found))


def calls_of(op, dtype):
    found = [call for call in calls_of_models(dtype) if call.op == op]
    assert found
    return found


def test_an_op_has_no_test_here():
    here = {name for name in KERNELS if not name.startswith(("attention", "patch"))}
    assert {FAMILIES[op].kernel for op in OPS} == here
    assert set(OPS) <= {call.op for call in calls_of_models(torch.float32)}


@product(op=OPS, dtype=DTYPES, half=(0, 1))
def test_a_right_kernel_is_not_accepted(op, dtype, half, device):
    """Every call by what it runs with, and by the other configurations in turn; many and few rows in turn."""
    family, seen = FAMILIES[op], set()
    for turn, call in list(enumerate(calls_of(op, dtype)))[half::2]:
        configs = list(family.configs(call, device))
        if dtype == torch.float32 and configs != [None]:
            configs += TILES
        small = family.smaller(call)[turn % 2]
        for config in [*family.to_check(call, device), configs[turn % len(configs)]]:
            key = small, str(config)
            if key not in seen:
                seen.add(key)
                assert warmup.check(family, small, config, devices.of(device)) == "right"


# the launchers that an op calls
LAUNCHERS = {
    "layer_norm": (layer_norm, "forward"), "add_layer_norm": (layer_norm, "forward"),
    "layer_norm_backward": (layer_norm, "backward"), "add_layer_norm_backward": (layer_norm, "backward_of_sum"),
    "linear": (linear, "forward"), "linear_backward": (linear_grads, "backward"),
    "mlp": (mlp, "forward"), "mlp_backward": (mlp, "backward"),
}  # fmt: skip


def number(t):
    """One number is off by a hundredth of the largest."""
    t = t.clone()
    t.view(-1)[-1] += 0.01 * t.abs().max() + 1e-3
    return t


@pytest.mark.parametrize("wrong", [number, lambda t: None], ids=["a number", "nothing"])
@pytest.mark.parametrize("op", LAUNCHERS)
def test_a_wrong_result_passes(op, wrong, device, monkeypatch):
    """Each result of the call with the most of them, one after the other."""
    module, name = LAUNCHERS[op]
    launcher, family = getattr(module, name), FAMILIES[op]
    call = max(calls_of(op, torch.float32), key=lambda call: (len(call.likes()), bool(call.args[-1])))
    small = family.smaller(call)[1]
    there = family.stock(family.draw(small, torch.Generator(device).manual_seed(0)))
    # the launcher of the norm alone has a place for the sum in front
    before = 1 if op == "layer_norm" else 0
    assert sum(t is not None for t in there) >= 2
    for i in (i for i, t in enumerate(there) if t is not None):

        def broken(*args, i=i, **options):
            found = list(launcher(*args, **options))
            found[i + before] = wrong(found[i + before])
            return tuple(found)

        monkeypatch.setattr(module, name, broken)
        with pytest.raises(NotAccepted, match=f"result {i}"):
            warmup.check(family, small, None, devices.of(device))


def pieces(t):
    """One number of the second row's statistics."""
    t = t.clone()
    t[-1, 0, 1] += 0.1
    return t


@pytest.mark.parametrize(
    "op, launcher, i, wrong",
    [
        ("folded_linear", "folded_forward", 0, number), ("added_linear", "forward_with_pieces", 0, number),
        ("added_linear", "forward_with_pieces", 1, pieces),
    ],
)  # fmt: skip
def test_a_wrong_product_of_a_prepared_model_passes(op, launcher, i, wrong, device, monkeypatch):
    """In half precision, for in fp32 they are the products of any model; with statistics that are given or made."""
    family = FAMILIES[op]
    call = max(calls_of(op, torch.float16), key=lambda call: len(call.likes()))
    small, right = family.smaller(call)[1], getattr(linear, launcher)
    found = family.with_config(family.draw(small, torch.Generator(device).manual_seed(0)), None)
    assert len(small.likes()) == (6 if op == "folded_linear" else 4) and all(t is not None for t in found)

    def broken(*args):
        found = list(as_tuple(right(*args)))
        found[i] = wrong(found[i])
        return tuple(found) if len(found) > 1 else found[0]

    monkeypatch.setattr(linear, launcher, broken)
    with pytest.raises(NotAccepted, match=f"result {i}"):
        warmup.check(family, small, None, devices.of(device))


def test_a_result_that_nobody_asked_for_passes(device):
    call = next(call for call in calls_of("linear", torch.float32) if not call.args[-1])
    family, small = FAMILIES["linear"], FAMILIES["linear"].smaller(call)[1]

    def more(*args):
        out, *rest = family.run(*args)
        return (out, out, *rest[1:]) if calls.append(args) or len(calls) > 1 else (out, *rest)

    calls = []
    with pytest.raises(NotAccepted, match="result 1: it is there, expected none"):
        warmup.check(replace(family, run=more), small, None, devices.of(device))
