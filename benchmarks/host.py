"""What a call costs the host: microseconds an op on next to no numbers, and small models beside timm's, on one thread.

    python -m benchmarks.host [--against FOLDER] [--crossover] [--patched] [--rounds N]

Ops are timed as users call them and, in rows "by op", as ops at sizes where a CPU takes stock operators.
--against   another checkout of vitfast, its extension built in place: the same there, in turn; the table then has
            before, after, and the quotient
--crossover ops beside stock operators from 17 to 788 tokens, from which `vitfast.ops._on_cpu` has its limits
--patched   `vitfast.patch`: what a patched module costs beyond the ops that it calls, and milliseconds of the call
            itself for a ViT-B

Models are compared with timm's by `vitfast.measure.timing.interleaved_medians` after their logits were accepted.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

import vitfast
from benchmarks.core import patched
from vitfast import ops
from vitfast.check import acceptance
from vitfast.choose.exportable import stock_operators
from vitfast.measure import timing

ROOT = Path(__file__).resolve().parents[1]
TOKENS, D, HEADS = 17, 64, 2
SAMPLE_S = 0.01
BY_OP = ", by op"
TINY = dict(img_size=32, patch_size=8, embed_dim=64, depth=6, num_heads=2, num_classes=10)
MODELS = {"tiny (64 wide, 6 blocks, 17 tokens)": TINY, "ViT-Ti/16, 224 px": {}}
NAME = "vit_tiny_patch16_224"


def calls(tokens: int, dim: int, heads: int, training: bool) -> dict[str, Callable]:
    """Each op of [1, tokens, dim] in fp32, with what a block puts around it; with `training` and its backward."""
    weight = lambda *shape: torch.randn(shape).mul_(dim**-0.5).requires_grad_(training)  # noqa: E731
    x, gain, shift = weight(1, tokens, dim), weight(dim), weight(dim)
    wqkv, bqkv, wproj, bproj = weight(3 * dim, dim), weight(3 * dim), weight(dim, dim), weight(dim)
    w1, b1, w2, b2 = weight(4 * dim, dim), weight(4 * dim), weight(dim, 4 * dim), weight(dim)
    qkv, images, patch = weight(1, tokens, 3, heads, dim // heads), torch.randn(1, 3, 32, 32), weight(dim, 3, 8, 8)
    norm = dict(norm="layer", norm_weight=gain, norm_bias=shift)
    forward = {
        "layer_norm": lambda: ops.layer_norm(x, gain, shift, 1e-6),
        "linear, norm": lambda: ops.linear(x, wqkv, bqkv, **norm),
        "linear, residual": lambda: ops.linear(x, wproj, bproj, residual=x),
        "attention_qkv": lambda: ops.attention_qkv(qkv),
        "mlp": lambda: ops.mlp(x, gain, shift, w1, b1, w2, b2),
        "patch_embed": lambda: ops.patch_embed(images, patch),
    }
    return {name: in_mode(call, training) for name, call in forward.items()}


def in_mode(call: Callable, training: bool) -> Callable:
    def run() -> None:
        if training:
            call().sum().backward()
        else:
            with torch.inference_mode():
                call()

    return run


@contextlib.contextmanager
def by_op() -> Iterator[None]:
    """Ops whatever the size, where this vitfast chooses by size."""
    try:
        from vitfast.ops import _on_cpu
    except ImportError:
        yield
        return
    before = _on_cpu.LIMITS, _on_cpu.HOST_BOUND
    _on_cpu.LIMITS, _on_cpu.HOST_BOUND = dict.fromkeys(_on_cpu.LIMITS, 0), 0
    try:
        yield
    finally:
        _on_cpu.LIMITS, _on_cpu.HOST_BOUND = before


def microseconds(call: Callable) -> float:
    """Of one call: the mean over some ten milliseconds."""
    call()
    began, n = time.perf_counter(), 0
    while time.perf_counter() - began < SAMPLE_S:
        call()
        n += 1
    return (time.perf_counter() - began) / n * 1e6


def all_calls() -> dict[str, Callable]:
    found = {}
    for training in (False, True):
        mode = "training" if training else "inference"
        for name, call in calls(TOKENS, D, HEADS, training).items():
            found[f"{name} | {mode}"] = call
            found[f"{name}{BY_OP} | {mode}"] = call
        block = vitfast.create_model(NAME, **TINY).train(training).blocks[0]
        x = torch.randn(1, TOKENS, D)
        found[f"block | {mode}"] = in_mode(lambda block=block, x=x: block(x), training)
    return found


def answer() -> None:
    """A process of `--against`: reads names, writes microseconds."""
    torch.set_num_threads(1)
    found = all_calls()
    print(json.dumps(list(found)), flush=True)
    for line in sys.stdin:
        with by_op() if BY_OP in line else contextlib.nullcontext():
            print(microseconds(found[line.strip()]), flush=True)


def processes(folders: list[Path]) -> list[subprocess.Popen]:
    """One for each checkout, which imports the vitfast there."""
    started = []
    for folder in folders:
        path = {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, __file__, "--answer"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(subprocess.Popen(command, env=os.environ | path, cwd=folder, **pipes))
    return started


def ops_table(folders: list[Path], rounds: int) -> list[str]:
    """Microseconds by op: medians over rounds in which each checkout is asked in turn."""
    started = processes(folders)
    names = [json.loads(process.stdout.readline()) for process in started][-1]
    headings = ["us"] if len(folders) == 1 else ["before, us", "after, us", "before / after"]
    rows = [table_row(["op and mode", *headings])]
    for name in names:
        times: list[list[float]] = [[] for _ in started]
        for _ in range(rounds):
            for process, found in zip(started, times, strict=True):
                process.stdin.write(f"{name}\n")
                process.stdin.flush()
                found.append(float(process.stdout.readline()))
        quotient = statistics.median(before / after for before, after in zip(times[0], times[-1], strict=True))
        cells = [f"{statistics.median(found):.1f}" for found in times]
        rows.append(table_row([name, *cells, f"{quotient:.2f}"][: 1 + len(headings)]))
    for process in started:
        process.stdin.close()
        process.wait()
    return rows


def table_row(cells: list[str]) -> str:
    return f"{cells[0]:<36}" + "".join(f"{cell:>16}" for cell in cells[1:])


def pair(**sizes: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """timm's model and ours with the same weights, whose logits were accepted."""
    theirs, ours = timm.create_model(NAME, **sizes).eval(), vitfast.create_model(NAME, **sizes).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(4, 3, *ours.config.image_size)
    with torch.inference_mode():
        truth = copy.deepcopy(theirs).double()(images.double())
        # rows of as few numbers as these classes differ by luck
        given = [{"logits": logits} for logits in (ours(images), truth, theirs(images))]
        acceptance.accept_stages(*given, typical=acceptance.RMS_RATIO[torch.float32])
    return theirs, ours


