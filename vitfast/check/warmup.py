"""`vitfast.warmup`: see whether the kernels are right on this card, and compile what a model will call."""

from __future__ import annotations

import functools
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from vitfast.check.acceptance import RMS_RATIO, NotAccepted, accept_results, dtype_to_judge_by
from vitfast.check.calls import SEED, Call, Prepared, calls_of, calls_of_prepared, distinct, size_of
from vitfast.choose import dispatch
from vitfast.config import ViTConfig
from vitfast.inference.graphs import NoGraph
from vitfast.inference.prepare import PreparedViT
from vitfast.model.vit import ViT

if TYPE_CHECKING:
    from vitfast.check.families.family import Family, Results
    from vitfast.measure.device import Place

KERNEL, STOCK, RIGHT = "kernel", "stock operators", "right"
# a prepared model makes other calls where an earlier product no longer leaves its rows' statistics
PASSES = 4


class NoYardstick(Exception):
    """Stock operators are not right either, so that nothing can be said about a kernel."""


class Row(NamedTuple):
    """What warming up did for one call.

    Attributes:
        kernel: its name.
        call: op, shapes and dtype.
        runs: who computes it from now on: `KERNEL` or `STOCK`.
        check: what came out, in words.
        seconds: compiling, checking and all.
        stock_ms, kernel_ms: time of one call, where it was measured.
    """

    kernel: str
    call: str
    runs: str
    check: str
    seconds: float
    stock_ms: float | None = None
    kernel_ms: float | None = None


@dataclass
class Report:
    """A row for each distinct call; prints as a table. Without rows there was nothing to compile."""

    rows: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.rows:
            return "nothing to warm up: no kernel of a GPU will run"
        lines = [(row.call, row.runs, row.check, f"{row.seconds:.2f} s") for row in self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        return "\n".join("  ".join([*map(str.ljust, line[:3], widths), line[3]]) for line in lines)


def warmup(
    model: nn.Module,
    batch: int | Iterable[int] = (1,),
    *,
    dtype: torch.dtype | None = None,
    training: bool = False,
    progress: bool = True,
    measure: bool = True,
) -> Report:
    """Check the kernels that a model on a GPU will run, compile and measure them, before the first image comes.

    Attention is checked and compiled without dropout, which is compiled when it is first called.
    Every call that the model will make is made once, with numbers drawn for it: all that comes out must be finite, and
    the first and last rows, those at the boundaries of tiles and 512 others (of attention and patches some images) are
    held to the rule of `vitfast.check.acceptance`, next to stock operators; so are all results on a few small inputs. A
    kernel that fails is switched off for the process, with one warning that names it. In the same go everything is
    compiled that these batches need. Neither weights and gradients nor the state of random number generators are
    touched.

    What is right is timed next to stock operators, as it runs where nobody tuned, for 0.1 to 0.2 s of the card's time a
    call, longer where one takes more than 5 ms. From then on the kernel runs only where it was faster beyond the noise,
    in this process and by the file of `vitfast tune`, the thorough way, in later ones. What that file or this process
    decided before is neither measured nor changed, nor is a backend that was set; attention with dropout or lengths is
    not measured. Compiled models follow, CUDA graphs stay as they were captured. Nothing else should use the card
    meanwhile.

    Which one is faster may come out differently from one time to the next where both are close, and they differ in
    their last bits. So under `torch.use_deterministic_algorithms` nothing is measured: choices in the file are used as
    they are. Every process of a distributed training has its own choices, read from that file by its first op: warm up
    in rank 0 before the others begin, or they may choose differently.

    Last the CUDA graphs of prepared models are captured, for images of the model's size and dtype; what else will come
    (uint8, features, other sizes) is for `PreparedViT.capture`.

    Args:
        model: a `vitfast.ViT`, one that `vitfast.prepare` made, or a module that contains some. On a CPU nothing is
            compiled, and the report is empty.
        batch: numbers of images.
        dtype: float32, bfloat16 or float16: what the model computes in, without autocast; by default that of its
            blocks, under autocast where that is on for GPUs. A prepared model computes in its own.
        training: also the backward, which a prepared model does not have.
        progress: print a line for each call on stderr.
        measure: also who is faster.

    Returns:
        A `Report`.

    Warns:
        RuntimeWarning: a kernel was switched off or could not be checked; or the file cannot be written.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came.
        RuntimeError: a CUDA graph is being captured, which must not contain any of this; or a kernel broke the device.
    """
    vits = models_in("warmup", model)
    batches = batches_of("warmup", batch)
    device = next(vits[0].parameters()).device
    autocast = None
    if dtype is None:
        dtype = _dtype_of(vits[0])
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    else:
        check_dtype("warmup", dtype)
    if device.type != "cuda":
        return Report()
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("warmup: a CUDA graph is being captured; warm up before the capture begins")
    described = [description(vit, device) for vit in vits]
    measure = measure and not torch.are_deterministic_algorithms_enabled()
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if progress else lambda text: None
    from vitfast.measure import device as devices

    place = devices.of(device)
    report, done = Report(), set()
    with place.current():
        for _ in range(PASSES):
            calls = [call for call in kernel_calls(described, batches, dtype, training, autocast) if call not in done]
            if not calls:
                break
            done.update(calls)
            report.rows += warm(calls, place, say, measure).rows
    for vit in vits:
        if isinstance(vit, PreparedViT) and vit.graphs is not None:
            capture_graphs(vit, batches, say)
    return report


def capture_graphs(prepared: PreparedViT, batches: Iterable[int], say: Callable[[str], None]) -> None:
    """A CUDA graph for each of these numbers of images; why there is none, `explain` says as well."""
    # the largest first: the others' memory is among its own
    for batch in sorted(batches, reverse=True):
        began = time.perf_counter()
        try:
            prepared.capture(batch, size_of(prepared.config))
            found = "captured"
        except NoGraph as problem:
            found = str(problem)
        say(f"warmup, {time.perf_counter() - began:.1f} s: CUDA graph of {batch} images: {found}")


def models_in(what: str, model: nn.Module) -> list[ViT]:
    vits = [module for module in model.modules() if isinstance(module, ViT)] if isinstance(model, nn.Module) else []
    if not vits:
        raise TypeError(f"{what}: model must be or contain a vitfast.ViT, got {type(model).__name__}")
    return vits


def description(model: ViT, device: torch.device) -> ViTConfig | Prepared:
    """What is to be known of a model to foresee its calls on a device."""
    return Prepared(model.config, model.dtype, device) if isinstance(model, PreparedViT) else model.config


def batches_of(what: str, batch: int | Iterable[int]) -> tuple[int, ...]:
    batches = (batch,) if isinstance(batch, int) else tuple(batch)
    if not batches or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in batches):
        raise ValueError(f"{what}: batch must be one or more ints of at least 1, got {batch!r}")
    return batches


