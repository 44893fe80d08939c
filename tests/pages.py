"""README, docs and CONTRIBUTING as the tests read them: blocks of code, headings, links, inline code."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in PATHS}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
FENCE = "```"
NOT_RUN = re.compile(r"<!-- not run: needs (a GPU|the network|a download) -->")


class Block(NamedTuple):
    """A block of code: its page and line there, and why it cannot run here, "" where it can."""

    page: str
    line: int
    language: str
    text: str
    not_run: str


def blocks(page: str) -> list[Block]:
    found, lines = [], TEXTS[page].splitlines()
    fences = [i for i, line in enumerate(lines) if line.startswith(FENCE)]
    for begin, end in zip(fences[::2], fences[1::2], strict=True):
        marked = NOT_RUN.fullmatch(lines[begin - 1])
        text = "\n".join(lines[begin + 1 : end]) + "\n"
        language = lines[begin].removeprefix(FENCE)
        found.append(Block(page, begin + 1, language, text, marked.group(1) if marked else ""))
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


def prose(page: str) -> str:
    """The page without its blocks of code."""
    return re.sub(rf"^{FENCE}.*?^{FENCE}$", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)


def inline(page: str) -> list[str]:
    """What stands between backticks, which may go on over the end of a line."""
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: str) -> set[str]:
    """What a link can name: the headings, as GitHub writes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    found, seen = set(), {}
    for title in titles:
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        seen[slug] = seen.get(slug, -1) + 1
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
    return found


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of all tables under this heading, without the lines above the rules."""
    section = re.split(rf"^#+ {re.escape(heading)}$", prose(page), flags=re.MULTILINE)[1]
    lines = re.split(r"^#+ ", section, flags=re.MULTILINE)[0].splitlines()
    rules = {i for i, line in enumerate(lines) if re.fullmatch(r"(\| ---? ?-* )+\|", line)}
    heads = {i - 1 for i in rules}
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for i, line in enumerate(lines) if line.startswith("|") and i not in rules | heads
    ]  # fmt: skip
