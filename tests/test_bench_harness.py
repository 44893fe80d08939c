"""The harness: what may be timed, and what a row says of the rest."""

import json
import time
from dataclasses import replace

import pytest
import torch
from bench_cases import QuickCpu, layer_norm, make, on_device, plain_layer_norm, run, variant
from simulated_device import SimulatedDevice

from benchmarks.core import harness
from benchmarks.core.harness import run_case
from vitfast.check import compare
from vitfast.check.case import Variant


def test_a_wrong_result_of_ours_is_timed():
    calls = []

    def wrong(x, weight, bias):
        calls.append(len(x))
        out = layer_norm(x, weight, bias)
        out[1, 2] = 0
        return out

    row = run({"vitfast": variant(wrong, ours=True)})
    found = row["variants"]["vitfast"]
    assert calls == [4]
    assert not {"ms", "ratio", "tflops"} & found.keys()
    assert found["accepted"] is False and found["error_ratio"] > 100
    assert (
        "not accepted" in found["not_timed"]
        and "A: max error" in found["not_timed"]
        and "B: 1 of 20 rows" in (found["not_timed"])
    )
    assert row["variants"]["torch"]["ms"] > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_right_result_of_ours_is_refused(dtype):
    row = run({"vitfast": variant(plain_layer_norm, ours=True)}, dtype=dtype, width=256)
    found = row["variants"]["vitfast"]
    assert found["accepted"] and 0.2 < found["error_ratio"] < 2 and "not_timed" not in found
    assert found["ms_20"] <= found["ms"] <= found["ms_80"] and found["ratio"] > 0 and found["compile_s"] > 0
    assert found["within_noise"] in (True, False) and found["ours"]
    assert row["variants"]["torch"]["error_ratio"] == 1.0 and row["variants"]["torch"]["accepted"]
    assert row["rounds"] >= 6 and row["noise_25"] <= 1 <= row["noise_75"] and row["yardstick"] == "torch"
    json.dumps(row)


def test_an_inexact_rival_is_not_timed_or_not_marked():
    def inexact(x, weight, bias):
        return layer_norm(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).float()

    found = run({"rival": variant(inexact)})["variants"]["rival"]
    assert found["ms"] > 0 and found["accepted"] is False and found["error_ratio"] > 1000
    assert "C: rms error" in found["why_not_accepted"] and "not_timed" not in found


def test_what_computes_in_int8_is_held_to_the_rule_or_does_not_say_how_far_it_is_off():
    """Its own tolerance decides: one that exceeds it is marked, and no number is not within it."""

    def off_by(share):
        # of every number, up and down in turn
        return lambda *inputs: layer_norm(*inputs) * (1 + share * (-1) ** torch.arange(32))

    def no_number(*inputs):
        return layer_norm(*inputs) * torch.nan

    tolerance = 0.05
    functions = {"within": off_by(0.02), "beyond": off_by(0.08), "no number": no_number}
    row = run({name: variant(function, tolerance=tolerance) for name, function in functions.items()})
    within, beyond, no_number = (row["variants"][name] for name in functions)
    assert within["accepted"] and within["ms"] > 0 and "why_not_accepted" not in within
    assert abs(within["error"] - 0.02) < 1e-4 and 0.999 < within["cosine"] < 1 - 1e-5
    assert beyond["accepted"] is False and beyond["ms"] > 0 and "8.0% of the results'" in beyond["why_not_accepted"]
    assert no_number["accepted"] is False and no_number["why_not_accepted"]
    assert all(found["tolerance"] == tolerance and "error_ratio" not in found for found in (within, beyond))
    told = dict(harness.of_variants(row))
    assert ", 2.0% off" in told["within"] and "[not accepted]" in told["beyond"]
    assert "not accepted" not in told["within"] and "tolerance" not in row["variants"]["torch"]
    json.dumps(row)


def test_a_rival_is_blamed_for_the_dtype_of_its_results():
    def wide(x, weight, bias):
        return layer_norm(x.float(), weight.float(), bias.float())

    variants = run({"rival": variant(wide), "vitfast": variant(wide, ours=True)}, dtype="bf16", width=256)["variants"]
    assert variants["rival"]["accepted"] and variants["rival"]["ms"] > 0
    assert "dtype torch.float32, expected torch.bfloat16" in variants["vitfast"]["not_timed"]


