"""Starts the CUDA kernels of patch embedding: patch_embed.cuh and patch_rows.cuh of csrc/cuda, by `vitfast._C.cuda`.

The extension has no torch in it: tensors go there as addresses, sizes and strides, and a cudaError_t comes back.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vitfast.kernels import extension
from vitfast.kernels.cpu.arguments import DTYPES, FLOATS, PATCH_ORDERS
from vitfast.kernels.extension import DoesNotFit

HALVES = (torch.float16, torch.bfloat16)
WGMMA_ROWS = 128
# constants of channels have a place in shared memory; columns of a row are counted in 32 bits, and their bytes
MOST_CHANNELS, MOST_PIXELS = 1024, 1 << 29


@functools.cache
def functions() -> ModuleType | None:
    """The extension's functions for GPUs, None where it was built without them."""
    return getattr(extension.load()[0], "cuda", None)


def on_host() -> bool:
    """Whether the functions are those of the tests, which run the kernels on the host."""
    return hasattr(functions(), "set_shared_limit")


@dataclass(frozen=True)
class Tile:
    """Rows and columns of tokens that a program computes; `number` as the extension counts them."""

    number: int
    rows: int
    columns: int
    wgmma: bool
    fp32: bool

    def as_dict(self) -> dict[str, int]:
        return {"tile": self.number}


def tiles() -> list[Tile]:
    return [Tile(i, *each) for i, each in enumerate(functions().tiles())]


def code_for(capability: tuple[int, int], archs: Sequence[str]) -> str:
    """Which of the architectures of a build a card runs, as CUDA's driver chooses; "" where there is none.

    Machine code runs on cards of its generation that are not older, that for 9.0a on 9.0 only; any newer card compiles
    the newest intermediate code that it knows.
    """
    best, name_of_best = (False, (0, 0)), ""
    for name in archs:
        kind, _, number = name.partition("_")
        digits = number.rstrip("af")
        found = int(digits[:-1]), int(digits[-1])
        machine_code = kind == "sm"
        if found > capability or (digits != number and found != capability):
            continue
        if machine_code and found[0] != capability[0]:
            continue
        if (machine_code, found) >= best:
            best, name_of_best = (machine_code, found), name
    return name_of_best


@functools.cache
def code_of(device: torch.device) -> str:
    """`code_for` this device in this build; "host" where the tests run the kernels."""
    if on_host():
        return "host"
    return code_for(torch.cuda.get_device_capability(device), extension.build_report().get("archs", []))


@functools.cache
def device_reasons(device: torch.device) -> tuple[str, ...]:
    """What keeps the kernels from running on this device; empty where nothing does."""
    if functions() is None:
        module, why = extension.load()
        report = extension.build_report()
        return (f"no extension: {why}" if module is None else f"no CUDA part: {report['why_no_cuda']}",)
    if on_host():
        return ()
    if device.type != "cuda":
        return (f"tensors on {device.type} (CUDA only)",)
    status = extension.cuda_status()
    if not status["usable"]:
        return (status["why"],)
    if not code_of(device):
        major, minor = torch.cuda.get_device_capability(device)
        has = ", ".join(extension.build_report()["archs"])
        return (f"built for {has}, which compute capability {major}.{minor} does not run (VITFAST_CUDA_ARCHS)",)
    return ()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return 16 if on_host() else torch.cuda.get_device_properties(device).multi_processor_count


def why_not(images: Tensor, dtype: torch.dtype, patch: Sequence[int], *others: Tensor | None) -> list[str]:
    """What keeps the kernels from reading these images into numbers of `dtype`; empty where nothing does.

    Args:
        images: [B, C, H, W], or one of several, [C, H, W].
        others: positions and prefix tokens.
    """
    reasons = list(device_reasons(images.device))
    C = images.shape[-3]
    if C > MOST_CHANNELS or C * patch[0] * patch[1] >= MOST_PIXELS:
        most = f"(at most {MOST_CHANNELS} channels, 2^29 pixels)"
        reasons.append(f"{C} channels in patches of {patch[0]}x{patch[1]} {most}")
    if dtype not in FLOATS:
        reasons.append(f"weight in {str(dtype)[6:]} (fp16, bf16 and fp32 only)")
    if images.dtype not in DTYPES:
        reasons.append(f"images in {str(images.dtype)[6:]} (uint8, fp16, bf16 and fp32 only)")
    reasons += [f"tokens in {str(t.dtype)[6:]}" for t in others if t is not None and t.dtype not in FLOATS]
    return reasons


