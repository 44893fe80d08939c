"""Facts that README and docs state, against what the package, the build, the records and `vitfast info` say."""

import ast
import json
import re
import tomllib

import pytest
from pages import ROOT, TEXTS, table

import vitfast
from vitfast.commands import info
from vitfast.commands.main import main
from vitfast.ops import _register

README = TEXTS["README.md"]
EVERYTHING = "\n".join(TEXTS.values())
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LISTS = ("constraints.txt", "constraints-newest.txt")
# how the README calls what `vitfast info` says of an op
WORDS = {"PyTorch": _register.STOCK, "C++": "C++", "Triton": "Triton", "CUDA": "CUDA"}


def constants(path):
    """Values of the constants at the top of a script that cannot be imported."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            name, code = node.targets[0].id, ast.Expression(node.value)
            try:
                found[name] = eval(compile(ast.fix_missing_locations(code), str(path), "eval"), {}, found)
            except NameError:
                continue
    return found


SETUP = constants(ROOT / "setup.py")


def in_backticks(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_readme_says_of_an_op_what_info_does_not(monkeypatch):
    """On a machine that has all: what is missing here would count as PyTorch's."""
    monkeypatch.setattr(_register, "_why_stock_on_cuda", lambda kernel: "")
    told = {}
    for _, ops, cpu, cuda in table("README.md", "What is fused"):
        for op in in_backticks(ops):
            told[op.removeprefix("ops.")] = {"cpu": WORDS[cpu], "cuda": WORDS[cuda]}
    # what an op leaves to stock operators in one dtype stands in brackets
    found = {op: {kind: each["runs_as"].partition(" (")[0] for kind, each in kinds.items()}
             for op, kinds in info.collect()["ops"].items()}  # fmt: skip
    assert told == found
    languages = {kind: {kinds[kind] for kinds in found.values()} - {_register.STOCK} for kind in ("cpu", "cuda")}
    assert languages == {"cpu": {"C++"}, "cuda": {"Triton", "CUDA"}}
    assert "C++ kernels on CPUs, Triton and CUDA kernels on GPUs" in " ".join(README.split())


def test_readme_says_of_amx_what_info_does_not(monkeypatch):
    monkeypatch.setattr(_register.cpu_kernels, "tiled", lambda dtype: True)
    ops = {op: kinds["cpu"]["runs_as"] for op, kinds in info.collect()["ops"].items()}
    by_clock = {op: runs_as.partition("(")[2] for op, runs_as in ops.items() if "by measurement" in runs_as}
    assert {op for op, words in by_clock.items() if words.startswith("bf16: ")} == {
        "attention", "attention_qkv", "attention_varlen",
    }  # fmt: skip
    assert {op for op, words in by_clock.items() if words.startswith("bf16 in inference: ")} == {"linear", "mlp"}
    told = "in bf16, attention and, in inference, `ops.linear` and `ops.mlp` are C++ or PyTorch"
    assert told in " ".join(README.split())


def test_readme_or_build_names_other_instruction_sets_than_are_built():
    built = ["portable", *SETUP["X86_FLAGS"]]
    (cpu,) = [row for row in table("README.md", "What runs where, and how it was tested") if row[0].startswith("CPU")]
    assert in_backticks(cpu[1]) == built
    (listed,) = re.findall(r"every instruction set that the compiler knows: ([^.]*)\.", TEXTS["docs/build.md"])
    assert in_backticks(listed) == built
    extension = info.collect()["extension"]
    if extension["built"]:
        assert extension["cpu_kernels"] in built and set(built[1:]) <= extension["cpu_features"].keys()


