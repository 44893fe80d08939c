"""Launches the attention kernels on tensors as they lie, and says where they cannot run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from vitfast.choose import builtin, config_tables
from vitfast.choose.config_tables import Config
from vitfast.kernels.operands import Extras, Starts
from vitfast.kernels.triton import attention_backward as backward_kernels
from vitfast.kernels.triton import attention_backward_short as short_kernels
from vitfast.kernels.triton import attention_forward as forward_kernels
from vitfast.kernels.triton.compilation import Compilation
from vitfast.kernels.triton.launch import (
    DTYPES,
    TILE,
    UNIT,
    architecture,
    device_reasons,
    dot_precision,
    launch,
    multiprocessors,
)

LOG2E = 1.4426950408889634
DROPOUT_STEPS = 1 << 31
NOTHING = Extras()


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, positive_scale: bool) -> list[str]:
    """Everything that keeps the kernels from computing this; empty where they can."""
    reasons = device_reasons(device, dtype)
    if head_dim % 8 or not 16 <= head_dim <= 128:
        reasons.append(f"head dim {head_dim} (multiples of 8 from 16 to 128 only)")
    if not positive_scale:
        reasons.append("scale of 0 or less, or too small for fp32")
    return reasons


def widths(D: int) -> tuple[int, int]:
    """Columns of a row's two parts, powers of two from 16 on, that hold D; the second is 0 where one is enough."""
    padded = -(-D // 16) * 16
    first = 1 << (padded.bit_length() - 1)
    rest = padded - first
    # 112 would be 64 + 32 + 16
    return (first, rest) if rest & (rest - 1) == 0 else (2 * first, 0)


def key_parts(keys: int) -> tuple[int, int, int]:
    """Up to three powers of two from 16 on, falling, with a sum of at least `keys`; less without the last of them."""
    padded = -(-keys // 16) * 16
    while padded.bit_count() > 3:
        padded += padded & -padded
    parts = [1 << bit for bit in reversed(range(padded.bit_length())) if padded >> bit & 1]
    return tuple(parts + [0] * (3 - len(parts)))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    extras: Extras = NOTHING,
    starts: Starts | None = None,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """The output [B, Nq, H * D] in q's dtype and lse [B, H, Nq] in fp32.

    Args:
        q: [B, Nq, H, D], any strides but the last, which is 1.
        k, v: [B, Nk, H, D], the same.
        scale: of the logits, above 0.
        extras: its seed on q's device, its rate below 1.
        starts: of packed sequences; q is then [1, all queries, H, D], k and v [1, all keys, H, D].
        config: how to compile it, instead of the table's choice.
    """
    q, k, v = map(_in_units, (q, k, v))
    call = _Call(q, k, v, scale, extras, starts)
    out = q.new_empty(q.shape[0], q.shape[1], call.H * call.D)
    lse = q.new_empty(q.shape[0], call.H, q.shape[1], dtype=torch.float32)
    if call.packed:
        # rows behind the last image belong to none
        out.zero_()
        lse.fill_(float("-inf"))
    config = config or forward_config(call)
    if config.descriptors and not (call.plain and _describable(k) and _describable(v)):
        config = replace(config, descriptors=False)
    tiles = -(-call.Nq // config.block_m)
    constants = _forward_constants(call, config)
    tensors = [q, k, v, out, lse, call.lengths, call.seed]
    sizes = [*call.strides, call.H, call.Nq, call.Nk]
    numbers = (call.scale, call.scale * LOG2E, call.threshold, call.inv_keep)
    boxes: list[Sequence[int] | None] = []
    if config.kernel == "short":
        kernel, programs = forward_kernels.forward_short, call.B * call.H * (1 if config.loop else tiles)
    else:
        kernel, programs = forward_kernels.forward_online, call.B * call.H * tiles
        if config.descriptors:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            first, second = _boxes(constants, "BN")
            boxes = [None, first, first, second, second]
        tensors = [q, k, v, k, v, *tensors[3:], call.q_starts, call.k_starts]
        sizes = [*sizes, q.shape[1]]
    numbers = (*sizes, *numbers)
    how = config.warps, config.stages, config.registers
    launch(kernel, (programs,), tensors, numbers, constants, *how, boxes=boxes)
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    extras: Extras = NOTHING,
    starts: Starts | None = None,
    *,
    config: Config | None = None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the shapes of q, k and v.

    Args:
        grad: of the output, [B, Nq, H * D], contiguous as `out` is.
        into: where to write them: [B, N, H, D] in memory with any strides that are multiples of 8, dk's equal to dv's,
            heads D apart; fresh contiguous tensors by default.
        (the others): as in `forward`.
    """
    grad, q, k, v, out = map(_in_units, (grad, q, k, v, out))
    call = _Call(q, k, v, scale, extras, starts)
    fresh = torch.zeros_like if call.packed else torch.empty_like
    dq, dk, dv = into or tuple(fresh(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    config = config or backward_config(call)
    by_head = grad.view(*q.shape)
    if config.descriptors and not (call.plain and all(map(_describable, (q, k, v, by_head)))):
        config = replace(config, descriptors=False)
    delta = torch.empty_like(lse) if config.kernel != "short" or config.delta_first else lse
    q_strides, k_strides = _units(dq, 2), _units(dk, 2)
    sizes = (call.H, call.Nq, call.Nk)
    numbers = (call.scale, call.threshold, call.inv_keep)
    beside = (call.lengths, call.seed, call.q_starts, call.k_starts)
    for each in _backward_constants(call, config):
        kernel, constants, warps = each
        programs, own = call.B * call.H, sizes
        boxes: list[Sequence[int] | None] = []
        if kernel is short_kernels.backward_delta:
            programs *= -(-call.Nq // constants["BM"])
            launch(kernel, (programs,), (grad, out, delta), sizes[:2], constants, warps)
            continue
        if kernel in (short_kernels.backward_short, backward_kernels.backward_head):
            tensors = (q, k, v, grad, out, lse, delta, dq, dk, dv, call.lengths, call.seed)
            strides = (*call.strides, *q_strides, *k_strides)
        elif kernel is backward_kernels.backward_queries:
            first, second = _boxes(constants, "BN")
            boxes = [None, first, first, second, second] if config.descriptors else []
            ours = [t.transpose(1, 2) if config.descriptors else t for t in (k, v)]
            tensors = (q, *ours, *ours, grad, out, lse, delta, dq, *beside)
            strides, own = (*call.strides, *q_strides), (*sizes, q.shape[1])
            programs *= -(-call.Nq // constants["BM"])
        else:
            first, second = _boxes(constants, "BM")
            boxes = [first, None, None, first, second, second] if config.descriptors else []
            ours = [t.transpose(1, 2) for t in (q, by_head)] if config.descriptors else [q, grad]
            tensors = (ours[0], k, v, ours[1], *ours, lse, delta, dk, dv, *beside)
            strides, own = (*call.strides, *k_strides), (*sizes, q.shape[1])
            programs *= -(-call.Nk // constants["BN"])
        numbers_of = (*strides, *own, *numbers)
        launch(kernel, (programs,), tensors, numbers_of, constants, warps, config.stages, boxes=boxes)
    return into or (dq, dk, dv)


class _Call:
    """What the arguments of both directions say."""

    def __init__(self, q, k, v, scale, extras, starts):
        self.B, self.Nq, self.H, self.D = q.shape
        self.Nk = k.shape[1]
        self.q_starts = self.k_starts = q
        self.packed = starts is not None
        if self.packed:
            self.q_starts, self.k_starts = starts.q.contiguous(), starts.k.contiguous()
            self.Nq, self.Nk = starts.most_queries, starts.most_keys
            self.B = len(self.q_starts) - 1
        # a kernel takes no None; what stands in its place is never read
        self.lengths = q if extras.lengths is None else extras.lengths.contiguous()
        self.seed = q if extras.seed is None else extras.seed
        self.has_lengths, self.dropout = extras.lengths is not None, extras.dropout_p > 0
        self.dtype, self.device = q.dtype, q.device
        self.scale = float(scale)
        self.threshold = min(round(extras.dropout_p * DROPOUT_STEPS), DROPOUT_STEPS - 1)
        self.inv_keep = 1.0 / (1.0 - extras.dropout_p)
        self.strides = [stride for t in (q, k, v) for stride in _units(t, 3)]
        # of rows, within a tile; `out` and the gradients have the rows of packed q, k and v or smaller ones
        self.wide = TILE * max(3 * self.H * self.D, *(abs(t.stride(1)) for t in (q, k, v))) >= 1 << 31

    @property
    def plain(self) -> bool:
        """Whether all keys of an image take part, and no other's lie where its own end."""
        return not self.packed and not self.has_lengths

    @property
    def bits(self) -> int:
        return _bits(self.dtype)

    @property
    def width(self) -> int:
        return sum(widths(self.D))

    @property
    def tiles(self) -> int:
        """Of 64 queries."""
        return self.B * self.H * -(-self.Nq // 64)

    def constants(self) -> dict[str, Any]:
        W0, W1 = widths(self.D)
        return {
            "D": self.D, "W0": W0, "W1": W1, "UNIT": UNIT, "WIDE": self.wide, "LENGTHS": self.has_lengths,
            "DROPOUT": self.dropout, "PRECISION": dot_precision(self.dtype),
        }  # fmt: skip


def _bits(dtype: torch.dtype) -> int:
    return 32 if dtype is torch.float32 else 16


def _in_units(t: Tensor) -> Tensor:
    """`t`, or a copy where rows do not begin at multiples of 16 bytes: reading single numbers takes longer."""
    aligned = t.data_ptr() % 16 == 0 and not any(stride % UNIT for stride in t.stride()[:-1])
    return t if aligned else t.clone(memory_format=torch.contiguous_format)


def _units(t: Tensor, dims: int) -> list[int]:
    return [stride // UNIT for stride in t.stride()[:dims]]


def _describable(t: Tensor) -> bool:
    """Whether bulk copies take rows of `_in_units`: of tensors none of whose numbers is there twice."""
    return t.stride(1) >= t.shape[3] and t.stride(0) > 0 and t.stride(2) > 0


def _boxes(constants: dict[str, Any], rows: str) -> tuple[list[int], list[int]]:
    """First and second parts of a head's rows, of [B, H, N, D]; the first again in place of second ones that are not.

    rows: the constant that says how many.
    """
    W0, W1 = constants["W0"], constants["W1"]
    return [1, 1, constants[rows], W0], [1, 1, constants[rows], W1 or W0]


def forward_configs(device: torch.device, dtype: torch.dtype, heads: int, D: int, Nq: int, Nk: int) -> list[Config]:
    """Every configuration of the table that can run this, the built-in choice first; `heads` of all images."""
    return _candidates(config_tables.FORWARD, device, dtype, heads, D, Nq, Nk)


def backward_configs(device: torch.device, dtype: torch.dtype, heads: int, D: int, Nq: int, Nk: int) -> list[Config]:
    """The same of the backward."""
    return _candidates(config_tables.BACKWARD, device, dtype, heads, D, Nq, Nk)


def _candidates(tables, device, dtype, heads, D, Nq, Nk) -> list[Config]:
    table = tables[architecture(device)]
    programs = heads * -(-Nq // 64) / multiprocessors(device)
    return config_tables.candidates(table, _bits(dtype), sum(widths(D)), Nk, programs)


def forward_config(call: _Call) -> Config:
    return _config(config_tables.FORWARD[architecture(call.device)], call, multiprocessors(call.device))


def backward_config(call: _Call) -> Config:
    return _config(config_tables.BACKWARD[architecture(call.device)], call, multiprocessors(call.device))


def _config(table: list[config_tables.Row], call: _Call, multiprocessors: int) -> Config:
    # packed sequences are of any length, which only blocks of keys can be
    keys = 1 << 30 if call.packed else call.Nk
    return config_tables.choose(table, call.bits, call.width, keys, call.tiles / multiprocessors, call.dropout)


def _forward_constants(call: _Call, config: Config) -> dict[str, Any]:
    common = call.constants() | {"BM": config.block_m}
    if config.kernel == "short":
        P0, P1, P2 = key_parts(call.Nk)
        return common | {"P0": P0, "P1": P1, "P2": P2, "LOOP": config.loop}
    how = {"PEEL": config.peel, "PACKED": call.packed, "DESC": config.descriptors and call.plain}
    return common | {"BN": config.block_n, "STAGES": config.stages, **how}


def _backward_parts(keys: int, config: Config) -> tuple[int, int, int]:
    """As `backward_short` takes them."""
    if config.block_n:
        return key_parts(-(-keys // config.block_n) * config.block_n)
    P0 = min(128, triton.next_power_of_2(max(keys, 16)))
    P1 = 0 if keys <= P0 else triton.next_power_of_2(max(keys - P0, 16))
    # on Hopper 64 spill, and 128 do not
    return P0, 128 if P1 == 64 and (config.stages == 1 or config.delta_first) else P1, 0


def _backward_constants(call: _Call, config: Config) -> list[tuple[Any, dict[str, Any], int]]:
    """Each kernel to launch, with its constants and warps."""
    common = call.constants() | {"BM": config.block_m, "STAGES": config.stages}
    if config.kernel == "short":
        P0, P1, P2 = _backward_parts(call.Nk, config)
        turned = config.delta_first and config.block_m < common["W0"]
        short = common | {"P0": P0, "P1": P1, "P2": P2, "DELTA": config.delta_first, "TURNED": turned}
        before = {name: common[name] for name in ("D", "W0", "W1", "WIDE")} | {"BM": 64}
        first = [(short_kernels.backward_delta, before, 4)] if config.delta_first else []
        return [*first, (short_kernels.backward_short, short, config.warps)]
    if config.kernel == "head":
        constants = common | {"BN": config.block_n, "PEEL": config.peel}
        return [(backward_kernels.backward_head, constants, config.warps)]
    common |= {"PACKED": call.packed, "DESC": config.descriptors and call.plain}
    return [
        (backward_kernels.backward_queries, common | {"BN": config.block_n, "PEEL": config.peel}, config.warps),
        (
            backward_kernels.backward_keys,
            common | {"BM": config.keys_m, "BN": config.keys_n},
            config.keys_warps,
        ),
    ]  # fmt: skip


# what ViTs run: (tokens, head dim), from a B/32 to a S/14 at 518 pixels and So400m; and parts of keys of all sizes
SHAPES = (
    (50, 64), (197, 64), (257, 64), (577, 64), (197, 16), (197, 32), (197, 72), (729, 72), (257, 80),
    (196, 80), (729, 96), (196, 96), (729, 128), (196, 128), (101, 64), (130, 64), (145, 64), (170, 64),
)  # fmt: skip
# variants with registers of their own, at (577, 64) and (197, 64)
VARIANTS = {"dropout": {"dropout_p": 0.1}, "lengths": {"lengths": True}, "packed": {"packed": True}}


def compilations(arch: int) -> Iterator[Compilation]:
    """What the tables of `arch` choose for the shapes of ViTs, in batches large and small and for one image.

    And what was measured to be fastest, at the shapes that it runs; and at (197, 64) and (577, 80) what else they list,
    for `vitfast tune`.
    """
    seen: set[str] = set()
    for B in (1, 8, 64):
        for N, D in SHAPES:
            # fp16 compiles to the same as bf16
            for dtype in (torch.bfloat16, torch.float32) if D in (64, 80, 128) else (torch.bfloat16,):
                yield from _compilations(arch, B, N, D, dtype, seen)
        for N in (197, 577):
            for name, extras in VARIANTS.items():
                yield from _compilations(arch, B, N, 64, torch.bfloat16, seen, name, **extras)
    for row in builtin.table(arch):
        if row.kernel.startswith("attention") and row.choice.kernel and row.choice.config is not None:
            config = Config(**row.choice.config)
            only = ([], [config]) if row.kernel.endswith("_backward") else ([config], [])
            yield from _compilations(arch, 64, *row.shape[3:], torch.bfloat16, seen, only=only)
    for N, D in ((197, 64), (577, 80)):
        yield from _compilations(arch, 64, N, D, torch.bfloat16, seen, default=False)


def _compilations(
    arch: int, B: int, N: int, D: int, dtype: torch.dtype, seen: set[str], variant: str = "", default: bool = True,
    only: tuple[list[Config], list[Config]] | None = None, **extras: Any,
) -> Iterator[Compilation]:  # fmt: skip
    q, k, v = torch.empty(B, N, 3, 12, D, dtype=dtype, device="meta").unbind(2)
    index = torch.empty(B + 1, dtype=torch.int32, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    beside = Extras(index if extras.get("lengths") else None, extras.get("dropout_p", 0.0), seed)
    call = _Call(q, k, v, D**-0.5, beside, Starts(index, index, N, N) if extras.get("packed") else None)
    # of an A100, the smallest of those with tables of their own
    tables, programs = (config_tables.FORWARD[arch], config_tables.BACKWARD[arch]), call.tiles / 108
    forwards, backwards = ([_config(table, call, 108)] for table in tables)
    if only is not None:
        forwards, backwards = only
    elif not default:
        forwards, backwards = (config_tables.candidates(table, call.bits, call.width, N, programs) for table in tables)
    found = []
    for config in forwards:
        kernel = forward_kernels.forward_short if config.kernel == "short" else forward_kernels.forward_online
        found += [(kernel, _forward_constants(call, config), config.warps, config.stages, default, config.registers)]
    for config in backwards:
        found += [(*each, config.stages, default, 0) for each in _backward_constants(call, config)]
    for kernel, constants, *how in found:
        # fp32 as `torch.set_float32_matmul_precision` says
        for precision in ("ieee", "tf32") if dtype is torch.float32 else ("ieee",):
            given = constants | ({"PRECISION": precision} if "PRECISION" in constants else {})
            yield from _compilation(kernel, call, given, *how, seen, variant)


def _compilation(kernel, call, constants, warps, stages, default, registers, seen, variant) -> Iterator[Compilation]:
    sizes = [f"{name}{constants[name]}" for name in ("D", "BM", "BN", "P0", "P1", "P2") if constants.get(name)]
    more = [constants["PRECISION"]] if call.dtype is torch.float32 and "PRECISION" in constants else []
    more += ["loop"] * bool(constants.get("LOOP")) + ["masked"] * (constants.get("PEEL") is False)
    more += [f"r{registers}"] * bool(registers) + ["desc"] * bool(constants.get("DESC"))
    more += ["delta first"] * bool(constants.get("DELTA"))
    more += [variant] * bool(variant and "LENGTHS" in constants)
    dtype = DTYPES[call.dtype]
    name = " ".join([kernel.__name__, dtype, *sizes, f"w{warps}", f"s{stages}", *more])
    if name in seen:
        return
    seen.add(name)
    own = {"lse": "*fp32", "delta": "*fp32", "seed": "*i64" if call.dropout else f"*{dtype}"}
    own["lengths"] = "*i32" if call.has_lengths else f"*{dtype}"
    own |= dict.fromkeys(("q_starts", "k_starts"), "*i32" if call.packed else f"*{dtype}")
    own |= dict.fromkeys(("scale", "scale_log2", "inv_keep"), "fp32")
    if constants.get("DESC"):
        moved, rows = (("q", "grad"), "BM") if kernel is backward_kernels.backward_keys else (("k", "v"), "BN")
        for names, box in zip((moved, [f"{name}_rest" for name in moved]), _boxes(constants, rows), strict=True):
            own |= dict.fromkeys(names, f"tensordesc<{dtype}[{','.join(map(str, box))}]>")
    tensors = ("q", "k", "v", "k_rest", "v_rest", "q_rest", "grad_rest", "out", "grad", "dq", "dk", "dv")
    types = {
        argument: own.get(argument, f"*{dtype}" if argument in tensors else "i32")
        for argument in kernel.arg_names
        if argument not in constants
    }
    pointers = tuple(argument for argument, kind in types.items() if kind.startswith("*"))
    ieee = call.dtype is torch.float32 and constants.get("PRECISION") == "ieee"
    yield Compilation(name, kernel, types, constants, pointers, warps, stages, default, ieee, registers)