@functools.lru_cache(1024)
def configs(device: torch.device, dtype: torch.dtype, patches: int, D: int) -> tuple[Tile, ...]:
    """The tiles for weights [D, ...] in `dtype` and so many patches, the built-in choice first."""
    wgmma = code_of(device) in ("sm_90a", "host")
    usable = [tile for tile in tiles() if tile.fp32 == (dtype not in HALVES)]
    if code_of(device) != "host":
        # code for 9.0a has wgmma in the place of the other tile of so many rows
        usable = [tile for tile in usable if tile.fp32 or tile.rows < WGMMA_ROWS or tile.wgmma == wgmma]
    multiprocessors = _multiprocessors(device)
    programs = {tile: -(-patches // tile.rows) * -(-D // tile.columns) for tile in usable}
    # the largest tile that gives every multiprocessor something to do, else the most programs
    by_size = sorted(usable, key=lambda tile: (tile.rows * tile.columns, tile.wgmma), reverse=True)
    first = next((tile for tile in by_size if programs[tile] >= multiprocessors), by_size[-1])
    return first, *(tile for tile in usable if tile != first)


# ways to the weight's gradient: sums by a kernel that reads the images, or rows of pixels in memory and cuBLAS
GRADIENTS = ("fused", "rows")


def gradient_configs(device: torch.device, dtype: torch.dtype) -> list[dict[str, str]]:
    """The ways for this dtype, the built-in choice first."""
    if dtype not in HALVES:
        return [{"way": "rows"}]
    # cuBLAS has wgmma, by which it makes up for the rows' way through memory; the kernel has mma.sync
    first, second = reversed(GRADIENTS) if code_of(device) == "sm_90a" else GRADIENTS
    return [{"way": first}, {"way": second}]


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _typed(t: Tensor | None) -> tuple[int, int]:
    return _address(t), 0 if t is None else DTYPES[t.dtype]


def _strides(t: Tensor) -> list[int]:
    """Strides in numbers; 0 of what is 1 long, whose stride may be anything."""
    return [step if n > 1 else 0 for n, step in zip(t.shape, t.stride(), strict=True)]


def _grid(height: int, width: int, patch: Sequence[int]) -> tuple[int, int]:
    return -(-height // patch[0]), -(-width // patch[1])


def _must_fit(like: Tensor, name: str, t: Tensor | None, *shapes: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """Refuse a tensor that a kernel would read beside its memory: CUDA cannot see how long that is."""
    if t is None:
        return
    if t.device != like.device or tuple(t.shape) not in shapes or (dtype is not None and t.dtype is not dtype):
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        of_dtype = "" if dtype is None else f" in {str(dtype)[6:]}"
        raise DoesNotFit(
            f"patch_embed: {name} must be {wanted}{of_dtype} on {like.device}, got {list(t.shape)} in "
            f"{str(t.dtype)[6:]} on {t.device}"
        )


class _Images:
    """Images as the extension takes them; keeps what the addresses point to."""

    def __init__(
        self, images: Tensor | Sequence[Tensor], patch: Sequence[int], P: int, order: str, mean: Tensor | None,
        std: Tensor | None,
    ):  # fmt: skip
        packed = not isinstance(images, Tensor)
        self.like = like = images[0] if packed else images
        self.count = len(images)
        if like.dim() != 4 - packed:
            raise DoesNotFit(f"patch_embed: images must be [B, C, H, W] or a list of [C, H, W], got {list(like.shape)}")
        C = like.shape[-3]
        for i, image in enumerate(images if packed else ()):
            _must_fit(like, f"images[{i}]", image, (C, *image.shape[1:]), dtype=like.dtype)
        self.scaling = [None, None]
        for name, t in (("mean", mean), ("std", std)):
            if t is not None and tuple(t.shape) != (C,):
                raise DoesNotFit(f"patch_embed: {name} must be [{C}] to match images, got {list(t.shape)}")
        if like.dtype == torch.uint8 and mean is not None and std is not None:
            self.scaling = [t.to(like.device, torch.float32).contiguous() for t in (mean, std)]
        self.table, rows = None, []
        if packed:
            sizes = [torch.Size(_grid(*image.shape[1:], patch)).numel() for image in images]
            firsts = [0, *itertools.accumulate(sizes)]
            for image, first in zip(images, firsts[:-1], strict=True):
                rows.append((image.data_ptr(), first, *image.shape[1:], *_strides(image)))
            self.patches, shape, strides = firsts[-1], [len(rows), *like.shape], [0] * 4
            self.table = torch.tensor(rows, dtype=torch.int64, device="cpu").to(like.device, non_blocking=True)
        else:
            gh, gw = _grid(*like.shape[2:], patch)
            self.patches, shape, strides = like.shape[0] * gh * gw, list(like.shape), _strides(like)
        self.view = (
            like.data_ptr(), shape, strides, list(patch), P, PATCH_ORDERS[order], DTYPES[like.dtype],
            *map(_address, self.scaling), self.patches, rows, _address(self.table),
        )  # fmt: skip


def place_of(device: torch.device) -> tuple[int, int]:
    """Device and stream that a kernel shall run on."""
    if device.type != "cuda":
        return 0, 0
    return device.index, torch.cuda.current_stream(device).cuda_stream


def started(error: int, what: str) -> None:
    """
    Raises:
        RuntimeError: the kernel did not start; with CUDA's error.
    """
    if error:
        raise RuntimeError(f"{what} did not start: CUDA error {error}: {functions().cuda_error_text(error)}")


def embed(
    images: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor | None, positions: Tensor | None,
    prefix: Tensor | None, prefix_positions: Tensor | None, mean: Tensor | None, std: Tensor | None,
    out_dtype: torch.dtype, config: dict[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """Images -> tokens, in one kernel.

    Args:
        images: [B, C, H, W] of any strides, or [C, H_i, W_i] each, for which `why_not` is empty; not empty. Where the
            patch does not divide them there are zeros at right and bottom, after the normalisation.
        weight: [D, C, ph, pw]; bias: [D] or None, in the same dtype.
        positions: [N, D]; of several images [sum of N_i, D]; or None.
        prefix: [P, D], or for each image [images, P, D].
        prefix_positions: [P, D] to add to it, in the dtype of `positions`.
        mean, std: [C], for uint8 images, which become (images / 255 - mean) / std; without, 0 to 255.
        out_dtype: weight's, or fp32.
        config: a tile as `configs` names it; None, or one that this build has not, for the built-in choice.

    Returns:
        [B, P + N, D]; of several images [sum of P + N_i, D].

    Raises:
        ValueError: a tensor does not fit.
        RuntimeError: the kernel did not start; with CUDA's error.
    """
    D, patch = weight.shape[0], weight.shape[2:]
    P = 0 if prefix is None else prefix.shape[-2]
    given = _Images(images, patch, P, "chw", mean, std)
    count = given.count
    rows = count * P + given.patches
    like, of_each = given.like, given.patches // count if isinstance(images, Tensor) else given.patches
    _must_fit(like, "weight", weight, (D, like.shape[-3], *patch), dtype=None)
    _must_fit(like, "bias", bias, (D,), dtype=weight.dtype)
    _must_fit(like, "positions", positions, (of_each, D), dtype=None)
    _must_fit(like, "prefix", prefix, (P, D), (count, P, D), dtype=None)
    positions_dtype = None if positions is None else positions.dtype
    _must_fit(like, "prefix_positions", prefix_positions, (P, D), dtype=positions_dtype)
    tokens = weight.new_empty(rows, D, dtype=out_dtype)
    weight, bias, positions, prefix, prefix_positions = (
        None if t is None else t.contiguous() for t in (weight, bias, positions, prefix, prefix_positions)
    )
    numbers = [each.number for each in configs(weight.device, weight.dtype, given.patches, D)]
    tile = config["tile"] if config and config["tile"] in numbers else numbers[0]
    # one dtype for both kinds of positions
    like_positions = positions if positions is not None else prefix_positions
    error = functions().patch_embed(
        given.view, _typed(weight), _address(bias), D, (_address(positions), _typed(like_positions)[1]),
        _typed(prefix), P * D if prefix is not None and prefix.dim() == 3 else 0, _address(prefix_positions),
        _typed(tokens), tile, place_of(given.like.device),
    )  # fmt: skip
    started(error, "patch_embed")
    return tokens.view(count, rows // count, D) if isinstance(images, Tensor) else tokens


def weight_gradient(
    images: Tensor | Sequence[Tensor], weight: Tensor, grad: Tensor, P: int, mean: Tensor | None, std: Tensor | None,
    config: dict[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of `embed`'s weight, the same bits in every run.

    Args:
        images, mean, std: as in `embed`.
        weight: [D, C, ph, pw]; only its shape and dtype matter.
        grad: of the tokens, [B, P + N, D] or [sum of P + N_i, D], in weight's dtype.
        P: prefix tokens of an image.
        config: one of `gradient_configs`; None for the built-in choice.

    Raises:
        ValueError: a tensor does not fit.
        RuntimeError: a kernel did not start; with CUDA's error.
    """
    D, C, *patch = weight.shape
    config = config or gradient_configs(weight.device, weight.dtype)[0]
    grad = grad.contiguous()
    if config["way"] == "rows":
        if isinstance(images, Tensor):
            of_patches = grad[:, P:].reshape(-1, D)
        else:
            lengths = [P + torch.Size(_grid(*image.shape[1:], patch)).numel() for image in images]
            of_patches = torch.cat([tokens[P:] for tokens in grad.split(lengths)])
        return (of_patches.t() @ rows(images, patch, weight.dtype, mean, std)).view(weight.shape)
    given = _Images(images, patch, P, "chw", mean, std)
    tokens = given.count * P + given.patches
    fits = (given.count, tokens // given.count, D) if isinstance(images, Tensor) else (tokens, D)
    _must_fit(given.like, "grad", grad, fits, dtype=weight.dtype)
    _must_fit(given.like, "weight", weight, (D, given.like.shape[-3], *patch), dtype=None)
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    K = C * patch[0] * patch[1]
    # two programs for a multiprocessor; a split of less than some hundred patches costs more than it brings
    tiles = -(-D // 128) * -(-K // 128)
    splits = max(1, min(2 * _multiprocessors(weight.device) // tiles, given.patches // 256))
    parts = weight.new_empty(splits, D, K, dtype=torch.float32)
    error = functions().weight_gradient(
        given.view, _typed(grad), D, parts.data_ptr(), splits, out.data_ptr(), place_of(given.like.device)
    )  # fmt: skip
    started(error, "patch_embed_backward")
    return out


def rows(
    images: Tensor | Sequence[Tensor], patch: Sequence[int], dtype: torch.dtype, mean: Tensor | None = None,
    std: Tensor | None = None, order: str = "chw",
) -> Tensor:  # fmt: skip
    """Images as in `embed` -> rows of pixels [B * N, C * ph * pw] or [sum of N_i, C * ph * pw], in one kernel.

    Raises:
        RuntimeError: the kernel did not start; with CUDA's error.
    """
    given = _Images(images, patch, 0, order, mean, std)
    out = given.like.new_empty(given.patches, given.like.shape[-3] * patch[0] * patch[1], dtype=dtype)
    started(functions().patch_rows(given.view, _typed(out), place_of(given.like.device)), "patch_rows")
    return out
