"""The plan `amx`: its stages on whatever CPU this is, and what is said of the goals for one with AMX."""

import pytest
import torch
from bench_cases import named
from bench_runs import Clock, do, rows_of, runs_in, written

from benchmarks.core import ceilings, compilers, packed
from benchmarks.gpu import goals, plans, rows, stages
from benchmarks.gpu import run as program
from vitfast.check.case import Variant


@pytest.fixture
def a_run(tmp_path, monkeypatch):
    return runs_in(tmp_path, monkeypatch)


@pytest.fixture
def without_compilers(monkeypatch):
    """What takes seconds to get ready is in tests of its own."""
    monkeypatch.setattr(compilers, "frozen", lambda model, *_: lambda images: model(images).detach())
    monkeypatch.setattr(Variant, "missing", lambda self: list(self.needs))


@pytest.mark.slow
def test_plan_of_a_cpu_with_amx_fails_or_leaves_out_a_part_elsewhere(a_run, without_compilers, capsys):
    """Every stage on whatever CPU this is: each row has times of ours and of stock, and what was accepted."""
    run = a_run()
    assert do(run, *plans.PLANS["amx"]) == []
    found = written(run)
    names = [row["name"] for row in found["rows"]]
    assert names == [
        *(f"packed {name}" for name in ("qkv", "proj", "fc1", "fc2", "attention", "block")),
        "vit_tiny_patch16_224 compiled",
    ]  # fmt: skip
    for row in found["rows"]:
        # of bf16, which oneDNN multiplies with AVX-512 only
        if row["kind"] == "model" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            assert row["variants"][row["baseline"]]["ms"] > 0, row["key"]
        mine = row["variants"]["vitfast"]
        assert "absent" in mine or (mine["accepted"] and mine["ms"] > 0), (row["key"], mine)
    models = found["rows"][-1]["variants"]
    assert {"timm max-autotune", "OpenVINO", "OpenVINO int8", "ONNX Runtime fp32", "ONNX Runtime int8"} <= models.keys()
    assert not {"torchvision", "Hugging Face"} & models.keys()
    facts, told = found["run"]["processor"], capsys.readouterr().out
    amx = "amx_bf16" in facts["usable"]
    assert ("AMX is not usable here" in told) is not amx and facts["kernels"] in facts["usable"]
    assert set(found["run"]["goals"]) <= set(told.splitlines())
    assert all(found["stages"][stage.name]["done"] for stage in plans.PLANS["amx"])


def test_what_a_cpu_chose_is_forgotten_with_the_process_or_told_of_another_stage(a_run, monkeypatch, capsys):
    run, plan = a_run(), [rows_of(named("a"), "first"), rows_of(named("b"), "second")]
    chosen = [["linear, 2 threads: amx_bf16"], []]
    monkeypatch.setattr(rows.cpu_kernels, "measured", lambda: chosen.pop(0))
    assert do(run, *plan, stages.Stage("goals", 9, goals.goals)) == [] and not chosen
    assert "chosen in first: linear, 2 threads: amx_bf16" in capsys.readouterr().out.splitlines()
    assert "chosen" not in written(run)["stages"]["second"]


def test_rows_with_amx_are_not_those_that_goals_are_about(a_run):
    """A goal whose row has another name or batch is never measured."""
    run = a_run(tiny=False)
    made = [maker() for stage in plans.PLANS["amx"] if stage.makers for maker in stage.makers(run)]
    models = {(case.notes["model"], case.batch) for case in made if case.kind == "model"}
    assert models == goals.PREPARED.keys()
    assert all({goals.OURS, goals.PREPARED_OURS} <= case.variants.keys() for case in made if case.kind == "model")
    rows = {case.batch * case.shape["tokens"] for case in made}
    assert rows == {197, 1576} and {case.batch for case in made} == goals.PRODUCTS.keys()
    heads = {(case.shape["heads"], case.batch) for case in made if case.name == "packed attention"}
    assert goals.ATTENTION.keys() <= heads
    products = [case for case in made if case.name.split()[-1] in ceilings.PRODUCTS]
    assert len(products) == 2 * 2 * 4 and all(case.dtype == "bf16" for case in made)


