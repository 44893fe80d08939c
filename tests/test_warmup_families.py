"""What `vitfast.warmup` knows of each op: truths, small calls, and rows or images of large ones."""

import sys
import types

import pytest
import torch
from simulated_device import SimulatedDevice

import vitfast
from vitfast.check import warmup
from vitfast.check.acceptance import NotAccepted
from vitfast.check.calls import Call, Like, Prepared, calls_of, calls_of_prepared, contiguous
from vitfast.check.families import FAMILIES
from vitfast.check.families.family import arguments
from vitfast.kernels.triton import linear

# attention's entries

ATTENTION = {
    call.op: call
    for name in ("vit_tiny_patch16_224", "vit_base_patch16_siglip_224")
    for call in calls_of(vitfast.config_for(name, img_size=64), 2, torch.float32, True)
    if call.op in FAMILIES
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["attention", "attention_qkv", "attention_backward", "attention_qkv_backward"])
def test_stock_attention_is_not_accepted(op, dtype):
    """On a CPU there is no kernel, so that it is stock operators that are held to the rule: a wrong truth shows."""
    found = ATTENTION[op]
    likes = [like._replace(dtype=dtype) if isinstance(like, Like) else like for like in found.args]
    smaller = FAMILIES[op].smaller(Call(op, tuple(likes)))
    assert len(set(smaller)) == 3
    for call in smaller:
        assert warmup.check(FAMILIES[op], call, None, SimulatedDevice()) == "right"


def test_attention_is_asked_for_configurations_of_another_shape(monkeypatch):
    asked = []

    class Config(types.SimpleNamespace):
        def as_dict(self):
            return vars(self)

    def configs(direction):
        return lambda *shape: asked.append((direction, *shape)) or [Config(block=64), Config(block=128)]

    kernel = types.ModuleType("vitfast.kernels.triton.attention")
    kernel.forward_configs, kernel.backward_configs = configs("forward"), configs("backward")
    monkeypatch.setitem(sys.modules, "vitfast.kernels.triton.attention", kernel)
    monkeypatch.setattr("vitfast.kernels.triton.attention", kernel, raising=False)
    for op in ("attention_qkv", "attention", "attention_backward", "attention_qkv_backward"):
        assert FAMILIES[op].configs(ATTENTION[op], torch.device("cuda")) == [{"block": 64}, {"block": 128}]
    # 2 images of 12 heads
    same = torch.device("cuda"), torch.float32, 24, 64
    assert asked == [
        ("forward", *same, 16, 16), ("forward", *same, 1, 16), ("backward", *same, 1, 16), ("backward", *same, 16, 16),
    ]  # fmt: skip


# entries of norms, linear layers and the MLP; tests/kernels/test_families.py has them against the kernels

LAYER_OPS = [op for op in FAMILIES if not any(name in op for name in ("attention", "add_layer_norm", "patch", "image"))]


def layer_calls(op, dtype, **options):
    options = {"init_values": 0.1, "drop_path_rate": 0.1, **options}
    config = vitfast.config_for("vit_tiny_patch16_224", img_size=64, **options)
    return [call for call in warmup.kernel_calls([config], (2,), dtype, True) if call.op == op]


# on CPUs stock norms add up gradients of weights in half precision
@pytest.mark.parametrize(
    "op, dtype",
    [(op, dtype) for op in LAYER_OPS for dtype in (torch.float32, torch.bfloat16)
     if dtype == torch.float32 or not op.endswith("_backward")],
)  # fmt: skip
def test_stock_layers_are_not_accepted(op, dtype):
    for call in layer_calls(op, dtype):
        for small in FAMILIES[op].smaller(call):
            assert warmup.check(FAMILIES[op], small, None, SimulatedDevice()) == "right"


@pytest.mark.parametrize("op", LAYER_OPS)
def test_small_calls_have_the_rows_of_the_call_or_other_weights(op):
    for call in layer_calls(op, torch.bfloat16):
        for small in FAMILIES[op].smaller(call):
            assert len(small.args) == len(call.args)
            for mine, theirs in zip(small.args, call.args, strict=True):
                if not isinstance(theirs, Like):
                    assert mine == theirs
                elif theirs.shape[0] == 2:
                    rows = mine.shape[0] * (mine.shape[1] if len(mine.shape) == 3 else 1)
                    assert mine.dtype == theirs.dtype and (len(mine.shape) == 1 or rows in (197, 17, 394, 51))
                else:
                    assert mine == theirs


# calls as a model makes them, of which some rows or images are compared


PREPARED = ("folded_linear", "added_linear", "prepared_block")


def own_calls(op):
    if op in PREPARED:
        config = vitfast.config_for("vit_tiny_patch16_224", img_size=64)
        described = Prepared(config, torch.float32, torch.device("cpu"))
        return [with_pieces(call) for call in calls_of_prepared(described, 2) if call.op == op]
    return layer_calls(op, torch.float32)


def with_pieces(call):
    """On a CPU no product leaves statistics."""
    args = list(call.args)
    at = {"folded_linear": 5, "prepared_block": 1}.get(call.op)
    if at and args[0].shape[1] > 1:
        args[at] = contiguous(3, 2, args[0].shape[0] * args[0].shape[1], dtype=torch.float32)
    return Call(call.op, tuple(args))


