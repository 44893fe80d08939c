"""The pages, as a reader would use them: blocks of code are run or parsed, links lead somewhere, files exist."""

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import vit_pytorch
from pages import BLOCKS, FENCE, PAGES, ROOT, TEXTS, anchors, inline, prose

MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
IGNORED = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
RUNS = set(re.search(r"RUN=([a-z|]+):", MAKEFILE).group(1).split("|"))
ASSIGNED = re.compile(r"[A-Z_]+=.*")
# of the repository's files, what a text may name without a folder
SUFFIXES = r"(?:py|md|json|txt|toml|h|cpp|cu|cuh|png)"
every_page = pytest.mark.parametrize("page", PAGES)


def ids(found):
    return [f"{block.page}:{block.line}" for block in found]


def of(language, run):
    return [block for block in BLOCKS if block.language == language and bool(not block.not_run) is run]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with the weights that the examples load."""
    monkeypatch.chdir(tmp_path)
    size = dict(image_size=224, patch_size=16, num_classes=10, dim=384, depth=6, heads=6, mlp_dim=1536)
    torch.save(vit_pytorch.ViT(**size).state_dict(), "old.pt")


def test_a_block_is_neither_run_nor_parsed():
    """In another language than these, behind a mark that is misspelt or misplaced, or by another fence."""
    tested = [*of("python", True), *of("python", False), *of("bash", True), *of("bash", False)]
    assert sorted(tested) == sorted(BLOCKS)
    text = "\n".join(TEXTS.values())
    assert text.count(FENCE) == 2 * len(BLOCKS) and "~~~" not in text
    assert text.count("<!-- not run") == sum(bool(block.not_run) for block in BLOCKS)
    # what is indented so far is code as well
    assert not any(re.search(r"^(?: {4}|\t)", prose(page), re.MULTILINE) for page in PAGES)
    assert {page for page in PAGES if any(block.page == page for block in of("python", True))} >= {
        "README.md", "docs/gpu.md", "docs/inference.md", "docs/models.md",
    }  # fmt: skip


@pytest.mark.parametrize("block", of("python", True), ids=ids(of("python", True)))
def test_example_does_not_run(block, reader):
    exec(compile(block.text, f"{block.page}, line {block.line}", "exec"), {})


@pytest.mark.parametrize("block", of("python", False), ids=ids(of("python", False)))
def test_example_that_needs_more_is_no_python(block):
    compile(block.text, f"{block.page}, line {block.line}", "exec")


class Parsed(Exception):
    """A parser took what it was given."""


@pytest.fixture
def parse_only(monkeypatch):
    """Commands end where they have parsed their arguments."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        real(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    return monkeypatch


def run_main(main, *given):
    try:
        assert main(*given) == 0
    except Parsed:
        pass
    except SystemExit as wrong:
        raise AssertionError(f"not understood: {given or sys.argv}") from wrong


def check_command(words, parse_only):
    """Fail where a reader's shell, make, pip or python would not know a part of the command."""
    while words and ASSIGNED.fullmatch(words[0]):
        words = words[1:]
    program, *given = words
    # as they are called where no environment is active
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        variables = [word.partition("=")[0] for word in given if ASSIGNED.fullmatch(word)]
        assert all(re.search(rf"\$\({name}\)|^{name} \?=", MAKEFILE, re.MULTILINE) for name in variables), variables
        assert {word for word in given if not ASSIGNED.fullmatch(word)} <= TARGETS, given
    elif program == "vitfast":
        run_main(importlib.import_module("vitfast.commands.main").main, given)
    elif (program, *given[:1]) == ("pip", "install"):
        for word in given[1:]:
            extra = re.fullmatch(r"\.(?:\[(\w+)\])?", word)
            assert word in ("-v", "pre-commit") or extra and (extra.group(1) is None or extra.group(1) in EXTRAS), word
    elif words == ["pre-commit", "install"]:
        assert (ROOT / ".pre-commit-config.yaml").is_file()
    elif (program, *given[:2]) == ("python", "-m", "pytest"):
        assert all((ROOT / word).exists() for word in given[2:] if "/" in word), given
        assert {word for word in given if word.startswith("-")} <= {"-m", "-k", "-p"}, given
        for option, plugin in pairwise(given):
            assert option != "-p" or (ROOT / f"{plugin.replace('.', '/')}.py").is_file(), plugin
    elif (program, *given[:2]) == ("python", "-m", "benchmarks"):
        run_main(importlib.import_module("benchmarks.__main__").main, given[2:])
    elif program == "python" and given[0] == "-m":
        assert (ROOT / f"{given[1].replace('.', '/')}.py").is_file(), given[1]
        parse_only.setattr(sys, "argv", given[1:])
        run_main(importlib.import_module(given[1]).main)
    elif program == "python" and (ROOT / given[0]).parent == ROOT / "benchmarks":
        parse_only.setattr(sys, "argv", given)
        assert (ROOT / given[0]).is_file(), given[0]
        run_main(importlib.import_module(given[0].removeprefix("benchmarks/").removesuffix(".py")).main)
    else:
        raise AssertionError(f"nobody knows whether this works: {' '.join(words)}")


