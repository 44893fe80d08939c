"""Benchmarks of `vitfast.patch`: what a row compares, which rows there are, and what the table says of them."""

import json
import random
from collections import Counter

import fake_record
import pytest
import torch
from bench_cases import QuickCpu

import vitfast
from benchmarks import __main__ as program
from benchmarks.core import harness, models, patched, record, rivals
from benchmarks.gpu import plans
from benchmarks.report import __main__ as make_report
from benchmarks.report import rows as report_rows
from benchmarks.report.tables import TABLES
from vitfast.patching.report import PatchReport

TINY = {"image_size": 32, "depth": 2, "size": "Ti"}
EMPTY = PatchReport([])


def case_of(family="timm", batch=2, **how):
    return patched.patched(family=family, batch=batch, **{"dtype": "fp32", **TINY, **how})


def run(case):
    return harness.run_case(case, seconds=0.01, place=QuickCpu())


def relative(out, ref):
    return ((out.double() - ref).norm() / ref.norm()).item()


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("family", patched.FAMILIES)
def test_unpatched_or_patched_is_another_model(family, mode):
    case = case_of(family, mode=mode)
    given = case.inputs(torch.Generator().manual_seed(0))
    truth = case.reference(*(t.double() if t.is_floating_point() else t for t in given))
    truth = truth if isinstance(truth, tuple) else (truth,)
    timed = [patched.UNPATCHED] + [patched.PATCHED] * bool(case.notes["fused"])
    assert len(truth) == len(case.per_image) == (4 if mode == "training" else 1)
    for name in timed:
        function = case.variants[name].build()
        # twice: a step leaves nothing behind
        for _ in range(2):
            results = function(*given)
            for out, ref in zip(results if isinstance(results, tuple) else (results,), truth, strict=True):
                assert out.shape == ref.shape and relative(out, ref) < 1e-5, name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_unpatched_is_patched_or_patched_is_not(dtype, monkeypatch):
    """Then the row compares a model with itself."""
    built = []
    monkeypatch.setattr(patched.Setting, "eager", lambda self, network: built.append(network))
    case = case_of(dtype=dtype)
    for name in (patched.UNPATCHED, patched.PATCHED):
        case.variants[name].build()
    found = [[each for each in network.module.modules() if "_vitfast" in each.__dict__] for network in built]
    assert not found[0] and len(found[1]) >= TINY["depth"]
    assert list(case.variants) == [patched.UNPATCHED, patched.PATCHED]
    assert case.baseline == case.yardstick == patched.UNPATCHED


def test_fused_parts_are_not_told_or_those_of_no_device_are_others():
    notes = case_of().notes
    whole = vitfast.patch(patched.Model("timm", **TINY).network().module)
    assert notes["fused"] == Counter(part.kind for part in whole.fused)
    assert notes["fused"]["attention"] == notes["fused"]["mlp"] == TINY["depth"]
    assert notes["family"] == "timm" and notes["model"] == "ViT-Ti/16" and notes["split"] == "whole"


@pytest.fixture
def nothing_fused(monkeypatch):
    """A library of which vitfast knows no block."""
    monkeypatch.setattr(vitfast, "patch", lambda model, **parts: EMPTY)
    patched.found_in.cache_clear()
    yield
    patched.found_in.cache_clear()


def test_model_in_which_nothing_is_fused_gets_a_speed_or_fails_the_run(nothing_fused, tmp_path):
    kept = record.Record(tmp_path / "rows.json", fake_record.run(gpu=False))
    case = case_of()
    assert harness.run_cases([case], kept, budget_s=60, stage="s", seconds=0.01, place=QuickCpu()) == []
    (row,) = kept.rows
    assert row["variants"]["unpatched"]["ms"] > 0 and row["notes"]["fused"] == {}
    assert "ms" not in row["variants"]["patched"]
    assert "nothing is fused: it has no block that vitfast knows" in harness.summary(row)


def test_wrong_patched_model_is_timed(monkeypatch):
    real = vitfast.patch

    def wrong(model, **parts):
        model.register_forward_hook(lambda module, given, out: out * 1.01)
        return real(model, **parts)

    monkeypatch.setattr(vitfast, "patch", wrong)
    found = run(case_of(batch=8))["variants"]["patched"]
    assert "ms" not in found and found["accepted"] is False


@pytest.mark.parametrize("split", ["alone", "without"])
def test_part_is_fused_with_others(split, monkeypatch):
    """Or left out with others."""
    asked, real = [], vitfast.patch
    monkeypatch.setattr(vitfast, "patch", lambda model, **parts: asked.append(parts) or real(model, **parts))
    case = case_of(split=split)
    del asked[:]
    names = [f"{part} alone" if split == "alone" else f"without {part}" for part in patched.PARTS]
    assert list(case.variants) == ["unpatched", "patched", *names]
    for name, variant in case.variants.items():
        # nothing to fuse where that part is all
        try:
            variant.build()
        except NotImplementedError as why:
            assert split == "alone" and "nothing is fused" in str(why), name
    assert asked[0] == dict.fromkeys(patched.PARTS, True)
    for part, parts in zip(patched.PARTS, asked[1:], strict=True):
        assert parts == {each: (each == part) is (split == "alone") for each in patched.PARTS}


