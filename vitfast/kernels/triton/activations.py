"""The activations of ViTs and their derivatives, in fp32, for use inside kernels.

GELU is max(x, 0) - a Phi(-a) with a = |x|. log2(Phi(-a)) is smooth, and a polynomial in its place, fitted for the
least largest error of GELU, makes that differ from the true one by at most 5.4e-7 (degree 5, for results in half
precision) or 1.5e-8 (degree 8), before what fp32 rounds; torch's own, in fp32, differs by 1.2e-6. Phi itself, which the
derivative needs, differs by 2.6e-6 or 2.7e-8. At 0 it is exact, so that small numbers lose no digits, and for large a
it falls until exp2 gives 0: GELU(-1e4) = 0, where rational approximations that clamp their argument are wrong (6e-4).
"""

import triton
import triton.language as tl

from vitfast.kernels.triton.addresses import advance

# Triton's interpreter knows no assembler
COMPILED = tl.constexpr(isinstance(advance, triton.JITFunction))
# right of tensors: in the interpreter of Triton 3.8 what begins with a constexpr stays one
LOG2E = tl.constexpr(1.4426950408889634)
# beyond it the sigmoid inside the tanh form is 0 or 1 in fp32, and the cube of the largest numbers is infinite
TANH_ENDS = tl.constexpr(16.0)
TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
TANH_CUBE = tl.constexpr(0.044715)
QUICK = tl.constexpr(1.702)
# Phi(-16) is 0 in fp32
GELU_END = tl.constexpr(16.0)


@triton.jit
def reciprocal(x):  # fp32 [...], at least 1
    """1 / x to 1 ulp, in one instruction; division by anything takes seven."""
    if COMPILED:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return 1.0 / x


@triton.jit
def sigmoid(x):  # fp32 [...]
    return reciprocal(1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def sigmoid_and_slope(x):  # fp32 [...]
    """The slope is not s (1 - s), which loses all digits of 1 - s where s is near 1."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    r = reciprocal(1.0 + e)
    return tl.where(x < 0.0, e * r, r), e * r * r


@triton.jit
def normal_tail(a, FINE: tl.constexpr):  # fp32 [...], at least 0
    """Phi(-a), in one exponential and no division."""
    if FINE:
        p = a * (a * (a * -2.15602995e-06 + 3.14582176e-05) - 0.000149778847) - 0.000221173003
        p = a * (a * (a * (a * p + 0.00716727786) - 0.0525623448) - 0.459189028) - 1.15110695
    else:
        p = a * (a * (a * (a * -0.000488101621 + 0.00719871512) - 0.0521466248) - 0.459595859) - 1.1510005
    return tl.exp2(a * p - 1.0)


@triton.jit
def gelu_and_tail(x, FINE: tl.constexpr):  # fp32 [...]
    # finite where the tail is 0
    a = tl.abs(tl.minimum(x, GELU_END, tl.PropagateNan.ALL))
    tail = normal_tail(a, FINE)
    return tl.maximum(x, 0.0) - a * tail, tail


@triton.jit
def activate(x, ACT: tl.constexpr, TYPE: tl.constexpr):  # fp32 [...]
    """ACT: "none", "gelu", "gelu_tanh", "quick_gelu", "silu"; TYPE: what the result is rounded to."""
    if ACT == "gelu":
        x, _ = gelu_and_tail(x, TYPE.primitive_bitwidth == 32)
    elif ACT == "gelu_tanh":
        near = tl.minimum(tl.maximum(x, -TANH_ENDS, tl.PropagateNan.ALL), TANH_ENDS, tl.PropagateNan.ALL)
        x = x * sigmoid((near + near * TANH_CUBE * near * near) * TANH_SCALE)
    elif ACT == "quick_gelu":
        x = x * sigmoid(x * QUICK)
    elif ACT == "silu":
        x = x * sigmoid(x)
    return x


@triton.jit
def activate_and_slope(x, ACT: tl.constexpr, TYPE: tl.constexpr):  # fp32 [...]
    """The activation at x, GELU to the bit as `activate` has it, and its derivative."""
    slope = x * 0.0 + 1.0
    y = x
    if ACT == "gelu":
        y, tail = gelu_and_tail(x, TYPE.primitive_bitwidth == 32)
        bell = tl.exp2(x * x * (0.5 * -LOG2E))
        slope = tl.where(x < 0.0, tail, 1.0 - tail) + x * bell * 0.3989422804014327
    elif ACT == "gelu_tanh":
        near = tl.minimum(tl.maximum(x, -TANH_ENDS, tl.PropagateNan.ALL), TANH_ENDS, tl.PropagateNan.ALL)
        square = near * near
        s, more = sigmoid_and_slope((near + near * TANH_CUBE * square) * TANH_SCALE)
        y = x * s
        slope = s + near * more * (square * (3.0 * TANH_SCALE * TANH_CUBE) + TANH_SCALE)
    elif ACT == "quick_gelu":
        s, more = sigmoid_and_slope(x * QUICK)
        y = x * s
        slope = s + x * QUICK * more
    elif ACT == "silu":
        s, more = sigmoid_and_slope(x)
        y = x * s
        slope = s + x * more
    return y, slope
