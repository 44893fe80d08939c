"""What an entry of the table of ops is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitfast import dispatch
from vitfast.calls import Call, Like
from vitfast.dispatch import Config

Tensors = tuple[Tensor, ...]
# of an op, some of whose results are there only where they are asked for
Results = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Family:
    """A torch op and the kernel that may run it.

    Attributes:
        kernel: its name in `dispatch.KERNELS`.
        run: the op. It asks `dispatch.choose` with that name, and `dispatch.tuned_config`.
        truth: the op's results in fp64, from fp64 arguments.
        smaller: a few small calls, odd sizes among them, that any configuration of the given call can run.
        configs: what may run a call on a device, the built-in choice first. None is that choice, for kernels that
            nobody can give another one, or that make several of them for one call.
        draw: arguments of a call.
        builtin: what `configs` has for the built-in choices of a call where None stands for them.
        grad: whether the results are gradients.
        shared: names of the arguments that are the same for all images: weights.
        sums: places of the results that are sums over the images: weights' gradients.
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

    def results(self, args: Sequence[Any]) -> Results:
        """What the op returns, as a tuple."""
        with torch.no_grad():
            return as_tuple(self.run(*args))

    def stock(self, args: Sequence[Any]) -> Results:
        """What stock operators return."""
        with dispatch.trying(self.kernel, "stock"):
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

    def cut(self, call: Call, tensors: Tensors, n: int) -> Tensors:
        """The tensors among the arguments for the first n images only."""
        if not self.shared:
            return tuple(t[:n] for t in tensors)
        return tuple(t if name in self.shared else t[:n] for name, t in zip(names(call), tensors, strict=True))


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
