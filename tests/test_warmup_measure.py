"""`vitfast.warmup` measures: on a simulated device nothing of ours runs where stock operators are as fast."""

import contextlib
import json
import random
import types
import warnings
from dataclasses import replace

import pytest
import torch
from fake_kernel import DEVICE, prepared, restart, right, rows
from simulated_device import SimulatedDevice

import vitfast
from vitfast.check import measuring, warmup
from vitfast.check.calls import Prepared
from vitfast.check.families import FAMILIES
from vitfast.choose import dispatch, tuning_cache
from vitfast.choose.tuning_cache import Choice
from vitfast.measure import device as devices

fake_fixture = pytest.fixture(prepared, name="fake")

STOCK_MS = 4
ISSUE_S = 5e-5
NAME = "fake", ("rows", 8, 64)


@pytest.fixture
def place(fake):
    """A device on which the fake's calls take time: the kernel's half of stock operators'."""
    made = SimulatedDevice()

    def timed(ms, run):
        def call(*args):
            made.work(ISSUE_S, ms * 1e-3)
            return run(*args)

        return call

    fake.timed = timed
    fake.kernel, fake.stock = timed(STOCK_MS / 2, right), timed(STOCK_MS, fake.stock)
    return made


def warm(place, *calls, measure=True):
    lines = []
    return warmup.warm(calls or (rows(8, 64),), place, lines.append, measure), lines


def kept():
    """What the file has, whatever this process knows."""
    return tuning_cache.load(DEVICE)


@pytest.mark.parametrize(
    "ms, runs, said",
    [
        (STOCK_MS / 2, "kernel", "right; the kernel is 2.00 x as fast"),
        (STOCK_MS, "stock operators", "right; the kernel is 1.00 x as fast, within the noise"),
        (STOCK_MS * 2, "stock operators", "right; the kernel is 0.50 x as fast"),
    ],
    ids=["faster", "as fast", "slower"],
)
def test_a_slower_kernel_runs_or_a_faster_one_does_not(fake, place, monkeypatch, ms, runs, said):
    fake.kernel = fake.timed(ms, right)
    report, (line,) = warm(place)
    (row,) = report.rows
    assert (row.runs, row.check) == (runs, said) and said in line
    assert (row.stock_ms, row.kernel_ms) == (pytest.approx(STOCK_MS, rel=0.02), pytest.approx(ms, rel=0.02))
    # at once, and in a later process, where nothing is measured again
    for check in (said, "measured before, right" if runs == "kernel" else "measured before"):
        assert fake.who(8, 64) == runs.split()[0] and fake.who(9, 64) == "kernel"
        if check != said:
            (row,) = warm(place)[0].rows
            assert (row.runs, row.check, row.kernel_ms) == (runs, check, None)
        assert kept() == {NAME: Choice(runs == "kernel", None, pytest.approx(ms, 0.02), pytest.approx(STOCK_MS, 0.02))}
        restart(monkeypatch)


def test_a_kernel_wins_by_less_than_the_noise(fake, place):
    drawn = random.Random(0)

    def noisy(ms, run):
        return lambda *args: fake.timed(ms * drawn.uniform(0.95, 1.05), run)(*args)

    fake.kernel, fake.stock = noisy(3.96, right), noisy(4.0, lambda x: torch.softmax(x, -1))
    (row,) = warm(place)[0].rows
    ratio = float(row.check.removeprefix("right; the kernel is ").removesuffix(" x as fast, within the noise"))
    assert ratio > 1 and row.runs == "stock operators"


def test_a_host_that_is_slower_than_the_device_decides(fake, place):
    """Issuing either takes longer than running it, which in a graph is no cost."""
    fake.kernel, fake.stock = fake.timed(0.01, right), fake.timed(0.02, lambda x: torch.softmax(x, -1))
    report, _ = warm(place)
    assert report.rows[0].check == "right; the kernel is 2.00 x as fast" and place.captures