def test_readme_names_other_architectures_than_are_compiled():
    gpus = [row for row in table("README.md", "What runs where, and how it was tested") if row[0].startswith("GPU")]
    compiled = {key.rpartition("sm_")[2] for key in json.loads((ROOT / "benchmarks/aot.json").read_text())["rows"]}
    named = [arch.removeprefix("sm_") for row in gpus for arch in in_backticks(row[0])]
    assert sorted(named) == sorted(arch for arch in compiled if arch.isdigit())
    assert sorted(arch for row in gpus for arch in in_backticks(row[1])) == sorted(SETUP["ARCHS"].split(";"))
    assert f"`{SETUP['ARCHS']}`" in TEXTS["docs/build.md"]
    told = {f"{kind}_{arch.removesuffix('+PTX')}" for row in gpus for arch in in_backticks(row[1])
            for kind in ("sm", "compute")[: 1 + arch.endswith("+PTX")]}  # fmt: skip
    # fewer, where somebody built for one card
    assert set(info.collect()["extension"].get("cuda", {}).get("archs", ())) <= told


def test_architecture_has_other_rooms_or_another_order_than_the_test_of_imports():
    layers = constants(ROOT / "tests/test_layers.py")["LAYERS"]
    rooms = [in_backticks(room)[0] for room, _ in table("docs/architecture.md", "Layers")]
    assert [room.removeprefix("vitfast/").removesuffix(".py") for room in rooms] == [*layers]