def told_of_goals(times, **changed):
    """What is said of the first model: of variants with these times in ms, some of them changed."""
    (model, batch) = next(iter(goals.PREPARED))
    variants = {
        name: {"ms": ms, "ours": name.startswith("vitfast"), "accepted": True, "ratio": times["timm"] / ms}
        | ({"tolerance": 0.1, "error": 0.02} if "int8" in name else {})
        for name, ms in times.items()
    }
    for name, change in changed.items():
        variants[name.replace("_", " ")] |= change
    row = {
        "kind": "model", "name": model, "batch": batch, "dtype": "bf16", "baseline": "timm", "variants": variants,
        "others": 0.2,
    }  # fmt: skip
    return "\n".join(line for line in goals.lines([row]) if not line.startswith("vit") or line.startswith(model))


def times_at_goals(**changed):
    """With these of 10 ms a prepared model is as fast as it is to be, and no faster."""
    (over_timm, over_best) = next(iter(goals.PREPARED.values()))
    rivals = dict.fromkeys(goals.RIVALS, 10 * over_best + 1) | {"OpenVINO": 10 * over_best, "OpenVINO int8": 1.0}
    return {"timm": 10 * over_timm, "vitfast": 10 * over_timm, "vitfast prepared": 10.0} | rivals | changed


def test_a_goal_that_is_missed_counts_as_met_or_is_met_by_int8():
    prepared = "vitfast prepared"
    met = told_of_goals(times_at_goals(**{prepared: 9.99}))
    assert met.count(": met") == 3 and "prepared over OpenVINO, the best of the others" in met
    assert "OpenVINO int8 8000.0 (int8, 2.0% off)" in met and "others took 20% of the CPUs" in met
    assert told_of_goals(times_at_goals(**{prepared: 10.1})).count(": missed") == 2
    model, batch = next(iter(goals.PREPARED))
    assert next(goals.lines([])) == f"{model} at {batch}: not measured"


def test_a_goal_is_missed_by_what_is_printed_as_the_goal():
    found = told_of_goals(times_at_goals(vitfast=times_at_goals()["timm"] * 1.004))
    assert "eager over timm: 0.996x, >= 1x wanted: missed" in found


@pytest.mark.parametrize("name", goals.RIVALS)
def test_a_goal_is_met_since_a_rival_has_failed(name):
    """Ahead of the best of those that are left: a goal that is missed is missed all the same."""
    lost = times_at_goals(**{"vitfast prepared": 9.9})
    del lost[name]
    assert f"wanted: open without {name}" in told_of_goals(lost)
    failed = told_of_goals(times_at_goals(**{"vitfast prepared": 9.9}), **{name: {"ms": None, "not_timed": "broken"}})
    assert f"wanted: open without {name}" in failed and failed.count(": met") == 2
    behind = told_of_goals(lost | {"vitfast prepared": 20.0})
    assert "open" not in behind and behind.count(": missed") == 2


@pytest.mark.parametrize("name, shape", [("block", {"width": 384}), ("attention", {"heads": 12})])
def test_another_part_gets_the_goal_of_products_or_of_attention(name, shape):
    """Attention computes too few numbers for a goal in TFLOP/s, and its goal is ViT-S's."""
    row = {
        "kind": "op", "name": f"packed {name}", "batch": 8, "dtype": "bf16", "shape": {"tokens": 197} | shape,
        "baseline": "SDPA", "variants": {"vitfast": {"ms": 1.0, "tflops": 1.0, "ours": True, "accepted": True}},
    }  # fmt: skip
    assert "packed" in (line := list(goals.lines([row]))[-1]) and "goal" not in line


def test_a_goal_is_met_by_what_was_not_accepted_or_in_another_dtype():
    found = told_of_goals(times_at_goals(), vitfast_prepared={"accepted": False})
    assert found.count(": not measured, >=") == 2 and found.count(": met") == 1
    (model, batch), case = next(iter(goals.PREPARED)), {"kind": "model", "baseline": "timm", "variants": {}}
    for other in ({"dtype": "fp32"}, {"dtype": "bf16", "autocast": True}):
        assert (
            next(goals.lines([case | {"name": model, "batch": batch} | other])) == f"{model} at {batch}: not measured"
        )


