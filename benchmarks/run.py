"""Run a plan of benchmarks: check, tune, models, tests, profile and rest for a GPU, cpu for a CPU.

    python benchmarks/run.py PLAN|next|all [--out FOLDER] [--minutes M] [--resume] [--device DEVICE] [--tiny]

check    the extension, a test of each kernel and each kind of model, also under compute-sanitizer, ceilings
tune     every configuration of every kernel beside stock operators, and from it the built-in tables
models   ViT-B, S, then others: ours, timm's, Hugging Face's and torchvision's, compiled and not, inference and training
tests    all tests that need a GPU
profile  what the hardware counts in three kernels, by ncu
rest     ops and further models, for the tables of the report
next     what comes next of these in this order, going on where the last call stopped, for --minutes (9)
all      all of them, for as long as it takes
cpu      ceilings, models and ops against what people would use instead

Each is over in nine minutes, check in five; on sixteen cores, with nothing compiled before, the stages of check take
about 165 s, of tune 230, of models 605, of tests 410, of profile 110 (benchmarks/plans.py has each). Needs nothing but
this source tree and a python with torch, triton, timm, transformers, pytest and xdist: no network, nothing installed.

Stages come in order of value, each with a budget; what one leaves goes to the next ones, one that fails or overruns
costs those after it nothing, and what does not fit is listed as skipped. What is known is on disk after every row and
every test: in benchmarks/state, with a copy in --out, <device>-<plan>.json and of the sweep <device>-tune.json, at most
eight files. `next`, `all` and --resume go on with the newer of both, so on another machine files of an earlier call can
be put into either (`next` and `all` take those of another commit from benchmarks/state only); a stage that is done is
not run again, rows and tests that are there neither. A record that is not gone on with gets the suffix .before.
--tiny runs every stage on small sizes, on any device, to see whether all works.

Compilers keep their results in $VITFAST_CACHE_DIR (~/.cache/vitfast), in a folder named after device and versions.
Exit status: 0; 1 where by the records a test failed or a result of ours was wrong; 2 for wrong use; 3 where the time
was up in the middle of something.
"""

from __future__ import annotations

import time

# importing torch takes its part of the time
BEGAN = time.perf_counter()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import fcntl  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
# a plain copy of the source tree is not installed
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from plans import LIMITS_S, ORDER, PLANS  # noqa: E402
from shared import slug  # noqa: E402
from stages import STATE, Kept, Run, go, is_finished, same_keys, say  # noqa: E402

from vitfast.bench import harness, record  # noqa: E402
from vitfast.measure import machine  # noqa: E402
from vitfast.measure.machine import cpu_name  # noqa: E402

NEXT_MINUTES = 9.0
# for who owns a GPU: nobody waits longer, and no budget cuts off what only takes its time
ALL_MINUTES, PATIENCE = 12 * 60.0, 10.0
# for what cannot be interrupted when the time is up, and to end
GRACE_S, LAST_S = 8.0, 2.0
# of this process; what makes it begin again is noted each time, so that it ends
RESTARTS, MOST_RESTARTS = "VITFAST_RUN_RESTARTS", 20


