"""`vitfast.warmup`: wrong kernels are found and switched off, right ones stay, and nothing else changes."""

import contextlib
import sys
import types
import warnings

import pytest
import torch
from fake_kernel import prepared, restart, right, rows
from simulated_device import SimulatedDevice
from torch.utils._python_dispatch import TorchDispatchMode

import vitfast
from vitfast import dispatch, warm_up
from vitfast.acceptance import NotAccepted
from vitfast.bench import device as devices
from vitfast.calls import Call, Like, Prepared, calls_of, calls_of_prepared, contiguous, distinct
from vitfast.engine import PreparedViT
from vitfast.families import FAMILIES
from vitfast.families.family import arguments
from vitfast.kernels import linear
from vitfast.tuning_cache import Choice

fake_fixture = pytest.fixture(prepared, name="fake")


def warm(*calls, place=None):
    lines = []
    report = warm_up.warm(calls or (rows(8, 64),), place or SimulatedDevice(), lines.append)
    assert len(lines) == len(calls or (1,))
    return report, lines


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_kernel_is_switched_off(fake, dtype):
    report, (line,) = warm(rows(8, 64, dtype))
    (row,) = report.rows
    assert row[:4] == ("fake", str(rows(8, 64, dtype)), "kernel", "right") and row.seconds > 0
    assert dispatch.switched_off("fake") is None and fake.who(8, 64) == "kernel"
    assert "warmup 1/1" in line and "fake_softmax [8, 64]" in line and "right" in str(report)
    # the call as it is first, by its own configuration, of which some rows are compared; then small ones by the same,
    # each next to stock operators
    small = [(17, 33), (64, 128)]
    assert fake.ran.pop(1)[:2] == ("stock", None)
    expected = [("kernel", None, (8, 64))]
    expected += [each for size in small for each in (("stock", None, size), ("kernel", {"block": 64}, size))]
    assert fake.ran[:-1] == expected


def wrong_row(x, config=None):
    out = right(x)
    out[-1] = out[-1].flip(0)
    return out


def wrong_at_odd_sizes(x, config=None):
    return wrong_row(x) if x.shape[-1] % 2 else right(x)


def wrong_where_it_is_large(x, config=None):
    return wrong_row(x) if x.shape == (8, 64) else right(x)


def one_nan(x, config=None):
    out = right(x)
    # of a row in the middle, which nobody compares
    out[5, 3] = torch.nan
    return out


def nan(x, config=None):
    return right(x).fill_(torch.nan)


def biased(x, config=None):
    return right(x) * (1 + 1e-5)


def another_dtype(x, config=None):
    return right(x).double()


def another_shape(x, config=None):
    return right(x)[:-1]


def two_results(x, config=None):
    return right(x), right(x)


def raises(x, config=None):
    raise RuntimeError("Triton Error [CUDA]: too many resources requested for launch\nmore")


def raises_when_forced(x, config=None):
    return right(x) if config is None else raises(x)


WRONG = [
    (wrong_row, "not accepted: A: max error"),
    (wrong_at_odd_sizes, "fake_softmax [17, 33] fp32, result 0"),
    (wrong_where_it_is_large, "fake_softmax [8, 64] fp32, result 0"),
    (nan, "512 of 512 numbers are not finite"),
    (one_nan, "1 of 512 numbers are not finite"),
    (biased, "C: rms error"),
    (another_dtype, "expected torch.float32"),
    (another_shape, "result 0: [7, 64], expected 8 rows or images, not 7"),
    (two_results, "2 results, expected 1"),
    (raises, "RuntimeError: Triton Error [CUDA]: too many resources requested for launch"),
    (raises_when_forced, "too many resources"),
]


