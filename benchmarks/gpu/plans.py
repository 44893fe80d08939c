"""The plans of `benchmarks.gpu.run`: which stages they have, in order of value, and which rows those measure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.core import models, packed, patched
from benchmarks.core import ops as op_rows
from benchmarks.core.ceilings import PRODUCTS
from benchmarks.core.harness import COMPILERS
from benchmarks.gpu.goals import goals, processor
from benchmarks.gpu.profile import profile
from benchmarks.gpu.rows import compilable, compiled, defaults, extension, measure_ceilings, rows
from benchmarks.gpu.stages import Makers, Run, Stage
from benchmarks.gpu.sweep import sweep, to_compile
from benchmarks.gpu.tests import KERNELS, OF_DEVICES, SMOKE, stage_of
from vitfast.check.case import Case

# images of a row of ops; of those that a block is made of, whose kernels are meant for many rows; and of models
BATCH, BLOCK_BATCH, BATCHES = 64, 256, (64, 256, 1)
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

    # by which a row is named that cannot be made
    make.func, make.keywords = getattr(maker, "func", maker), getattr(maker, "keywords", {})
    return make


def block(run: Run) -> Iterator[Callable[[], Case]]:
    """What a block is made of, at the widths of ViT-B, S and L: many images, then one. A compiler at the first only."""
    if run.tiny:
        for maker in op_rows.tiny(BLOCK[:1], device=str(run.device), dtypes=["fp32"], batches=[1], modes=["forward"]):
            yield without(maker, *COMPILERS)
        return
    listed = partial(op_rows.listed, BLOCK, device=str(run.device), dtypes=["bf16"], tokens=(197,))
    for batch, mode in (*((BLOCK_BATCH, mode) for mode in op_rows.MODES), (1, op_rows.MODES[0])):
        for width in BLOCK_WIDTHS:
            with_compiler = width == BLOCK_WIDTHS[0] and mode == "forward" and batch != 1
            for maker in listed(batches=[batch], modes=[mode], widths=[width]):
                yield without(maker, *(COMPILERS[1:] if with_compiler else COMPILERS))


def ops(run: Run) -> Iterator[Callable[[], Case]]:
    """What `block` has not: short sequences at all widths, then the longer ones."""
    if run.tiny:
        for names, mode in ((OPS, "forward"), (OPS[:1], "forward+backward")):
            yield from op_rows.tiny(names, device=str(run.device), dtypes=["fp32"], batches=[2], modes=[mode])
        return
    listed = partial(op_rows.listed, device=str(run.device), dtypes=["bf16"], batches=[BATCH])
    yield from listed(("attention",), tokens=(197, 257))
    for mode in op_rows.MODES:
        for maker in listed(OPS[4:], tokens=(197,), widths=(768,), modes=[mode]):
            yield maker if mode == "forward" else without(maker, *COMPILERS)
        others = (OPS[1:], 197, (192, 1280)), (OPS[4:], 197, (384, 1024)), (OPS[1:], 257, (1280,))
        for names, tokens, widths in others:
            for maker in listed(names, tokens=(tokens,), widths=widths, modes=[mode]):
                yield without(maker, *COMPILERS)
    yield from listed(("attention",), tokens=(577, 1025, 1370))
    for maker in listed(OPS[1:], tokens=(577, 1025, 1370), widths=(768,)):
        yield without(maker, *COMPILERS)


def whole(
    run: Run, names: Iterable[str], batches: Iterable[int], group: str = "eager", mode: str = "inference", *,
    dtypes: Iterable[str] = ("bf16",), autocast: bool = False, image_size: int | None = None,
) -> Makers:  # fmt: skip
    depth = None
    if run.tiny:
        names = ["vit_tiny_patch16_224" if name.startswith("vit_") else name for name in list(names)[:1]]
        image_size, depth, batches = 32, 2, [2]
    return models.listed(
        list(names), device=str(run.device), dtypes=list(dtypes), batches=list(batches), modes=[mode], groups=[group],
        autocast=[autocast], image_size=image_size, depth=depth, autotune_s=150.0,
    )  # fmt: skip


def growth(run: Run) -> Iterator[Callable[[], Case]]:
    """Speed and memory over batch and image size, of what `models` on a CPU has not."""
    for batches, size in (((4, 16, 64), None), ((1,), 384), ((1,), 768), ((1,), 1024)):
        for maker in whole(run, BASE_AND_SMALL[1:], batches, dtypes=("bf16", "fp32"), image_size=size):
            yield without(maker, "torchvision", "Hugging Face")


def tanh_gelu(run: Run) -> Iterator[Callable[[], Case]]:
    """SigLIP's MLP at 432 pixels."""
    tokens, width, batch = (17, 32, 1) if run.tiny else (729, 768, 8)
    for dtype in ("bf16", "fp32"):
        yield partial(op_rows.mlp, batch=batch, tokens=tokens, width=width, act="gelu_tanh", dtype=dtype)


