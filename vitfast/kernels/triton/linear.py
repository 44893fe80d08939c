"""Launches the kernels of linear layers on tensors as they lie, and says where they cannot run."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vitfast.choose import builtin, config_tables
from vitfast.choose.config_tables import Product
from vitfast.kernels import plans
from vitfast.kernels.operands import Norm, Tail
from vitfast.kernels.triton import layer_norm, linear_product
from vitfast.kernels.triton.compilation import Compilation
from vitfast.kernels.triton.counters import counters, forget
from vitfast.kernels.triton.launch import (
    DTYPES,
    UNIT,
    architecture,
    device_reasons,
    dot_precision,
    launch,
    multiprocessors,
    rows_of,
)


def why_not(x: Tensor, weight: Tensor, norm: str, gamma: Tensor | None, act: str, saves: bool) -> list[str]:
    """Everything that keeps the kernels from computing this layer; empty where they can."""
    reasons = device_reasons(x.device, weight.dtype)
    if x.dtype not in DTYPES:
        reasons.append(f"x of {str(x.dtype)[6:]} (fp16, bf16 and fp32 only)")
    if norm != "none" and x.shape[-1] > layer_norm.WIDEST:
        reasons.append(f"a norm of rows of {x.shape[-1]} (up to {layer_norm.WIDEST} only)")
    if act != "none" and gamma is not None and saves:
        reasons.append("activation and gamma together, with a backward")
    return reasons


@dataclass
class After:
    """What follows a product, see linear_finish.py.

    Attributes:
        beside: [M, N]: the residual, or with `slope` the numbers in front of the activation.
        tokens: rows of an image, for `row_scale`.
        aside: whether the second output is wanted.
        sums: whether the columns' sums over all rows are.
        pieces: whether statistics of the result's rows are, for a norm that is folded into the next product.
        dtype: of the result.
    """

    dtype: torch.dtype
    bias: Tensor | None = None
    act: str = "none"
    slope: bool = False
    aside: bool = False
    gamma: Tensor | None = None
    row_scale: Tensor | None = None
    tokens: int = 1
    beside: Tensor | None = None
    sums: bool = False
    pieces: bool = False

    def flags(self) -> dict[str, Any]:
        return {
            "BIAS": self.bias is not None, "ACT": self.act, "SLOPE": self.slope, "ASIDE": self.aside,
            "GAMMA": self.gamma is not None, "ROW_SCALE": self.row_scale is not None,
            "RESIDUAL": self.beside is not None and not self.slope, "SUMS": self.sums,
        }  # fmt: skip

    def is_nothing(self, dtype: torch.dtype) -> bool:
        """Whether a product in `dtype` is the result already."""
        flags = self.flags()
        return self.dtype == dtype and flags.pop("ACT") == "none" and not any(flags.values())


@dataclass
class Folded:
    """A norm that is folded into the product: what `fold` makes of the weights, and the rows' statistics.

    Attributes:
        pieces: in place of mean and rstd, what the product before has left of them, fp32 [pieces, 2, M], with eps.
    """

    weight: Tensor
    column_sums: Tensor
    bias: Tensor
    kind: str
    mean: Tensor | None = None
    rstd: Tensor | None = None
    pieces: Tensor | None = None
    eps: float = 0.0


def out_dtype(weight: Tensor, *others: Tensor | None) -> torch.dtype:
    """The highest of the weight's dtype and those of gamma, row_scale and residual."""
    dtype = weight.dtype
    for t in others:
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    return dtype


