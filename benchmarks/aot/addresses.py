"""Row arithmetic in 32 bits, found in a kernel's TTIR.

A program id or a loop's counter says which rows a program works on. Times a stride that is an offset into the whole
tensor, which overflows at 2^31 elements unless one of the factors was cast to int64 before. Offsets inside a tile
(`tl.arange` times a stride) stay small and may be i32, so may divisions, remainders and comparisons of program ids.

What is not seen: an i32 offset that a loop carries and adds a stride to, offsets that are read from memory, and
functions that are not inlined.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

# rows of the largest tile: a program id times more than that counts elements
TILE_ROWS = 256
# programs that run side by side on a tile of the result: an id divided by their number is multiplied by it again
GROUP = 16

NAME = r"%[\w.$-]+"
OPERAND = re.compile(rf"{NAME}(?:#\d+)?")
OPERATION = re.compile(rf'(?:({NAME})(?::(\d+))? = )?"?([a-z][\w.]*)"?(.*)')
ARGUMENT = re.compile(rf"({NAME}): i(?:32|64)\b")
FOR = re.compile(rf"scf\.for ({NAME}) = ({NAME}(?:#\d+)?)")
CARRIED = re.compile(rf"({NAME}) = ({NAME}(?:#\d+)?)")
CONSTANT = re.compile(r"arith\.constant (?:dense<)?(-?\d+)>? : (?:tensor<[\dx]+x)?i\d+")
IN_32_BITS = re.compile(r": (?:i32|tensor<[\dx]+xi32>)$")
LOCATION = re.compile(r" loc\((.*)\)$")
# what they give says nothing about offsets: a truth value, data, or a pointer whose offset was looked at
OPAQUE = ("arith.cmpi", "arith.cmpf", "tt.load", "tt.descriptor_load", "tt.addptr")

# of a value: the line that defines it, in which part, and the place there
Key = tuple[int, str, int]


@dataclass(frozen=True)
class Facts:
    """About an integer.

    Attributes:
        moves: it depends on a program id or a loop's counter.
        sized: it depends on an argument.
        steps: how much faster it grows than a program id in it, by the constants it was multiplied with; 0 where there
            is none in it. Loops that begin at 0 are about columns, keys and weights.
        constant: its size where it is known, else 1.
        narrow: the products in it that can overflow, as text.
    """

    moves: bool = False
    sized: bool = False
    steps: float = 0
    constant: int = 1
    narrow: frozenset[str] = frozenset()

    def __or__(self, other: Facts) -> Facts:
        return Facts(
            self.moves or other.moves,
            self.sized or other.sized,
            max(self.steps, other.steps),
            narrow=self.narrow | other.narrow,
        )


NOTHING = Facts()
MOVES = Facts(moves=True)


def narrow_rows(ttir: str) -> list[str]:
    """The 32-bit products that reach an address, a line each with file and line number.

    Args:
        ttir: `asm["ttir"]` of a compiled kernel.
    """
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))
    lines = []
    for line in ttir.splitlines():
        text = line.strip()
        place = LOCATION.search(text)
        lines.append((LOCATION.sub("", text), _source_line(place.group(1), places) if place else "?"))
    facts: dict[Key, Facts] = {}
    while True:
        # a loop's last lines decide about its first ones, so until nothing new comes out
        before, found = dict(facts), _walk(lines, facts)
        if facts == before:
            return sorted(found)


def _source_line(place: str, places: dict[str, str]) -> str:
    """`file.py:17` out of a location, which may be a name for another one."""
    for _ in range(20):
        if named := re.search(r'([^/"]+)":(\d+):\d+', place):
            return f"{named.group(1)}:{named.group(2)}"
        if (other := re.search(r"#loc\d*", place)) is None or other.group() not in places:
            break
        place = places[other.group()]
    return "?"


def _walk(lines: list[tuple[str, str]], facts: dict[Key, Facts]) -> set[str]:
    """Once through the kernel, adding to `facts`; what reached an address."""
    found: set[str] = set()
    # regions side by side may use a name twice; the later one is in force, as every definition stands before its uses
    names: dict[str, Key] = {}
    # of each open region: the values that each one it yields becomes
    regions: list[list[list[Key]]] = [[]]

    def add(key: Key, known: Facts) -> None:
        facts[key] = facts[key] | known if key in facts and facts[key] != known else known

    def define(name: str, key: Key, known: Facts) -> None:
        names[name] = key
        add(key, known)

    for number, (text, place) in enumerate(lines):
        closed = regions.pop() if text.startswith("}") else None
        opens = text.endswith("{")
        if closed is not None and opens:  # else, do
            regions.append(closed)
        if text.startswith("^"):
            for index, name in enumerate(re.findall(rf"({NAME}):", text)):
                define(name, (number, "argument", index), MOVES)
        operation = OPERATION.match(text)
        if operation is None:
            continue
        result, count, kind, rest = operation.groups()
        given = [facts.get(names.get(name), NOTHING) for name in OPERAND.findall(rest)]
        if kind in ("scf.yield", "scf.condition"):
            # the first operand of a condition is whether the loop goes on
            passed = given[1:] if kind == "scf.condition" else given
            for keys, known in zip(regions[-1], passed, strict=False):
                for key in keys:
                    add(key, known)
            continue
        if kind == "tt.addptr":
            found |= given[1].narrow
        if kind == "tt.func":
            for index, name in enumerate(ARGUMENT.findall(text)):
                define(name, (number, "argument", index), Facts(sized=True))
        becomes: list[list[Key]] = []
        if kind in ("scf.for", "scf.while"):
            header = text
            if loop := FOR.search(text):
                header = text[loop.end() :]
                define(loop.group(1), (number, "counter", 0), MOVES | facts.get(names.get(loop.group(2)), NOTHING))
            for index, (name, first) in enumerate(CARRIED.findall(header)):
                known = facts.get(names.get(first), NOTHING)
                key = (number, "argument", index)
                define(name, key, known | MOVES if kind == "scf.while" else known)
                becomes.append([key])
        for index in range(int(count or 1) if result else 0):
            key = (number, "result", index)
            define(f"{result}#{index}" if count else result, key, _result(kind, text, given, place))
            if kind.startswith("scf."):
                becomes[index : index + 1] = [[*(becomes[index] if index < len(becomes) else []), key]]
        if opens:
            regions.append(becomes)
    return found


def _result(kind: str, text: str, given: list[Facts], place: str) -> Facts:
    if kind.startswith("scf."):
        return NOTHING  # what its regions yield
    if kind in ("tt.get_program_id", "tt.get_num_programs"):
        return Facts(moves=True, steps=1)
    if constant := CONSTANT.search(text):
        return Facts(constant=max(1, abs(int(constant.group(1)))))
    if kind in OPAQUE:
        return NOTHING
    if kind == "arith.select":
        given = given[1:]
    if kind == "arith.muli":
        return _product(*given[:2], place, narrow=bool(IN_32_BITS.search(text)))
    if len(given) == 1:
        return given[0]
    known = NOTHING
    for each in given:
        known |= each
    return replace(known, steps=known.steps / GROUP) if kind in ("arith.divsi", "arith.divui") else known


def _product(a: Facts, b: Facts, place: str, *, narrow: bool) -> Facts:
    known = a | b
    if not narrow:
        return known
    if (a.moves and b.sized) or (b.moves and a.sized):
        why = f"{place}: a program id or loop counter times an argument in 32 bits reaches an address"
        return replace(known, narrow=known.narrow | {why})
    # bounded, or a loop that carries a product would never come to an end
    known = replace(known, steps=min(known.steps * a.constant * b.constant, 1 << 31))
    if known.steps > TILE_ROWS:
        why = f"{place}: a program id times a large constant in 32 bits reaches an address"
        return replace(known, narrow=known.narrow | {why})
    return known
