"""The README's examples, as a reader would paste them, and what it says of make and of versions."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
import vit_pytorch

ROOT = Path(__file__).parent.parent
README, MAKEFILE = ((ROOT / name).read_text() for name in ("README.md", "Makefile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LISTS = ("constraints.txt", "constraints-newest.txt")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("i", range(6))
def test_example_does_not_run(i, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = dict(image_size=224, patch_size=16, num_classes=10, dim=384, depth=6, heads=6, mlp_dim=1536)
    torch.save(vit_pytorch.ViT(**size).state_dict(), "old.pt")
    assert len(EXAMPLES) == 7
    exec(compile(EXAMPLES[i], f"README.md, example {i}", "exec"), {})


def test_named_file_does_not_exist():
    for path in re.findall(r"`((?:vitfast|benchmarks|tests)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path


def test_named_target_does_not_exist():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE))
    assert {"test", "test-newest"} <= named <= targets


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


def test_newest_versions_are_others_than_the_readme_says():
    torch_, triton = re.search(r"`constraints-newest.txt` \(PyTorch ([\d.]+), Triton ([\d.]+)\)", README).groups()
    newest = pins(LISTS[1])
    assert any(pin.startswith(f"torch=={torch_}.") for pin in newest)
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