def models_table(budget_s: float) -> list[str]:
    """timm's time over ours, within each round of an interleaved comparison; above 1 ours is faster."""
    rows = [table_row(["model of one image, mode", "timm, us", "ours, us", "timm / ours", "quartiles"])]
    for name, sizes in MODELS.items():
        both = dict(zip(("timm", "ours"), pair(**sizes), strict=True))
        images, labels = torch.randn(1, 3, *both["ours"].config.image_size), torch.zeros(1, dtype=torch.int64)
        for mode in ("inference", "training"):
            steps = {
                key: timing.inference(m, images) if mode == "inference" else timing.training_step(m, images, labels)
                for key, m in both.items()
            }
            found = timing.interleaved_medians(steps, budget_s=budget_s, rounds=(20, 100))
            times = [f"{found.median_ms[key] * 1e3:.0f}" for key in both]
            low, high = found.spread["ours"]
            cells = [*times, f"{found.ratio['ours']:.2f}", f"{low:.2f} to {high:.2f}"]
            rows.append(table_row([f"{name}, {mode}", *cells]))
    return rows


def crossover_table() -> list[str]:
    """Time of stock operators over an op's, by numbers in its input: `_on_cpu` takes the former where it is below 1."""
    rows = [table_row(["tokens, width, mode", *calls(1, D, HEADS, False)])]
    for dim, heads in ((64, 2), (192, 3), (384, 6), (768, 12)):
        for tokens in (17, 65, 197, 788):
            for training in (False, True):
                cells = []
                for call in calls(tokens, dim, heads, training).values():
                    both = {"stock": stock_operators_of(call), "op": call}
                    with by_op():
                        ratio = timing.interleaved_medians(both, budget_s=0.5, rounds=(6, 12)).ratio
                    cells.append(f"{ratio['op']:.2f}")
                label = f"{tokens} x {dim} = {tokens * dim:,}, {'training' if training else 'inference'}"
                rows.append(table_row([label, *cells]))
    return rows


def stock_operators_of(call: Callable) -> Callable:
    def run() -> None:
        with stock_operators():
            call()

    return run


