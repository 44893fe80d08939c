"""`python -m benchmarks ops`, `models` and `patch`: against what else computes them, on this machine."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.core import ceilings, harness, models, ops, patched, record, steps
from vitfast.check.case import DTYPES
from vitfast.measure import device as devices
from vitfast.measure import machine

PACKAGES = ("torchvision", "flash-attn", "flash-attn-3", "liger-kernel", "onnxruntime", "openvino", "nncf")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where a result of ours was wrong or failed, 2 for wrong use."""
    told = _parser().parse_args(argv)
    try:
        for name in ("seconds", "budget", "ceilings"):
            if not 0 <= getattr(told, name) < math.inf:
                raise ValueError(f"--{name} must be at least 0 and finite, got {getattr(told, name)}")
        device = devices.device_named(told.device)
        cases = [make() for make in _makers(told, device)]
        with tempfile.TemporaryDirectory() as folder:
            path = told.out or Path(folder) / "rows.json"
            kept = record.open_for_resume(path, machine.describe(device, PACKAGES))
            # what cannot be written is to be known before an hour of measuring
            kept.write()
            return _run(told, kept, cases, device)
    except (ValueError, TypeError, ModuleNotFoundError, NotImplementedError, OSError) as problem:
        print(f"benchmarks: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"benchmarks: stopped{f'; {told.out} has all finished rows' if told.out else ''}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time ops or models in turns with their rivals, and check their results. Prints what came out.",
        epilog="A ratio above 1 is faster than the first variant of the row; ~ marks what is within the noise, which "
        "is the first's ratio to itself. Wrong results of vitfast's are not timed, those of rivals are marked.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="ops|models|patch")
    takes = {
        "ops": (f"{', '.join(ops.FACTORIES)}; none: the usual", ops.MODES, ops.MODES),
        "models": (f"timm's, {models.VIT_PYTORCH}; none: the usual", steps.MODES, steps.MODES[:1]),
        "patch": (f"whose models: {', '.join(patched.FAMILIES)}; none: all", steps.MODES, steps.MODES),
    }
    for kind, (what, modes, usual) in takes.items():
        found = kinds.add_parser(kind, epilog=parser.epilog)
        add = found.add_argument
        add("names", nargs="*", help=what)
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
        add("--dtypes", nargs="+", choices=DTYPES, help="(default: bf16, on a CPU fp32)")
        add("--batches", nargs="+", type=_positive, metavar="N", help="images (default: ops 64, on a CPU 8; else 1 8)")
        add("--modes", nargs="+", choices=modes, default=list(usual))
        add("--seconds", type=float, default=2.0, help="how long to time a row (default: %(default)s)")
        add("--budget", type=float, default=3600.0, metavar="SECONDS", help="for all; then it stops")
        add("--ceilings", type=float, default=0.5, metavar="SECONDS", help="to measure each of them, 0: not")
        add("--out", type=Path, metavar="FILE", help="write all numbers here, row by row; goes on with what is there")
        if kind == "ops":
            add("--tokens", nargs="+", type=_positive, metavar="N", default=[197, 257], help="tokens an image")
            add("--tiny", action="store_true", help="one tiny shape each, to see whether all runs")
            continue
        add("--image-size", type=_positive, metavar="PIXELS", help="another size than their own")
        if kind == "patch":
            add("--sizes", nargs="+", choices=patched.SIZES, help="(default: S, of timm and hugging-face B too)")
            add("--parts", choices=patched.SPLITS, default="whole", help="add each part alone, or all without it")
        else:
            add("--rivals", choices=models.GROUPS, default="all", help="which (default: %(default)s)")
            add("--autocast", action="store_true", help="also fp32 weights under autocast")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _makers(told: argparse.Namespace, device: Any) -> Iterator[harness.Maker]:
    gpu = device.type == "cuda"
    common = {"device": str(device), "dtypes": told.dtypes or ["bf16" if gpu else "fp32"], "modes": told.modes}
    if told.kind == "patch":
        if unknown := [name for name in told.names if name not in patched.FAMILIES]:
            raise ValueError(f"{unknown[0]} is not among {', '.join(patched.FAMILIES)}")
        return patched.listed(
            told.names, batches=told.batches or [1, 8], sizes=told.sizes or (), split=told.parts,
            image_size=told.image_size, **common,
        )  # fmt: skip
    if told.kind == "models":
        if told.autocast and set(common["dtypes"]) == {"fp32"}:
            raise ValueError("--autocast computes in half precision: --dtypes must name bf16 or fp16, got fp32 alone")
        return models.listed(
            told.names, batches=told.batches or [1, 8], groups=(told.rivals,), image_size=told.image_size,
            autocast=(False, True) if told.autocast else (False,), **common,
        )  # fmt: skip
    if unknown := [name for name in told.names if name not in ops.FACTORIES]:
        raise ValueError(f"{unknown[0]} is not among {', '.join(ops.FACTORIES)}")
    names, common["batches"] = told.names or list(ops.FACTORIES), told.batches or [64 if gpu else 8]
    return ops.tiny(names, **common) if told.tiny else ops.listed(names, tokens=told.tokens, **common)


def _run(told: argparse.Namespace, kept: record.Record, cases: Sequence[Any], device: Any) -> int:
    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if told.ceilings and not kept.data["ceilings"]:
        kept.data["ceilings"] = ceilings.measure(device, seconds=told.ceilings, widths=(), progress=say)
    try:
        red = harness.run_cases(
            cases, kept, budget_s=told.budget, stage=told.kind, seconds=told.seconds, progress=say
        )  # fmt: skip
    except harness.DeviceLost as lost:
        red = [str(lost)]
    finally:
        _print(kept, [case.key for case in cases])
    for line in red:
        say(f"benchmarks: not timed: {line}")
    return int(bool(red))


def _print(kept: record.Record, keys: Sequence[str]) -> None:
    run, rows = kept.data["run"], {row["key"]: row for row in kept.rows}
    versions = ", ".join(f"{name} {run[name]}" for name in ("vitfast", "torch", "timm") if run.get(name))
    print(f"{run['device']}, {run['threads']} CPU threads, {versions}, commit {run.get('commit')}")
    for key in keys:
        if key in rows:
            print(f"\n{key}")
            for name, said in harness.of_variants(rows[key]):
                print(f"  {name:<24} {said}")
    for skipped in kept.data["skipped"]:
        if skipped.get("key") in keys:
            print(f"\n{skipped['key']}: skipped: {skipped['why']}")
