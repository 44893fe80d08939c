"""`vitfast tune`: on a simulated device the fastest right configuration wins, and only if it beats stock operators."""

import contextlib
import functools
import json
import time
import types
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_kernel import DEVICE, KEY, prepared, restart, right, rows
from simulated_device import SimulatedDevice

import vitfast
from vitfast.check import compare as harness
from vitfast.check import tune as tuning
from vitfast.check.calls import Call, Prepared, contiguous
from vitfast.check.families import FAMILIES
from vitfast.check.warmup import kernel_calls
from vitfast.choose import builtin, config_tables, dispatch, tuning_cache
from vitfast.choose.tuning_cache import Choice, key_of
from vitfast.commands import main
from vitfast.kernels.cuda import patch_embed
from vitfast.measure import machine, nvml
from vitfast.ops import _launch

fake_fixture = pytest.fixture(prepared, name="fake")

# milliseconds that the device takes for each configuration
MS = {64: 6, 128: 2, 256: 3}
STOCK_MS = 4


@pytest.fixture
def place(fake, monkeypatch):
    """A device on which the fake's calls take time."""
    made = SimulatedDevice()

    def timed(ms, run):
        def call(x, *config):
            made.work(5e-6, ms(*config) * 1e-3)
            return run(x, *config)

        return call

    fake.configs = [{"block": block} for block in MS]
    fake.kernel = timed(lambda config: MS[config["block"]], right)
    fake.stock = timed(lambda: STOCK_MS, fake.stock)
    fake.timed = timed
    # the truth and the op itself take no time of the device's
    return made


def tune(place, *calls, budget_s=100.0):
    lines = []
    report = tuning.tune_calls(calls or (rows(8, 64),), place, budget_s, lines.append)
    return report, lines


def test_tuning_hears_of_a_shape_that_no_call_has_where_triton_cannot_compile(fake, place, monkeypatch):
    """For which nobody has a choice: the tables of measured ones have no answer but an IndexError."""
    monkeypatch.setattr(_launch, "may_be_kernels", lambda like: True)
    monkeypatch.setattr(_launch, "why_no_triton", lambda: "triton cannot compile here: no compiler")
    run = lambda x: fake.run(x) if _launch.ready("fake", x) else fake.stock(x)  # noqa: E731
    monkeypatch.setitem(FAMILIES, "fake_softmax", replace(FAMILIES["fake_softmax"], run=run))
    (row,) = tune(place)[0].rows
    assert (row.use, row.why) == ("", "triton cannot compile here: no compiler")
    assert dispatch.tuned("fake", DEVICE) == {}
    forced = vitfast.backend("kernel", op="fake")
    with forced, pytest.raises(NotImplementedError, match="asked for and cannot run: triton cannot compile"):
        run(torch.zeros(2, 2))


def test_the_fastest_configuration_is_not_the_one_that_runs(fake, place, monkeypatch):
    report, (line,) = tune(place)
    (row,) = report.rows
    assert row.use == "kernel" and row.config == {"block": 128} and "2.00 x as fast" in row.why
    assert row.stock_ms == pytest.approx(4, rel=0.01) and row.kernel_ms == pytest.approx(2, rel=0.01)
    assert "tune 1/1" in line and "fake_softmax [8, 64] fp32: kernel" in line
    assert "| kernel | block=128 |" in str(report)
    # at once, and in a later process
    for _ in range(2):
        assert dispatch.config_for("fake", ("rows", 8, 64), DEVICE) == {"block": 128}
        assert dispatch.config_for("fake", ("rows", 9, 64), DEVICE) is None
        restart(monkeypatch)
    (kept,) = json.loads(report.path.read_text())["choices"]
    assert kept["use"] == "kernel" and kept["shape"] == ["rows", 8, 64] and kept["stock_ms"] == row.stock_ms