def test_measuring_leaves_out_the_configuration_that_runs(fake, place):
    """Where nobody tuned a table may have one."""
    ms, fake.builtin_config = {None: 9, 256: 1}, {"block": 256}
    fake.kernel = lambda x, config: fake.timed(ms[config and config["block"]], right)(x, config)
    fake.configs = [{"block": 256}]
    report, _ = warm(place)
    assert report.rows[0].kernel_ms == pytest.approx(1, rel=0.1) and kept()[NAME].config is None


@pytest.mark.parametrize("stored", [True, False], ids=["in the file", "in the process"])
@pytest.mark.parametrize(
    "choice, check",
    [
        (Choice(True, {"block": 64}, 1.0, 2.0), "tuned, right"),
        (Choice(True), "measured before, right"),
        (Choice(False, None, 3.0, 2.0), "measured before"),
    ],
)
def test_what_was_decided_before_is_measured_again_or_overwritten(fake, place, stored, choice, check):
    (tuning_cache.store if stored else dispatch.learn)(DEVICE, {NAME: choice})
    report, _ = warm(place)
    (row,) = report.rows
    assert (row.check, row.kernel_ms) == (check, None)
    assert dispatch.cached(*NAME, DEVICE) == choice and kept() == ({NAME: choice} if stored else {})


def test_what_another_process_tuned_meanwhile_is_overwritten(fake, place):
    tuned = Choice(True, {"block": 64}, 1.0, 2.0)

    def meanwhile(x, config=None):
        tuning_cache.store(DEVICE, {NAME: tuned})
        return right(x)

    fake.kernel = fake.timed(STOCK_MS * 2, meanwhile)
    warm(place, rows(8, 64), rows(9, 64))
    assert kept()[NAME] == tuned and not kept()["fake", ("rows", 9, 64)].kernel


def test_calls_of_one_shape_are_measured_twice(fake, place):
    report, _ = warm(place, rows(8, 64), rows(8, 64, torch.bfloat16))
    first, second = report.rows
    assert first.kernel_ms and second.check == "measured before, right" and not second.kernel_ms


def test_it_is_measured_where_nobody_asked_for_it(fake, place):
    fake.kernel = fake.timed(STOCK_MS * 2, right)
    (row,) = warm(place, measure=False)[0].rows
    assert (row.runs, row.check, row.kernel_ms) == ("kernel", "right", None)
    assert not kept() and fake.who(8, 64) == "kernel"


@pytest.mark.parametrize(
    "shape, index", [((), DEVICE), (("rows", 8, 64), None)], ids=["no shape", "Triton's interpreter"]
)
def test_a_call_that_no_choice_holds_for_is_measured(fake, place, monkeypatch, shape, index):
    def run(x):
        return right(x) if dispatch.choose("fake", shape, index, []) else torch.softmax(x, -1)

    monkeypatch.setitem(FAMILIES, "fake_softmax", replace(FAMILIES["fake_softmax"], run=run))
    (row,) = warm(place)[0].rows
    assert (row.runs, row.check) == ("kernel", "right") and not kept() and not dispatch._tables.get(index)


def test_a_kernel_that_is_forced_is_measured(fake, place):
    fake.kernel = fake.timed(STOCK_MS * 2, right)
    with vitfast.backend("kernel", op="fake"):
        (row,) = warm(place)[0].rows
    assert (row.runs, row.check) == ("kernel", "right") and not kept()


def test_a_kernel_that_is_switched_off_is_measured(fake, place):
    fake.kernel = fake.timed(1, lambda x, config: right(x).flip(-1))
    with pytest.warns(RuntimeWarning, match="switched off"):
        report, _ = warm(place, rows(8, 64), rows(9, 64))
    assert all(row.runs == "stock operators" and row.kernel_ms is None for row in report.rows) and not kept()


def test_what_stock_operators_could_not_check_is_measured(fake, place):
    fake.stock = lambda x: torch.full_like(x, torch.nan)
    with pytest.warns(RuntimeWarning, match="not checked"):
        (row,) = warm(place)[0].rows
    assert row.runs == "kernel" and row.kernel_ms is None and not kept()


