"""Digests of the forwards of the installed libraries: `python -m tests.forward_digests` adds them to what is known.

Only after the tests passed with these versions: a digest says that this code was read and tested.
"""

import importlib
import json
from pathlib import Path

import vitfast.patching.patch
from vitfast.patching.known import LIBRARIES, digest_of

FILE = Path(vitfast.patching.__file__).parent / "digests.json"


def class_named(name):
    """The class 'module.Class', None where the library that is installed has none."""
    module, _, of_class = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), of_class, None)
    except ImportError:
        return None


def installed():
    """'module.Class' -> digest, of those that are installed."""
    kinds = {name: class_named(name) for name in LIBRARIES}
    return {name: digest_of(kind, LIBRARIES[name]) for name, kind in kinds.items() if kind is not None}


def main():
    digests = json.loads(FILE.read_text())
    for name, digest in installed().items():
        digests[name] = sorted({*digests.get(name, []), digest})
    FILE.write_text(json.dumps(dict(sorted(digests.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
