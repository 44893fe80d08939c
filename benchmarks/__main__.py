"""`python -m benchmarks`: ops, models and patched models on this machine, or one of the larger programs by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from benchmarks.core import cli

# each is called with what follows its name
PROGRAMS = {
    "gpu": ("benchmarks.gpu.run", "a plan of benchmarks and tests, of a GPU or a CPU"),
    "defaults": ("benchmarks.gpu.defaults", "the built-in choices, from the records of sweeps"),
    "roofline": ("benchmarks.roofline", "the least time that each op and model can take"),
    "estimate": ("benchmarks.estimate", "what kernels should take on Hopper, pipe by pipe, beside what was measured"),
    "launches": ("benchmarks.launches", "what starting kernels costs the host, without a GPU"),
    "host": ("benchmarks.host", "what a call costs the host, beside another checkout and timm"),
}


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else list(argv)
    if given and given[0] in PROGRAMS:
        return importlib.import_module(PROGRAMS[given[0]][0]).main(given[1:])
    if not given or given[0] in ("-h", "--help"):
        print("\n".join(f"python -m benchmarks {name:<10} {what}" for name, (_, what) in PROGRAMS.items()))
    return cli.main(given)


if __name__ == "__main__":
    sys.exit(main())