@pytest.mark.parametrize("who", ["kernel", "stock"])
@pytest.mark.parametrize(
    "problem", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no such operator")], ids=["full", "other"]
)
def test_what_failed_while_it_was_measured_decides(fake, place, who, problem):
    """The kernel was right a moment ago: nothing is known, and nothing is switched off."""
    seen, run = [], getattr(fake, who)

    def fails_later(x, *config):
        seen.append(len(x))
        # the check runs the kernel once with all rows, and stock operators with few of them
        if len(x) == 8 and seen.count(8) > (who == "kernel"):
            raise problem
        return run(x, *config)

    setattr(fake, who, fails_later)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report, _ = warm(place, rows(8, 64), rows(9, 64))
    row, other = report.rows
    assert row.runs == "kernel" and f"right; not measured: {type(problem).__name__}: {problem}" == row.check
    assert dispatch.cached(*NAME, DEVICE) is None and dispatch.switched_off("fake") is None
    # the next call is measured all the same
    assert other.kernel_ms and set(kept()) == {("fake", ("rows", 9, 64))}


@pytest.mark.parametrize("problem", ["lost", "interrupt"])
def test_what_was_measured_is_lost_with_the_device_or_by_an_interrupt(fake, place, problem):
    seen = []

    def breaks(x, config=None):
        seen.append(len(x))
        # the second call, when its kernel was checked
        if seen.count(9) > 1:
            if problem == "interrupt":
                raise KeyboardInterrupt
            place.lost = True
        return right(x)

    fake.kernel = fake.timed(STOCK_MS * 2, breaks)
    lost = pytest.raises(RuntimeError, match=r"fake kernel broke the device.*set_backend\('stock', op='fake'\)")
    with lost if problem == "lost" else pytest.raises(KeyboardInterrupt):
        warm(place, rows(8, 64), rows(9, 64))
    assert set(kept()) == {NAME} and not kept()[NAME].kernel


def test_a_folder_that_cannot_be_written_loses_a_choice_or_is_told_for_each(fake, place, tmp_path):
    (tmp_path / "tuning").write_text("")
    fake.kernel = fake.timed(STOCK_MS * 2, right)
    with pytest.warns(RuntimeWarning, match="warmup: .*holds for this process only") as told:
        warm(place, rows(8, 64), rows(9, 64))
    assert len(told) == 1 and fake.who(8, 64) == fake.who(9, 64) == "stock"


@pytest.mark.parametrize("kernel_ms, stock_ms", [(0.001, 0.002), (0.05, 0.04), (0.9, 0.9), (2, 4), (8, 5)])
def test_measuring_takes_longer_than_a_moment(fake, place, kernel_ms, stock_ms):
    """A quarter of a second a call of the device's time, and what 5 ms and more for one call make of it."""
    fake.kernel, fake.stock = fake.timed(kernel_ms, right), fake.timed(stock_ms, lambda x: torch.softmax(x, -1))
    calls = [rows(8, 64 * n) for n in range(1, 9)]
    warm(place, *calls)
    assert len(kept()) == len(calls)
    assert place.now < len(calls) * 0.25 * max(1, kernel_ms / 5, stock_ms / 5)


def test_inputs_fill_a_large_cache_one_by_one(fake, monkeypatch):
    place, drawn = SimulatedDevice(cache_bytes=2**30), []
    place.most_sets = 512
    family = FAMILIES["fake_softmax"]
    monkeypatch.setitem(
        FAMILIES, "fake_softmax", replace(family, draw=lambda *given: drawn.append(1) or family.draw(*given))
    )
    fake.kernel = lambda x, config: place.work(ISSUE_S, 2e-3) or right(x)
    warm(place)
    # and for the checks
    assert measuring.MOST_SETS <= len(drawn) <= measuring.MOST_SETS + 3


