"""The `vitfast` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence

# commands with a parser of their own, each in a file of its name
ROOMY = {
    "convert": "write weights of any ViT under another library's names, or say whose they are",
    "demo": "train, save, reload, compare and time a small ViT on real digits",
    "parity": "where two models differ first, by how much, and why",
    "tune": "measure which kernels are faster on this GPU, and keep it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 0, 1 for a failed run, 2 for wrong use."""
    parser = argparse.ArgumentParser(prog="vitfast", description="Vision Transformers on kernels of their own.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    info = commands.add_parser("info", help="versions, device, and what runs each op here")
    info.add_argument("--json", action="store_true", help="machine-readable")
    models = commands.add_parser("models", help="which of timm's ViT names work, and what the others need")
    models.add_argument("filter", nargs="?", default="", help="shell pattern, such as '*dinov2*'")
    models.add_argument("--json", action="store_true", help="machine-readable")
    for name, text in ROOMY.items():
        commands.add_parser(name, help=text, add_help=False)
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["bench"]:
        parser.error("bench is no part of the installed package: run `python -m benchmarks` in a checkout of vitfast")
    arguments, rest = parser.parse_known_args(given)
    if arguments.command in ROOMY:
        # what stands behind the command's name is its own
        return _main_of(arguments.command)(given[1:])
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status = _info(arguments) if arguments.command == "info" else _models(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # whoever read our output (head, less) has enough; keep the interpreter from failing once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _main_of(command: str) -> Callable[[Sequence[str]], int]:
    """Each is imported when it is asked for: some take a second."""
    if command == "convert":
        from vitfast.commands.convert import main as found
    elif command == "demo":
        from vitfast.commands.demo import main as found
    elif command == "parity":
        from vitfast.commands.parity import main as found
    else:
        from vitfast.commands.tune import main as found
    return found


def _info(arguments: argparse.Namespace) -> int:
    from vitfast.commands import info

    print(json.dumps(info.collect(), indent=2) if arguments.json else info.report())
    return 0


def _models(arguments: argparse.Namespace) -> int:
    from fnmatch import fnmatchcase

    from vitfast.timm_names.variants import UNSUPPORTED, VARIANTS

    pattern = arguments.filter or "*"
    works = sorted(name for name in VARIANTS if fnmatchcase(name, pattern))
    lacking = {name: UNSUPPORTED[name] for name in sorted(UNSUPPORTED) if fnmatchcase(name, pattern)}
    if arguments.json:
        print(json.dumps({"works": works, "missing_field": lacking}, indent=2))
        return 0
    for name in works:
        print(name)
    width = max(map(len, lacking), default=0)
    for name, field in lacking.items():
        print(f"{name:<{width}}  not available: {field}")
    print(f"{len(works)} work, {len(lacking)} do not")
    return 0


if __name__ == "__main__":
    sys.exit(main())
