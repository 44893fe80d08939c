"""From functions of tensors to the `Case` of an op: inputs, gradients, and what is judged by image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitfast.bench.case import Case, Function, Tensors, Variant, Work
from vitfast.bench.factory import dtype_of, one_of

# of every norm
EPS = 1e-6
MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Way:
    """One way to compute an op.

    Attributes:
        build: returns the forward, a function of the op's inputs.
        needs: as in `Variant`.
        leaves: which inputs get gradients, where it reads others than everybody.
        part: as in `Variant`.
    """

    build: Callable[[], Function]
    needs: tuple[str, ...] = ()
    leaves: tuple[int, ...] | None = None
    part: bool = False


class Draw:
    """Tensors from a generator, on its device."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype):
        self.generator, self.dtype, self.device = generator, dtype, generator.device

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normally distributed with this deviation, rounded to the dtype."""
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return drawn.mul_(scale).to(self.dtype)

    def integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator, device=self.device)

    def constant(self, values: tuple[float, ...]) -> Tensor:
        """In fp32."""
        return torch.tensor(values, device=self.device)


def op_case(
    name: str, shape: Mapping[str, int], batch: int, mode: str, dtype: str, device: str,
    draw_inputs: Callable[[Draw], Tensors], *, images: tuple[bool, ...], results: tuple[tuple[int, ...], ...],
    truth: Function, ways: Mapping[str, Way], count: Callable[..., Work], leaves: tuple[int, ...] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Case:  # fmt: skip
    """The case of an op whose ways read the same inputs. The first is the baseline and the yardstick.

    Args:
        images: of each input, whether its first dim is the image.
        results: shapes of the forward's results, whose first dim is the image.
        truth: the forward in fp64.
        count: the work, from `backward`.
        leaves: which inputs get gradients; by default all.

    Raises:
        ValueError: an unknown mode or dtype.
    """
    to, backward = dtype_of(dtype), one_of("mode", mode, MODES) != "forward"
    leaves = tuple(range(len(images))) if leaves is None else leaves
    given = images + (True,) * (len(results) if backward else 0)

    def inputs(generator: torch.Generator) -> Tensors:
        draw = Draw(generator, to)
        return (*draw_inputs(draw), *(draw(*shape) for shape in results)) if backward else draw_inputs(draw)

    def both_ways(forward: Function, leaves: tuple[int, ...]) -> Function:
        if not backward:

            def run(*tensors: Tensor) -> Tensor | Tensors:
                with torch.inference_mode():
                    return forward(*tensors)

            return run

        def run_back(*tensors: Tensor) -> Tensors:
            inputs, grads = list(tensors[: len(images)]), tensors[len(images) :]
            with torch.enable_grad():
                for i in leaves:
                    inputs[i] = inputs[i].detach().requires_grad_()
                out = forward(*inputs)
                outs = out if isinstance(out, tuple) else (out,)
                found = torch.autograd.grad(outs, [inputs[i] for i in leaves], grads)
            return *(t.detach() for t in outs), *found

        return run_back

    def variant(name: str, way: Way) -> Variant:
        return Variant(
            lambda: both_ways(way.build(), way.leaves or leaves), ours=name.startswith("vitfast"), needs=way.needs,
            part=way.part,
        )  # fmt: skip

    first = next(iter(ways))
    return Case(
        kind="op", name=name, mode=mode, shape=shape, batch=batch, dtype=dtype, device=torch.device(device),
        inputs=inputs, reference=both_ways(truth, leaves),
        cut=lambda tensors, n: tuple(t[:n] if of_images else t for t, of_images in zip(tensors, given, strict=True)),
        per_image=(True,) * len(results) + (tuple(images[i] for i in leaves) if backward else ()),
        variants={name: variant(name, way) for name, way in ways.items()}, baseline=first, yardstick=first,
        work=count(backward=backward), notes=notes or {},
    )  # fmt: skip
