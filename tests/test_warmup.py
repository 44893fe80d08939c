"""`vitfast.warmup`: wrong kernels are found and switched off, right ones stay, and nothing else changes."""

import contextlib
import types
import warnings

import pytest
import torch
from fake_kernel import prepared, restart, right, rows
from simulated_device import SimulatedDevice
from torch.utils._python_dispatch import TorchDispatchMode

import vitfast
from vitfast.check import warmup
from vitfast.check.calls import Call, Like, _Recorder, calls_of, calls_of_prepared, distinct
from vitfast.check.families import FAMILIES
from vitfast.choose import dispatch
from vitfast.choose.tuning_cache import Choice
from vitfast.inference.prepare import PreparedViT
from vitfast.kernels import cpu as cpu_kernels
from vitfast.measure import device as devices

fake_fixture = pytest.fixture(prepared, name="fake")


def warm(*calls, place=None):
    lines = []
    report = warmup.warm(calls or (rows(8, 64),), place or SimulatedDevice(), lines.append)
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
    monkeypatch.setattr(warmup, "models_in", lambda *_: [model])
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
PREPARED = ("folded_linear", "added_linear", "prepared_block")


def test_a_prepared_model_on_a_gpu_is_left_cold(monkeypatch):
    """Its products were no ops: neither checked nor compiled; tests/kernels/test_gpu_block.py has the kernels in it."""
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
    products = [call.split(" fp16")[0] for call in calls if call.startswith(PREPARED[:2])]
    # after its parts
    assert [call.split()[0] for call in calls[-2:]] == ["prepared_block", "layer_norm"]
    assert [call for call in products if "[2, 1, 192]" in call or "[2, 1, 768]" in call] == products[4:5] + products[6:]
    assert len(products) == 9


def description_of(prepared):
    return warmup.description(prepared, torch.device("cuda"))


def test_a_graph_that_is_captured_gets_kernels_compiled_into_it(monkeypatch):
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(warmup, "models_in", lambda *_: [types.SimpleNamespace(parameters=lambda: iter([on_gpu]))])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
        vitfast.warmup(None, dtype=torch.bfloat16)


def test_warming_up_changes_random_numbers_or_gradients(fake):
    model = vitfast.create_model("vit_tiny_patch16_224", drop_path_rate=0.1, **TINY)
    before = torch.get_rng_state()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    calls = warmup.kernel_calls([model.config], (1, 2), torch.float32, True)
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
    assert warmup.kernel_calls([config, config], (64, 64), torch.bfloat16, False) == [
        call for call in calls if call.op in FAMILIES
    ]


def test_a_restart_keeps_a_kernel_off(fake, monkeypatch):
    fake.kernel = nan
    with pytest.warns(RuntimeWarning):
        warm()
    restart(monkeypatch)
    assert fake.who(8, 64) == "kernel"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_base_patch16_siglip_224"])
@pytest.mark.parametrize("attention", ["kernel", "stock"])
def test_under_autocast_other_calls_are_foreseen_than_the_model_makes(attention, name, training, monkeypatch):
    """Rows and residuals in fp32 beside weights in bf16: other shapes to choose by, and other kernels.

    Also on CPUs where attention is SDPA's, which lays out its lse in another order.
    """
    if attention == "stock":
        monkeypatch.setattr(cpu_kernels, "attends", lambda q: False)
    config = vitfast.config_for(name, img_size=32 if "16" in name else 28).replace(depth=2)
    model, images = vitfast.ViT.from_config(config).train(training), torch.randn(2, 3, *config.image_size)
    with _Recorder() as made, torch.set_grad_enabled(training):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(images)
        if training:
            out.sum().backward()
    found = calls_of(config, 2, torch.float32, training, torch.bfloat16)
    assert found == list(made.calls)
    assert {call.dtype for call in found if call.op in ("linear", "mlp")} == {torch.bfloat16}


def test_autocast_is_forgotten_or_stays(monkeypatch):
    model = vitfast.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    asked = []
    monkeypatch.setattr(warmup, "kernel_calls", lambda *given: asked.append(given[2:]) or [])
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch.nn.Module, "parameters", lambda *_: iter([on_gpu]))
    monkeypatch.setattr(warmup, "_dtype_of", lambda *_: torch.float32)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(devices, "of", lambda device: types.SimpleNamespace(current=contextlib.nullcontext))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float16)
    vitfast.warmup(model)
    vitfast.warmup(model, dtype=torch.bfloat16)
    assert asked == [(torch.float32, False, torch.float16), (torch.bfloat16, False, None)]