def check_dtype(what: str, dtype: torch.dtype) -> None:
    if dtype not in RMS_RATIO:
        raise ValueError(f"{what}: dtype must be one of {', '.join(map(str, RMS_RATIO))}, got {dtype}")


def _dtype_of(model: ViT) -> torch.dtype:
    return next(model.blocks.parameters(), next(model.parameters())).dtype


def kernel_calls(
    configs: Iterable[ViTConfig | Prepared], batches: Sequence[int], dtype: torch.dtype, training: bool,
    autocast: torch.dtype | None = None,
) -> list[Call]:  # fmt: skip
    """The distinct calls of these models that a kernel may run; prepared ones compute in their own dtype, forward.

    Args:
        dtype: of weights and images; autocast: what that computes in, None where it is off.
    """
    # not with the package: `import vitfast` has a limit
    from vitfast.check.families import FAMILIES

    found = [
        call
        for config in configs
        for n in batches
        for call in (
            calls_of_prepared(config, n)
            if isinstance(config, Prepared)
            else calls_of(config, n, dtype, training, autocast)
        )
    ]
    return distinct(call for call in found if call.op in FAMILIES)


def warm(calls: Sequence[Call], place: Place, say: Callable[[str], None], measure: bool = False) -> Report:
    """Run each call once as it is, which compiles it, and check the kernels that ran; `measure` those that are right.

    As it is, at its own batch: a smaller one may get another configuration, or another compilation of the same one.
    That takes less memory than a single block of the model does at that batch.
    """
    from vitfast.check.families import FAMILIES
    from vitfast.check.measuring import Measurer

    report, measurer = Report(), Measurer(place)
    checked: dict[tuple, str] = {}
    began = time.perf_counter()
    try:
        for i, call in enumerate(calls):
            family, row_began = FAMILIES[call.op], time.perf_counter()
            times: tuple[float | None, ...] = ()
            runs, check, right = _warm_one(call, place, checked)
            if measure and right is not None and (found := measurer.row(family, call, right)):
                runs = STOCK if found.use == "stock" else KERNEL
                check, times = f"{check}; {found.why}", (found.stock_ms, found.kernel_ms)
            took = time.perf_counter() - row_began
            report.rows.append(Row(family.kernel, str(call), runs, check, took, *times))
            say(f"warmup {i + 1}/{len(calls)}, {time.perf_counter() - began:.1f} s: {call}: {runs}, {check}")
    finally:
        measurer.keep()
    return report


