"""What an entry of the table of ops is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitfast.check.calls import Call, Like
from vitfast.choose import dispatch
from vitfast.choose.dispatch import Config

# of a family of rows, the arguments that have a number an image, and those whose last dim are all rows
PER_IMAGE, PER_ROW = "row_scale", "pieces"
# images to compare beside the first and the last, and rows beside the first, the last and those at tiles' boundaries
DRAWN_IMAGES, DRAWN_ROWS = 2, 512
# a boundary of every tile with more rows than 16, which only calls of so few rows have
TILE = 32
# at boundaries
MOST_ROWS = 4096
Tensors = tuple[Tensor, ...]
# of an op, some of whose results are there only where they are asked for
Results = tuple[Tensor | None, ...]


def units(call: Call, rows: bool) -> int:
    """Rows or images of a call."""
    first = call.likes()[0].shape
    return math.prod(first[:-1]) if rows else first[0]


def some_images(call: Call, generator: torch.Generator, most: int = 2 + DRAWN_IMAGES) -> Tensor:
    """The last image, the first one and some others, in order; `most` of them."""
    count = units(call, rows=False)
    drawn = torch.randint(count, (DRAWN_IMAGES,), generator=generator, device=generator.device)
    ends = torch.tensor([count - 1, 0], device=drawn.device)
    return torch.cat([ends, drawn])[:most].unique()


def some_rows(call: Call, generator: torch.Generator) -> Tensor:
    """The first row, the last one, those on both sides of tiles' boundaries, and others."""
    count, step = units(call, rows=True), TILE
    while 2 * count > MOST_ROWS * step:
        step *= 2
    drawn = torch.randint(count, (DRAWN_ROWS,), generator=generator, device=generator.device)
    first = torch.arange(0, count, step, device=drawn.device)
    last = torch.tensor([count - 1], device=drawn.device)
    return torch.cat([first, (first - 1).clamp_(min=0), last, drawn]).unique()