def test_readme_says_that_something_ran_where_no_record_is():
    records = [json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*.json")]
    facts = [record.get("run") or record["machine"] for record in records]
    ran = [of for of in facts if of["device_type"] == "cuda"]
    gpus = [row for row in table("README.md", "What runs where, and how it was tested") if row[0].startswith("GPU")]
    for devices, _, tested in gpus:
        here = [of for of in ran if f"sm_{of['capability'].replace('.', '')}" in in_backticks(devices)]
        cards = {(of["device"], of["date"][:10]) for of in here}
        assert tested == (
            f"ran on one {' and '.join(' , '.join(card) for card in cards)}".replace(" ,", ",")
            if cards else "compiled and inspected; never ran"
        )  # fmt: skip
    assert set(re.findall(r"\b(?:at|Newer than) ([0-9a-f]{7})\b", TEXTS["docs/gpu.md"])) <= {of["commit"] for of in ran}
    measured = re.findall(r"shapes on ([^:]+):", json.dumps(info.collect()["kernels"]))
    assert measured and all(card in str(gpus) for cards in measured for card in cards.split(", "))


def test_numbers_in_a_sentence_are_not_those_of_the_records():
    """What no table says."""
    results, page = ROOT / "benchmarks/results", " ".join(TEXTS["docs/gpu.md"].split())
    # the table is made from the record
    (told,), (passed,) = re.findall(r"are (\d+) smoke tests at", page), re.findall(r"tests: (\d+) passed, 0", page)
    assert "and one more under memcheck" in page and int(passed) == int(told) + 1
    (sweep,) = (json.loads(path.read_text()) for path in (results / "sweeps").glob("*.json"))
    done = len(sweep["rows"])
    assert f"{done} of {done + len(sweep['skipped'])} rows" in page
    gains = []
    for row in json.loads((results / "nvidia-h200-tune.json").read_text())["rows"].values():
        times = {name: way.get("ms") for name, way in row["variants"].items()}
        ours = [times[name] for name, way in row["variants"].items() if way["role"] == "ours" and times[name]]
        if row["kernel"] == "attention" and times.get("SDPA cudnn") and min(ours) > times["SDPA cudnn"]:
            gains.append(100 * min(ours) / times["SDPA cudnn"] - 100)
    assert f"({min(gains):.0f} to {max(gains):.0f} % faster)" in TEXTS["docs/benchmarks.md"]


def test_readme_says_that_nobody_was_compiled_after_somebody_was():
    records = [json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*-models.json")]
    rows = [row for record in records if record["run"]["device_type"] == "cuda" for row in record["rows"]]
    variants = {name for row in rows for name, variant in row["variants"].items() if variant.get("ms")}
    assert variants
    assert any("compiled" in name for name in variants) is not ("torch.compile was not timed there" in README)


def test_number_of_names_is_another(capsys):
    told = re.findall(r"the (\d+) names of timm.*?other (\d+) ViT names", EVERYTHING, re.DOTALL)
    assert len(told) == 2 and set(told) == {(str(len(vitfast.VARIANTS)), str(len(vitfast.UNSUPPORTED)))}
    assert main(["models"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "{} work, {} do not".format(*told[0])
    (timm,) = [pin.partition("==")[2] for pin in pins(LISTS[0]) if pin.startswith("timm==")]
    assert set(re.findall(r"names of timm (\d[\d.]+\d)", EVERYTHING)) == {timm}


def test_version_is_another():
    assert (
        re.findall(r"release (\d+\.\d+\.\d+)\b(?! or newer)", README)
        == [info.collect()["vitfast"]]
        == [vitfast.__version__]
    )
    python = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert set(re.findall(r"Python (\d\.\d+) or newer", EVERYTHING)) == {python}
    (torch,) = [each.removeprefix("torch>=") for each in PROJECT["project"]["dependencies"] if each.startswith("torch")]
    assert set(re.findall(r"torch (?:>= )?(\d\.\d+)(?: or newer|, numpy)", EVERYTHING)) == {torch}
    tested = [re.match(r"\d+\.\d+", pin.partition("==")[2]).group() for name in LISTS for pin in pins(name)
              if pin.startswith("torch==")]  # fmt: skip
    told = re.findall(r"tested with (?:torch )?(\d\.\d+) and (\d\.\d+)", EVERYTHING)
    assert len(told) == 2 and set(told) == {tuple(tested)}
    assert re.match(r"\d+\.\d+", info.collect()["packages"]["torch"]).group() in tested


READ = re.compile(r"(?:VITFAST|TRITON)_[A-Z_]+|CXX|NVCC")


def test_environment_variable_is_not_listed_or_not_read():
    """A string that is such a name is read, or set for a process that reads it; a test's own use of one is neither."""
    listed = [name for row in table("docs/build.md", "Environment variables") for name in in_backticks(row[0])]
    files = [ROOT / "setup.py", *(p for folder in ("vitfast", "benchmarks") for p in (ROOT / folder).rglob("*.py"))]
    files.append(ROOT / "tests/guarded_memory.py")
    strings = {node.value for file in files for node in ast.walk(ast.parse(file.read_text()))
               if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip
    compiled = [file.read_text() for file in (ROOT / "csrc").rglob("*.*")]
    strings |= {name for text in compiled for name in re.findall(r'getenv\("(\w+)"', text)}
    strings |= set(re.findall(r"^\t+(?:@?)(\w+)=", MAKEFILE, re.MULTILINE))
    assert sorted(listed) == sorted(name for name in strings if READ.fullmatch(name))


def names(requirements):
    """As pip compares them."""
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", each).group()).lower() for each in requirements}


def pins(name):
    return [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("name", LISTS)
def test_version_is_left_open(name):
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins(name))
    assert re.search(rf"CONSTRAINTS ?:?= ?{re.escape(name)}\b", MAKEFILE)
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = names([*PROJECT["project"]["dependencies"], *(each for extra in extras for each in extra)])
    assert wanted - {"vitfast"} <= names(pins(name)) == names(pins(LISTS[0]))


def test_newest_versions_are_others_than_the_docs_say():
    found = re.search(r"`constraints-newest.txt` \(PyTorch ([\d.]+), Triton ([\d.]+)\)", TEXTS["docs/numerics.md"])
    torch, triton = found.groups()
    newest = pins(LISTS[1])
    assert any(pin.startswith(f"torch=={torch}.") for pin in newest)
    assert any(pin.startswith(f"triton=={triton}.") for pin in newest)


def test_pip_chooses_another_triton_than_torch():
    """The newest is not the one that a torch goes with, and a torch for CPUs has no use for any."""
    assert "triton" not in names(PROJECT["project"]["dependencies"])


def test_environment_of_make_is_committed_or_linted():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    # ruff leaves out .venv by itself
    excluded = {".venv", *PROJECT["tool"]["ruff"]["extend-exclude"]}
    for folder in set(re.findall(r"\.venv[\w-]*", MAKEFILE)):
        assert f"{folder}/" in ignored and folder in excluded, folder