def test_a_compiled_model_keeps_the_kernel_that_lost(fake, place):
    fake.kernel = fake.timed(STOCK_MS * 2, right)
    with torch.library._scoped_library("vitfast_measure", "DEF") as library:
        library.define("softmax(Tensor x) -> Tensor")
        library.impl("softmax", fake.run, "CPU")
        torch.library.register_fake("vitfast_measure::softmax", torch.empty_like, lib=library)
        compiled = torch.compile(lambda x: torch.ops.vitfast_measure.softmax(x) + 1, backend="eager", fullgraph=True)
        x, before = torch.randn(8, 64), len(fake.ran)
        with torch.compiler.set_stance("default"):
            compiled(x)
            assert [who for who, *_ in fake.ran[before:]] == ["kernel"]
            warm(place)
            before = len(fake.ran)
            compiled(x)
    assert [who for who, *_ in fake.ran[before:]] == ["stock"]


# the public function


@pytest.fixture
def gpu(fake, place, monkeypatch):
    """As if there were a GPU and a model on it; a test says which calls it makes."""
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"))
    config = vitfast.config_for("vit_tiny_patch16_224")
    model = types.SimpleNamespace(parameters=lambda: iter([on_gpu]), config=config)
    made = types.SimpleNamespace(model=model, calls=lambda: [rows(8, 64)], asked=0)
    monkeypatch.setattr(warmup, "models_in", lambda *_: [model])
    monkeypatch.setattr(warmup, "description", lambda *_: Prepared(config, torch.float16, on_gpu.device))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(devices, "of", lambda device: place)

    def kernel_calls(*_):
        made.asked += 1
        return made.calls()

    monkeypatch.setattr(warmup, "kernel_calls", kernel_calls)
    made.warmup = lambda **options: vitfast.warmup(model, dtype=torch.float32, **options)
    return made


def test_a_model_is_not_measured_or_cannot_go_without(fake, gpu, capsys):
    fake.kernel = fake.timed(STOCK_MS * 2, right)
    (row,) = gpu.warmup(measure=False).rows
    assert row.runs == "kernel" and not kept()
    (row,) = gpu.warmup().rows
    assert row.runs == "stock operators" and fake.who(8, 64) == "stock"
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("stock operators, right; the kernel is 0.50 x as fast") and "warmup 1/1" in line


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_depend_on_a_measurement(fake, gpu):
    fake.kernel = fake.timed(STOCK_MS * 2, right)
    tuning_cache.store(DEVICE, {("fake", ("rows", 9, 64)): Choice(False)})
    before = kept()
    gpu.calls = lambda: [rows(8, 64), rows(9, 64)]
    with deterministic():
        found = [(row.runs, row.check) for row in gpu.warmup(progress=False).rows]
    assert found == [("kernel", "right"), ("stock operators", "measured before")]
    assert kept() == before and fake.who(8, 64) == "kernel"


def test_calls_that_follow_from_a_choice_are_left_cold(fake, gpu):
    """As of a prepared model: without statistics from the product before, the next one is another call."""
    fake.kernel = fake.timed(STOCK_MS * 2, right)
    chosen = lambda n: dispatch.cached("fake", ("rows", n, 64), DEVICE)  # noqa: E731
    gpu.calls = lambda: [rows(8, 64), rows(10 if chosen(8) else 9, 64)]
    report = gpu.warmup(progress=False)
    assert [row.call.split(",")[0] for row in report.rows] == [f"fake_softmax [{n}" for n in (8, 9, 10)]
    assert all(row.kernel_ms for row in report.rows) and len(kept()) == 3 and gpu.asked == 3


def test_calls_that_change_every_time_are_followed_for_ever(fake, gpu):
    gpu.calls = lambda: [rows(8 + gpu.asked, 64)]
    assert len(gpu.warmup(progress=False).rows) == gpu.asked == warmup.PASSES


def test_choices_are_kept_in_another_form_than_tunes(fake, place):
    """One file, which `vitfast tune` and its readers know."""
    warm(place)
    (path,) = tuning_cache.folder().iterdir()
    (line,) = json.loads(path.read_text())["choices"]
    assert path == tuning_cache.path_of(tuning_cache.key_of(DEVICE))
    assert (line["kernel"], line["shape"], line["use"], line["config"]) == ("fake", ["rows", 8, 64], "kernel", None)