def test_what_fails_or_is_absent_costs_the_row():
    def fails(*_):
        raise RuntimeError("first line\nsecond line")

    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    def build():
        raise ImportError("needs another version")

    row = run(
        {
            "fails": variant(fails), "too large": variant(too_large, ours=True), "cannot be built": Variant(build),
            "absent": variant(layer_norm, needs=("no_such_module", "json", "nor_such")),
            "nothing": variant(lambda *_: ()), "right": variant(layer_norm),
        }
    )  # fmt: skip
    found = row["variants"]
    assert found["fails"]["not_timed"] == "RuntimeError: first line"
    assert found["too large"]["not_timed"].startswith("out of memory: OutOfMemoryError: CUDA out of memory.")
    assert found["cannot be built"]["not_timed"] == "ImportError: needs another version"
    assert found["absent"] == {"ours": False, "absent": "no_such_module and nor_such are not installed"}
    assert found["nothing"]["not_timed"] == "ValueError: results must be 1, got 0"
    assert found["right"]["ms"] > 0 and found["right"]["ratio"] > 0


def test_one_that_fails_while_it_is_timed_costs_the_others_their_times():
    calls = []

    def tires(*inputs):
        calls.append(1)
        if len(calls) > 5:
            raise torch.OutOfMemoryError("no more")
        return layer_norm(*inputs)

    found = run({"tires": variant(tires), "right": variant(layer_norm)})["variants"]
    assert found["tires"]["not_timed"].startswith("out of memory") and "ms" not in found["tires"]
    assert found["right"]["ratio"] > 0


def test_one_that_changes_its_inputs_makes_the_others_wrong():
    def in_place(x, weight, bias):
        return x.copy_(layer_norm(x, weight, bias))

    found = run({"in place": variant(in_place), "vitfast": variant(plain_layer_norm, ours=True)})["variants"]
    assert found["in place"]["not_timed"] == "it changes its inputs"
    assert found["vitfast"]["accepted"] and found["vitfast"]["ms"] > 0


def test_without_a_baseline_nothing_is_timed():
    def fails(*_):
        raise RuntimeError("no baseline")

    rivals = {"rival": variant(layer_norm), "yardstick": variant(layer_norm)}
    row = run_case(replace(make({"base": variant(fails), **rivals}), baseline="base"), seconds=0.01, place=QuickCpu())
    assert row["variants"]["rival"]["ms"] > 0 and "ratio" not in row["variants"]["rival"] and row["noise"] is None


@pytest.mark.parametrize("part", ["yardstick", "reference"])
def test_what_nobody_can_judge_is_taken_for_right(part):
    def fails(*_):
        raise RuntimeError("it cannot")

    options = {"reference": fails} if part == "reference" else {}
    variants = {"ours": variant(layer_norm, ours=True), "rival": variant(layer_norm), "fails": variant(fails)}
    case = make(variants, **options)
    if part == "yardstick":
        case = replace(case, yardstick="fails")
    found = run_case(case, seconds=0.01, place=QuickCpu())["variants"]
    assert found["ours"]["not_timed"] == f"the {part} failed: RuntimeError: it cannot"
    assert found["rival"]["ms"] > 0 and found["rival"]["accepted"] is None and found["rival"]["error_ratio"] is None


def test_inputs_that_cannot_be_made_cost_the_run():
    def fails(generator):
        raise torch.OutOfMemoryError("inputs do not fit")

    row = run({"absent": variant(layer_norm, needs=("no_such_module",))}, inputs=fails)
    assert "inputs do not fit" in row["variants"]["torch"]["not_timed"] and "absent" in row["variants"]["absent"]
    cannot_be_cut = run({}, cut=lambda tensors, n: 1 / 0)["variants"]["torch"]
    assert cannot_be_cut["not_timed"] == "ZeroDivisionError: division by zero"


def test_reading_the_device_s_state_costs_the_times():
    place = SimulatedDevice()
    place.state_under = lambda call, ms: 1 / 0
    row = run_case(make({"torch": on_device(place, 1e-6, 1e-4)}), seconds=0.01, place=place)
    assert row["variants"]["torch"]["ms"] == pytest.approx(0.1, rel=0.05) and row["after"] is None


def test_memory_that_cannot_be_measured_costs_the_row():
    place = SimulatedDevice()
    place.peak_mib = lambda call: 1 / 0
    case = make({"torch": on_device(place, 1e-6, 1e-4)}, mode="training", kind="model")
    assert "ZeroDivisionError" in run_case(case, seconds=0.01, place=place)["variants"]["torch"]["not_timed"]


def test_images_past_the_first_are_judged_or_the_batch_is_cut_for_no_reason():
    batches = []

    def counted(x, weight, bias):
        batches.append(len(x))
        return layer_norm(x, weight, bias)

    def reference(x, weight, bias):
        assert len(x) == 2 and x.dtype == torch.float64
        return layer_norm(x, weight, bias)

    row = run({"vitfast": variant(counted, ours=True)}, batch=6, check_images=2, reference=reference)
    assert row["variants"]["vitfast"]["accepted"] and set(batches) == {6}


