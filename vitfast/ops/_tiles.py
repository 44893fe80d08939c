"""Products of `linear` and `mlp` in inference by kernels of tiles (AMX), which read weights as they lie in memory."""

from __future__ import annotations

from vitfast.kernels import cpu as cpu_kernels
from vitfast.ops import _stock


def takes(x, norm, *weights):
    """Whether kernels of tiles, where the weights' dtype is `tiled`, can multiply what the norm makes of x."""
    fits = x.dtype is weights[0].dtype or norm.kind != "none"
    return x.numel() > 0 and fits and all(map(cpu_kernels.takes_unpacked, weights))


def product(x, weight, bias, norm, act, residual=None):
    """residual + act(norm(x) @ weight.T + bias); norm: of `operands`, or None."""
    first = None
    if norm is not None and norm.kind == "layer" and all(t is None or t.dtype is weight.dtype for t in (x, *norm[:2])):
        first = cpu_kernels.Norm(*(None if t is None else t.contiguous() for t in norm[:2]), norm.eps)
    elif norm is not None and norm.kind != "none":
        x = _stock.norm_forward(x, norm, weight.dtype)[0]
    return cpu_kernels.linear_unpacked(x.contiguous(), weight, bias, norm=first, act=act, residual=residual)


def product_and_tail(x, weight, bias, norm, act, tail):
    gamma, row_scale, residual = tail
    fits = residual is not None and residual.dtype is weight.dtype and residual.shape == (*x.shape[:-1], len(weight))
    if fits and gamma is row_scale is None:
        return product(x, weight, bias, norm, act, residual.contiguous())
    return _stock.add_branch(product(x, weight, bias, norm, act), tail)
