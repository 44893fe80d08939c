"""Stages of the plan amx before and after its rows: what the CPU is, and which of the goals for it the rows meet."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.core import harness
from benchmarks.gpu.stages import Outcome, Run, Stage, say
from benchmarks.report import rows as of
from benchmarks.report.rows import Row
from vitfast.kernels import cpu as cpu_kernels
from vitfast.kernels import extension as compiled_half
from vitfast.measure.machine import OtherProcesses

# of a CPU with AMX and two threads, in bf16. By model and images: how many times as fast as timm's a prepared model is
# to be, and as the best of the others
PREPARED = {
    ("vit_small_patch16_224", 8): (2.2, 1.4), ("vit_base_patch16_224", 8): (1.8, 1.3),
    ("vit_small_patch16_224", 1): (1.9, 1.25), ("vit_base_patch16_224", 1): (1.7, 1.25),
}  # fmt: skip
EAGER = 1.0
# by images: TFLOP/s of each product; and ms of attention, by heads and images
PRODUCTS = {8: 4.0, 1: 3.0}
ATTENTION = {(6, 8): 0.35}
OURS, PREPARED_OURS = "vitfast", "vitfast prepared"
# whom a prepared model is to be ahead of: with one of them not timed the best of the others is not known
RIVALS = ("OpenVINO", "timm compiled", "timm max-autotune")
KERNELS, THREADS = "amx_bf16", 2


def processor(run: Run, stage: Stage, budget_s: float) -> Outcome:
    """Note what the CPU is, which kernels there are for it, and how quiet it is."""
    module, why = compiled_half.load()
    others = OtherProcesses()
    time.sleep(0.1 if run.tiny else 2.0)
    share, kernels = others.share(), cpu_kernels.kernels()
    features = {} if module is None else dict(module.cpu_features())
    found = {
        "features": features, "usable": [] if module is None else [each.name for each in module.usable_kernels()],
        "kernels": None if kernels is None else kernels.name, "others_before": share, "extension": why or "present",
    }  # fmt: skip
    run.note("processor", found)
    if KERNELS not in found["usable"]:
        say("processor: AMX is not usable here, so that the goals are not those of this CPU")
    busy = "" if share is None else f"; others take {share:.0%} of the CPUs"
    say(f"processor: kernels {found['kernels']} of {', '.join(found['usable']) or 'none'}{busy}")
    return Outcome()


def goals(run: Run, stage: Stage, budget_s: float) -> Outcome:
    """Print the rows beside the goals. A goal that is missed is no failure of the run."""
    facts = run.record.data["run"]
    here = facts.get("processor", {}).get("kernels"), facts.get("threads")
    found = [f"{facts.get('device')}, {here[1]} threads, bf16, kernels {here[0]}"]
    found += lines(run.record.rows)
    found += [f"chosen in {name}: {line}" for name, each in _chosen(run) for line in each]
    if here != (KERNELS, THREADS):
        found.append(
            f"None of these goals is met or missed here: they are those of {KERNELS} with {THREADS} threads, and this "
            f"is {here[0]} with {here[1]}"
        )
    run.note("goals", found)
    say("\n".join(found))
    # a call that measures more is to print them again
    waits = any(not facts["done"] for name, facts in run.record.data["stages"].items() if name != stage.name)
    return Outcome((), "rows are left" if waits else "")


def _chosen(run: Run) -> Iterator[tuple[str, list[str]]]:
    for name, facts in run.record.data["stages"].items():
        yield name, facts.get("chosen", [])


def lines(rows: Sequence[Row]) -> Iterator[str]:
    bf16 = [row for row in of.fair(list(rows)) if row["dtype"] == "bf16" and not row.get("autocast")]
    for (model, batch), (over_timm, over_best) in PREPARED.items():
        yield from _of_model(f"{model} at {batch}", _row(bf16, "model", model, batch=batch), over_timm, over_best)
    for row in (row for row in bf16 if row["name"].startswith("packed ")):
        shape = " ".join(f"{what} {size}" for what, size in row["shape"].items())
        yield f"{row['name']}, {shape}, batch {row['batch']}: {_part(row)}"


def _row(rows: Sequence[Row], kind: str, name: str, **is_: Any) -> Row | None:
    of_case = [row for row in rows if (row["kind"], (row.get("notes") or {}).get("model", row["name"])) == (kind, name)]
    return next((row for row in of_case if all(row[what] == value for what, value in is_.items())), None)


def _of_model(name: str, row: Row | None, over_timm: float, over_best: float) -> Iterator[str]:
    if row is None:
        yield f"{name}: not measured"
        return
    variants, best = row["variants"], of.rival(row)
    yield f"{name}, images/s: " + "; ".join(
        f"{variant} {of.images_per_s(row, variant):.1f}{_exact(found)}"
        for variant, found in variants.items()
        if of.timed(found)
    )
    eager, prepared = (variants.get(each, {}) for each in (OURS, PREPARED_OURS))
    yield f"  eager over {row['baseline']}: {_met(eager.get('ratio'), EAGER)}"
    yield f"  prepared over {row['baseline']}: {_met(prepared.get('ratio'), over_timm)}"
    if best is not None:
        ratio = variants[best]["ms"] / prepared["ms"] if of.timed(prepared) else None
        without = [each for each in RIVALS if not of.timed(variants.get(each, {}))]
        yield f"  prepared over {best}, the best of the others: {_met(ratio, over_best, without=without)}"
    if (row.get("others") or 0) > harness.OTHERS:
        yield f"  measure again: others took {row['others']:.0%} of the CPUs"


def _exact(found: Row) -> str:
    if of.is_coarse(found):
        error = found.get("error")
        return f" (int8, {'error unknown' if error is None else f'{error:.1%} off'})"
    return " (outside the acceptance rule)" if found.get("accepted") is False else ""


def _part(row: Row) -> str:
    told = []
    for name, found in row["variants"].items():
        told.append(
            f"{name} {found['ms']:.3g} ms, {found['tflops']:.2f} TFLOP/s" if of.timed(found) else f"{name} not timed"
        )
    mine = row["variants"].get(OURS, {})
    goal = PRODUCTS.get(row["batch"]) if row["name"].split()[1] not in ("attention", "block") else None
    if goal is not None:
        told.append(f"goal {_met(mine.get('tflops'), goal, ' TFLOP/s')}")
    limit = ATTENTION.get((row["shape"].get("heads"), row["batch"]))
    if limit is not None:
        told.append(f"goal {_met(mine.get('ms'), limit, ' ms', most=True)}")
    return "; ".join(told)


def _met(
    found: float | None, goal: float, unit: str = "x", most: bool = False, without: Sequence[str] = ()
) -> str:  # fmt: skip
    sign = "<=" if most else ">="
    if found is None:
        return f"not measured, {sign} {goal:g}{unit} wanted"
    met = found <= goal if most else found >= goal
    verdict = f"open without {', '.join(without)}" if met and without else "met" if met else "missed"
    # digits enough to see on which side it is
    return f"{found:.4g}{unit}, {sign} {goal:g}{unit} wanted: {verdict}"
