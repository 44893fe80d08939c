"""Many processes that compile what a plan's rows need, before one that compiles nothing times them.

    python benchmarks/workers.py PLAN --claims FOLDER --record FILE --device DEVICE --number I [--tiny]

Each takes a variant that nobody has taken, builds it and calls it once, so that the caches of Triton and inductor have
it. Variants that need much memory are left to the first processes, as many as there is memory for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from outcomes import is_lost  # noqa: E402
from stages import Kept, Run, ends_with_parent, same_keys  # noqa: E402

from vitfast.bench import device as devices  # noqa: E402
from vitfast.bench import record  # noqa: E402
from vitfast.bench.case import DTYPES, Case, Variant  # noqa: E402
from vitfast.bench.harness import COMPILERS, SEED  # noqa: E402

# one that needs more is left to few processes
LIGHT_GIB = 4.0
# of the memory, for such of one size; the rest is for others, and what a process needs before it computes anything
SHARE = 0.5


def claimed(folder: Path, name: str) -> bool:
    """Whether nobody was faster."""
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


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
    from gpu_stages import partly
    from plans import PLANS

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


def many(run: Run, plan: str, limit_s: float) -> tuple[float, dict[str, int], list[str]]:
    """Seconds; how many variants were compiled, failed, and were not ended in time; and what failed, a line each."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        claims = Path(folder)
        command = [
            sys.executable, __file__, plan, "--claims", folder, "--record", str(run.record.path), "--device",
            str(run.device), *["--tiny"] * run.tiny,
        ]  # fmt: skip
        # each compiles by itself, and keeps no choice between kernels that it timed beside all others
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [*command, "--number", str(i)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                preexec_fn=ends_with_parent(),
            )
            for i in range(2 if run.tiny else max(1, (os.cpu_count() or 2) - 2))
        ]  # fmt: skip
        try:
            for process in processes:
                try:
                    process.wait(max(0.0, began + limit_s - time.perf_counter()))
                except subprocess.TimeoutExpired:
                    break
        finally:
            for process in processes:
                process.kill()
                process.wait()
        ended = [json.loads(text) for file in claims.glob("log-*") for text in file.read_text().splitlines()]
        taken = sum(1 for _ in claims.iterdir()) - sum(1 for _ in claims.glob("log-*"))
    problems = [f"{key}: {name}: {why}" for key, name, why in ended if why]
    counts = {"compiled": len(ended) - len(problems), "failed": len(problems), "not_ended": taken - len(ended)}
    return time.perf_counter() - began, counts, problems


def call_once(case: Case, variant: Variant) -> None:
    """In every shape in which the harness will call it."""
    function, inputs = variant.build(), case.inputs(torch.Generator(case.device).manual_seed(SEED))
    function(*inputs)
    if not all(case.per_image) and case.batch > case.check_images:
        function(*case.cut(inputs, case.check_images))
    devices.of(case.device).synchronize()


def compile_some(plan: str, run: Run, claims: Path, number: int) -> None:
    import torch._inductor.config

    torch._inductor.config.autotune_local_cache = False
    cuda = run.device.type == "cuda"
    memory = torch.cuda.get_device_properties(run.device).total_memory / 2**30 if cuda else 1e9
    log = claims / f"log-{number}"
    log.touch()
    # who can takes heavy ones first, since few can
    for i, case in sorted(enumerate(cases(plan, run)), key=lambda each: gib(each[1]) <= LIGHT_GIB):
        if gib(case) > LIGHT_GIB and number >= max(1, int(SHARE * memory / gib(case))):
            continue
        for j, (name, variant) in enumerate(case.variants.items()):
            if not compiles(name, variant) or not claimed(claims, f"{i}-{j}"):
                continue
            why = ""
            try:
                with devices.of(case.device).current():
                    call_once(case, variant)
            except Exception as problem:
                why = devices.first_line(problem)
            with log.open("a") as file:
                file.write(json.dumps([case.key, name, why]) + "\n")
            torch._dynamo.reset()
            if is_lost(why):
                os.execv(sys.executable, [sys.executable, *sys.argv])
            if cuda:
                torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan")
    parser.add_argument("--claims", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--tiny", action="store_true")
    told = parser.parse_args(argv)
    same_keys()
    run = Run(told.device, Kept(told.record, record.read(told.record), told.record.parent), 0.0, told.tiny, told.plan)
    compile_some(told.plan, run, told.claims, told.number)


if __name__ == "__main__":
    main()