class Call:
    """One call of this program, on one device."""

    def __init__(self, told: argparse.Namespace) -> None:
        self.told, self.device = told, torch.device(told.device or ("cpu" if told.run == "cpu" else "cuda"))
        self.several = told.run in ("next", "all")
        self.plans = ORDER if self.several else (told.run,)
        minutes = {"next": NEXT_MINUTES, "all": ALL_MINUTES}.get(told.run) or LIMITS_S[told.run] / 60
        self.ends = BEGAN + 60 * (minutes if told.minutes is None else told.minutes) - GRACE_S - LAST_S
        self.made = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()
        self.facts = machine.describe(self.device, ("torchvision", "liger-kernel", "flash-attn"))
        self.records: dict[str, Kept] = {}

    def files(self, plan: str) -> list[str]:
        """A plan's record, and of tune what the sweep writes."""
        name = slug(f"{self.made} {plan}")
        return [f"{name}-plan.json", f"{name}.json"] if plan == "tune" else [f"{name}.json"]

    def gather(self, plan: str) -> None:
        """Have in `STATE` what this call goes on with, and in the output folder nothing else of these names."""
        for name in self.files(plan):
            kept, given = STATE / name, self.told.out / name
            if not (self.told.resume or self.several):
                for before in filter(None, map(record.set_aside, {kept, given})):
                    say(f"an earlier record is now {before}")
                continue
            for file in (kept, given):
                if file.exists() and not is_whole(file):
                    say(f"{file} is no record, or cut short; it is now {record.set_aside(file)}")
            if given.exists() and (self.told.resume or self.is_ours(given)):
                if not kept.exists() or given.stat().st_mtime > kept.stat().st_mtime:
                    STATE.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(given, kept)
            elif not kept.exists() and (before := record.set_aside(given)):
                say(f"a record of another commit is now {before}")

    def is_ours(self, file: Path) -> bool:
        data = json.loads(file.read_text())
        return data.get("run", data.get("machine", {})).get("commit") == self.facts["commit"]

    def open(self, plan: str) -> Kept:
        if plan not in self.records:
            self.gather(plan)
            path = STATE / self.files(plan)[0]
            try:
                data = record.open_for_resume(path, self.facts).data
            except ValueError as problem:
                if not self.several:
                    raise
                # of one plan it must not cost the others
                say(f"{problem}; it is now {record.set_aside(path)}")
                data = record.open_for_resume(path, self.facts).data
            self.records[plan] = Kept(path, data, self.told.out)
        return self.records[plan]

    def finished(self, plan: str) -> bool:
        return is_finished(PLANS[plan], self.open(plan).data["stages"])

    def run(self, plan: str) -> None:
        kept = self.open(plan)
        kept.write()
        run = Run(
            self.device, kept, self.ends, self.told.tiny, slug(f"{self.made} {plan}"),
            PATIENCE if self.told.run == "all" else 1.0, restart=self.restart,
        )  # fmt: skip
        say(f"plan {plan}: {self.ends - time.perf_counter():.0f} s")
        try:
            go(PLANS[plan], run)
        except harness.DeviceLost as lost:
            say(str(lost))
            self.restart()

    def run_all(self) -> None:
        """Every plan that is not finished, and again while that brings anything."""
        before = None
        while self.amount() != before and self.ends > time.perf_counter():
            before = self.amount()
            for plan in self.plans:
                # the last ones need not be tried with no time
                if not self.finished(plan) and self.ends > time.perf_counter():
                    self.run(plan)
            if not self.several:
                return

    def amount(self) -> int:
        """Grows with everything that is done, but for rows of the sweep."""
        found = 0
        for kept in self.records.values():
            found += len(kept.finished())
            for stage in kept.data["stages"].values():
                found += stage["done"] - stage.get("tests", {}).get("not_run", 0)
        return found

    def restart(self) -> None:
        """Begin this process again, which ends whatever it is doing, and whatever its device is in."""
        number = int(os.environ.get(RESTARTS, "0")) + 1
        if number > MOST_RESTARTS:
            print(f"run: begun again {MOST_RESTARTS} times already", file=sys.stderr, flush=True)
            os._exit(3)
        os.environ[RESTARTS] = str(number)
        minutes = (self.ends + GRACE_S + LAST_S - time.perf_counter()) / 60
        say("beginning again")
        more = [] if self.several else ["--resume"]
        os.execv(sys.executable, [sys.executable, __file__, *sys.argv[1:], "--minutes", f"{minutes:.3f}", *more])

    def write_tables(self) -> None:
        if self.told.run == "cpu" and "cpu" in self.records:
            name = Path(self.files("cpu")[0]).with_suffix(".csv")
            record.write_csv(self.records["cpu"].data, self.told.out / name)

    def report(self) -> int:
        """Say what is done and what is not; exit status."""
        failed = 0
        for plan, kept in self.records.items():
            stages = kept.data["stages"]
            left = [stage.name for stage in PLANS[plan] if not is_finished([stage], stages)]
            for line in (line for stage in stages.values() for line in stage["failed"]):
                failed = 1
                print(f"run: {plan}: {line}", file=sys.stderr)
            told = f"left: {', '.join(left)}" if left else "finished"
            say(f"{self.told.out / kept.path.name}: {len(kept.rows)} rows, {len(kept.data['skipped'])} skipped, {told}")
        say(f"{time.perf_counter() - BEGAN:.0f} s")
        return failed


def is_whole(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except ValueError:
        return False


def alone() -> Any:
    """What to keep open as long as nobody else may run a plan in this tree; None where somebody does."""
    STATE.mkdir(parents=True, exist_ok=True)
    file = (STATE / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def end_at(seconds: float, path: Path, last: Callable[[], Any] = lambda: None) -> threading.Timer:
    """End this process then, whatever it is doing, after `last`: its files have all finished rows."""

    def end() -> None:
        with contextlib.suppress(Exception):
            last()
        print(f"run: the time is up; {path} has all finished rows", file=sys.stderr, flush=True)
        os._exit(3)

    timer = threading.Timer(max(seconds, 0.0), end)
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=[*PLANS, "next", "all"], metavar="PLAN")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--resume", action="store_true", help="go on with what is there; next and all always do")
    parser.add_argument("--device", help="(default: cuda, of the plan cpu: cpu)")
    parser.add_argument("--minutes", type=float, help="for all of the call (default: the plan's; of next 9)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see whether everything works")
    told = parser.parse_args(argv)
    told.out = told.out.resolve()
    device = told.device or ("cpu" if told.run == "cpu" else "cuda")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        print("run: torch finds no GPU here, `vitfast info` says why; --device cpu --tiny tries it", file=sys.stderr)
        return 2
    if (lock := alone()) is None:
        print(f"run: another run has {STATE}, and would disturb times", file=sys.stderr)
        return 2
    keep_caches(torch.device(device))
    same_keys()
    # so that what it started is ended and noted
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    call = Call(told)
    timer = end_at(call.ends + GRACE_S - time.perf_counter(), told.out, call.write_tables)
    try:
        told.out.mkdir(parents=True, exist_ok=True)
        call.run_all()
        call.write_tables()
    except (ValueError, OSError) as problem:
        print(f"run: {problem}", file=sys.stderr)
        return 2
    finally:
        timer.cancel()
        lock.close()
    return call.report()


if __name__ == "__main__":
    sys.exit(main())
