"""From a call of a torch op to its `Case`: inputs, gradients, and what is judged by image."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.core.case import dtype_of, one_of
from vitfast import ops
from vitfast.check.calls import Call, Like, contiguous
from vitfast.check.case import Case, Function, Tensors, Variant, Work
from vitfast.check.families import FAMILIES, as_tuple
from vitfast.check.families.family import arguments

MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Way:
    """One way to compute an op.

    Attributes:
        build: returns the forward, a function of the op's inputs.
        needs, part: as in `Variant`.
        leaves: which inputs get gradients, where it reads others than everybody.
        own_grads: whether it reads the results' gradients in the other layout.
        finish: from results and gradients in its layout to everybody's.
    """

    build: Callable[[], Function]
    needs: tuple[str, ...] = ()
    part: bool = False
    leaves: tuple[int, ...] | None = None
    own_grads: bool = False
    finish: Callable[..., Tensors] = lambda *found: found


def op_case(
    name: str, shape: Mapping[str, int], batch: int, mode: str, dtype: str, device: str, call: Call, *,
    results: tuple[tuple[int, ...], ...], ways: Mapping[str, Way], count: Callable[..., Work],
    leaves: tuple[int, ...] | None = None, layouts: Callable[..., Tensors] = lambda *tensors: (),
    layouts_by_image: tuple[bool, ...] = (), layouts_of_grads: Callable[..., Tensors] = lambda *grads: (),
    **notes: Any,
) -> Case:  # fmt: skip
    """The case of `call`, a call of a torch op. The first way is the baseline and the yardstick; ours, which
    is added, and the truth read the same inputs as it.

    Args:
        results: shapes of the forward's results, whose first dim is the image.
        count: the work, from `backward`.
        leaves: which inputs get gradients; by default all of the call.
        layouts, layouts_of_grads: further inputs, from those of the call and from the results' gradients.
        layouts_by_image: of each of `layouts`, whether its first dim is the image.
    """
    backward = one_of("mode", mode, MODES) != "forward"
    family, known = FAMILIES[call.op], [name for name, arg in _named(call).items() if isinstance(arg, Like)]
    leaves = tuple(range(len(known))) if leaves is None else leaves
    by_image = (*(each not in family.shared for each in known), *layouts_by_image)

    def inputs(generator: torch.Generator) -> Tensors:
        tensors = tuple(t for t in family.draw(call, generator) if isinstance(t, Tensor))
        tensors = *tensors, *layouts(*tensors)
        if not backward:
            return tensors
        grads = tuple(contiguous(*each, dtype=dtype_of(dtype)).draw(generator) for each in results)
        return *tensors, *grads, *layouts_of_grads(*grads)

    def both_ways(forward: Function, way: Way) -> Function:
        if not backward:

            def run(*tensors: Tensor) -> Tensors:
                with torch.inference_mode():
                    return way.finish(*as_tuple(forward(*tensors)))

            return run

        def run_back(*tensors: Tensor) -> Tensors:
            given, grads = list(tensors[: len(by_image)]), tensors[len(by_image) :]
            grads = grads[len(results) :] if way.own_grads else grads[: len(results)]
            wanted = way.leaves or leaves
            with torch.enable_grad():
                for i in wanted:
                    given[i] = given[i].detach().requires_grad_()
                outs = as_tuple(forward(*given))
                found = torch.autograd.grad(outs, [given[i] for i in wanted], grads)
            return way.finish(*(t.detach() for t in outs), *found)

        return run_back

    def truth(*tensors: Tensor) -> Tensors:
        return family.true(call.fill(tensors))[: len(results)]

    (first, stock), *others = ways.items()
    ours = replace(stock, build=lambda: _ours(call))
    return Case(
        kind="op", name=name, mode=mode, shape=shape, batch=batch, dtype=dtype, device=torch.device(device),
        inputs=inputs, reference=both_ways(truth, stock),
        # gradients of results come by image
        cut=lambda tensors, n: tuple(
            t[:n] if i >= len(by_image) or by_image[i] else t for i, t in enumerate(tensors)
        ),
        per_image=(True,) * len(results) + (tuple(by_image[i] for i in leaves) if backward else ()),
        variants={
            name: Variant(
                partial(lambda way: both_ways(way.build(), way), way), ours=name == "vitfast", needs=way.needs,
                part=way.part,
            )
            for name, way in ((first, stock), ("vitfast", ours), *others)
        },
        baseline=first, yardstick=first, work=count(backward=backward), notes=notes,
    )  # fmt: skip


def _ours(call: Call) -> Function:
    """The public function that calls this torch op."""
    function = getattr(ops, call.op)
    known = inspect.signature(function).parameters
    given = {name: arg for name, arg in _named(call).items() if name in known and arg is not None}
    tensors = [name for name, arg in given.items() if isinstance(arg, Like)]
    run = partial(function, **{name: arg for name, arg in given.items() if name not in tensors})
    return lambda *inputs: run(**dict(zip(tensors, inputs, strict=False)))


def _named(call: Call) -> dict[str, Any]:
    """Its arguments, without those that it leaves at the op's defaults."""
    return dict(zip(arguments(call.op), call.args, strict=False))