@pytest.mark.parametrize("kernel, why", WRONG, ids=[kernel.__name__ for kernel, _ in WRONG])
def test_a_kernel_that_is_wrong_stays_on(fake, kernel, why):
    fake.kernel = kernel
    with pytest.warns(RuntimeWarning) as told:
        report, _ = warm(rows(8, 64), rows(9, 64))
    (warning,) = told
    assert "fake kernel" in str(warning.message) and why in str(warning.message) and "\n" not in str(warning.message)
    assert [row.runs for row in report.rows] == ["stock operators"] * 2 and why in report.rows[0].check
    assert "switched off" in report.rows[1].check
    assert fake.who(8, 64) == "stock" and dispatch.switched_off("attention") is None


def test_the_check_runs_another_configuration_than_the_call(fake):
    """Small inputs would choose one of their own, which nobody will run."""
    dispatch.learn(0, {("fake", ("rows", 8, 64)): Choice(True, {"block": 512})})
    fake.kernel = lambda x, config: wrong_row(x) if config == {"block": 512} else right(x)
    with pytest.warns(RuntimeWarning, match="not accepted"):
        warm(rows(8, 64))


def test_a_kernel_that_will_not_run_is_checked(fake):
    fake.kernel = wrong_row
    fake.builtin = False
    report, _ = warm()
    assert report.rows[0].runs == "stock operators" and [who for who, *_ in fake.ran] == ["stock"]
    with vitfast.backend("stock"):
        report, _ = warm()
    assert report.rows[0].check == "stock, by set_backend"


def test_a_forced_kernel_that_cannot_run_is_warmed_up_as_stock(fake):
    fake.why_not = ["float64"]
    with vitfast.backend("kernel"), pytest.raises(NotImplementedError, match="float64"):
        warm()


def test_the_same_check_is_made_twice(fake):
    report, _ = warm(rows(8, 64), rows(9, 64))
    assert [row.check for row in report.rows] == ["right"] * 2
    # the small ones, beside the rows of either call
    assert sum(who == "stock" for who, *_ in fake.ran) == 2 + 2


def broken_stock(x):
    return torch.full_like(x, torch.nan)


def absent_stock(x):
    raise RuntimeError("no such operator")


def inexact_stock(x):
    return torch.softmax(x.to(torch.bfloat16), -1).to(x.dtype)


@pytest.mark.parametrize("stock", [broken_stock, absent_stock, inexact_stock])
def test_a_kernel_is_blamed_for_stock_operators_or_passes_unchecked(fake, stock):
    fake.stock = stock
    with pytest.warns(RuntimeWarning, match="fake kernel was not checked: NoYardstick: stock operators") as told:
        report, _ = warm()
    assert report.rows[0].runs == "kernel" and "not checked" in report.rows[0].check and len(told) == 3
    assert dispatch.switched_off("fake") is None


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_a_kernel_is_blamed_for_a_full_memory(fake, problem, checked):
    def too_large(x, config=None):
        if config is None and checked:
            return right(x)
        raise problem

    fake.kernel = too_large
    with pytest.warns(RuntimeWarning, match="not checked") if checked else contextlib.nullcontext():
        report, _ = warm()
    assert report.rows[0].check.startswith("not checked: " if checked else "not compiled: ")
    assert "out of memory" in report.rows[0].check and report.rows[0].runs == "kernel"
    assert dispatch.switched_off("fake") is None


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize(
    "problem, kind, message",
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing"), RuntimeError,
         "fake: .*call once before capturing"),
        (torch.AcceleratorError("CUDA error: invalid argument"), torch.AcceleratorError, "invalid argument"),
    ],
)  # fmt: skip
def test_warming_up_blames_a_kernel_for_what_would_fail_any(fake, problem, kind, message, checked):
    def fails(x, config=None):
        if config is None and checked:
            return right(x)
        raise problem

    fake.kernel = fails
    with warnings.catch_warnings(), pytest.raises(kind, match=message):
        warnings.simplefilter("error")
        warm()
    assert dispatch.switched_off("fake") is None