def fold(weight: Tensor, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """(weight * norm.weight, the sums of its rows, weight norm.bias + bias): [N, K] as weight, fp32 [N], fp32 [N]."""
    weight = rows_of(weight)
    N, K = weight.shape
    folded = weight if norm.weight is None else torch.empty_like(weight, memory_format=torch.contiguous_format)
    column_sums, folded_bias = (torch.empty(N, dtype=torch.float32, device=weight.device) for _ in range(2))
    tile = layer_norm.forward_tile(K)
    unit = UNIT if _aligned(weight, folded) and K % UNIT == 0 else 1
    constants = {
        "K": K, "BLOCK": triton.next_power_of_2(K), "BM": tile.rows, "UNIT": unit, "WEIGHT": norm.weight is not None,
        "NORM_BIAS": norm.bias is not None, "BIAS": bias is not None,
    }  # fmt: skip
    tensors = [weight if t is None else t for t in (weight, norm.weight, norm.bias, bias)]
    tensors += [folded, column_sums, folded_bias]
    grid = (-(-N // tile.rows),)
    launch(linear_product.fold_norm, grid, tensors, (N, weight.stride(0) // unit), constants, tile.warps)
    return folded, column_sums, folded_bias


def _aligned(*tensors: Tensor | None) -> bool:
    """Whether all rows begin at multiples of 16 bytes, as far as UNIT elements tell, and end at a multiple of UNIT."""
    return all(
        t is None or (t.data_ptr() % 16 == 0 and t.stride(0) % UNIT == 0 and t.shape[1] % UNIT == 0) for t in tensors
    )


def describable(*tensors: Tensor | None) -> bool:
    """Whether bulk copies take all of them: rows as `_aligned` says, none of which lies in another."""
    return _aligned(*tensors) and all(t is None or t.stride(0) >= t.shape[1] for t in tensors)


def product(
    x: Tensor, weight: Tensor, after: After, config: Product, *, across: bool = False, folded: Folded | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x @ weight.T and what follows: (result [M, N], the second output, the sums of columns in fp32 [N]).

    With `after.pieces` the statistics take the place of the sums; None where this configuration does not make them.

    Args:
        x: [M, K], rows at any distance.
        weight: [N, K], or with `across` [K, N]; in x's dtype.
        folded: its weight and bias take the places of `weight` and `after.bias`.
    """
    if folded is not None:
        weight = folded.weight
    (M, K), N = x.shape, weight.shape[1 if across else 0]
    bits = torch.finfo(x.dtype).bits
    if config.descriptors and (N % UNIT or not describable(x, weight, rows_of(after.beside))):
        config = config_tables.product_config(architecture(x.device), bits, M, N, K, multiprocessors(x.device), False)
    if config.kernel == "blas":
        return _by_blas(x, weight, after, across)
    out, aside, beside = _results(x, M, N, after)
    tiles_m, tiles_n = -(-M // config.block_m), -(-N // config.block_n)
    split = _split(config, tiles_m * tiles_n, K, multiprocessors(x.device))
    unit = UNIT if _aligned(x, weight, out, aside, beside) else 1
    constants = _constants(config, split, unit, K, across, x.dtype) | after.flags()
    if folded is not None:
        constants |= {"NORM": folded.kind, "BIAS": True}
        if folded.pieces is not None:
            constants |= {"PIECES": folded.pieces.shape[0], "PIECE": K // folded.pieces.shape[0]}
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=x.device)  # noqa: E731
    sums = new(tiles_m, N) if after.sums else None
    partials = arrived = pieces = None
    if after.pieces and (shape := _pieces(config, M, N)):
        pieces = new(*shape)
        constants["PIECES_OUT"] = True
    if split > 1:
        partials = new(tiles_m * tiles_n * split * config.block_m * config.block_n)
        arrived = plans.supplied(
            functools.partial(counters, x.device, tiles_m * tiles_n), functools.partial(forget, x.device)
        )
    bias = after.bias if folded is None else folded.bias
    mean = rstd = columns = None
    if folded is not None:
        mean, rstd, columns = folded.mean, folded.rstd, folded.column_sums
        mean = mean if folded.pieces is None else folded.pieces
    rest = [bias, after.gamma, after.row_scale, mean, rstd, columns, sums, pieces, partials, arrived]
    tiles = [x, weight, out, aside, beside]
    boxes = _boxes(tiles, config, across) if config.descriptors else ()
    steps = [x.stride(0) // unit, weight.stride(0) // unit, (out if beside is None else beside).stride(0) // unit]
    programs = tiles_m * tiles_n * split
    if config.persistent:
        programs = min(programs, config.programs * multiprocessors(x.device))
    numbers = (M, N // unit, K // unit, *steps, after.tokens, programs, 0.0 if folded is None else folded.eps)
    # a kernel takes no None; what stands in its place is not touched
    tensors = [out if t is None else t for t in (*tiles, *rest)]
    try:
        launch(
            linear_product.product, (programs,), tensors, numbers, constants, config.warps, config.stages, boxes=boxes
        )
    except BaseException:
        forget(x.device)
        raise
    if after.pieces:
        return out, aside, pieces
    return out, aside, None if sums is None else layer_norm.add_up(sums, torch.float32)


def _results(
    x: Tensor, M: int, N: int, after: After, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Result, second output and second input as rows."""
    if out is None:
        out = torch.empty(M, N, dtype=after.dtype, device=x.device)
    aside = torch.empty(M, N, dtype=x.dtype, device=x.device) if after.aside else None
    return out, aside, rows_of(after.beside)


def _pieces(config: Product, M: int, N: int) -> tuple[int, int, int] | None:
    """The shape of `After.pieces`, None where this configuration does not make them."""
    width = config.block_n // config.parts
    return None if config.kernel == "blas" or N % width else (N // width, 2, M)


def pieces_for(x: Tensor, weight: Tensor, config: Product | None = None) -> tuple[int, int, int] | None:
    """The shape of the statistics that `forward_with_pieces` makes of such tensors, whatever is in them."""
    return _pieces(config or config_for(x, weight), x.numel() // x.shape[-1], weight.shape[0])


def _split(config: Product, tiles: int, K: int, multiprocessors: int) -> int:
    """Programs a tile: as many as fill the device and leave each two steps, by powers of two."""
    most = min(config.split, max(1, multiprocessors // max(tiles, 1)), max(1, K // (2 * config.block_k)))
    return 1 << (most.bit_length() - 1)


def _constants(config: Product, split: int, unit: int, K: int, across: bool, dtype: torch.dtype) -> dict[str, Any]:
    each = -(-K // config.block_k) * config.block_k
    return {
        "BM": config.block_m, "BN": config.block_n, "BK": config.block_k, "GROUP": config_tables.GROUP,
        "PARTS": config.parts, "STAGES": config.stages, "UNIT": unit, "DESC": config.descriptors, "ACROSS": across,
        "SWAP": config.swap, "EVEN_K": each == K, "PERSISTENT": config.persistent, "FLATTEN": config.flatten,
        "SPLIT": split, "PRECISION": dot_precision(dtype), "NORM": "none", "PIECES_OUT": False, "PIECES": 0, "PIECE": 1,
        "AHEAD": config.ahead,
    }  # fmt: skip


def _boxes(tiles: list[Tensor | None], config: Product, across: bool) -> list[list[int] | None]:
    part = [config.block_m, config.block_n // config.parts]
    of_weight = [config.block_k, config.block_n] if across else [config.block_n, config.block_k]
    boxes = [[config.block_m, config.block_k], of_weight, part, part, None if config.ahead else part]
    return [None if t is None else box for t, box in zip(tiles, boxes, strict=True)]


def _by_blas(x, weight, after, across):
    """The product by cuBLAS, with the bias where that is enough, and a kernel for the rest."""
    y = x @ weight if across else F.linear(x, weight, after.bias)
    if across and after.bias is not None:
        y += after.bias
    rest = replace(after, bias=None, pieces=False)
    aside = None
    if after.aside and not after.slope:
        # it is what the product gave
        aside, rest = y, replace(rest, aside=False)
    if rest.is_nothing(y.dtype):
        return y, aside, None
    out, second, sums = finish(y, rest)
    return out, second if aside is None else aside, sums


def finish(y: Tensor, after: After, out: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What follows a product y [M, N] that is there already; the results of `product`."""
    M, N = y.shape
    fresh, aside, beside = _results(y, M, N, after, out)
    unit = UNIT if _aligned(y, fresh, aside, beside) else 1
    tile = config_tables.FINISH
    tiles_m = -(-M // tile.block_m)
    sums = torch.empty(tiles_m, N, dtype=torch.float32, device=y.device) if after.sums else None
    constants = {"BM": tile.block_m, "BN": tile.block_n, "UNIT": unit, **after.flags()}
    tensors = [y, fresh, aside, beside, after.bias, after.gamma, after.row_scale, sums]
    tensors = [fresh if t is None else t for t in tensors]
    numbers = (M, N // unit, y.stride(0) // unit, tensors[3].stride(0) // unit, after.tokens)
    grid = (tiles_m * -(-N // tile.block_n),)
    launch(linear_product.finish_rows, grid, tensors, numbers, constants, tile.warps)
    return fresh, aside, None if sums is None else layer_norm.add_up(sums, torch.float32)


def config_for(x: Tensor, weight: Tensor, across: bool = False) -> Product:
    """The choice of `config_tables.PRODUCT` for x [..., K], where nobody gives another."""
    M, K = x.numel() // max(1, x.shape[-1]), x.shape[-1]
    N = weight.shape[1 if across else 0]
    bits = torch.finfo(weight.dtype).bits
    aligned = K % UNIT == 0 and N % UNIT == 0
    return config_tables.product_config(architecture(x.device), bits, M, N, K, multiprocessors(x.device), aligned)


def configs(device: torch.device, dtype: torch.dtype, M: int, N: int, K: int) -> list[Product]:
    """Every configuration of the table that can run this, that of `config_for` first."""
    aligned = K % UNIT == 0 and N % UNIT == 0
    bits = torch.finfo(dtype).bits
    return config_tables.product_candidates(architecture(device), bits, M, N, K, multiprocessors(device), aligned)


def normed(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, config: Product, keep: bool
) -> tuple[Tensor, Folded | None, Tensor | None, Tensor | None]:
    """(rows for the product, a folded norm if there is one, mean, rstd): how a norm before a product is done.

    Folded where rows and weights are of one half precision. Wider rows, as of a residual stream under autocast, would
    be rounded before their mean is gone: these are normed by a kernel of their own, and so are those of fp32 and those
    that cuBLAS multiplies.
    """
    if norm.kind == "none":
        return rows_of(x.to(weight.dtype)), None, None, None
    folds = x.dtype == weight.dtype and x.dtype is not torch.float32 and config.kernel == "tiles"
    kept = norm.kind == "layer" and keep
    _, h, mean, rstd = layer_norm.forward(x, norm, None if folds else weight.dtype, statistics=folds or kept)
    if not folds:
        return rows_of(h), None, mean, rstd
    made = Folded(*fold(weight, bias, norm), norm.kind, mean, rstd)
    return rows_of(x), made, mean if kept else None, rstd if kept else None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, act: str, tail: Tail, saves: bool, *,
    config: Product | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(out, mean, rstd, pre, branch) of `ops.linear`; the last four None where no backward needs them."""
    config = config or config_for(x, weight)
    rows, folded, mean, rstd = normed(x, weight, bias, norm, config, saves)
    after = After(
        out_dtype(weight, *tail), bias, act, gamma=tail.gamma, row_scale=tail.row_scale, beside=tail.residual,
        tokens=layer_norm.tokens_of(x), aside=saves and (act != "none" or tail.gamma is not None),
    )  # fmt: skip
    out, aside, _ = product(rows, rows_of(weight), after, config, folded=folded)
    shape = (*x.shape[:-1], weight.shape[0])
    aside = None if aside is None else aside.view(shape)
    pre, branch = (aside, None) if act != "none" else (None, aside)
    return out.view(shape), mean, rstd, pre, branch


def folded_forward(x: Tensor, folded: Folded, act: str, config: Product | None = None) -> Tensor | None:
    """act(norm(x) @ weight.T + bias) of a norm that is in the weights already; None where it cannot be folded.

    Statistics of the rows are computed here where `folded` has no pieces of them.
    """
    weight = folded.weight
    config = config or config_for(x, weight)
    if config.kernel != "tiles" or x.dtype != weight.dtype or x.dtype is torch.float32:
        return None
    if folded.pieces is None:
        *_, mean, rstd = layer_norm.forward(x, Norm(None, None, folded.eps, folded.kind), None)
        folded = replace(folded, mean=mean, rstd=rstd)
    out, *_ = product(rows_of(x), weight, After(weight.dtype, act=act), config, folded=folded)
    return out.view(*x.shape[:-1], weight.shape[0])


def forward_with_pieces(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, config: Product | None = None
) -> tuple[Tensor, Tensor | None]:
    """residual + x @ weight.T + bias, and `After.pieces`, None where this configuration does not make them."""
    config = config or config_for(x, weight)
    after = After(out_dtype(weight, residual), bias, beside=residual, pieces=True)
    out, _, pieces = product(rows_of(x), weight, after, config)
    return out.view(residual.shape), pieces


# around the products of a ViT's block, by name
AROUND: dict[str, dict[str, Any]] = {
    "plain": {},
    "gelu": {"ACT": "gelu"},
    "norm": {"NORM": "layer"},
    "residual": {"RESIDUAL": True},
    "scaled residual": {"RESIDUAL": True, "GAMMA": True, "ROW_SCALE": True, "ASIDE": True},
    "norm gelu": {"NORM": "layer", "ACT": "gelu"},
    "norm gelu aside": {"NORM": "layer", "ACT": "gelu", "ASIDE": True},
    "slope": {"BIAS": False, "ACT": "gelu", "SLOPE": True, "ASIDE": True, "SUMS": True, "ACROSS": True},
    "wide residual": {"RESIDUAL": True},
    "pieces": {"NORM": "layer", "PIECES": 12, "PIECE": 64},
    "pieces gelu": {"NORM": "layer", "ACT": "gelu", "PIECES": 12, "PIECE": 64},
    "residual pieces": {"RESIDUAL": True, "PIECES_OUT": True},
}
# what of these an op has
OWN_FORMS = {
    "linear": ("plain", "norm", "residual", "scaled residual", "norm gelu", "norm gelu aside"),
    "folded_linear": ("pieces", "pieces gelu"), "added_linear": ("residual pieces",), "prepared_block": ("gelu",),
    "mlp": ("norm gelu", "norm gelu aside", "residual", "scaled residual"), "mlp_backward": ("slope",),
}  # fmt: skip
NO_FLAGS = {
    "NORM": "none", "BIAS": True, "ACT": "none", "SLOPE": False, "ASIDE": False, "GAMMA": False, "ROW_SCALE": False,
    "RESIDUAL": False, "SUMS": False, "ACROSS": False,
}  # fmt: skip


def compilations(arch: int) -> Iterator[Compilation]:
    """Every configuration of the tables of `arch` around the products of ViTs, and the kernels beside them."""
    measured = {name: [Product(**config) for config in builtin.configs(arch, name)] for name in OWN_FORMS}
    made: dict[str, Compilation] = {}
    for config in dict.fromkeys([row.config for row in config_tables.PRODUCT[arch]] + sum(measured.values(), [])):
        if config.kernel != "tiles":
            continue
        for name, flags in AROUND.items():
            default = any(name in OWN_FORMS[op] and config in configs for op, configs in measured.items())
            # where an MLP's backward was not measured cuBLAS computes it
            default |= name != "slope" and config_tables.some_choice(arch, config)
            for split in (1, config.split) if config.split > 1 else (1,):
                each = _product_compilation(config, name, flags, split, default)
                # configurations that differ in the most programs of a tile only share what takes one
                if default or each.name not in made:
                    made[each.name] = each
    yield from made.values()
    for name, flags in AROUND.items():
        if "norm" not in name and "pieces" not in name:
            yield _finish_compilation(name, flags)
    tile = layer_norm.forward_tile(768)
    yield Compilation(
        "fold_norm bf16 K768", linear_product.fold_norm,
        {"w": "*bf16", "norm_weight": "*bf16", "norm_bias": "*bf16", "bias": "*bf16", "folded": "*bf16",
         "column_sums": "*fp32", "folded_bias": "*fp32", "N": "i32", "w_step": "i32"},
        {"K": 768, "BLOCK": 1024, "BM": tile.rows, "UNIT": UNIT, "WEIGHT": True, "NORM_BIAS": True, "BIAS": True},
        ("w", "norm_weight", "norm_bias", "bias", "folded", "column_sums", "folded_bias"), tile.warps, 2,
    )  # fmt: skip


def _product_compilation(
    config: Product, name: str, flags: dict[str, Any], split: int, default: bool = True
) -> Compilation:
    constants = _constants(config, split, UNIT, 1 << 20, False, torch.bfloat16) | NO_FLAGS | flags
    wide = "wide" in name
    has_beside = constants["RESIDUAL"] or constants["SLOPE"]
    types = _types(linear_product.product.arg_names, constants, wide, folded=constants["NORM"] != "none")
    if config.descriptors:
        part = (config.block_m, config.block_n // config.parts)
        of_weight = (config.block_n, config.block_k)
        boxes = {"x": (config.block_m, config.block_k), "w": of_weight[::-1] if constants["ACROSS"] else of_weight}
        there = {"aside": constants["ASIDE"], "beside": has_beside and not config.ahead}
        for argument in ("x", "w", "out", *(name for name in there if there[name])):
            rows, columns = boxes.get(argument, part)
            types[argument] = f"tensordesc<{types[argument][1:]}[{rows},{columns}]>"
    pointers = tuple(argument for argument, kind in types.items() if kind.startswith("*"))
    words = [
        f"product {config.block_m}x{config.block_n}x{config.block_k} w{config.warps} s{config.stages}",
        f"p{config.parts}" if config.parts > 1 else "", "desc" * config.descriptors,
        f"persistent{config.programs}" if config.persistent else "", "flat" * config.flatten,
        "ahead" * config.ahead, "swap" * config.swap,
        f"split{split}" if split > 1 else "", name,
    ]  # fmt: skip
    return Compilation(
        " ".join(filter(None, words)), linear_product.product, types, constants, pointers, config.warps, config.stages,
        default,
    )  # fmt: skip


def _finish_compilation(name: str, flags: dict[str, Any]) -> Compilation:
    tile = config_tables.FINISH
    constants = {"BM": tile.block_m, "BN": tile.block_n, "UNIT": UNIT} | NO_FLAGS | flags
    constants = {key: constants[key] for key in linear_product.finish_rows.arg_names if key in constants}
    types = _types(linear_product.finish_rows.arg_names, constants, "wide" in name)
    pointers = tuple(argument for argument, kind in types.items() if kind.startswith("*"))
    return Compilation(
        f"finish_rows {name}", linear_product.finish_rows, types, constants, pointers, tile.warps, tile.stages
    )


def _types(names: list[str], constants: dict[str, Any], wide: bool, folded: bool = False) -> dict[str, str]:
    own = dict.fromkeys(("mean", "rstd", "column_sums", "sums", "pieces", "partials"), "fp32") | {"arrived": "i32"}
    own |= {"bias": "fp32"} if folded else {}
    own |= {"out": "fp32", "beside": "fp32"} if wide else {}
    types = {}
    for name in names:
        if name not in constants:
            types[name] = "i32" if name in linear_product.RUNTIME else f"*{own.get(name, 'bf16')}"
    if "eps" in types:
        types["eps"] = "fp32"
    return types