@pytest.mark.parametrize("ms", [STOCK_MS, STOCK_MS * 3], ids=["as fast", "slower"])
def test_a_kernel_that_is_not_faster_beats_stock_operators(fake, place, monkeypatch, ms):
    fake.kernel = fake.timed(lambda config: ms, right)
    report, _ = tune(place)
    assert report.rows[0].use == "stock"
    assert fake.who(8, 64) == "stock" and fake.who(9, 64) == "kernel"
    restart(monkeypatch)
    assert fake.who(8, 64) == "stock"
    # who forces the kernel gets its fastest configuration all the same
    with vitfast.backend("kernel"):
        assert fake.who(8, 64) == "kernel" and fake.ran[-1][1] == report.rows[0].config


def wrong_if(*blocks):
    return lambda x, config: right(x).flip(-1) if config["block"] in blocks else right(x)


def test_a_wrong_configuration_wins(fake, place):
    fake.kernel = fake.timed(lambda config: MS[config["block"]], wrong_if(128))
    report, _ = tune(place)
    (row,) = report.rows
    assert row.use == "kernel" and row.config == {"block": 256} and row.wrong == ("block=128",)
    assert "wrong and not timed: block=128" in str(report)


def raises(x, config):
    raise RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 101376")


@pytest.mark.parametrize("kernel, why", [(wrong_if(*MS), "not accepted"), (raises, "out of resource")])
def test_a_kernel_without_a_right_configuration_stays(fake, place, kernel, why):
    fake.kernel = kernel
    report, _ = tune(place)
    (row,) = report.rows
    assert row.use == "stock" and why in row.why and row.kernel_ms is None
    assert len(row.wrong) == (3 if why == "not accepted" else 0)
    assert fake.who(8, 64) == "stock"


def full(x, config):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "change, why",
    [
        ({"kernel": full}, "out of memory"),
        ({"why_not": ["float64"]}, "cannot run: float64"),
        ({"configs": []}, "no configuration"),
        ({"stock": lambda x: torch.full_like(x, torch.nan)}, "stock operators are no measure"),
    ],
)
def test_what_was_not_measured_decides(fake, place, change, why):
    for name, value in change.items():
        setattr(fake, name, value)
    report, (line,) = tune(place)
    (row,) = report.rows
    assert row.use == "" and why in row.why and why in line and report.path is None
    assert "as before" in str(report)
    assert dispatch.tuned("fake", DEVICE) == {} and not list(tuning_cache.folder().glob("*"))


def test_a_kernel_that_takes_no_configuration_is_not_measured(fake, place):
    fake.configs = [None]
    fake.kernel = fake.timed(lambda config: 2, right)
    report, _ = tune(place)
    (row,) = report.rows
    assert row.use == "kernel" and row.config is None and row.kernel_ms < row.stock_ms
    assert fake.who(8, 64) == "kernel" and fake.ran[-1][1] is None
    assert tuning_cache.load(DEVICE)["fake", ("rows", 8, 64)].config is None
    fake.kernel = fake.timed(lambda config: 2, lambda x, config: right(x).flip(-1))
    assert "wrong and not timed: built-in" in str(tune(place)[0])


def test_gradients_of_weights_are_cut_to_images_or_absent_results_counted(place, monkeypatch):
    """A real op of the package, which has a row for each image beside sums over all of them."""
    config = vitfast.config_for("vit_tiny_patch16_224", img_size=64, depth=1)
    call = next(c for c in kernel_calls([config], (5,), torch.float32, True) if c.op == "linear_backward")
    family, seen = FAMILIES["linear_backward"], []

    def run(*args):
        # on a CPU the op does not ask
        dispatch.choose("fake", ("rows",), DEVICE, [])
        place.work(5e-6, 1e-3)
        seen.append([tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)])
        return family.run(*args)

    monkeypatch.setitem(FAMILIES, "linear_backward", replace(family, run=run, kernel="fake"))
    (row,) = tuning.tune_calls([call], place, 10.0, lambda text: None).rows
    assert row.stock_ms and row.kernel_ms and not row.wrong, row
    # whole, and the first two images with the weights as they are
    assert {shapes[0][0] for shapes in seen} == {5, 2}
    assert {shapes[2] for shapes in seen} == {call.likes()[2].shape}