def patched_models(
    run: Run, mode: str, *, batches: Iterable[int] = BATCHES, dtypes: Iterable[str] = ("bf16",),
    sizes: Iterable[str] = ("S",),
) -> Makers:  # fmt: skip
    """Those of every library, before and after `vitfast.patch`. sizes: as `patched.listed`."""
    small = {}
    if run.tiny:
        batches, sizes, small = [2], ["S"], {"image_size": 32, "depth": 2}
    return patched.listed(
        device=str(run.device), dtypes=list(dtypes), batches=list(batches), modes=[mode], sizes=list(sizes), **small
    )


def of(*names: str, batches: Iterable[int] = BATCHES, **how: Any) -> Callable[[Run], Makers]:
    """Rows of these models."""
    return lambda run: whole(run, names, batches, **how)


def all_of(first: Callable[[Run], Makers], *real: Callable[[Run], Makers]) -> Callable[[Run], Makers]:
    """The rows of several; of small sizes the first only, since those of the others would be the same."""
    return lambda run: (maker for makers in (first, *(() if run.tiny else real)) for maker in makers(run))


def training_compiled(run: Run) -> Iterator[Callable[[], Case]]:
    for batch in BATCHES[:1] if run.tiny else BATCHES:
        for maker in whole(run, BASE_AND_SMALL, (batch,), "compiled", "training"):
            # of many images the host is no limit, and two batches of what a backward needs no small thing
            yield without(maker, " reduce-overhead") if batch == 256 else maker


def ops_on_cpu(run: Run) -> Iterator[Callable[[], Case]]:
    if run.tiny:
        yield from op_rows.tiny(OPS[:1], device="cpu", dtypes=["fp32"], batches=[1])
        return
    common = dict(device="cpu", dtypes=["bf16", "fp32"], batches=[8], tokens=(197,), modes=["forward"])
    yield from op_rows.listed(("attention",), heads={64: 12}, **common)
    yield from op_rows.listed(OPS[1:], widths=(768,), **common)


def packed_products(run: Run) -> Iterator[Callable[[], Case]]:
    """The four of a block of ViT-S and of ViT-B, many rows first."""
    for how in _packed(run):
        for name in PRODUCTS:
            yield partial(packed.product, product=name, **how)


