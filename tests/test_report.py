"""Tables and pictures of README and docs: from the files and nothing else, and what a reader could be misled by."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import fake_record
import pytest
from PIL import Image

from benchmarks.core import work
from benchmarks.report import __main__ as make_report
from benchmarks.report import pictures as report_pictures
from benchmarks.report import records as report_records
from benchmarks.report import rows as report_rows
from benchmarks.report.__main__ import KINDS, NOT_MEASURED
from benchmarks.report.tables import TABLES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
NAMES = [f"{kind} {table}" for kind in KINDS for table in TABLES]
DONE = work.Work(10**12, 10**9)


@pytest.fixture
def site(tmp_path):
    """A page with all blocks, and an empty folder of results."""
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text("no block\n")
    (tmp_path / "docs").mkdir()
    blocks = [f"before {name}\n<!-- report: {name} -->\nold\n<!-- end -->\nafter {name}\n" for name in NAMES]
    (tmp_path / "docs/numbers.md").write_text("".join(blocks))
    return tmp_path


def report(site):
    return make_report.main(site, site / "results")


def blocks(site):
    """What the page would have in each block; no picture is drawn for it."""
    text = make_report.filled(site, site / "results")[0][site / "docs/numbers.md"]
    return {name: body.strip() for _, name, body, _ in make_report.BLOCK.findall(text)}


def one_row(site, change=lambda variants: None, names=("timm", "vitfast", "torchvision"), **more):
    row = fake_record.row(
        random.Random(0), "model", "vit_base_patch16_224", "inference", {"size": 224, "dim": 768}, 64, DONE, names, 4.0
    )
    change(row["variants"])
    fake_record.write(site / "results" / "run.json", [row | more])
    return row


def test_files_of_other_plans_cost_the_report(site):
    """What the sweep writes has no rows of cases, and what tests leave has none at all."""
    one_row(site)
    (site / "results" / "some-gpu-tune.json").write_text(json.dumps({"schema": 1, "rows": {"fc1": {}}, "machine": {}}))
    run = json.loads((site / "results" / "run.json").read_text())
    others = run | {"rows": [], "stages": {"kernels": {"done": True}}, "lost": {}}
    (site / "results" / "some-gpu-tests.json").write_text(json.dumps(others))
    assert blocks(site)["gpu throughput"] != NOT_MEASURED


def test_what_ran_on_a_gpu_is_left_out_or_made_up(site):
    """Tests, calls of ops and models; of a CPU nothing; and one sentence where there is no GPU's record."""
    results = site / "results"
    assert report_records.records(results) == report_records.NOTHING
    one_row(site)
    run = json.loads((results / "run.json").read_text())
    cpu = run | {"run": run["run"] | {"device_type": "cpu"}}
    (results / "cpu.json").write_text(json.dumps(cpu))
    outcome = {"passed": ["a", "b"], "failed": {"c": {}}, "not_run": 4}
    tests = run | {"rows": [], "stages": {"kernels": {"tests": outcome}, "ops": {"tests": outcome | {"not_run": 0}}}}
    (results / "some-gpu-tests.json").write_text(json.dumps(tests))
    sweep = {"machine": run["run"], "rows": {"fc1": {"variants": {"stock": {}, "ours": {}}}}}
    (results / "some-gpu-tune.json").write_text(json.dumps(sweep))
    lines = report_records.records(results).splitlines()[2:]
    assert len(lines) == 3 and all(run["run"]["device"] in line and run["run"]["commit"] in line for line in lines)
    told = "".join(lines)
    for words in ("1 rows of models", "tests: 4 passed, 2 failed, 4 not run", "1 calls of ops, 2 ways"):
        assert words in told


def test_a_block_without_a_file_says_anything_but_that_it_was_not_measured(site):
    assert report(site) == 0
    # of GPUs once, in a block of their own
    assert blocks(site) == {name: "" if name.startswith("gpu") else NOT_MEASURED for name in NAMES}
    text = (site / "docs/numbers.md").read_text()
    assert all(f"before {name}\n" in text and f"after {name}\n" in text for name in NAMES)
    assert not list((site / "results").iterdir())


