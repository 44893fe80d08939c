"""Row arithmetic in 32 bits, found in a kernel's TTIR.

A program id or a loop's counter says which rows a program works on. Times a stride that is an offset into the whole
tensor, which overflows at 2^31 elements unless one of the factors was cast to int64 before. Offsets inside a tile
(`tl.arange` times a stride) stay small and may be i32, so may divisions, remainders and comparisons of program ids.

What is not seen: an i32 offset that a loop carries and adds a stride to, offsets that are read from memory, and
functions that are not inlined.
"""

from __future__ import annotations

import re
from functools import reduce
from itertools import zip_longest
from operator import or_
from typing import NamedTuple

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

# of a value: the line that defines it, and its name there
Key = tuple[int, str]


class Facts(NamedTuple):
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
        constant = self.constant if self == other else 1
        steps, narrow = max(self.steps, other.steps), self.narrow | other.narrow
        return Facts(self.moves or other.moves, self.sized or other.sized, steps, constant, narrow)


NOTHING = Facts()
MOVES = Facts(moves=True)


def narrow_rows(ttir: str) -> list[str]:
    """The 32-bit products that reach an address, a line each with file and line number.

    Args:
        ttir: `asm["ttir"]` of a compiled kernel.
    """
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))
    lines = []
    for text in map(str.strip, ttir.splitlines()):
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
    while not (named := re.search(r'([^/"]+)":(\d+):\d+', place)):
        other = re.search(r"#loc\d*", place)
        if other is None or other.group() not in places:
            return "?"
        place = places[other.group()]
    return f"{named.group(1)}:{named.group(2)}"


def _walk(lines: list[tuple[str, str]], facts: dict[Key, Facts]) -> set[str]:
    """Once through the kernel, adding to `facts`; what reached an address."""
    found: set[str] = set()
    # regions side by side may use a name twice; the later one is in force, as every definition stands before its uses
    names: dict[str, Key] = {}
    # of each open region: the values that each one it yields becomes
    regions: list[list[list[Key]]] = [[]]

    def of(name: str) -> Facts:
        return facts.get(names.get(name), NOTHING)

    def define(number: int, name: str, known: Facts) -> Key:
        key = names[name] = (number, name)
        facts[key] = facts.get(key, known) | known
        return key

    for number, (text, place) in enumerate(lines):
        closed, becomes = regions.pop() if text.startswith("}") else None, []
        if closed is not None and text.endswith("{"):  # else, do
            regions.append(closed)
        for name in re.findall(rf"({NAME}):", text) if text.startswith("^") else ():
            define(number, name, MOVES)
        operation = OPERATION.match(text)
        if operation is None:
            continue
        result, count, kind, rest = operation.groups()
        given = [of(name) for name in OPERAND.findall(rest)]
        if kind in ("scf.yield", "scf.condition"):
            # the first operand of a condition is whether the loop goes on
            for keys, known in zip(regions[-1], given[kind == "scf.condition" :], strict=False):
                for key in keys:
                    facts[key] |= known
            continue
        if kind == "tt.addptr":
            found |= given[1].narrow
        for name in ARGUMENT.findall(text) if kind == "tt.func" else ():
            define(number, name, Facts(sized=True))
        if kind in ("scf.for", "scf.while"):
            counter = FOR.search(text)
            if counter:
                define(number, counter.group(1), MOVES | of(counter.group(2)))
            for name, first in CARRIED.findall(text, counter.end() if counter else 0):
                becomes.append([define(number, name, of(first) if counter else of(first) | MOVES)])
        results = [f"{result}#{i}" for i in range(int(count))] if count else [result] if result else []
        keys = [define(number, name, _result(kind, text, given, place)) for name in results]
        if kind.startswith("scf."):
            becomes = [known + more for known, more in zip_longest(becomes, ([key] for key in keys), fillvalue=[])]
        if text.endswith("{"):
            regions.append(becomes)
    return found


def _result(kind: str, text: str, given: list[Facts], place: str) -> Facts:
    if kind.startswith("scf.") or kind in OPAQUE:
        return NOTHING  # of regions what they yield
    if kind in ("tt.get_program_id", "tt.get_num_programs"):
        return Facts(moves=True, steps=1)
    if constant := CONSTANT.search(text):
        return Facts(constant=max(1, abs(int(constant.group(1)))))
    if kind == "arith.select":
        given = given[1:]
    if kind == "arith.muli":
        return _product(*given[:2], place, narrow=bool(IN_32_BITS.search(text)))
    known = given[0] if len(given) == 1 else reduce(or_, given, NOTHING)
    return known._replace(steps=known.steps / GROUP) if kind in ("arith.divsi", "arith.divui") else known


def _product(a: Facts, b: Facts, place: str, *, narrow: bool) -> Facts:
    known, why = a | b, None
    if narrow and ((a.moves and b.sized) or (b.moves and a.sized)):
        why = f"{place}: a program id or loop counter times an argument in 32 bits reaches an address"
    elif narrow:
        # bounded, or a loop that carries a product would never come to an end
        known = known._replace(steps=min(known.steps * a.constant * b.constant, 1 << 31))
        if known.steps > TILE_ROWS:
            why = f"{place}: a program id times a large constant in 32 bits reaches an address"
    return known._replace(narrow=known.narrow | {why}) if why else known
