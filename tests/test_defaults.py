"""`benchmarks/gpu/defaults.py`: from made-up records to the tables that ops read; the committed ones hold together."""

import json
from pathlib import Path

import pytest

from benchmarks.gpu import defaults
from vitfast.choose import builtin
from vitfast.choose.config_tables import Config, Product

ROOT = Path(__file__).parents[1]

SHAPE = ["bfloat16", "bfloat16", 8, 768, 768, "layer none"]
HEADS = ["bfloat16", 9, 197, 197, 64]
A, B, C = ({"kernel": "tiles", "block_m": n} for n in (64, 128, 256))


def timed(ms, role="ours", config=None, noise=0.01, **more):
    return {"role": role, "config": config, "ms": ms, "lowest": ms * (1 - noise), "highest": ms * (1 + noise)} | more


def stock(ms, config=None, **more):
    return timed(ms, "stock", config, **more)


def row(*variants, kernel="linear", shape=SHAPE):
    return {"kernel": kernel, "shape": shape, "variants": {f"v{i}": each for i, each in enumerate(variants)}}


def record(*rows, card="NVIDIA H200", capability="9.0"):
    stands = {"driver": "580", "torch": "2.11", "triton": "3.6", "commit": "abc", "date": "2026-11-27"}
    machine = {"device": card, "device_type": "cuda", "capability": capability} | stands
    return {"schema": 2, "machine": machine, "rows": {f"row {i}": each for i, each in enumerate(rows)}}


def choices(*records):
    made = defaults.tables({f"{i}.json": each for i, each in enumerate(records)})
    return {
        arch: [(r["kernel"], r["use"], r["config"], r["ratio"]) for r in data["rows"]] for arch, data in made.items()
    }


def only(*records):
    ((kernel, use, config, ratio),) = choices(*records)[90]
    return use, config, ratio


def test_the_fastest_configuration_is_not_the_choice():
    use, config, ratio = only(record(row(stock(2.0), timed(1.5, config=A), timed(1.0, config=B), timed(1.8, config=C))))
    assert (use, config, ratio) == ("kernel", B, {"NVIDIA H200": 2.0})


@pytest.mark.parametrize("ms, noise", [(1.0, 0.01), (0.995, 0.01), (0.9, 0.2), (1.1, 0.01)])
def test_a_kernel_runs_that_is_not_faster_beyond_the_noise(ms, noise):
    use, config, ratio = only(record(row(stock(1.0), timed(ms, config=A, noise=noise))))
    assert (use, config) == ("stock", None) and ratio == {"NVIDIA H200": round(1 / ms, 3)}


@pytest.mark.parametrize(
    "variant",
    [timed(0.5, config=A, accepted=False), timed(0.5, "other"), {"role": "ours", "config": A, "failed": "no"},
     timed(0.5, config=None)],
    ids=["not accepted", "something else", "no time", "what the launcher chose that day"],
)  # fmt: skip
def test_what_must_not_count_wins(variant):
    assert only(record(row(stock(1.0), variant, timed(0.8, config=B))))[:2] == ("kernel", B)


def test_stock_operators_that_were_not_right_are_a_measure():
    assert choices(record(row(stock(1.0, accepted=False), timed(0.8, config=A)))) == {}


def test_a_launchers_own_choice_is_lost_where_there_is_no_other():
    assert only(record(row(stock(1.0), timed(0.8), kernel="linear_backward")))[:2] == ("kernel", None)


@pytest.mark.parametrize("order", [1, -1])
def test_a_card_loses_where_cards_disagree(order):
    h100 = record(row(stock(1.0), timed(0.7, config=A), timed(0.9, config=B)), card="NVIDIA H100")
    h200 = record(row(stock(1.0), timed(1.1, config=A), timed(0.8, config=B)))
    use, config, ratio = only(*[h100, h200][::order])
    assert (use, config, ratio) == ("kernel", B, {"NVIDIA H100": 1.111, "NVIDIA H200": 1.25})
    h200["rows"]["row 0"]["variants"]["v2"] = timed(1.1, config=B)
    assert only(*[h100, h200][::order])[0] == "stock"