def test_a_sum_over_all_images_is_judged_by_the_first_of_them():
    """The gradient of a weight depends on all images, the truth is computed on few: those have to be the same ones."""
    batches = []

    def both(x, weight, bias):
        batches.append(len(x))
        return x * weight, (x * bias).sum((0, 1))

    def off(x, weight, bias):
        return x * weight, (x * bias).sum((0, 1)) * (1.01 if len(x) == 2 else 1)

    case = make(
        {"torch": variant(both), "vitfast": variant(both, ours=True), "off": variant(off, ours=True)}, batch=6,
        check_images=2, reference=both, per_image=(True, False), mode="forward+backward",
    )  # fmt: skip
    found = run_case(case, seconds=0.01, place=QuickCpu())["variants"]
    assert found["vitfast"]["accepted"] and found["vitfast"]["ms"] > 0
    assert "result 1" in found["off"]["not_timed"]
    assert batches[:3] == [2, 6, 2] and set(batches[4:]) == {6, 2} and batches.count(2) == 3


def test_a_model_is_held_to_the_rule_for_ops():
    """One image of many may be further off by luck; rule B for ops does not allow that."""

    def unlucky(x, weight, bias):
        out = layer_norm(x, weight, bias)
        truth = layer_norm(*(t[0].double() if t is x else t.double() for t in (x, weight, bias)))
        out[0] = truth + 6 * (out[0] - truth)
        return out

    case = make({"vitfast": variant(unlucky, ours=True)}, batch=128, check_images=128, width=64)
    as_op, as_model = (
        run_case(each, seconds=0.01, place=QuickCpu())["variants"]["vitfast"]
        for each in (case, replace(case, kind="model", mode="inference"))
    )
    assert "B: " in as_op["not_timed"] and as_model["accepted"] and as_model["ms"] > 0
    wrong = {"vitfast": variant(lambda *i: layer_norm(*i) * 1.001, ours=True)}
    assert "relative rms error" in run(wrong, kind="model")["variants"]["vitfast"]["not_timed"]


def test_of_several_results_of_a_model_only_one_is_judged():
    def both(*inputs):
        return layer_norm(*inputs), layer_norm(*inputs) * 2

    def off(*inputs):
        return layer_norm(*inputs), layer_norm(*inputs) * 2.01

    variants = {"torch": variant(both), "vitfast": variant(both, ours=True), "off": variant(off, ours=True)}
    found = run(variants, kind="model", mode="training", reference=both, per_image=(True, True))["variants"]
    assert found["vitfast"]["accepted"] and "1: rms error" in found["off"]["not_timed"]


def test_a_result_that_the_next_call_overwrites_is_judged_too_late():
    out = torch.empty(4, 5, 32)

    def reused(x, weight, bias):
        return out.copy_(layer_norm(x, weight, bias))

    case = make({"torch": variant(reused), "vitfast": variant(plain_layer_norm, ours=True)})
    case = replace(case, variants={**case.variants, "wrong": variant(lambda *i: reused(*i).mul_(1.01), ours=True)})
    found = run_case(case, seconds=0.01, place=QuickCpu())["variants"]
    assert found["vitfast"]["accepted"] and found["wrong"]["error_ratio"] > 100


def test_time_goes_on_being_spent_after_the_deadline(monkeypatch):
    monkeypatch.setattr(compare, "TOOK_S", {})
    built, place = [], QuickCpu()
    # hours that nobody waits for, beside which a busy machine's seconds are nothing
    place.clock = lambda: time.perf_counter() + 7200 * len(built)

    def slow(name):
        def build():
            built.append(name)
            return layer_norm

        return Variant(build, ours=name == "vitfast")

    case = make({"torch": slow("torch"), "vitfast": slow("vitfast"), "apart": Variant(lambda: layer_norm, apart=100.0)})
    row = run_case(case, seconds=0.01, deadline=place.clock() + 3600, place=place)
    assert built == ["torch"] and row["variants"]["torch"]["ms"] > 0
    assert row["variants"]["vitfast"]["not_timed"] == row["variants"]["apart"]["not_timed"] == harness.NO_TIME_LEFT


def test_a_part_of_a_case_is_judged_or_counts_as_a_rival():
    """Another result than the case's, and another number of them."""
    found = run({"product": variant(lambda x, weight, bias: (x + 1, x), part=True)})["variants"]["product"]
    assert found["ms"] > 0 and found["part"] and "accepted" not in found and "why_not_accepted" not in found