def test_a_table_or_picture_of_one_device_shows_another_or_does_not_say_which(site):
    fake_record.everything(site / "results")
    found, pictures = blocks(site), make_report.filled(site, site / "results")[1].keys()
    for name, body in found.items():
        if name in (
            "cpu ops", "cpu all ops", "cpu ceilings", "cpu host", "gpu host", "gpu patch", "gpu growth", "gpu gelu",
        ):  # fmt: skip
            assert body == NOT_MEASURED
            continue
        gpu = name.startswith("gpu")
        for caption in re.findall(r"^\*\*(.*?)\*\*", body, re.MULTILINE):
            assert caption.startswith("NVIDIA H200" if gpu else "Some CPU (AVX-512), 2 threads")
            assert "commit abc1234, 2026-11-20" in caption
        assert "**" in body and ("Some CPU" in body) is not gpu and ("H200" in body) is gpu
    named = set(re.findall(r"\(\.\./results/(report_\w+\.png)\)", "".join(found.values())))
    # memory is measured on the GPU only in earnest, but these records have it for both
    assert named == pictures and len(named) == 13


def test_a_table_of_bench_cpu_shows_another_number(site):
    """A quartile for the median, the time of a batch for that of an image, or the rival's for ours."""
    fake_record.everything(site / "results")
    found = blocks(site)
    lines = {name: found[f"cpu {name}"].splitlines()[-1] for name in ("patch", "growth", "gelu")}
    model = "vit_small_patch16_224"
    assert lines["patch"] == f"| {model} | 8 | bf16 | 16.0 | 8.00 (2.10×) | 4.00 (4.10×) |"
    both = "2.00 ms, 4.60 TFLOP/s, 7 MiB | 1.00 ms, 9.20 TFLOP/s, 7 MiB (2.00×)"
    assert lines["growth"] == f"| {model} | bf16 | 8 | 4097 | {both} |"
    assert lines["gelu"] == "| MLP | [8, 729, 3072] | bf16 | 16.0 | 8.00 (2.00×) |"
    assert all("up to 1.0%" in found[f"cpu {name}"] for name in lines)


def test_a_wrong_result_of_bench_cpu_passes_for_a_time(site):
    parts = fake_record.parts()
    parts["gelu"][0]["variants"]["vitfast"] = {"error": 9.0, "not_timed": "differs from timm's result"}
    (site / "results" / "cpu-parts.json").write_text(json.dumps(parts))
    body = blocks(site)["cpu gelu"]
    assert "| 16.0 | not timed [1] |" in body and "\\[1\\] differs from timm's result" in body


def test_a_table_of_gpu_rows_loses_a_model_a_rival_or_a_number(site):
    fake_record.everything(site / "results")
    found = blocks(site)
    record = json.loads((site / "results" / "h200_b.json").read_text())
    for row in record["rows"]:
        if row["kind"] != "model":
            continue
        table = "training" if row["mode"] == "training" else "latency" if row["batch"] == 1 else "throughput"
        for name, variant in row["variants"].items():
            if name not in ("timm", "vitfast") or " " not in row["name"]:
                ms, rate = variant["ms"], row["batch"] * 1e3 / variant["ms"]
                assert (report_rows.number(ms) if table == "latency" else f"{rate:,.0f}") in found[f"gpu {table}"]
                assert name in found[f"gpu {table}"]
    columns = ("model", "batch", "dtype", "vitfast", "vitfast prepared", "timm", "torchvision", "Hugging Face")
    assert f"| {' | '.join(columns)} | timm compiled |" in found["gpu throughput"]
    # a network with other rivals gets a table of its own, without columns of dashes
    assert "| model | batch | dtype | timm | timm channels_last | timm compiled |" in found["gpu throughput"]
    assert "| model | batch | dtype | vitfast | vit-pytorch |" in found["gpu throughput"]
    assert "| vit-pytorch, dim 768 at 224 | 64 |" in found["gpu throughput"]
    assert "790 (806)" in found["gpu ceilings"] and "| width 192 | width 768 |" in found["gpu ceilings"]