def test_tflops_of_a_part_are_of_another_work():
    """Of one image in place of all, or of a block's products alone: a goal in TFLOP/s is met by a wrong count."""
    batch, tokens, width, heads = 3, 5, 128, 2
    shape = dict(batch=batch, tokens=tokens)
    products = {"qkv": 3, "proj": 1, "fc1": 4, "fc2": 4}
    for name, times in products.items():
        products[name] = 2 * batch * tokens * times * width**2
        assert packed.product(product=name, width=width, **shape).work.flops == products[name]
    attention = 2 * 2 * batch * heads * tokens**2 * packed.HEAD_DIM
    assert packed.attention(heads=heads, **shape).work.flops == attention
    assert packed.block(width=width, **shape).work.flops == sum(products.values()) + attention


def test_a_rival_that_is_wrong_costs_the_goals_or_is_not_marked():
    """An error in int8 that is not finite is null in the record."""
    wrong = {"OpenVINO_int8": {"error": None, "accepted": False}, "OpenVINO": {"accepted": False}}
    found = told_of_goals(times_at_goals(), **wrong)
    assert "(int8, error unknown)" in found and "(outside the acceptance rule)" in found


@pytest.mark.parametrize("left, told", [
    ([""], [0, 1]), (["no time left", ""], [0, 1]), (["no time left"] * 2 + [""], [0, 1, 2]),
])  # fmt: skip
def test_goals_wait_for_ever_where_rows_took_all_of_the_time(left, told, a_run):
    """A run that goes on took its plan for finished. While rows are left every call tells the goals."""
    run, clock, left, found = a_run(), Clock(), [*left], []

    def work(*_):
        clock.now += 50
        return stages.Outcome((), left.pop(0))

    plan = [stages.Stage("rows", 50, work), plans.PLANS["amx"][-1]]
    for seconds in (50, 100, 100)[: len(told)]:
        assert not program.is_finished(plan, run.record.data["stages"])
        do(run, *plan, ends=clock.now + seconds, clock=clock)
        found.append(len(run.stage("goals")["calls"]))
    assert found == told and program.is_finished(plan, run.record.data["stages"])


@pytest.mark.parametrize("kernels, threads, apart", [
    ("amx_bf16", 2, False), ("amx_bf16", 4, True), ("avx512_bf16", 2, True), (None, 2, True),
])  # fmt: skip
def test_goals_are_met_by_other_kernels_or_more_threads(kernels, threads, apart, a_run, capsys):
    """As with VITFAST_CPU_ISA on a CPU that has AMX."""
    run = a_run()
    run.record.data["run"] |= {"threads": threads, "processor": {"kernels": kernels, "usable": ["amx_bf16"]}}
    goals.goals(run, plans.PLANS["amx"][-1], 5.0)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("None of these goals is met or missed here") is apart
    assert not apart or f"this is {kernels} with {threads}" in last


@pytest.mark.parametrize("name, value, met", [
    ("tflops", 4.0, True), ("tflops", 3.9, False), ("ms", 0.35, True), ("ms", 0.36, False),
])  # fmt: skip
def test_goal_of_a_part_is_held_to_the_wrong_side(name, value, met):
    shape = {"tokens": 197, "width": 384} if name == "tflops" else {"tokens": 197, "heads": 6}
    mine = {"ms": 1.0, "tflops": 1.0, "ours": True, "accepted": True} | {name: value}
    row = {
        "kind": "op", "name": "packed fc1" if name == "tflops" else "packed attention", "batch": 8, "dtype": "bf16",
        "shape": shape, "baseline": "oneDNN", "variants": {"vitfast": mine},
    }  # fmt: skip
    (line,) = [line for line in goals.lines([row]) if line.startswith("packed")]
    assert line.endswith("met" if met else "missed")