def test_an_older_record_of_a_card_counts_where_a_newer_has_the_shape():
    old, new = (record(row(stock(1.0), timed(ms, config=A))) for ms in (1.5, 0.5))
    other = [*SHAPE[:3], 192, *SHAPE[4:]]
    old["rows"]["other"] = row(stock(1.0), timed(0.8, config=B), shape=other)
    new["machine"]["date"] = "2026-12-01"
    for records in ((old, new), (new, old)):
        assert {(str(use), config["block_m"]) for _, use, config, _ in choices(*records)[90]} == {
            ("kernel", 64), ("kernel", 128)
        }  # fmt: skip


def test_another_architecture_shares_the_choice():
    found = choices(record(row(stock(1.0), timed(0.7, config=A))), record(row(stock(1.0), timed(2.0, config=A)),
                                                                          capability="8.0"))  # fmt: skip
    assert {arch: rows[0][1] for arch, rows in found.items()} == {80: "stock", 90: "kernel"}


def test_equal_configurations_are_as_many_as_there_are_rows():
    """Of those within 2 % of the best the one that is so most often."""
    shapes = [[*SHAPE[:3], n, *SHAPE[4:]] for n in (192, 384, 768)]
    variants = [(1.0, 1.015, 3.0), (3.0, 1.0, 1.015), (1.5, 1.015, 1.0)]
    rows = [row(stock(4.0), *(timed(ms, config=c) for ms, c in zip(each, (A, B, C), strict=True)), shape=shape)
            for each, shape in zip(variants, shapes, strict=True)]  # fmt: skip
    assert [config for _, _, config, _ in choices(record(*rows))[90]] == [B, B, B]


def test_cudnn_is_not_the_choice_where_it_is_fastest_or_is_where_the_noise_says_so():
    flash, ours = stock(2.0, {"backend": "flash"}), timed(1.1, config=A)
    for ms, expected in ((1.0, ("stock", {"backend": "cudnn"})), (1.09, ("stock", {"backend": "cudnn"})),
                         (1.5, ("kernel", A))):  # fmt: skip
        cudnn = stock(ms, {"backend": "cudnn"})
        assert only(record(row(flash, cudnn, ours, kernel="attention", shape=HEADS)))[:2] == expected
    level = row(stock(1.0, {"backend": "flash"}), stock(0.995, {"backend": "cudnn"}), ours, kernel="attention",
                shape=HEADS)  # fmt: skip
    assert only(record(level))[:2] == ("stock", None)


def test_statistics_that_the_next_product_needs_are_worth_nothing():
    """At (8, 768): fc2 is level with stock operators, and qkv faster with what fc2's tiles leave."""
    tiles = {"kernel": "tiles", "block_m": 64, "block_n": 128, "parts": 2}
    odd = {"kernel": "tiles", "block_m": 64, "block_n": 512, "parts": 1}
    blas = {"kernel": "blas"}
    fc2 = row(stock(1.0), timed(1.0, config=tiles), timed(0.999, config=odd), kernel="added_linear",
              shape=[*SHAPE[:3], 768, 3072, ""])  # fmt: skip
    qkv = row(stock(2.0), timed(1.5, config=blas), timed(1.3, config=tiles), kernel="folded_linear",
              shape=[*SHAPE[:3], 2304, 768, "layer none pieces"])  # fmt: skip
    fc1 = row(stock(9.0), timed(1.0, config=tiles), kernel="folded_linear",
              shape=[*SHAPE[:3], 3072, 768, "layer gelu pieces"])  # fmt: skip
    (data,) = defaults.tables({"r": record(fc2, qkv, fc1)}).values()
    (line,) = [line for line in data["rows"] if line["kernel"] == "added_linear"]
    assert (line["use"], line["config"], line["ratio"]) == ("kernel", tiles, {"NVIDIA H200": 1.0})
    assert line["note"] == "its statistics save the next product 200.0 us"
    # a row without them says what the next product takes where there are none
    without = row(stock(2.0), timed(1.3, config=blas), kernel="folded_linear",
                  shape=[*SHAPE[:3], 2304, 768, "layer none"])  # fmt: skip
    for rows in ((fc2, fc1), (fc2, qkv, fc1, without)):
        assert choices(record(*rows))[90][0][:3] == ("added_linear", "stock", None)