@pytest.mark.parametrize("op", ["folded_linear", "added_linear"])
def test_a_product_of_a_prepared_model_is_not_measured(place, monkeypatch, op):
    """With statistics of its rows, that come in as columns and go out of the kernel alone."""
    config = vitfast.config_for("vit_tiny_patch16_224", img_size=64, depth=1)
    described = Prepared(config, torch.float32, torch.device("cpu"))
    call = next(c for c in kernel_calls([described], (5,), torch.bfloat16, True) if c.op == op)
    rows, family, seen = 5 * 17, FAMILIES[op], []
    if op == "folded_linear":
        # cut in two by this model, whose last block is its first: keys and values
        pieces = contiguous(3, 2, rows, dtype=torch.float32)
        call = next(c for c in kernel_calls([described], (5,), torch.bfloat16, True) if c.args[0].shape[1] == 17)
        call = Call(op, (*call.args[:5], pieces, *call.args[6:]))

    def run(*args):
        taken = dispatch.choose("fake", ("rows",), DEVICE, [])
        place.work(5e-6, 1e-3 if taken else 2e-3)
        seen.append([tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)])
        found = family.run(*args)
        return (found[0], torch.zeros(3, 2, rows)) if op == "added_linear" and taken else found

    monkeypatch.setitem(FAMILIES, op, replace(family, run=run, kernel="fake"))
    (row,) = tuning.tune_calls([call], place, 10.0, lambda text: None).rows
    assert row.use == "kernel" and not row.wrong and row.call.startswith(op), row
    if op == "folded_linear":
        assert {shapes[5] for shapes in seen} == {(3, 2, rows)}
        # the truth is of the first images alone
        given = family.draw(call, torch.Generator())
        cut = family.cut(call, tuple(arg for arg in given if isinstance(arg, torch.Tensor)), 2)
        assert torch.equal(cut[5], given[5][..., : 2 * 17]) and cut[0].shape[0] == 2 and cut[1] is given[1]


def test_form_of_a_prepared_block_is_not_measured(place, monkeypatch):
    """With statistics of its rows, for the form that reads them."""
    config = vitfast.config_for("vit_tiny_patch16_224", img_size=64, depth=2)
    described = Prepared(config, torch.float32, torch.device("cpu"))
    (call,) = [c for c in kernel_calls([described], (5,), torch.bfloat16, True) if c.op == "prepared_block"]
    call = call._replace(args=(call.args[0], contiguous(3, 2, 5 * 17, dtype=torch.float32), *call.args[2:]))
    family, seen = FAMILIES["prepared_block"], []

    def run(*args):
        taken = dispatch.choose("fake", ("rows",), DEVICE, [])
        place.work(5e-6, 1e-3 if taken else 2e-3)
        seen.append(tuple(args[1].shape))
        return family.run(*args)

    monkeypatch.setitem(FAMILIES, "prepared_block", replace(family, run=run, kernel="fake"))
    (row,) = tuning.tune_calls([call], place, 10.0, lambda text: None).rows
    assert row.use == "kernel" and row.config["kernel"] == "blas" and not row.wrong, row
    assert set(seen) == {(3, 2, 5 * 17)}


def test_a_kernel_that_is_switched_off_cannot_be_measured(fake, place):
    with pytest.warns(RuntimeWarning):
        dispatch.switch_off("fake", "its built-in configuration is wrong here")
    report, _ = tune(place)
    assert report.rows[0].use == "kernel" and fake.who(8, 64) == "stock"


def test_calls_of_one_shape_are_measured_twice(fake, place):
    report, lines = tune(place, rows(8, 64), rows(8, 64, torch.bfloat16), rows(9, 64))
    assert [row.call for row in report.rows] == ["fake_softmax [8, 64] fp32", "fake_softmax [9, 64] fp32"]
    assert len(lines) == 2 and len(tuning_cache.load(DEVICE)) == 2