REPORT_TWICE = """
import hashlib, sys
from pathlib import Path

sys.path[:0] = ["tests"]
import fake_record
from benchmarks.report import __main__ as make_report
from benchmarks.report.tables import TABLES

site = Path(sys.argv[1])
(site / "results").mkdir()
fake_record.everything(site / "results")
blocks = (f"<!-- report: gpu {table} -->\\n<!-- end -->\\n" for table in TABLES)
(site / "README.md").write_text("".join(blocks))
make_report.main(site, site / "results")
for path in [site / "README.md", *sorted((site / "results").glob("*.png"))]:
    print(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.full
def test_the_same_files_give_other_bytes(tmp_path):
    def run(seed):
        (tmp_path / seed).mkdir()
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", REPORT_TWICE, tmp_path / seed], capture_output=True, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run("1")
    assert first.count(".png") == 7 and first == run("2")


def test_an_unknown_schema_or_a_broken_file_is_read(site, capsys):
    before = (site / "docs/numbers.md").read_bytes()
    for text, said in (
        ('{"schema": 2, "run": {}, "rows": []}', "schema 2"), ('{"schema": 1, "ro', "cut short"),
        ('{"rows": [{"timm_ms": 1.0}], "rivals": []}', "schema 'none'"),
    ):  # fmt: skip
        (site / "results" / "new.json").write_text(text)
        assert report(site) == 1
        error = capsys.readouterr().err
        assert "new.json" in error and said in error
    assert (site / "docs/numbers.md").read_bytes() == before


def test_ours_that_was_not_accepted_shows_a_time_or_no_reason(site):
    red = {"ours": True, "accepted": False, "not_timed": "rms error | 9 times\nmore"}
    one_row(site, lambda v: v.update(vitfast=red))
    body = blocks(site)["gpu throughput"]
    line = next(line for line in body.splitlines() if line.startswith("| vit_base"))
    assert line.split(" | ")[3] == "not timed [1]" and line.count("|") == 7
    assert "\\[1\\] rms error / 9 times more" in body
    # even if a file had a time
    one_row(site, lambda v: v["vitfast"].update(accepted=False, why_not_accepted="wrong"))
    body = blocks(site)["gpu throughput"]
    assert "| not timed [1] |" in body and "\\[1\\] wrong" in body
    (gpu,) = report_rows.load(site / "results")
    assert report_rows.ours(gpu.rows[0]) is None
    (bar,) = [mark for marks in report_pictures.rivals(gpu).panels.values() for mark in marks if mark.mine]
    assert bar.said == "not timed" and bar.x == (0.0,)


def test_a_rival_outside_the_rule_is_not_marked(site):
    one_row(site, lambda v: v["torchvision"].update(accepted=False, error_ratio=3.42))
    body = blocks(site)["gpu throughput"]
    assert re.search(r"\d \(\S+\) \[1\] \|$", body, re.MULTILINE)
    assert "outside the acceptance rule: 3.4 times the yardstick's error" in body


def test_a_rival_in_int8_is_one_to_be_ahead_of_or_hides_its_error(site):
    """The fastest of a row, with an error that the others have not: in no comparison, no picture, and marked."""

    def in_int8(variants):
        for name, error in (("OpenVINO int8", 0.021), ("ONNX Runtime int8", 0.3)):
            more = {"tolerance": 0.05, "error": error, "cosine": 0.999, "accepted": error < 0.05, "ms": 1.0}
            variants[name] = variants["torchvision"] | more
            del variants[name]["error_ratio"]

    row = one_row(site, in_int8)
    assert report_rows.rival(row) in ("timm", "torchvision")
    found = blocks(site)
    (text,) = (found[name] for name in ("gpu throughput",))
    assert ", 2.1% off" in text and ", 30.0% off [" in text and "more than the 5% that int8 may be off" in text
    assert "times the yardstick's error" not in text and "in no ratio to the fastest other" in text
    assert "int8" not in found["gpu flops"] and "int8" not in found["gpu summary"]
    (device,) = report_rows.load(site / "results")
    marks = [mark.name for panel in report_pictures.rivals(device).panels.values() for mark in panel]
    assert "torchvision" in marks and not any("int8" in name for name in marks)
    one_row(site)
    assert "off" not in blocks(site)["gpu throughput"]


@pytest.mark.parametrize("within, shown", [(True, "(≈)"), (False, "(1.01×)")])
def test_a_difference_within_noise_reads_as_one(within, shown, site):
    one_row(site, lambda v: v["vitfast"].update(within_noise=within, ratio=1.0123))
    body = blocks(site)["gpu throughput"]
    assert shown in body and "differs from itself by up to 0.5%" in body
    assert ("1.01" in body) is not within


def test_the_product_alone_is_a_rival_or_not_set_against_ours(site):
    done = fake_record.work.linear(64 * 197, 768, 768, "bf16")
    shape, names = {"tokens": 197, "width": 768}, ("F.linear", "vitfast", "product")
    row = fake_record.row(random.Random(0), "op", "linear proj", "forward", shape, 64, done, names, 1.0)
    for name, ms in zip(names, (1.0, 0.5, 0.4), strict=True):
        row["variants"][name]["ms"] = ms
    row["variants"]["product"]["part"] = True
    fake_record.write(site / "results" / "run.json", [row])
    (line,) = [line for line in blocks(site)["gpu ops"].splitlines() if line.startswith("| linear proj")]
    cells = line.split(" | ")
    assert cells[7] == "F.linear" and cells[-1] == "80 % |"


def test_a_rival_looks_slow_for_what_a_graph_made_it_run():
    """One row shows that its replays are not its calls, and then none of its replays is shown."""
    replayed = {"graph": True, "ms": 30.0, "wall_ms": 10.0}
    shown = {"slow": replayed | {"ms": 9.0}, "called": replayed | {"graph": False}, "other": replayed | {"ms": 11.0}}
    first, second = report_rows.fair([{"variants": {"slow": replayed, "called": replayed}}, {"variants": shown}])
    for row, name in ((first, "slow"), (first, "called"), (second, "slow")):
        assert not report_rows.timed(row["variants"][name]) and "other operators" in row["variants"][name]["not_timed"]
    assert second["variants"]["called"] == shown["called"] and second["variants"]["other"] == shown["other"]


def test_absent_and_failed_rivals_are_not_told_apart(site):
    absent, failed = {"ours": False, "absent": "it is not installed"}, {"ours": False, "not_timed": "out of memory"}
    row = one_row(site)
    other = row | {"key": "other", "batch": 8, "variants": dict(row["variants"])}
    other["work"] = {"flops": DONE.flops // 8, "bytes": DONE.bytes // 8}
    row["variants"] |= {"torchvision": absent, "Hugging Face": absent, "timm compiled": failed}
    other["variants"]["Hugging Face"] = absent
    fake_record.write(site / "results" / "run.json", [row, other])
    body = blocks(site)["gpu throughput"]
    lines = [line.split(" | ") for line in body.splitlines() if line.startswith("| vit_base")]
    # 8 images, then 64; the columns are those of what somebody has
    assert [line[5] == "absent" for line in lines] == [False, True]
    assert [line[6] for line in lines] == ["- |", "not timed [1] |"]
    assert "Absent there: Hugging Face." in body and "\\[1\\] out of memory" in body


def test_a_newer_row_does_not_replace_an_older_or_loses_its_commit(site):
    row = one_row(site)
    newer = row | {"date": "2026-12-01T09:00:00Z", "commit": "fff9999"}
    newer["variants"] = {**row["variants"], "vitfast": {**row["variants"]["vitfast"], "ms": 64e3 / 77_777}}
    run = fake_record.run(date="2026-12-01T08:00:00Z", commit="fff9999", dirty=True)
    fake_record.write(site / "results" / "a_newer_run.json", [newer], run)
    body = blocks(site)["gpu throughput"]
    assert "77,777" in body and "commit fff9999 with local changes, 2026-12-01" in body and "abc1234" not in body


@pytest.mark.parametrize(
    "slower, mixed",
    [(1.05, True), (1.15, False), (0.85, False)],
    ids=["the same machine", "a slower one", "a faster one"],
)
def test_times_of_a_slower_day_stand_beside_others(slower, mixed, site):
    """Of rivals in a record of their own: beside others, in one line, only if the baseline takes as long there."""
    row = one_row(site)
    rivals = fake_record.row(
        random.Random(1), "model", "vit_base_patch16_224 compiled", "inference", row["shape"], 64, DONE,
        ("timm", "vitfast", "timm compiled"), 4.0 * slower, date="2026-12-01T09:00:00Z", commit="fff9999",
        notes={"model": "vit_base_patch16_224"},
    )  # fmt: skip
    run = fake_record.run(date="2026-12-01T08:00:00Z", commit="fff9999")
    fake_record.write(site / "results" / "rivals.json", [rivals], run)
    body = blocks(site)["gpu throughput"]
    assert "timm compiled" in body and ("torchvision" in body) is mixed
    assert f"{64e3 / (row if mixed else rivals)['variants']['timm']['ms']:,.0f} |" in body


def test_ours_of_one_run_stands_beside_a_rival_of_another(site):
    """Though one of the two has both, in turns."""
    shape, notes, name = {"size": 224, "dim": 768}, {"model": "vit_base_patch16_224"}, "vit_base_patch16_224"
    few, all_of_it = (
        fake_record.row(
            random.Random(i), "model", f"{name} {group}", "inference", shape, 64, DONE, names, 4.0, notes=notes
        )
        for i, (group, names) in enumerate({
            "autotuned": ("timm", "vitfast", "timm max-autotune"),
            "compiled": ("timm", "vitfast", "timm compiled", "timm max-autotune"),
        }.items())
    )  # fmt: skip
    few["variants"]["vitfast"]["ms"], all_of_it["variants"]["vitfast"]["ms"] = 2.0, 2.5
    fake_record.write(site / "results" / "run.json", [few, all_of_it])
    (device,) = report_rows.load(site / "results")
    (row,) = report_rows.models(device, "inference")
    assert all(row["variants"][name] is found for name, found in device.rows[1]["variants"].items())


def test_a_picture_that_no_page_shows_is_left_over(site):
    one_row(site)
    (site / "results" / "report_other_flops.png").write_bytes(b"")
    (site / "results" / "report_other.svg").write_text("<svg/>")
    assert report(site) == 0
    text = (site / "docs/numbers.md").read_text()
    assert {path.name for path in (site / "results").glob("report_*")} == set(re.findall(r"report_\w+\.png", text))


def test_an_unknown_block_stays_empty_in_silence(site, capsys):
    (site / "docs/numbers.md").write_text("<!-- report: gpu thruput -->\n<!-- end -->\n")
    assert report(site) == 1
    told = capsys.readouterr().err
    assert "'gpu thruput'" in told and "docs/numbers.md" in told


def test_bars_do_not_begin_at_zero_or_the_best_is_cut_off(site):
    fake_record.everything(site / "results")
    gpu, _ = report_rows.load(site / "results")
    for name in ("rivals", "latency", "memory", "ops"):
        for ax in getattr(report_pictures, name)(gpu).figure().axes:
            low, high = ax.get_xlim()
            widths = [bar.get_width() for bar in ax.patches]
            assert widths and low == 0 and max(widths) <= high and all(bar.get_x() == 0 for bar in ax.patches)
    for ax in report_pictures.throughput(gpu).figure().axes:
        assert ax.get_ylim()[0] == 0


def test_a_page_does_not_find_its_pictures(site):
    """Those of docs are a folder further away than the README's."""
    one_row(site)
    (site / "README.md").write_text("<!-- report: gpu summary -->\n<!-- end -->\n")
    assert report(site) == 0
    for page in (site / "README.md", site / "docs/numbers.md"):
        named = re.findall(r"\]\((.*?\.png)\)", page.read_text())
        assert named and all((page.parent / name).is_file() for name in named)