def test_a_configuration_that_no_launcher_takes_is_written():
    older = timed(0.5, config={"kernel": "online", "block_q": 64})
    with pytest.raises(ValueError, match="attention has no such configuration.*block_q"):
        defaults.tables({"r": record(row(stock(1.0), older, kernel="attention", shape=HEADS))})


def test_a_field_that_came_later_makes_another_configuration_of_it():
    """Of two cards' records the older one does not say what nothing had."""
    known = json.loads((ROOT / "benchmarks" / "results" / "nvidia-h200-tune.json").read_text())["rows"].values()
    seen = [v["config"] for row in known for v in row["variants"].values() if (v.get("config") or {}).get("kernel")]
    classes = {"tiles": Product, "blas": Product, "whole": Product}
    assert len(seen) > 100
    for config in seen:
        assert classes.get(config["kernel"], Config)(**config).as_dict() == config
    later = Product("tiles", 64, 64, 64, ahead=True, flatten=True).as_dict()
    assert later["ahead"] and later["flatten"] and Config("online", 64, descriptors=True).as_dict()["descriptors"]


def test_what_an_op_cannot_call_decides_or_is_not_named():
    rows = row(stock(2.0, {"backend": "flash"}), stock(0.5, {"backend": "efficient"}), timed(1.0, config=A),
               kernel="attention_backward", shape=HEADS)  # fmt: skip
    ((line,),) = (data["rows"] for data in defaults.tables({"r": record(rows)}).values())
    assert (line["use"], line["ratio"]) == ("kernel", {"NVIDIA H200": 2.0})
    assert line["note"] == "v1 faster, which the op can't call" and line["note"] in builtin.reason_of(line)


def test_a_backward_that_loses_to_cudnns_runs():
    rows = row(stock(2.0, {"backend": "flash"}), stock(0.5, {"backend": "cudnn"}), timed(1.0, config=A),
               kernel="attention_backward", shape=HEADS)  # fmt: skip
    ((line,),) = (data["rows"] for data in defaults.tables({"r": record(rows)}).values())
    assert (line["use"], line["config"], line["ratio"]) == ("stock", {"backend": "cudnn"}, {"NVIDIA H200": 0.5})


@pytest.mark.parametrize("ms, use", [(1.0, "kernel"), (1.5, "stock")])
def test_a_record_without_the_usual_stock_operators_writes_no_table(ms, use):
    """They failed, or there was no time left for them."""
    flash = {"role": "stock", "config": {"backend": "flash"}, "failed": "out of memory"}
    rows = row(flash, stock(1.2, {"backend": "cudnn"}), timed(ms, config=A), kernel="attention", shape=HEADS)
    assert only(record(rows))[:2] == (use, A if use == "kernel" else None)


def test_time_of_the_host_is_told_as_a_ratio():
    rows = row(stock(2.0, graph=False), timed(1.0, config=A))
    (data,) = defaults.tables({"r": record(rows)}).values()
    (measured,) = builtin.parsed(data)
    assert measured.host and "the host's" in measured.choice.reason and measured.choice.kernel


