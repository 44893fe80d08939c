"""What Triton's interpreter asks of the kernels' source and of the versions that are installed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "vitfast/kernels/triton").glob("*.py"))


def constexprs_before_tensors(text):
    """Lines of operators inside functions with constants of the module, `tl.constexpr`, on the left only."""
    tree = ast.parse(text)
    constants = {
        node.targets[0].id
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("tl.constexpr(")
    }

    def constant(node):
        parts = {type(part) for part in ast.walk(node)}
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        return names <= constants and ast.Call not in parts, bool(names)

    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp):
            left, right = node.left, node.right
        elif isinstance(node, ast.Compare):
            left, right = node.left, node.comparators[0]
        else:
            continue
        if constant(left) == (True, True) and not constant(right)[0]:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_constexpr_swallows_a_tensor(path):
    """Triton 3.8's interpreter makes a constexpr of SCALE * tensor, which operators and `tl.where` then refuse."""
    assert constexprs_before_tensors(path.read_text()) == []


def test_such_a_constexpr_is_overlooked():
    text = "A = tl.constexpr(2.0)\nB = 3.0\ndef f(x):\n    return {} + B * x\n"
    for fine in ("x * A", "x * (3.0 * A * A)", "tl.maximum(x, -A)", "2.0 * x", "x > A"):
        assert constexprs_before_tensors(text.format(f"({fine})")) == [], fine
    for wrong in ("A * x", "-A * x", "3.0 * A * x", "A * tl.abs(x)", "(A < x)"):
        assert len(constexprs_before_tensors(text.format(wrong))) == 1, wrong


BROKEN = """
import sys
import pytest
from triton.runtime import interpreter

def call(self, *arguments, **keywords):
    raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

interpreter.GridExecutor.__call__ = call
sys.exit(pytest.main(["-q", "--collect-only", "tests/kernels/test_layer_norm.py"]))
"""


def test_numpy_that_the_interpreter_fails_with_is_hundreds_of_failures():
    done = subprocess.run(
        [sys.executable, "-c", BROKEN], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    (line,) = (done.stdout + done.stderr).strip().splitlines()
    assert "fails with numpy" in line and "only 0-dimensional" in line and "constraints.txt" in line
