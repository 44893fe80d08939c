"""Which of vitfast's ops a model calls, and with what: found by running a copy of it that has no memory.

No table of shapes has to follow what the model's code does: the code itself is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitfast.config import ViTConfig
from vitfast.inference.prepare import PreparedViT
from vitfast.model.vit import ViT
from vitfast.ops._check import autocast_on_meta

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
# the blocks in between are like the first, and the last one may compute fewer tokens
BLOCKS = 2
# of numbers drawn to check and time a call
SEED = 0


class Like(NamedTuple):
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def draw(self, generator: torch.Generator) -> Tensor:
        """Normally distributed numbers with this layout, on the generator's device."""
        reach = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        size = 0 if 0 in self.shape else reach
        storage = torch.randn(size, generator=generator, dtype=torch.float32, device=generator.device).to(self.dtype)
        return storage.as_strided(self.shape, self.stride)


def contiguous(*shape: int, dtype: torch.dtype) -> Like:
    """A tensor of this shape with nothing between its rows."""
    return Like(shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))), dtype)


class Call(NamedTuple):
    """One call of an op: its name, and its arguments with `Like` in place of every tensor."""

    op: str
    args: tuple[Any, ...]

    def fill(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The arguments with `tensors` in the places of their likes."""
        given = iter(tensors)
        return tuple(next(given) if isinstance(arg, Like) else arg for arg in self.args)

    def likes(self) -> list[Like]:
        return [arg for arg in self.args if isinstance(arg, Like)]

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in, the lowest that is there: under autocast some is wider, and pixels may be uint8."""
        named = [getattr(torch, arg, None) for arg in self.args if isinstance(arg, str)]
        found = [*(like.dtype for like in self.likes()), *named]
        floats = [dtype for dtype in found if isinstance(dtype, torch.dtype) and dtype.is_floating_point]
        return min(floats, key=lambda dtype: torch.finfo(dtype).bits)

    def __str__(self) -> str:
        shapes = " ".join(str(list(like.shape)) for like in self.likes())
        of_pixels = " of uint8" if any(like.dtype is torch.uint8 for like in self.likes()) else ""
        return f"{self.op} {shapes} {NAMES[self.dtype]}{of_pixels}"


class Prepared(NamedTuple):
    """What `vitfast.prepare` makes of a model as `config` describes it."""

    config: ViTConfig
    dtype: torch.dtype
    device: torch.device


class _Recorder(TorchDispatchMode):
    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        # by call, in the order in which they came first
        self.calls: dict[Call, None] = {}
        # where results have another shape than on 'meta'
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vitfast":
            likes = tuple(_like(arg) for arg in args)
            self.calls[Call(func._schema.name.removeprefix("vitfast::"), likes)] = None
            if self.device is not None:
                return _as_on(self.device, func, args)
        return func(*args, **(kwargs or {}))


def _as_on(device: torch.device, func: Any, args: Any) -> Any:
    """What an op gives on a device, without either's numbers."""
    # not with the package: `import vitfast` has a limit
    from torch._subclasses.fake_tensor import FakeTensorMode

    def move(t: Any, to: torch.device) -> Any:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=to) if isinstance(t, Tensor) else t

    meta = torch.device("meta")
    with FakeTensorMode():
        results = func(*(move(arg, device) for arg in args))
    if isinstance(results, (tuple, list)):
        return tuple(move(result, meta) for result in results)
    return move(results, meta)


def _like(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return Like(tuple(arg.shape), tuple(arg.stride()), arg.dtype)
    return tuple(arg) if isinstance(arg, list) else arg


def calls_of(
    config: ViTConfig, batch: int, dtype: torch.dtype, training: bool, autocast: torch.dtype | None = None
) -> list[Call]:
    """The distinct calls of a forward, and with `training` of its backward, of a model as `config` describes it.

    Parts that somebody replaced in a model are not in its config; what they call is not here.

    Args:
        batch: images.
        dtype: of weights and images.
        autocast: what autocast computes in, where it is on.
    """
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        model, images = _without_memory(config, batch, dtype)
        model.train(training)
        with _Recorder() as recorder, torch.set_grad_enabled(training):
            with autocast_on_meta(autocast):
                out = model(images)
            if training:
                out.sum().backward()
    return list(recorder.calls)


def calls_of_prepared(prepared: Prepared, batch: int) -> list[Call]:
    """`calls_of` of a prepared model on a GPU; in its own dtype, and with statistics of rows as its device makes them.

    Those depend on what each product runs as there: on its shape, on what was tuned, and on what is switched off.
    """
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.no_grad():
        model, images = _without_memory(prepared.config, batch, prepared.dtype)
        frozen = PreparedViT(model.eval(), prepared.dtype, None)
        with _Recorder(prepared.device) as recorder:
            frozen._forward(images)
    return list(recorder.calls)


def _without_memory(config: ViTConfig, batch: int, dtype: torch.dtype) -> tuple[ViT, Tensor]:
    """A model with few blocks, and images for it."""
    # meta tensors would take the way of CPUs with dropout of attention
    small = config.replace(depth=min(config.depth, BLOCKS), attn_dropout=0.0)
    with torch.device("meta"):
        return ViT.from_config(small).to(dtype), torch.empty(batch, small.channels, *size_of(small), dtype=dtype)


def size_of(config: ViTConfig) -> tuple[int, int]:
    """Height and width of images that such a model takes: a dynamic size need not be one that the patch divides."""
    if config.dynamic_pad:
        return config.image_size  # type: ignore[return-value]  # a pair since ViTConfig.__post_init__
    rows, columns = (n * patch for n, patch in zip(config.grid_size, config.patch_size, strict=True))  # type: ignore[arg-type]  # a pair as well
    return rows, columns


def distinct(found: Iterable[Call]) -> list[Call]:
    """Each call once, in the order in which they came first."""
    return list(dict.fromkeys(found))
