"""The two products of a prepared block as ops of their own: what is around them is in the weights already.

Nothing here is differentiable, and nothing is checked: `vitfast.prepare` builds what calls these and guards its use.
Statistics of rows, `pieces`, go from the product that wrote the rows to the one that norms them: fp32 [pieces, 2, M]
for M rows, mean and sum of squared distances from it of each of so many equal parts of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitfast import reference
from vitfast.choose.config_tables import Product
from vitfast.choose.exportable import stock_only
from vitfast.kernels.operands import Norm, Tail
from vitfast.ops import _launch, _register
from vitfast.ops._register import call
from vitfast.ops._stock import add_branch
from vitfast.ops.linear import _linear_stock, shape_of

WHY_NO_CPU_KERNEL = "models prepared for a CPU have packed products, which are no ops"


def folded_linear(
    x: Tensor, weight: Tensor, sums: Tensor, wide_bias: Tensor, bias: Tensor, pieces: Tensor | None, norm_eps: float,
    norm: str, act: str,
) -> Tensor:  # fmt: skip
    """act(norm(x) @ weight.T + bias), the norm's parameters being in weight and bias.

    Args:
        x: [B, ..., K].
        weight: [D, K]; sums: fp32 [D], those of its rows as rounded.
        wide_bias, bias: [D] in fp32, and in the weight's dtype.
        pieces: statistics of x's rows, where the product that wrote them has left any.
        norm: 'layer' or 'rms'.

    Returns:
        [B, ..., D] in the weight's dtype.
    """
    if stock_only():
        return reference.linear(x, weight, bias, None, None, norm_eps, norm, act)
    return call(_folded, False, x, weight, sums, wide_bias, bias, pieces, norm_eps, norm, act)


def added_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor | None]:
    """residual + x @ weight.T + bias [B, ..., D], and the statistics of its rows, where the kernel made them.

    Args:
        x: [B, ..., K]; weight: [D, K]; bias: [D] or None; residual: [B, ..., D].
    """
    if stock_only():
        return reference.linear(x, weight, bias, residual=residual), None
    return call(_added, False, x, weight, bias, residual)


def _folded_stock(x, weight, sums, wide_bias, bias, pieces, norm_eps, norm, act):
    return _linear_stock(x, weight, bias, Norm(None, None, norm_eps, norm), act, Tail(), False)[0]


def _folded_kernel(x, weight, sums, wide_bias, bias, pieces, norm_eps, norm, act):
    def launch(config):
        config = Product(**config) if config else None
        if config is not None and config.kernel == "turns":
            found = _by_turns(x, weight, sums, wide_bias, pieces, norm_eps, norm, act, config)
            if found is not None:
                return found
            config = None
        folded = launcher.Folded(weight, sums, wide_bias, norm, pieces=pieces, eps=norm_eps)
        found = launcher.folded_forward(x, folded, act, config)
        if found is None:
            # of fp32, or multiplied by cuBLAS: normed by a kernel of its own
            plain = Norm(None, None, norm_eps, norm)
            found, *_ = launcher.forward(x, weight, bias, plain, act, Tail(), False, config=config)
        return found

    found = None
    if x.numel() and _launch.ready("folded_linear", x):
        from vitfast.kernels.triton import linear as launcher

        found = _launch.attempt(
            "folded_linear", x, launcher.why_not(x, weight, norm, None, act, False),
            shape_of(x, weight, norm, act, "" if pieces is None else "pieces"), launch,
        )  # fmt: skip
    return _folded_stock(x, weight, sums, wide_bias, bias, pieces, norm_eps, norm, act) if found is None else found


def _by_turns(x, weight, sums, wide_bias, pieces, norm_eps, norm, act, config):
    """By csrc/cuda/product.cuh; None where that cannot run this call, as where its rows begin anywhere."""
    from vitfast.kernels.cuda import product
    from vitfast.kernels.triton import layer_norm
    from vitfast.kernels.triton.launch import rows_of

    rows, mean, rstd = rows_of(x), None, None
    if product.why_not(rows, weight, act):
        return None
    if pieces is None:
        *_, mean, rstd = layer_norm.forward(x, Norm(None, None, norm_eps, norm), None)
        mean, rstd = mean.flatten() if norm == "layer" else None, rstd.flatten()
    out = product.product(
        rows, weight, wide_bias, act, config, column_sums=sums, mean=mean, rstd=rstd, pieces=pieces, kind=norm,
        eps=norm_eps,
    )  # fmt: skip
    return out.view(*x.shape[:-1], weight.shape[0])


def _folded_fake(x, weight, sums, wide_bias, bias, pieces, norm_eps, norm, act):
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=weight.dtype)


def _added_stock(x, weight, bias, residual):
    norm, tail = Norm(None, None, 0.0, "none"), Tail(residual=residual)
    return _linear_stock(x, weight, bias, norm, "none", tail, False)[0], None


def _added_kernel(x, weight, bias, residual):
    def launch(config):
        from vitfast.kernels.triton import linear as launcher

        return launcher.forward_with_pieces(x, weight, bias, residual, Product(**config) if config else None)

    found = _attempt_added(x, weight, launch)
    return found or _added_stock(x, weight, bias, residual)


def _attempt_added(x, weight, launch):
    if not x.numel() or not _launch.ready("added_linear", x):
        return None
    from vitfast.kernels.triton import linear as launcher

    why_not = launcher.why_not(x, weight, "none", None, "none", False)
    return _launch.attempt("added_linear", x, why_not, shape_of(x, weight), launch)


def _added_fake(x, weight, bias, residual):
    """Whether there are statistics, and in how many parts, is asked of who would run it: the device's kernel, now."""

    def pieces_for(config):
        from vitfast.kernels.triton import linear as launcher

        return launcher.pieces_for(x, weight, Product(**config) if config else None)

    y = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=weight.dtype)
    pieces = None
    # a graph may go without: the next product then takes its own
    if not x.is_meta and isinstance(x.numel(), int):
        shape = _attempt_added(x, weight, pieces_for)
        pieces = None if shape is None else x.new_empty(shape, dtype=torch.float32)
    return add_branch(y, Tail(residual=residual)), pieces


_folded = _register.op(
    "folded_linear(Tensor x, Tensor weight, Tensor sums, Tensor wide_bias, Tensor bias, Tensor? pieces,"
    " float norm_eps, str norm, str act) -> Tensor",
    cpu=_folded_kernel if _launch.INTERPRETED else _folded_stock, cuda=_folded_kernel, fake=_folded_fake,
    cuda_kernel="folded_linear", planned=True, why_no_cpu_kernel=WHY_NO_CPU_KERNEL,
)  # fmt: skip
_added = _register.op(
    "added_linear(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> (Tensor, Tensor?)",
    cpu=_added_kernel if _launch.INTERPRETED else _added_stock, cuda=_added_kernel, fake=_added_fake,
    cuda_kernel="added_linear", planned=True, why_no_cpu_kernel=WHY_NO_CPU_KERNEL,
)  # fmt: skip
_register.no_gradient("folded_linear")
_register.no_gradient("added_linear")