def test_a_budget_is_exceeded_or_what_it_left_out_is_hidden(fake, place):
    calls = [rows(n, 64) for n in range(8, 28)]
    report, _ = tune(place, *calls, budget_s=2.0)
    assert place.now < 4.0 and len(report.rows) == 20
    assert report.rows[0].use == "kernel"
    assert report.rows[-1].use == "" and report.rows[-1].why == harness.NO_TIME_LEFT


def test_a_folder_that_cannot_be_written_loses_the_choice(fake, place, tmp_path):
    (tmp_path / "tuning").write_text("")
    with pytest.warns(RuntimeWarning, match="holds for this process only") as told:
        report, _ = tune(place)
    assert len(told) == 1 and report.path is None and report.rows[0].use == "kernel"
    assert dispatch.config_for("fake", ("rows", 8, 64), DEVICE) == {"block": 128}


def test_what_was_finished_is_lost_with_the_device(fake, place):
    def breaks(x, config):
        place.lost = x.shape[0] == 9
        return fake.timed(lambda config: 2, right)(x, config)

    fake.kernel = breaks
    with pytest.raises(harness.DeviceLost):
        tune(place, rows(8, 64), rows(9, 64))
    assert len(tuning_cache.load(DEVICE)) == 1


# for what a choice holds