def test_rows_of_parts_displace_those_of_the_whole():
    assert len({case_of(split=split).key for split in patched.SPLITS}) == len(patched.SPLITS)


def test_usual_row_is_left_out_or_one_that_takes_minutes_is_not():
    told = [make.keywords for make in patched.listed(device="cpu", dtypes=["fp32", "bf16"])]
    counts = Counter((each["family"], each["size"], each["mode"], each["batch"]) for each in told)
    assert set(counts.values()) == {2}
    small = {(family, "S", mode, batch) for family in patched.FAMILIES for mode in patched.MODES for batch in (1, 8)}
    base = {(family, "B", mode, batch) for family in ("timm", "hugging-face")
            for mode, batch in (("inference", 1), ("inference", 8), ("training", 1))}  # fmt: skip
    assert counts.keys() == small | base
    asked = patched.listed(["timm"], device="cpu", dtypes=["fp32"], modes=["training"], sizes=["B"])
    assert [each.keywords["batch"] for each in asked] == [1, 8]


def test_truth_is_computed_for_each_library(monkeypatch):
    """Of the same architecture, images and weights it is the same, and takes longer than all else."""
    models._TRUTHS.clear()
    made, real = [], patched.Setting.exact
    monkeypatch.setattr(patched.Setting, "exact", lambda *a: made.append(a) or real(*a))
    families = ("timm", "hugging-face", "torchvision")
    found = []
    for family in families:
        for dtype in ("fp32", "bf16"):
            case = case_of(family, dtype=dtype)
            found.append(case.reference(*(t.double() for t in case.inputs(torch.Generator().manual_seed(0)))))
    assert len(made) == 1 and all(torch.equal(found[0], each) for each in found)
    case = case_of("vit-pytorch")
    other = case.reference(*(t.double() for t in case.inputs(torch.Generator().manual_seed(0))))
    assert not torch.equal(other, found[0])


def test_plan_leaves_out_a_library_or_a_batch():
    """Of each a row on a GPU, unpatched and patched, in both modes at the batches of the other models."""
    stages = [stage for stage in plans.PLANS["patched"] if stage.makers]
    told = [make.keywords for stage in stages for make in stage.makers(Run("cuda"))]
    assert {(each["family"], each["mode"], each["batch"]) for each in told} == {
        (family, mode, batch) for family in patched.FAMILIES for mode in patched.MODES for batch in plans.BATCHES
    }
    assert {(each["size"], each["dtype"], each["device"]) for each in told} == {("S", "bf16", "cuda")}
    on_cpu = [stage for stage in plans.PLANS["cpu"] if stage.name.startswith("patched")]
    told = [make.keywords for stage in on_cpu for make in stage.makers(Run("cpu"))]
    usual = [make.keywords for make in patched.listed(device="cpu", dtypes=["bf16", "fp32"])]
    assert sorted(map(str, told)) == sorted(map(str, usual))


class Run:
    tiny = False

    def __init__(self, device):
        self.device = torch.device(device)


# the command


def test_command_times_another_library_or_says_nothing_of_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness.devices, "of", lambda device: QuickCpu())
    file = tmp_path / "rows.json"
    given = ["patch", "timm", "--device", "cpu", "--sizes", "Ti", "--image-size", "32", "--batches", "1"]
    given += ["--modes", "inference", "--seconds", "0", "--ceilings", "0", "--out", str(file)]
    assert program.main(given) == 0
    out = capsys.readouterr().out
    assert "patched model/timm/inference" in out and "  unpatched" in out and "  patched" in out
    (row,) = json.loads(file.read_text())["rows"]
    assert row["variants"]["patched"]["ms"] > 0 and row["dtype"] == "fp32" and row["batch"] == 1


# the table


def a_row(fused=("attention", "norm", "mlp"), family="timm", change=lambda variants: None, dim=384, **more):
    done = fake_record.work.Work(10**10, 10**8)
    row = fake_record.row(
        random.Random(0), patched.KIND, family, more.pop("mode", "inference"), {"size": 224, "dim": dim}, 1, done,
        ("unpatched", "patched"), 50.0, dtype=more.pop("dtype", "bf16"),
    )  # fmt: skip
    row["variants"]["patched"] |= {"ratio": 1.25, "ratio_25": 1.24, "ratio_75": 1.26, "within_noise": False}
    change(row["variants"])
    left = {"patch_embed": "dynamic | sizes"}
    notes = {"family": family, "model": "ViT-S/16", "split": "whole", "fused": dict.fromkeys(fused, 12), "left": left}
    row["notes"] = notes | more.pop("notes", {})
    # as a case makes it
    row["key"] += row["notes"]["split"]
    return row | more