def test_the_summary_shows_another_model_a_rival_or_the_smaller_batch(site):
    """It is to be ours and timm's, at the largest batch, of the models that everybody knows."""
    row = one_row(site)
    other = row | {"name": "resnet50", "key": "cnn", "batch": 512}
    small = row | {"key": "small", "batch": 8, "work": {"flops": DONE.flops // 8, "bytes": DONE.bytes // 8}}
    large = row | {"key": "large", "name": "vit_giant_patch14_224"}
    fake_record.write(site / "results" / "run.json", [row, other, small, large])
    body = blocks(site)["gpu summary"]
    (line,) = [line for line in body.splitlines() if line.startswith(("| vit", "| res"))]
    assert line.startswith("| vit_base_patch16_224 | 64 | bf16 |") and "torchvision" not in body
    (gpu,) = report_rows.load(site / "results")
    (ax,) = report_pictures.summary(gpu).figure().axes
    rates = [64e3 / row["variants"][name]["ms"] for name in ("vitfast", "timm")]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(rates)
    assert ax.get_xlim()[0] == 0


def test_time_of_a_graph_passes_for_that_of_calls(site):
    """Both are shown where there are both, each from its own clock, and of timm the same."""
    times = {"timm": (16.0, 32.0), "vitfast": (8.0, 64.0), "torchvision": (16.0, 20.0)}

    def change(variants):
        for name, (ms, wall_ms) in times.items():
            variants[name] |= {"ms": ms, "wall_ms": wall_ms, "graph": True}

    one_row(site, change)
    found = blocks(site)
    (line,) = [line for line in found["gpu summary"].splitlines() if line.startswith("| vit")]
    assert "| 8,000 (" in line and line.endswith("| 4,000 | 1,000 / 2,000 |")
    assert "without graphs: vitfast / timm" in found["gpu summary"] and "replayed CUDA graphs" in found["gpu summary"]
    (line,) = [line for line in found["gpu host"].splitlines() if line.startswith("| vit")]
    assert line.endswith("| inference | 64 | bf16 | 64.0 | 32.0 |") and "torchvision" not in found["gpu host"]
    one_row(site, lambda variants: [v.update(graph=False, wall_ms=v["ms"]) for v in variants.values()])
    assert blocks(site)["gpu host"] == NOT_MEASURED and "without graphs" not in blocks(site)["gpu summary"]


def test_a_page_is_not_what_the_results_say():
    pages, pictures = make_report.filled(ROOT, RESULTS)
    assert all(path.read_text(encoding="utf-8") == text for path, text in pages.items()), "run make report"
    assert {path.name for path in RESULTS.glob("report_*")} == pictures.keys()
    # by what they show: another matplotlib draws the same in other bytes
    for name, picture in pictures.items():
        assert Image.open(RESULTS / name).text == {"Description": picture.digest}, f"{name}: run make report"


def test_a_committed_picture_is_large_or_not_sharp():
    for path in RESULTS.glob("report_*"):
        assert path.stat().st_size < 100_000 and Image.open(path).width >= 1000, path.name


def test_another_number_is_drawn_under_the_same_digest(site):
    fake_record.everything(site / "results")
    gpu, _ = report_rows.load(site / "results")
    for makers in report_pictures.PICTURES.values():
        for make in makers:
            before = make(gpu).digest
            assert before == make(gpu).digest
            for row in gpu.rows:
                for variant in row["variants"].values():
                    for name in {"ms", "percent", "peak_allocated_mib"} & variant.keys():
                        variant[name] *= 1.01
            assert before != make(gpu).digest, make.__name__


def test_a_table_is_on_no_page():
    """But those of the CPU's other benchmark, of a GPU."""
    pages = make_report.filled(ROOT, RESULTS)[0].values()
    written = {found[1] for page in pages for found in make_report.BLOCK.findall(page)}
    never = {"gpu patch", "gpu growth", "gpu gelu", "cpu memory", "cpu summary", "cpu host"}
    assert written == {*NAMES, "choices", "records"} - never
