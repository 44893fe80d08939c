"""The structure of the package: which rooms there are, and that arrows between them go down."""

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import vitfast

PACKAGE = Path(vitfast.__file__).parent
ROOT = PACKAGE.parent
# from the lowest: a file imports from its own room and from those before it. The root's own face, `__init__`, and
# `__main__` stand above all
LAYERS = (
    "version", "measure", "config", "timm_names", "choose", "reference", "kernels", "ops", "weights", "model",
    "patching", "inference", "check", "checkpoints", "loading", "parity", "commands",
)  # fmt: skip
FACE = ("vitfast", "vitfast.__main__")
# what these show is what a user imports
USERS = ("commands",)
OPS = ("attention", "layer_norm", "linear", "mlp", "patch_embed")


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
BENCHMARKS = {name_of(path): path for path in sorted((ROOT / "benchmarks").rglob("*.py"))}


def imports(path, modules=MODULES):
    """Those of `modules` that this file imports, wherever in it: at the top, in a function, for type checkers."""
    package = next(iter(modules)).split(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        assert not getattr(node, "level", 0), f"{path}: a relative import, which is not read here"
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
            inside = {f"{node.module}.{each.name}" for each in node.names}
            found |= {name if name in modules else node.module for name in inside}
        elif isinstance(node, ast.Import):
            found |= {each.name for each in node.names if each.name.split(".")[0] == package}
    return found


def names_imported(path):
    """Modules of anybody as import statements name them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
        elif isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
    return found


GRAPH = {name: imports(path) for name, path in MODULES.items()}
BENCHMARKS = {name_of(path): path for path in sorted((ROOT / "benchmarks").rglob("*.py"))}


def room(module):
    return module.split(".")[1] if module not in FACE else "vitfast"


def test_a_room_has_no_layer_or_a_layer_no_room():
    assert {room(module) for module in MODULES if module not in FACE} == {*LAYERS}


@pytest.mark.parametrize("module", [name for name in MODULES if name not in FACE])
def test_an_arrow_goes_up(module):
    own = LAYERS.index(room(module))
    for other in GRAPH[module]:
        if other == "vitfast":
            assert room(module) in USERS, f"{module} imports the package's face"
        else:
            assert LAYERS.index(room(other)) <= own, f"{module} imports {other}, which is above it"


def test_runtime_imports_benchmarks():
    """What trains and infers: all that `import vitfast` and `vitfast.warmup` load."""
    above = LAYERS.index("commands")
    for module, others in GRAPH.items():
        if module not in FACE and LAYERS.index(room(module)) < above:
            assert not {other for other in others if other != "vitfast" and LAYERS.index(room(other)) >= above}, module
    for path in MODULES.values():
        assert "benchmarks" not in {name.split(".")[0] for name in names_imported(path)}, path
    assert "commands" not in {room(other) for other in GRAPH["vitfast"]}


def circles(graph):
    """Sets of files that import one another, by Tarjan's algorithm in its simplest form: what reaches itself."""
    reach = {name: set(others) & set(graph) for name, others in graph.items()}
    for middle in graph:
        for others in reach.values():
            if middle in others:
                others |= reach[middle]
    return {frozenset({name} | {other for other in reach[name] if name in reach.get(other, ())})
            for name in graph if name in reach[name]}  # fmt: skip


def test_files_import_one_another_in_a_circle():
    graph = {name: others - {"vitfast"} for name, others in GRAPH.items() if name not in FACE}
    # a package's face imports what is in it, which finds the way to its neighbours without it
    assert circles(graph) == set()


def test_benchmarks_import_one_another_in_a_circle():
    graph = {name: imports(path, BENCHMARKS) for name, path in BENCHMARKS.items()}
    assert sum(map(len, graph.values())) > 20 and circles(graph) == set()


def test_a_circle_is_overlooked():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {frozenset("abc")}
    assert circles({"a": {"b"}, "b": set(), "c": {"a", "b"}}) == set()


def test_the_package_itself_holds_more_than_eight_files():
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_import_by_text_hides_an_arrow():
    """An editor follows import statements only. The demo tries other people's packages, and the extension may not be
    there."""
    allowed = {"commands.demo", "kernels.extension"}
    by_text = {name for name, path in MODULES.items() if re.search(r"import_module|__import__", path.read_text())}
    assert by_text == {f"vitfast.{name}" for name in allowed}
    # whoever resolves it
    texts = {
        (name, node.value)
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in MODULES and node.value != "vitfast"
    }
    assert texts == set()


@pytest.mark.parametrize("name", vitfast.__all__)
def test_a_module_takes_the_name_of_something_public(name):
    before = getattr(vitfast, name)
    for found in pkgutil.walk_packages(vitfast.__path__, "vitfast."):
        if not found.name.endswith(("__main__", "._C")):
            importlib.import_module(found.name)
    assert getattr(vitfast, name) is before
    assert name in ("ops", "reference") or not (PACKAGE / name).exists() and not (PACKAGE / f"{name}.py").exists()


@pytest.mark.parametrize("package", [vitfast.ops, vitfast.reference])
def test_a_module_takes_the_name_of_an_op(package):
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(found.name)
    for name in package.__all__:
        assert callable(getattr(package, name)) and not hasattr(getattr(package, name), "__path__"), name


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_another_stem_somewhere(op):
    """Reference, op, kernel for each kind of device, what checks it, its tests, its benchmark."""
    gpu = "cuda" if op == "patch_embed" else "triton"
    for place in ("reference", "ops", f"kernels/{gpu}", "kernels/cpu", "check/families"):
        assert (PACKAGE / place / f"{op}.py").exists(), place
    assert (ROOT / f"tests/kernels/test_{op}.py").exists()
    assert f"\ndef {op}(" in BENCHMARKS["benchmarks.core.ops"].read_text()
    assert hasattr(vitfast.reference, op) and hasattr(vitfast.ops, op)


@pytest.mark.parametrize("op", OPS)
def test_from_block_to_kernel_are_more_than_three_changes_of_file(op):
    """Block, op, launcher, kernel: each imports the next one, or has it as an attribute of what it imports."""
    steps = {
        "attention": ("attention", "triton.attention", "triton.attention_forward"),
        "layer_norm": ("layer_norm", "triton.layer_norm", "triton.layer_norm_rows"),
        "linear": ("linear", "triton.linear", "triton.linear_product"),
        "mlp": ("mlp", "triton.mlp", "triton.mlp_whole"),
        # the kernel is in csrc/cuda, behind the extension
        "patch_embed": ("patch_embed", "cuda.patch_embed"),
    }[op]
    modules = [f"vitfast.ops.{steps[0]}", *(f"vitfast.kernels.{step}" for step in steps[1:])]
    for one, other in zip(modules, modules[1:], strict=False):
        assert other in GRAPH[one], f"{one} does not import {other}"
    assert "vitfast.ops" in GRAPH["vitfast.model.layers"]
    block = MODULES["vitfast.model.patch_embed" if op == "patch_embed" else "vitfast.model.block"].read_text()
    assert op == "layer_norm" or f"self.ops.{op}" in block


def test_changelog_sends_readers_to_a_file_that_is_not_there():
    """Of the map of moved files."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    gone = re.findall(r"`([\w/]+\.py)`", " ".join(was for was, _ in rows))
    new = re.findall(r"`([\w/]+/(?:\w+\.py)?)`", " ".join(now for _, now in rows))
    assert len(gone) > 40 and len(new) > 20
    assert [path for path in new if not (PACKAGE / path).exists() and not (ROOT / path).exists()] == []


# where results are compared by another measure, and why that is another question than whether they are right
OTHER_QUESTIONS = {
    "vitfast.parity.cases": "shows the errors; how large they may be it asks acceptance",
    "vitfast.checkpoints.described": "whether a file's number is the one in a config",
    "vitfast.ops._attention_stock": "whether a backend of torch computes attention at all, or something else",
}
# what a rule of right cannot do without
MEASURES = re.compile(
    r"\b(allclose|isclose|assert_close|[ra]_?tol|rel_tol|abs_tol|TOLERANCE|cosine_similarity|vector_norm|relative_error)\b"
    r"|square\(\)\.mean\(\)\.sqrt|finfo\(\w+\)\.eps"
)


def second_rules(files):
    """Modules in which somebody compares numbers with a measure of their own."""
    return {name for name, path in files.items() if name != "vitfast.check.acceptance" and MEASURES.search(code(path))}


def code(path):
    """Without comments and docstrings, which may speak of it."""
    return ast.unparse(Undocumented().visit(ast.parse(path.read_text())))


class Undocumented(ast.NodeTransformer):
    def visit_Expr(self, node):
        return ast.Pass() if isinstance(node.value, ast.Constant) else node


def test_a_second_rule_says_what_is_right(tmp_path):
    """One rule, `vitfast.check.acceptance`, for parity, warm-up, tuning, benchmarks and reports."""
    found = second_rules(MODULES | BENCHMARKS)
    assert found == OTHER_QUESTIONS.keys()
    for name in OTHER_QUESTIONS:
        assert "acceptance" in MODULES[name].read_text(), f"{name} does not say why"
    for line in ("torch.allclose(a, b)", "bad = (a - b).abs().max() > TOLERANCE", "math.isclose(a, b, rel_tol=1e-3)"):
        path = tmp_path / "other.py"
        path.write_text(f'"""allclose"""\n# rtol\n{line}\n')
        assert second_rules({"vitfast.other": path}), line


def test_a_second_loop_times_in_turns():
    """Who compares two speeds asks `vitfast.measure.timing`; what is sustained or swept has a loop of another kind."""
    clocked = {name for name, path in (MODULES | BENCHMARKS).items() if re.search(r"elapsed_time\(", code(path))}
    assert clocked == {"vitfast.measure.timing", "vitfast.measure.device"}
    users = {name for name, others in GRAPH.items() if "vitfast.measure.timing" in others}
    assert {"vitfast.check.compare", "vitfast.check.measuring", "vitfast.commands.demo"} <= users
    assert "vitfast.check.compare" in GRAPH["vitfast.check.tune"]
    assert "interleaved_medians" in MODULES["vitfast.check.compare"].read_text()
