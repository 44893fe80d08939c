"""Bugs drawn at random, planted in the kernels one after the other: which tests see them?

    python tests/random_mutants.py --seed 1 --number 20

A line of a `@triton.jit` function is drawn, and one of the changes that can be made in it. The tests in tests/kernels
that are about its file run on a copy of the package with that change: those of `make test`, and where these pass those
that `make test-all` has more. What only the latter see belongs into the former. What neither sees changes no result, as
where a mask only keeps from memory that is there, or lacks a test.
"""

import argparse
import ast
import random
import subprocess
import tempfile
import time
from pathlib import Path

from mutants import KERNELS, TESTS, is_seen, run_on_mutant

SWAPPED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
}  # fmt: skip
OTHER_CALL = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min"}
GUARDED = "test_guarded.py::test_kernel_touches_what_is_not_its_own[{}]".format
# by the beginning of a file's name, the longest first
TESTS_OF = {
    "attention": ["test_attention.py", "test_attention_extras.py", GUARDED("attention")],
    "layer_norm": [
        "test_layer_norm.py", "test_prepared_block.py", "test_families.py", "test_linear_gradients.py", GUARDED("norm"),
    ],
    "linear": [
        "test_linear.py", "test_linear_gradients.py", "test_gpu_block.py",
        *map(GUARDED, ("linear", "statistics", "mlp")),
    ],
    "mlp": ["test_mlp.py", "test_linear.py", "test_linear_gradients.py", GUARDED("mlp")],
    "": ["test_mlp.py", "test_linear.py", "test_layer_norm.py", "test_attention.py", *map(GUARDED, ("norm", "linear"))],
}  # fmt: skip


def changes(node):
    """What the node could be instead: (what was changed, a new node) each."""
    again = lambda: ast.parse(ast.unparse(node), mode="eval").body  # noqa: E731
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        new = again()
        new.ops[0] = SWAPPED[type(node.ops[0])]()
        yield f"{ast.unparse(node)} -> {ast.unparse(new)}", new
    elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        new = again()
        new.op = SWAPPED[type(node.op)]()
        yield f"{ast.unparse(node)} -> {ast.unparse(new)}", new
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = node.value
        value = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 1.1 + 1e-3
        yield f"{node.value} -> {value}", ast.Constant(value)
    elif isinstance(node, ast.Call):
        if any(keyword.arg == "mask" for keyword in node.keywords):
            new = again()
            new.keywords = [keyword for keyword in new.keywords if keyword.arg not in ("mask", "other")]
            yield f"{ast.unparse(node)} without its mask", new
        for i in range(len(node.args) - 1):
            new = again()
            new.args[i : i + 2] = new.args[i : i + 2][::-1]
            one, other = map(ast.unparse, node.args[i : i + 2])
            yield f"{ast.unparse(node.func)}(.., {one} <-> {other}, ..)", new
        if isinstance(node.func, ast.Attribute) and node.func.attr in OTHER_CALL:
            new = again()
            new.func.attr = OTHER_CALL[node.func.attr]
            yield f"{ast.unparse(node)} -> {ast.unparse(new)}", new


def places():
    """By file and line of a kernel's body the changes that can be made there, as (what, source with it)."""
    found = {}
    for path in sorted(KERNELS.glob("*.py")):
        text = path.read_text()
        starts = [0]
        for line in text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        for function in ast.walk(ast.parse(text)):
            if not isinstance(function, ast.FunctionDef) or "triton.jit" not in map(_called, function.decorator_list):
                continue
            for statement in function.body:
                for node in ast.walk(statement):
                    for what, new in changes(node):
                        begin = starts[node.lineno - 1] + node.col_offset
                        end = starts[node.end_lineno - 1] + node.end_col_offset
                        changed = f"{text[:begin]}({ast.unparse(new)}){text[end:]}"
                        found.setdefault((path.name, node.lineno), []).append((what, changed))
    return found


def _called(decorator):
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)


def outcome(name, changed, seconds):
    """Which tests see it, and the first of them."""
    chosen = next(files for start, files in TESTS_OF.items() if name.startswith(start))
    chosen = [str(TESTS / "kernels" / file) for file in chosen]
    with tempfile.TemporaryDirectory() as folder:
        for tests, options in (("make test", []), ("make test-all", ["--all", "-m", "full or slow"])):
            try:
                done = run_on_mutant(Path(folder), name, changed, *options, *chosen, timeout=seconds)
            except subprocess.TimeoutExpired:
                return f"{tests}: no end after {seconds} s", ""
            if is_seen(done):
                failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                return tests, failed[0].partition("::")[2][:100] if failed else f"status {done.returncode}"
    return "none", ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="of the drawn ones, where to go on")
    parser.add_argument("--seconds", type=float, default=3600.0, help="after which the tests on one have no end")
    args = parser.parse_args()
    chance, there = random.Random(args.seed), places()
    drawn = [(at, chance.choice(there[at])) for at in chance.sample(sorted(there), args.number)]
    for number, ((name, line), (change, changed)) in list(enumerate(drawn))[args.first :]:
        start = time.perf_counter()
        seen_by, test = outcome(name, changed, args.seconds)
        print(
            f"{number} | {name}:{line} | {change[:150]} | {seen_by} | {test} | {time.perf_counter() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