def result_of(op, call, change=lambda of: None):
    """Family, arguments, results and places of a call, whose arguments were changed before it ran."""
    family, generator = FAMILIES[op], torch.Generator().manual_seed(0)
    args, places = family.draw(call, generator), family.places(call, generator)
    # not all of them, as of calls with more
    places = places[places % 4 != 2] if family.rows else places[-1:]
    args = family.quiet(call, args, places)
    changed = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    # defaults at the end are left out
    change(dict(zip(arguments(op), changed, strict=False)))
    return family, args, family.results(changed), places


def off(t, at):
    t = t.clone()
    t[at] += 0.01 * t.abs().max() + 1e-3
    return t


MODEL_OPS = [op for op in FAMILIES if "add_layer_norm" not in op and op != "image_rows"]


@pytest.mark.parametrize("op", MODEL_OPS)
def test_a_large_result_is_wrong_in_its_last_row_or_in_a_sum(op):
    for call in own_calls(op):
        family, args, outs, places = result_of(op, call)
        assert warmup.check_part(family, call, args, outs, places, SimulatedDevice()) == "right"
    for i, out in enumerate(outs):
        for wrong in ("off", "nan") if out is not None else ():
            broken = list(outs)
            broken[i] = off(out, -1) if wrong == "off" else out.clone().index_fill_(0, torch.tensor(0), torch.nan)
            with pytest.raises(NotAccepted, match=f"result {i}.*{'not accepted' if wrong == 'off' else 'not finite'}"):
                warmup.check_part(family, call, args, tuple(broken), places, SimulatedDevice())


@pytest.mark.parametrize("row", [0, 31, 32, -1])
@pytest.mark.parametrize("op", ["linear_backward", "mlp_backward"])
def test_a_sum_over_all_rows_lacks_one(op, row):
    """34 of them: the last of a tile, the first of the next one, and the last of all."""
    call = next(call for call in own_calls(op) if call.likes()[0].shape[1] > 1)

    def lose(of):
        of["grad"].view(-1, of["grad"].shape[-1])[row] = 0

    family, args, outs, places = result_of(op, call, lose)
    # what comes row by row is right, so that only the sums tell
    kept = family.results(args)
    outs = tuple(out if i in family.sums else good for i, (out, good) in enumerate(zip(outs, kept, strict=True)))
    with pytest.raises(NotAccepted, match="result [1-7]"):
        warmup.check_part(family, call, args, outs, places, SimulatedDevice())


@pytest.mark.parametrize("rows", [1, 2, 33, 197, 50432, 10**6])
def test_a_row_beside_a_boundary_is_not_compared(rows):
    call = Call("layer_norm", (contiguous(1, rows, 8, dtype=torch.float32),))
    places = FAMILIES["layer_norm"].places(call, torch.Generator().manual_seed(0)).tolist()
    step = 32 if rows < 65536 else 512
    assert {0, rows - 1} <= set(places) <= set(range(rows)) and places == sorted(set(places))
    assert {n + side for n in range(step, rows, step) for side in (-1, 0)} <= set(places)
    assert min(rows, 33) <= len(places) <= 4096 + 512 + 2


def test_a_backward_gets_what_no_forward_kept():
    """From numbers that do not belong together come gradients of nothing."""
    call = layer_calls("mlp_backward", torch.float32)[-1]
    args = dict(zip(arguments("mlp_backward"), FAMILIES["mlp_backward"].draw(call, torch.Generator()), strict=True))
    h = torch.nn.functional.layer_norm(args["x"], args["x"].shape[-1:], args["norm_weight"], args["norm_bias"], 1e-6)
    torch.testing.assert_close(args["pre"], h @ args["w1"].T + args["b1"])
    torch.testing.assert_close(args["branch"], torch.nn.functional.gelu(args["pre"]) @ args["w2"].T + args["b2"])
    assert args["hidden"] is None and 0.5 < args["pre"].std() < 2 and 0.1 < args["branch"].std() < 2
    dropping = layer_calls("mlp_backward", torch.float32)[0]
    dropped = FAMILIES["mlp_backward"].draw(dropping, torch.Generator())
    assert any(torch.equal(arg, torch.tensor([1.25, 0.0])) for arg in dropped if isinstance(arg, torch.Tensor))


@pytest.mark.parametrize("op", ["mlp", "linear"])
def test_a_layer_is_checked_with_another_configuration_than_runs(op, monkeypatch):
    """An MLP's second product has fewer tiles, and so a configuration of its own."""
    monkeypatch.setattr(linear, "multiprocessors", lambda device: 132)
    config = vitfast.config_for("vit_base_patch16_224")
    calls = warmup.kernel_calls([config], (8,), torch.bfloat16, False)
    first = next(call for call in calls if call.op == op)
    x = torch.empty(8, 197, 768, dtype=torch.bfloat16, device="meta")
    matrices = [like for like in first.likes() if len(like.shape) == 2]
    weights = [torch.empty(like.shape, dtype=like.dtype, device="meta") for like in matrices]
    hidden = torch.empty(8, 197, weights[-1].shape[1], dtype=torch.bfloat16, device="meta")
    runs = [linear.config_for(t, w).as_dict() for t, w in zip((x, hidden), weights, strict=False)]
    assert FAMILIES[op].to_check(first, torch.device("cpu")) == runs
    assert (runs[0] != runs[-1]) is (op == "mlp")
    assert (None in FAMILIES[op].configs(first, torch.device("cpu"))) is (op == "mlp")