class Recorded(NamedTuple):
    """A patched module, what it was called with, and the calls of ops and products in it."""

    module: torch.nn.Module
    args: tuple
    kwargs: dict[str, Any]
    calls: list[Callable[[], Any]]

    def run(self) -> None:
        self.module(*self.args, **self.kwargs)

    def run_ops(self) -> None:
        """Nothing but those calls, each with the tensors of then."""
        for call in self.calls:
            call()


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[Callable[[], Any]]]:
    """Calls of ops, and of products by `nn.Linear`, that are not within one another."""
    found: list[Callable[[], Any]] = []
    within = [False]

    def recording(function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if within[0]:
                return function(*args, **kwargs)
            found.append(partial(function, *args, **kwargs))
            within[0] = True
            try:
                return function(*args, **kwargs)
            finally:
                within[0] = False

        return call

    places = [*((ops, name) for name in ops.__all__), (torch.nn.functional, "linear")]
    before = [getattr(*place) for place in places]
    for place, function in zip(places, before, strict=True):
        setattr(*place, recording(function))
    try:
        yield found
    finally:
        for place, function in zip(places, before, strict=True):
            setattr(*place, function)


def recorded_modules(model: torch.nn.Module, images: torch.Tensor) -> list[Recorded]:
    """The outermost patched modules of a patched model, in the order in which they run. Call it within `by_op`."""
    every = [each for each in model.modules() if "_vitfast" in each.__dict__]
    inner = {id(module) for each in every for module in each.modules() if module is not each}
    outer = [each for each in every if id(each) not in inner]
    seen: list[tuple] = []
    hooks = [
        each.register_forward_pre_hook(lambda *given: seen.append(given) or None, with_kwargs=True) for each in outer
    ]
    with torch.inference_mode():
        model(images)
        for hook in hooks:
            hook.remove()
        found = []
        for module, args, kwargs in seen:
            with recorded_calls() as calls:
                module(*args, **kwargs)
            found.append(Recorded(module, args, kwargs, calls))
    return found


def patched_models(image_size: int | None, depth: int | None, size: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """Those of every library that is here, not yet patched."""
    for name, family in patched.FAMILIES.items():
        if importlib.util.find_spec(family.package) is not None:
            yield family.title, patched.Model(name, size, image_size, depth).network().module.eval()


def patched_table(rounds: int) -> list[str]:
    """Medians over rounds, of an image of 5 tokens: a patched module beside its ops alone and beside its class's."""
    rows = [table_row(["patched module", "stock, us", "patched, us", "its ops, us", "beyond them, us"])]
    for title, model in patched_models(32, 1, "Ti"):
        with by_op(), torch.inference_mode():
            if not vitfast.patch(model).fused:
                rows.append(table_row([f"{title}: nothing is fused"]))
                continue
            for each in recorded_modules(model, torch.randn(1, 3, 32, 32)):
                times: list[tuple[float, ...]] = []
                for _ in range(rounds):
                    vitfast.unpatch(model)
                    stock = microseconds(each.run)
                    vitfast.patch(model)
                    times.append((stock, microseconds(each.run), microseconds(each.run_ops)))
                beyond = statistics.median(ours - of_ops for _, ours, of_ops in times)
                cells = [f"{statistics.median(found):.1f}" for found in zip(*times, strict=True)]
                rows.append(table_row([f"{title} {type(each.module).__name__}", *cells, f"{beyond:.1f}"]))
    return rows


def patching_table(rounds: int) -> list[str]:
    """Milliseconds of `vitfast.patch`; the first call of a process reads the classes' code."""
    rows = [table_row(["vitfast.patch of a ViT-B", "first call, ms", "later, ms", "unpatch, ms"])]
    for title, model in patched_models(None, None, "B"):
        times: list[list[float]] = [[], []]
        for _ in range(rounds + 1):
            for call, found in zip((vitfast.patch, vitfast.unpatch), times, strict=True):
                began = time.perf_counter()
                call(model)
                found.append((time.perf_counter() - began) * 1e3)
        cells = [times[0][0], statistics.median(times[0][1:]), statistics.median(times[1][1:])]
        rows.append(table_row([title, *(f"{ms:.1f}" for ms in cells)]))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="a second checkout of vitfast")
    parser.add_argument("--crossover", action="store_true", help="ops beside stock operators by size, and nothing else")
    parser.add_argument("--patched", action="store_true", help="`vitfast.patch`, and nothing else")
    parser.add_argument("--rounds", type=int, default=15, help="of each op")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each model and mode")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.against and not (given.against / "vitfast" / "__init__.py").is_file():
        parser.error(f"--against must be a checkout of vitfast, got {given.against}")
    if given.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {given.rounds}")
    torch.set_num_threads(1)
    if given.answer:
        answer()
    elif given.crossover:
        print("\n".join(crossover_table()))
    elif given.patched:
        # before anything else has read the classes' code
        print("\n".join(patching_table(given.rounds)), "\n")
        print("\n".join(patched_table(given.rounds)))
    else:
        print("\n".join(ops_table([*([given.against.resolve()] if given.against else []), ROOT], given.rounds)), "\n")
        print("\n".join(models_table(given.seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
