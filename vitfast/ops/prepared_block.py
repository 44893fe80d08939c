"""A prepared block with deferred biases: cuBLAS multiplies into the residual stream, and one kernel norms it.

The other form of a prepared block is five products and kernels of ours, see linear_folded.py. Here, of a residual
stream h with `added` c, fp32 [D], pending (what h lacks of the tokens: the sum of biases that nobody has added yet):

    y = norm(h + c)                   one kernel; where the caller asks it writes h + c back, and c is 0 from there on
    q, k, v = y Wqkv^T + b            the bias in cuBLAS's epilogue
    h += attention(q, k, v) Wproj^T   in place, by cuBLAS; the bias of proj joins c
    y = norm(h + c)
    h += act(y W1^T + b1) W2^T        the activation in place, by one kernel; the bias of fc2 joins c

so that no pass over h is for a bias or a sum alone. Norms and LayerScale are in the weights. Which form runs, `defers`
asks of `dispatch`: it is the careful choice nowhere, only a measured one. Its configuration is that of the product with
W1: cuBLAS, or one of our own that activates before it writes.
Shapes: B images, N tokens, D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast import reference
from vitfast.choose import dispatch
from vitfast.choose.config_tables import BLAS, Product
from vitfast.choose.exportable import stock_only
from vitfast.kernels.operands import Norm
from vitfast.ops import _launch, _register
from vitfast.ops.attention import attention_qkv
from vitfast.ops.linear_folded import WHY_NO_CPU_KERNEL, added_linear, folded_linear

NAME = "prepared_block"


def defers(x: Tensor, fc1_weight: Tensor, act: str, gated: bool) -> bool:
    """Whether a block on x [B, N, D] runs in this form.

    Raises:
        NotImplementedError: the user forced it where it cannot run; with all the reasons.
    """
    if stock_only() or not x.numel() or not _launch.ready(NAME, x):
        return False
    from vitfast.kernels.triton import layer_norm

    why_not = layer_norm.why_not(x)
    if x.dtype is not fc1_weight.dtype:
        why_not.append(f"tokens of {str(x.dtype)[6:]} beside weights of {str(fc1_weight.dtype)[6:]}")
    return dispatch.choose(NAME, shape_of(x, fc1_weight, act, gated), x.device.index, why_not)


def shape_of(x: Tensor, fc1_weight: Tensor, act: str, gated: bool) -> tuple[str | int, ...]:
    """What choices are kept under: rows by powers of two."""
    F, D = fc1_weight.shape
    return str(x.dtype)[6:], (x.numel() // D).bit_length(), D, F, f"gated {act}" if gated else act


def normed(
    h: Tensor, added: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str,
    total: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """norm(h + added), contiguous, in h's dtype.

    Args:
        h: [B, N, D]; added: fp32 [D], or None for zeros.
        weight, bias: of the norm, [D].
        total: contiguous, where h + added is written too; h itself, where that is contiguous.
    """
    if _launch.ready(NAME, h):
        from vitfast.kernels.triton import layer_norm

        def launch() -> Tensor | None:
            norm = Norm(weight, bias, eps, kind)
            return layer_norm.forward(h, norm, h.dtype, added=added, total=total, statistics=False)[1]

        found: Tensor | None = _launch.launched(NAME, launch)
        if found is not None:
            return found
    wide = h.float() if added is None else h + added
    if total is not None:
        wide = total.copy_(wide).float()
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    return reference.layer_norm(wide, weight, bias, eps, kind, h.dtype)


def hidden(y: Tensor, weight: Tensor, bias: Tensor, act: str, gated: bool) -> Tensor:
    """act(y @ weight.T + bias), [B, N, F]; gated: that of the first half times the second, [B, N, F / 2]."""
    if gated:
        gate, value = F.linear(y, weight, bias).chunk(2, dim=-1)
        return reference.activation(gate, act) * value
    ready = y.numel() and _launch.ready(NAME, y)
    own: Tensor | None = _by_own_product(y, weight, bias, act) if ready else None
    if own is not None:
        return own
    if act == "gelu_tanh" and y.is_cuda:
        # cuBLASLt's epilogue; on a CPU this operator's GELU is the other one
        found = torch._addmm_activation(bias, y.flatten(0, -2), weight.t(), use_gelu=True)
        return found.view(*y.shape[:-1], -1)
    u = F.linear(y, weight, bias)
    if ready:
        from vitfast.kernels.triton import linear

        rows = u.view(-1, u.shape[-1])
        if _launch.launched(NAME, lambda: linear.finish(rows, linear.After(u.dtype, act=act), rows)) is not None:
            return u
    return reference.activation(u, act)


def _by_own_product(y, weight, bias, act):
    """`hidden` where another configuration than cuBLAS was chosen."""
    found = dispatch.config_for(NAME, shape_of(y, weight, act, False), y.device.index)
    config = Product(**found) if found else BLAS
    if config.kernel == "blas":
        return None
    from vitfast.kernels.triton import linear

    def launch():
        return linear.product(linear.rows_of(y), weight, linear.After(y.dtype, bias, act), config)[0]

    u = _launch.launched(NAME, launch)
    return None if u is None else u.view(*y.shape[:-1], -1)


def add_product(h: Tensor, x: Tensor, weight: Tensor) -> None:
    """h += x @ weight.T in place, h [B, N, D] contiguous, x [B, N, K]."""
    h.view(-1, h.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())


# for whoever measures and checks which form of a block is the one to take: a model calls the parts


def _in_form(
    x, pieces, qkv_weight, qkv_sums, qkv_wide_bias, qkv_bias, proj_weight, proj_bias, fc1_weight, fc1_sums,
    fc1_wide_bias, fc1_bias, fc2_weight, fc2_bias, between, heads, scale, eps1, eps2, norm, act, gated,
):  # fmt: skip
    # a copy in both forms, so that their times compare: one writes into it
    h = x.clone(memory_format=torch.contiguous_format)
    split = lambda t: t.unflatten(-1, (3, heads, -1))  # noqa: E731
    if defers(h, fc1_weight, act, gated):
        qkv = F.linear(normed(h, None, None, None, eps1, norm), qkv_weight, qkv_bias)
        add_product(h, attention_qkv(split(qkv), scale=scale), proj_weight)
        y = normed(h, between, None, None, eps2, norm)
        add_product(h, hidden(y, fc1_weight, fc1_bias, act, gated), fc2_weight)
        return h
    qkv = folded_linear(h, qkv_weight, qkv_sums, qkv_wide_bias, qkv_bias, pieces, eps1, norm, "none")
    h, pieces = added_linear(attention_qkv(split(qkv), scale=scale), proj_weight, proj_bias, h)
    weights = fc1_weight, fc1_sums, fc1_wide_bias, fc1_bias
    if gated:
        gate, value = folded_linear(h, *weights, pieces, eps2, norm, "none").chunk(2, dim=-1)
        u = reference.activation(gate, act) * value
    else:
        u = folded_linear(h, *weights, pieces, eps2, norm, act)
    return added_linear(u, fc2_weight, fc2_bias, h)[0]


def _fake(x, *_):
    return x.new_empty(x.shape)


prepared_block = _register.op(
    "prepared_block(Tensor x, Tensor? pieces, Tensor qkv_weight, Tensor qkv_sums, Tensor qkv_wide_bias,"
    " Tensor qkv_bias, Tensor proj_weight, Tensor? proj_bias, Tensor fc1_weight, Tensor fc1_sums, Tensor fc1_wide_bias,"
    " Tensor fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? between, int heads, float scale, float eps1,"
    " float eps2, str norm, str act, bool gated) -> Tensor",
    cpu=_in_form, cuda=_in_form, fake=_fake, cuda_kernel=NAME, why_no_cpu_kernel=WHY_NO_CPU_KERNEL,
)  # fmt: skip
_register.no_gradient(NAME)