def test_a_kernel_that_breaks_the_device_is_not_named(fake):
    place = SimulatedDevice()

    def breaks(x, config=None):
        place.lost = True
        return right(x)

    fake.kernel = breaks
    message = r"fake kernel broke the device.*set_backend\('stock', op='fake'\)"
    with pytest.raises(RuntimeError, match=message):
        warm(place=place)
    assert dispatch.switched_off("fake") is None


def test_products_in_tf32_make_a_right_kernel_wrong(fake):
    fake.stock = fake.kernel = lambda x, config=None: torch.softmax(x * (1 + 2e-4), -1)
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    try:
        assert warm()[0].rows[0].check == "right"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# the public function

TINY = dict(img_size=32, depth=2, num_classes=10)


def test_a_model_on_a_cpu_is_warmed_up():
    model = vitfast.create_model("vit_tiny_patch16_224", **TINY)
    report = vitfast.warmup(torch.nn.Sequential(model), (1, 2), training=True)
    assert report.rows == [] and "nothing to warm up" in str(report)


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ((torch.nn.Linear(2, 2),), TypeError, "model must be or contain a vitfast.ViT, got Linear"),
        (("vit_tiny_patch16_224",), TypeError, "got str"),
        ((None, 0), ValueError, "batch must be one or more ints of at least 1, got 0"),
        ((None, ()), ValueError, "batch"),
        ((None, (1, 2.5)), ValueError, "batch"),
        ((None, (1,), torch.float64), ValueError, "dtype must be one of .*got torch.float64"),
    ],
)
def test_wrong_use_is_not_explained(arguments, kind, message):
    model = arguments[0] or vitfast.create_model("vit_tiny_patch16_224", **TINY)
    options = {"dtype": arguments[2]} if len(arguments) > 2 else {}
    with pytest.raises(kind, match=message):
        vitfast.warmup(model, *arguments[1:2], **options)


def test_a_model_on_a_gpu_is_left_cold(monkeypatch, capsys):
    """All but the device itself, which does the work of the ops without asking for a kernel."""
    config = vitfast.config_for("vit_tiny_patch16_224", **TINY)
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"))
    model = types.SimpleNamespace(parameters=lambda: iter([on_gpu]), config=config)
    monkeypatch.setattr(warm_up, "models_in", lambda *_: [model])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(devices, "of", lambda device: SimulatedDevice())
    report = vitfast.warmup(model, [1, 3], dtype=torch.bfloat16, training=True)
    # a norm of a sum is nowhere in a ViT: sums come out of linear layers; rows of pixels are for vit-pytorch's norm
    ops = {op for op in FAMILIES if "add_layer_norm" not in op and op not in ("image_rows", *PREPARED)}
    half = len(report.rows) // 2
    for rows_of_batch in (report.rows[:half], report.rows[half:]):
        assert {row.call.split()[0] for row in rows_of_batch} == ops
    assert {row.kernel for row in report.rows} == set(dispatch.KERNELS) - set(PREPARED)
    assert all("[3, " in row.call and "bf16" in row.call for row in report.rows[half:])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"warmup {i}/{2 * half}" for i in range(1, 2 * half + 1)]
    vitfast.warmup(model, 1, dtype=torch.bfloat16, progress=False)
    assert not capsys.readouterr().err


# ops and kernels of prepared models, by one name
PREPARED = ("folded_linear", "added_linear")


