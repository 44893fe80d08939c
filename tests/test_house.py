"""Files that keep the project in order agree: Makefile, pyproject, constraints, pre-commit, workflow, CONTRIBUTING."""

import importlib
import inspect
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

import vitfast

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE, CONTRIBUTING = ((ROOT / name).read_text() for name in ("Makefile", "CONTRIBUTING.md"))
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
TOOLS = ("ruff check", "ruff format", "mypy", "clang-format")


def versions():
    """The Pythons that the package says it is for."""
    found = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert len(found) > 1
    return found


def jobs():
    """For each job the Pythons that it runs on, and its commands."""
    for job in WORKFLOW["jobs"].values():
        (setup,) = [step["with"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
        asked = job.get("strategy", {}).get("matrix", {}).get("python", [setup["python-version"]])
        assert len(asked) == 1 or setup["python-version"] == "${{ matrix.python }}"
        yield asked, [step["run"] for step in job["steps"] if "run" in step]


def test_workflow_leaves_out_a_python_or_runs_a_command_that_is_none():
    (pythons, commands), (newest, newest_commands) = jobs()
    assert pythons == versions() and set(newest) <= set(versions())
    assert commands == ["make lint", "make test"] and newest_commands == ["make test-newest"]
    for command in (*commands, *newest_commands):
        assert command.removeprefix("make ") in TARGETS
    assert all("timeout-minutes" in job for job in WORKFLOW["jobs"].values())


def test_lowest_python_differs_from_file_to_file():
    lowest = versions()[0]
    assert PROJECT["project"]["requires-python"] == f">={lowest}"
    assert PROJECT["tool"]["mypy"]["python_version"] == lowest
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{lowest.replace('.', '')}"
    assert f"sys.version_info < ({lowest.replace('.', ', ')})" in MAKEFILE
    assert f"Python {lowest} or newer" in CONTRIBUTING
    for name in ("constraints.txt", "constraints-newest.txt"):
        said = " ".join((ROOT / name).read_text().replace("#", " ").split())
        assert f"Python {lowest} to {versions()[-1]}." in said, name


def recipe(target):
    """The commands of a target as make would run them, here without those of what it needs."""
    lines = MAKEFILE.partition(f"\n{target}:")[2].splitlines()[1:]
    return [line.strip() for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("\t"))]]


def test_pre_commit_checks_with_another_version_than_lint_or_leaves_something_out():
    hooks = {hook["id"]: hook for repo in HOOKS for hook in repo["hooks"]}
    assert {repo["repo"] for repo in HOOKS} == {"local"}, "its rev would be a version of its own"
    for hook in hooks.values():
        for requirement in hook.get("additional_dependencies", []):
            name, version = requirement.split("==")
            assert PINS[name] == version, requirement
        assert hook["language"] == "system" or hook["additional_dependencies"]
    entries = " ".join(hook["entry"] for hook in hooks.values())
    lint = " ".join(recipe("lint"))
    assert all(tool in lint and tool in entries for tool in TOOLS)
    assert len(recipe("lint")) == len(hooks) == len(TOOLS)


def test_lint_changes_a_file_or_format_forgets_one():
    assert recipe("lint")[1:2] == ["$(BIN)/ruff format --check ."] and "--dry-run --Werror" in recipe("lint")[3]
    imports = "$(BIN)/ruff check --select I --fix --quiet ."
    assert recipe("format") == [imports, "$(BIN)/ruff format .", "$(BIN)/clang-format -i $(NATIVE)"]
    assert re.search(r"^test: lint pytest ", MAKEFILE, re.MULTILINE)