def lines_of(folder, *rows, table="patched"):
    fake_record.write(folder / "run.json", rows, fake_record.run("Some CPU", gpu=False))
    (device,) = report_rows.load(folder)
    text = TABLES[table](device)
    return text, [line for line in (text or "").splitlines() if line.startswith("|")][2:]


def test_ceilings_of_a_run_of_patched_models_stand_beside_other_rows(tmp_path):
    """Models then seem to pass the ceiling of an hour in which the clock was lower."""
    cpu = lambda date: fake_record.run("Some CPU", gpu=False) | {"date": date}  # noqa: E731
    ours, theirs = fake_record.ceilings(), fake_record.ceilings()
    theirs["copy"]["gbps"] = 1.0
    model = a_row() | {"kind": "op"}
    fake_record.write(tmp_path / "ops.json", [model], cpu("2026-01-01T00:00:00"), ours)
    fake_record.write(tmp_path / "patched.json", [a_row()], cpu("2026-01-02T00:00:00"), theirs)
    (device,) = report_rows.load(tmp_path)
    assert device.ceilings["copy"] == ours["copy"]
    (tmp_path / "ops.json").unlink()
    (device,) = report_rows.load(tmp_path)
    assert device.ceilings["copy"] == theirs["copy"]


def test_line_hides_what_is_fused_a_time_or_the_noise(tmp_path):
    text, (line,) = lines_of(tmp_path, a_row())
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:6] == ["timm", "ViT-S/16", "inference", "1", "bf16", "attention, norm, mlp [1]"]
    assert float(cells[6]) > float(cells[7]) > 0
    assert cells[8:] == ["1.25×", "1.24 to 1.26", "0.99 to 1.00"]
    assert "\\[1\\] left: patch_embed: dynamic / sizes" in text


def test_difference_within_noise_reads_as_a_speed_up(tmp_path):
    _, (line,) = lines_of(tmp_path, a_row(change=lambda v: v["patched"].update(within_noise=True)))
    assert "| ≈ |" in line and "×" not in line


def test_model_in_which_nothing_is_fused_reads_as_faster(tmp_path):
    """Even if a file had a time."""
    absent = {"ours": True, "absent": "NotImplementedError: nothing is fused: it has no block"}
    for change in (lambda v: v.update(patched=absent), lambda v: None):
        text, lines = lines_of(tmp_path, a_row(), a_row((), "torchvision", change))
        assert "1.25×" in lines[0] and "| nothing [1] |" in lines[1]
        assert lines[1].count("×") == 0 and lines[1].split("|")[8].strip() == "-"


def test_wrong_patched_model_reads_as_faster(tmp_path):
    wrong = {"ours": True, "accepted": False, "not_timed": "rms error 9 times"}
    text, (line,) = lines_of(tmp_path, a_row(change=lambda v: v.update(patched=wrong)))
    assert "not timed [2]" in line and "×" not in line and "\\[2\\] rms error 9 times" in text


def test_lines_are_out_of_order_or_those_of_parts_among_them(tmp_path):
    """By library, size, mode, batch and dtype, whatever the order of the record."""
    rows = [
        a_row(), a_row(family="torchvision"), a_row(dtype="fp32"), a_row(mode="training"),
        a_row(dim=768, notes={"model": "ViT-B/16"}), a_row(notes={"split": "alone"}),
    ]  # fmt: skip
    for row in rows:
        row["key"] += f"{row['shape']['dim']}"
    _, lines = lines_of(tmp_path, *rows)
    assert [[cell.strip() for cell in line.split("|")[1:6]] for line in lines] == [
        ["timm", "ViT-S/16", "inference", "1", "bf16"], ["timm", "ViT-S/16", "inference", "1", "fp32"],
        ["timm", "ViT-S/16", "training", "1", "bf16"], ["timm", "ViT-B/16", "inference", "1", "bf16"],
        ["torchvision", "ViT-S/16", "inference", "1", "bf16"],
    ]  # fmt: skip


def test_patched_model_stands_among_vitfast_s_own(tmp_path):
    """In a table or picture of models, where its baseline is a rival."""
    rows = [a_row(), a_row(mode="training")]
    for table in TABLES:
        text, _ = lines_of(tmp_path, *rows, table=table)
        assert (text is None) is (table != "patched"), table
    (device,) = report_rows.load(tmp_path)
    assert not any(make(device) for makes in make_report.PICTURES.values() for make in makes)


def test_weights_of_two_libraries_differ():
    """The same numbers under other names: then they have the same logits and one truth."""
    families = ("timm", "hugging-face", "torchvision")
    found = [patched.Model(family, **TINY).network().module.state_dict().values() for family in families]
    assert len({round(sum(each.double().abs().sum().item() for each in weights), 3) for weights in found}) == 1
    assert patched.Model("timm", **TINY).meta().config == patched.Model("torchvision", **TINY).meta().config
    assert rivals.is_plain(patched.Model("timm", **TINY).meta().config)
