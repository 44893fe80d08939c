"""One of the processes that `ahead` starts: it compiles what a plan's rows need.

    python benchmarks/ahead_process.py PLAN --record FILE --device DEVICE --claims FOLDER [--tiny]

Each takes a variant that nobody has taken, builds it and calls it once, so that the caches of Triton and inductor have
it. Variants that need much memory are left to the first processes, as many as there is memory for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import workers  # noqa: E402
from gpu_stages import partly  # noqa: E402
from plans import PLANS  # noqa: E402
from stages import Kept, Run, same_keys  # noqa: E402

from vitfast.bench import record  # noqa: E402
from vitfast.bench.case import DTYPES, Case, Variant  # noqa: E402
from vitfast.bench.harness import COMPILERS, SEED  # noqa: E402
from vitfast.measure import device as devices  # noqa: E402

# one that needs more is left to few processes
LIGHT_GIB = 4.0
# of the memory, for such of one size; the rest is for others, and what a process needs before it computes anything
SHARE = 0.5


def compiles(name: str, variant: Variant) -> bool:
    """Not what is compiled in a process of its own, nor what measures while it compiles: others would disturb that."""
    measures = variant.apart is not None or name.endswith("max-autotune")
    return not measures and not variant.missing() and (variant.ours or name.endswith(COMPILERS))


def gib(case: Case) -> float:
    """About what a call needs, of activations: in training those of all blocks are kept."""
    if case.kind != "model" or "tokens" not in case.shape:
        return 0.0
    numbers = case.batch * case.shape["tokens"] * case.shape["dim"]
    # an eager block keeps 17 times its input for its backward
    kept = 17 * case.shape["depth"] if case.mode == "training" else 20
    return numbers * kept * DTYPES[case.dtype].itemsize / 2**30


def cases(plan: str, run: Run) -> Iterator[Case]:
    """Those that are left of a plan, in its order."""
    done = run.record.finished()
    for stage in PLANS[plan]:
        for maker in stage.makers(run) if stage.makers else ():
            try:
                case = partly(maker, run)()
            # whoever times it will say so
            except Exception:
                continue
            if case.key not in done:
                yield case


def call_once(case: Case, variant: Variant) -> None:
    """In every shape in which the harness will call it."""
    try:
        with devices.of(case.device).current():
            function, inputs = variant.build(), case.inputs(torch.Generator(case.device).manual_seed(SEED))
            function(*inputs)
            if not all(case.per_image) and case.batch > case.check_images:
                function(*case.cut(inputs, case.check_images))
            devices.of(case.device).synchronize()
    finally:
        torch._dynamo.reset()
        if case.device.type == "cuda":
            torch.cuda.empty_cache()


def tasks(plan: str, run: Run) -> Iterator[workers.Task]:
    """What there is to compile for this process; who can takes heavy ones first, since few can."""
    cuda = run.device.type == "cuda"
    memory = torch.cuda.get_device_properties(run.device).total_memory / 2**30 if cuda else 1e9
    for case in sorted(cases(plan, run), key=lambda each: gib(each) <= LIGHT_GIB):
        if gib(case) > LIGHT_GIB and workers.number() >= max(1, int(SHARE * memory / gib(case))):
            continue
        for name, variant in case.variants.items():
            if compiles(name, variant):
                yield f"{case.key}: {name}", partial(call_once, case, variant)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan")
    parser.add_argument(workers.FLAG, type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--tiny", action="store_true")
    told = parser.parse_args(argv)
    same_keys()
    from torch._inductor import config as inductor

    # choices between kernels that were timed beside all others are not kept
    inductor.autotune_local_cache = False
    run = Run(told.device, Kept(told.record, record.read(told.record), told.record.parent), 0.0, told.tiny, told.plan)
    workers.work(told.claims, tasks(told.plan, run))


if __name__ == "__main__":
    main()
