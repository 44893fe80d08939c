"""Run a plan of benchmarks: a, b, c and d for a GPU, each over within nine minutes by itself, and cpu.

    python benchmarks/run.py a|b|c|d|cpu [--out FOLDER] [--resume] [--device DEVICE] [--limit SECONDS] [--tiny]

a    the extension, the ceilings, the tests that need a GPU, ops
b    whole models: everybody's eager, then compiled ones
c    the rest: larger images, autocast, remaining compiled models
d    the linear layers and MLPs of a block against what a compiler finds that tries everything
cpu  ceilings, models and ops against what people would use instead

Needs nothing but this source tree and a python with torch: no network, nothing installed. Stages come in order of
value, each with a budget; what one leaves goes to the next ones, and what does not fit is listed as skipped. All
numbers are in <out>/<device>-<run>.json after every row, so a run cut short has kept them; --resume goes on with it,
and without it an earlier record gets the suffix .before.
--tiny runs every stage on small sizes, on any device, to see whether all works.

Compilers keep their results in $VITFAST_CACHE_DIR (~/.cache/vitfast), in a folder named after device and versions.
Exit status: 0; 1 where a test failed or a result of ours was wrong, after everything else ran; 2 for wrong use; 3 where
the device was lost or the time was up in the middle of something.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# a plain copy of the source tree is not installed
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from report import slug  # noqa: E402

from vitfast.bench import ceilings, harness, machine, models, op_rows, record  # noqa: E402
from vitfast.bench import device as devices  # noqa: E402
from vitfast.bench.case import Case  # noqa: E402
from vitfast.info import cpu_name  # noqa: E402
from vitfast.timing import Sampler  # noqa: E402

# of nine minutes, less what it takes until this line and to write the last files
LIMITS_S = {"a": 515.0, "b": 515.0, "c": 515.0, "d": 515.0, "cpu": 2400.0}
# for what cannot be interrupted when the time is up
GRACE_S = 8.0
LEAST_S = 2.0
LOG_BYTES = 4 << 20
# images of a row of ops, and of a training step
BATCH = 64
# of the ops that a block is made of, whose kernels are meant for many rows
BLOCK_BATCH = 256
SMALL_AND_BASE = ("vit_small_patch16_224", "vit_base_patch16_224")
TINY_AND_LARGE = ("vit_tiny_patch16_224", "vit_large_patch16_224")
# measured first: what the package is about, then what may become a kernel's next width
OPS = ("attention", "mlp", "linear", "layer_norm", "add_layer_norm", "patch_embed")
BLOCK, BLOCK_WIDTHS = ("linear", "mlp", "layer_norm"), (768, 384, 1024)

# the files with tests that take every device; others may import what is not there
GPU_TESTS = ("kernels", "test_ops.py", "test_devices.py")
NO_TESTS = 5  # pytest's exit status

Makers = Iterable[Callable[[], Case]]


@dataclass
class Run:
    """What stages share.

    Attributes:
        ends: when the run has to be over, by time.perf_counter.
        tiny: small sizes only.
    """

    device: torch.device
    record: record.Record
    ends: float
    tiny: bool
    out: Path
    name: str

    def seconds(self, kind: str) -> float:
        """How long to time a row."""
        if self.tiny:
            return 0.05
        if self.device.type != "cuda":
            return 5.0
        return 0.5 if kind == "op" else 1.0

    def note(self, what: str, value: Any) -> None:
        self.record.data["run"][what] = value
        self.record.write()


@dataclass(frozen=True)
class Stage:
    """A part of a run: `work(run, budget_s)` returns what of ours failed, a line each."""

    name: str
    budget_s: float
    work: Callable[[Run, float], list[str]]


def extension(run: Run, budget_s: float) -> list[str]:
    """Build the extension in place, unless it is there; without it ops run on stock operators, which is no failure."""
    if run.tiny or (ROOT / "vitfast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists():
        return []
    if run.device.type == "cuda":
        # for this card only: a third of the time
        capability = torch.cuda.get_device_capability(run.device)
        arch = "90a" if capability == (9, 0) else "{}{}".format(*capability)
        os.environ.setdefault("VITFAST_CUDA_ARCHS", arch)
    status, seconds, text = started([sys.executable, "setup.py", "build_ext", "--inplace"], budget_s, run)
    told = [line for line in text.splitlines() if line.startswith("vitfast:")]
    run.note("extension", {"status": status, "seconds": seconds, "told": told[-1] if told else text[-300:]})
    print(run.record.data["run"]["extension"])
    return [] if status == 0 else [f"the extension was not built: {text[-300:]}"]


def measure_ceilings(run: Run, budget_s: float) -> list[str]:
    if run.record.data["ceilings"]:
        return []
    sizes = {"size": 256, "widths": (64,), "batch": 1} if run.tiny else {}
    seconds = 0.01 if run.tiny else min(2.0, budget_s / 14)
    run.record.data["ceilings"] = ceilings.measure(run.device, seconds=seconds, progress=say, **sizes)
    run.record.write()
    return []


def gpu_tests(run: Run, budget_s: float) -> list[str]:
    """The tests marked gpu. Only on another device may there be none."""
    log, noted, failed = run.out / f"{run.name}-tests.txt", {}, []
    chosen = {"test_numerics.py": ["-k", "stock_op"]} if run.tiny else dict.fromkeys(GPU_TESTS, ["-m", "gpu"])
    log.write_text("")
    left = budget_s
    # most of the time kernels are compiled
    parallel = ["-n", "6"] if importlib.util.find_spec("xdist") and not run.tiny else []
    # a process each: after a fault in a kernel nothing works any more in the process that it happened in
    for name, marks in chosen.items():
        command = [
            sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider",
            *marks, *(parallel if name == "kernels" else []), f"tests/{name}",
        ]  # fmt: skip
        status, seconds, text = started(command, left, run)
        left = max(left - seconds, LEAST_S)
        with log.open("a") as file:
            file.write(text[-LOG_BYTES // len(chosen) :])
        lines = text.strip().splitlines() or ["it printed nothing"]
        noted[name] = {"status": status, "seconds": seconds, "last": lines[-1]}
        say(f"tests/{name}: {lines[-1]}")
        if status != 0 and (status != NO_TESTS or run.device.type == "cuda"):
            failed.append(f"tests/{name}: {'out of time' if status is None else lines[-1]}; see {log.name}")
    run.note("tests", noted)
    return failed


class Hasty(devices.Cpu):
    """No pauses and short samples: nobody looks at the times of small sizes."""

    def sampler(self) -> Sampler:
        sampler = super().sampler()
        sampler.pause_s, sampler.min_ms = 0.0, 0.5
        return sampler


def rows(makers: Callable[[Run], Makers], run: Run, budget_s: float, name: str) -> list[str]:
    seconds = run.seconds("op" if name.startswith("ops") else "model")
    place = Hasty() if run.tiny and run.device.type == "cpu" else None
    return harness.run_cases(
        makers(run), run.record, budget_s=budget_s, stage=name, seconds=seconds, place=place, progress=say
    )


def started(command: list[str], limit_s: float, run: Run) -> tuple[int | None, float, str]:
    """Exit status, None where the time was up, seconds, and what it printed."""
    log = run.out / f".{run.name}.log"
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text(errors="replace")
    log.unlink()
    return status, time.perf_counter() - began, text


# rows

# what names of variants end in that take most of the time of a row to get ready
COMPILERS = ("compiled", "max-autotune")


def without(maker: Callable[[], Case], *endings: str) -> Callable[[], Case]:
    """The case without variants whose names end so."""

    def make() -> Case:
        case = maker()
        left = {name: variant for name, variant in case.variants.items() if not name.endswith(endings)}
        return replace(case, variants=left)

    return make


def block(run: Run) -> Iterator[Callable[[], Case]]:
    """What a block is made of, at the widths of ViT-B, S and L: many images, then one. A compiler at the first only."""
    listed = partial(op_rows.listed, device=str(run.device), dtypes=["bf16"], tokens=(197,))
    if run.tiny:
        for maker in op_rows.tiny(BLOCK[:1], device=str(run.device), dtypes=["fp32"], batches=[1], modes=["forward"]):
            yield without(maker, *COMPILERS)
        return
    for batches, modes in (([BLOCK_BATCH], op_rows.MODES), ([1], op_rows.MODES[:1])):
        for width, mode in ((w, m) for m in modes for w in BLOCK_WIDTHS):
            with_compiler = width == BLOCK_WIDTHS[0] and mode == "forward" and batches != [1]
            for maker in listed(BLOCK, batches=batches, modes=[mode], widths=[width]):
                yield without(maker, *(COMPILERS[1:] if with_compiler else COMPILERS))


def autotuned(run: Run, batch: int, mode: str = "forward") -> Iterator[Callable[[], Case]]:
    """The products of a block, with compilers."""
    if run.tiny:
        # any shape that the other stages do not have
        yield from op_rows.tiny(BLOCK[:1], device=str(run.device), dtypes=["fp32"], batches=[2 + batch], modes=[mode])
        return
    yield from op_rows.listed(
        BLOCK[:2], device=str(run.device), dtypes=["bf16"], batches=[batch], modes=[mode], tokens=(197,),
        widths=BLOCK_WIDTHS,
    )  # fmt: skip


def ops(run: Run, *, first: bool) -> Iterator[Callable[[], Case]]:
    """Short sequences at all widths, or with `first` False the longer ones; what `block` has not."""
    listed = partial(op_rows.listed, device=str(run.device), dtypes=["bf16"], batches=[BATCH])
    if run.tiny:
        names, mode = (OPS, "forward") if first else (OPS[:1], "forward+backward")
        yield from op_rows.tiny(names, device=str(run.device), dtypes=["fp32"], batches=[2], modes=[mode])
        return
    if not first:
        yield from listed(("attention",), tokens=(577, 1025, 1370))
        for maker in listed(OPS[1:], tokens=(577, 1025, 1370), widths=(768,)):
            yield without(maker, *COMPILERS)
        return
    yield from listed(("attention",), tokens=(197, 257))
    for mode in op_rows.MODES:
        for maker in listed(OPS[4:], tokens=(197,), widths=(768,), modes=[mode]):
            yield maker if mode == "forward" else without(maker, *COMPILERS)
        others = (OPS[1:], 197, (192, 1280)), (OPS[4:], 197, (384, 1024)), (OPS[1:], 257, (1280,))
        for names, tokens, widths in others:
            for maker in listed(names, tokens=(tokens,), widths=widths, modes=[mode]):
                yield without(maker, *COMPILERS)


def whole(
    run: Run, names: Iterable[str], batches: Iterable[int], group: str = "eager", mode: str = "inference", *,
    dtypes: Iterable[str] = ("bf16",), autocast: bool = False, image_size: int | None = None,
    autotune_s: float = 120.0,
) -> Makers:  # fmt: skip
    depth = None
    if run.tiny:
        names = ["vit_tiny_patch16_224" if name.startswith("vit_") else name for name in list(names)[:1]]
        image_size, depth, batches = 32, 2, [2]
    return models.listed(
        list(names), device=str(run.device), dtypes=list(dtypes), batches=list(batches), modes=[mode], groups=[group],
        autocast=[autocast], image_size=image_size, depth=depth, autotune_s=autotune_s,
    )  # fmt: skip


def eager(run: Run) -> Iterator[Callable[[], Case]]:
    yield from whole(run, ("vit_base_patch16_224",), (64, 1, 256, 8))
    yield from whole(run, ("vit_small_patch16_224", "vit_large_patch16_224", "vit_tiny_patch16_224"), (64, 1, 256, 8))


def compiled(run: Run, names: Iterable[str], batches: Iterable[int], **options: Any) -> Iterator[Callable[[], Case]]:
    """Each batch by the mode that is meant for it: graphs where the host would be the limit, none where not."""
    for batch in batches:
        for maker in whole(run, names, (batch,), "compiled", **options):
            yield without(maker, " compiled" if batch <= 8 else " reduce-overhead")


def larger(run: Run, group: str = "eager") -> Iterator[Callable[[], Case]]:
    yield from whole(run, ("vit_base_patch16_224",), (64, 1), group, image_size=384)
    yield from whole(run, ("vit_small_patch14_dinov2",), (64, 1), group, image_size=518)


def ops_on_cpu(run: Run) -> Iterator[Callable[[], Case]]:
    if run.tiny:
        yield from op_rows.tiny(OPS[:1], device="cpu", dtypes=["fp32"], batches=[1])
        return
    common = dict(device="cpu", dtypes=["bf16", "fp32"], batches=[8], tokens=(197,), modes=["forward"])
    yield from op_rows.listed(("attention",), heads={64: 12}, **common)
    yield from op_rows.listed(OPS[1:], widths=(768,), **common)


def rest_compiled(run: Run) -> Iterator[Callable[[], Case]]:
    yield from compiled(run, SMALL_AND_BASE[::-1], (256, 8))
    yield from compiled(run, TINY_AND_LARGE, (64, 1, 256))


def models_stage(name: str, budget_s: float, makers: Callable[[Run], Makers]) -> Stage:
    return Stage(name, budget_s, partial(rows, makers, name=name))


def train(*names: str, **options: Any) -> Callable[[Run], Makers]:
    return lambda run: whole(run, names, (BATCH,), mode="training", **options)


EXTENSION = Stage("extension", 60, extension)
CEILINGS = Stage("ceilings", 40, measure_ceilings)
PLANS: dict[str, tuple[Stage, ...]] = {
    "a": (
        EXTENSION,
        CEILINGS,
        Stage("tests", 190, gpu_tests),
        models_stage("ops of a block", 85, block),
        models_stage("ops, short", 90, partial(ops, first=True)),
        models_stage("ops, long", 50, partial(ops, first=False)),
    ),
    "b": (
        CEILINGS,
        models_stage("models", 110, eager),
        models_stage("training", 45, train(*reversed(SMALL_AND_BASE), *TINY_AND_LARGE)),
        models_stage("networks of convolutions", 20, lambda run: whole(run, models.CNNS, (64, 256, 1))),
        models_stage("compiled", 125, lambda run: compiled(run, SMALL_AND_BASE[::-1], (64, 1))),
        models_stage(
            "autotuned", 175, lambda run: whole(run, SMALL_AND_BASE[1:], (256, 1), "autotuned", autotune_s=150.0)
        ),
    ),
    "c": (
        CEILINGS,
        models_stage("larger images", 60, larger),
        models_stage("autocast", 60, lambda run: whole(run, reversed(SMALL_AND_BASE), (64, 1), autocast=True)),
        models_stage("training with autocast", 50, train(*reversed(SMALL_AND_BASE), autocast=True)),
        models_stage("training, compiled", 80, train(*reversed(SMALL_AND_BASE), group="compiled")),
        models_stage("compiled, the rest", 100, rest_compiled),
        models_stage("larger images, compiled", 60, partial(larger, group="compiled")),
        models_stage("vit-pytorch", 40, lambda run: whole(run, (models.VIT_PYTORCH,), (64, 1))),
    ),
    "d": (
        CEILINGS,
        models_stage("ops of a block, autotuned", 210, partial(autotuned, batch=BLOCK_BATCH)),
        models_stage("ops of a block, autotuned, one image", 90, partial(autotuned, batch=1)),
        models_stage(
            "ops of a block, autotuned, backward", 175, partial(autotuned, batch=BLOCK_BATCH, mode="forward+backward")
        ),
    ),
    "cpu": (
        CEILINGS,
        models_stage(
            "models", 1200, lambda run: whole(run, SMALL_AND_BASE, (1, 8), "all", dtypes=("bf16", "fp32"))
        ),
        models_stage("ops", 360, ops_on_cpu),
        models_stage(
            "training", 200,
            lambda run: whole(run, SMALL_AND_BASE[:1], (8,), mode="training", dtypes=("bf16", "fp32")),
        ),
        models_stage("networks of convolutions", 200, lambda run: whole(run, models.CNNS, (8, 1), dtypes=("fp32",))),
    ),
}  # fmt: skip


def go(plan: Iterable[Stage], run: Run, clock: Callable[[], float] = time.perf_counter) -> list[str]:
    """Run the stages; each has its budget and what those before it left, as far as the run's time goes.

    Returns:
        What of ours failed.
    """
    failed, saved = [], 0.0
    for stage in plan:
        began = clock()
        budget = min(stage.budget_s + saved, run.ends - began)
        if budget < LEAST_S:
            run.record.skip(stage.name, [f"all of {stage.name}"], harness.NO_TIME_LEFT)
            say(f"{stage.name}: skipped, {harness.NO_TIME_LEFT}")
            continue
        say(f"{stage.name}: {budget:.0f} s of {run.ends - began:.0f}")
        failed += stage.work(run, budget)
        saved += stage.budget_s - (clock() - began)
    return failed


def end_at(seconds: float, path: Path, last: Callable[[], Any] = lambda: None) -> threading.Timer:
    """End this process then, whatever it is doing, after `last`: its file has all finished rows."""

    def end() -> None:
        with contextlib.suppress(Exception):
            last()
        print(f"run: the time is up; {path} has all finished rows", file=sys.stderr, flush=True)
        os._exit(3)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def keep_caches(device: torch.device) -> None:
    """Let compilers keep what they made, apart for each device and set of versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    key = slug(f"{name} torch {torch.__version__} triton {machine.version('triton')}")
    folder = Path(os.environ.get("VITFAST_CACHE_DIR", "~/.cache/vitfast")).expanduser() / key
    for variable, part in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(variable, str(folder / part))