@dataclass(frozen=True)
class Family:
    """A torch op and the kernel that may run it.

    Attributes:
        kernel: its name in `dispatch.KERNELS`.
        run: the op. It asks `dispatch.choose` with that name, and `dispatch.config_for`.
        truth: the op's results in fp64, from fp64 arguments.
        smaller: a few small calls, odd sizes among them, that any configuration of the given call can run.
        configs: what may run a call on a device, the built-in choice first. None is that choice, for kernels that
            nobody can give another one, or that make several of them for one call.
        draw: arguments of a call.
        builtin: what `configs` has for the built-in choices of a call where None stands for them.
        grad: whether the results are gradients.
        shared: names of the arguments that are the same for all images: weights.
        sums: places of the results that are sums over the images: weights' gradients.
        rows: whether what is not a sum comes row by row (all dims but the last), each from the same row of the
            arguments; else it comes image by image.
        places: of a call, which rows or images to compare, of results that are too many to know all of the truth.
        rivals: of several stock operators all that `dispatch.stock_config` may name, the usual ones first.
        extra: of an op whose last result only its kernel leaves, and in a form of its own: the results with something
            in its place that can be compared.
    """

    kernel: str
    run: Callable[..., Any]
    truth: Callable[..., Any]
    smaller: Callable[[Call], Sequence[Call]]
    configs: Callable[[Call, torch.device], Sequence[Config | None]]
    draw: Callable[[Call, torch.Generator], tuple[Any, ...]]
    builtin: Callable[[Call, torch.device], Sequence[Config | None]] | None = None
    grad: bool = False
    shared: frozenset[str] = frozenset()
    sums: frozenset[int] = frozenset()
    rows: bool = False
    places: Callable[[Call, torch.Generator], Tensor] = some_images
    rivals: tuple[Config, ...] = ()
    extra: Callable[[Results], Results] | None = None

    def results(self, args: Sequence[Any]) -> Results:
        """What the op returns, as a tuple."""
        with torch.no_grad():
            return as_tuple(self.run(*args))

    def stock(self, args: Sequence[Any], config: Config | None = None) -> Results:
        """What stock operators return; `config` as `dispatch.stock_config` has it."""
        with dispatch.trying(self.kernel, "stock", config):
            return self.results(args)

    def with_config(self, args: Sequence[Any], config: Config | None) -> Results:
        """What the kernel returns.

        Raises:
            NotImplementedError: it cannot run; with all the reasons.
        """
        with dispatch.trying(self.kernel, "kernel", config):
            return self.results(args)

    def true(self, args: Sequence[Any]) -> Results:
        """What is right, in fp64."""
        return as_tuple(self.truth(*(t.double() if isinstance(t, Tensor) else t for t in args)))

    def to_check(self, call: Call, device: torch.device) -> Sequence[Config | None]:
        """The configurations that a call runs with where nobody tuned."""
        if self.builtin is not None:
            return self.builtin(call, device)
        return self.configs(call, device)[:1]

    def by_image(self, results: Results) -> tuple[bool, ...]:
        """Of the results that are there, whether the first dim is the image."""
        return tuple(i not in self.sums for i, result in enumerate(results) if result is not None)

    def units(self, call: Call) -> int:
        """Rows or images of a call, whichever its results come by."""
        return units(call, self.rows)

    def comparable(self, results: Results) -> Results:
        """The results, without a form that only some configurations give them."""
        return results if self.extra is None else self.extra(results)

    def measurable(self, results: Results) -> Tensors:
        """Those that stock operators have too, where they are there."""
        return present(results if self.extra is None else results[:-1])

    def cut(self, call: Call, tensors: Tensors, n: int) -> Tensors:
        """The tensors among the arguments for the first n images only."""
        if not self.shared:
            return tuple(t[:n] for t in tensors)
        found = zip(names(call), tensors, strict=True)
        return tuple(t if name in self.shared else _first(name, t, n, tensors[0]) for name, t in found)

    def quiet(self, call: Call, args: Sequence[Any], places: Tensor) -> tuple[Any, ...]:
        """The arguments, with gradients of 0 but at `places`: what sums up over all rows is then known from few."""
        if not self.sums:
            return tuple(args)
        return tuple(
            self._quiet(arg, places) if name.startswith("grad") and isinstance(arg, Tensor) else arg
            for name, arg in zip(arguments(call.op), args, strict=True)
        )

    def _quiet(self, grad: Tensor, places: Tensor) -> Tensor:
        shape = (*grad.shape[:-1], 1) if self.rows else (len(grad), *[1] * (grad.dim() - 1))
        mask = torch.zeros(math.prod(shape), dtype=grad.dtype, device=grad.device)
        mask[places] = 1
        mask = mask.view(shape)
        # in place where every number is there once, for the layout
        return grad * mask if 0 in grad.stride() else grad.mul_(mask)

    def part(self, call: Call, args: Sequence[Any], places: Tensor) -> tuple[Any, ...]:
        """The arguments of these rows [n, C] or images only."""
        known = arguments(call.op) if self.shared else ("",) * len(args)
        count = self.units(call)
        return tuple(
            self._part(name, arg, places, count) if isinstance(arg, Tensor) and name not in self.shared else arg
            for name, arg in zip(known, args, strict=True)
        )

    def _part(self, name: str, t: Tensor, places: Tensor, count: int) -> Tensor:
        if not self.rows and name == PER_ROW:
            return t.unflatten(-1, (count, -1))[..., places, :].flatten(-2)
        if not self.rows:
            return t[places]
        if name == PER_IMAGE:
            return t[places // (count // len(t))]
        return t[..., places] if name == PER_ROW else t.reshape(-1, t.shape[-1])[places]

    def taken(self, results: Results, places: Tensor) -> Results:
        """Of the results these rows or images; sums whole."""
        return tuple(
            t if t is None or i in self.sums else (t.reshape(-1, t.shape[-1]) if self.rows else t)[places]
            for i, t in enumerate(results)
        )


def _first(name: str, t: Tensor, n: int, like: Tensor) -> Tensor:
    return t[..., : n * (t.shape[-1] // len(like))] if name == PER_ROW else t[:n]


def as_tuple(results: Any) -> Results:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def present(results: Results) -> Tensors:
    """Those that are there."""
    return tuple(result for result in results if result is not None)


def arguments(op: str) -> list[str]:
    """Names of the arguments of a torch op of this package."""
    return [argument.name for argument in getattr(torch.ops.vitfast, op).default._schema.arguments]


def names(call: Call) -> list[str]:
    """Names of the tensors among the arguments of a call."""
    return [name for name, arg in zip(arguments(call.op), call.args, strict=True) if isinstance(arg, Like)]


def draw_all(call: Call, generator: torch.Generator) -> tuple[Any, ...]:
    """Random normal numbers for every tensor."""
    return call.fill([like.draw(generator) for like in call.likes()])