def _warm_one(call: Call, place: Place, checked: dict[tuple, str]) -> tuple[str, str, dispatch.Seen | None]:
    """Who runs the call, what came out, and where the kernel was found right what the op asked."""
    from vitfast.check.families import FAMILIES
    from vitfast.measure.device import first_line

    family = FAMILIES[call.op]
    generator = torch.Generator(place.device).manual_seed(SEED)
    with dispatch.watching() as seen:
        try:
            args, places = family.draw(call, generator), family.places(call, generator)
            args = family.quiet(call, args, places)
            outs = family.results(args)
            place.synchronize()
        # a compiler or a driver may fail in any way
        except Exception as problem:
            # the user's memory is full, which says nothing about the kernel
            if dispatch.out_of_memory(problem):
                runs = STOCK if dispatch.switched_off(family.kernel) else KERNEL
                return runs, f"not compiled: {first_line(problem)}", None
            if not _last(seen, family).taken:
                raise
            return *_failed(family, place, problem), None
    answer = _last(seen, family)
    state, before = dispatch.state(family.kernel), dispatch.cached(family.kernel, answer.shape, answer.device)
    if not answer.taken:
        return STOCK, state if before is None or state != "auto" else "measured before", None
    config = dispatch.config_for(family.kernel, answer.shape, answer.device)
    known = "" if before is None else "measured before, " if before.config is None else "tuned, "
    configs = family.to_check(call, place.device) if config is None else [config]
    checks: dict[tuple, Callable[[], str]] = {}
    checks[call, None, "as it is"] = lambda: check_part(family, call, args, outs, places, place)
    for small, config in itertools.product(distinct(family.smaller(call)), configs):
        name = (small, None if config is None else tuple(sorted(config.items())))
        checks[name] = functools.partial(check, family, small, config, place)
    for name, one in checks.items():
        if name not in checked:
            try:
                checked[name] = one()
            except Exception as problem:
                if not (isinstance(problem, NoYardstick) or dispatch.out_of_memory(problem)):
                    return *_failed(family, place, problem), None
                checked[name] = f"not checked: {first_line(problem)}"
                warnings.warn(f"vitfast's {family.kernel} kernel was {checked[name]}", RuntimeWarning, stacklevel=4)
    said = {checked[name] for name in checks}
    return KERNEL, known + "; ".join(sorted(said)), answer if said == {RIGHT} else None


def _last(seen: Sequence[dispatch.Seen], family: Family) -> dispatch.Seen:
    """The answer that the op got for the call itself: what drew its arguments may have asked before."""
    answers = [each for each in seen if each.kernel == family.kernel]
    return answers[-1] if answers else dispatch.Seen(family.kernel, (), None, False)


def _failed(family: Family, place: Place, problem: Exception) -> tuple[str, str]:
    from vitfast.measure.device import first_line

    why = " ".join(str(problem).split())[:500] if isinstance(problem, NotAccepted) else first_line(problem)
    dispatch.see_device(family.kernel, place.synchronize, why)
    dispatch.spare(family.kernel, problem)
    dispatch.switch_off(family.kernel, why)
    return STOCK, f"switched off: {why}"


def check(family: Family, call: Call, config: dispatch.Config | None, place: Place) -> str:
    """Hold the result of a kernel to the acceptance rule; returns what to say of it.

    Raises:
        NotAccepted: it is wrong.
        NoYardstick: stock operators are wrong, or so far off that nothing can be measured by them.
        Exception: whatever the kernel raised.
    """
    generator = torch.Generator(place.device).manual_seed(SEED)
    args = family.draw(call, generator)
    refs, lows = _yardsticks(family, args, place)
    outs = family.comparable(family.with_config(args, config))
    place.synchronize()
    return _judge(family, call, outs, refs, lows)


def check_part(
    family: Family, call: Call, args: Sequence[Any], outs: Results, places: torch.Tensor, place: Place
) -> str:
    """`check` of results that are there: all are finite, and right at `places`, rows or images.

    Of these alone the truth is computed. What sums up over all rows comes from gradients that are 0 everywhere else,
    so that it is known from few rows and takes all of them to compute.
    """
    outs = family.comparable(outs)
    count = family.units(call)
    for i, out in enumerate(outs):
        if out is None:
            continue
        if i not in family.sums and (found := out.shape[:-1].numel() if family.rows else len(out)) != count:
            raise NotAccepted(f"{call}, result {i}: {list(out.shape)}, expected {count} rows or images, not {found}")
        if wrong := out.numel() - int(out.isfinite().sum()):
            raise NotAccepted(f"{call}, result {i}: {wrong} of {out.numel()} numbers are not finite")
    refs, lows = _yardsticks(family, family.part(call, args, places), place)
    return _judge(family, call, family.taken(outs, places), refs, lows)


def _yardsticks(family: Family, args: Sequence[Any], place: Place) -> tuple[Results, Results]:
    """What is true, and what stock operators say."""
    try:
        found = family.comparable(family.true(args)), family.comparable(family.stock(args))
        place.synchronize()
    # none of this is the kernel's fault
    except Exception as problem:
        raise NoYardstick(f"stock operators failed: {problem}") from problem
    return found


def _judge(family: Family, call: Call, outs: Results, refs: Results, lows: Results) -> str:
    dtype = dtype_to_judge_by(call.dtype, convolution="patch_embed" in call.op)
    if [each is None for each in lows] != [each is None for each in refs]:
        raise NoYardstick(f"{call}: stock operators and what is true differ in which results are there")
    try:
        accept_results(lows, refs, lows, dtype=dtype, grad=family.grad, what=str(call))
    except NotAccepted as fault:
        raise NoYardstick(f"stock operators are no yardstick: {' '.join(str(fault).split())}") from None
    accept_results(outs, refs, lows, dtype=dtype, grad=family.grad, what=str(call))
    return RIGHT
