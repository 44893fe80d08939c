"""What ran on a device: which kernels, and what compute-sanitizer says of them."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


class Launches:
    """Counts the kernels that these modules of vitfast.kernels start."""

    def __init__(self, monkeypatch, *modules):
        self.names = []
        for module in modules:
            monkeypatch.setattr(module, "launch", self.counting(module.launch))

    def counting(self, launch):
        def counted(kernel, *rest, **more):
            self.names.append(kernel.fn.__name__)
            launch(kernel, *rest, **more)

        return counted


@functools.cache
def why_no_sanitizer():
    """Why compute-sanitizer says nothing of kernels here, '' where it does: it may be there and not be allowed to."""
    if SANITIZER is None:
        return "there is no compute-sanitizer"
    command = [SANITIZER, "--tool=memcheck", sys.executable, "-c", "import torch; torch.ones(3).cuda().sum().item()"]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"compute-sanitizer does not work: {(done.stdout + done.stderr)[-300:]}"


def sanitized(tool, code):
    """Run `code` under a tool of compute-sanitizer, from which nothing may come."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    # a block of its own for every tensor, with space around it
    environment = os.environ | {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    more = ["--padding=4096"] if tool == "memcheck" else []
    command = [SANITIZER, f"--tool={tool}", *more, "--error-exitcode=9", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