def say(text: str) -> None:
    print(text, flush=True)


def main(argv: list[str] | None = None) -> int:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=PLANS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--resume", action="store_true", help="go on with the file that is there")
    parser.add_argument("--device", help="(default: cuda, of the plan cpu: cpu)")
    parser.add_argument("--limit", type=float, help=f"seconds for all (default: {LIMITS_S})")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see whether everything works")
    told = parser.parse_args(argv)
    device = torch.device(told.device or ("cpu" if told.run == "cpu" else "cuda"))
    limit = LIMITS_S[told.run] if told.limit is None else told.limit
    if device.type == "cuda" and not torch.cuda.is_available():
        print("run: torch finds no GPU here, `vitfast info` says why; --device cpu --tiny tries it", file=sys.stderr)
        return 2
    keep_caches(device)
    made = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    name = slug(f"{made} {told.run}")
    path = told.out / f"{name}.json"
    if not told.resume and (before := record.set_aside(path)):
        say(f"an earlier record is now {before}")
    told.out.mkdir(parents=True, exist_ok=True)
    try:
        kept = record.open_for_resume(path, machine.describe(device, ("torchvision", "liger-kernel", "flash-attn")))
    except ValueError as problem:
        print(f"run: {problem}", file=sys.stderr)
        return 2
    kept.write()
    run = Run(device, kept, began + limit, told.tiny, told.out, name)

    def write_tables() -> None:
        record.write_csv(kept.data, told.out / f"{name}.csv")

    timer = end_at(limit + GRACE_S, path, write_tables)
    lost = False
    try:
        failed = go(PLANS[told.run], run)
    except harness.DeviceLost as problem:
        failed, lost = [str(problem)], True
    timer.cancel()
    write_tables()
    for line in failed:
        print(f"run: {line}", file=sys.stderr)
    skipped = len(kept.data["skipped"])
    say(f"{path}: {len(kept.rows)} rows, {skipped} skipped, {time.perf_counter() - began:.0f} s")
    return 3 if lost else int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
