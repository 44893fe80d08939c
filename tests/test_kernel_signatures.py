"""A kernel's signature says of each argument what it is: beside a pointer stands the shape of what it points to."""

import ast
import importlib
import io
import re
import tokenize
from pathlib import Path

import pytest

import vitfast

PACKAGE = Path(vitfast.__file__).parent
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
LAUNCHERS = [name for name, text in SOURCES.items() if "def compilations(" in text]


def arguments(source):
    """(function, argument, comment on its line) of all that Triton compiles, constants left out; "" for no comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: re.sub(r"^#\s*(fmt:|noqa).*", "", t.string) for t in tokens if t.type == tokenize.COMMENT}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any(map(is_jit, node.decorator_list)):
            of = node.args
            for each in (*of.posonlyargs, *of.args, *of.kwonlyargs, *filter(None, (of.vararg, of.kwarg))):
                if each.annotation is None or not ast.unparse(each.annotation).endswith("constexpr"):
                    yield node.name, each.arg, comments.get(each.lineno, "")


def is_jit(decorator):
    decorator = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(decorator).split(".")[-1] == "jit"


KERNELS = {name: found for name, text in SOURCES.items() if (found := list(arguments(text)))}


def test_no_kernel_is_looked_at():
    assert {"kernels/triton/attention_forward.py", "kernels/triton/linear_product.py"} <= set(KERNELS)
    assert all(name.startswith("kernels/triton/") for name in KERNELS)
    assert sum(len({function for function, *_ in found}) for found in KERNELS.values()) > 40


@pytest.mark.parametrize("name", KERNELS)
def test_an_argument_does_not_say_what_it_is(name):
    assert [f"{function}: {argument}" for function, argument, comment in KERNELS[name] if not comment] == []


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_pointer_does_not_say_the_shape(name):
    """Of the functions that launchers start, which say themselves what is a pointer or a descriptor."""
    module = importlib.import_module("vitfast." + name.removesuffix(".py").replace("/", "."))
    said = {(function, argument): comment for found in KERNELS.values() for function, argument, comment in found}
    kernels = {each.kernel.__name__: each.signature for each in module.compilations(90)}
    pointers = [(kernel, argument) for kernel, signature in kernels.items()
                for argument, kind in signature.items() if kind.startswith(("*", "tensordesc"))]  # fmt: skip
    assert len(pointers) > 5
    assert [pointer for pointer in pointers if not re.search(r"\[.*\]", said[pointer])] == []


PLANTED = '''
@triton.jit(do_not_specialize=("M",))
def kernel(
    x,  # [M, K], K contiguous
    out, M,
    step,  # from row to row
    *,
    K: tl.constexpr,
    last,
):  # fmt: skip
    ...

@jit
def helper(a, b): ...  # noqa: E704

@triton.jit
def said(a, b):  # [M], [N]
    ...

def no_kernel(x): ...
'''  # fmt: skip


def test_a_silent_argument_is_overlooked():
    found = [(function, argument) for function, argument, comment in arguments(PLANTED) if not comment]
    assert found == [("kernel", "out"), ("kernel", "M"), ("kernel", "last"), ("helper", "a"), ("helper", "b")]
