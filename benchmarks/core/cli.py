"""`vitfast bench`: ops and models against what else computes them, on this machine."""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vitfast.bench import ceilings, harness, models, op_rows, ops, record
from vitfast.bench.case import DTYPES, Case
from vitfast.bench.op_case import MODES as OP_MODES
from vitfast.bench.steps import MODES as MODEL_MODES
from vitfast.measure import device as devices
from vitfast.measure import machine

# module, and what pip calls it
PACKAGES = {
    "timm": "timm", "torchvision": "torchvision", "transformers": "transformers", "vit_pytorch": "vit-pytorch",
    "flash_attn": "flash-attn", "flash_attn_interface": "flash-attn-3", "liger_kernel": "liger-kernel",
    "onnxruntime": "onnxruntime", "openvino": "openvino",
}  # fmt: skip
# share of the CPUs' time that other processes may take before a row says so
OTHERS = 0.03
HEADER = "| row | variant | ms (20-80 %) | ratio (25-75 %) | TFLOP/s | GB/s | % of ceiling | error | |"

Row = Mapping[str, Any]


class WrongUse(Exception):
    """What the user asked for is not possible; the message says what is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where a result of ours was wrong or failed, 2 for wrong use."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.list:
            print("\n".join(_possible()))
            return 0
        return _run(arguments)
    except WrongUse as error:
        print(f"vitfast bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = arguments.resume or arguments.json
        print(f"vitfast bench: stopped{f'; {kept} has all finished rows' if kept else ''}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitfast bench",
        description="Time ops and models in turns with their rivals, and check their results. Prints a table.",
        epilog="A ratio above 1 is faster than the first variant of the row; ~ marks what is within the noise, which "
        "is the first's ratio to itself. Wrong results of vitfast's are not timed, those of rivals are marked.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--op", nargs="*", metavar="OP", help=f"of {', '.join(ops.FACTORIES)}; none: all")
    what.add_argument("--model", nargs="*", metavar="NAME", help="timm's names, or vit-pytorch; none: the usual ViTs")
    what.add_argument("--list", action="store_true", help="what can be timed here, and which rivals are installed")
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    add("--dtypes", nargs="+", metavar="DTYPE", help=f"of {', '.join(DTYPES)} (default: bf16, on a CPU fp32)")
    add("--batches", nargs="+", type=int, metavar="N", help="images (default: ops 64, on a CPU 8; models 1 8)")
    both = f"ops {', '.join(OP_MODES)}; models {', '.join(MODEL_MODES)}"
    add("--modes", nargs="+", metavar="MODE", help=f"of {both} (default: ops both, models inference)")
    add("--tokens", nargs="+", type=int, metavar="N", help="ops: tokens an image (default: 197 257)")
    add("--widths", nargs="+", type=int, metavar="N", help="ops but attention: width of a token (default: five)")
    add("--image-size", type=int, metavar="PIXELS", help="models: another size than their own")
    add("--autocast", action="store_true", help="models: also fp32 weights under autocast")
    add("--rivals", choices=models.GROUPS, default="all", help="models: which (default: %(default)s)")
    add("--tiny", action="store_true", help="ops: one tiny shape each, to see whether all runs")
    add("--seconds", type=float, default=2.0, help="how long to time a row (default: %(default)s)")
    add("--budget", type=float, default=math.inf, metavar="SECONDS", help="for all; then it stops")
    add(
        "--ceilings", type=float, default=0.5, metavar="SECONDS",
        help="how long to measure each ceiling, 0: not (default: %(default)s)",
    )  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all numbers here, row by row")
    add("--csv", type=Path, metavar="FILE", help="write tables with timm's columns next to this name")
    add("--resume", type=Path, metavar="FILE", help="go on with this --json file")
    return parser


def _run(told: argparse.Namespace) -> int:
    if told.json and told.resume:
        raise WrongUse("--json and --resume name one file: give only one of them")
    if told.json and told.json.exists():
        raise WrongUse(f"--json {told.json} exists; to go on with it: --resume {told.json}")
    for name in ("seconds", "budget", "ceilings"):
        if not getattr(told, name) >= 0:
            raise WrongUse(f"--{name} must be 0 or more, got {getattr(told, name)}")
    device = _device(told.device)
    cases = list(_cases(told, device))
    run = machine.describe(device, packages=tuple(PACKAGES.values()))
    with tempfile.TemporaryDirectory() as folder:
        path = told.resume or told.json or Path(folder) / "rows.json"
        try:
            kept = record.open_for_resume(path, run) if told.resume else record.Record(path, run)
        except ValueError as error:
            raise WrongUse(f"--resume {error}") from None
        if told.ceilings and not kept.data["ceilings"]:
            kept.data["ceilings"] = ceilings.measure(
                device, seconds=told.ceilings, widths=(), dtypes=tuple({case.dtype for case in cases}),
                progress=lambda text: print(text, file=sys.stderr),
            )  # fmt: skip
        try:
            red = harness.run_cases(
                cases, kept, budget_s=told.budget, stage="vitfast bench", seconds=told.seconds, progress=_Progress()
            )
        except harness.DeviceLost as lost:
            red = [str(lost)]
        finally:
            _print(kept, [case.key for case in cases])
        if told.csv:
            for file in record.write_csv(kept.data, told.csv):
                print(f"written: {file}", file=sys.stderr)
    for line in red:
        print(f"vitfast bench: not timed: {line}", file=sys.stderr)
    return int(bool(red))


def _device(name: str) -> torch.device:
    try:
        return devices.device_named(name)
    except ValueError as error:
        raise WrongUse(f"--device: {error}") from None


def _cases(told: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """The rows asked for, made.

    Raises:
        WrongUse: something asked for is not possible.
    """
    if told.op is None and told.model is None:
        raise WrongUse("give --op [OP ...] or --model [NAME ...]; --list tells what there is")
    of_ops = told.op is not None
    gpu = device.type == "cuda"
    modes = told.modes or (OP_MODES if of_ops else MODEL_MODES[:1])
    _among("--modes", modes, OP_MODES if of_ops else MODEL_MODES)
    dtypes = told.dtypes or (["bf16"] if gpu else ["fp32"])
    _among("--dtypes", dtypes, DTYPES)
    batches = told.batches or ([64 if gpu else 8] if of_ops else [1, 8])
    common = {"device": str(device), "dtypes": dtypes, "batches": batches, "modes": modes}
    try:
        if of_ops:
            _among("--op", told.op, ops.FACTORIES)
            names = told.op or list(ops.FACTORIES)
            if told.tiny:
                makers = op_rows.tiny(names, **common)
            else:
                makers = op_rows.listed(names, tokens=told.tokens or (197, 257), widths=told.widths, **common)
        else:
            _need_timm(told.model)
            autocast = (False, True) if told.autocast else (False,)
            makers = models.listed(
                told.model, groups=(told.rivals,), autocast=autocast, image_size=told.image_size, **common
            )
        made = [make() for make in makers]
    except (ValueError, TypeError, NotImplementedError) as error:
        raise WrongUse(str(error)) from None
    yield from made


def _need_timm(names: Sequence[str]) -> None:
    wanted = [name for name in names if name in models.CNNS]
    if wanted and importlib.util.find_spec("timm") is None:
        raise WrongUse(f"{', '.join(wanted)} needs timm: pip install timm")


def _among(option: str, given: Sequence[str], allowed: Sequence[str] | Mapping[str, Any]) -> None:
    wrong = [name for name in given if name not in allowed]
    if wrong:
        raise WrongUse(f"{option}: {', '.join(wrong)} is not among {', '.join(allowed)}")


def _possible() -> Iterator[str]:
    yield f"ops:     {', '.join(ops.FACTORIES)}"
    yield f"         --modes {' '.join(OP_MODES)}; --tokens {' '.join(map(str, op_rows.IMAGES))} or others"
    yield f"models:  {', '.join(models.VITS)} and whatever `vitfast models` lists, {models.VIT_PYTORCH},"
    yield f"         {', '.join(models.CNNS)}; --modes {' '.join(MODEL_MODES)}"
    yield f"dtypes:  {', '.join(DTYPES)}"
    yield "rivals:"
    for module, name in PACKAGES.items():
        there = importlib.util.find_spec(module) is not None
        yield f"         {name:<14} {(machine.version(name) or 'installed') if there else 'not installed'}"


class _Progress:
    """Prints what the harness says; where there is no budget, with about how long the rest takes."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.began = clock, clock()

    def __call__(self, text: str) -> None:
        if at := re.search(r"(\d+)/(\d+), inf s left", text):
            done, rows = int(at[1]), int(at[2])
            left = (self.clock() - self.began) / done * (rows - done)
            text = text.replace("inf s left", f"about {left:.0f} s left")
        print(text, file=sys.stderr, flush=True)


