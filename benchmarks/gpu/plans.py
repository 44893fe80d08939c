"""The plans of benchmarks/run.py: which stages they have, in order of value, and which rows those measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from gpu_stages import compiled_by_many, defaults, extension, measure_ceilings, rows, sweep
from gpu_tests import KERNELS, OF_DEVICES, SMOKE, stage_of
from profile_kernels import profile
from stages import Makers, Run, Stage

from vitfast.bench import models, op_rows
from vitfast.bench.case import Case
from vitfast.bench.harness import COMPILERS

# images of a row of ops, and of a training step
BATCH = 64
# of the ops that a block is made of, whose kernels are meant for many rows
BLOCK_BATCH = 256
BATCHES = (64, 256, 1)
BASE_AND_SMALL = ("vit_base_patch16_224", "vit_small_patch16_224")
TINY_AND_LARGE = ("vit_tiny_patch16_224", "vit_large_patch16_224")
# measured first: what the package is about, then what may become a kernel's next width
OPS = ("attention", "mlp", "linear", "layer_norm", "add_layer_norm", "patch_embed")
BLOCK, BLOCK_WIDTHS = ("linear", "mlp", "layer_norm"), (768, 384, 1024)


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
    autotune_s: float = 150.0,
) -> Makers:  # fmt: skip
    depth = None
    if run.tiny:
        names = ["vit_tiny_patch16_224" if name.startswith("vit_") else name for name in list(names)[:1]]
        image_size, depth, batches = 32, 2, [2]
    return models.listed(
        list(names), device=str(run.device), dtypes=list(dtypes), batches=list(batches), modes=[mode], groups=[group],
        autocast=[autocast], image_size=image_size, depth=depth, autotune_s=autotune_s,
    )  # fmt: skip


def tiny_and_large(run: Run) -> Iterator[Callable[[], Case]]:
    if run.tiny:
        return
    yield from whole(run, TINY_AND_LARGE, BATCHES)
    yield from whole(run, BASE_AND_SMALL[:1], (64, 1), image_size=384)


def training_compiled(run: Run) -> Iterator[Callable[[], Case]]:
    for batch in BATCHES[:1] if run.tiny else BATCHES:
        for maker in whole(run, BASE_AND_SMALL, (batch,), "compiled", "training"):
            # of many images the host is no limit, and two batches of what a backward needs no small thing
            yield without(maker, " reduce-overhead") if batch == 256 else maker


def larger(run: Run, group: str = "eager") -> Iterator[Callable[[], Case]]:
    yield from whole(run, ("vit_small_patch14_dinov2",), (64, 1), group, image_size=518)
    if group == "compiled" and not run.tiny:
        yield from whole(run, BASE_AND_SMALL[:1], (64, 1), group, image_size=384)


def ops_on_cpu(run: Run) -> Iterator[Callable[[], Case]]:
    if run.tiny:
        yield from op_rows.tiny(OPS[:1], device="cpu", dtypes=["fp32"], batches=[1])
        return
    common = dict(device="cpu", dtypes=["bf16", "fp32"], batches=[8], tokens=(197,), modes=["forward"])
    yield from op_rows.listed(("attention",), heads={64: 12}, **common)
    yield from op_rows.listed(OPS[1:], widths=(768,), **common)


def of(*names: str, batches: Iterable[int] = BATCHES, **how: Any) -> Callable[[Run], Makers]:
    """Rows of these models."""
    return lambda run: whole(run, names, batches, **how)


def measured(name: str, budget_s: float, typical_s: float, makers: Callable[[Run], Makers], **how: Any) -> Stage:
    return Stage(name, budget_s, typical_s, rows, makers=makers, **how)


def compiled_first(plan: str, budget_s: float, typical_s: float) -> Stage:
    work = partial(compiled_by_many, plan=plan)
    return Stage("compilation", budget_s, typical_s, work, least_s=20.0, always=True)


EXTENSION = Stage("extension", 120, 50, extension, least_s=0.0, always=True)
CEILINGS = Stage("ceilings", 20, 14, measure_ceilings)
DEFAULTS = Stage("defaults", 15, 10, defaults, always=True)

# seconds that a stage may take, then those that it probably takes on sixteen cores with cold caches
PLANS: dict[str, tuple[Stage, ...]] = {
    "check": (
        EXTENSION,
        stage_of("smoke", 100, 60, of=SMOKE, marked="gpu and not alone"),
        stage_of("smoke under compute-sanitizer", 60, 40, of=SMOKE, marked="gpu and alone", workers=1),
        CEILINGS,
    ),
    "tune": (
        EXTENSION,
        Stage("sweep", 440, 170, sweep, least_s=60.0),
        DEFAULTS,
    ),
    "models": (
        EXTENSION,
        DEFAULTS,
        CEILINGS,
        compiled_first("models", 130, 110),
        measured("inference", 35, 30, of(*BASE_AND_SMALL)),
        measured("training", 50, 45, of(*BASE_AND_SMALL, mode="training")),
        measured("inference, compiled", 80, 75, of(*BASE_AND_SMALL, group="compiled")),
        measured("training, compiled", 90, 120, training_compiled),
        measured("inference, more sizes", 45, 40, tiny_and_large),
        # has what the others leave, or comes in the next call
        measured("max-autotune", 10, 110, of(BASE_AND_SMALL[0], batches=(256,), group="autotuned"), least_s=150.0),
    ),
    "tests": (
        EXTENSION,
        DEFAULTS,
        stage_of("kernels", 300, 220, of=KERNELS, marked="gpu and not alone"),
        stage_of("ops and devices", 60, 40, of=OF_DEVICES),
        stage_of("alone", 100, 90, of=KERNELS, marked="gpu and alone", workers=1, each_s=300.0),
    ),
    "profile": (
        EXTENSION,
        Stage("counters", 100, 60, profile, least_s=20.0),
    ),
    # what the tables of the report have besides
    "rest": (
        EXTENSION,
        DEFAULTS,
        CEILINGS,
        measured("ops of a block", 85, 80, block),
        measured("ops, short", 90, 90, partial(ops, first=True)),
        measured("networks of convolutions", 30, 30, of(*models.CNNS)),
        measured("training, more sizes", 25, 25, of(*TINY_AND_LARGE, batches=(BATCH,), mode="training")),
        measured("larger images", 15, 15, larger),
        measured("autocast", 20, 20, of(*BASE_AND_SMALL, batches=(64, 1), autocast=True)),
        measured("training with autocast", 20, 20, of(*BASE_AND_SMALL, batches=(64,), mode="training", autocast=True)),
        measured("ops, long", 40, 50, partial(ops, first=False)),
        measured("vit-pytorch", 15, 15, of(models.VIT_PYTORCH, batches=(64, 1))),
        compiled_first("rest", 50, 50),
        measured("compiled, more sizes", 40, 90, of(*TINY_AND_LARGE, group="compiled")),
        measured("larger images, compiled", 15, 60, partial(larger, group="compiled")),
    ),
    "cpu": (
        Stage("ceilings", 40, 28, measure_ceilings),
        measured("models", 1200, 1200, of(*BASE_AND_SMALL[::-1], batches=(1, 8), group="all", dtypes=("bf16", "fp32"))),
        measured("ops", 360, 360, ops_on_cpu),
        measured(
            "training", 200, 200,
            of(BASE_AND_SMALL[1], batches=(8,), mode="training", dtypes=("bf16", "fp32")),
        ),
        measured("networks of convolutions", 200, 200, of(*models.CNNS, batches=(8, 1), dtypes=("fp32",))),
    ),
}  # fmt: skip
# what `next` does, in this order
ORDER = ("check", "tune", "models", "tests", "profile", "rest")
# of a call: for one plan, with what it takes to start python and to write the last files
LIMITS_S = {**dict.fromkeys(ORDER, 540.0), "check": 300.0, "profile": 180.0, "cpu": 2400.0}