def test_source_in_c_is_not_formatted():
    """In whatever folder it is: what make's pattern finds is all that there is."""
    printed = "print:\n\t@echo $(NATIVE)\n"
    command = ["make", "--no-print-directory", "-f", "Makefile", "-f", "-", "print"]
    found = subprocess.run(command, input=printed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = (ROOT / "csrc", ROOT / "tests/native")
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(files) > 20 and sorted(found) == sorted(file.relative_to(ROOT).as_posix() for file in files)


def section(mark):
    """The names in backticks that stand between a mark in CONTRIBUTING.md and its end."""
    return re.findall(r"`([^`]+)`", CONTRIBUTING.partition(f"<!-- {mark}")[2].partition("<!-- end -->")[0])


def test_contributing_names_other_modules_than_are_checked():
    files = PROJECT["tool"]["mypy"]["files"]
    assert sorted(section("mypy:")) == sorted(files)
    for pattern in files:
        # fnmatch and mypy write "not" as [!x], pathlib as well
        assert any(ROOT.glob(pattern)), f"{pattern} matches nothing"


def test_contributing_names_a_field_that_info_has_not():
    from vitfast.commands import info

    named = [name for name in section("info:") if not name.startswith("vitfast models")]
    assert len(named) >= 5
    for name in named:
        facts = info.collect()
        for key in name.split("."):
            assert key in facts, name
            facts = facts[key]


def public():
    """Every function and method that a user calls, by name."""
    spaces = {"vitfast": vitfast, "ops": vitfast.ops, "reference": vitfast.reference}
    for space, module in spaces.items():
        for name in module.__all__:
            if inspect.isfunction(getattr(module, name)):
                yield f"{space}.{name}", getattr(module, name)
    prepared = importlib.import_module("vitfast.inference.prepare").PreparedViT
    for kind in (vitfast.ViT, vitfast.ViTConfig, prepared):
        for name, member in inspect.getmembers(kind):
            member = member.fget if isinstance(member, property) else member
            of_vitfast = getattr(member, "__module__", None) or ""
            if of_vitfast.startswith("vitfast") and inspect.isroutine(member) and name[:1] != "_":
                yield f"{kind.__name__}.{name}", member
        yield f"{kind.__name__}()", kind.__init__


def test_public_signature_tells_a_type_checker_nothing():
    found = dict(public())
    assert len(found) > 70, "the list is not what it was"
    bare = []
    for name, function in found.items():
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        bare += [f"{name}: {p.name}" for p in parameters if p.annotation is p.empty]
        bare += [f"{name} ->"] * (signature.return_annotation is signature.empty and not name.endswith("()"))
    assert not bare, bare


PROGRAM = """
import torch
import vitfast

model = vitfast.create_model("vit_tiny_patch16_224", img_size=32)
config: vitfast.ViTConfig = model.config
prepared = vitfast.prepare(model.eval(), "auto", threads=None)
features = prepared.forward_features(torch.zeros(1, 3, 32, 32))
weights: dict[str, torch.Tensor] = vitfast.read_checkpoint("model.safetensors", allow_pickle=True)
out = vitfast.ops.linear(features, torch.zeros(8, 192), None)
reveal_type(features)
reveal_type(out)
"""
WRONG = {
    "model = vitfast.create_model(3)": 'No overload variant of "create_model" matches argument type "int"',
    "vitfast.prepare('vit')": '"prepare" has incompatible type "str"',
    "vitfast.ViT(image_size=32)": 'Missing named argument "mlp_dim" for "ViT"',
    "vitfast.ops.layer_norm(1.0, None, None, 1e-6)": '"layer_norm" has incompatible type "float"',
    "vitfast.load_checkpoint(vitfast.ViT, 'model.pt')": '"load_checkpoint" has incompatible type',
}


def site_packages():
    return [path for path in sys.path if Path(path).name == "site-packages"]


@pytest.mark.slow
def test_type_checker_of_a_user_sees_no_types(tmp_path):
    """As mypy finds an installed package: a right program passes, and each wrong line is told."""
    lines = [f"{line}\n" for line in WRONG]
    (tmp_path / "program.py").write_text(PROGRAM + "".join(lines))
    # installed beside what this Python has: there mypy reads no types of a package without py.typed
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "others.pth").write_text("".join(f"{path}\n" for path in site_packages()))
    (site / "vitfast").symlink_to(ROOT / "vitfast")
    command = [sys.executable, "-m", "mypy", "--config-file=", "--python-executable", tmp_path / "env/bin/python"]
    said = subprocess.run([*command, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert said.stdout.count("Revealed type is") == 2 and said.stdout.count("Tensor") >= 2, said.stdout
    first = PROGRAM.count("\n") + 1
    told = {int(n): message for n, message in re.findall(r"^program\.py:(\d+): error: (.*)$", said.stdout, re.M)}
    assert sorted(told) == [*range(first, first + len(WRONG))], said.stdout + said.stderr
    for message, expected in zip((told[n] for n in sorted(told)), WRONG.values(), strict=True):
        assert expected in message