def packed_attention(run: Run) -> Iterator[Callable[[], Case]]:
    for how in _packed(run):
        yield partial(packed.attention, heads=how.pop("width") // packed.HEAD_DIM, **how)


def packed_blocks(run: Run) -> Iterator[Callable[[], Case]]:
    for how in _packed(run):
        yield partial(packed.block, **how)


def _packed(run: Run) -> Iterator[dict[str, int]]:
    if run.tiny:
        yield dict(width=packed.HEAD_DIM, batch=2, tokens=17)
        return
    for batch, width in itertools.product((8, 1), (384, 768)):
        yield dict(width=width, batch=batch)


def measured(name: str, budget_s: float, makers: Callable[[Run], Makers], **how: Any) -> Stage:
    return Stage(name, budget_s, rows, makers=makers, **how)


def ahead(budget_s: float, *plan: Stage) -> tuple[Stage, ...]:
    """These stages, and before them their compilation."""
    tasks = partial(compilable, plan)
    return Stage("compilation", budget_s, compiled, least_s=20.0, always=True, tasks=tasks), *plan


EXTENSION = Stage("extension", 120, extension, least_s=0.0, always=True)
CEILINGS = Stage("ceilings", 20, measure_ceilings)
DEFAULTS = Stage("defaults", 15, defaults, always=True)
B384, DINOV2 = dict(batches=(64, 1), image_size=384), dict(batches=(64, 1), image_size=518)

# seconds that a stage may take, with about 5 for its process to start
PLANS: dict[str, tuple[Stage, ...]] = {
    "check": (
        EXTENSION,
        stage_of("smoke", 100, of=SMOKE, marked="gpu and not alone"),
        stage_of("smoke under compute-sanitizer", 60, of=SMOKE, marked="gpu and alone", workers=1),
        CEILINGS,
    ),
    "tune": (
        EXTENSION,
        Stage("sweep", 440, sweep, least_s=60.0, tasks=to_compile),
        DEFAULTS,
    ),
    "models": (
        EXTENSION,
        DEFAULTS,
        CEILINGS,
        *ahead(
            130,
            measured("inference", 35, of(*BASE_AND_SMALL)),
            measured("training", 50, of(*BASE_AND_SMALL, mode="training")),
            measured("inference, compiled", 80, of(*BASE_AND_SMALL, group="compiled")),
            measured("training, compiled", 90, training_compiled),
            measured("inference, more sizes", 45, all_of(of(*TINY_AND_LARGE), of(BASE_AND_SMALL[0], **B384))),
            # has what the others leave, or comes in the next call
            measured("max-autotune", 10, of(BASE_AND_SMALL[0], batches=(256,), group="autotuned"), least_s=150.0),
        ),
    ),
    "patched": (
        EXTENSION,
        DEFAULTS,
        CEILINGS,
        *ahead(
            40,
            *(measured(f"patched, {mode}", budget, partial(patched_models, mode=mode))
              for mode, budget in (("inference", 60), ("training", 75))),
        ),
    ),
    "tests": (
        EXTENSION,
        DEFAULTS,
        stage_of("kernels", 300, of=KERNELS, marked="gpu and not alone"),
        stage_of("ops and devices", 60, of=OF_DEVICES),
        stage_of("alone", 100, of=KERNELS, marked="gpu and alone", workers=1, each_s=300.0),
    ),
    "profile": (
        EXTENSION,
        Stage("counters", 100, profile, least_s=20.0),
    ),
    # what the tables of the report have besides
    "rest": (
        EXTENSION,
        DEFAULTS,
        CEILINGS,
        measured("ops of a block", 85, block),
        measured("ops", 120, ops),
        measured("other models", 70, all_of(
            of(*models.CNNS), of("vit_small_patch14_dinov2", **DINOV2), of(models.VIT_PYTORCH, batches=(64, 1)),
        )),
        measured("training, more sizes", 25, of(*TINY_AND_LARGE, batches=(BATCH,), mode="training")),
        measured("autocast", 20, of(*BASE_AND_SMALL, batches=(64, 1), autocast=True)),
        measured("training with autocast", 20, of(*BASE_AND_SMALL, batches=(64,), mode="training", autocast=True)),
        *ahead(50, measured("compiled, more sizes", 55, all_of(
            of(*TINY_AND_LARGE, group="compiled"), of("vit_small_patch14_dinov2", group="compiled", **DINOV2),
            of(BASE_AND_SMALL[0], group="compiled", **B384),
        ))),
    ),
    "cpu": (
        Stage("ceilings", 40, measure_ceilings),
        measured("models", 2400, of(*BASE_AND_SMALL[::-1], batches=(1, 8), group="all", dtypes=("bf16", "fp32"))),
        measured("ops", 360, ops_on_cpu),
        measured("training", 200, of(BASE_AND_SMALL[1], batches=(8,), mode="training", dtypes=("bf16", "fp32"))),
        measured("networks of convolutions", 200, of(*models.CNNS, batches=(8, 1), dtypes=("fp32",))),
        measured("tanh GELU", 60, tanh_gelu),
        measured("growth", 900, growth),
        *(measured(f"patched, {mode}", budget, partial(
            patched_models, mode=mode, batches=(1, 8), dtypes=("bf16", "fp32"), sizes=(),
        )) for mode, budget in (("inference", 500), ("training", 900))),
    ),
    "amx": (
        Stage("processor", 10, processor, always=True),
        Stage("ceilings", 40, measure_ceilings),
        measured("packed products", 200, packed_products),
        measured("packed attention", 50, packed_attention),
        measured("packed blocks", 60, packed_blocks),
        # what the goals are about
        measured("models, compiled", 1500, of(*BASE_AND_SMALL[::-1], batches=(8, 1), group="compiled")),
        Stage("goals", 5, goals),
    ),
}  # fmt: skip
# what `next` does, in this order
ORDER = ("check", "tune", "models", "patched", "tests", "profile", "rest")
# of a call: for one plan, with what it takes to start python and to write the last files
LIMITS_S = {
    **dict.fromkeys(ORDER, 540.0), "check": 300.0, "patched": 270.0, "profile": 180.0, "cpu": 5600.0, "amx": 1950.0,
}  # fmt: skip
# of a CPU; all others are of a GPU
ON_CPU = ("cpu", "amx")