def test_a_prepared_model_on_a_gpu_is_left_cold(monkeypatch):
    """Its products were no ops: neither checked nor compiled; tests/kernels/test_folded.py has the kernels in it."""
    model = vitfast.ViT.from_config(vitfast.config_for("vit_tiny_patch16_224", **TINY | {"depth": 3})).to("meta")
    prepared = PreparedViT(model.eval().half(), torch.float16, None)
    prepared.parameters = lambda: iter([types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(devices, "of", lambda device: SimulatedDevice())
    report = vitfast.warmup(torch.nn.ModuleList([prepared]), 2, dtype=torch.float32, training=True, progress=False)
    calls = [row.call for row in report.rows]
    assert calls == [str(call) for call in distinct(calls_of_prepared(description_of(prepared), 2))]
    # in its own dtype, without a backward, qkv whole and cut, and five tokens or one in what comes after
    assert all("fp16" in call and "backward" not in call for call in calls)
    assert {row.kernel for row in report.rows} == {"patch_embed", "attention", "layer_norm", *PREPARED}
    products = [call.split(" fp16")[0] for call in calls if call.startswith(PREPARED)]
    assert [call for call in products if "[2, 1, 192]" in call or "[2, 1, 768]" in call] == products[4:5] + products[6:]
    assert len(products) == 9


def description_of(prepared):
    return warm_up.description(prepared, torch.device("cuda"))


def test_a_graph_that_is_captured_gets_kernels_compiled_into_it(monkeypatch):
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(warm_up, "models_in", lambda *_: [types.SimpleNamespace(parameters=lambda: iter([on_gpu]))])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
        vitfast.warmup(None, dtype=torch.bfloat16)


def test_warming_up_changes_random_numbers_or_gradients(fake):
    model = vitfast.create_model("vit_tiny_patch16_224", drop_path_rate=0.1, **TINY)
    before = torch.get_rng_state()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    calls = warm_up.kernel_calls([model.config], (1, 2), torch.float32, True)
    warm(*calls, rows(8, 64))
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None and torch.equal(p, weights[name]) for name, p in model.named_parameters())


# which calls a model makes

VARIANTS = {
    "class token": {},
    "mean": {"global_pool": "avg"},
    "attention pooling": {"global_pool": "map", "class_token": False},
    "registers, norms of q and k": {"reg_tokens": 4, "qk_norm": True},
    "one block": {"depth": 1},
    "dropout": {"proj_drop_rate": 0.1},
}


def like(arg):
    if isinstance(arg, torch.Tensor):
        return Like(tuple(arg.shape), arg.stride(), arg.dtype)
    return tuple(arg) if isinstance(arg, list) else arg


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("vitfast::") in FAMILIES and func.namespace == "vitfast":
            likes = [like(arg) for arg in args]
            self.calls.add(Call(func._schema.name.removeprefix("vitfast::"), tuple(likes)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_call_of_a_model_is_not_foreseen(options, training):
    model = vitfast.create_model("vit_tiny_patch16_224", **{**TINY, "depth": 4, **options}).train(training)
    found = calls_of(model.config, 2, torch.float32, training)
    with Recorder() as recorder, torch.set_grad_enabled(training):
        out = model(torch.randn(2, 3, 32, 32))
        if training:
            out.sum().backward()
    assert {call for call in found if call.op in FAMILIES} == recorder.calls
    assert recorder.calls


def test_attention_of_a_model_with_dropout_is_not_checked():
    """On a CPU, and so on meta tensors, such a model calls no attention of ours; on a GPU it does."""
    plain, dropping = (vitfast.config_for("vit_tiny_patch16_224", img_size=32, attn_drop_rate=p) for p in (0.0, 0.1))
    assert calls_of(dropping, 2, torch.float32, True) == calls_of(plain, 2, torch.float32, True)


def test_a_size_that_the_patch_does_not_divide_cannot_be_foreseen():
    for pad, tokens in ((False, 5), (True, 10)):
        options = {"dynamic_img_size": True, "dynamic_img_pad": pad}
        config = vitfast.config_for("vit_tiny_patch16_224", img_size=40, **options)
        first = next(call for call in calls_of(config, 1, torch.float32, False) if call.op == "attention_qkv")
        assert first.args[0].shape[1] == tokens


def test_another_dtype_or_batch_is_foreseen():
    config = vitfast.config_for("vit_base_patch16_224")
    calls = calls_of(config, 64, torch.bfloat16, False)
    packed = Like((64, 197, 3, 12, 64), (197 * 2304, 2304, 768, 64, 1), torch.bfloat16)
    assert Call("attention_qkv", (packed, 0.125)) in calls
    assert warm_up.kernel_calls([config, config], (64, 64), torch.bfloat16, False) == [
        call for call in calls if call.op in FAMILIES
    ]


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
        assert warm_up.check(FAMILIES[op], call, None, SimulatedDevice()) == "right"


def test_attention_is_asked_for_configurations_of_another_shape(monkeypatch):
    asked = []

    class Config(types.SimpleNamespace):
        def as_dict(self):
            return vars(self)

    def configs(direction):
        return lambda *shape: asked.append((direction, *shape)) or [Config(block=64), Config(block=128)]

    kernel = types.ModuleType("vitfast.kernels.attention")
    kernel.forward_configs, kernel.backward_configs = configs("forward"), configs("backward")
    monkeypatch.setitem(sys.modules, "vitfast.kernels.attention", kernel)
    monkeypatch.setattr("vitfast.kernels.attention", kernel, raising=False)
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
    return [call for call in warm_up.kernel_calls([config], (2,), dtype, True) if call.op == op]


# on CPUs stock norms add up gradients of weights in half precision
@pytest.mark.parametrize(
    "op, dtype",
    [(op, dtype) for op in LAYER_OPS for dtype in (torch.float32, torch.bfloat16)
     if dtype == torch.float32 or not op.endswith("_backward")],
)  # fmt: skip
def test_stock_layers_are_not_accepted(op, dtype):
    for call in layer_calls(op, dtype):
        for small in FAMILIES[op].smaller(call):
            assert warm_up.check(FAMILIES[op], small, None, SimulatedDevice()) == "right"


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


def own_calls(op):
    if op in PREPARED:
        config = vitfast.config_for("vit_tiny_patch16_224", img_size=64)
        described = Prepared(config, torch.float32, torch.device("cpu"))
        return [with_pieces(call) for call in calls_of_prepared(described, 2) if call.op == op]
    return layer_calls(op, torch.float32)


def with_pieces(call):
    """On a CPU no product leaves statistics."""
    args = list(call.args)
    if call.op == "folded_linear" and args[0].shape[1] > 1:
        args[5] = contiguous(3, 2, args[0].shape[0] * args[0].shape[1], dtype=torch.float32)
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
        assert warm_up.check_part(family, call, args, outs, places, SimulatedDevice()) == "right"
    for i, out in enumerate(outs):
        for wrong in ("off", "nan") if out is not None else ():
            broken = list(outs)
            broken[i] = off(out, -1) if wrong == "off" else out.clone().index_fill_(0, torch.tensor(0), torch.nan)
            with pytest.raises(NotAccepted, match=f"result {i}.*{'not accepted' if wrong == 'off' else 'not finite'}"):
                warm_up.check_part(family, call, args, tuple(broken), places, SimulatedDevice())


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
        warm_up.check_part(family, call, args, outs, places, SimulatedDevice())


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
    calls = warm_up.kernel_calls([config], (8,), torch.bfloat16, False)
    first = next(call for call in calls if call.op == op)
    x = torch.empty(8, 197, 768, dtype=torch.bfloat16, device="meta")
    matrices = [like for like in first.likes() if len(like.shape) == 2]
    weights = [torch.empty(like.shape, dtype=like.dtype, device="meta") for like in matrices]
    hidden = torch.empty(8, 197, weights[-1].shape[1], dtype=torch.bfloat16, device="meta")
    runs = [linear.config_for(t, w).as_dict() for t, w in zip((x, hidden), weights, strict=False)]
    assert FAMILIES[op].to_check(first, torch.device("cpu")) == runs
    assert (runs[0] != runs[-1]) is (op == "mlp")
    assert (None in FAMILIES[op].configs(first, torch.device("cpu"))) is (op == "mlp")


def test_a_restart_keeps_a_kernel_off(fake, monkeypatch):
    fake.kernel = nan
    with pytest.warns(RuntimeWarning):
        warm()
    restart(monkeypatch)
    assert fake.who(8, 64) == "kernel"