def _print(kept: record.Record, keys: Sequence[str]) -> None:
    rows = {row["key"]: row for row in kept.rows}
    run = kept.data["run"]
    versions = ", ".join(f"{name} {run[name]}" for name in ("vitfast", "torch", "timm") if run.get(name))
    print(f"{run['device']}, {run['threads']} CPU threads, {versions}, commit {run.get('commit')}")
    print(f"\n{HEADER}\n" + "|---" * (HEADER.count("|") - 1) + "|")
    for key in keys:
        if key in rows:
            print("\n".join(lines(rows[key])))
    for skipped in kept.data["skipped"]:
        if skipped.get("key") in keys:
            print(f"| {skipped['key']} | skipped: {_cell(skipped['why'])} |" + " |" * 7)


def lines(row: Row) -> Iterator[str]:
    """The lines of a row in the table, one a variant."""
    shape = " ".join(f"{name} {size}" for name, size in row["shape"].items())
    autocast = " autocast" if row["autocast"] else ""
    title = f"{row['name']} {row['mode']}, {shape}, batch {row['batch']}, {row['dtype']}{autocast}"
    for name, found in row["variants"].items():
        yield "| " + " | ".join([title, name, *_cells(row, name, found)]) + " |"
        title = ""


def _cells(row: Row, name: str, found: Row) -> list[str]:
    if "ms" not in found:
        absent = found.get("absent")
        return [_cell(absent or found.get("not_timed", "not timed"))] + [""] * 6
    time_ms = f"{found['ms']:.4g}"
    if "ms_20" in found:
        time_ms += f" ({found['ms_20']:.4g}-{found['ms_80']:.4g})"
    if name == row["baseline"]:
        ratio = "" if row.get("noise_25") is None else f"1 (noise {row['noise_25']:.2f}-{row['noise_75']:.2f})"
    elif found.get("ratio") is None:
        ratio = ""
    else:
        sign = "~" if found.get("within_noise") else ""
        ratio = f"{sign}{found['ratio']:.2f} ({found['ratio_25']:.2f}-{found['ratio_75']:.2f})"
    percent = "" if found.get("percent") is None else f"{found['percent']:.2g} ({found['limit']})"
    error = "" if found.get("error_ratio") is None else f"{found['error_ratio']:.2f}"
    marks = {
        "not accepted": found.get("accepted") is False,
        "not checked": found.get("accepted") is None and not found.get("part"),
        "a part of it": found.get("part"),
        "graph": found.get("graph"),
        "bound by the host": found.get("host_bound"),
        f"ready after {found.get('compile_s', 0):.0f} s": found.get("compile_s", 0) >= 1,
    }
    if name == row["baseline"]:
        others = row.get("others") or 0
        marks[f"{row.get('noisy')} of {row.get('rounds')} rounds noisy"] = row.get("noisy")
        marks[f"{others:.0%} of the CPUs used by others"] = others > OTHERS
    told = ", ".join(mark for mark, holds in marks.items() if holds)
    return [time_ms, ratio, _number(found, "tflops"), _number(found, "gbps"), percent, error, told]


def _number(found: Row, name: str) -> str:
    return "" if found.get(name) is None else f"{found[name]:.3g}"


def _cell(text: str) -> str:
    return text.removeprefix("NotImplementedError: ").replace("|", "/").splitlines()[0]