def test_ops_read_something_else_than_was_written(tmp_path, monkeypatch, capsys):
    sweeps, tables = tmp_path / "sweeps", tmp_path / "tables"
    sweeps.mkdir()
    tables.mkdir()
    whole = {"kernel": "whole", "block_m": 128}
    mlp = [*SHAPE[:2], 14, 768, 192, "layer gelu"]
    (sweeps / "a-tune.json").write_text(json.dumps(record(row(stock(2.0), timed(1.0, config=A)))))
    (tmp_path / "more.json").write_text(json.dumps(record(row(stock(2.0), timed(1.0, config=whole), kernel="mlp",
                                                              shape=mlp))))  # fmt: skip
    monkeypatch.setattr(defaults, "RESULTS", sweeps)
    arguments = ["--from", str(tmp_path / "more.json"), "--into", str(tables)]
    assert defaults.main(arguments) == 0 and not list(tables.iterdir())
    assert defaults.main([*arguments, "--write"]) == 0
    assert "2 shapes, 2 by kernels, 2 changed" in capsys.readouterr().out
    monkeypatch.setattr(builtin, "FOLDER", tables)
    cached = (builtin.builtin, builtin.table, builtin._by_class)
    for each in cached:
        each.cache_clear()
    try:
        for kernel, shape, config, of in (("linear", SHAPE, A, "a-tune.json"), ("mlp", mlp, whole, "more.json")):
            found = builtin.builtin(kernel, tuple(shape), 90)
            assert found.kernel and found.config == config
            assert found.reason == f"measured: 2.00 x stock on NVIDIA H200 ({of})"
        assert builtin.builtin("linear", tuple(SHAPE), 100).reason.startswith("unmeasured")
        assert builtin.summary("mlp", 90) == (
            "measured for 1 shape on NVIDIA H200: the kernel for 1 (2.00 to 2.00 x stock), stock for 0"
        )
    finally:
        for each in cached:
            each.cache_clear()
    assert defaults.main([*arguments, "--write"]) == 0 and "0 changed" in capsys.readouterr().out


def test_a_cpu_decides_something(tmp_path, capsys):
    data = record(row(stock(2.0), timed(1.0, config=A)))
    data["machine"] |= {"device_type": "cpu", "capability": None}
    (tmp_path / "cpu-tune.json").write_text(json.dumps(data))
    assert defaults.main(["--from", str(tmp_path / "cpu-tune.json"), "--into", str(tmp_path), "--write"]) == 0
    assert "is of no GPU" in capsys.readouterr().out
    assert json.loads((tmp_path / "measured_sm90.json").read_text()) == json.loads(builtin.path_of(90).read_text())


@pytest.mark.parametrize("text", ["{", json.dumps({"schema": 1, "rows": {}}), "[]"])
def test_a_record_that_cannot_be_used_leaves_half_a_table(tmp_path, text, capsys):
    (tmp_path / "odd.json").write_text(text)
    into = tmp_path / "tables"
    into.mkdir()
    assert defaults.main(["--from", str(tmp_path / "odd.json"), "--into", str(into), "--write"]) == 1
    assert "odd.json" in capsys.readouterr().err and not list(into.iterdir())


def test_the_committed_tables_are_others_than_the_committed_records_say():
    records = {path.name: defaults.read(path) for path in sorted(defaults.RESULTS.glob(defaults.OF_SWEEPS))}
    made = defaults.tables(records)
    assert made and {path.name for path in builtin.FOLDER.glob("measured_sm*.json")} == {
        builtin.path_of(arch).name for arch in made
    }
    for arch, data in made.items():
        assert builtin.path_of(arch).read_text() == defaults.text_of(data)


def test_a_row_of_a_committed_table_loses_on_its_card():
    """From the record without the program."""
    for path in defaults.RESULTS.glob(defaults.OF_SWEEPS):
        data = defaults.read(path)
        table = {(r.kernel, list(r.shape).__str__()): r for r in builtin.table(defaults.arch_of(data))}
        for each in data["rows"].values():
            if each["kernel"] is None:
                continue
            choice = table[each["kernel"], str(each["shape"])].choice
            reach = ("cudnn", "flash") if each["kernel"] == "attention" else ("flash",)
            theirs = [v for v in each["variants"].values() if v["role"] == "stock" and "ms" in v
                      and (v["config"] or {"backend": "flash"})["backend"] in reach]  # fmt: skip
            ours = [v for v in each["variants"].values() if v["role"] == "ours" and "ms" in v]
            # wins with what its statistics save the next product, and not alone
            if "statistics save" in choice.reason:
                assert each["kernel"] == "added_linear" and choice.kernel
                continue
            wins = [v for v in ours if all(v["ms"] < t["lowest"] and v["highest"] < t["ms"] for t in theirs)]
            if choice.kernel:
                assert choice.config in [v["config"] for v in wins]
            else:
                assert not wins
