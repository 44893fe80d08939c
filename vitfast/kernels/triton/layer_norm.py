"""Launches the norm kernels on rows as they lie, and says where they cannot run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from vitfast.kernels.operands import Norm, Tail
from vitfast.kernels.triton import layer_norm_rows
from vitfast.kernels.triton.compilation import Compilation
from vitfast.kernels.triton.launch import DTYPES, UNIT, device_reasons, launch, multiprocessors, rows_of

WIDEST = 8192
# with branch and gamma beside it a wider row does not fit into registers
WIDEST_SUM_BACKWARD = 4096
PLAIN = Tail()
# of x, weight and bias no gradient
NONE = (False, False, False)


class Tile(NamedTuple):
    """Rows that a program holds at once, and its warps."""

    rows: int
    warps: int


def why_not(x: Tensor, *others: Tensor | None) -> list[str]:
    """Everything that keeps the kernels from norming these rows; empty where they can."""
    reasons = device_reasons(x.device, x.dtype)
    reasons += [
        f"dtype {str(t.dtype)[6:]} (fp16, bf16 and fp32 only)"
        for t in others
        if t is not None and t.dtype not in DTYPES and t.dtype is not x.dtype
    ]
    if not 1 <= x.shape[-1] <= WIDEST:
        reasons.append(f"rows of {x.shape[-1]} (1 to {WIDEST} only)")
    return reasons


def forward_tile(C: int) -> Tile:
    """Some 32 numbers a thread: enough loads under way to fill the memory's pipe, and few enough registers."""
    block = triton.next_power_of_2(C)
    return Tile(max(1, 4096 // block), 4 if block <= 4096 else 8)


def backward_tile(C: int) -> Tile:
    """Half as many, beside which the sums of columns find room."""
    block = triton.next_power_of_2(C)
    return Tile(max(1, 2048 // block), 4 if block <= 1024 else max(8, block // 512))


class _Rows:
    """A tensor as rows at one distance: itself where its strides allow that, else a copy."""

    def __init__(self, t: Tensor | None):
        self.tensor = rows_of(t)
        self.step = 0
        if t is not None:
            self.step = self.tensor.stride(0)

    @property
    def aligned(self) -> bool:
        return self.tensor is None or (self.step % UNIT == 0 and self.tensor.data_ptr() % 16 == 0)


def forward(
    x: Tensor, norm: Norm, out_dtype: torch.dtype | None, *, branch: Tensor | None = None, tail: Tail = PLAIN,
    added: Tensor | None = None, total: Tensor | None = None, statistics: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(sum, normed, mean, rstd): the sum with a branch or `total`; mean and rstd fp32 [..., 1], None unless asked for.

    Args:
        x: [B, ..., C], the residual where there is a branch.
        out_dtype: of the normed rows; None: they are not made.
        branch: of x's shape.
        added: fp32 [C], which is in the sum too.
        total: contiguous, of x's shape, where the sum is written; x itself, where that is contiguous.
    """
    C, (weight, bias, eps, kind), (gamma, row_scale, _) = x.shape[-1], norm, tail
    tile = forward_tile(C)
    rows, branches = _Rows(x), _Rows(branch)
    count = rows.tensor.shape[0]
    if branch is not None:
        total = torch.empty_like(x, memory_format=torch.contiguous_format)
    out = None if out_dtype is None else torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean = rstd = None
    if statistics:
        mean, rstd = (x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) for _ in range(2))
    aligned = rows.aligned and branches.aligned
    unit = UNIT if aligned and C % UNIT == 0 else 1
    constants = {
        "C": C, "BLOCK": triton.next_power_of_2(C), "BM": tile.rows, "UNIT": unit, "BRANCH": branch is not None,
        "GAMMA": gamma is not None, "ROW_SCALE": row_scale is not None, "ADDED": added is not None,
        "TOTAL": total is not None, "WEIGHT": weight is not None, "BIAS": bias is not None, "OUT": out is not None,
        "STATISTICS": statistics, "RMS": kind == "rms",
    }  # fmt: skip
    tensors = [rows.tensor, branches.tensor, gamma, row_scale, added, weight, bias, total, out, mean, rstd]
    # a kernel takes no None; what stands in its place is not touched
    tensors = [x if t is None else t for t in tensors]
    numbers = (count, tokens_of(x), rows.step // unit, branches.step // unit, eps)
    launch(layer_norm_rows.norm_forward, (-(-count // tile.rows),), tensors, numbers, constants, tile.warps)
    return total, out, mean, rstd


def backward(
    grad: Tensor | None, x: Tensor, norm: Norm, mask: Sequence[bool], *, total_grad: Tensor | None = None,
    branch: Tensor | None = None, branch_dtype: torch.dtype | None = None, tail: Tail = PLAIN,
    need_gamma: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x (or of the sum), weight, bias, branch and gamma; None where they were not asked for.

    Args:
        grad: of the normed rows; None where nothing depends on them.
        x: the rows that were normed, [B, ..., C].
        mask: whether those of x, weight and bias are asked for.
        total_grad: of the sum itself, added to what comes through the norm.
        branch: read for gamma's gradient only.
        branch_dtype: of the branch's gradient, which is made where this is given.
    """
    C, device, (gamma, row_scale, _) = x.shape[-1], x.device, tail
    need_x, *need_vectors = mask
    need_weight, need_bias = (
        need and grad is not None and t is not None for need, t in zip(need_vectors, norm[:2], strict=True)
    )
    tile = backward_tile(C)
    grads, sums_of, rows, added = _Rows(grad), _Rows(total_grad), _Rows(x), _Rows(branch)
    count = rows.tensor.shape[0]
    programs = max(1, min(-(-count // tile.rows), 4 * multiprocessors(device)))
    # whole tiles, so that none is cut
    each = -(-count // (programs * tile.rows)) * tile.rows
    programs = -(-count // each) if count else 1
    vectors = need_weight or need_bias
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    dbranch = None if branch_dtype is None else torch.empty(x.shape, dtype=branch_dtype, device=device)
    sums = torch.empty(3, programs, C, dtype=torch.float32, device=device) if vectors or need_gamma else None
    aligned = all(each.aligned for each in (grads, sums_of, rows, added))
    unit = UNIT if aligned and C % UNIT == 0 else 1
    constants = {
        "C": C, "BLOCK": triton.next_power_of_2(C), "BM": tile.rows, "UNIT": unit, "NORM": grad is not None,
        "TOTAL_GRAD": total_grad is not None, "GAMMA": gamma is not None, "ROW_SCALE": row_scale is not None,
        "WEIGHT": norm.weight is not None, "DSUM": need_x or branch_dtype is not None or need_gamma,
        "DX": need_x, "DBRANCH": dbranch is not None, "DWEIGHT": vectors,
        "DGAMMA": need_gamma, "RMS": norm.kind == "rms",
    }  # fmt: skip
    tensors = [grads.tensor, sums_of.tensor, rows.tensor, added.tensor, gamma, row_scale, norm.weight]
    tensors += [dx, dbranch, sums]
    tensors = [x if t is None else t for t in tensors]
    steps = [t.step // unit for t in (grads, sums_of, rows, added)]
    numbers = (count, each, tokens_of(x), *steps, programs, norm.eps)
    if count:
        launch(layer_norm_rows.norm_backward, (programs,), tensors, numbers, constants, tile.warps)
    elif sums is not None:
        sums.zero_()
    wanted = (norm.weight if need_weight else None, norm.bias if need_bias else None, gamma if need_gamma else None)
    dweight, dbias, dgamma = (
        None if like is None else add_up(sums[i], like.dtype) for i, like in enumerate(wanted)
    )  # fmt: skip
    return dx, dweight, dbias, dbranch, dgamma


def backward_of_sum(
    grad: Tensor | None, total: Tensor, norm: Norm, mask: Sequence[bool], *, total_grad: Tensor | None,
    branch_dtype: torch.dtype | None, need_gamma: bool, **others: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """`backward`; where the rows are too wide for all of it at once, the branch's part in a kernel of its own."""
    more = {"branch_dtype": branch_dtype, "need_gamma": need_gamma, **others}
    if total.shape[-1] <= WIDEST_SUM_BACKWARD or (branch_dtype is None and not need_gamma):
        return backward(grad, total, norm, mask, total_grad=total_grad, **more)
    dx, dweight, dbias, *_ = backward(grad, total, norm, [True, *mask[1:]], total_grad=total_grad)
    *_, dbranch, dgamma = backward(None, total, norm, NONE, total_grad=dx, **more)
    return dx if mask[0] else None, dweight, dbias, dbranch, dgamma


def branch_grads(
    grad: Tensor, branch: Tensor | None, tail: Tail, dtype: torch.dtype, need_gamma: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a branch, in `dtype`, and of gamma, from that of residual + row_scale * gamma * branch."""
    if tail.gamma is None and tail.row_scale is None:
        return grad.to(dtype), None
    *_, dbranch, dgamma = backward(
        None, grad, Norm(None, None, 0.0, "layer"), NONE, total_grad=grad, branch=branch, branch_dtype=dtype, tail=tail,
        need_gamma=need_gamma,
    )  # fmt: skip
    return dbranch, dgamma


def add_up(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """[programs, C] in fp32 -> [C] in `dtype`, added in one order."""
    programs, C = sums.shape
    out = torch.empty(C, dtype=dtype, device=sums.device)
    launch(layer_norm_rows.add_up, (-(-C // 32), 1), (sums, out), (programs,), {"C": C, "BM": 32, "BN": 32}, 4)
    return out


def tokens_of(x: Tensor) -> int:
    """Rows of an image in x [B, ..., C]."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return max(1, rows // max(1, x.shape[0]))


def compilations(arch: int) -> Iterator[Compilation]:
    """What ViTs' norms are compiled to: their widths, alone, of sums, and for statistics only."""
    for C in (192, 384, 768, 1024, 1152, 1280, 4096, 8192):
        others = (("bf16", "fp32"), ("fp32", "fp32")) if C in (768, WIDEST_SUM_BACKWARD, WIDEST) else ()
        for dtype, wide in (("bf16", "bf16"), *others):
            for branch in (False, True):
                yield _forward_compilation(C, wide, dtype, branch, statistics=True, out=True)
                if not branch or C <= WIDEST_SUM_BACKWARD:
                    yield _backward_compilation(C, wide, dtype, branch)
        yield _forward_compilation(C, "bf16", "bf16", False, statistics=True, out=False)
        yield from (_added_compilation(C, total) for total in (False, True) if C <= 1280)
    yield Compilation(
        "add_up C768", layer_norm_rows.add_up, {"sums": "*fp32", "out": "*bf16", "programs": "i32"},
        {"C": 768, "BM": 32, "BN": 32}, ("sums", "out"), 4, 1,
    )  # fmt: skip


def _forward_compilation(C, wide, dtype, branch, statistics, out) -> Compilation:
    tile = forward_tile(C)
    flags = {"BRANCH": branch, "GAMMA": branch, "ROW_SCALE": branch, "ADDED": False, "TOTAL": branch, "WEIGHT": True}
    flags |= {"BIAS": True, "OUT": out, "STATISTICS": statistics, "RMS": False}
    return _compilation(layer_norm_rows.norm_forward, C, wide, dtype, tile, flags, "of a sum" if branch else "")


def _added_compilation(C, total) -> Compilation:
    """As prepared blocks with deferred biases have it: a vector beside the rows, no parameters."""
    flags = {"BRANCH": False, "GAMMA": False, "ROW_SCALE": False, "ADDED": True, "TOTAL": total, "WEIGHT": False}
    flags |= {"BIAS": False, "OUT": True, "STATISTICS": False, "RMS": False}
    variant = "with a vector, written" if total else "with a vector"
    return _compilation(layer_norm_rows.norm_forward, C, "bf16", "bf16", forward_tile(C), flags, variant)


def _backward_compilation(C, wide, dtype, branch) -> Compilation:
    flags = {"NORM": True, "TOTAL_GRAD": branch, "GAMMA": branch, "ROW_SCALE": branch, "WEIGHT": True}
    flags |= {"DSUM": True, "DX": True}
    flags |= {"DBRANCH": branch, "DWEIGHT": True, "DGAMMA": branch, "RMS": False}
    name = "of a sum" if branch else ""
    return _compilation(layer_norm_rows.norm_backward, C, wide, dtype, backward_tile(C), flags, name)


def _compilation(kernel, C, wide, dtype, tile, flags, variant) -> Compilation:
    """`wide`: the residual's dtype; `dtype`: the branch's and that of the normed rows."""
    constants = {"C": C, "BLOCK": triton.next_power_of_2(C), "BM": tile.rows, "UNIT": UNIT, **flags}
    own = {"x": wide, "total": wide, "dx": wide, "total_grad": wide, "mean": "fp32", "rstd": "fp32", "sums": "fp32"}
    own |= {"added": "fp32"}
    types: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        is_number = name in layer_norm_rows.RUNTIME
        types[name] = "i32" if is_number else "fp32" if name == "eps" else f"*{own.get(name, dtype)}"
    pointers = tuple(name for name, kind in types.items() if kind.startswith("*"))
    out = "" if flags.get("OUT", True) else "statistics"
    words = [kernel.__name__, wide, dtype if dtype != wide else "", f"C{C}", f"w{tile.warps}", out, variant]
    return Compilation(" ".join(filter(None, words)), kernel, types, constants, pointers, tile.warps, 2)