@pytest.mark.parametrize("block", of("bash", True) + of("bash", False), ids=ids(of("bash", True) + of("bash", False)))
def test_command_does_not_exist_or_takes_other_arguments(block, parse_only):
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    commands = [shlex.split(line, comments=True) for line in block.text.splitlines()]
    assert all(commands)
    # an environment that is made anew
    assert block.not_run or not {"make", "pip"} & {words[0] for words in commands}
    for words in commands:
        check_command(words, parse_only)


@pytest.mark.slow
# they collect all tests, twice
@pytest.mark.full
@pytest.mark.parametrize("block", of("bash", True), ids=ids(of("bash", True)))
def test_command_that_needs_nothing_fails(block):
    """Run as it stands; of pytest, which would run this test again, what it collects."""
    script = "set -e\n" + block.text.replace(".venv/bin/", "").replace("-m pytest", "-m pytest --collect-only -q")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options = dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    run = subprocess.run(["bash", "-c", script], **options)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr
    assert len(run.stdout.splitlines()) >= len(block.text.splitlines())


@every_page
def test_command_in_a_sentence_does_not_exist_or_takes_other_arguments(page, parse_only):
    for text in inline(page):
        words = shlex.split(text) if re.match(r"(make|vitfast|pip|python) \w", text) else []
        # a sentence may name the command and leave out the model
        if words[:2] == ["vitfast", "tune"] and all(word.startswith("-") for word in words[2:]):
            words.append("vit_tiny_patch16_224")
        if words:
            check_command(words, parse_only)


@pytest.mark.parametrize("wrong", [
    "make dem", "make test WRKERS=2", "vitfast inf", "vitfast tune --batsh 1 vit_tiny_patch16_224", "mkae demo",
    "pip install '.[tets]'", "python -m benchmarks.rooflin", "python -m benchmarks.roofline --bach 1",
    "python -m benchmarks op mlp", "python -m pytest tests/kernel", ".venv/bin/vitfast inf",
    "python -m pytest -mm slow", "python -m pytest -p tests.as_axm",
])  # fmt: skip
def test_wrong_command_passes_for_right(wrong, parse_only):
    with pytest.raises(AssertionError):
        check_command(shlex.split(wrong), parse_only)


@every_page
def test_run_of_make_gpu_does_not_exist(page):
    """By itself in a sentence, where nobody parses it."""
    assert set(re.findall(r"\bRUN=(\w+)", TEXTS[page])) <= RUNS


@every_page
def test_named_file_does_not_exist(page):
    for text in inline(page):
        if re.fullmatch(rf"(?:vitfast|benchmarks|tests|csrc|docs|\.github)/[\w/.*-]+|[\w.-]+\.{SUFFIXES}", text):
            folders = (ROOT, ROOT / "benchmarks/results")
            # what programs make is in no clone
            assert text in IGNORED or any(any(folder.glob(text)) for folder in folders), text


@every_page
def test_named_function_does_not_exist(page):
    for text in inline(page):
        named = re.match(r"(vitfast\.(?!_C)|ops\.|reference\.)([\w.]+)", text)
        # a record, a file in the reader's folder
        if named and not re.search(rf"/|\.{SUFFIXES}$|\.safetensors", text):
            found = importlib.import_module("vitfast")
            for name in text.partition("(")[0].removeprefix("vitfast.").split("."):
                found = getattr(found, name)


@every_page
def test_link_leads_nowhere(page):
    links = re.findall(r"\]\(([^)]+)\)", prose(page))
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT).as_posix()), link


def test_page_is_found_from_the_readme_by_nobody():
    assert set(re.findall(r"\]\(([\w/]+\.md)\)", TEXTS["README.md"])) >= PAGES.keys() - {"README.md"}


@every_page
def test_page_is_too_long_or_too_wide(page):
    """Of generated tables and captions nobody reads the source."""
    written = re.sub(r"(<!-- report: .*? -->\n).*?(<!-- end -->)", r"\1\2", TEXTS[page], flags=re.DOTALL)
    assert all(len(line) <= 120 for line in written.splitlines() if not line.startswith("|"))
    assert page != "README.md" or len(TEXTS[page].splitlines()) <= 140