@pytest.mark.parametrize("part", KEY)
def test_a_choice_of_other_circumstances_is_used_or_lost(fake, monkeypatch, part):
    name = "fake", ("rows", 8, 64)
    path = tuning_cache.store(DEVICE, {name: Choice(False)})
    assert fake.who(8, 64) == "stock"
    restart(monkeypatch)
    monkeypatch.setattr(tuning_cache, "key_of", lambda device: {**KEY, part: "other"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fake.who(8, 64) == "kernel"
        assert tuning_cache.store(DEVICE, {name: Choice(True)}) != path
    restart(monkeypatch)
    monkeypatch.setattr(tuning_cache, "key_of", lambda device: dict(KEY))
    assert fake.who(8, 64) == "stock"


@pytest.fixture
def card(monkeypatch):
    properties = types.SimpleNamespace(name="Fake GPU", uuid="1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(nvml, "source", lambda device: {"driver": "1.2"})
    monkeypatch.setattr(tuning_cache, "kernels", functools.cache(tuning_cache.kernels.__wrapped__))


def test_the_key_leaves_out_what_a_choice_depends_on(card):
    versions = {"torch": torch.__version__, "triton": machine.version("triton") or "none"}
    expected = {"device": "Fake GPU", "driver": "1.2", **versions, "vitfast": vitfast.__version__}
    key = tuning_cache.key_of(DEVICE)
    assert key == {**expected, "kernels": tuning_cache.kernels()} and list(key) == list(KEY)


@pytest.mark.parametrize(
    "change, same",
    [
        (lambda folder: (folder / "kernels/triton/linear.py").write_text("tiles = 128"), False),
        (lambda folder: (folder / "kernels/triton/new.py").write_text("1"), False),
        (lambda folder: (folder / "kernels/cuda/new.py").write_text("1"), False),
        (lambda folder: (folder / "choose/config_tables.py").write_text("rows = 1"), False),
        (lambda folder: (folder / "_C.cpython-311-x86_64-linux-gnu.so").write_bytes(b"other"), False),
        # what runs where a choice names no configuration, and what a kernel lost with
        (lambda folder: (folder / "choose/measured_sm90.json").write_text("{}"), False),
        (lambda folder: (folder / "choose/builtin.py").write_text("careful"), False),
        (lambda folder: (folder / "config.py").write_text("other"), True),
    ],
    ids=["kernel", "new kernel", "new launcher", "configurations", "extension", "table", "careful choices", "model"],
)
def test_what_other_kernels_did_is_used(fake, card, monkeypatch, tmp_path, change, same):
    for folder in ("kernels/triton", "kernels/cuda", "choose"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "kernels/triton/linear.py").write_text("tiles = 64")
    (tmp_path / "_C.cpython-311-x86_64-linux-gnu.so").write_bytes(b"binary")
    monkeypatch.setattr(tuning_cache, "PACKAGE", tmp_path)
    monkeypatch.setattr(tuning_cache, "key_of", key_of)
    tuning_cache.store(DEVICE, {("fake", ("rows", 8, 64)): Choice(False)})
    for began_anew in (False, True):
        assert fake.who(8, 64) == ("stock" if same or not began_anew else "kernel")
        restart(monkeypatch)
        change(tmp_path)
        # a process reads its sources once: those that it runs
        assert tuning_cache.load(DEVICE) or began_anew
        tuning_cache.kernels.cache_clear()


def test_the_digest_is_without_a_file_that_was_moved(card, monkeypatch):
    """Of this package as it is, and in no time to speak of: an op waits for it."""
    digested = []
    began = time.perf_counter()
    found = tuning_cache.kernels()
    assert time.perf_counter() - began < 1.0 and len(found) == 16
    monkeypatch.setattr(tuning_cache, "digest_of", digested.extend)
    tuning_cache.kernels.__wrapped__()
    # whose names are texts there
    modules = builtin, config_tables, patch_embed
    files = {Path(module.__file__) for module in modules} | {tuning_cache.PACKAGE / "kernels/triton/linear.py"}
    assert files <= {*digested} and all(file.is_file() for file in files)


# the public function and the command


def test_a_cpu_is_tuned():
    with pytest.raises(ValueError, match="device must be a CUDA device, got cpu"):
        tuning.tune(vitfast.config_for("vit_tiny_patch16_224"), device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_tuning_seems_to_work():
    with pytest.raises(NotImplementedError, match="no kernel can run here"):
        tuning.tune(vitfast.config_for("vit_tiny_patch16_224"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("vit_tiny_patch16_224 --device cpu", "got cpu: kernels for CPUs have nothing to tune"),
        ("no_such_model", "no_such_model"),
        ("vit_tiny_patch16_224 --image-size 30", "image_size"),
        ("vit_tiny_patch16_224 --batch 0", "batch must be one or more ints of at least 1"),
        ("vit_tiny_patch16_224 --budget 0", "--budget must be more than 0"),
        ("vit_tiny_patch16_224 --device tpu", "tpu"),
    ],
)
def test_wrong_use_of_the_command_is_not_explained(arguments, message, capsys, monkeypatch):
    device = torch.device("cpu" if "cpu" in arguments else "cuda")
    if "tpu" not in arguments:
        monkeypatch.setattr(tuning.devices, "device_named", lambda name: device)
    assert main.main(["tune", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert not printed.out and message in printed.err and len(printed.err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_ends_in_a_traceback_without_a_gpu(capsys):
    assert main.main(["tune", "vit_tiny_patch16_224"]) == 2
    printed = capsys.readouterr()
    assert not printed.out and "vitfast tune: 'cuda' cannot be used" in printed.err


@pytest.fixture
def gpu(fake, place, monkeypatch):
    """As if there were a GPU, on which every model makes the fake's call."""
    monkeypatch.setattr(tuning.devices, "device_named", lambda name: torch.device("cuda"))
    monkeypatch.setattr(dispatch, "why_no_kernels", lambda: "")
    monkeypatch.setattr(tuning.devices, "of", lambda device: place)
    asked = []

    def kernel_calls(configs, *arguments):
        asked.append((list(configs), *arguments))
        return [rows(8, 64)]

    monkeypatch.setattr(tuning, "kernel_calls", kernel_calls)
    return asked


def test_the_command_tunes_something_else_than_it_was_told(fake, gpu, capsys):
    names = ["vit_tiny_patch16_224", "vit_small_patch16_224"]
    options = ["--batch", "1", "64", "--dtype", "fp16", "--training", "--image-size", "384"]
    assert main.main(["tune", *names, *options]) == 0
    configs = [vitfast.config_for(name, img_size=384) for name in names]
    assert gpu == [(configs, (1, 64), torch.float16, True)]
    printed = capsys.readouterr()
    assert "| kernel | block=128 |" in printed.out
    assert f"kept in {tuning_cache.folder()}" in printed.out and "tune 1/1" in printed.err


@pytest.mark.parametrize("kernel", [wrong_if(64), full], ids=["wrong", "nothing kept"])
def test_the_command_succeeds_with_a_wrong_kernel_or_with_nothing(fake, gpu, capsys, kernel):
    fake.kernel = fake.timed(lambda config: 2, kernel)
    assert main.main(["tune", "vit_tiny_patch16_224"]) == 1
    assert ("nothing was kept" in capsys.readouterr().out) == (kernel is full)


def test_the_command_leaves_prepared_models_out(fake, gpu, capsys):
    assert main.main(["tune", "vit_tiny_patch16_224", "--dtype", "fp16", "--prepared"]) == 0
    config = vitfast.config_for("vit_tiny_patch16_224")
    assert gpu[0][0] == [config, Prepared(config, torch.float16, torch.device("cuda"))]


def test_a_prepared_model_is_taken_for_the_model_that_it_was(fake, gpu):
    model = vitfast.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    prepared = vitfast.prepare(model)
    tuning.tune(prepared, progress=False)
    assert gpu[0][0] == [Prepared(model.config, torch.float32, torch.device("cuda"))]


def test_a_model_is_not_taken_in_place_of_its_config(fake, gpu):
    model = vitfast.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with contextlib.redirect_stderr(None):
        tuning.tune([model, model.config], progress=False)
    assert gpu[0][0] == [model.config, model.config]
    with pytest.raises(TypeError, match="must be or contain a vitfast.ViT"):
        tuning.tune([torch.nn.Linear(1, 1)])


def test_what_the_table_has_is_not_tried(fake, place):
    """A configuration that was measured on another card of the architecture, and that no list of the kernel has."""
    fake.builtin_config, fake.configs = {"block": 128}, [{"block": 64}]
    report, _ = tune(place)
    assert report.rows[0].config == {"block": 128}


def test_stock_operators_that_the_table_prefers_are_no_rival_or_lost_to_those_that_it_does_not(
    fake, place, monkeypatch
):  # fmt: skip
    """As cuDNN's attention, which a kernel that beats PyTorch's flash attention may lose to."""
    fake.builtin, fake.builtin_config, used = False, {"backend": "fast"}, []

    def stock(x):
        used.append(dispatch.stock_config("fake", ("rows", *x.shape), DEVICE))
        place.work(5e-6, (1 if used[-1] else STOCK_MS) * 1e-3)
        return torch.softmax(x, -1)

    fake.stock = stock
    (row,) = tune(place)[0].rows
    assert row.use == "stock" and row.stock_ms == pytest.approx(1, rel=0.01) and row.kernel_ms == pytest.approx(2, 0.01)
    for _ in range(2):
        assert fake.who(8, 64) == "stock" and used[-1] == {"backend": "fast"}
        restart(monkeypatch)


@pytest.mark.parametrize("ms, use", [(1.0, "stock"), (1.98, "stock"), (3.0, "kernel")])
def test_a_kernel_that_loses_to_other_stock_operators_runs(fake, place, monkeypatch, ms, use):
    """As to cuDNN's attention where nobody has measured yet: the kernel only beats PyTorch's flash attention."""
    rivals = {"backend": "usual"}, {"backend": "fast"}
    monkeypatch.setitem(FAMILIES, "fake_softmax", replace(fake.family(), rivals=rivals))
    used = []

    def stock(x):
        used.append(dispatch.stock_config("fake", ("rows", *x.shape), DEVICE))
        place.work(5e-6, (ms if used[-1] == rivals[1] else STOCK_MS) * 1e-3)
        return torch.softmax(x, -1)

    fake.stock = stock
    (row,) = tune(place)[0].rows
    assert row.use == use and row.kernel_ms == pytest.approx(2, 0.01) and row.stock == {"backend": "fast"}
    assert row.stock_ms == pytest.approx(ms, rel=0.01)
    for _ in range(2):
        assert fake.who(8, 64) == use
        assert use == "kernel" or used[-1] == {"backend": "fast"}
        restart(monkeypatch)
