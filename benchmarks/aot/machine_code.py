"""What PTX, the assembler's words and machine code say of how a kernel shares a multiprocessor and waits.

Of a program of more than one warpgroup each waits for its own wgmma only: what one has done with a buffer in shared
memory says nothing of the others, until all meet at a barrier (triton#11047).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

WARPGROUP = 4
# of a multiprocessor (CUDA's programming guide, "Technical specifications per compute capability")
REGISTERS = 64 << 10
MOST_WARPS = {80: 64, 89: 48, 90: 64, 100: 64}
MOST_PROGRAMS = {80: 32, 89: 24, 90: 32, 100: 32}
SHARED = {80: 164 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10}
# columns of sm_100's memory for accumulators
TENSOR_MEMORY = 512
# the system's part of each program's shared memory
RESERVED = 1 << 10


def programs(arch: int, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> int:
    """How many programs a multiprocessor runs at once; 0 where it has no room for one."""
    # a quarter of the registers for a quarter of the warps, in portions of 256 a warp
    portion = -(-registers * 32 // 256) * 256
    of_registers = 4 * (REGISTERS // 4 // max(portion, 256)) // warps
    # in portions of 128 bytes
    of_shared = SHARED[arch] // (-(-shared // 128) * 128 + RESERVED)
    of_tensor_memory = TENSOR_MEMORY // tensor_memory if tensor_memory else MOST_PROGRAMS[arch]
    return min(of_registers, of_shared, of_tensor_memory, MOST_WARPS[arch] // warps, MOST_PROGRAMS[arch])


# machine code

WAIT = re.compile(r"\bwgmma\.wait_group\b")
TENSOR_CORES = re.compile(r"[HIQ]G?MMA\b|UTC\w*MMA")


def _instructions(sass: str) -> list[tuple[int, str]]:
    """Address and text of each instruction up to the last that is no padding."""
    found = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass, re.M)]
    while found and (found[-1][1] == "NOP" or re.fullmatch(rf"BRA 0x{found[-1][0]:x}", found[-1][1])):
        found.pop()
    return found


def epilogue(sass: str) -> int | None:
    """Instructions that stand behind the last one for tensor cores; None where there is none."""
    found = [TENSOR_CORES.search(text) is not None for _, text in _instructions(sass)]
    return found[::-1].index(True) if any(found) else None


def barriers(sass: str) -> list[int]:
    """How many barriers for all threads stand in each of the innermost loops with tensor cores, in their order."""
    found = _instructions(sass)
    place = {at: i for i, (at, _) in enumerate(found)}
    # behind the last exit there are only detours
    end = max((i for i, (_, text) in enumerate(found) if text == "EXIT"), default=len(found))
    jumps = ((re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)$", text), i) for i, (_, text) in enumerate(found[:end]))
    loops = [(place.get(int(jump.group(1), 16), i + 1), i) for jump, i in jumps if jump]
    innermost = set()
    for i, (_, text) in enumerate(found):
        around = [(last - first, first, last) for first, last in loops if first <= i <= last]
        if around and TENSOR_CORES.search(text):
            innermost.add(min(around)[1:])
    return [sum("BAR.SYNC" in text for _, text in found[first:last]) for first, last in sorted(innermost)]


def serialised(ptx: str, sass: str, said: str) -> list[str]:
    """Why wgmma that were to run beside each other do not; nothing where they do.

    Args:
        said: by the assembler.
    """
    # C7519: a fence more, beside which they still run together
    reasons = [f"ptxas: {line}" for line in dict.fromkeys(re.findall(r"\(?\bC75(?!19)\d\d\b.*", said))]
    wanted, asked = (len(re.findall(word, ptx)) for word in (r"\bwgmma\.mma_async\b", WAIT))
    there, waits = (len(re.findall(word, sass)) for word in (r"\bHGMMA\b", r"\bWARPGROUP\.DEPBAR\b"))
    # a loop may stand in machine code more often than in PTX
    if not reasons and waits * wanted > asked * there:
        reasons.append(f"{waits} waits for {there} HGMMA, {asked} for {wanted} were asked for")
    return [f"wgmma one after the other: {reason}" for reason in reasons]


# PTX

LABEL = re.compile(r"(\$L__BB\w+):")
BRANCH = re.compile(r"(@!?%p\d+\s+)?bra(?:\.uni)?\s+(\$L__BB\w+)")
BARRIER = re.compile(r"\b(?:bar|barrier)(?:\.cta)?\.sync(?:\.aligned)?\s+0\s*;")
REFILL = re.compile(r"\bcp\.async\.(?:c[ag]|bulk(?:\.tensor\.\dd)?)\.shared\b|\bmbarrier\.(?:arrive|inval|init)\b")
STORE = re.compile(r"\bst\.shared\b|\bstmatrix\b")

Edges = dict[str, list[str]]


def _blocks(ptx: str) -> tuple[dict[str, list[str]], Edges]:
    """The basic blocks of a kernel by label, and those that follow each."""
    label, code, after, falls = "entry", {"entry": []}, {"entry": []}, True
    for line in ptx[ptx.index("\n{") :].splitlines():
        line = line.partition("//")[0].strip()
        if start := LABEL.match(line):
            after[label] += [start.group(1)] if falls else []
            label, falls = start.group(1), True
            code[label], after[label] = [], []
        elif falls:
            code[label].append(line)
            if jump := BRANCH.match(line):
                after[label].append(jump.group(2))
                falls = jump.group(1) is not None
            falls &= line != "ret;"
    return code, after


def _back_edges(after: Edges) -> Iterator[tuple[str, str]]:
    seen, path, todo = {"entry"}, ["entry"], [iter(after["entry"])]
    while path:
        following = next(todo[-1], None)
        if following is None:
            path.pop(), todo.pop()
        elif following in path:
            yield path[-1], following
        elif following not in seen:
            seen.add(following), path.append(following), todo.append(iter(after[following]))


def _ends_without_wait(code: dict[str, list[str]], after: Edges) -> set[str]:
    """Blocks from whose end a round of a loop, or the kernel, may end without another wait."""
    back, free = set(_back_edges(after)), {label for label, lines in code.items() if not any(map(WAIT.search, lines))}
    found: set[str] = set()
    while True:
        more = {
            label for label, nexts in after.items()
            if not nexts or any((label, each) in back or each in found & free for each in nexts)
        }  # fmt: skip
        if more <= found:
            return found
        found |= more


def unguarded(ptx: str) -> list[str]:
    """What may overwrite what another warpgroup still multiplies: no barrier stands between it and a wait for wgmma.

    Copies and arrivals behind any wait, stores behind the last one of a loop's round: between the others what is stored
    is no operand. Addresses are not looked at.
    """
    code, after = _blocks(ptx)
    last = _ends_without_wait(code, after)
    # at a block's beginning: 0: a barrier stands behind each wait; 1: none behind some wait, 2: some last one
    begins, todo = dict.fromkeys(code, 0), list(code)
    found: dict[str, None] = {}
    while todo:
        label = todo.pop()
        state, waits = begins[label], [i for i, line in enumerate(code[label]) if WAIT.search(line)]
        for i, line in enumerate(code[label]):
            if i in waits:
                state = 2 if i == waits[-1] and label in last else max(state, 1)
            elif BARRIER.search(line):
                state = 0
            elif (state and REFILL.search(line)) or (state == 2 and STORE.search(line)):
                found[re.sub(r"^@\S+\s+", "", line).split()[0]] = None
        for each in after[label]:
            if state > begins[each]:
                begins[each] = state
                todo.append(each)
    return [f"no barrier between a wait for wgmma and {what}" for what in found]
