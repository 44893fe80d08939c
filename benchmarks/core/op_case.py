"""From a call of a torch op to its `Case`: inputs, gradients, and what is judged by image."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.core.apart import recorded
from vitfast import ops
from vitfast.check.calls import Call, Like, contiguous
from vitfast.check.case import DTYPES, Case, Function, Tensors, Variant, Work
from vitfast.check.families import FAMILIES, as_tuple
from vitfast.check.families.family import arguments

MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Way:
    """One way to compute an op.

    Attributes:
        build: returns the forward, a function of those inputs that are in `reads`; by default all of the call.
        needs, part: as in `Variant`.
        own_grads: whether it reads the results' gradients in the other layout.
        finish: from results and gradients in its layout to everybody's.
    """

    build: Callable[[], Function]
    needs: tuple[str, ...] = ()
    part: bool = False
    reads: tuple[int, ...] | None = None
    own_grads: bool = False
    finish: Callable[..., Tensors] = lambda *found: found


@dataclass(frozen=True)
class Op:
    """A call of a torch op and everybody's ways to compute it. The first is the baseline and the yardstick; ours, which
    is added, and the truth read the same inputs as it.

    Attributes:
        count: the work, from `backward`.
        constant: which inputs get no gradients.
        layouts, layouts_of_grads: further inputs, from those of the call and from the results' gradients.
        layouts_by_image: of each of `layouts`, whether its first dim is the image.
        gradients_by_image: the same of the gradients, where they are not those of the call's inputs.
        left_out: what of the time of some ways is not in a row.
    """

    call: Call
    ways: Mapping[str, Way]
    count: Callable[..., Work]
    constant: tuple[int, ...] = ()
    layouts: Callable[..., Tensors] = lambda *tensors: ()
    layouts_of_grads: Callable[..., Tensors] = lambda *grads: ()
    layouts_by_image: tuple[bool, ...] = ()
    gradients_by_image: tuple[bool, ...] | None = None
    left_out: str | None = None


def op_case(describe: Callable[..., Op]) -> Callable[..., Case]:
    """A function that makes the op's case from plain values: batch, mode, dtype, device and what makes its shape."""

    @recorded
    @functools.wraps(describe)
    def make(*, batch: int, mode: str = "forward", dtype: str = "bf16", device: str = "cpu", **shape: Any) -> Case:
        op = describe(batch=batch, dtype=dtype, **shape)
        kinds = [value for value in shape.values() if isinstance(value, str)]
        sizes = {name: value for name, value in shape.items() if isinstance(value, int)}
        return _case(op, " ".join([describe.__name__, *kinds]), sizes, batch, mode, dtype, torch.device(device))

    return make


def _case(
    op: Op, name: str, shape: Mapping[str, int], batch: int, mode: str, dtype: str, device: torch.device
) -> Case:  # fmt: skip
    call, family, backward = op.call, FAMILIES[op.call.op], mode != "forward"
    known = [name for name, arg in _named(call).items() if isinstance(arg, Like)]
    by_image = (*(each not in family.shared for each in known), *op.layouts_by_image)
    with torch.no_grad():
        without_memory = (torch.empty_strided(*like[:2], dtype=like.dtype, device="meta") for like in call.likes())
        results = [tuple(t.shape) for t in as_tuple(_ours(call)(*without_memory))]

    def inputs(generator: torch.Generator) -> Tensors:
        tensors = tuple(t for t in family.draw(call, generator) if isinstance(t, Tensor))
        tensors = *tensors, *op.layouts(*tensors)
        if not backward:
            return tensors
        grads = tuple(contiguous(*each, dtype=DTYPES[dtype]).draw(generator) for each in results)
        return *tensors, *grads, *op.layouts_of_grads(*grads)

    def reads(way: Way) -> tuple[int, ...]:
        return way.reads or tuple(range(len(known)))

    def both_ways(forward: Function, way: Way) -> Function:
        def run(*tensors: Tensor) -> Tensors:
            with torch.inference_mode():
                return way.finish(*as_tuple(forward(*(tensors[i] for i in reads(way)))))

        def run_back(*tensors: Tensor) -> Tensors:
            grads = tensors[len(by_image) :]
            with torch.enable_grad():
                given = {
                    i: tensors[i] if i in op.constant else tensors[i].detach().requires_grad_() for i in reads(way)
                }
                outs = as_tuple(forward(*given.values()))
                leaves = [t for i, t in given.items() if i not in op.constant]
                theirs = grads[len(results) :] if way.own_grads else grads[: len(results)]
                found = torch.autograd.grad(outs, leaves, theirs)
            return way.finish(*(t.detach() for t in outs), *found)

        return run_back if backward else run

    def truth(*tensors: Tensor) -> Tensors:
        return family.true(call.fill(tensors))[: len(results)]

    (first, stock), *others = op.ways.items()
    gradients = op.gradients_by_image or tuple(by_image[i] for i in reads(stock) if i not in op.constant)
    return Case(
        kind="op", name=name, mode=mode, shape=shape, batch=batch, dtype=dtype, device=device,
        inputs=inputs, reference=both_ways(truth, stock),
        # gradients of results come by image
        cut=lambda tensors, n: tuple(
            t[:n] if i >= len(by_image) or by_image[i] else t for i, t in enumerate(tensors)
        ),
        per_image=(True,) * len(results) + gradients * backward,
        variants={
            name: Variant(
                partial(lambda way: both_ways(way.build(), way), way), ours=name == "vitfast", needs=way.needs,
                part=way.part,
            )
            for name, way in ((first, stock), ("vitfast", replace(stock, build=lambda: _ours(call))), *others)
        },
        baseline=first, yardstick=first, work=op.count(backward=backward),
        notes={} if op.left_out is None else {"left_out": op.left_out},
    )  # fmt: skip


def _ours(call: Call) -> Function:
    """The public function that calls this torch op."""
    function = getattr(ops, call.op)
    known = inspect.signature(function).parameters
    given = {name: arg for name, arg in _named(call).items() if name in known and arg is not None}
    tensors = [name for name, arg in given.items() if isinstance(arg, Like)]
    run = partial(function, **{name: arg for name, arg in given.items() if name not in tensors})
    return lambda *inputs: run(**dict(zip(tensors, inputs, strict=True)))


def _named(call: Call) -> dict[str, Any]:
    """Its arguments, without those that it leaves at the op's defaults."""
    return dict(zip(arguments(call.op), call.args, strict=False))
