"""What `import vitfast` costs and touches, and rules for the package's own source text."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vitfast

PACKAGE = Path(vitfast.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
# of what torch's own import takes, which a slower processor lengthens as much: 0.06 here
LIMIT = 0.12


def python(code, *arguments):
    """What `code` prints in a fresh process that finds the same package."""
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n{code}"
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# children of one process that has imported torch, so that torch itself is paid for once; processor time, because a test
# worker beside this one makes the wall clock run on. The first child writes the bytecode that an installed package has:
# where PYTHONDONTWRITEBYTECODE is set, a checkout has none, and compiling its sources takes as long as importing them
TIMED = """
import os, time
start = time.process_time()
import torch
print(time.process_time() - start)
sys.dont_write_bytecode, sys.pycache_prefix = False, sys.argv[1]

for _ in range(5):
    read, write = os.pipe()
    if not os.fork():
        start = time.process_time()
        import vitfast
        os.write(write, repr(time.process_time() - start).encode())
        os._exit(0)
    os.close(write)
    print(os.read(read, 100).decode() or "inf")
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_import_adds_more_than_its_limit_to_torch(tmp_path):
    """Best of five: a busy machine slows some of them down, a slow import all of them."""
    of_torch, *seconds = [float(line) for line in python(TIMED, str(tmp_path)).splitlines()]
    assert len(seconds) == 5
    assert min(seconds) <= LIMIT * of_torch, f"import vitfast took {min(seconds):.3f} s, import torch {of_torch:.3f}"


def test_import_pulls_in_a_package_for_demo_or_tests():
    code = "import torch; before = set(sys.modules); import vitfast; print(*set(sys.modules) - before)"
    added = {name.split(".")[0] for name in python(code).split()}
    heavy = "timm vit_pytorch matplotlib sklearn torchvision transformers peft onnx onnxruntime einops scipy tqdm PIL"
    assert "vitfast" in added and not added & set(heavy.split())


FORWARD_AND_BACKWARD = """
import torch, vitfast
model = vitfast.ViT(image_size=32, patch_size=8, num_classes=10, dim=32, depth=2, heads=2, mlp_dim=64)
model(torch.randn(2, 3, 32, 32)).sum().backward()
print(all(p.grad is not None for p in model.parameters()))
"""


WITHOUT_TRITON = """
import os
from importlib.machinery import PathFinder

class Others:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Others
"""
WITHOUT_KERNELS = """
from vitfast.commands.info import collect, report
print(vitfast.prepare(model.eval())(torch.zeros(1, 3, 32, 32)).shape[1], collect()["triton"]["why"])
report()
for op in ("attention", "linear", "mlp", "layer_norm"):
    with vitfast.backend("kernel", op=op):
        try:
            model(torch.zeros(1, 3, 32, 32))
        except NotImplementedError as problem:
            print(str(problem).partition("cannot run: ")[2])
"""


@pytest.mark.parametrize("interpreted", [False, True])
def test_package_needs_triton(interpreted):
    """Where there is none (CPU-only torch, macOS, Windows) all but its kernels works; these say why they do not."""
    code = WITHOUT_TRITON + f"os.environ['TRITON_INTERPRET'] = '{int(interpreted)}'\n" + FORWARD_AND_BACKWARD
    why = ["triton cannot be imported: No module named 'triton'"] * (4 * interpreted)
    assert python(code + WITHOUT_KERNELS).splitlines() == ["True", "10 triton is not installed", *why]


OLD_TRITON = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import triton.tools.tensor_descriptor
sys.modules["triton.tools.tensor_descriptor"] = None
"""


def test_a_triton_without_what_the_launchers_import_stops_the_stock_operators():
    """Of an older release, which can itself be imported."""
    assert python(OLD_TRITON + FORWARD_AND_BACKWARD) == "True"


# every way in which torch asks for a device or starts CUDA; torch itself may have asked before
NO_DEVICE = """
import torch

def refuse(*args, **kwargs):
    raise AssertionError("a device was asked for")

for name in ("is_available", "device_count", "init", "_lazy_init", "get_device_capability", "get_device_properties",
             "get_device_name", "current_device", "synchronize", "current_stream", "is_bf16_supported", "mem_get_info"):
    setattr(torch.cuda, name, refuse)
for name in ("_cuda_init", "_cuda_getDeviceCount", "_cuda_getDevice"):
    if hasattr(torch._C, name):
        setattr(torch._C, name, refuse)
torch.accelerator.current_accelerator = torch.accelerator.is_available = refuse
import vitfast
import vitfast.commands.main, vitfast.commands.info
print(torch.cuda.is_initialized())
"""


def test_import_asks_for_a_device():
    """A query at import starts CUDA in processes that fork, and fails in containers without a driver."""
    assert python(NO_DEVICE) == "False"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_source_breaks_a_rule(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500, "a file of more than 500 lines"
    tree = ast.parse(text)
    asserts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not asserts, f"assert vanishes under python -O: lines {asserts}"
    assert not re.search(r"\b(torch|np|numpy)\.load\(", text), "weights are read in checkpoints/reading.py"
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert not imported & {"pickle", "dill", "joblib", "marshal", "shelve"}, "unsafe ways to read a file"
